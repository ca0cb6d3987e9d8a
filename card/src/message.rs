//! What the control half and the data half say to each other.
//!
//! ```text
//!   control half                                 data half
//!   registry, API, sockets    ToData, number n   reactors, queues, sessions
//!                            ----------------->
//!                            <-----------------
//!                          FromData, in answer to n, or 0: unasked
//! ```
//!
//! Each message is one record of a `SOCK_SEQPACKET` socket, as JSON, with its descriptors beside it. It is the same socket
//! whether the data half is a thread or a process. A data half that serves a hostile host may be in that host's hand: the
//! control half takes what it reads for what it is, bounded and checked, and never trusts it further.
//!
//! **Descriptors that outlive the data half.** Control keeps what a session stands on: the data half sends duplicates with
//! [`FromData::Keep`], each under a [`Role`], and [`FromData::Forget`] when one is no longer wanted. A new data half gets
//! all of them back by [`ToData::Restore`], ahead of the [`ToData::AttachFunction`] that goes on where the old one ended.

mod link;

use serde::{Deserialize, Serialize};

pub use link::{Link, LinkError, MESSAGE_MAX, Outbox, pair};

use crate::spec::{CardSpec, FunctionSpec, Id, VolumeSpec};
use crate::stats::Statistics;

/// Most descriptors in one message. The kernel bears 253 (`SCM_MAX_FD`).
pub const DESCRIPTORS_MAX: usize = 64;

/// A message and its number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Numbered<T> {
    /// To the data half: a number of its own, never 0. From it: the number that it answers, or 0.
    pub number: u64,
    /// The message.
    pub message: T,
}

/// A message that knows how many descriptors travel with it.
pub trait Message: Serialize + for<'de> Deserialize<'de> {
    /// How many there have to be.
    fn descriptors(&self) -> usize;
}

/// What control asks for. Each is answered once, with the message named, or with [`FromData::Failed`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToData {
    /// The first message. Answered by [`FromData::Started`] when the reactors run.
    Start {
        /// The card.
        card: CardSpec,
    },
    /// Make a volume usable. Answered by [`FromData::VolumeOpened`].
    OpenVolume {
        /// Its ID.
        volume: Id,
        /// What it is.
        spec: VolumeSpec,
    },
    /// Let go of a volume that no function stands on. Answered by [`FromData::VolumeClosed`].
    CloseVolume {
        /// Its ID.
        volume: Id,
    },
    /// Give a volume another size. Answered by [`FromData::VolumeResized`].
    ResizeVolume {
        /// Its ID.
        volume: Id,
        /// The size, in bytes.
        size: u64,
    },
    /// Descriptors of a session that another data half had begun. Not answered. No more than [`DESCRIPTORS_MAX`] at once;
    /// more come in further messages, and [`ToData::AttachFunction`] follows the last.
    Restore {
        /// The function.
        function: Id,
        /// What each descriptor is.
        roles: Vec<Role>,
    },
    /// Present a function. Answered by [`FromData::FunctionAttached`] when a front end could be served.
    AttachFunction {
        /// Its ID.
        function: Id,
        /// What it is.
        spec: FunctionSpec,
        /// What the descriptor is that travels along.
        endpoint: Endpoint,
    },
    /// A connection to a front end that listens, for a function in client mode. Not answered.
    Connection {
        /// The function.
        function: Id,
    },
    /// Take a function away. Its I/O is waited for within a bound. Answered by [`FromData::FunctionDetached`].
    DetachFunction {
        /// The function.
        function: Id,
    },
    /// Count. Answered by one [`FromData::Statistics`] or several.
    Statistics {
        /// One function; otherwise all.
        function: Option<Id>,
    },
    /// End: stop all queues within the bound, flush nothing that the host did not ask for, close. Answered by
    /// [`FromData::Drained`], after which the data half ends.
    Drain {
        /// How long it may take, in milliseconds.
        within_ms: u32,
    },
}

/// The descriptor of [`ToData::AttachFunction`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Endpoint {
    /// A listening socket: front ends are accepted on it.
    Listener,
    /// None yet: a [`ToData::Connection`] follows for each connection.
    Client,
}

/// What a descriptor is that control keeps for a session. `(function, role)` names one descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The connection to the front end.
    Connection,
    /// The channel to the front end for requests of ours.
    Backend,
    /// Shared memory that holds the session's negotiated state.
    Record,
    /// The file of a region of guest memory.
    Memory(u32),
    /// The in-flight region.
    Inflight,
    /// The dirty log.
    Log,
    /// The event by which the host notifies a queue.
    Kick(u16),
    /// The event by which a queue notifies the host.
    Call(u16),
    /// The event by which a queue's failure is told.
    Error(u16),
}

