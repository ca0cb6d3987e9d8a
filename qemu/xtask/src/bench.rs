//! `cargo xtask bench`: the data path, measured.

use anyhow::{Result, bail};

use crate::metadata::Workspace;

/// What can be asked of the benchmark.
#[derive(clap::Args)]
pub struct Options {}

/// Runs the benchmark.
pub fn run(_workspace: &Workspace, _options: &Options) -> Result<bool> {
    bail!("bench: not built yet")
}
