//! What a card is to present: volumes, networks and functions, in words that neither a file format nor a wire format owns.
//!
//! The configuration file, the control socket, the messages to the data half and a later API all speak in these types.

#[macro_use]
mod words;
mod net;
mod rules;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

pub use net::{
    BadUnderlay, FdbSpec, LIST_MAX, LimitSpec, MTU, MTU_LOCAL, MTU_TUNNEL, MTU_UPLINK, NetworkSpec,
    PAIRS_MAX, PortSpec, Text, Tunnel, TunnelSpec, Underlay, UplinkSpec, VNI_MAX, VTEPS_MAX,
};
pub use rules::{
    attach_mistake, count_mistake, mac_mistake, nqn_mistake, serial_mistake, vlan_mistake,
};
use serde::{Deserialize, Serialize};

/// The longest ID, in bytes: that of a DNS label, so that an ID can name files, sockets and metrics anywhere.
pub const ID_MAX: usize = 63;

/// The name of a volume or function: `[a-z0-9][a-z0-9-]*`, at most [`ID_MAX`] long.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Id(String);

/// Text that is no ID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an ID is 1 to {ID_MAX} of a-z, 0-9 and `-`, and does not begin with `-`")]
pub struct BadId;

impl Id {
    /// The ID as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Id {
    type Err = BadId;

    fn from_str(text: &str) -> Result<Self, BadId> {
        let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let sound = (1..=ID_MAX).contains(&text.len()) && text.bytes().all(fits);
        if sound && !text.starts_with('-') {
            Ok(Self(text.to_owned()))
        } else {
            Err(BadId)
        }
    }
}

impl TryFrom<String> for Id {
    type Error = BadId;

    fn try_from(text: String) -> Result<Self, BadId> {
        text.parse()
    }
}

impl From<Id> for String {
    fn from(id: Id) -> Self {
        id.0
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

words! {
    /// When a reactor looks at a queue without having been notified.
    Poll {
        /// While there is work, and for `poll_us` after.
        Adaptive = "adaptive",
        /// All the time: the reactor never sleeps.
        Always = "always",
        /// Not at all.
        Never = "never",
    }
}

words! {
    /// Where the data half runs.
    DataMode {
        /// As threads of the daemon.
        Threads = "threads",
        /// As a process of its own.
        Process = "process",
    }
}

words! {
    /// What the host sees.
    FunctionKind {
        /// A virtio block device.
        VirtioBlk = "virtio-blk",
        /// A virtio network device.
        VirtioNet = "virtio-net",
        /// A virtio network device that is the wire of tunnels.
        Uplink = "uplink",
        /// An NVMe controller.
        Nvme = "nvme",
    }
}

words! {
    /// How a function reaches its host.
    Attach {
        /// A Unix socket between the daemon and a VMM, which has the transport.
        VhostUser = "vhost-user",
        /// A Unix socket between the daemon and a VMM; the function is a PCI function as a whole.
        VfioUser = "vfio-user",
    }
}

words! {
    /// Which side of a socket waits for the other.
    SocketMode {
        /// The daemon listens.
        Server = "server",
        /// The daemon connects, and connects again when it is left.
        Client = "client",
    }
}

/// The card as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CardSpec {
    /// The CPU of each reactor; where empty, there is one reactor that is not pinned.
    pub reactors: Vec<u32>,
    /// How reactors poll, where a function does not say.
    pub poll: Poll,
    /// How long adaptive polling goes on after the last work, in microseconds.
    pub poll_us: u32,
    /// Where the data half runs.
    pub data: DataMode,
}

impl Default for CardSpec {
    fn default() -> Self {
        Self {
            reactors: Vec::new(),
            poll: Poll::Adaptive,
            poll_us: 50,
            data: DataMode::Threads,
        }
    }
}

/// A volume: where its data is, and what is done to it on the way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSpec {
    /// Kind, place and options: `file:/srv/disk0.raw?size=1GiB`.
    pub uri: String,
    /// Layers, from the host inwards.
    #[serde(default)]
    pub layers: Vec<LayerSpec>,
}

