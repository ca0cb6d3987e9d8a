//! What a storage function stands on: volumes, their channels, and the operations between them.
//!
//! ```text
//!   device: a queue        device: a queue          one volume, shared by all reactors:
//!        \  ops, tags        /                       geometry, events, lock
//!         v                 v
//!       ChannelHandle (one for a volume and a reactor; routes completions)
//!         |
//!       Channel: a layer around ...
//!         |
//!       Channel: file | ram | null | ...  --> the reactor's io_uring, memory, a socket
//! ```
//!
//! A [`Volume`] is shared and thread-safe; it holds what all its users have in common. A [`Channel`]
//! is one volume on one reactor; it never leaves that thread, so it needs no lock. Operations are
//! submitted as a slice with tags and completions are polled: no allocation for a request, dynamic
//! dispatch once for a batch, and a test can drive all of it with a clock of its own.
//!
//! What a volume promises is held by the suite `conformance`, which every kind runs; tests ask for it by the feature of
//! that name.
//!
//! Not implemented: zoned devices, compare-and-write, integrity metadata.

mod channel;
#[cfg(feature = "conformance")]
pub mod conformance;
mod error;
mod geometry;
pub mod null;
mod op;
pub mod ram;
mod shared;
mod uri;
mod volume;

pub use channel::{Cancel, Channel};
pub use error::{BlockError, OpenError};
pub use geometry::{DiscardLimits, Geometry, ZeroLimits};
pub use op::{Buffers, Completion, Kind, Op, Tag};
pub use shared::ChannelHandle;
pub use uri::{SizeError, Uri, UriError, parse_block_size, parse_size};
pub use volume::{Events, InUse, OpenContext, Subscription, Volume, VolumeEvent, lock_pause};
