//! What a guest boots: a kernel and an initial RAM file system of our own making. The same files make a root file system on a disk.
//!
//! ```text
//!   first archive, made at each start      second archive, kept in the cache
//!   /init  the static agent                /usr/bin, /usr/sbin  fio, GNU coreutils, util-linux, e2fsprogs
//!   /bin/busybox and its names             /usr/lib             the libraries that they need, and no others
//!   /etc/modules, /lib/modules             /lib64               their loader
//!   /bin/traffic, the agent again
//! ```
//! For networks the second archive is ethtool alone: busybox has the rest.
//!
//! Everything lives in the guest's memory: there is no root disk that could be confused with the disks under test, or hang with
//! them. The second archive is about 60 MiB, for fio links librbd; not compressed, its unpacking is a copy, and costs less under
//! emulation than reading a compressed file system page by page.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};

use crate::cache;
use crate::cpio::Writer;
use crate::firmware;
use crate::hostdir::HostDir;
use crate::kernel::Kernel;

/// The shell, where it is among the tools.
const SHELL: &str = "bash";

/// Programs of the second archive where networks are shown.
const NETWORK_TOOLS: &[&str] = &["ethtool"];

/// Programs of the second archive where storage is.
const TOOLS: &[&str] = &[
    SHELL,
    "blkdiscard",
    "blockdev",
    "cat",
    "cp",
    "dd",
    "debugfs",
    "du",
    "dumpe2fs",
    "e2fsck",
    "fallocate",
    "fio",
    "head",
    "ls",
    "lsblk",
    "lspci",
    "mke2fs",
    "mkfs.ext4",
    "mount",
    "nvme",
    "od",
    "resize2fs",
    "seq",
    "sha256sum",
    "stat",
    "sync",
    "tail",
    "timeout",
    "tr",
    "truncate",
    "umount",
    "wipefs",
];

/// A kernel with its initial RAM file system.
#[derive(Clone, Debug)]
pub struct Image {
    kernel: Kernel,
    guest: HostDir,
    load: Vec<String>,
    tools: &'static [&'static str],
}

impl Image {
    /// Debian 13's kernel 6.12 with `virtio_blk` loaded and all tools.
    pub fn debian_13() -> Result<Self> {
        let guest = HostDir::guest()?;
        Ok(Self {
            kernel: Kernel::debian_13(&guest)?,
            guest,
            load: vec!["virtio_blk".into()],
            tools: TOOLS,
        })
    }

    /// Debian 12's User-Mode Linux 6.1 with `virtio_blk` loaded and all tools.
    pub fn user_mode_linux() -> Result<Self> {
        let guest = HostDir::guest()?;
        Ok(Self {
            kernel: Kernel::user_mode_linux(&HostDir::debian_12()?, &guest)?,
            guest,
            load: vec!["virtio_blk".into()],
            tools: TOOLS,
        })
    }

    /// Loads this module, too, at boot.
    pub fn load(mut self, module: &str) -> Self {
        self.load.push(module.into());
        self
    }

    /// Without the second archive: busybox alone, and a quicker boot.
    pub fn without_tools(mut self) -> Self {
        self.tools = &[];
        self
    }

    /// With `virtio_net` in the place of `virtio_blk`, and with the few tools for networks in the place of those for storage: nearly as quick
    /// a boot as without any.
    pub fn for_networks(mut self) -> Self {
        self.tools = NETWORK_TOOLS;
        self.load = vec!["virtio_net".into()];
        self
    }

    /// The kernel that is booted.
    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// Writes the initial RAM file system.
    pub fn write_initrd(&self, path: &Path) -> Result<()> {
        let mut file = File::create(path).with_context(|| format!("create {}", path.display()))?;
        // The kernel opens the console before init can mount /dev.
        let mut console = Writer::new(&mut file);
        console.device("dev/console", 5, 1)?;
        console.finish()?;
        file.write_all(&self.base()?)?;
        if !self.tools.is_empty() {
            let parts: Vec<_> = self
                .tools
                .iter()
                .copied()
                .chain([self.guest.path().to_str().unwrap_or_default()])
                .collect();
            let tools = cache::entry(&format!("tools-{}.cpio", cache::key(parts)), |path| {
                self.write_tools(path)
            })?;
            io::copy(&mut File::open(tools)?, &mut file)?;
        }
        Ok(())
    }

    /// Writes the first archive's files into a folder, which is made: what a root file system on a disk holds. The image must be
    /// [without tools](Self::without_tools).
    pub(crate) fn write_tree(&self, folder: &Path) -> Result<()> {
        ensure!(
            self.tools.is_empty(),
            "the tools are in an archive of their own"
        );
        fs::create_dir(folder).with_context(|| format!("make {}", folder.display()))?;
        let mut command = Command::new(self.guest.find("busybox")?);
        command.current_dir(folder).args(["cpio", "-i", "-d"]);
        firmware::run(&mut command, "busybox cpio", &self.base()?)
    }

