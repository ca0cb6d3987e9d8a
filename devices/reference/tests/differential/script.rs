//! Scripts: what a driver that keeps the rules asks for, also where it cannot be done.

use bluff_reference::spec::request_type;
use bluff_testing::Chance;

use crate::recorder::Shape;

/// The identification's length.
pub const ID_LEN: u32 = 20;
const SECTOR: u64 = 512;

/// What goes into a chain: bytes for the device, and room for what it writes, the status last.
#[derive(Clone, Debug)]
pub struct Request {
    pub kind: u32,
    pub readable: Vec<u8>,
    /// Without the status.
    pub writable: u32,
    /// Of those, how many a read or an identification fills.
    pub filled: u32,
    pub layout: Layout,
}

/// How a chain's descriptors lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// All in the ring.
    Direct,
    /// So many in the ring and the others in a table, which has so many entries more than it needs.
    Table { before: u16, spare: u16 },
}

/// What may be asked for.
#[derive(Clone, Copy, Debug)]
pub struct Allowed {
    pub shape: Shape,
    pub flush: bool,
    pub ranges: bool,
    pub indirect: bool,
}

impl Allowed {
    pub fn request(&self, chance: &mut Chance) -> Request {
        let kind = self.kind(chance);
        let block = u64::from(self.shape.block_size);
        let mut readable = Vec::new();
        readable.extend_from_slice(&kind.to_le_bytes());
        readable.extend_from_slice(&(chance.word() as u32).to_le_bytes());
        let mut writable = 0;
        let mut filled = 0;
        match kind {
            request_type::IN | request_type::OUT => {
                let len = match chance.below(20) {
                    0 => chance.below(2000),
                    1 => SECTOR * chance.below(9),
                    _ => block * (1 + chance.below(65536 / block)).min(1 + chance.below(16)),
                };
                let sector = self.sector(chance, len.div_ceil(SECTOR));
                readable.extend_from_slice(&sector.to_le_bytes());
                if kind == request_type::IN {
                    writable = len as u32;
                    filled = writable;
                } else {
                    readable.extend(chance.bytes(len as usize));
                }
            }
            request_type::DISCARD | request_type::WRITE_ZEROES => {
                readable.extend_from_slice(&chance.word().to_le_bytes());
                readable.extend(self.range(chance));
            }
            _ => {
                readable.extend_from_slice(&chance.word().to_le_bytes());
                if kind == request_type::GET_ID {
                    writable = chance.one_of(&[ID_LEN, ID_LEN, 0, 1, 7, 19, 21, 64]);
                    filled = writable.min(ID_LEN);
                } else if chance.percent(20) {
                    // Data that nothing is done with.
                    writable = chance.below(700) as u32;
                    let more = chance.below(700) as usize;
                    readable.extend(chance.bytes(more));
                }
            }
        }
        if chance.percent(2) {
            readable.truncate(chance.below(16) as usize);
            filled = 0;
        }
        let layout = match self.indirect && chance.percent(50) {
            true => Layout::Table {
                before: chance.one_of(&[0, 0, 0, 1, 2]),
                spare: chance.one_of(&[0, 0, 1, 5]),
            },
            false => Layout::Direct,
        };
        Request {
            kind,
            readable,
            writable,
            filled,
            layout,
        }
    }

    fn kind(&self, chance: &mut Chance) -> u32 {
        match chance.below(100) {
            0..35 => request_type::IN,
            35..65 => request_type::OUT,
            65..73 if self.flush => request_type::FLUSH,
            73..80 => request_type::GET_ID,
            80..87 if self.ranges => request_type::DISCARD,
            87..95 if self.ranges => request_type::WRITE_ZEROES,
            95.. => match chance.below(3) {
                // What there once was, what there is elsewhere, and what nobody knows.
                0 => chance.one_of(&[2, 3, 5, 6, 7, 9, 10, 12, 14, 15]),
                1 => chance.one_of(&[16, 18, 20, 22, 24, 26, 0x8000_0000, 0x8000_0001]),
                _ => chance.word() as u32 | 64,
            },
            _ => request_type::IN,
        }
    }

    /// Mostly where so many sectors are.
    fn sector(&self, chance: &mut Chance, sectors: u64) -> u64 {
        let end = self.shape.size / SECTOR;
        let unit = u64::from(self.shape.block_size) / SECTOR;
        match chance.below(40) {
            0 => end,
            1 => end - chance.below(sectors.clamp(1, end)),
            2 => end + chance.below(1000),
            3 => chance.one_of(&[u64::MAX, u64::MAX / SECTOR, u64::MAX / SECTOR + 1, 1 << 55]),
            4 => chance.word(),
            // Between blocks, where a block is of several sectors.
            5 => chance.below(end),
            6 => end.saturating_sub(sectors),
            // Where others are.
            7..16 => chance.below(8) * unit,
            _ => chance.below(end.saturating_sub(sectors).max(1)) / unit * unit,
        }
    }

    /// A range of a discard or of zeroes.
    fn range(&self, chance: &mut Chance) -> Vec<u8> {
        let unit = u64::from(self.shape.block_size) / SECTOR;
        let count = match chance.below(20) {
            0 => 0,
            1 => u64::from(u32::MAX),
            2 => chance.below(40),
            3 => chance.word() & 0xffff_ffff,
            _ => unit * chance.below(64 / unit + 1),
        };
        let sector = self.sector(chance, count);
        let flags: u32 = match chance.below(20) {
            0 => chance.word() as u32,
            1 => 2,
            2 => 1 << 31,
            3..10 => 1,
            _ => 0,
        };
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&sector.to_le_bytes());
        bytes.extend_from_slice(&(count as u32).to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        if chance.percent(5) {
            bytes.resize(chance.one_of(&[0, 8, 15, 17, 24]), 0);
        }
        bytes
    }
}
