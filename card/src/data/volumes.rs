//! Which kinds of volumes and layers there are: the one place that names them.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use bluff_block::{Uri, Volume};
use bluff_layers::{Delay, DelayOptions, Fault, FaultOptions};

use crate::spec::{LayerSpec, Parameter, VolumeSpec};

/// Opens a volume with its layers.
///
/// # Errors
/// As an operator should read it.
pub(super) fn open(spec: &VolumeSpec) -> Result<Arc<dyn Volume>> {
    let uri = Uri::parse(&spec.uri)?;
    let volume = match uri.kind() {
        "null" => bluff_block::null::open(uri)?,
        "ram" => bluff_block::ram::open(uri)?,
        "file" => bluff_file::open(uri)?,
        kind => bail!("no kind of volume is called {kind}"),
    };
    // They are named from the host inwards, so the last one is the innermost.
    spec.layers.iter().rev().try_fold(volume, |inner, layer| {
        wrap(inner, layer).with_context(|| format!("layer {}", layer.kind))
    })
}

fn wrap(inner: Arc<dyn Volume>, layer: &LayerSpec) -> Result<Arc<dyn Volume>> {
    let options: BTreeMap<String, String> = layer
        .parameters
        .iter()
        .map(|(name, value)| (name.clone(), text(value)))
        .collect();
    Ok(match layer.kind.as_str() {
        "delay" => Arc::new(Delay::new(inner, DelayOptions::from_options(&options)?)),
        "fault" => Arc::new(Fault::new(
            inner,
            vec![FaultOptions::from_options(&options)?],
        )),
        kind => bail!("no kind of layer is called {kind}"),
    })
}

/// A parameter as layers read it.
fn text(parameter: &Parameter) -> String {
    match parameter {
        Parameter::Flag(true) => "on".into(),
        Parameter::Flag(false) => "off".into(),
        Parameter::Integer(number) => number.to_string(),
        Parameter::Text(text) => text.clone(),
        Parameter::List(all) => all.iter().map(text).collect::<Vec<_>>().join(","),
    }
}
