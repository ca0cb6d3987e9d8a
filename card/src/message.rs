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
//! **Sessions that outlive the data half.** Control has the connection to every front end, and where the data half is a
//! process, what its session stands on: each step of a session arrives as a [`FromData::Commit`], is recorded, and is then
//! carried out on the connection. A new data half gets the descriptors back by [`ToData::Restore`], then the connection and the
//! recorded state by [`ToData::Connection`], and goes on where the old one ended. What a function itself has to keep is in files of its
//! own: they come with [`FromData::FunctionAttached`], and go to the next data half with [`ToData::AttachFunction`].
//!
//! **Formats that outlive the daemon.** What a host formats a namespace to is recorded by control ([`crate::formats`]) before any
//! host sees it: the data half asks by [`FromData::KeepFormats`], and goes on with [`ToData::FormatsKept`].

mod link;
pub mod record;

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use bluff_packet::Mac;
use serde::{Deserialize, Serialize};

pub use link::{Link, LinkError, MESSAGE_MAX, Outbox, pair};

use crate::spec::{
    CardSpec, FunctionSpec, Id, NamespaceFormat, NamespaceSpec, NetworkSpec, SubsystemKey,
    SubsystemSpec, Text, Underlay, VolumeSpec,
};
use crate::stats::Statistics;

