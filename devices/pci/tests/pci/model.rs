//! Any sequence of reads and writes of any width, against a model: three masks for configuration space, and a
//! byte array for the rest.

use bluff_pci::{PciFunction, Region, Written};
use proptest::prelude::*;

use crate::rig::{
    BAR0, BOUND, COMMAND, DEVICE_CONTROL, DEVICE_STATUS, MASTER, MEMORY, MSIX, PCIE, PENDING,
    PMCSR, Rig, TABLE, VECTORS, WRITABLE,
};

#[derive(Clone, Debug)]
enum Act {
    Read(Region, u64, usize),
    Write(Region, u64, Vec<u8>),
    Reset,
}

/// What is known of the sample function.
struct Model {
    config: Vec<u8>,
    fresh: Vec<u8>,
    writable: Vec<u8>,
    clearable: Vec<u8>,
    kept: Vec<u8>,
    /// BAR 0 without its table.
    registers: Vec<u8>,
    table: Vec<u8>,
}

impl Model {
    fn new(fresh: Vec<u8>) -> Self {
        let mask = |registers: &[(u64, u32)]| {
            let mut mask = vec![0; 4096];
            for (at, bits) in registers {
                mask[*at as usize..][..4].copy_from_slice(&bits.to_le_bytes());
            }
            mask
        };
        let mut table = vec![0; usize::from(VECTORS) * 16];
        table.iter_mut().skip(12).step_by(16).for_each(|b| *b = 1);
        Self {
            config: fresh.clone(),
            fresh,
            writable: mask(WRITABLE),
            clearable: mask(&[(COMMAND, 0xf900_0000), (DEVICE_CONTROL, 0xf_0000)]),
            kept: mask(&[
                (DEVICE_CONTROL, 0xe0),
                (PCIE + 0x10, 0xcb),
                (PCIE + 0x30, 0x2f),
            ]),
            registers: vec![0; BAR0 as usize],
            table,
        }
    }

    fn reset(&mut self, flr: bool) {
        for at in 0..4096 {
            let kept = if flr { self.kept[at] } else { 0 };
            self.config[at] = self.fresh[at] & !kept | self.config[at] & kept;
        }
        self.registers.fill(0);
        self.table.fill(0);
        self.table
            .iter_mut()
            .skip(12)
            .step_by(16)
            .for_each(|b| *b = 1);
    }

    fn size(region: Region) -> Option<u64> {
        match region {
            Region::Config => Some(4096),
            Region::Bar(0) => Some(BAR0),
            Region::Bar(_) => None,
        }
    }

    fn inside(region: Region, offset: u64, len: usize) -> bool {
        let end = u128::from(offset) + len as u128;
        Self::size(region).is_some_and(|size| end <= u128::from(size))
    }

    /// Whether BARs answer; if not, the access is noted.
    fn answers(&mut self, read: bool) -> bool {
        let powered = self.config[PMCSR as usize] & 3 == 0;
        let on = powered && u16::from(self.config[COMMAND as usize]) & MEMORY != 0;
        if !on {
            self.config[DEVICE_STATUS as usize] |= if read { 0b1001 } else { 0b1010 };
        }
        on
    }

    fn at_table(&mut self, offset: u64) -> Option<&mut [u8]> {
        let at = offset.checked_sub(TABLE)? as usize;
        self.table.get_mut(at..).filter(|rest| !rest.is_empty())
    }

    fn is_pending(offset: u64) -> bool {
        (PENDING..PENDING + 16).contains(&offset)
    }

    fn read(&mut self, region: Region, offset: u64, len: usize) -> Vec<u8> {
        let ones = vec![0xff; len];
        if !Self::inside(region, offset, len) {
            return ones;
        }
        let at = offset as usize;
        if region == Region::Config {
            return self.config[at..at + len].to_vec();
        }
        let aligned = [1, 2, 4, 8].contains(&len) && at.is_multiple_of(len);
        if !self.answers(true) || !aligned {
            return ones;
        }
        if let Some(table) = self.at_table(offset) {
            return if len < 4 { ones } else { table[..len].to_vec() };
        }
        if Self::is_pending(offset) {
            return if len < 4 { ones } else { vec![0; len] };
        }
        self.registers[at..at + len].to_vec()
    }