    fn base(&self) -> Result<Vec<u8>> {
        let mut archive = Writer::new(Vec::new());
        archive.file("init", 0o755, &fs::read(agent()?)?)?;
        for folder in ["proc", "sys", "run", "tmp", "mnt", "etc"] {
            archive.folder(folder)?;
        }
        archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/:/bin/sh\n")?;
        archive.file("etc/group", 0o644, b"root:x:0:\n")?;
        archive.link("etc/mtab", "/proc/self/mounts")?;
        let busybox = self.guest.find("busybox")?;
        archive.file("bin/busybox", 0o755, &fs::read(&busybox)?)?;
        let names = Command::new(&busybox)
            .arg("--list")
            .output()
            .context("run busybox")?;
        ensure!(
            names.status.success(),
            "busybox --list failed ({})",
            names.status
        );
        // Busybox's shell prefers what is built into it to what is in PATH, so it is the shell only where nothing else is there.
        let shell = match self.tools.contains(&SHELL) {
            true => "/usr/bin/bash",
            false => "busybox",
        };
        archive.link("bin/sh", shell)?;
        archive.link("bin/traffic", "/init")?;
        for name in String::from_utf8_lossy(&names.stdout)
            .lines()
            .filter(|name| !["busybox", "sh"].contains(name))
        {
            archive.link(&format!("bin/{name}"), "busybox")?;
        }
        let names: Vec<_> = self.load.iter().map(String::as_str).collect();
        let mut list = String::new();
        for (name, module) in self.kernel.load_order(&names)? {
            let path = format!("lib/modules/{name}.ko");
            archive.file(&path, 0o644, &module)?;
            list.push_str(&format!("/{path}\n"));
        }
        archive.file("etc/modules", 0o644, list.as_bytes())?;
        Ok(archive.finish()?)
    }

    fn write_tools(&self, path: &Path) -> Result<()> {
        let mut archive = Writer::new(BufWriter::new(File::create(path)?));
        let root = self.guest.path();
        let loader = self.guest.loader();
        let mut libraries = Vec::new();
        for tool in self.tools {
            let program = self.guest.find(tool)?;
            libraries.extend(self.guest.libraries_of(&program)?);
            let name = program.strip_prefix(root)?.to_string_lossy().into_owned();
            archive.file(&name, 0o755, &fs::read(&program)?)?;
        }
        libraries.retain(|library| library.file_name() != loader.file_name());
        libraries.sort();
        libraries.dedup();
        for library in libraries {
            let name = library.strip_prefix(root)?.to_string_lossy().into_owned();
            archive.file(&name, 0o755, &fs::read(&library)?)?;
        }
        let name = loader
            .file_name()
            .and_then(|name| name.to_str())
            .context("a loader's name is text")?;
        // The place that the ABI gives it, wherever the folder has it.
        archive.file(&format!("lib64/{name}"), 0o755, &fs::read(loader)?)?;
        archive.finish()?.flush()?;
        Ok(())
    }
}

/// Builds the guest agent as a static program and says where it is. Once per process; cargo knows whether there is anything to do.
pub fn agent() -> Result<PathBuf> {
    static BUILT: OnceLock<std::result::Result<PathBuf, String>> = OnceLock::new();
    BUILT
        .get_or_init(|| build_agent().map_err(|error| format!("{error:#}")))
        .clone()
        .map_err(anyhow::Error::msg)
}

fn build_agent() -> Result<PathBuf> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("the crate lies in the workspace")?;
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace.join("target"), |folder| workspace.join(folder));
    // A folder of its own: the flags differ from everything else's, and the outer cargo may hold the lock of its folder.
    let target = target.join("guest-agent");
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .current_dir(workspace)
        .args([
            "build",
            "--quiet",
            "--locked",
            "--package",
            "guest-agent",
            "--bin",
            "guest-agent",
            "--release",
            "--target",
            &triple,
        ])
        .arg("--target-dir")
        .arg(&target)
        // With a target named, flags apply to the agent alone, not to build scripts, which cannot be static.
        .env(
            "RUSTFLAGS",
            "-C target-feature=+crt-static -C strip=symbols",
        )
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .stdin(Stdio::null())
        .output()
        .context("run cargo for the guest agent")?;
    ensure!(
        output.status.success(),
        "the guest agent does not build:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(target.join(triple).join("release/guest-agent"))
}