/// Most descriptors in one message. The kernel bears 253 (`SCM_MAX_FD`).
pub const DESCRIPTORS_MAX: usize = 64;
/// Most files in which a function keeps what outlives its data half.
pub const FILES_MAX: usize = 2;

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
    /// Make a network that functions can be in. Answered by [`FromData::NetworkOpened`].
    OpenNetwork {
        /// Its ID.
        network: Id,
        /// What it is.
        spec: NetworkSpec,
    },
    /// Let go of a network that no function is in. Answered by [`FromData::NetworkClosed`].
    CloseNetwork {
        /// Its ID.
        network: Id,
    },
    /// Tell which addresses a network knows. Answered by one [`FromData::Addresses`] or several.
    ListAddresses {
        /// Its ID.
        network: Id,
    },
    /// Plug the cable of a network function in, or pull it out. Answered by [`FromData::LinkSet`].
    SetLink {
        /// The function.
        function: Id,
        /// Whether it is plugged in.
        up: bool,
    },
    /// Show what passes a place, to the client whose connection comes along. Answered by [`FromData::Capturing`]; the client says
    /// when it has read control's own answer, and is sent the rest by the data half.
    Capture {
        /// The place.
        place: CapturePlace,
        /// What is wanted.
        spec: CaptureSpec,
    },
    /// Descriptors of a session that another data half had begun. Not answered. No more than [`DESCRIPTORS_MAX`] at once;
    /// more come in further messages, and [`ToData::Connection`] follows the last.
    Restore {
        /// The function.
        function: Id,
        /// How the session's state calls each descriptor.
        keys: Vec<u64>,
    },
    /// Make a function. Answered by [`FromData::FunctionAttached`] when a front end could be served.
    AttachFunction {
        /// Its ID.
        function: Id,
        /// What it is.
        spec: FunctionSpec,
        /// Its subsystem, with its name, where it is an NVMe function. Functions that share one get the same.
        subsystem: Option<SubsystemSpec>,
        /// How many descriptors its front end may hold.
        descriptors: u32,
        /// How many files come along: those that it had in another data half.
        files: usize,
    },
    /// Add a namespace to the subsystem of a function, for all its controllers. Answered by [`FromData::NamespaceAdded`].
    AddNamespace {
        /// The function.
        function: Id,
        /// The namespace.
        namespace: NamespaceSpec,
    },
    /// Take one away from them. Answered by [`FromData::NamespaceRemoved`] when nothing uses its volume any more.
    RemoveNamespace {
        /// The function.
        function: Id,
        /// Its number.
        nsid: u32,
    },
    /// The connection to a front end, for a function that has none; with it, where another data half had begun the session,
    /// the [`record`] of its state. Not answered, but for [`FromData::FrontEnd`] and [`FromData::FrontEndGone`]; the latter
    /// also where it cannot be served.
    Connection {
        /// The function.
        function: Id,
        /// Whether there is a record.
        recorded: bool,
    },
    /// A commit is recorded and carried out. Not answered.
    Committed {
        /// The function.
        function: Id,
        /// The number of the commit.
        seq: u64,
    },
    /// What comes of a [`FromData::KeepFormats`]. Not answered.
    FormatsKept {
        /// Its number.
        seq: u64,
        /// Why they are certainly not recorded, if they are not.
        error: Option<String>,
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
    /// Functions can be in a network.
    NetworkOpened {
        /// The network.
        network: Id,
        /// What came of it.
        info: NetworkInfo,
    },
    /// A network was let go of.
    NetworkClosed {
        /// The network.
        network: Id,
    },
    /// Addresses that a network knows; many come in parts.
    Addresses {
        /// The network.
        network: Id,
        /// This part.
        addresses: Vec<AddressEntry>,
        /// Whether another part follows.
        more: bool,
    },
    /// A cable was plugged in, or pulled out.
    LinkSet {
        /// The function.
        function: Id,
        /// Whether it is plugged in.
        up: bool,
    },
    /// What passes a place is being kept.
    Capturing {
        /// The place.
        place: CapturePlace,
    },
    /// A function can be reached.
    FunctionAttached {
        /// The function.
        function: Id,
        /// How many files come along that are to be kept for it: at most [`FILES_MAX`], and none where it was given some.
        files: usize,
    },
    /// A function is no longer there.
    FunctionDetached {
        /// The function.
        function: Id,
    },
    /// A namespace was added.
    NamespaceAdded {
        /// The function.
        function: Id,
        /// The namespace.
        namespace: NamespaceSpec,
    },
    /// A namespace was taken away.
    NamespaceRemoved {
        /// The function.
        function: Id,
        /// Its number.
        nsid: u32,
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
    /// A step of a session, as a [`record`] of a [`Commit`](bluff_attachment::keeper::Commit), with its descriptors. Answered
    /// by [`ToData::Committed`], and until then there is no other for the function.
    Commit {
        /// The function.
        function: Id,
        /// How many descriptors follow the record.
        files: usize,
    },
    /// Namespaces of a subsystem were erased, to be formatted so: to be recorded, all or none of them. Unasked; answered by
    /// [`ToData::FormatsKept`], unless nobody knows whether it was recorded.
    KeepFormats {
        /// The subsystem.
        subsystem: SubsystemKey,
        /// A number, for the answer.
        seq: u64,
        /// The namespaces.
        formats: Vec<NamespaceFormat>,
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
    /// A network.
    Network(Id),
    /// A function.
    Function(Id),
}

/// Where frames can be captured. As text: `net0`, `network:blue`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CapturePlace {
    /// At the port of a network function.
    Function(Id),
    /// At the tunnel of a network.
    Network(Id),
}

impl fmt::Display for CapturePlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Function(id) => id.fmt(f),
            Self::Network(id) => write!(f, "network:{id}"),
        }
    }
}

impl FromStr for CapturePlace {
    type Err = <Id as FromStr>::Err;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("network:") {
            Some(id) => id.parse().map(Self::Network),
            None => text.parse().map(Self::Function),
        }
    }
}

/// Which frames of a place are captured, and how much of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaptureSpec {
    /// Bytes of each frame.
    pub snaplen: u32,
    /// Only those that go this way.
    #[serde(default)]
    pub only: Option<CaptureWay>,
    /// So many frames, and no more.
    #[serde(default)]
    pub count: Option<u64>,
}

/// Which way a frame goes: as the function sees it, or for a tunnel the card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CaptureWay {
    /// It is received.
    In,
    /// It is sent.
    Out,
}

/// What came of opening a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkInfo {
    /// What carries its tunnel, where it has one: never [`Underlay::Auto`].
    pub underlay: Option<Underlay>,
}

