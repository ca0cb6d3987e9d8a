//! The control socket: one line of JSON asks, one line answers.
//!
//! ```text
//!   {"version":1,"id":7,"request":{"show_function":{"id":"blk0"}}}
//!   {"version":1,"id":7,"result":{"function":{…}}}
//!   {"version":1,"id":8,"error":"there is no function blk9"}
//! ```
//!
//! The version changes when an old client would misread an answer; fields and requests are added without. Answers to one
//! client come in the order of its questions, one at a time.

pub mod client;
pub mod server;

use serde::{Deserialize, Serialize};

use crate::message::{AddressEntry, NetworkInfo, SessionInfo, VolumeInfo};
use crate::registry::{
    Function, FunctionState, Network, NetworkState, Registry, Volume, VolumeState,
};
use crate::spec::{DataMode, FunctionSpec, Id, NetworkSpec, VolumeSpec};
use crate::stats::Statistics;

/// The version of the protocol.
pub const VERSION: u32 = 1;
/// Most bytes of a question.
pub const REQUEST_MAX: usize = 64 << 10;

/// A question as it stands on its line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestLine {
    /// [`VERSION`].
    pub version: u32,
    /// The client's number for it, which the answer repeats.
    pub id: u64,
    /// The question.
    pub request: Request,
}

/// An answer as it stands on its line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResponseLine {
    /// [`VERSION`].
    pub version: u32,
    /// The number of the question; 0 where it could not be read.
    pub id: u64,
    /// The answer.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What came of a question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// An answer.
    Result(Response),
    /// Why there is none.
    Error(String),
}

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// How the daemon is.
    Status,
    /// All functions.
    ListFunctions,
    /// One function.
    ShowFunction {
        /// Its ID.
        id: Id,
    },
    /// All volumes.
    ListVolumes,
    /// Give a volume another size.
    ResizeVolume {
        /// Its ID.
        id: Id,
        /// The size, in bytes.
        size: u64,
    },
    /// The namespaces of a function.
    ListNamespaces {
        /// The function.
        function: Id,
    },
    /// Add a namespace to the subsystem of a function.
    AddNamespace {
        /// The function.
        function: Id,
        /// The volume that it stands on.
        volume: Id,
        /// Its number; otherwise the lowest that is free.
        nsid: Option<u32>,
    },
    /// Take the namespace that stands on a volume away from the subsystem of a function.
    RemoveNamespace {
        /// The function.
        function: Id,
        /// The volume.
        volume: Id,
    },
    /// All networks.
    ListNetworks,
    /// One network.
    ShowNetwork {
        /// Its ID.
        id: Id,
    },
    /// The addresses that a network knows.
    ListAddresses {
        /// Its ID.
        network: Id,
    },
    /// Plug the cable of a network function in, or pull it out. Answered with the function.
    SetLink {
        /// The function.
        function: Id,
        /// Whether it is plugged in.
        up: bool,
    },
    /// The counters.
    Statistics {
        /// Of one function; otherwise of all, and of the reactors.
        function: Option<Id>,
    },
}

/// The answers, one for each question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// How the daemon is.
    Status(Status),
    /// All functions, by ID.
    Functions(Vec<FunctionEntry>),
    /// One function.
    Function(FunctionEntry),
    /// All volumes, by ID.
    Volumes(Vec<VolumeEntry>),
    /// One volume, as it is now.
    Volume(VolumeEntry),
    /// The namespaces of a function, as they are now.
    Namespaces(NamespacesEntry),
    /// All networks, by ID.
    Networks(Vec<NetworkEntry>),
    /// One network.
    Network(Box<NetworkEntry>),
    /// The addresses that a network knows, by VLAN and address.
    Addresses(Vec<AddressEntry>),
    /// The counters.
    Statistics(Statistics),
}

/// How the daemon is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its version.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// The data half's process, where it has its own.
    pub data_pid: Option<u32>,
    /// Where the data half runs.
    pub data: DataMode,
    /// How often the data half was started again.
    pub restarts: u32,
    /// `starting`, `ready` or `draining`.
    pub phase: String,
    /// Seconds since it was started.
    pub uptime_s: u64,
    /// Its reactors.
    pub reactors: u16,
    /// How many volumes there are.
    pub volumes: usize,
    /// How many networks there are.
    #[serde(default)]
    pub networks: usize,
    /// How many functions there are.
    pub functions: usize,
    /// How many of those have a front end.
    pub connected: usize,
}