/// A layer around a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerSpec {
    /// Its kind, such as `delay`.
    pub kind: String,
    /// What it is told, in the form in which it was written.
    #[serde(default)]
    pub parameters: BTreeMap<String, Parameter>,
}

/// A value that a layer is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Parameter {
    /// `true` or `false`.
    Flag(bool),
    /// A whole number.
    Integer(i64),
    /// Text, and everything with a unit: `"2ms"`, `"1GiB"`.
    Text(String),
    /// Several values.
    List(Vec<Parameter>),
}

impl FunctionKind {
    /// How functions of this kind reach hosts.
    pub fn attach(self) -> Attach {
        match self {
            Self::VirtioBlk | Self::VirtioNet | Self::Uplink => Attach::VhostUser,
            Self::Nvme => Attach::VfioUser,
        }
    }
}

/// The highest namespace ID. A host may ask for each of them in turn, and firmware does.
pub const NSID_MAX: u32 = 65_536;
/// Most namespaces in a subsystem: so many fit into one list of them (NVMe Base 2.1 §5.1.13.2.2).
pub const NAMESPACES_MAX: usize = 1024;

/// A namespace of a subsystem.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespaceSpec {
    /// The volume that it stands on.
    pub volume: Id,
    /// Its number, from 1.
    pub nsid: u32,
    /// The bytes of a block that a host has formatted it to; where none has, they are the volume's. It is no part of the configuration: control knows it ([`crate::formats`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_size: Option<u32>,
}

impl NamespaceSpec {
    /// One that nobody has formatted.
    pub fn new(volume: Id, nsid: u32) -> Self {
        Self {
            volume,
            nsid,
            block_size: None,
        }
    }
}

/// What a host has formatted a namespace to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespaceFormat {
    /// Its number.
    pub nsid: u32,
    /// Bytes of a block.
    pub block_size: u32,
}

/// What NVMe controllers have in common that are one subsystem.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubsystemSpec {
    /// Its name (NVMe Base 2.1 §4.5); left out: one made of the card's identity and its ID.
    #[serde(default)]
    pub nqn: Option<String>,
    /// Its namespaces, each NSID and each volume once.
    pub namespaces: Vec<NamespaceSpec>,
}

impl SubsystemSpec {
    /// The lowest NSID that is free.
    pub fn free_nsid(&self) -> u32 {
        let taken = |nsid| self.namespaces.iter().any(|n| n.nsid == nsid);
        (1..=NSID_MAX)
            .find(|nsid| !taken(*nsid))
            .expect("a list in memory is shorter")
    }
}

/// The subsystem of an NVMe function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum SubsystemUse {
    /// One that several functions may share, by its ID.
    Shared {
        /// Its ID.
        subsystem: Id,
    },
    /// One of its own.
    Own(SubsystemSpec),
}

/// What tells subsystems apart.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SubsystemKey {
    /// One that functions may share, by its ID.
    Shared(Id),
    /// That of a function which has it alone.
    Own(Id),
}

impl SubsystemUse {
    /// That of a function of this ID.
    pub fn key(&self, function: &Id) -> SubsystemKey {
        match self {
            Self::Shared { subsystem } => SubsystemKey::Shared(subsystem.clone()),
            Self::Own(_) => SubsystemKey::Own(function.clone()),
        }
    }
}

