//! What attachments over UNIX sockets are made of. The protocols are theirs: vhost-user, vfio-user.
//!
//! ```text
//!   other threads --> Mailbox --> the loop of all sessions --> Watched: the epoll
//!                                  |
//!   host <--- stream: bytes and descriptors --- descriptor: what of them can be used, and for what
//! ```
//!
//! * [`stream`] looks at, takes and sends bytes with descriptors, and never waits.
//! * [`descriptor`] says what a descriptor that a host sent can be used for.
//! * [`Mailbox`] is how other threads reach the loop, [`Watched`] what the loop is woken for.
//! * [`keeper`] records sessions, so that they outlive the process that serves them.
//! * [`limit`] bounds what a host can have logged.
//!
//! Not here: listening and connecting, which is the control half's.

pub mod descriptor;
pub mod keeper;
pub mod limit;
mod mailbox;
pub mod stream;
mod watched;

pub use mailbox::Mailbox;
pub use watched::Watched;
