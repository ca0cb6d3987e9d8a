//! `bluff-bench`: see the library.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;

use bluff_bench::attack::{Attack, Latency};
use bluff_bench::backend::{self, Kind, Programs};
use bluff_bench::net::switches::Lab;
use bluff_bench::report::{Measured, One, Table};
use bluff_bench::{load, net, rows};

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
const IDLE: [(&str, Kind, u16, f64); 3] = [
    ("100 idle functions", Kind::Blk, 100, 0.01),
    ("NVMe, 100 idle functions", Kind::Nvme, 100, 0.01),
    ("net: 100 idle functions", Kind::Net, 100, 0.01),
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
    let mut blocks = Table::blocks();
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
        let measured = rounds(&row.name, &row.peers, arguments.rounds, |peer| {
            let one = backend::measure(&programs, peer, &row.work, span);
            (peer.name().to_owned(), one)
        })?;
        blocks.add(&row, &measured);
    }
    let mut networks = Table::networks();
    let of_networks: Vec<_> = net::rows::all();
    let of_networks: Vec<_> = of_networks.iter().filter(|row| wanted(&row.name)).collect();
    if !of_networks.is_empty() {
        let dpdk = of_networks
            .iter()
            .flat_map(|row| &row.peers)
            .any(|peer| peer.has_dpdk());
        let folder = tempfile::Builder::new()
            .prefix("bluff-net-")
            .tempdir_in("/dev/shm")?;
        let lab = Lab::new(arguments.programs.clone(), folder.path().into(), dpdk)?;
        let clock = clock()?;
        for row in of_networks {
            let measured = rounds(&row.name, &row.peers, arguments.rounds, |peer| {
                let one = net::measure::measure(&lab, peer, &row.work, span);
                (peer.name(row.work.path), one)
            })?;
            networks.add_net(row, &measured, clock);
        }
    }
    for (name, kind, functions, most) in IDLE {
        if wanted(name) {
            let share = backend::idle(&programs, kind, functions, IDLE_SPAN);
            let table = match kind {
                Kind::Net => &mut networks,
                Kind::Blk | Kind::Nvme => &mut blocks,
            };
            table.add_idle(name, share.with_context(|| name)?, most);
        }
    }
    let tables = [blocks, networks];
    let mut reached = true;
    for table in tables.iter().filter(|table| !table.is_empty()) {
        println!("{}", table.text());
        reached &= table.reached();
        if let Some(path) = &arguments.write {
            table.write(path, arguments.rounds, arguments.millis)?;
        }
    }
    Ok(if reached {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Has each of the peers do a row's work in turn, so many times.
fn rounds<P>(
    row: &str,
    peers: &[P],
    rounds: usize,
    mut measure: impl FnMut(&P) -> (String, Result<One>),
) -> Result<Vec<Measured>> {
    let mut measured: Vec<Measured> = peers.iter().map(|_| Measured::default()).collect();
    for round in 1..=rounds {
        for (peer, measured) in peers.iter().zip(&mut measured) {
            progress(&format!("{row}: round {round} of {rounds}"));
            let (name, one) = measure(peer);
            measured.add(one.with_context(|| format!("{row} on {name}"))?);
        }
    }
    progress("");
    Ok(measured)
}

/// Cycles of the machine's clock in a microsecond.
fn clock() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/cpuinfo")?;
    let line = text.lines().find(|line| line.starts_with("cpu MHz"));
    let value = line
        .and_then(|line| line.split_once(':'))
        .context("no `cpu MHz`")?
        .1;
    Ok(value.trim().parse()?)
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
