//! Wire types (virtio 1.3 §5.2.4, §5.2.6). Little-endian.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The device ID (§5.2.1).
pub const DEVICE_ID: u32 = 2;

/// Bytes of a sector, the unit of addresses, whatever the block size.
pub const SECTOR: u64 = 512;

/// Feature bits (§5.2.3), as masks.
pub mod feature {
    /// `size_max` is valid.
    pub const SIZE_MAX: u64 = 1 << 1;
    /// `seg_max` is valid.
    pub const SEG_MAX: u64 = 1 << 2;
    /// Read-only.
    pub const RO: u64 = 1 << 5;
    /// `blk_size` is valid.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// There is a FLUSH request.
    pub const FLUSH: u64 = 1 << 9;
    /// The topology fields are valid.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// The driver can choose between write-back and write-through.
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// `num_queues` is valid.
    pub const MQ: u64 = 1 << 12;
    /// There is a DISCARD request.
    pub const DISCARD: u64 = 1 << 13;
    /// There is a WRITE_ZEROES request.
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Request types (§5.2.6).
pub mod kind {
    /// Read.
    pub const IN: u32 = 0;
    /// Write.
    pub const OUT: u32 = 1;
    /// Flush.
    pub const FLUSH: u32 = 4;
    /// Read the device's identification.
    pub const GET_ID: u32 = 8;
    /// Discard.
    pub const DISCARD: u32 = 11;
    /// Write zeroes.
    pub const WRITE_ZEROES: u32 = 13;
}

/// Status bytes (§5.2.6).
pub mod status {
    /// Done.
    pub const OK: u8 = 0;
    /// Failed.
    pub const IOERR: u8 = 1;
    /// No such request here.
    pub const UNSUPP: u8 = 2;
}

/// Bytes of an identification (`VIRTIO_BLK_ID_BYTES`).
pub const ID_LEN: usize = 20;

/// What every request begins with.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// One of [`kind`].
    pub kind: U32,
    /// Not used.
    pub reserved: U32,
    /// First sector.
    pub sector: U64,
}

/// A range of a DISCARD or WRITE_ZEROES request.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Range {
    /// First sector.
    pub sector: U64,
    /// Number of sectors.
    pub sectors: U32,
    /// [`UNMAP`] and reserved bits.
    pub flags: U32,
}

/// The zeroes may be unmapped.
pub const UNMAP: u32 = 1;

/// Configuration space (§5.2.4), up to the fields of WRITE_ZEROES.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Config {
    /// Size in sectors.
    pub capacity: U64,
    /// Most bytes in a segment.
    pub size_max: U32,
    /// Most segments in a request.
    pub seg_max: U32,
    /// Cylinders, heads, sectors: not offered.
    pub geometry: [u8; 4],
    /// Block size in bytes.
    pub blk_size: U32,
    /// Logical blocks in a physical one, as an exponent of 2.
    pub physical_block_exp: u8,
    /// Offset of the first aligned logical block.
    pub alignment_offset: u8,
    /// Least I/O size without a penalty, in logical blocks.
    pub min_io_size: U16,
    /// Preferred I/O size, in logical blocks.
    pub opt_io_size: U32,
    /// 1: write-back, 0: write-through.
    pub writeback: u8,
    /// Not used.
    pub unused0: u8,
    /// Number of queues.
    pub num_queues: U16,
    /// Most sectors in a discarded range.
    pub max_discard_sectors: U32,
    /// Most ranges in a DISCARD.
    pub max_discard_seg: U32,
    /// Alignment of discards in sectors.
    pub discard_sector_alignment: U32,
    /// Most sectors in a zeroed range.
    pub max_write_zeroes_sectors: U32,
    /// Most ranges in a WRITE_ZEROES.
    pub max_write_zeroes_seg: U32,
    /// Whether [`UNMAP`] may give storage back.
    pub write_zeroes_may_unmap: u8,
    /// Not used.
    pub unused1: [u8; 3],
}

/// Where [`Config::writeback`] is.
pub const WRITEBACK_OFFSET: u32 = 32;

const _: () = assert!(size_of::<Header>() == 16 && size_of::<Range>() == 16);
const _: () = assert!(size_of::<Config>() == 60);
const _: () = assert!(std::mem::offset_of!(Config, writeback) == WRITEBACK_OFFSET as usize);