    fn write(&mut self, region: Region, offset: u64, from: &[u8]) {
        if !Self::inside(region, offset, from.len()) {
            return;
        }
        let at = offset as usize;
        if region == Region::Config {
            let power = self.config[PMCSR as usize] & 3;
            let mut flr = false;
            for (i, new) in from.iter().enumerate() {
                let at = at + i;
                let (w, c) = (self.writable[at], self.clearable[at]);
                self.config[at] = (self.config[at] & !w | new & w) & !(new & c);
                flr |= at as u64 == DEVICE_CONTROL + 1 && new & 0x80 != 0;
            }
            if let state @ (1 | 2) = self.config[PMCSR as usize] & 3 {
                self.config[PMCSR as usize] ^= state ^ power;
            }
            if flr {
                self.reset(true);
            }
            return;
        }
        let aligned = [1, 2, 4, 8].contains(&from.len()) && at.is_multiple_of(from.len());
        if !self.answers(false) || !aligned || Self::is_pending(offset) {
            return;
        }
        if let Some(table) = self.at_table(offset) {
            if from.len() >= 4 {
                table[..from.len()].copy_from_slice(from);
                let controls = self.table.iter_mut().enumerate();
                for (_, byte) in controls.filter(|(i, _)| i % 16 > 11) {
                    *byte &= 1;
                }
                let upper = self.table.iter_mut().enumerate();
                upper.filter(|(i, _)| i % 16 > 12).for_each(|(_, b)| *b = 0);
            }
            return;
        }
        self.registers[at..at + from.len()].copy_from_slice(from);
    }
}

/// Offsets where something is, and any others.
fn offset(region: Region) -> BoxedStrategy<u64> {
    match region {
        Region::Config => prop_oneof![
            8 => 0u64..0x120,
            4 => prop::sample::select(vec![COMMAND, PMCSR, DEVICE_CONTROL, DEVICE_CONTROL + 1, MSIX]),
            1 => 0u64..4200,
            1 => any::<u64>(),
        ]
        .boxed(),
        _ => prop_oneof![
            4 => TABLE..TABLE + 0x500,
            2 => PENDING - 8..PENDING + 24,
            2 => (0u64..0x40).prop_map(|n| n * 4),
            1 => BAR0 - 8..BAR0 + 8,
            1 => any::<u64>(),
        ]
        .boxed(),
    }
}

fn act() -> impl Strategy<Value = Act> {
    let region = prop_oneof![
        3 => Just(Region::Config),
        4 => Just(Region::Bar(0)),
        1 => Just(Region::Bar(1)),
    ];
    let len = prop_oneof![6 => prop::sample::select(vec![1usize, 2, 4, 8]), 2 => 0usize..20, 1 => Just(300)];
    let access = (region, len).prop_flat_map(|(region, len)| {
        let bytes = prop_oneof![
            prop::collection::vec(any::<u8>(), len),
            Just(vec![0xff; len]),
            Just(vec![0; len]),
        ];
        (offset(region), bytes, any::<bool>()).prop_map(move |(at, bytes, read)| match read {
            true => Act::Read(region, at, len),
            false => Act::Write(region, at, bytes),
        })
    });
    prop_oneof![
        30 => access,
        // Otherwise BARs would hardly ever answer.
        4 => Just(Act::Write(Region::Config, COMMAND, vec![(MEMORY | MASTER) as u8])),
        2 => Just(Act::Write(Region::Config, PMCSR, vec![0])),
        1 => Just(Act::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence(acts in prop::collection::vec(act(), 1..80)) {
        let mut rig = Rig::new();
        let mut model = Model::new(rig.read::<4096>(Region::Config, 0).to_vec());
        for act in acts {
            match act {
                Act::Read(region, at, len) => {
                    let mut to = vec![0; len];
                    let read = rig.function.read(region, at, &mut to);
                    prop_assert_eq!(read.is_ok(), Model::inside(region, at, len));
                    prop_assert_eq!(to, model.read(region, at, len), "{:?} {:#x}", region, at);
                }
                Act::Write(region, at, bytes) => {
                    let written = rig.function.write(region, at, &bytes);
                    prop_assert_eq!(written.is_ok(), Model::inside(region, at, bytes.len()));
                    if written == Ok(Written::Unsettled) {
                        prop_assert_eq!(rig.settle(), 1);
                    }
                    model.write(region, at, &bytes);
                }
                Act::Reset => {
                    rig.function.reset(BOUND, Box::new(|| {}));
                    model.reset(false);
                }
            }
            let all = rig.read::<4096>(Region::Config, 0);
            let differs = all.iter().zip(&model.config).position(|(a, b)| a != b);
            prop_assert_eq!(differs, None);
        }
    }
}
