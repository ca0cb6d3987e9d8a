//! Frames with their offloads, and the seam between a network function and its network.
//!
//! ```text
//!   transmit queue of a function                              receive queues of functions
//!     copies heads, lends the rest                              on this reactor | on another
//!              |                                                       ^        |     ^
//!              v                                                       |        v     |
//!            Batch --> Lane::send  (a Port: switch, tap, pair ...) --> Outlet --> mailbox
//! ```
//!
//! A [`Frame`] is **lent**. Its first bytes ([`HEAD`]) are a copy that belongs to the card, so that what was checked stays checked; the
//! rest stays where the sender has it, usually in a guest's memory, named by [`IoVec`](bluff_memory::IoVec)s that are good for one call.
//! Whoever is called with a [`Batch`] is done with it when it returns: it has copied the frames, written them to a ring, or given them
//! to the kernel. So no frame outlives a turn, and memory can be taken back between any two of them.
//!
//! What a guest leaves to its device (checksums, segmentation) travels with the frame as an [`Offload`]: a frame of 64 KiB crosses the
//! card whole, and is cut only where the next hop cannot.
//!
//! An [`Outlet`] leads to a receive queue wherever it lives: on the same reactor it is a call, to another one frames are copied into
//! a bounded mailbox, of which each receiver has its share. Nobody waits for room anywhere: a frame that finds none is dropped, and counted by its cause ([`Drops`]).
//!
//! A [`tap`] device is a port of the kernel's.
//!
//! Offloads follow virtio 1.3 §5.1.6. Not implemented: segmentation of tunnelled frames by the guest (UDP tunnel GSO of virtio 1.4),
//! receive coalescing (RSC), flow control (pause frames).

mod backlog;
mod bell;
pub mod capture;
mod counters;
mod frame;
mod mailbox;
mod offload;
mod outlet;
mod pair;
mod port;
mod segment;
mod steering;
mod sync;
pub mod tap;
#[cfg(all(test, not(loom)))]
mod tests;

pub use backlog::Backlog;
pub use counters::{Cause, Counters, Direction, Drops};
pub use frame::{BATCH, Batch, Frame, HEAD, HEAD_MAX, HEADROOM, Lent, MAX_FRAME};
pub use offload::{Csum, Gso, GsoKind, Offload, Offloads};
pub use outlet::{Outlet, Receive, Registration, all_of, places};
pub use pair::{Null, Pair};
pub use port::{Attributes, Lane, NetError, Port, Receivers};
pub use steering::{Flows, RssHash, RssTable, Steering};
