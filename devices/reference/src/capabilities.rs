//! What management programs are told: the output of `--print-capabilities`, and the description
//! file (QEMU 11.1, docs/interop/vhost-user.json).

use serde::{Deserialize, Serialize};

/// `VHostUserBackendCapabilities` of a block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// Always `block`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Which options of the block conventions it takes.
    pub features: Vec<String>,
}

impl Capabilities {
    /// What this program can do.
    pub fn ours() -> Self {
        Self {
            kind: "block".into(),
            features: vec!["read-only".into(), "blk-file".into()],
        }
    }
}

/// `VhostUserBackend`: a description file, by which management programs find it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// For people.
    pub description: String,
    /// Always `block`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Absolute path of the program.
    pub binary: String,
    /// For other uses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
}
