//! A function and its clients.

use std::fmt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use bluff_attachment::keeper::{Descriptors, Keeper};
use bluff_pci::PciFunction;

use crate::{Counters, Limits, Record};

/// How long a command may wait for the function: far below the 5 s that QEMU gives.
pub const DEFAULT_BOUND: Duration = Duration::from_secs(1);

/// How an attachment works.
pub struct Options {
    /// How long a command may wait for the function (an unmap, a reset, the end of bus mastering), and the end of a session, plus what
    /// cancelling takes.
    pub bound: Duration,
    /// What a client may do.
    pub limits: Limits,
    /// Who records sessions; `None` for those that live and die with this process.
    pub keeper: Option<Box<dyn Keeper>>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            bound: DEFAULT_BOUND,
            limits: Limits::default(),
            keeper: None,
        }
    }
}

/// A connection to a client, and the session that another process may have begun on it.
#[derive(Debug)]
pub struct Resume {
    /// The connection.
    pub socket: UnixStream,
    /// What was recorded last, and the descriptors that it names; `None` where nothing was recorded yet. Where something
    /// was, the keeper knows the connection already: [`Keeper::connected`] is not called.
    pub recorded: Option<(Record, Descriptors)>,
}

impl From<UnixStream> for Resume {
    /// A client that has just connected.
    fn from(socket: UnixStream) -> Self {
        Self {
            socket,
            recorded: None,
        }
    }
}

/// What happens to an attachment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AttachmentEvent {
    /// A client has connected.
    Connected,
    /// A version was agreed on with it.
    Negotiated,
    /// It has gone, and nothing of it is left; why, where it was not its own decision.
    Disconnected(Option<String>),
    /// A second client was turned away.
    Refused,
    /// The device has stopped by itself, and its driver has to reset it; why.
    Failed(Arc<str>),
}

/// Who is told, on the loop's thread: it must not wait.
pub type Listener = Arc<dyn Fn(&str, AttachmentEvent) + Send + Sync>;

/// A function, ready to be added to a [`SessionLoop`](crate::SessionLoop). Its clients come by
/// [`LoopHandle::connection`](crate::LoopHandle::connection): who listens at its socket is the embedder.
pub struct Attachment {
    pub(crate) name: String,
    pub(crate) function: Box<dyn PciFunction>,
    pub(crate) options: Options,
    pub(crate) events: Listener,
    pub(crate) counters: Arc<Counters>,
}

impl Attachment {
    /// The function `name` (unique in its loop).
    pub fn new(
        name: impl Into<String>,
        function: Box<dyn PciFunction>,
        options: Options,
        events: Listener,
    ) -> Self {
        Self {
            name: name.into(),
            function,
            options,
            events,
            counters: Arc::default(),
        }
    }

    /// Its messages, to be read by anybody.
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }
}

impl fmt::Debug for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attachment")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}
