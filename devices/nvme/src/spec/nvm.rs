//! Commands of the NVM Command Set: their dwords and their data (NVM Command Set 1.1 §3.2, §3.3).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Command;

/// Command dword 12 of commands that name a range of blocks.
pub mod cdw12 {
    /// Number of logical blocks, zero's based.
    pub const NLB: u32 = 0xffff;
    /// Write Zeroes: Deallocate.
    pub const DEAC: u32 = 1 << 25;
    /// Force Unit Access.
    pub const FUA: u32 = 1 << 30;
    /// Command Extension Type (19:16), Directive Type or Namespace Zeroes (23:20), Storage Tag Check (24), Protection Information
    /// (29:26): none of them is offered.
    pub const NOT_OFFERED: u32 = 0x3d << 24 | 0xff << 16;

    /// Copy: number of ranges, zero's based.
    pub const RANGES: u32 = 0xff;
    /// Copy: Descriptor Format (11:8), of which only 0 is offered; Protection Information of the source (15:12), Directive
    /// Type (23:20), Storage Tag Checks (25:24), Protection Information of the destination (29:26).
    pub const COPY_NOT_OFFERED: u32 = 0x3f << 24 | 0xf << 20 | 0xff << 8;
}

/// Command dword 11 of Dataset Management: Attribute - Deallocate.
pub const DEALLOCATE: u32 = 1 << 2;

/// Most ranges of a Dataset Management command (its field has 8 bits, zero's based).
pub const MOST_RANGES: usize = 256;

/// A range of Dataset Management (NVM 1.1 §3.2.3, "Range Definition").
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Range {
    /// Hints about how it will be used.
    pub attributes: U32,
    /// Length in logical blocks.
    pub blocks: U32,
    /// Starting LBA.
    pub slba: U64,
}

const _: () = assert!(size_of::<Range>() == 16);

/// A source range of Copy, format 0 (NVM 1.1 §3.2.2).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SourceRange {
    /// Parameters and reserved bytes.
    pub reserved: U64,
    /// Starting LBA.
    pub slba: U64,
    /// Number of logical blocks, zero's based.
    pub blocks_z: U16,
    /// Reserved bytes and source options.
    pub reserved2: [u8; 6],
    /// Tags of protection information.
    pub tags: U64,
}

const _: () = assert!(size_of::<SourceRange>() == 32);

impl Command {
    /// Starting LBA, or that of the destination.
    #[inline]
    pub fn slba(&self) -> u64 {
        u64::from(self.cdw11.get()) << 32 | u64::from(self.cdw10.get())
    }

    /// Number of logical blocks: 1 to 65,536.
    #[inline]
    pub fn blocks(&self) -> u32 {
        (self.cdw12.get() & cdw12::NLB) + 1
    }
}
