//! What a card is to present: volumes and functions, in words that neither a file format nor a wire format owns.
//!
//! The configuration file, the control socket, the messages to the data half and a later API all speak in these types.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

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

/// An enum whose values are written as fixed words, in the configuration and in messages alike.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
        pub enum $name {
            $($(#[$variant_doc])* #[serde(rename = $word)] $variant),+
        }

        impl $name {
            /// Every value, by its word.
            pub const WORDS: &'static [(&'static str, Self)] = &[$(($word, Self::$variant)),+];

            /// Its word.
            pub fn word(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.word())
            }
        }
    };
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
    }
}

words! {
    /// How a function reaches its host.
    Attach {
        /// A Unix socket between the daemon and a VMM.
        VhostUser = "vhost-user",
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

/// A function: what the host sees, where it is attached, and what it stands on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionSpec {
    /// What the host sees.
    pub kind: FunctionKind,
    /// How it reaches the host.
    pub attach: Attach,
    /// The socket; left out: the function's ID with `.sock`, in the runtime directory.
    #[serde(default)]
    pub socket: Option<PathBuf>,
    /// Which side of the socket waits.
    pub mode: SocketMode,
    /// The volume that it stands on.
    pub volume: Id,
    /// How many request queues the host is offered.
    pub queues: u16,
    /// How its queues are polled; left out: as the card says.
    #[serde(default)]
    pub poll: Option<Poll>,
    /// Whether the host may switch a block device's cache between write-back and write-through.
    #[serde(default)]
    pub config_wce: bool,
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
            kind: FunctionKind::VirtioBlk,
            attach: Attach::VhostUser,
            socket: None,
            mode: SocketMode::Server,
            volume: "disk0".parse().unwrap(),
            queues: 1,
            poll: None,
            config_wce: false,
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