/// What the data half says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromData {
    /// The reactors run.
    Started {
        /// How many there are.
        reactors: u16,
    },
    /// A volume can be used.
    VolumeOpened {
        /// The volume.
        volume: Id,
        /// Its shape.
        info: VolumeInfo,
    },
    /// A volume was let go of.
    VolumeClosed {
        /// The volume.
        volume: Id,
    },
    /// A volume has another size: an answer, or unasked where it changed by itself.
    VolumeResized {
        /// The volume.
        volume: Id,
        /// The size, in bytes.
        size: u64,
    },
    /// A function can be reached.
    FunctionAttached {
        /// The function.
        function: Id,
    },
    /// A function is no longer there.
    FunctionDetached {
        /// The function.
        function: Id,
    },
    /// A front end came, or what it negotiated changed.
    FrontEnd {
        /// The function.
        function: Id,
        /// What was negotiated.
        session: SessionInfo,
    },
    /// The front end left. Nothing is kept of its session any more.
    FrontEndGone {
        /// The function.
        function: Id,
        /// Why, where it was not an orderly end.
        reason: Option<String>,
    },
    /// Keep duplicates of these descriptors. One that is kept already under a role is replaced.
    Keep {
        /// The function.
        function: Id,
        /// What each descriptor is.
        roles: Vec<Role>,
    },
    /// These descriptors need no longer be kept.
    Forget {
        /// The function.
        function: Id,
        /// Which.
        roles: Vec<Role>,
    },
    /// Counters; a large answer comes in parts.
    Statistics {
        /// This part.
        statistics: Statistics,
        /// Whether another part follows.
        more: bool,
    },
    /// What was asked for could not be done, or, unasked, something broke.
    Failed {
        /// What it is about.
        about: Subject,
        /// What happened, as an operator should read it.
        error: String,
    },
    /// Everything was stopped.
    Drained,
}

/// What a failure is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// The data half as a whole.
    Card,
    /// A volume.
    Volume(Id),
    /// A function.
    Function(Id),
}

/// The shape of an open volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeInfo {
    /// Its size, in bytes.
    pub size: u64,
    /// Its block, in bytes.
    pub block_size: u32,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// How many channels it bears; `None` for any number.
    pub channels: Option<u32>,
}

/// What a front end negotiated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionInfo {
    /// The virtio feature bits that the driver acknowledged.
    pub features: u64,
    /// The device status field of the driver (virtio 1.3 §2.1), where the front end tells it.
    pub status: Option<u8>,
    /// How many queues run.
    pub queues: u16,
}

impl Message for ToData {
    fn descriptors(&self) -> usize {
        match self {
            Self::Restore { roles, .. } => roles.len(),
            Self::AttachFunction {
                endpoint: Endpoint::Listener,
                ..
            }
            | Self::Connection { .. } => 1,
            Self::AttachFunction {
                endpoint: Endpoint::Client,
                ..
            }
            | Self::Start { .. }
            | Self::OpenVolume { .. }
            | Self::CloseVolume { .. }
            | Self::ResizeVolume { .. }
            | Self::DetachFunction { .. }
            | Self::Statistics { .. }
            | Self::Drain { .. } => 0,
        }
    }
}

impl Message for FromData {
    fn descriptors(&self) -> usize {
        match self {
            Self::Keep { roles, .. } => roles.len(),
            Self::Started { .. }
            | Self::VolumeOpened { .. }
            | Self::VolumeClosed { .. }
            | Self::VolumeResized { .. }
            | Self::FunctionAttached { .. }
            | Self::FunctionDetached { .. }
            | Self::FrontEnd { .. }
            | Self::FrontEndGone { .. }
            | Self::Forget { .. }
            | Self::Statistics { .. }
            | Self::Failed { .. }
            | Self::Drained => 0,
        }
    }
}

impl<T: Message> Message for Numbered<T> {
    fn descriptors(&self) -> usize {
        self.message.descriptors()
    }
}

/// Most queues in one part: about 250 bytes of JSON each.
const QUEUES_PER_PART: usize = 256;

/// Splits counters into parts that each fit into one message.
pub fn statistics_parts(statistics: Statistics) -> Vec<FromData> {
    let Statistics {
        at_ns,
        functions,
        reactors,
    } = statistics;
    let mut parts = vec![Statistics {
        at_ns,
        functions: Vec::new(),
        reactors,
    }];
    let mut queues = 0;
    for function in functions {
        let fits = queues == 0 || queues + function.queues.len() <= QUEUES_PER_PART;
        if !fits {
            parts.push(Statistics {
                at_ns,
                ..Statistics::default()
            });
            queues = 0;
        }
        queues += function.queues.len().max(1);
        parts
            .last_mut()
            .expect("there is one from the start")
            .functions
            .push(function);
    }
    let last = parts.len() - 1;
    let number = parts.into_iter().enumerate();
    number
        .map(|(index, statistics)| FromData::Statistics {
            statistics,
            more: index < last,
        })
        .collect()
}

#[cfg(test)]
mod tests;
