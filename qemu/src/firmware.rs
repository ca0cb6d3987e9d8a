//! Boot by firmware: OVMF, and a disk that it boots from.
//!
//! ```text
//!   GPT │ EFI system partition (FAT)                       │ root (ext4)
//!       │ /EFI/BOOT/BOOTX64.EFI        systemd-boot        │ /init   the agent
//!       │ /loader/entries/guest.conf   kernel, parameters  │ /bin    busybox
//!       │ /vmlinuz                     an EFI application  │
//! ```
//!
//! All that a machine of its own goes through is on that disk: firmware, boot loader, kernel and root file system. The kernel has the drivers for
//! NVMe and ext4 built in, so there is no initial RAM file system. Nothing is mounted to make it, and no root is needed.
//!
//! UEFI 2.10 §3.5.1 (the file that is booted from a disk without a boot entry) and §5.3 (GPT); Boot Loader Specification, type #1 entries.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::builder::KERNEL_PARAMETERS;
use crate::hostdir::HostDir;
use crate::image::Image;
use crate::kernel::sparse_file;

const MIB: u64 = 1 << 20;
/// Where the EFI system partition begins, and its size.
const ESP: (u64, u64) = (MIB, 48 * MIB);
/// Where the root file system begins, and its size.
const ROOT: (u64, u64) = (ESP.0 + ESP.1, 64 * MIB);
/// Bytes of a disk that [`Firmware::write_disk`] makes: behind the partitions there is room for the second partition table.
pub const DISK_SIZE: u64 = ROOT.0 + ROOT.1 + MIB;
/// The root partition's identity, which the kernel finds it by.
const ROOT_UUID: &str = "7d1f6a52-4c07-4e0e-9a55-b1d0b1ff0001";

/// OVMF of Debian 13.
#[derive(Clone, Debug)]
pub struct Firmware {
    folder: HostDir,
}

impl Firmware {
    /// Fetched where it is not in the cache.
    pub fn ovmf() -> Result<Self> {
        Ok(Self {
            folder: HostDir::firmware()?,
        })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join("usr/share/OVMF").join(name)
    }

    /// The machine's flash: code, and variables of its own in `folder`.
    pub(crate) fn arguments(&self, folder: &Path) -> Result<Vec<String>> {
        let variables = folder.join("firmware-variables.fd");
        fs::copy(self.file("OVMF_VARS_4M.fd"), &variables).context("copy OVMF's variables")?;
        let flash = |unit: u32, path: &Path, options: &str| {
            let path = path.to_string_lossy().replace(',', ",,");
            format!("if=pflash,unit={unit},format=raw,file={path}{options}")
        };
        let code = flash(0, &self.file("OVMF_CODE_4M.fd"), ",readonly=on");
        Ok(vec![
            "-drive".into(),
            code,
            "-drive".into(),
            flash(1, &variables, ""),
        ])
    }

    /// Makes a raw disk of [`DISK_SIZE`] bytes, for blocks of 512 bytes, that boots into the image's agent and busybox.
    pub fn write_disk(&self, image: &Image, path: &Path) -> Result<()> {
        let work = tempfile::Builder::new().prefix("bluff-disk.").tempdir()?;
        sparse_file(path, DISK_SIZE)?;
        self.partition(path)?;
        self.write_esp(image, path, work.path())?;
        self.write_root(image, path, work.path())
    }

    fn partition(&self, disk: &Path) -> Result<()> {
        let part = |kind: &str, (start, size): (u64, u64), more: &str| {
            format!(
                "start={}, size={}, type={kind}{more}\n",
                start / 512,
                size / 512
            )
        };
        let root = part("L", ROOT, &format!(", uuid={ROOT_UUID}"));
        let script = format!("label: gpt\n{}{root}", part("U", ESP, ""));
        let mut command = self.folder.command("sfdisk")?;
        command.args(["--quiet", "--no-reread", "--no-tell-kernel"]);
        run(command.arg(disk), "sfdisk", script.as_bytes())
    }

