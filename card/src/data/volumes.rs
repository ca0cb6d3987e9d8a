//! Opening volumes.

use std::sync::Arc;

use anyhow::{Context, Error, Result};
use bluff_block::Volume;

use crate::kinds::{LayerKind, VolumeUri};
use crate::spec::{LayerSpec, VolumeSpec};

/// Opens a volume with its layers.
///
/// # Errors
/// As an operator should read it.
pub(super) fn open(spec: &VolumeSpec) -> Result<Arc<dyn Volume>> {
    let uri = VolumeUri::parse(&spec.uri).map_err(Error::msg)?;
    // They are named from the host inwards, so the last one is the innermost.
    spec.layers
        .iter()
        .rev()
        .try_fold(uri.open()?, |inner, layer| {
            wrap(inner, layer).with_context(|| format!("layer {}", layer.kind))
        })
}

fn wrap(inner: Arc<dyn Volume>, layer: &LayerSpec) -> Result<Arc<dyn Volume>> {
    let kind = LayerKind::find(&layer.kind).map_err(Error::msg)?;
    Ok(kind.wrap(inner, &layer.parameters)?)
}
