//! User-Mode Linux: a kernel as an ordinary process, with a vhost-user front end that shares no line with QEMU's.
//!
//! The agent speaks over a serial line that is one end of a socket pair. The kernel must be started as a program, not through
//! another loader: it places its memory behind its own data segment. It needs no library but the machine's C library.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::agent::{Agent, Job, Link, Output};
use crate::image::Image;
use crate::process::{Process, tail};

/// Devices as `virtio_uml.device` numbers them (virtio 1.3 §5).
const VIRTIO_ID_NET: u32 = 1;
const VIRTIO_ID_BLOCK: u32 = 2;

/// What a User-Mode Linux is to be.
#[derive(Clone, Debug)]
pub struct Builder {
    image: Image,
    memory_mib: u32,
    /// Where a function's back end listens, and what kind it is.
    functions: Vec<(PathBuf, u32)>,
    boot_timeout: Duration,
    script_timeout: Duration,
}

impl Builder {
    /// RAM in MiB (512).
    pub fn memory_mib(mut self, size: u32) -> Self {
        self.memory_mib = size;
        self
    }

    /// A virtio-blk function behind this vhost-user socket. The back end must listen by now.
    pub fn vhost_user_blk(mut self, socket: &Path) -> Self {
        self.functions.push((socket.into(), VIRTIO_ID_BLOCK));
        self
    }

    /// A virtio-net function behind this vhost-user socket. The back end must listen by now.
    pub fn vhost_user_net(mut self, socket: &Path) -> Self {
        self.functions.push((socket.into(), VIRTIO_ID_NET));
        self
    }

    /// How long a boot may take (60 s).
    pub fn boot_timeout(mut self, bound: Duration) -> Self {
        self.boot_timeout = bound;
        self
    }

    /// How long a script may take (120 s).
    pub fn script_timeout(mut self, bound: Duration) -> Self {
        self.script_timeout = bound;
        self
    }

    /// Starts it, and waits until it answers.
    pub fn start(self) -> Result<Uml> {
        let folder = tempfile::Builder::new().prefix("bluff-uml.").tempdir()?;
        let initrd = folder.path().join("initrd");
        self.image.write_initrd(&initrd)?;
        let (ours, theirs) = UnixStream::pair()?;
        let mut command = Command::new(&self.image.kernel().image);
        command
            .arg(format!("mem={}M", self.memory_mib))
            .arg(format!("initrd={}", initrd.display()))
            // Control files and the memory file: in a folder of its own, which goes with it.
            .arg(format!("uml_dir={}/", folder.path().display()))
            .arg("umid=uml")
            .env("TMPDIR", memory_folder(folder.path()))
            .args([
                "con=null",
                "con0=null,fd:1",
                "console=tty0",
                "quiet",
                "panic=-1",
            ])
            // The line is the process's standard input, in both directions: the one descriptor that is passed on without unsafe code.
            .args(["ssl0=fd:0,fd:0", "bluff.port=/dev/ttyS0"])
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)));
        for (socket, kind) in &self.functions {
            command.arg(format!("virtio_uml.device={}:{kind}", socket.display()));
        }
        log::debug!(
            "{command:?} with the agent on descriptor {}",
            ours.as_raw_fd()
        );
        // Its processes are traced children, which stay behind, stopped, when it is killed alone.
        let process = Process::spawn_group(
            &mut command,
            "User-Mode Linux",
            &folder.path().join("console.log"),
        )?;
        // Ours alone must hold the other end: a kernel that died is seen by its closing.
        drop(command);
        let uml = Uml {
            agent: Agent::new(Link::Pair(ours)),
            process: Mutex::new(process),
            script_timeout: self.script_timeout,
            folder,
        };
        let alive = || uml.process.lock().expect("no holder panics").check_alive();
        uml.agent
            .connect(None, self.boot_timeout, alive)
            .map_err(|error| uml.explain(error))?;
        Ok(uml)
    }
}

/// Where the kernel keeps the (unlinked) file that is its RAM: on tmpfs, or each page of it would be written to a disk in time.
fn memory_folder(other: &Path) -> &Path {
    let shm = Path::new("/dev/shm");
    if shm.is_dir() { shm } else { other }
}

/// A running User-Mode Linux. Dropping it kills it and all of its processes, and removes its folder.
pub struct Uml {
    agent: Agent,
    process: Mutex<Process>,
    script_timeout: Duration,
    folder: TempDir,
}

impl Uml {
    /// One with 512 MiB and no disk; the image is [`Image::user_mode_linux`].
    pub fn builder(image: &Image) -> Builder {
        Builder {
            image: image.clone(),
            memory_mib: 512,
            functions: Vec::new(),
            boot_timeout: Duration::from_secs(60),
            script_timeout: Duration::from_secs(120),
        }
    }

    /// Runs a script and waits for it.
    pub fn run(&self, script: &str) -> Result<Output> {
        self.agent
            .spawn(script)
            .and_then(|job| job.wait(self.script_timeout))
            .map_err(|error| self.explain(error))
    }

    /// Runs a script that must succeed, and gives its standard output.
    pub fn sh(&self, script: &str) -> Result<String> {
        let output = self.run(script)?;
        output
            .check()
            .with_context(|| format!("in User-Mode Linux: {script}"))
            .map_err(|error| self.explain(error))
    }

    /// Starts a script and goes on.
    pub fn spawn(&self, script: &str) -> Result<Job> {
        self.agent
            .spawn(script)
            .map_err(|error| self.explain(error))
    }

    /// Shuts the kernel down and waits for its end.
    pub fn power_off(self, bound: Duration) -> Result<()> {
        let _gone = self.agent.spawn("sync; poweroff -f")?;
        self.process
            .lock()
            .expect("no holder panics")
            .wait(bound)
            .map_err(|error| self.explain(error))?;
        Ok(())
    }

    fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        let end = tail(&self.folder.path().join("console.log"), 40);
        anyhow::anyhow!("{error:#}\n--- console, last lines:\n{end}")
    }
}