    fn write_esp(&self, image: &Image, disk: &Path, work: &Path) -> Result<()> {
        let mut command = self.folder.command("mkfs.vfat")?;
        command
            .arg("--offset")
            .arg((ESP.0 / 512).to_string())
            .arg(disk)
            .arg((ESP.1 / 1024).to_string());
        run(&mut command, "mkfs.vfat", b"")?;
        let volume = format!("{}@@{}", disk.display(), ESP.0);
        let mut mmd = self.mtool("mmd", &volume)?;
        mmd.args(["::EFI", "::EFI/BOOT", "::loader", "::loader/entries"]);
        run(&mut mmd, "mmd", b"")?;
        let parameters = format!(
            "{KERNEL_PARAMETERS} root=PARTUUID={ROOT_UUID} rootfstype=ext4 rootwait rw init=/init"
        );
        let entry = format!("title guest\nlinux /vmlinuz\noptions {parameters}\n");
        let (loader, entry_file) = (work.join("loader.conf"), work.join("guest.conf"));
        fs::write(&loader, "timeout 0\ndefault guest.conf\n")?;
        fs::write(&entry_file, entry)?;
        let boot = "usr/lib/systemd/boot/efi/systemd-bootx64.efi";
        let boot = self.folder.path().join(boot);
        let kernel = image.kernel().compressed.as_ref();
        for (from, to) in [
            (&boot, "::EFI/BOOT/BOOTX64.EFI"),
            (
                kernel.context("no boot loader starts this kernel")?,
                "::vmlinuz",
            ),
            (&loader, "::loader/loader.conf"),
            (&entry_file, "::loader/entries/guest.conf"),
        ] {
            let mut mcopy = self.mtool("mcopy", &volume)?;
            run(mcopy.arg(from).arg(to), "mcopy", b"")
                .with_context(|| format!("{} to {to}", from.display()))?;
        }
        Ok(())
    }

    /// One of the programs that work on FAT without mounting it.
    fn mtool(&self, name: &str, volume: &str) -> Result<Command> {
        let mut command = self.folder.command(name)?;
        command.args(["-i", volume]);
        Ok(command)
    }

    fn write_root(&self, image: &Image, disk: &Path, work: &Path) -> Result<()> {
        let tree = work.join("root");
        image.write_tree(&tree)?;
        let mut command = self.folder.command("mke2fs")?;
        // Or else it takes the machine's own, whose features another release's programs may not know.
        command.env("MKE2FS_CONFIG", self.folder.path().join("etc/mke2fs.conf"));
        command
            .args(["-q", "-t", "ext4", "-F", "-E"])
            .arg(format!("offset={},root_owner=0:0", ROOT.0))
            .arg("-d")
            .arg(&tree)
            .arg(disk)
            .arg(format!("{}k", ROOT.1 / 1024));
        run(&mut command, "mke2fs", b"")
    }
}

/// Runs a program to its end with this input; its output is shown only where it fails.
pub(crate) fn run(command: &mut Command, name: &str, input: &[u8]) -> Result<()> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {name}"))?;
    // They read all of it before they say more than a pipe holds. One that ends earlier says why itself.
    let written = child
        .stdin
        .take()
        .map_or(Ok(()), |mut pipe| pipe.write_all(input));
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success(),
        "{name} failed ({}): {}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    written.with_context(|| format!("write to {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_fails_is_quoted() {
        let mut command = Command::new("sh");
        command.args(["-c", "cat; echo why >&2; exit 3"]);
        let error = run(&mut command, "sh", b"input ").expect_err("it fails");
        let error = format!("{error:#}");
        assert!(
            error.contains("sh failed") && error.contains("input why"),
            "{error}"
        );
        run(Command::new("true").arg("x"), "true", b"").expect("it succeeds");
    }

    #[test]
    fn partitions_do_not_overlap() {
        assert!(ESP.0 + ESP.1 <= ROOT.0);
        // The second table has 33 blocks (UEFI 2.10 §5.3.2).
        assert!(ROOT.0 + ROOT.1 + 33 * 512 <= DISK_SIZE);
    }
}
