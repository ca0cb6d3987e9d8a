//! What attachments over UNIX sockets are made of. The protocols are theirs: vhost-user, vfio-user.
//!
//! ```text
//!   other threads --> LoopHandle --> SessionLoop: all sessions of a protocol --> the epoll
//!                                       |
//!                                    Attached: one attachment
//!                                       |
//!   host <--- stream: bytes and descriptors --- descriptor: what of them can be used, and for what
//! ```
//!
//! * [`stream`] looks at, takes and sends bytes with descriptors, and never waits.
//! * [`descriptor`] says what a descriptor that a host sent can be used for.
//! * [`SessionLoop`] is one thread for all sessions, [`LoopHandle`] how others reach it, [`Attached`] what it serves.
//! * [`keeper`] records sessions, so that they outlive the process that serves them.
//! * [`limit`] bounds what a host can have logged.
//!
//! Not here: listening and connecting, which is the control half's.

mod attached;
pub mod descriptor;
pub mod keeper;
pub mod limit;
mod mailbox;
mod sessions;
pub mod stream;
mod watched;

pub use attached::{Attached, Post, Removed};
pub use sessions::{LoopHandle, SessionLoop};
