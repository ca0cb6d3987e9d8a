//! `cargo xtask demo`: a VM works on a function of the card.

use anyhow::{Result, bail};

use crate::metadata::Workspace;

/// What can be asked of the demonstration.
#[derive(clap::Args)]
pub struct Options {}

/// Runs the demonstration.
pub fn run(_workspace: &Workspace, _options: &Options) -> Result<bool> {
    bail!("demo: not built yet")
}
