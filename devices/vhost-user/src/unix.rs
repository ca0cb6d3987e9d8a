//! The socket of a front end, with as many descriptors as a message of this protocol may carry.

use std::io;
use std::os::fd::BorrowedFd;

/// Makes a descriptor that a front end sent usable for kicks.
pub use bluff_attachment::descriptor::set_event as set_kick;
pub use bluff_attachment::descriptor::{
    event_fd, is_hung_up, sealed_memory, set_channel, set_nonblocking, set_notifier,
};
use bluff_attachment::stream;
pub use bluff_attachment::stream::{Received, discard, send};

/// How many descriptors a message may carry (vhost-user, "Memory regions description").
pub const MAX_FILES: usize = 8;

/// Looks at up to `to.len()` bytes without taking them. Descriptors are duplicates: the peeked
/// message keeps its own. With `files` false none are made.
///
/// # Errors
/// As [`stream::peek`].
pub fn peek(socket: BorrowedFd<'_>, to: &mut [u8], files: bool) -> io::Result<Received> {
    stream::peek(socket, to, if files { MAX_FILES } else { 0 })
}

/// Takes up to `to.len()` bytes, and the descriptors that come with them.
///
/// # Errors
/// As [`stream::take`].
pub fn take(socket: BorrowedFd<'_>, to: &mut [u8]) -> io::Result<Received> {
    stream::take(socket, to, MAX_FILES)
}
