//! `cargo xtask fuzz`: the fuzz targets of every crate, each for a time.
//!
//! A crate keeps its targets in a folder `fuzz/` of its own, laid out as cargo-fuzz does, outside of the workspace (they
//! want a nightly compiler and a sanitizer, which the rest does not).

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::metadata::Workspace;
use crate::run;

/// What can be asked of fuzzing.
#[derive(clap::Args)]
pub struct Options {
    /// Only list the targets
    #[arg(long)]
    list: bool,
    /// How long to run each target
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Run these targets only
    targets: Vec<String>,
}

struct Target {
    name: String,
    /// The folder that holds `fuzz/`.
    folder: PathBuf,
}

/// Runs or lists the targets.
pub fn run(workspace: &Workspace, options: &Options) -> Result<bool> {
    let mut targets = Vec::new();
    let crates = workspace
        .ours()
        .map(|package| workspace.root.join(workspace.folder(package)));
    for folder in std::iter::once(workspace.root.clone()).chain(crates) {
        targets.extend(targets_of(&folder)?);
    }
    for name in &options.targets {
        if !targets.iter().any(|target| target.name == *name) {
            let known: Vec<&str> = targets.iter().map(|target| target.name.as_str()).collect();
            bail!("no fuzz target {name}; there are: {}", known.join(", "));
        }
    }
    if !options.targets.is_empty() {
        targets.retain(|target| options.targets.contains(&target.name));
    }
    if options.list {
        for target in &targets {
            let folder = target
                .folder
                .strip_prefix(&workspace.root)
                .unwrap_or(&target.folder);
            println!("{:30} {}", target.name, folder.display());
        }
        return Ok(true);
    }
    if targets.is_empty() {
        bail!("no crate has a fuzz target");
    }
    ensure_cargo_fuzz()?;
    let mut findings = Vec::new();
    for target in &targets {
        run::say(&format!("{} for {} s", target.name, options.seconds));
        if !fuzz(target, options.seconds)? {
            findings.push(target.name.as_str());
        }
    }
    if findings.is_empty() {
        println!("{} targets, no finding", targets.len());
    } else {
        println!(
            "{} targets, findings in: {}",
            targets.len(),
            findings.join(", ")
        );
    }
    Ok(findings.is_empty())
}

fn targets_of(folder: &Path) -> Result<Vec<Target>> {
    let manifest = folder.join("fuzz/Cargo.toml");
    if !manifest.is_file() {
        return Ok(Vec::new());
    }
    let text =
        std::fs::read_to_string(&manifest).with_context(|| manifest.display().to_string())?;
    let table: toml::Table = text
        .parse()
        .with_context(|| manifest.display().to_string())?;
    let bins = table
        .get("bin")
        .and_then(toml::Value::as_array)
        .cloned()
        .unwrap_or_default();
    let names = bins
        .iter()
        .filter_map(|bin| bin.get("name")?.as_str().map(str::to_owned));
    Ok(names
        .map(|name| Target {
            name,
            folder: folder.to_owned(),
        })
        .collect())
}

fn fuzz(target: &Target, seconds: u64) -> Result<bool> {
    let mut command = Command::new("cargo");
    command.args([
        "+nightly",
        "fuzz",
        "run",
        &target.name,
        "--",
        &format!("-max_total_time={seconds}"),
    ]);
    // The toolchain that runs this program must not decide which one runs the fuzzer.
    command
        .current_dir(&target.folder)
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("CARGO");
    Ok(command.status().context("cargo fuzz")?.success())
}

fn ensure_cargo_fuzz() -> Result<()> {
    let nightly = Command::new("cargo")
        .args(["+nightly", "--version"])
        .env_remove("RUSTUP_TOOLCHAIN")
        .output();
    if !nightly.is_ok_and(|output| output.status.success()) {
        run::say("installing a nightly toolchain");
        run::succeed(Command::new("rustup").args([
            "toolchain",
            "install",
            "nightly",
            "--profile",
            "minimal",
        ]))?;
    }
    if !run::cargo(["fuzz", "--version"])
        .output()
        .is_ok_and(|output| output.status.success())
    {
        run::say("installing cargo-fuzz");
        run::succeed(&mut run::cargo(["install", "--locked", "cargo-fuzz"]))?;
    }
    Ok(())
}
