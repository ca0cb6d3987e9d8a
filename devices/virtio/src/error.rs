//! Two kinds of error, and what a device says to an attachment.

use bluff_memory::MemoryError;

/// A chain that cannot be served. The ring goes on: the chain is given back with nothing written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// More descriptors, or pieces of memory, than are allowed (a loop, in most cases).
    #[error("descriptor chain of more than {0} elements")]
    TooLong(u16),
    /// A descriptor's `next` lies outside of its table.
    #[error("descriptor index {0} outside of its table")]
    Index(u16),
    /// A buffer that is not in guest memory.
    #[error("buffer {addr:#x}+{len:#x} outside of guest memory")]
    Unmapped {
        /// Guest address.
        addr: u64,
        /// Length in bytes.
        len: u32,
    },
    /// An indirect descriptor where none is allowed: not negotiated, inside of a table, with a next
    /// descriptor, or in the middle of a chain (virtio 1.3 §2.7.5.3.1, §2.8.7).
    #[error("indirect descriptor where none is allowed")]
    Indirect,
    /// A table whose length is zero, no multiple of 16, or over the limit.
    #[error("indirect table of {0} bytes")]
    Table(u32),
    /// A device-readable descriptor after a device-writable one (virtio 1.3 §2.7.4.2).
    #[error("readable descriptor after a writable one")]
    Order,
}

/// A ring that makes no sense: it is stopped, and the device asks for a reset
/// (`DEVICE_NEEDS_RESET`, virtio 1.3 §2.1.2).
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// A size of zero, over 32768, or for a split ring no power of two.
    #[error("queue size {0} is not allowed")]
    Size(u16),
    /// A part of the ring is not in guest memory, or not aligned.
    #[error("ring is not accessible")]
    Memory(#[from] MemoryError),
    /// The available index is further ahead than the ring is long.
    #[error("available index {avail} is more than {size} ahead of {next}")]
    AvailIndex {
        /// What the driver wrote.
        avail: u16,
        /// What the device expected next.
        next: u16,
        /// The queue size.
        size: u16,
    },
    /// An entry of the available ring outside of the descriptor table.
    #[error("available entry {0} outside of the descriptor table")]
    Head(u16),
    /// A head, or a buffer ID, that is being worked on already.
    #[error("buffer {0} made available while in use")]
    InUse(u16),
    /// A packed chain that does not end within the ring.
    #[error("packed chain without an end")]
    Endless,
    /// A position outside of the ring.
    #[error("ring position {0} outside of the ring")]
    Position(u16),
    /// An in-flight region that contradicts itself or the ring.
    #[error("in-flight region: {0}")]
    Inflight(&'static str),
}

/// Why a device does not do what an attachment asks for.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// No such queue.
    #[error("queue {0} does not exist")]
    Queue(u16),
    /// The queue runs already.
    #[error("queue {0} is started already")]
    Started(u16),
    /// Configuration space does not reach that far, or is not writable there.
    #[error("configuration access at {offset}+{len} is not allowed")]
    Config {
        /// First byte.
        offset: u32,
        /// Length in bytes.
        len: usize,
    },
    /// The ring cannot be used.
    #[error("queue cannot be started")]
    Ring(#[from] RingError),
    /// What stands behind the device is not available.
    #[error("back end is not available: {0}")]
    Backend(String),
    /// Saved state that is not of this device or version.
    #[error("saved state does not fit")]
    State,
}
