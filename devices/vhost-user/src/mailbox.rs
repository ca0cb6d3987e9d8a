//! How other threads reach the loop's: a queue and an eventfd that wakes the loop.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::SyncSender;
use std::sync::{Mutex, PoisonError};

use bluff_virtio::{DeviceEvent, VirtioDevice};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::attachment::{Attachment, Resume};
use crate::session::Done;

/// Names an attachment from its addition to its removal; never used twice.
pub type Id = u64;

/// What is done with a device that was taken off the loop.
pub type Removed = Box<dyn FnOnce(Box<dyn VirtioDevice>) + Send>;

/// A message to the loop.
pub enum Letter {
    /// A device has done what a session asked for.
    Done(Id, Done),
    /// A device has something to say.
    Event(Id, DeviceEvent),
    /// Take up an attachment; whether that went well is the answer.
    Add(Box<Attachment>, SyncSender<io::Result<()>>),
    /// End a session and give its device back; dropped where there is no such attachment.
    Remove(String, Removed),
    /// A connection for an attachment.
    Connection(String, Box<Resume>),
    /// A keeper has recorded.
    Committed(String, u64),
    /// End everything.
    Stop,
}

/// The queue.
#[derive(Debug)]
pub struct Mailbox {
    letters: Mutex<Vec<Letter>>,
    bell: EventFd,
}

impl std::fmt::Debug for Letter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Done(..) => "Done",
            Self::Event(..) => "Event",
            Self::Add(..) => "Add",
            Self::Remove(..) => "Remove",
            Self::Connection(..) => "Connection",
            Self::Committed(..) => "Committed",
            Self::Stop => "Stop",
        })
    }
}

impl Mailbox {
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
    pub fn post(&self, letter: Letter) {
        self.lock().push(letter);
        self.ring();
    }

    /// Wakes the loop.
    pub fn ring(&self) {
        // Fails only where the counter is full, and then the loop is woken anyway.
        let _ = self.bell.write(1);
    }

    /// Every letter so far.
    pub fn empty(&self) -> Vec<Letter> {
        let _ = self.bell.read();
        std::mem::take(&mut *self.lock())
    }

    /// Readable when there are letters.
    pub fn fd(&self) -> RawFd {
        self.bell.as_raw_fd()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Letter>> {
        // A push is whole or has not happened.
        self.letters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
