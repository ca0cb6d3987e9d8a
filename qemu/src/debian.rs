//! Folders filled from the Debian archive, without root and without a chroot.
//!
//! `mmdebstrap --variant=extract` resolves dependencies and unpacks; no maintainer script runs, so it takes seconds. The archive's
//! address comes from the machine's own apt configuration, whose proxies are used too.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::cache;

/// A change here makes every folder be built again.
const LAYOUT: &str = "2";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Names the archive on a machine whose apt does not.
pub const MIRROR_VARIABLE: &str = "BLUFF_DEBIAN_MIRROR";
/// Where a folder lists the packages that are in it, one `NAME_VERSION_ARCH.deb` a line.
pub const LIST: &str = "bluff-packages.txt";

/// What to put into a folder.
#[derive(Clone, Debug)]
pub struct Folder {
    /// What the folder is called in messages and in the cache.
    pub name: &'static str,
    /// The release, e.g. `trixie`.
    pub release: &'static str,
    /// Prefer what the release's backports have.
    pub backports: bool,
    /// Packages; what they depend on comes with them.
    pub packages: &'static [&'static str],
    /// Versions that were tested. Where the archive has one no longer, the newest is taken, and said so.
    pub pins: &'static [(&'static str, &'static str)],
}

impl Folder {
    /// The folder in the cache; fetched first where it is not there. Says what it fetches, on standard error.
    pub fn path(&self) -> Result<PathBuf> {
        let pins = self
            .pins
            .iter()
            .flat_map(|(name, version)| [*name, *version]);
        let asked = [
            LAYOUT,
            std::env::consts::ARCH,
            self.release,
            if self.backports { "backports" } else { "" },
        ];
        let key = cache::key(
            asked
                .into_iter()
                .chain(self.packages.iter().copied())
                .chain(pins),
        );
        cache::entry(&format!("{}-{key}", self.name), |path| self.fetch(path))
    }

    fn fetch(&self, path: &Path) -> Result<()> {
        let mirror = mirror()?;
        let began = Instant::now();
        eprintln!(
            "fetching {} (once) from {mirror}: {}",
            self.name,
            self.packages.join(" ")
        );
        let mut done = self.mmdebstrap(&mirror, path, true)?;
        if !done.success() && !self.pins.is_empty() {
            eprintln!(
                "fetching {}: not with the versions that were tested; taking the newest",
                self.name
            );
            let _ = fs::remove_dir_all(path);
            done = self.mmdebstrap(&mirror, path, false)?;
        }
        if !done.success() {
            bail!(
                "mmdebstrap could not make {} ({done}); its messages are above",
                self.name
            );
        }
        eprintln!("fetched {} in {} s", self.name, began.elapsed().as_secs());
        Ok(())
    }

    fn mmdebstrap(
        &self,
        mirror: &str,
        path: &Path,
        pinned: bool,
    ) -> Result<std::process::ExitStatus> {
        let mut suites = vec![
            self.release.to_string(),
            format!("{}-updates", self.release),
        ];
        let backports = format!("{}-backports", self.release);
        if self.backports {
            suites.push(backports.clone());
        }
        let include: Vec<_> = self
            .packages
            .iter()
            .map(|package| with_version(package, self.pins, pinned))
            .collect();
        // Extraction runs nothing from the archive, so being root makes no difference but to who owns the files.
        let mode = if is_root() { "root" } else { "chrootless" };
        let mut command = Command::new("mmdebstrap");
        command
            .args(["--quiet", "--variant=extract", "--format=directory"])
            .arg(format!("--mode={mode}"))
            .arg(format!("--include={}", include.join(",")))
            .arg(format!(
                "--extract-hook=cd \"$1\" && ls var/cache/apt/archives | grep 'deb$' > {LIST}"
            ));
        if self.backports {
            command.arg(format!("--aptopt=APT::Default-Release \"{backports}\""));
        }
        for option in proxies() {
            command.arg(format!("--aptopt={option}"));
        }
        command.arg(self.release).arg(path);
        for suite in suites {
            command.arg(format!("deb [signed-by={KEYRING}] {mirror} {suite} main"));
        }
        command
            .stdin(Stdio::null())
            .status()
            .context("run mmdebstrap (package mmdebstrap)")
    }
}

fn with_version(package: &str, pins: &[(&str, &str)], pinned: bool) -> String {
    match pins.iter().find(|(name, _)| pinned && *name == package) {
        Some((name, version)) => format!("{name}={version}"),
        None => package.to_string(),
    }
}

pub(crate) fn is_root() -> bool {
    fs::metadata("/proc/self")
        .is_ok_and(|process| std::os::unix::fs::MetadataExt::uid(&process) == 0)
}