/// A function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionEntry {
    /// Its ID.
    pub id: Id,
    /// What it is; the socket is filled in.
    pub spec: FunctionSpec,
    /// How it stands: `waiting`, `attaching`, `idle`, `connected`, `detaching` or `failed`.
    pub state: String,
    /// Why it failed.
    pub reason: Option<String>,
    /// What its front end negotiated.
    pub session: Option<SessionInfo>,
    /// Its namespaces, where it is asked about alone and is of a kind that has them.
    #[serde(default)]
    pub namespaces: Vec<NamespaceEntry>,
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeEntry {
    /// Its ID.
    pub id: Id,
    /// What it is.
    pub spec: VolumeSpec,
    /// How it stands: `opening`, `open`, `closing` or `failed`.
    pub state: String,
    /// Why it failed.
    pub reason: Option<String>,
    /// Its shape, where it is open.
    pub info: Option<VolumeInfo>,
    /// The functions that stand on it.
    pub functions: Vec<Id>,
}

/// A network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkEntry {
    /// Its ID.
    pub id: Id,
    /// What it is.
    pub spec: NetworkSpec,
    /// How it stands: `opening`, `open`, `closing` or `failed`.
    pub state: String,
    /// Why it failed.
    pub reason: Option<String>,
    /// What came of opening it, where it is open.
    pub info: Option<NetworkInfo>,
    /// The functions that are in it.
    pub functions: Vec<Id>,
}

/// The subsystem of a function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespacesEntry {
    /// The function that was asked about.
    pub function: Id,
    /// Its name.
    pub nqn: String,
    /// The functions that have it.
    pub functions: Vec<Id>,
    /// Its namespaces, by NSID.
    pub namespaces: Vec<NamespaceEntry>,
}

/// A namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespaceEntry {
    /// Its number.
    pub nsid: u32,
    /// The volume that it stands on.
    pub volume: Id,
    /// The shape of that, where it is open.
    pub info: Option<VolumeInfo>,
    /// The bytes of its blocks: what a host has formatted it to, or else the volume's, where that is open.
    #[serde(default)]
    pub block_size: Option<u32>,
}

impl FunctionEntry {
    /// How a function stands in the registry.
    pub fn new(registry: &Registry, id: &Id, function: &Function) -> Self {
        let socket = registry.socket_path(id, &function.spec);
        let (reason, session) = match &function.state {
            FunctionState::Failed { reason } => (Some(reason.clone()), None),
            FunctionState::Connected(session) => (None, Some(*session)),
            _ => (None, None),
        };
        let spec = FunctionSpec {
            socket: Some(socket),
            ..function.spec.clone()
        };
        Self {
            id: id.clone(),
            spec,
            state: function.state.word().to_owned(),
            reason,
            session,
            namespaces: Vec::new(),
        }
    }
}

impl NetworkEntry {
    /// How a network stands in the registry.
    pub fn new(registry: &Registry, id: &Id, network: &Network) -> Self {
        let (reason, info) = match &network.state {
            NetworkState::Failed { reason } => (Some(reason.clone()), None),
            NetworkState::Open(info) => (None, Some(info.clone())),
            NetworkState::Opening | NetworkState::Closing => (None, None),
        };
        Self {
            id: id.clone(),
            spec: network.spec.clone(),
            state: network.state.word().to_owned(),
            reason,
            info,
            functions: registry.members(id).cloned().collect(),
        }
    }
}

impl VolumeEntry {
    /// How a volume stands in the registry.
    pub fn new(registry: &Registry, id: &Id, volume: &Volume) -> Self {
        let (reason, info) = match &volume.state {
            VolumeState::Failed { reason } => (Some(reason.clone()), None),
            VolumeState::Open(info) => (None, Some(*info)),
            VolumeState::Opening | VolumeState::Closing => (None, None),
        };
        let functions = registry.users(id).cloned().collect();
        let state = volume.state.word().to_owned();
        Self {
            id: id.clone(),
            spec: volume.spec.clone(),
            state,
            reason,
            info,
            functions,
        }
    }
}