/// What the host sees, and what it stands on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind")]
pub enum DeviceSpec {
    /// A virtio block device.
    #[serde(rename = "virtio-blk")]
    VirtioBlk {
        /// The volume that it stands on.
        volume: Id,
        /// Whether the host may switch its cache between write-back and write-through.
        #[serde(default)]
        config_wce: bool,
    },
    /// A virtio network device.
    #[serde(rename = "virtio-net")]
    VirtioNet {
        /// The network that it is in.
        network: Id,
        /// Its port there.
        #[serde(flatten)]
        port: Box<PortSpec>,
    },
    /// A virtio network device that is the wire of tunnels.
    #[serde(rename = "uplink")]
    Uplink(UplinkSpec),
    /// An NVMe controller.
    #[serde(rename = "nvme")]
    Nvme {
        /// Its subsystem, with its namespaces.
        #[serde(flatten)]
        subsystem: SubsystemUse,
        /// Its serial number, at most [`SERIAL_MAX`] bytes of ASCII; left out: the function's ID, as much of it as fits.
        #[serde(default)]
        serial: Option<String>,
    },
}

/// The longest serial number of an NVMe controller, in bytes (NVMe Base 2.1 Figure 312).
pub const SERIAL_MAX: usize = 20;

impl DeviceSpec {
    /// What it is.
    pub fn kind(&self) -> FunctionKind {
        match self {
            Self::VirtioBlk { .. } => FunctionKind::VirtioBlk,
            Self::VirtioNet { .. } => FunctionKind::VirtioNet,
            Self::Uplink(_) => FunctionKind::Uplink,
            Self::Nvme { .. } => FunctionKind::Nvme,
        }
    }
}

/// A function: what the host sees, where it is attached, and what it stands on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionSpec {
    /// What the host sees.
    #[serde(flatten)]
    pub device: DeviceSpec,
    /// How it reaches the host.
    pub attach: Attach,
    /// The socket; left out: the function's ID with `.sock`, in the runtime directory.
    #[serde(default)]
    pub socket: Option<PathBuf>,
    /// Which side of the socket waits.
    pub mode: SocketMode,
    /// How many request queues the host is offered; of a network device: pairs of queues.
    pub queues: u16,
    /// How its queues are polled; left out: as the card says.
    #[serde(default)]
    pub poll: Option<Poll>,
    /// How long stopping its queues or giving memory back may take, in milliseconds, plus what cancelling takes. Then
    /// requests end with an error, where the front end has no record of them.
    #[serde(default = "stop_timeout_ms")]
    pub stop_timeout_ms: u32,
}

/// A silent volume never holds a front end for 2 s.
pub const STOP_TIMEOUT_MS_DEFAULT: u32 = 1000;

fn stop_timeout_ms() -> u32 {
    STOP_TIMEOUT_MS_DEFAULT
}

impl FunctionSpec {
    /// How many rings or queues a front end sets up at most.
    pub fn rings(&self) -> u16 {
        match self.device {
            // The control queue is one more.
            DeviceSpec::VirtioNet { .. } | DeviceSpec::Uplink(_) => {
                self.queues.saturating_mul(2).saturating_add(1)
            }
            DeviceSpec::VirtioBlk { .. } | DeviceSpec::Nvme { .. } => self.queues,
        }
    }

    /// Its network, and its port there, where it is a network device.
    pub fn port(&self) -> Option<(&Id, &PortSpec)> {
        match &self.device {
            DeviceSpec::VirtioNet { network, port } => Some((network, port)),
            DeviceSpec::VirtioBlk { .. } | DeviceSpec::Uplink(_) | DeviceSpec::Nvme { .. } => None,
        }
    }

