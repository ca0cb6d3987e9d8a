//! Programs of another Debian release, run out of a folder through that release's own loader.
//!
//! No chroot and no root: the loader takes the folder's libraries, and QEMU is told where its firmware and modules are.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::debian::Folder;

/// QEMU 11.1 with vfio-user, its storage daemon, and the tools that drive and judge them.
const QEMU_11: Folder = Folder {
    name: "host-qemu-11",
    release: "trixie",
    backports: true,
    packages: &["qemu-system-x86", "qemu-utils", "fio", "e2fsprogs"],
    pins: &[
        ("qemu-system-x86", "1:11.1.3+ds-1~bpo13+1"),
        ("qemu-utils", "1:11.1.3+ds-1~bpo13+1"),
    ],
};

/// What Debian 12 has: QEMU 7.2 and User-Mode Linux 6.1.
const DEBIAN_12: Folder = Folder {
    name: "host-debian-12",
    release: "bookworm",
    backports: false,
    packages: &["qemu-system-x86", "qemu-utils", "user-mode-linux"],
    pins: &[],
};

/// What guests are made of.
const GUEST: Folder = Folder {
    name: "guest-debian-13",
    release: "trixie",
    backports: false,
    packages: &[
        "linux-image-cloud-amd64",
        "busybox-static",
        "bash",
        "coreutils",
        "util-linux",
        "e2fsprogs",
        "fio",
        "nvme-cli",
        "pciutils",
        "ethtool",
        // They join network namespaces and look into them, on the host.
        "iproute2",
        "tcpdump",
        // These unpack the kernel and its modules, on the host.
        "xz-utils",
        "zstd",
    ],
    pins: &[],
};

/// What makes and starts a disk that firmware boots: OVMF, a boot loader, and programs that fill partitions without mounting them. A
/// folder of its own, so that only who boots by firmware fetches it.
const FIRMWARE: Folder = Folder {
    name: "firmware",
    release: "trixie",
    backports: false,
    packages: &[
        "ovmf",
        "systemd-boot-efi",
        "fdisk",
        "dosfstools",
        "mtools",
        "e2fsprogs",
    ],
    pins: &[],
};

/// What networks are compared with: Open vSwitch with DPDK, DPDK's testpmd with the drivers that it needs, and `ip`, which is told of interfaces.
const NETWORKS: Folder = Folder {
    name: "networks",
    release: "trixie",
    backports: false,
    packages: &["openvswitch-switch-dpdk", "dpdk-dev", "iproute2"],
    pins: &[],
};

/// The file of the dynamic loader and the name of the library folder, per architecture (the Debian multiarch tuples).
const LOADERS: [(&str, &str, &str); 2] = [
    ("x86_64", "ld-linux-x86-64.so.2", "x86_64-linux-gnu"),
    ("aarch64", "ld-linux-aarch64.so.1", "aarch64-linux-gnu"),
];

/// A folder of programs.
#[derive(Clone, Debug)]
pub struct HostDir {
    path: PathBuf,
    loader: PathBuf,
    libraries: Vec<PathBuf>,
}

impl HostDir {
    /// QEMU 11.1 and its tools; fetched where they are not in the cache.
    pub fn qemu_11() -> Result<Self> {
        Self::at(QEMU_11.path()?)
    }

    /// QEMU 7.2 and User-Mode Linux, as Debian 12 has them.
    pub fn debian_12() -> Result<Self> {
        Self::at(DEBIAN_12.path()?)
    }

    /// Kernel and programs for guests; the programs run on the host as well.
    pub fn guest() -> Result<Self> {
        Self::at(GUEST.path()?)
    }

    /// OVMF, a boot loader, and what makes disks for them.
    pub fn firmware() -> Result<Self> {
        Self::at(FIRMWARE.path()?)
    }

    /// Open vSwitch, DPDK's testpmd, and `ip`.
    pub fn networks() -> Result<Self> {
        Self::at(NETWORKS.path()?)
    }

    /// A folder that is there already.
    pub fn at(path: PathBuf) -> Result<Self> {
        let (_, loader, tuple) = LOADERS
            .into_iter()
            .find(|(arch, ..)| *arch == std::env::consts::ARCH)
            .with_context(|| format!("no loader known for {}", std::env::consts::ARCH))?;
        // Before and after Debian merged /lib into /usr/lib.
        let candidates =
            ["lib64", "usr/lib64", "lib", "usr/lib"].map(|folder| path.join(folder).join(loader));
        let loader = candidates
            .into_iter()
            .find(|candidate| candidate.exists())
            .with_context(|| format!("no {loader} in {}", path.display()))?;
        let mut libraries = Vec::new();
        for parent in ["usr/lib", "lib"].map(|folder| path.join(folder).join(tuple)) {
            // Some packages keep private libraries in folders that only an absolute run path of theirs names.
            libraries.extend(
                ["", "ceph", "pulseaudio", "blas", "lapack"].map(|folder| parent.join(folder)),
            );
        }
        libraries.retain(|folder| folder.is_dir());
        Ok(Self {
            path,
            loader,
            libraries,
        })
    }

    /// Where the folder is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file of this program.
    pub fn find(&self, tool: &str) -> Result<PathBuf> {
        // Open vSwitch has its daemons where alternatives are chosen from.
        let folders = [
            "usr/bin",
            "usr/sbin",
            "bin",
            "sbin",
            "usr/lib/openvswitch-switch-dpdk",
        ]
        .map(|folder| self.path.join(folder).join(tool));
        let program = |path: &&PathBuf| {
            path.metadata()
                .is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
        };
        match folders.iter().find(program) {
            Some(path) => Ok(path.clone()),
            None => bail!("{tool} is not in {}", self.path.display()),
        }
    }

    /// A command that runs this program (an ELF file, not a script) with the folder's own libraries.
    pub fn command(&self, tool: &str) -> Result<Command> {
        let mut command = self.loaded(&[]);
        command.arg("--argv0").arg(tool).arg(self.find(tool)?);
        // QEMU looks for its modules (block drivers, displays) under the prefix that it was built for.
        if let Some(modules) = self
            .libraries
            .iter()
            .map(|folder| folder.join("qemu"))
            .find(|folder| folder.is_dir())
        {
            command.env("QEMU_MODULE_DIR", modules);
        }
        Ok(command)
    }

    /// The libraries that this program needs, each by the path at which its loader found it in the folder.
    pub fn libraries_of(&self, program: &Path) -> Result<Vec<PathBuf>> {
        let output = self
            .loaded(&["--list"])
            .arg(program)
            .output()
            .context("run the loader")?;
        let text = String::from_utf8_lossy(&output.stdout);
        // Static programs have none, and the loader refuses to list those.
        if !output.status.success()
            && !String::from_utf8_lossy(&output.stderr).contains("statically linked")
        {
            bail!(
                "libraries of {}: {}",
                program.display(),
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        let named = text.lines().filter_map(|line| {
            line.split_once("=> ")?
                .1
                .split(" (")
                .next()
                .map(PathBuf::from)
        });
        Ok(named.filter(|path| path.starts_with(&self.path)).collect())
    }

    /// The loader of the folder's programs.
    pub fn loader(&self) -> &Path {
        &self.loader
    }

    fn loaded(&self, options: &[&str]) -> Command {
        let mut command = Command::new(&self.loader);
        let libraries = std::env::join_paths(&self.libraries)
            .expect("a cache folder without a colon in its name");
        command.args(options).arg("--library-path").arg(libraries);
        command
    }
}
