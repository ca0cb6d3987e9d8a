//! From a URI to a volume.

use std::sync::Arc;

use bluff_block::{OpenError, Uri, UriError, Volume};

/// Why there is no volume.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The URI is wrong.
    #[error("volume URI")]
    Uri(#[from] UriError),
    /// No such kind.
    #[error("unknown kind of volume {0:?}; there are {KINDS}")]
    Kind(String),
    /// It does not open.
    #[error("cannot open the volume")]
    Open(#[from] OpenError),
}

const KINDS: &str = "file, null, ram";

/// Opens the volume that `uri` names.
///
/// # Errors
/// [`VolumeError`].
pub fn open_volume(uri: &str) -> Result<Arc<dyn Volume>, VolumeError> {
    let uri = Uri::parse(uri)?;
    match uri.kind() {
        "file" => Ok(bluff_file::open(uri)?),
        "null" => Ok(bluff_block::null::open(uri)?),
        "ram" => Ok(bluff_block::ram::open(uri)?),
        other => Err(VolumeError::Kind(other.into())),
    }
}
