//! What virtio 1.3 §5.2 puts on the wire.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What every address on the disk and in the configuration space is counted in, in bytes (§5.2.5).
pub const SECTOR: u64 = 512;

/// Offset of `writeback` in the configuration space (§5.2.4).
pub const WRITEBACK_OFFSET: u32 = 32;

/// Length of the identification string, in bytes (§5.2.6).
pub const ID_LEN: usize = 20;

/// Feature bits (§5.2.3).
pub mod feature {
    /// `VIRTIO_BLK_F_SEG_MAX`
    pub const SEG_MAX: u64 = 1 << 2;
    /// `VIRTIO_BLK_F_RO`
    pub const RO: u64 = 1 << 5;
    /// `VIRTIO_BLK_F_BLK_SIZE`
    pub const BLK_SIZE: u64 = 1 << 6;
    /// `VIRTIO_BLK_F_FLUSH`
    pub const FLUSH: u64 = 1 << 9;
    /// `VIRTIO_BLK_F_TOPOLOGY`
    pub const TOPOLOGY: u64 = 1 << 10;
    /// `VIRTIO_BLK_F_CONFIG_WCE`
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// `VIRTIO_BLK_F_MQ`
    pub const MQ: u64 = 1 << 12;
    /// `VIRTIO_BLK_F_DISCARD`
    pub const DISCARD: u64 = 1 << 13;
    /// `VIRTIO_BLK_F_WRITE_ZEROES`
    pub const WRITE_ZEROES: u64 = 1 << 14;
    /// `VIRTIO_F_INDIRECT_DESC` (§6)
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// `VIRTIO_F_EVENT_IDX` (§6)
    pub const EVENT_IDX: u64 = 1 << 29;
    /// `VHOST_USER_F_PROTOCOL_FEATURES`
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// `VIRTIO_F_VERSION_1` (§6)
    pub const VERSION_1: u64 = 1 << 32;
}

/// Request types (§5.2.6).
pub mod request_type {
    /// Read.
    pub const IN: u32 = 0;
    /// Write.
    pub const OUT: u32 = 1;
    /// Flush.
    pub const FLUSH: u32 = 4;
    /// The device's identification string.
    pub const GET_ID: u32 = 8;
    /// Discard.
    pub const DISCARD: u32 = 11;
    /// Write zeroes.
    pub const WRITE_ZEROES: u32 = 13;
}

/// The last byte of a request (§5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// `VIRTIO_BLK_S_OK`
    Ok = 0,
    /// `VIRTIO_BLK_S_IOERR`
    IoErr = 1,
    /// `VIRTIO_BLK_S_UNSUPP`
    Unsupported = 2,
}

/// `struct virtio_blk_req`, the part that comes first (§5.2.6).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Header {
    /// One of [`request_type`].
    pub kind: U32,
    /// Not used.
    pub reserved: U32,
    /// First sector.
    pub sector: U64,
}
const _: () = assert!(size_of::<Header>() == 16);

/// `struct virtio_blk_discard_write_zeroes` (§5.2.6).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Segment {
    /// First sector.
    pub sector: U64,
    /// Number of sectors.
    pub num_sectors: U32,
    /// Bit 0: unmap; the others are reserved.
    pub flags: U32,
}
const _: () = assert!(size_of::<Segment>() == 16);

/// Bit 0 of [`Segment::flags`].
pub const SEGMENT_UNMAP: u32 = 1;

/// `struct virtio_blk_config` (§5.2.4), as far as the offered features reach.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Config {
    /// Size in sectors.
    pub capacity: U64,
    /// Longest segment in bytes; not offered.
    pub size_max: U32,
    /// Most segments of a request.
    pub seg_max: U32,
    /// Cylinders, heads, sectors; not offered.
    pub geometry: [u8; 4],
    /// Block size in bytes.
    pub blk_size: U32,
    /// Logical blocks in a physical one, as a power of two.
    pub physical_block_exp: u8,
    /// Offset of the first aligned logical block.
    pub alignment_offset: u8,
    /// Smallest request that does well, in logical blocks.
    pub min_io_size: U16,
    /// Best size of a request, in logical blocks; 0 where none is known.
    pub opt_io_size: U32,
    /// Whether writes are cached.
    pub writeback: u8,
    /// Not used.
    pub unused0: u8,
    /// Number of queues.
    pub num_queues: U16,
    /// Most sectors of a discard segment.
    pub max_discard_sectors: U32,
    /// Most segments of a discard.
    pub max_discard_seg: U32,
    /// What discards should be aligned to, in sectors.
    pub discard_sector_alignment: U32,
    /// Most sectors of a write zeroes segment.
    pub max_write_zeroes_sectors: U32,
    /// Most segments of a write zeroes.
    pub max_write_zeroes_seg: U32,
    /// Whether zeroes may unmap.
    pub write_zeroes_may_unmap: u8,
    /// Not used.
    pub unused1: [u8; 3],
}
const _: () = assert!(size_of::<Config>() == 60);
const _: () = assert!(std::mem::offset_of!(Config, writeback) == WRITEBACK_OFFSET as usize);
