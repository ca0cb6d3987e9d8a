//! A host that writes registers as it likes, and a device that ends what it began at any time, or late.

use super::choices::Choices;
use crate::registers::{Effect, Limits, Registers, Run};
use crate::spec::registers::{Cap, csts};

/// What the device knows of what runs, by the effects that it was told.
#[derive(Default)]
struct Device {
    /// Starts that were not reported, with queues that may run.
    starting: Option<Run>,
    running: Option<Run>,
    stopping: bool,
}

impl Device {
    fn take(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Start(run, queues) => {
                    assert!(self.idle(), "a start while something runs");
                    assert!(queues.sq_entries >= 2 && queues.cq_entries >= 2);
                    assert!((queues.sq | queues.cq).is_multiple_of(queues.page));
                    assert!((4096..=65536).contains(&queues.page));
                    self.starting = Some(run);
                }
                Effect::Stop(_) => {
                    assert!(!self.idle(), "a stop of nothing");
                    assert!(!self.stopping, "two stops at a time");
                    self.stopping = true;
                }
                Effect::Resume(..) => panic!("nothing was saved"),
                Effect::SubsystemReset | Effect::Mask(_) => {}
            }
        }
    }

    fn idle(&self) -> bool {
        self.starting.is_none() && self.running.is_none() && !self.stopping
    }
}

/// Plays bytes as register accesses.
///
/// # Panics
/// Where CSTS says what it must not, a read is other than what was read before without a write, or effects contradict each other.
pub fn fuzz_registers(data: &[u8]) {
    let c = &mut Choices(data);
    let cap = Cap {
        mqes_z: 4095,
        timeout: 4,
        mps_min: 0,
        mps_max: 4,
    };
    let mut r = Registers::new(Limits { cap });
    let mut device = Device::default();
    for _ in 0..400 {
        if c.is_empty() {
            break;
        }
        let effects = match c.u8() {
            0..=3 => {
                let mut value = c.of(&[0, 1, 1]) & 1 | 6 << 16 | 4 << 20;
                value |= (c.of(&[0, 0, 0, 1, 2, 3]) % 4) << 14;
                match c.u8() {
                    0xf0.. => value ^= c.u32(),
                    n => value |= u32::from(n % 6 == 1) << 7,
                }
                r.write(0x14, &value.to_le_bytes())
            }
            4 => r.write(0x24, &c.of(&[0x001f_001f, 0x0fff_0fff, 0, 1]).to_le_bytes()),
            5 => {
                let at = [0x28, 0x2c, 0x30, 0x34][usize::from(c.u8() % 4)];
                r.write(at, &c.of(&[0, 0x1000, 0x2000, 0x1_0000]).to_le_bytes())
            }
            6 => r.write(0x20, &c.of(&[0x4e56_4d65, 0]).to_le_bytes()),
            7 => r.write(0x1c, &c.of(&[0x10, 0xff]).to_le_bytes()),
            8..=9 => match device.starting.take() {
                Some(run) => {
                    let well = c.u8() % 8 != 1;
                    device.running = Some(run);
                    r.started(run, well);
                    Vec::new()
                }
                None => Vec::new(),
            },
            10..=12 if device.stopping => {
                device = Device::default();
                r.stopped()
            }
            13 => match device.running {
                Some(run) => {
                    r.fail(run);
                    Vec::new()
                }
                None => Vec::new(),
            },
            14 => match c.u8() % 2 {
                0 => r.reset(),
                _ => r.subsystem_reset(),
            },
            15 => r.write(
                if c.u8() % 2 == 0 { 0x0c } else { 0x10 },
                &c.u32().to_le_bytes(),
            ),
            _ => {
                let at = u64::from(c.u32() % 0x1000);
                let len = usize::from(c.u8() % 9);
                let bytes: Vec<u8> = (0..len).map(|_| c.u8()).collect();
                r.write(at, &bytes)
            }
        };
        device.take(effects);
        check(&r, &device);
    }
}

fn check(r: &Registers, device: &Device) {
    let status = r.csts();
    let (rdy, cfs) = (status & csts::RDY != 0, status & csts::CFS != 0);
    let legal = csts::RDY | csts::CFS | csts::SHST | csts::NSSRO;
    assert_eq!(status & !legal, 0, "reserved bits");
    assert_ne!(
        status & csts::SHST,
        csts::SHST,
        "the reserved shutdown status"
    );
    assert_eq!(r.is_stopping(), device.stopping);
    if !r.cc().enable() {
        assert!(!cfs, "fatal although it is disabled");
        assert!(
            !rdy || device.stopping,
            "ready although nothing was enabled"
        );
    }
    if status & csts::SHST == csts::SHST_OCCURRING {
        assert!(device.stopping, "a shutdown that nobody does");
    }
    if status & csts::SHST == csts::SHST_COMPLETE {
        assert!(!device.stopping, "complete, but queues run");
    }
    if r.takes_commands() {
        assert!(rdy && !cfs && device.running.is_some() && !device.stopping);
    }
    let mut bytes = [0; 4];
    r.read(0x1c, &mut bytes);
    assert_eq!(u32::from_le_bytes(bytes), status);
}
