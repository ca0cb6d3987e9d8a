//! `cargo xtask bench`: the data path, measured, by `bluff-bench`.

use std::path::PathBuf;

use anyhow::Result;

use crate::metadata::Workspace;
use crate::{guest, packages, run};

/// What can be asked of the benchmark.
#[derive(clap::Args)]
pub struct Options {
    /// Times that each back end does each row's work [default: 9]
    #[arg(long)]
    rounds: Option<usize>,
    /// Milliseconds of each measurement [default: 250]
    #[arg(long)]
    millis: Option<u64>,
    /// Only rows whose name contains this
    #[arg(long)]
    only: Option<String>,
    /// Folder for the files of O_DIRECT rows [default: below the build folder]
    #[arg(long)]
    disk: Option<PathBuf>,
    /// Measure instead how long requests take beside a function that is attacked
    #[arg(long)]
    attack: bool,
    /// Write the table into docs/performance.md
    #[arg(long)]
    write: bool,
}

/// Runs the benchmark.
pub fn run(workspace: &Workspace, options: &Options) -> Result<bool> {
    packages::ensure(packages::GUESTS)?;
    let programs = guest::build(workspace)?;
    let build = ["build", "--locked", "--release", "--package", "bluff-bench"];
    run::succeed(run::cargo(build).current_dir(&workspace.root))?;
    let mut command = std::process::Command::new(programs.join("bluff-bench"));
    command.arg("--programs").arg(&programs);
    if let Some(rounds) = options.rounds {
        command.args(["--rounds", &rounds.to_string()]);
    }
    if let Some(millis) = options.millis {
        command.args(["--millis", &millis.to_string()]);
    }
    let disk = options
        .disk
        .clone()
        .unwrap_or_else(|| workspace.target.join("bench"));
    command.arg("--disk").arg(disk);
    if let Some(only) = &options.only {
        command.args(["--only", only]);
    }
    if options.attack {
        command.arg("--attack");
    }
    if options.write {
        command
            .arg("--write")
            .arg(workspace.root.join("docs/performance.md"));
    }
    run::say("measuring; nothing else should be at work on this machine");
    run::succeed(&mut command)?;
    Ok(true)
}
