//! How other threads reach a loop's: a queue and an eventfd that wakes the loop.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The queue, of letters of one type.
#[derive(Debug)]
pub struct Mailbox<L> {
    /// `None` when nobody reads them any more.
    letters: Mutex<Option<Vec<L>>>,
    bell: EventFd,
}

impl<L> Mailbox<L> {
    /// An empty one.
    ///
    /// # Errors
    /// Where there is no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            letters: Mutex::new(Some(Vec::new())),
            bell: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// Leaves a letter. Where nobody reads them any more it is dropped: who waits for an answer is not to wait for ever.
    pub fn post(&self, letter: L) {
        let refused = match &mut *self.lock() {
            Some(letters) => {
                letters.push(letter);
                None
            }
            None => Some(letter),
        };
        // Not under the lock: what a letter holds may post when it is dropped.
        drop(refused);
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
        self.lock().as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Drops every letter, and those to come.
    pub fn close(&self) {
        let letters = self.lock().take();
        drop(letters);
    }

    /// Readable when there are letters.
    pub fn fd(&self) -> RawFd {
        self.bell.as_raw_fd()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Vec<L>>> {
        // A push is whole or has not happened.
        self.letters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
