//! Which QEMU runs the guests, and with which accelerator.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cache;
use crate::guest::Guest;
use crate::hostdir::HostDir;
use crate::image::Image;

/// Names the QEMU (a path of `qemu-system-x86_64`) that is used instead of any other.
pub const QEMU_VARIABLE: &str = "BLUFF_QEMU";
/// `kvm` or `tcg`: the accelerator that is used without trying.
pub const ACCEL_VARIABLE: &str = "BLUFF_ACCEL";

const SYSTEM: &str = "qemu-system-x86_64";

#[derive(Clone, Debug)]
enum Place {
    Program(PathBuf),
    Folder(HostDir),
}

/// A QEMU for x86-64 guests.
#[derive(Clone, Debug)]
pub struct Qemu {
    place: Place,
    version: (u32, u32, u32),
}

impl Qemu {
    /// The one that [`QEMU_VARIABLE`] names; or else the machine's own, if it has `vfio-user-pci`; or else QEMU 11.1 of the cache
    /// folder, which is fetched where it is not there.
    pub fn new() -> Result<Self> {
        if let Some(path) = std::env::var_os(QEMU_VARIABLE) {
            return Self::at(Place::Program(path.into()));
        }
        match Self::machine() {
            Some(own) if own.lists("vfio-user-pci")? => Ok(own),
            _ => Self::host_folder(),
        }
    }

    /// QEMU 11.1 of the cache folder.
    pub fn host_folder() -> Result<Self> {
        Self::at(Place::Folder(HostDir::qemu_11()?))
    }

    /// QEMU 7.2, as Debian 12 has it.
    pub fn debian_12() -> Result<Self> {
        Self::at(Place::Folder(HostDir::debian_12()?))
    }

    /// The machine's own, if it has one that runs.
    pub fn machine() -> Option<Self> {
        let paths = std::env::var_os("PATH")?;
        let found = std::env::split_paths(&paths)
            .map(|folder| folder.join(SYSTEM))
            .find(|path| path.is_file())?;
        Self::at(Place::Program(found)).ok()
    }

    fn at(place: Place) -> Result<Self> {
        let mut qemu = Self {
            place,
            version: (0, 0, 0),
        };
        let text = qemu.output("--version")?;
        qemu.version = version(&text).with_context(|| format!("no version in {text:?}"))?;
        Ok(qemu)
    }

    /// Major, minor and patch number.
    pub fn version(&self) -> (u32, u32, u32) {
        self.version
    }

    /// A command that runs it, without arguments yet.
    pub fn command(&self) -> Result<Command> {
        match &self.place {
            Place::Program(path) => Ok(Command::new(path)),
            Place::Folder(folder) => {
                let mut command = folder.command(SYSTEM)?;
                for share in ["qemu", "seabios"] {
                    command
                        .arg("-L")
                        .arg(folder.path().join("usr/share").join(share));
                }
                Ok(command)
            }
        }
    }

    /// Whether it has this device.
    pub fn lists(&self, device: &str) -> Result<bool> {
        let mut command = self.command()?;
        let output = command
            .args(["-machine", "none", "-device", "help"])
            .output()?;
        Ok(String::from_utf8_lossy(&output.stdout).contains(&format!("name \"{device}\"")))
    }

    fn output(&self, argument: &str) -> Result<String> {
        let mut command = self.command()?;
        let output = command
            .arg(argument)
            .output()
            .with_context(|| format!("run {:?}", command.get_program()))?;
        if !output.status.success() {
            bail!(
                "QEMU does not run ({}): {}",
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// `QEMU emulator version 7.2.22 (Debian …)`.
fn version(text: &str) -> Option<(u32, u32, u32)> {
    let mut numbers = text
        .split("version ")
        .nth(1)?
        .split_whitespace()
        .next()?
        .split('.');
    let mut next = || numbers.next()?.parse().ok();
    Some((next()?, next()?, next()?))
}

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// The processor, through the kernel.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl Accel {
    /// The one that [`ACCEL_VARIABLE`] names, or the one that works here: a small guest is booted with KVM once, and the cache folder
    /// remembers whether it came up. There are machines whose /dev/kvm opens and whose guests hang.
    pub fn choose(qemu: &Qemu, image: &Image) -> Result<Self> {
        match std::env::var(ACCEL_VARIABLE).as_deref() {
            Ok("kvm") => return Ok(Self::Kvm),
            Ok("tcg") => return Ok(Self::Tcg),
            Ok("") | Err(_) => {}
            Ok(other) => bail!("{ACCEL_VARIABLE} is {other:?}; it may be kvm or tcg"),
        }
        if std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_err()
        {
            return Ok(Self::Tcg);
        }
        // Another kernel, processor or QEMU can behave otherwise.
        let kernel = std::fs::read_to_string("/proc/sys/kernel/version").unwrap_or_default();
        let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let processor = processor
            .lines()
            .find(|line| line.starts_with("model name"))
            .unwrap_or_default();
        let key = cache::key([
            &kernel,
            processor,
            &format!("{:?}", qemu.version),
            &image.kernel().release,
        ]);
        let found = cache::entry(&format!("accel-{key}"), |path| {
            Ok(std::fs::write(path, Self::probe(qemu, image))?)
        })?;
        remembered(&found)
    }

    fn probe(qemu: &Qemu, image: &Image) -> &'static str {
        let bound = Duration::from_secs(20);
        eprintln!(
            "trying KVM (once): a guest must come up within {} s",
            bound.as_secs()
        );
        let guest = Guest::builder(qemu, &image.clone().without_tools())
            .accel(Self::Kvm)
            .boot_timeout(bound)
            .start();
        match guest.and_then(|guest| guest.sh("uname -r")) {
            Ok(_) => "kvm",
            Err(error) => {
                let why = format!("{error:#}");
                eprintln!(
                    "KVM does not work here, emulation it is: {}",
                    why.lines().next().unwrap_or_default()
                );
                "tcg"
            }
        }
    }

    /// The arguments for a QEMU of this version.
    pub fn arguments(self, version: (u32, u32, u32)) -> [&'static str; 4] {
        let (translator, processor) = ("tcg,tb-size=512", "-cpu");
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            // CMPXCHG16B, which Linux allocates memory with, leaves rubbish in the flags: under I/O no guest lasts ten seconds.
            Self::Tcg if version < (8, 1, 0) => ["-accel", translator, processor, "qemu64,-cx16"],
            Self::Tcg => ["-accel", translator, processor, "qemu64"],
        }
    }
}

fn remembered(path: &Path) -> Result<Accel> {
    match std::fs::read_to_string(path)?.as_str() {
        "kvm" => Ok(Accel::Kvm),
        "tcg" => Ok(Accel::Tcg),
        other => bail!("{} holds {other:?}; remove it", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(
            version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\n"),
            Some((7, 2, 22))
        );
        assert_eq!(version("QEMU emulator version 11.1.3\n"), Some((11, 1, 3)));
        assert_eq!(version("something else"), None);
    }
}
