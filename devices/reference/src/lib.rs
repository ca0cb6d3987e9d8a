//! virtio-blk on the plain rust-vmm stack, over any volume.
//!
//! ```text
//!   front end --socket--> vhost_user_backend::VhostUserDaemon   (session thread: `server`, `backend`)
//!       |                          | one thread with an epoll wait for each queue
//!       | kick, call               v
//!       +------------------> Worker: Lane (virtio_queue::Queue --> Request --> Op) --> Channel --> volume
//!                              ^     one lane for each queue of the thread            |
//!                              +---- Reactor: its descriptor is in that epoll <-------+
//! ```
//!
//! It is what one gets from `vhost-user-backend` 0.24, `virtio-queue` 0.18 and `vm-memory` 0.18 when
//! they are used with care: one lock of the vring, one look at the event index and at most one
//! notification for a batch, no allocation for a request. Nothing of the project's own rings or
//! sessions is in it, so that it serves to compare with, to bisect with, and as the oracle of tests
//! ([`Oracle`]).
//!
//! It follows virtio 1.3 §5.2 (block device) and §2.7 (split virtqueues), and the vhost-user
//! protocol as QEMU 11.1 documents it.
//!
//! Not implemented, because the stack below has no place for it: packed rings, queue sizes that are no
//! powers of two, in-flight tracking, configuration change notifications, reset of a single queue.
//! Not implemented, because it would make the plain stack less plain: dirty logging, SIZE_MAX (any
//! segment is taken), secure erase, zones, lifetime.

mod backend;
mod capabilities;
mod config;
mod lane;
mod oracle;
mod relay;
mod request;
mod server;
pub mod spec;
mod volume;
mod worker;

pub use capabilities::{Capabilities, Description};
pub use config::{Device, DeviceOptions};
pub use oracle::Oracle;
pub use server::{Endpoint, Server, ServerError, Stop};
pub use volume::{VolumeError, open_volume};
