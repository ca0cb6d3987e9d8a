//! Event descriptors, as interrupts come through.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

/// An eventfd that does not block.
#[derive(Debug)]
pub struct Event(OwnedFd);

impl Event {
    /// A new one, at zero.
    ///
    /// # Errors
    /// Where the system has no descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(
            0,
            EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC,
        )?))
    }

    /// How often it was signalled since the last look; takes that away.
    pub fn take(&self) -> u64 {
        let mut count = [0; 8];
        match rustix::io::read(&self.0, &mut count) {
            Ok(8) => u64::from_ne_bytes(count),
            _ => 0,
        }
    }

    /// Signals it.
    pub fn signal(&self) {
        // Fails only where nobody has looked for 2^64 times.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Sleeps until it is signalled; whether it was within `limit`. Takes nothing away.
    pub fn wait(&self, limit: Duration) -> bool {
        wait_readable(self.0.as_fd(), limit).unwrap_or(false)
    }
}

impl Event {
    /// Sleeps until one of several is signalled; whether one was within `limit`. Takes nothing away.
    pub fn wait_any(events: &[&Self], limit: Duration) -> bool {
        let mut fds: Vec<_> = events
            .iter()
            .map(|e| PollFd::new(*e, PollFlags::IN))
            .collect();
        poll_for(&mut fds, limit).unwrap_or(false)
    }
}

/// Another's, as a server receives it.
impl From<OwnedFd> for Event {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Sleeps until something can be read; whether that was within `limit`.
pub(crate) fn wait_readable(fd: BorrowedFd<'_>, limit: Duration) -> Result<bool, Errno> {
    poll_for(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], limit)
}

fn poll_for(fds: &mut [PollFd<'_>], limit: Duration) -> Result<bool, Errno> {
    let end = Instant::now().checked_add(limit);
    loop {
        let rest = end.map(|end| end.saturating_duration_since(Instant::now()));
        let rest = rest.and_then(|rest| rest.try_into().ok());
        match poll(fds, rest.as_ref()) {
            Err(Errno::INTR) => {}
            other => return Ok(other? > 0),
        }
    }
}
