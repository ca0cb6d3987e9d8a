//! A PCI function in a few lines: what a host's probe asks for, and a BAR of registers that keep what is written.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bluff_vfio_client::Event;
use bluff_vfio_user::{
    Errno, IoEventFd, IrqChange, Irqs, Mapping, Progress, Region, RegionMap, Target, Ticket,
    Written,
};

pub const BAR: u32 = 0;
pub const CONFIG: u32 = 7;
/// Bytes of the BAR; the second page can be mapped, and begins at this offset of the file.
pub const BAR_LEN: usize = 0x4000;
pub const FILE_OFFSET: u64 = 0x2000;
pub const DOORBELLS: u64 = 0x1000;
/// Where the BAR has the MSI-X table and its pending bits.
pub const TABLE: u32 = 0x2000;
pub const PENDING: u32 = 0x3000;
pub const VECTORS: u16 = 40;
const POWER: usize = 0x40;
const MSIX: usize = 0x50;
const EXPRESS: usize = 0x60;

pub struct Function {
    pub config: Vec<u8>,
    pub bar: Vec<u8>,
    pub file: Arc<OwnedFd>,
    pub maps: Vec<(Mapping, Option<OwnedFd>)>,
    pub irqs: BTreeMap<(u32, u32), OwnedFd>,
    pub log: Vec<String>,
    pub io_event: Arc<OwnedFd>,
    /// Unmaps and resets are over when this is set.
    pub released: Arc<AtomicBool>,
    pub held: Vec<Ticket>,
}

fn file() -> OwnedFd {
    let file = rustix::fs::memfd_create("bar", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, FILE_OFFSET + BAR_LEN as u64).unwrap();
    file
}

impl Function {
    pub fn new() -> Self {
        let event = Event::new().unwrap();
        let mut this = Self {
            config: vec![0; 256],
            bar: vec![0; BAR_LEN],
            file: Arc::new(file()),
            maps: Vec::new(),
            irqs: BTreeMap::new(),
            log: Vec::new(),
            io_event: Arc::new(event.as_fd().try_clone_to_owned().unwrap()),
            released: Arc::new(AtomicBool::new(true)),
            held: Vec::new(),
        };
        this.power_on();
        this
    }

    fn power_on(&mut self) {
        let config = &mut self.config;
        config.fill(0);
        config[..4].copy_from_slice(&[0xb1, 0x1f, 0x01, 0x00]);
        config[6] = 0x10;
        config[8..12].copy_from_slice(&[3, 0x02, 0x08, 0x01]);
        config[0x10] = 4;
        config[0x2c..0x30].copy_from_slice(&[0xb2, 0x1f, 0x02, 0x00]);
        config[0x34] = POWER as u8;
        config[POWER..POWER + 2].copy_from_slice(&[1, MSIX as u8]);
        config[MSIX..MSIX + 2].copy_from_slice(&[0x11, EXPRESS as u8]);
        config[MSIX + 2] = (VECTORS - 1) as u8;
        config[MSIX + 4..MSIX + 8].copy_from_slice(&TABLE.to_le_bytes());
        config[MSIX + 8..MSIX + 12].copy_from_slice(&PENDING.to_le_bytes());
        config[EXPRESS..EXPRESS + 2].copy_from_slice(&[0x10, 0]);
        config[EXPRESS + 7] = 0x10;
    }

    fn write_config(&mut self, at: usize, value: u8) {
        // The size of the BAR: its lowest 14 bits are zero, but for the type.
        let mask = match at {
            0x04 | 0x05 | 0x12..0x18 => 0xff,
            0x11 => 0xc0,
            _ if at == POWER + 4 => 3,
            _ if at == MSIX + 3 => 0xc0,
            _ if at == EXPRESS + 9 && value & 0x80 != 0 => {
                self.log.push("function level reset".into());
                return self.power_on();
            }
            _ => 0,
        };
        self.config[at] = self.config[at] & !mask | value & mask;
    }

    fn later(&mut self, ticket: Ticket) -> Progress {
        if self.released.load(Ordering::Acquire) {
            return Progress::Done;
        }
        self.held.push(ticket);
        Progress::Pending
    }
}

impl Target for Function {
    fn regions(&self) -> u32 {
        9
    }

    fn region(&self, index: u32) -> Region {
        let map = RegionMap {
            file: self.file.clone(),
            offset: FILE_OFFSET,
            areas: vec![(DOORBELLS, 0x1000)],
        };
        let (size, map) = match index {
            BAR => (BAR_LEN as u64, Some(map)),
            CONFIG => (256, None),
            _ => return Region::default(),
        };
        Region {
            size,
            read: true,
            write: true,
            map,
        }
    }

    fn io_event_fds(&mut self, region: u32) -> Vec<IoEventFd> {
        let event = |offset, value| IoEventFd {
            offset,
            size: 4,
            value,
            file: self.io_event.clone(),
            store: None,
        };
        match region {
            BAR => vec![event(DOORBELLS, None), event(DOORBELLS + 8, Some(7))],
            _ => Vec::new(),
        }
    }

    fn irq_types(&self) -> u32 {
        5
    }

    fn irqs(&self, index: u32) -> Irqs {
        match index {
            0 => Irqs { count: 1, flags: 7 },
            2 => Irqs {
                count: u32::from(VECTORS),
                flags: 1,
            },
            _ => Irqs::default(),
        }
    }

    fn read(&mut self, region: u32, offset: u64, to: &mut [u8]) -> Result<(), Errno> {
        let from = if region == BAR {
            &self.bar
        } else {
            &self.config
        };
        to.copy_from_slice(&from[offset as usize..][..to.len()]);
        Ok(())
    }

    fn write(
        &mut self,
        region: u32,
        offset: u64,
        from: &[u8],
        _ticket: Ticket,
    ) -> Result<Written, Errno> {
        let at = offset as usize;
        if region == BAR {
            self.bar[at..at + from.len()].copy_from_slice(from);
            return Ok(Written::Done);
        }
        for (at, byte) in (at..).zip(from) {
            self.write_config(at, *byte);
        }
        Ok(Written::Done)
    }

    fn set_irqs(&mut self, index: u32, change: IrqChange) -> Result<(), Errno> {
        match change {
            IrqChange::Disable => self.irqs.retain(|key, _| key.0 != index),
            IrqChange::Now { action, vectors } => {
                self.log.push(format!("{action:?} {index} {vectors:?}"));
            }
            IrqChange::Assign { start, files, .. } => {
                self.log
                    .push(format!("assign {index} {start} {}", files.len()));
                for (vector, file) in (start..).zip(files) {
                    self.irqs.remove(&(index, vector));
                    self.irqs.extend(file.map(|file| ((index, vector), file)));
                }
            }
        }
        Ok(())
    }

    fn map(
        &mut self,
        mapping: Mapping,
        file: Option<OwnedFd>,
        ticket: Ticket,
    ) -> Result<Progress, Errno> {
        self.maps.push((mapping, file));
        Ok(self.later(ticket))
    }

    fn unmap(&mut self, gone: &[Mapping], ticket: Ticket) -> Progress {
        self.maps.retain(|(m, _)| !gone.contains(m));
        self.later(ticket)
    }

    fn reset(&mut self, ticket: Ticket) -> Progress {
        self.log.push("reset".into());
        self.later(ticket)
    }

    fn disconnected(&mut self, _ticket: Ticket) -> Progress {
        Progress::Done
    }
}
