//! `cargo xtask test`: every test of the project, and one line that sums them up.
//!
//! A stage that breaks counts as one failure and does not keep the later ones from running: whoever waited for the tests
//! learns all that is wrong at once.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};

use crate::metadata::Workspace;
use crate::tally::Tally;
use crate::{guest, packages, run};

/// The second platform: other page sizes, another memory model, and under emulation a kernel without io_uring.
const AARCH64: &str = "aarch64-unknown-linux-gnu";

/// What can be asked of the tests.
#[derive(clap::Args)]
pub struct Options {
    /// Run the full counts: hundreds of kills and long sequences, which take an hour
    #[arg(long)]
    pub long: bool,
    /// Only these stages
    #[arg(long, value_enum)]
    stage: Vec<Stage>,
}

/// A part of the tests.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Stage {
    Workspace,
    Aarch64,
    Loom,
    Guests,
}

impl Stage {
    const ALL: [Self; 4] = [Self::Workspace, Self::Aarch64, Self::Loom, Self::Guests];

    fn name(self) -> &'static str {
        match self {
            Self::Workspace => "the workspace",
            Self::Aarch64 => "the data path on aarch64, under emulation",
            Self::Loom => "memory orders, explored by loom",
            Self::Guests => "guests",
        }
    }

    fn run(self, workspace: &Workspace, options: &Options) -> Result<Tally> {
        match self {
            Self::Workspace => native(workspace, options),
            Self::Aarch64 => aarch64(workspace),
            Self::Loom => orders(workspace, options),
            Self::Guests => guest::run(workspace, options),
        }
    }
}

/// Runs every stage, or those that were asked for, and prints the count of tests as the last line.
pub fn run(workspace: &Workspace, options: &Options) -> Result<bool> {
    let mut total = Tally::default();
    let wanted = |stage: &Stage| options.stage.is_empty() || options.stage.contains(stage);
    for stage in Stage::ALL.into_iter().filter(wanted) {
        let name = stage.name();
        run::say(name);
        let start = Instant::now();
        let tally = stage.run(workspace, options).unwrap_or_else(|error| {
            eprintln!("error: {name}: {error:#}");
            Tally::BROKEN
        });
        println!("==> {name}: {tally} in {} s", start.elapsed().as_secs());
        total += tally;
    }
    println!("{total}");
    Ok(total.failed == 0)
}

fn native(workspace: &Workspace, options: &Options) -> Result<Tally> {
    packages::ensure(packages::TESTS)?;
    let mut command = cargo_test(workspace, options.long);
    command.arg("--workspace");
    count(command)
}

/// Never with full counts: they would take hours, and an emulator shows no more of them than this machine does.
fn aarch64(workspace: &Workspace) -> Result<Tally> {
    packages::ensure(packages::AARCH64)?;
    ensure_target(AARCH64)?;
    let mut command = cargo_test(workspace, false);
    command.args(["--target", AARCH64]);
    // Tests read this where an emulator does not do as a kernel would.
    command.env("BLUFF_EMULATED", "1");
    for name in data_path_crates(workspace) {
        command.args(["--package", &name]);
    }
    count(command)
}

/// The rings of both sides, interrupt lines, doorbells and the courier's bell, with loom's atomics in the place of the machine's.
fn orders(workspace: &Workspace, options: &Options) -> Result<Tally> {
    let mut total = Tally::default();
    // The device's explorations are among its unit tests, the driver's in a program of their own.
    for test in [
        ["--package", "bluff-virtio", "--lib", "explored"].as_slice(),
        &["--package", "bluff-virtio-driver", "--test", "loom"],
        &["--package", "bluff-pci", "--lib", "explored"],
        &["--package", "bluff-nvme", "--lib", "explored"],
        &["--package", "bluff-net", "--lib", "explored"],
    ] {
        let mut command = cargo_test(workspace, options.long);
        command.arg("--release").args(test);
        command.env("RUSTFLAGS", "--cfg loom");
        // Fast enough as it is, and linked twice as fast.
        command.env("CARGO_PROFILE_RELEASE_LTO", "off");
        command.env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
        // Other flags make other artefacts; the usual ones stay as they are.
        command.env("CARGO_TARGET_DIR", workspace.target.join("loom"));
        total += count(command)?;
    }
    Ok(total)
}

/// Every crate that moves a host's data: all of `backend/` and `devices/`.
///
/// `devices/reference` is left out: it is another implementation of the same device, kept to compare with.
fn data_path_crates(workspace: &Workspace) -> Vec<String> {
    let is_data_path = |folder: &std::path::Path| {
        (folder.starts_with("backend") || folder.starts_with("devices"))
            && !folder.starts_with("devices/reference")
    };
    workspace
        .ours()
        .filter(|package| is_data_path(&workspace.folder(package)))
        .map(|p| p.name.clone())
        .collect()
}

/// A `cargo test`, with full counts or without.
pub fn cargo_test(workspace: &Workspace, long: bool) -> Command {
    let mut command = run::cargo(["test", "--locked", "--no-fail-fast"]);
    command.current_dir(&workspace.root);
    if long {
        // Tests read this for their full counts.
        command.env("BLUFF_TEST_LONG", "1");
    }
    command
}

/// Runs a `cargo test`, passes its output on as it comes, and adds up what its binaries report.
pub fn count(mut command: Command) -> Result<Tally> {
    println!("    {}", run::display(&command));
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .context("cargo test")?;
    let output = child
        .stdout
        .take()
        .expect("standard output was asked to be a pipe");
    let mut tally = Tally::default();
    for line in BufReader::new(output).split(b'\n') {
        let line = line.context("the output of cargo test")?;
        // Bytes, as a test may print what is no text.
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(&line)?;
        stdout.write_all(b"\n")?;
        if let Some(counts) = Tally::of_line(&String::from_utf8_lossy(&line)) {
            tally += counts;
        }
    }
    let status = child.wait().context("cargo test")?;
    if !status.success() && tally.failed == 0 {
        // It did not build, or a test binary died before it could report.
        tally += Tally::BROKEN;
    }
    Ok(tally)
}

fn ensure_target(target: &str) -> Result<()> {
    let installed = Command::new("rustup")
        .args(["target", "list", "--installed"])
        .output()
        .context("rustup")?;
    if String::from_utf8_lossy(&installed.stdout)
        .lines()
        .any(|line| line == target)
    {
        return Ok(());
    }
    run::say(&format!("adding the Rust target {target}"));
    run::succeed(Command::new("rustup").args(["target", "add", target]))
}