/// The proxies of the machine's own apt, as lines of an apt configuration.
fn proxies() -> Vec<String> {
    let dump = Command::new("apt-config")
        .args(["dump", "--format=%f \"%v\";%n", "Acquire"])
        .output();
    let dump = dump
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default();
    let proxy =
        |line: &&str| line.to_ascii_lowercase().contains("::proxy") && !line.contains("\"\"");
    dump.lines().filter(proxy).map(str::to_string).collect()
}

/// The address of the Debian archive, as the machine's apt knows it.
pub fn mirror() -> Result<String> {
    if let Ok(mirror) = std::env::var(MIRROR_VARIABLE) {
        return Ok(mirror);
    }
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    let mut parts: Vec<_> = fs::read_dir("/etc/apt/sources.list.d")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    parts.sort();
    files.extend(parts);
    for file in files {
        let text = fs::read_to_string(&file).unwrap_or_default();
        let found = match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => from_list(&text),
            Some("sources") => from_deb822(&text),
            _ => None,
        };
        if let Some(mirror) = found {
            return Ok(mirror);
        }
    }
    bail!(
        "apt on this machine names no Debian archive; set {MIRROR_VARIABLE} to the address of one"
    )
}

/// Whether a suite is one of Debian's own archive: the security archive is another, with an address of its own.
fn is_debian(suite: &str) -> bool {
    let releases = [
        "bookworm",
        "trixie",
        "forky",
        "duke",
        "sid",
        "oldstable",
        "stable",
        "testing",
        "unstable",
    ];
    releases.contains(&suite.trim_end_matches('/'))
}

/// One-line format (`sources.list(5)`): `deb [options] URI SUITE COMPONENT...`.
fn from_list(text: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let line = line
            .split('#')
            .next()?
            .trim()
            .strip_prefix("deb ")?
            .trim_start();
        let line = match line.strip_prefix('[') {
            Some(rest) => rest.split_once(']')?.1,
            None => line,
        };
        let mut words = line.split_whitespace();
        let uri = words.next()?;
        (is_debian(words.next()?) && words.any(|component| component == "main"))
            .then(|| uri.to_string())
    })
}

/// Deb822 format (`sources.list(5)`): stanzas of fields, a line that begins with white space continues its field.
fn from_deb822(text: &str) -> Option<String> {
    let plain: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
    plain
        .split(|line| line.trim().is_empty())
        .find_map(|stanza| {
            let mut fields: BTreeMap<String, Vec<&str>> = BTreeMap::new();
            let mut current = String::new();
            for line in stanza {
                let mut value = *line;
                if !line.starts_with([' ', '\t']) {
                    let (name, rest) = line.split_once(':')?;
                    (current, value) = (name.trim().to_ascii_lowercase(), rest);
                }
                fields
                    .entry(current.clone())
                    .or_default()
                    .extend(value.split_whitespace());
            }
            let field = |name: &str| fields.get(name).map(Vec::as_slice).unwrap_or_default();
            let fits = field("types").contains(&"deb")
                && field("components").contains(&"main")
                && field("suites").iter().any(|suite| is_debian(suite))
                && field("enabled") != ["no"];
            fits.then(|| field("uris").first().map(|uri| uri.to_string()))
                .flatten()
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_found_in_one_line_sources() {
        let text = "# deb http://old/ bookworm main\n\
            deb http://security.example/debian-security bookworm-security main\n\
            deb-src http://src.example/debian bookworm main\n\
            deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian bookworm main contrib # here\n";
        assert_eq!(
            from_list(text).as_deref(),
            Some("http://mirror.example/debian")
        );
        assert_eq!(
            from_list("deb http://packages.example/cloud cloud-sdk main\n"),
            None
        );
    }

    #[test]
    fn the_archive_is_found_in_deb822_sources() {
        let text = "Types: deb\nURIs: http://node.example\nSuites: nodistro\nComponents: main\n\n\
            Enabled: no\nTypes: deb\nURIs: http://off.example\nSuites: trixie\nComponents: main\n\n\
            Types: deb deb-src\n# a comment\nURIs: http://mirror.example/debian\nSuites:\n bookworm\n bookworm-updates\nComponents: main\n";
        assert_eq!(
            from_deb822(text).as_deref(),
            Some("http://mirror.example/debian")
        );
        let security =
            "Types: deb\nURIs: http://sec.example\nSuites: bookworm-security\nComponents: main\n";
        assert_eq!(from_deb822(security), None);
    }

    #[test]
    fn versions_are_pinned_only_where_asked() {
        let pins = [("qemu-utils", "1:11")];
        assert_eq!(with_version("qemu-utils", &pins, true), "qemu-utils=1:11");
        assert_eq!(with_version("qemu-utils", &pins, false), "qemu-utils");
        assert_eq!(with_version("fio", &pins, true), "fio");
    }
}
