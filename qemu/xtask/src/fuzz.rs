//! `cargo xtask fuzz`: the fuzz targets of every crate, each for a time.
//!
//! A crate keeps its targets in a folder `fuzz/` of its own, laid out as cargo-fuzz does, outside of the workspace (they
//! want a nightly compiler and a sanitizer, which the rest does not). Inputs that were found to be interesting are kept
//! in `fuzz/corpus` and are where the next run begins; what was found to be wrong is in `fuzz/artifacts`.

use std::fmt;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

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
    for target in &targets {
        build(target)?;
    }
    let mut findings = Vec::new();
    for target in &targets {
        run::say(&format!("{} for {} s", target.name, options.seconds));
        let outcome = fuzz(target, options.seconds)?;
        let word = if outcome.clean { "no" } else { "a" };
        println!("{}: {}, {word} finding", target.name, outcome.reached);
        if !outcome.clean {
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

/// The nightly cargo, in a target's folder. The toolchain that runs this program must not decide which one runs the fuzzer.
fn nightly(target: &Target) -> Command {
    let mut command = Command::new("cargo");
    command
        .arg("+nightly")
        .current_dir(&target.folder)
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("CARGO");
    command
}

/// A target that does not build is an error, and no finding.
fn build(target: &Target) -> Result<()> {
    // cargo-fuzz has no `--locked`: this fails where the lock file is not up to date, and after it nothing is resolved anew.
    let fetch = ["fetch", "--locked", "--manifest-path", "fuzz/Cargo.toml"];
    run::succeed(nightly(target).args(fetch))?;
    run::succeed(nightly(target).args(["fuzz", "build", &target.name]))
}

/// How a run ended.
struct Outcome {
    clean: bool,
    reached: Reached,
}

/// What libFuzzer says of its progress.
#[derive(Debug, Default, PartialEq)]
struct Reached {
    executions: u64,
    /// Edges of the control flow.
    edges: u64,
    /// Edges together with how often they were taken, and values that were compared.
    features: u64,
}

impl Reached {
    /// Reads a line such as `#71143 DONE   cov: 2561 ft: 10884 corp: 877/16Kb …`.
    fn of_line(line: &str) -> Option<Self> {
        let mut words = line.strip_prefix('#')?.split_whitespace();
        let executions = words.next()?.parse().ok()?;
        let words: Vec<&str> = words.collect();
        let value = |name: &str| {
            let at = words.iter().position(|word| *word == name)?;
            words.get(at + 1)?.parse().ok()
        };
        Some(Self {
            executions,
            edges: value("cov:")?,
            features: value("ft:")?,
        })
    }

    /// Whether such a line is one of many.
    fn is_detail(line: &str) -> bool {
        let kind = line.split_whitespace().nth(1);
        line.starts_with('#') && matches!(kind, Some("NEW" | "REDUCE" | "RELOAD"))
    }
}

impl fmt::Display for Reached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            executions,
            edges,
            features,
        } = self;
        write!(
            f,
            "{executions} executions, {edges} edges, {features} features"
        )
    }
}

fn fuzz(target: &Target, seconds: u64) -> Result<Outcome> {
    let mut command = nightly(target);
    command.args(["fuzz", "run", &target.name, "--"]);
    command.arg(format!("-max_total_time={seconds}"));
    // Inputs are scripts: what is deep needs long ones, and soon.
    command.args(["-len_control=10", "-max_len=4096"]);
    // A script of that length takes milliseconds.
    command.args(["-timeout=20", "-print_funcs=0"]);
    let mut child = command
        .stderr(Stdio::piped())
        .spawn()
        .context("cargo fuzz")?;
    let output = child.stderr.take().expect("it was asked to be a pipe");
    let mut reached = Reached::default();
    for line in BufReader::new(output).split(b'\n') {
        let line = line.context("the output of cargo fuzz")?;
        let line = String::from_utf8_lossy(&line);
        reached = Reached::of_line(&line).unwrap_or(reached);
        if !Reached::is_detail(&line) {
            eprintln!("{line}");
        }
    }
    Ok(Outcome {
        clean: child.wait().context("cargo fuzz")?.success(),
        reached,
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_read_from_the_fuzzers_lines() {
        let line =
            "#71143\tDONE   cov: 2561 ft: 10884 corp: 877/16Kb lim: 63 exec/s: 3387 rss: 336Mb";
        let reached = Reached::of_line(line).unwrap();
        let expected = "71143 executions, 2561 edges, 10884 features";
        assert_eq!(reached.to_string(), expected);
        assert!(!Reached::is_detail(line));
        let line =
            "#8\tNEW    cov: 3 ft: 4 corp: 2/2b lim: 4 exec/s: 0 rss: 38Mb L: 1/1 MS: 1 ChangeBit-";
        assert!(Reached::of_line(line).is_some() && Reached::is_detail(line));
        for line in ["", "#", "#1 DONE", "INFO: Seed: 1"] {
            assert_eq!(Reached::of_line(line), None, "{line}");
        }
    }
}
