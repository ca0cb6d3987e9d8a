//! The system packages that a verb needs.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::run;

/// A Debian package, and a file whose presence shows that it is there.
pub struct Package {
    /// Its name.
    pub name: &'static str,
    /// A program that it brings, looked for on `PATH`; or any file, by its whole path.
    pub proof: &'static str,
}

impl Package {
    fn is_missing(&self) -> bool {
        // `join` leaves a whole path as it is.
        let path = std::env::var_os("PATH").unwrap_or_default();
        !std::env::split_paths(&path).any(|folder| folder.join(self.proof).is_file())
    }
}

/// Installs what is missing, and says so; fails if one is still missing after that.
pub fn ensure(packages: &[Package]) -> Result<()> {
    let missing: Vec<&Package> = packages
        .iter()
        .filter(|package| package.is_missing())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|package| package.name).collect();
    run::say(&format!("installing {}", names.join(" ")));
    if !install(&names)? {
        // The lists may be older than the mirror: look again, once.
        run::succeed(apt_get().arg("update"))?;
        if !install(&names)? {
            bail!("could not install {}", names.join(" "));
        }
    }
    match missing.iter().find(|package| package.is_missing()) {
        Some(package) => bail!(
            "{} was installed, but brought no {}",
            package.name,
            package.proof
        ),
        None => Ok(()),
    }
}

fn install(names: &[&str]) -> Result<bool> {
    let mut command = apt_get();
    command
        .args(["install", "--yes", "--no-install-recommends"])
        .args(names);
    Ok(command.status().context("apt-get")?.success())
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command
        .arg("--quiet=2")
        .env("DEBIAN_FRONTEND", "noninteractive");
    // Another apt may be at work; it ends by itself.
    command.arg("--option=DPkg::Lock::Timeout=300");
    command
}
