//! The Debian packages that the project's verbs need on the machine, and their installation.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::debian::is_root;

/// A package, and what it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Package {
    /// Its name in Debian 12 and later.
    pub name: &'static str,
    /// Told to whoever is asked to install it.
    pub why: &'static str,
}

/// What the tests of the workspace need.
pub const TESTS: &[Package] = &[
    Package {
        name: "iproute2",
        why: "makes the links of tests that have network namespaces",
    },
    Package {
        name: "tcpdump",
        why: "reads what bluffctl has captured",
    },
];

/// What guests need: everything else comes into the cache folder without touching the machine.
pub const GUESTS: &[Package] = &[
    Package {
        name: "mmdebstrap",
        why: "fetches QEMU 11.1, guest kernels and tools into the cache folder",
    },
    Package {
        name: "debian-archive-keyring",
        why: "the keys by which those are checked",
    },
    Package {
        name: "gcc",
        why: "links the daemon and the guest agent",
    },
    Package {
        name: "libc6-dev",
        why: "the guest agent is linked statically against it",
    },
];

/// What the data-path crates' tests for aarch64 need.
pub const AARCH64: &[Package] = &[
    Package {
        name: "gcc-aarch64-linux-gnu",
        why: "links the tests for aarch64",
    },
    Package {
        name: "libc6-dev-arm64-cross",
        why: "the C library that they are linked against",
    },
    Package {
        name: "qemu-user-static",
        why: "runs the tests for aarch64",
    },
];

/// Installs what is missing, as root; otherwise says which command does. Prints what it installs. An empty list of available packages
/// (a fresh container) is fetched first.
pub fn ensure(packages: &[Package]) -> Result<()> {
    let missing: Vec<_> = packages
        .iter()
        .filter(|package| !is_installed(package.name))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = missing.iter().map(|package| package.name).collect();
    let list: Vec<_> = missing
        .iter()
        .map(|package| format!("  {:<24} {}", package.name, package.why))
        .collect();
    let command = format!(
        "apt-get install --no-install-recommends {}",
        names.join(" ")
    );
    if !is_root() {
        bail!(
            "packages are missing:\n{}\ninstall them with: sudo {command}",
            list.join("\n")
        );
    }
    eprintln!("installing with apt-get:\n{}", list.join("\n"));
    if !has_lists() {
        apt_get(&["update"])?;
    }
    let mut arguments = vec!["install", "--yes", "--quiet", "--no-install-recommends"];
    arguments.extend(&names);
    if apt_get(&arguments).is_err() {
        // Lists that are older than the mirror name versions that it has no longer.
        apt_get(&["update"])?;
        apt_get(&arguments)?;
    }
    match names.iter().find(|name| !is_installed(name)) {
        Some(name) => bail!("apt-get succeeded, but {name} is not installed"),
        None => Ok(()),
    }
}

fn is_installed(name: &str) -> bool {
    let query = Command::new("dpkg-query")
        .args(["--show", "--showformat=${db:Status-Status}\n", name])
        .stderr(Stdio::null())
        .output();
    query.is_ok_and(|output| {
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .any(|status| status == "installed")
    })
}

fn has_lists() -> bool {
    let lists = fs::read_dir("/var/lib/apt/lists")
        .into_iter()
        .flatten()
        .flatten();
    lists
        .into_iter()
        .any(|entry| entry.file_name().to_string_lossy().contains("_Packages"))
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    let status = Command::new("apt-get")
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .context("run apt-get")?;
    if !status.success() {
        bail!("apt-get {} failed ({status})", arguments.join(" "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn installed_packages_are_told_from_others() {
        // Every Debian has dpkg; no archive has the other.
        assert!(is_installed("dpkg"));
        assert!(!is_installed("no-such-package-as-this"));
        assert!(
            ensure(&[Package {
                name: "dpkg",
                why: "there"
            }])
            .is_ok()
        );
    }
}
