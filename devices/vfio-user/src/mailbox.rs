//! What other threads can say to the loop.

use std::io;
use std::sync::mpsc::SyncSender;

use bluff_pci::{PciEvent, PciFunction};

use crate::Ticket;
use crate::attachment::{Attachment, Resume};

/// Names an attachment from its addition to its removal; never used twice.
pub type Id = u64;

/// What is done with a function that was taken off the loop.
pub type Removed = Box<dyn FnOnce(Box<dyn PciFunction>) + Send>;

/// A message to the loop.
pub enum Letter {
    /// A function has done what a session asked for.
    Finished(Id, Ticket),
    /// A function has something to say.
    Event(Id, PciEvent),
    /// Take up an attachment; whether that went well is the answer.
    Add(Box<Attachment>, SyncSender<io::Result<()>>),
    /// End a session and give its function back; dropped where there is no such attachment.
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
            Self::Finished(..) => "Finished",
            Self::Event(..) => "Event",
            Self::Add(..) => "Add",
            Self::Remove(..) => "Remove",
            Self::Connection(..) => "Connection",
            Self::Committed(..) => "Committed",
            Self::Stop => "Stop",
        })
    }
}
