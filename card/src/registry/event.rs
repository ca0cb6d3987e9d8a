//! Who is told what happens.

use std::fmt;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use crate::spec::Id;

/// How far a subscriber may fall behind, in events.
pub const BACKLOG: usize = 1024;

/// What an event is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A volume.
    Volume(Id),
    /// A function.
    Function(Id),
    /// A subsystem that functions may share.
    Subsystem(Id),
    /// A network.
    Network(Id),
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Volume(id) => write!(f, "volume {id}"),
            Self::Function(id) => write!(f, "function {id}"),
            Self::Subsystem(id) => write!(f, "subsystem {id}"),
            Self::Network(id) => write!(f, "network {id}"),
        }
    }
}

/// What happened to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is there now.
    Created,
    /// Its state or its specification is another.
    Changed,
    /// It is gone.
    Deleted,
}

/// Something happened. How it stands now, the registry tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// What it is about.
    pub subject: Subject,
    /// What happened.
    pub change: Change,
}

#[derive(Debug, Default)]
pub(super) struct Subscribers(Vec<SyncSender<Event>>);

impl Subscribers {
    pub fn add(&mut self) -> Receiver<Event> {
        let (sender, receiver) = sync_channel(BACKLOG);
        self.0.push(sender);
        receiver
    }

    /// Tells everyone who still listens. Whoever is too slow is dropped rather than waited for.
    pub fn tell(&mut self, subject: Subject, change: Change) {
        let event = Event { subject, change };
        self.0
            .retain(|subscriber| subscriber.try_send(event.clone()).is_ok());
    }
}
