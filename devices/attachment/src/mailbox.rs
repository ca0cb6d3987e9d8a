//! How other threads reach a loop's: a queue and an eventfd that wakes the loop.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The queue, of letters of one type.
#[derive(Debug)]
pub struct Mailbox<L> {
    letters: Mutex<Vec<L>>,
    bell: EventFd,
}

impl<L> Mailbox<L> {
    /// An empty one.
    ///
    /// # Errors
    /// Where there is no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            letters: Mutex::default(),
            bell: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// Leaves a letter.
    pub fn post(&self, letter: L) {
        self.lock().push(letter);
        self.ring();
    }

    /// Wakes the loop.
    pub fn ring(&self) {
        // Fails only where the counter is full, and then the loop is woken anyway.
        let _ = self.bell.write(1);
    }

    /// Every letter so far.
    pub fn empty(&self) -> Vec<L> {
        let _ = self.bell.read();
        std::mem::take(&mut *self.lock())
    }

    /// Readable when there are letters.
    pub fn fd(&self) -> RawFd {
        self.bell.as_raw_fd()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<L>> {
        // A push is whole or has not happened.
        self.letters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
