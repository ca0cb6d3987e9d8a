//! How other threads reach the loop's: what they can say.

use std::io;
use std::sync::mpsc::SyncSender;

use bluff_virtio::{DeviceEvent, VirtioDevice};

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
pub type Mailbox = bluff_attachment::Mailbox<Letter>;

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
