//! What a volume says of itself.

/// Limits of [`crate::Kind::Discard`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscardLimits {
    /// Most bytes in one operation; a multiple of the block size, not 0.
    pub max: u64,
    /// Discards that are not multiples of this may do nothing; bytes, a multiple of the block size.
    pub granularity: u32,
}

/// Limits of [`crate::Kind::WriteZeroes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZeroLimits {
    /// Most bytes in one operation; a multiple of the block size, not 0.
    pub max: u64,
    /// Whether zeroes can give storage back (`unmap`).
    pub unmap: bool,
}

/// The shape of a volume. It changes only in size, and only with [`crate::VolumeEvent::Resized`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// The smallest unit that can be addressed, in bytes: 512 or 4096.
    pub block_size: u32,
    /// The size in bytes, a multiple of the block size.
    pub size: u64,
    /// The unit that the storage writes without reading first, in bytes: a power of two, at least
    /// the block size.
    pub physical_block_size: u32,
    /// The preferred size of an operation, in bytes; 0 where none is known.
    pub optimal_io: u32,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether a completed write may be lost in a power cut until the next flush. Where false, a
    /// flush has nothing to do.
    pub volatile_cache: bool,
    /// Most bytes in one read or write; a multiple of the block size, not 0.
    pub max_transfer: u32,
    /// Discard, where the volume has it.
    pub discard: Option<DiscardLimits>,
    /// Writing zeroes, where the volume has it.
    pub write_zeroes: Option<ZeroLimits>,
}

impl Geometry {
    /// A writable volume of `size` bytes in blocks of `block_size`, with a volatile cache, without
    /// discard and write zeroes.
    pub fn new(block_size: u32, size: u64) -> Self {
        Self {
            block_size,
            size,
            physical_block_size: block_size,
            optimal_io: 0,
            read_only: false,
            volatile_cache: true,
            max_transfer: 16 << 20,
            discard: None,
            write_zeroes: None,
        }
    }
}