/// Where an address is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressEntry {
    /// The address.
    pub mac: Text<Mac>,
    /// Its VLAN; 0 where its frames have no tag.
    pub vlan: u16,
    /// Where it is.
    #[serde(flatten)]
    pub place: AddressPlace,
    /// It was configured, and does not move.
    pub fixed: bool,
}

/// Where frames for an address go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AddressPlace {
    /// To a function of this card.
    Function(Id),
    /// To another card.
    Vtep(IpAddr),
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
            Self::Restore { keys, .. } => keys.len(),
            Self::Connection { recorded, .. } => 1 + usize::from(*recorded),
            Self::AttachFunction { files, .. } => *files,
            Self::Capture { .. } => 1,
            Self::AddNamespace { .. }
            | Self::RemoveNamespace { .. }
            | Self::Committed { .. }
            | Self::FormatsKept { .. }
            | Self::Start { .. }
            | Self::OpenVolume { .. }
            | Self::CloseVolume { .. }
            | Self::ResizeVolume { .. }
            | Self::OpenNetwork { .. }
            | Self::CloseNetwork { .. }
            | Self::ListAddresses { .. }
            | Self::SetLink { .. }
            | Self::DetachFunction { .. }
            | Self::Statistics { .. }
            | Self::Drain { .. } => 0,
        }
    }
}

impl Message for FromData {
    fn descriptors(&self) -> usize {
        match self {
            Self::Commit { files, .. } => files.saturating_add(1),
            Self::FunctionAttached { files, .. } => *files,
            Self::Started { .. }
            | Self::VolumeOpened { .. }
            | Self::VolumeClosed { .. }
            | Self::VolumeResized { .. }
            | Self::NetworkOpened { .. }
            | Self::NetworkClosed { .. }
            | Self::Addresses { .. }
            | Self::LinkSet { .. }
            | Self::Capturing { .. }
            | Self::FunctionDetached { .. }
            | Self::NamespaceAdded { .. }
            | Self::NamespaceRemoved { .. }
            | Self::FrontEnd { .. }
            | Self::FrontEndGone { .. }
            | Self::KeepFormats { .. }
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

/// Most queues in one part: about 250 bytes of JSON each. A pair of a network function has about twice as much.
const QUEUES_PER_PART: usize = 256;
/// Most networks in one part: about 1,700 bytes of JSON each where every cause has some.
const NETWORKS_PER_PART: usize = 64;
/// Most addresses in one part: about 100 bytes of JSON each.
const ADDRESSES_PER_PART: usize = 512;

/// Splits the addresses of a network into parts that each fit into one message.
pub fn address_parts(network: &Id, addresses: &[AddressEntry]) -> Vec<FromData> {
    let part = |addresses: &[AddressEntry], more| FromData::Addresses {
        network: network.clone(),
        addresses: addresses.to_vec(),
        more,
    };
    let count = addresses.len().div_ceil(ADDRESSES_PER_PART);
    let chunks = addresses.chunks(ADDRESSES_PER_PART).enumerate();
    let parts: Vec<_> = chunks.map(|(i, a)| part(a, i + 1 < count)).collect();
    match parts.is_empty() {
        true => vec![part(&[], false)],
        false => parts,
    }
}

/// Splits counters into parts that each fit into one message.
pub fn statistics_parts(statistics: Statistics) -> Vec<FromData> {
    let Statistics {
        at_ns,
        functions,
        networks,
        reactors,
    } = statistics;
    let mut parts = vec![Statistics {
        at_ns,
        reactors,
        ..Statistics::default()
    }];
    let mut queues = 0;
    for function in functions {
        let weight = function.weight();
        let fits = queues == 0 || queues + weight <= QUEUES_PER_PART;
        if !fits {
            parts.push(Statistics {
                at_ns,
                ..Statistics::default()
            });
            queues = 0;
        }
        queues += weight;
        parts
            .last_mut()
            .expect("there is one from the start")
            .functions
            .push(function);
    }
    for networks in networks.chunks(NETWORKS_PER_PART) {
        parts.push(Statistics {
            at_ns,
            networks: networks.to_vec(),
            ..Statistics::default()
        });
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
