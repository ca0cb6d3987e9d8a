//! Guest memory of the card: regions, epochs, and buffers that a backend can name without
//! knowing a device.
//!
//! ```text
//!   front end's files --> Mapping (one mmap, shared by Arc)
//!                            |
//!                            v
//!              GuestMemory: an epoch, an immutable sorted map  --> IoVec: (pointer, length)
//!                  by guest address  |  by front-end address
//! ```
//!
//! An **epoch** never changes. A changed memory table is a new epoch, which shares the [`Mapping`]s
//! that stayed with the one before it, also where a region was split or has grown; what vanished is unmapped when
//! the last epoch that names it is dropped. So whoever holds the epoch may use the pointers that were resolved in it, and whoever
//! moves to the next one resolves again.
//!
//! A front end that maps one file in many pieces (vfio-user behind a guest's IOMMU: by the page) has [`Windows`], which share what
//! is mapped of a file. Its regions have [`Rights`]: what the device may not write is mapped for reading only.
//!
//! Guest memory is shared with a host that may change it at any time: nothing here hands out a
//! reference into it. Copies go through volatile or atomic accesses; bulk data goes to the kernel as
//! [`IoVec`]s.
//!
//! A front end that shrinks its memory file would end the daemon with SIGBUS; [`guard`] puts empty
//! pages in that place, marks the mapping as poisoned, and the owner ends that front end alone.
//!
//! A sparse file costs its owner nothing, so guest memory as a whole has a budget of half the process's
//! addresses and of the mappings that the kernel grants; what is over it is refused.
//!
//! The layout of memory tables follows the vhost-user protocol as QEMU 11.1 documents it. Not
//! implemented: IOTLB translation (a miss), postcopy.

mod budget;
mod epoch;
pub mod guard;
mod iovec;
mod log;
mod mapping;
mod region;
mod sorted;
mod windows;

pub use epoch::{Access, GuestMemory, Hint, Space};
pub use iovec::IoVec;
pub use log::{DirtyLog, LOG_PAGE};
pub use mapping::{FileId, Mapping};
pub use region::{Region, RegionSpec, Rights};
pub use windows::Windows;

/// What can be wrong with a memory table, a mapping or an address.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A region of zero bytes, or one whose end passes 64 bits.
    #[error("memory region {start:#x}+{len:#x} is empty or wraps")]
    BadRegion {
        /// Guest address of its first byte.
        start: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Two regions share addresses.
    #[error("memory regions at {first:#x} and {second:#x} overlap")]
    Overlap {
        /// Address of the lower one.
        first: u64,
        /// Address of the upper one.
        second: u64,
    },
    /// The file ends before the region does.
    #[error("memory file of {size:#x} bytes is too short for {offset:#x}+{len:#x}")]
    ShortFile {
        /// The file's size in bytes.
        size: u64,
        /// Offset of the region in the file.
        offset: u64,
        /// Length of the region.
        len: u64,
    },
    /// The kernel refused to map the file.
    #[error("cannot map a memory file")]
    Map(#[source] std::io::Error),
    /// The file cannot be examined.
    #[error("cannot examine a memory file")]
    Stat(#[source] std::io::Error),
    /// Too many mappings in this process.
    #[error("more than {0} guest memory mappings")]
    TooMany(u64),
    /// Too many addresses of this process: the limit, in bytes.
    #[error("more than {0:#x} bytes of guest memory mapped")]
    TooLarge(u64),
    /// An address range that no region holds, or whose end passes 64 bits.
    #[error("no guest memory at {addr:#x}+{len:#x}")]
    Unmapped {
        /// First address.
        addr: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Memory that the device may not use in that way.
    #[error("guest memory at {addr:#x}+{len:#x} may not be used in that way")]
    Forbidden {
        /// First address.
        addr: u64,
        /// Length in bytes.
        len: u64,
    },
    /// An address that has to be aligned and is not.
    #[error("address {addr:#x} is not a multiple of {align}")]
    Misaligned {
        /// The address.
        addr: u64,
        /// What it must be a multiple of, in bytes.
        align: u64,
    },
    /// A dirty log that does not cover the guest's memory.
    #[error("dirty log of {size} bytes does not cover guest memory up to {end:#x}")]
    ShortLog {
        /// Its size in bytes.
        size: u64,
        /// The first address after the highest region.
        end: u64,
    },
}
