//! A function and its front ends.

use std::fmt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use bluff_virtio::VirtioDevice;

use crate::keeper::{Direct, Keeper};
use crate::session::NetControl;
use crate::spec::MAX_DESCRIPTORS;
use crate::state::{Descriptors, SessionState};

/// How long stopping a ring or giving memory back may take: far below the time that front ends wait.
pub const DEFAULT_BOUND: Duration = Duration::from_secs(1);

/// A connection to a front end, and the session that another process may have begun on it.
#[derive(Debug)]
pub struct Resume {
    /// The connection.
    pub socket: UnixStream,
    /// What was recorded last, and the descriptors that it names; `None` where nothing was recorded yet. Where something
    /// was, the keeper knows the connection already: [`Keeper::connected`] is not called.
    pub recorded: Option<(SessionState, Descriptors)>,
}

/// How an attachment works.
pub struct Options {
    /// How long stopping rings or giving memory back may take, plus what cancelling takes.
    pub bound: Duration,
    /// How many descriptors a front end may hold: no more than it can name where nothing else is said.
    pub descriptors: usize,
    /// For network devices.
    pub net: Option<Box<dyn NetControl>>,
    /// Who records the session.
    pub keeper: Box<dyn Keeper>,
}

impl Default for Options {
    /// Sessions that live and die with this process.
    fn default() -> Self {
        Self {
            bound: DEFAULT_BOUND,
            descriptors: MAX_DESCRIPTORS,
            net: None,
            keeper: Box::new(Direct::default()),
        }
    }
}

/// What a front end and its driver have settled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Negotiated {
    /// The virtio feature bits that the driver accepted, without those of vhost-user; 0 before that.
    pub features: u64,
    /// The device status (virtio 1.3 §2.1); `None` where the front end does not tell it.
    pub status: Option<u8>,
    /// How many rings are started.
    pub queues: u16,
}

/// What happens to an attachment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AttachmentEvent {
    /// A front end has connected.
    Connected,
    /// What was settled has changed; also told once after each connection.
    Negotiated(Negotiated),
    /// It has gone, and nothing of it is left; why, where it was not its own decision.
    Disconnected(Option<String>),
    /// A second front end was turned away.
    Refused,
    /// A ring is broken: the driver has to reset the device.
    NeedsReset,
}

/// Who is told, on the loop's thread: it must not wait.
pub type Listener = Arc<dyn Fn(&str, AttachmentEvent) + Send + Sync>;

/// A function, ready to be added to a [`SessionLoop`](crate::SessionLoop). Its front ends come by
/// [`LoopHandle::connection`](crate::LoopHandle::connection): who listens at its socket, or connects to a front end that does,
/// is the embedder, who may live longer than the loop.
pub struct Attachment {
    pub(crate) name: String,
    pub(crate) device: Box<dyn VirtioDevice>,
    pub(crate) options: Options,
    pub(crate) events: Listener,
}

impl Attachment {
    /// The function `name` (unique in its loop), with its device.
    pub fn new(
        name: impl Into<String>,
        device: Box<dyn VirtioDevice>,
        options: Options,
        events: Listener,
    ) -> Self {
        Self {
            name: name.into(),
            device,
            options,
            events,
        }
    }
}

impl fmt::Debug for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attachment")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}
