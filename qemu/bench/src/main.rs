//! `bluff-bench`: see the library.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;

use bluff_bench::attack::{Attack, Latency};
use bluff_bench::backend::{self, Kind, Programs};
use bluff_bench::report::{Measured, Table};
use bluff_bench::{load, rows};

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
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Milliseconds of each measurement
    #[arg(long, default_value_t = 250)]
    millis: u64,
    /// Only rows whose name contains this
    #[arg(long)]
    only: Option<String>,
    /// Measure instead how long requests take beside a function that is attacked
    #[arg(long)]
    attack: bool,
    /// Write the table into this file, between its markers
    #[arg(long)]
    write: Option<PathBuf>,
}

/// Functions that have nothing to do: the row's name, their kind, how many, and the share of a core that they may take.
const IDLE: [(&str, Kind, u16, f64); 2] = [
    ("100 idle functions", Kind::Blk, 100, 0.01),
    ("NVMe, 100 idle functions", Kind::Nvme, 100, 0.01),
];
/// How long they are looked at.
const IDLE_SPAN: Duration = Duration::from_secs(5);

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let cores = std::thread::available_parallelism()?.get();
    ensure!(cores >= 2, "the driver and the back end need a core each");
    load::pin(0).context("core 0")?;
    let programs = Programs::new(&arguments.programs, &arguments.disk)?;
    let span = Duration::from_millis(arguments.millis);
    if arguments.attack {
        return attacks(&programs, arguments.rounds, span);
    }
    let mut table = Table::default();
    let wanted = |name: &str| {
        arguments
            .only
            .as_ref()
            .is_none_or(|only| name.contains(only))
    };
    for row in rows::all() {
        if !wanted(&row.name) {
            continue;
        }
        let mut measured: Vec<Measured> = row.peers.iter().map(|_| Measured::default()).collect();
        for round in 1..=arguments.rounds {
            for (peer, measured) in row.peers.iter().zip(&mut measured) {
                progress(&format!("{}: {}, round {round}", row.name, peer.name()));
                let one = backend::measure(&programs, peer, &row.work, span)
                    .with_context(|| format!("{} on {}", row.name, peer.name()))?;
                measured.add(one);
            }
        }
        progress("");
        table.add(&row, &measured);
    }
    for (name, kind, functions, most) in IDLE {
        if wanted(name) {
            let share = backend::idle(&programs, kind, functions, IDLE_SPAN);
            table.add_idle(name, share.with_context(|| name)?, most);
        }
    }
    print!("{}", table.text());
    if let Some(path) = arguments.write {
        table.write(&path, arguments.rounds, arguments.millis)?;
    }
    Ok(if table.reached() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What is being done, in a line that the next one replaces; nothing where nobody looks at it.
fn progress(text: &str) {
    if std::io::stderr().is_terminal() {
        eprint!("\r{text:76}\r");
    }
}

/// How much longer 99 of 100 requests may take beside an attack.
const SLOWER: f64 = 1.05;

fn attacks(programs: &Programs, rounds: usize, span: Duration) -> Result<ExitCode> {
    let mut all: Vec<Vec<Latency>> = vec![Vec::new(); Attack::ALL.len()];
    for _ in 0..rounds {
        for (attack, of) in Attack::ALL.iter().zip(&mut all) {
            of.push(backend::attacked(programs, *attack, span)?);
        }
    }
    let median = |of: &[Latency], which: fn(&Latency) -> Duration| {
        let mut values: Vec<Duration> = of.iter().map(which).collect();
        values.sort_unstable();
        values[values.len() / 2]
    };
    let quiet = median(&all[0], |l| l.p99).as_secs_f64();
    let mut reached = true;
    println!("| the neighbour              | p50, ns | p99, ns | of quiet |");
    println!("| ---                        | ---     | ---     | ---      |");
    for (attack, of) in Attack::ALL.iter().zip(&all) {
        let (p50, p99) = (median(of, |l| l.p50), median(of, |l| l.p99));
        let ratio = p99.as_secs_f64() / quiet;
        reached &= ratio <= SLOWER;
        println!(
            "| {:26} | {:7} | {:7} | {ratio:<8.2} |",
            attack.name(),
            p50.as_nanos(),
            p99.as_nanos()
        );
    }
    Ok(if reached {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
