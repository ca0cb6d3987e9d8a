//! What `cargo metadata` knows of the workspace: our crates, what they depend on, and under which licences.
//!
//! Only the packages of the two platforms that we build for are looked at; what a dependency would pull in on Windows
//! neither ships nor gets downloaded.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::run;

/// The platforms that the card is built for.
pub const TARGETS: [&str; 2] = ["x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"];

/// The workspace and everything that it is built from.
#[derive(Deserialize)]
pub struct Workspace {
    /// The folder of the root `Cargo.toml`.
    #[serde(rename = "workspace_root")]
    pub root: PathBuf,
    /// Where cargo builds.
    #[serde(rename = "target_directory")]
    pub target: PathBuf,
    /// Our crates and all that they depend on, directly or not.
    pub packages: Vec<Package>,
    #[serde(rename = "workspace_members")]
    members: Vec<String>,
}

/// One crate, ours or another's.
#[derive(Clone, Deserialize)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// cargo's identity for it.
    pub id: String,
    /// The SPDX expression that it states.
    pub license: Option<String>,
    /// Where it came from; `None` for what lies in the workspace.
    pub source: Option<String>,
    /// Its `Cargo.toml`.
    pub manifest_path: PathBuf,
    /// What it depends on directly.
    pub dependencies: Vec<Dependency>,
}

/// One line of a crate's dependencies.
#[derive(Clone, Deserialize)]
pub struct Dependency {
    /// The crate depended upon.
    pub name: String,
    /// What for.
    pub kind: Option<String>,
    /// Whether only a feature asks for it.
    pub optional: bool,
}

impl Dependency {
    /// Whether only tests, examples and benchmarks see it.
    pub fn is_dev(&self) -> bool {
        self.kind.as_deref() == Some("dev")
    }
}

impl Workspace {
    /// Asks cargo, without the network if the dependencies have been fetched before.
    pub fn load() -> Result<Self> {
        let mut output = query()?;
        if !output.status.success() {
            // A machine that has never built the project: fetch once, then ask again, so that a second error is cargo's own.
            run::say("fetching dependencies");
            let mut fetch = run::cargo(["fetch", "--locked"]);
            for target in TARGETS {
                fetch.args(["--target", target]);
            }
            run::succeed(&mut fetch)?;
            output = query()?;
        }
        if !output.status.success() {
            bail!(
                "cargo metadata: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        serde_json::from_slice(&output.stdout).context("the output of cargo metadata")
    }

    /// The crates of the workspace.
    pub fn ours(&self) -> impl Iterator<Item = &Package> {
        self.packages
            .iter()
            .filter(|package| self.members.contains(&package.id))
    }

    /// The crates of others.
    pub fn theirs(&self) -> impl Iterator<Item = &Package> {
        self.packages
            .iter()
            .filter(|package| !self.members.contains(&package.id))
    }

    /// A crate's folder below the root, such as `devices/virtio`.
    pub fn folder(&self, package: &Package) -> PathBuf {
        let folder = package.manifest_path.parent().unwrap_or(Path::new(""));
        folder.strip_prefix(&self.root).unwrap_or(folder).to_owned()
    }

    /// A file of this crate, which is where the check's own lists live.
    pub fn own_file(&self, name: &str) -> PathBuf {
        self.root.join("qemu/xtask").join(name)
    }
}

fn query() -> Result<std::process::Output> {
    let mut command: Command =
        run::cargo(["metadata", "--locked", "--offline", "--format-version", "1"]);
    for target in TARGETS {
        command.args(["--filter-platform", target]);
    }
    command.output().context("cargo metadata")
}
