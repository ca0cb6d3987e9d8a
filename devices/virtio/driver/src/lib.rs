//! Virtqueues as a driver sees them, for tests and benchmarks.
//!
//! The code that a guest's driver would be. It shares nothing with the device side of this workspace, so that each
//! side judges the other, and it is fast enough to be the load of a benchmark.
//!
//! ```text
//!   Blk            virtio-blk requests: headers, data, statuses, offsets          blk
//!    |
//!   DriverQueue    add / fix, resubmit, publish, pop_used, interrupts             queue
//!    |        |
//!   SplitDriver  PackedDriver                                                     split, packed
//!        \    /
//!        Span      bounds-checked window on guest memory, one method per access   memory (or model, under loom)
//!         |
//!       Memory     memfd regions at guest addresses; what SET_MEM_TABLE sends
//!         |
//!     a device     the one under test, or `IdealDevice`, the yardstick            ideal
//! ```
//!
//! Follows virtio 1.3: §2.7 (split virtqueues), §2.8 (packed virtqueues), §5.2 (block device). Served: EVENT_IDX,
//! INDIRECT_DESC, IN_ORDER, RING_RESET, notification suppression by flags.
//!
//! Not here: feature negotiation, notification data, transports, file descriptors for kicks and calls (`publish` and
//! the interrupt methods say *when*, the caller knows how), legacy (pre-1.0) layouts, admin queues, and every block
//! request but IN, OUT, FLUSH, GET_ID, DISCARD and WRITE_ZEROES.
//!
//! # A judge, not only a load
//! Whatever a device writes is checked against what this side knows in private memory (never against the shared rings,
//! which a device might have damaged): see [`Violation`]. A violation does not move the queue, so that asking again
//! gives the same answer.
//!
//! # Memory ordering
//! Every shared access goes through [`Span`], which has two kinds of method. `load_*` and `store_*` take an ordering and
//! are for the words that both sides touch without a handshake: indices, flags, event fields. `read_*` and `write_*` are
//! relaxed, and are for what a handshake protects: descriptors, ring entries, requests. Under `cfg(loom)` the second
//! kind becomes a cell that loom checks for data races, so a missing release or acquire is a failed test and not an
//! accident that x86 hides. The argument for each ordering stands at the access, in terms of the C11 model.

#[cfg(not(loom))]
mod memory;
#[cfg(loom)]
#[path = "model.rs"]
mod memory;

mod blk;
pub mod ideal;
mod packed;
mod queue;
mod split;

#[cfg(not(loom))]
pub use memory::Region;
pub use memory::{Memory, MemoryError, RegionConfig, Span};

pub use blk::{Blk, BlkConfig, BlkError, Completion, Pattern, Request, Status, Step};
pub use ideal::{IdealConfig, IdealDevice};
pub use packed::PackedDriver;
pub use queue::{
    Buffer, Config, DriverQueue, Error, Features, Fixed, Layout, Position, Positions, Used,
    Violation,
};
pub use split::SplitDriver;
