//! The data path, measured: `cargo xtask bench` runs this.
//!
//! ```text
//!   core 0: our polling driver            core 1: one back end at a time
//!     Load --- rings in shared memory ---   ideal ring | bluffd | bluff-reference | qemu-storage-daemon
//! ```
//!
//! The work of a row is done by each back end in turn, in several rounds, since these machines' speed
//! drifts: what counts is the ratio of the medians. The driver rewrites the header of every request and checks every status.

mod backend;
mod load;
mod report;
mod rows;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;

use crate::backend::Programs;
use crate::report::{Measured, Table};

/// What is measured, and how long.
#[derive(Parser)]
struct Arguments {
    /// Folder of the release build: bluffd, bluff-reference
    #[arg(long)]
    programs: PathBuf,
    /// Folder for files of O_DIRECT rows; it must not be a tmpfs
    #[arg(long)]
    disk: PathBuf,
    /// Times that each back end does each row's work
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Milliseconds of each measurement
    #[arg(long, default_value_t = 400)]
    millis: u64,
    /// Only rows whose name contains this
    #[arg(long)]
    only: Option<String>,
    /// Write the table into this file, between its markers
    #[arg(long)]
    write: Option<PathBuf>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let cores = std::thread::available_parallelism()?.get();
    ensure!(cores >= 2, "the driver and the back end need a core each");
    load::pin(0).context("core 0")?;
    let programs = Programs::new(&arguments.programs, &arguments.disk)?;
    let span = Duration::from_millis(arguments.millis);
    let mut table = Table::default();
    for row in rows::all() {
        if arguments
            .only
            .as_ref()
            .is_some_and(|only| !row.name.contains(only))
        {
            continue;
        }
        let mut measured: Vec<Measured> = row.peers.iter().map(|_| Measured::default()).collect();
        for round in 0..arguments.rounds {
            for (peer, measured) in row.peers.iter().zip(&mut measured) {
                eprint!(
                    "\r{}: {} {}/{}      ",
                    row.name,
                    peer.name(),
                    round + 1,
                    arguments.rounds
                );
                let one = backend::measure(&programs, peer, &row.work, span)
                    .with_context(|| format!("{} on {}", row.name, peer.name()))?;
                measured.add(one);
            }
        }
        eprint!("\r{:60}\r", "");
        table.add(&row, &measured);
    }
    print!("{}", table.text());
    if let Some(path) = arguments.write {
        table.write(&path, arguments.rounds, arguments.millis)?;
    }
    Ok(())
}