    /// Where its socket stands, given the runtime directory.
    pub fn socket_path(&self, id: &Id, runtime_dir: &Path) -> PathBuf {
        match &self.socket {
            Some(path) => path.clone(),
            None => runtime_dir.join(format!("{id}.sock")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_is_one_flat_table() {
        let text = r#"{"kind":"virtio-blk","volume":"disk0","config_wce":false,"attach":"vhost-user","socket":null,
            "mode":"server","queues":1,"poll":null,"stop_timeout_ms":1000}"#;
        let spec: FunctionSpec = serde_json::from_str(text).unwrap();
        assert_eq!(spec.device.kind(), FunctionKind::VirtioBlk);
        let value: serde_json::Value = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_value(&spec).unwrap(), value);
        let nvme = r#"{"kind":"nvme","subsystem":"s0","serial":"DB0001","attach":"vfio-user","mode":"server","queues":8}"#;
        let spec: FunctionSpec = serde_json::from_str(nvme).unwrap();
        let shared = |spec: &FunctionSpec| matches!(&spec.device, DeviceSpec::Nvme { subsystem: SubsystemUse::Shared { subsystem }, .. } if subsystem.as_str() == "s0");
        assert!(shared(&spec));
        let again = serde_json::to_string(&spec).unwrap();
        assert!(shared(&serde_json::from_str(&again).unwrap()));
        let net = r#"{"kind":"virtio-net","network":"blue","mac":"02:00:00:00:00:01","limit":{"tx":5},"attach":"vhost-user","mode":"server","queues":2}"#;
        let spec: FunctionSpec = serde_json::from_str(net).unwrap();
        let (network, port) = spec.port().unwrap();
        assert_eq!(
            (network.as_str(), port.limit.tx, spec.rings()),
            ("blue", Some(5), 5)
        );
        let again: FunctionSpec =
            serde_json::from_str(&serde_json::to_string(&spec).unwrap()).unwrap();
        assert_eq!(spec, again);
        let own = r#"{"kind":"nvme","namespaces":[{"volume":"disk0","nsid":1}],"attach":"vfio-user","mode":"server","queues":8}"#;
        let spec: FunctionSpec = serde_json::from_str(own).unwrap();
        let again: FunctionSpec =
            serde_json::from_str(&serde_json::to_string(&spec).unwrap()).unwrap();
        assert_eq!(spec, again);
    }

    #[test]
    fn the_lowest_namespace_number_is_given() {
        let namespace = |nsid| NamespaceSpec::new("disk0".parse().unwrap(), nsid);
        let mut spec = SubsystemSpec::default();
        assert_eq!(spec.free_nsid(), 1);
        spec.namespaces = vec![namespace(1), namespace(3)];
        assert_eq!(spec.free_nsid(), 2);
    }

    #[test]
    fn ids_are_dns_labels_in_lower_case() {
        let longest = "a".repeat(ID_MAX);
        for good in ["a", "0", "blk0", "tenant-7-disk", "a-", &longest] {
            assert!(good.parse::<Id>().is_ok(), "{good}");
        }
        let too_long = "a".repeat(ID_MAX + 1);
        for bad in ["", "-a", "A", "a_b", "a.b", "a/b", "ä", &too_long] {
            assert_eq!(bad.parse::<Id>(), Err(BadId), "{bad}");
        }
    }

    #[test]
    fn an_id_from_a_message_is_checked_too() {
        assert!(serde_json::from_str::<Id>(r#""blk0""#).is_ok());
        assert!(serde_json::from_str::<Id>(r#""../blk0""#).is_err());
    }

    #[test]
    fn a_socket_stands_in_the_runtime_directory_unless_told() {
        let mut spec = FunctionSpec {
            device: DeviceSpec::VirtioBlk {
                volume: "disk0".parse().unwrap(),
                config_wce: false,
            },
            attach: Attach::VhostUser,
            socket: None,
            mode: SocketMode::Server,
            queues: 1,
            poll: None,
            stop_timeout_ms: STOP_TIMEOUT_MS_DEFAULT,
        };
        let id: Id = "blk0".parse().unwrap();
        assert_eq!(
            spec.socket_path(&id, Path::new("/run/x")),
            Path::new("/run/x/blk0.sock")
        );
        spec.socket = Some("/tmp/y.sock".into());
        assert_eq!(
            spec.socket_path(&id, Path::new("/run/x")),
            Path::new("/tmp/y.sock")
        );
    }
}
