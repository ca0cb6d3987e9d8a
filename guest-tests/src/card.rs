//! The project's own programs as back ends: `bluffd`, and `bluff-reference`.

mod net;
mod nvme;

pub use net::{BluffdNet, MTU, NetCard, Pair, Station, Tunnel};
pub use nvme::BluffdNvme;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bluff_qemu::namespace::Entrance;
use bluff_qemu::process::Process;

use crate::backend::{Ability, Backend, Running, Volume, refuse_more};
use crate::runner::Peer;

/// Where the programs are; `cargo xtask test` sets it.
pub const PROGRAMS: &str = "BLUFF_PROGRAMS";
/// How long one may take to be ready.
const READY: Duration = Duration::from_secs(20);

/// One of the project's programs.
///
/// # Errors
/// Where [`PROGRAMS`] is not set, or the program is not there.
pub fn program(name: &str) -> Result<PathBuf> {
    let folder = std::env::var_os(PROGRAMS)
        .with_context(|| format!("{PROGRAMS} does not say where {name} is"))?;
    let path = Path::new(&folder).join(name);
    ensure!(path.is_file(), "{} is not there", path.display());
    Ok(path)
}

/// `bluffd`, with one function for each volume.
#[derive(Clone, Copy, Debug)]
pub struct Bluffd {
    /// The name in those of the cases.
    pub name: &'static str,
    /// `data` of its configuration.
    pub data: &'static str,
}

impl Peer for Bluffd {
    type Ability = Ability;

    fn name(&self) -> &'static str {
        self.name
    }

    fn has(&self, _: Ability) -> bool {
        true
    }
}

impl Backend for Bluffd {
    fn start(&self, folder: &Path, volumes: &[Volume]) -> Result<Box<dyn Running>> {
        let mut text = format!("[card]\ndata = \"{}\"\n", self.data);
        for (i, volume) in volumes.iter().enumerate() {
            text += &format!(
                "\n[volume.disk{i}]\nuri = \"file:{}\"\nlayers = [{}]\n\n[function.blk{i}]\nkind = \"virtio-blk\"\n\
                 attach = \"vhost-user\"\nvolume = \"disk{i}\"\nqueues = {}\nmode = \"{}\"\nsocket = \"{}\"\n",
                volume.path.display(),
                volume.layers,
                volume.queues,
                if volume.connects { "client" } else { "server" },
                socket(folder, i).display()
            );
        }
        Ok(Box::new(RunningBluffd(Daemon::start(folder, &text)?)))
    }
}

fn socket(folder: &Path, volume: usize) -> PathBuf {
    folder.join(format!("run/blk{volume}.sock"))
}

/// A `bluffd` of one configuration, in a folder of its own.
#[derive(Debug)]
struct Daemon {
    folder: PathBuf,
    /// The network namespace that it is in, if not that of the test.
    place: Option<Entrance>,
    process: Option<Process>,
    /// How often it was started: each start has a log of its own.
    starts: u32,
}

impl Daemon {
    fn start(folder: &Path, config: &str) -> Result<Self> {
        Self::start_in(None, folder, config)
    }

    fn start_in(place: Option<Entrance>, folder: &Path, config: &str) -> Result<Self> {
        let mut daemon = Self {
            folder: folder.into(),
            place,
            process: None,
            starts: 0,
        };
        daemon.configure(config)?;
        daemon.restart()?;
        Ok(daemon)
    }

    /// For its next start.
    fn configure(&self, config: &str) -> Result<()> {
        Ok(std::fs::write(self.folder.join("card.toml"), config)?)
    }

    fn process(&mut self) -> Result<&mut Process> {
        self.process.as_mut().context("it does not run")
    }

    fn restart(&mut self) -> Result<()> {
        // First: one that still runs must let go of its sockets.
        self.process = None;
        self.starts += 1;
        let log = self.folder.join(format!("bluffd-{:03}.log", self.starts));
        let mut command = Command::new(program("bluffd")?);
        command.arg("--config").arg(self.folder.join("card.toml"));
        command.arg("--runtime-dir").arg(self.folder.join("run"));
        command.arg("--state-dir").arg(self.folder.join("state"));
        if let Some(place) = self.place {
            command = place.command(&command);
        }
        command.stdin(Stdio::null());
        let mut process = Process::spawn(&mut command, "bluffd", &log)?;
        let ready = |log: &Path| {
            std::fs::read_to_string(log).is_ok_and(|text| text.lines().any(|l| l == "ready"))
        };
        let end = Instant::now() + READY;
        while !ready(&log) {
            process.check_alive()?;
            ensure!(Instant::now() < end, "bluffd does not get ready");
            std::thread::sleep(Duration::from_millis(5));
        }
        self.process = Some(process);
        Ok(())
    }

    fn ctl(&self, arguments: &[&str]) -> Result<()> {
        self.ask(arguments).map(drop)
    }

    /// What bluffctl says.
    fn ask(&self, arguments: &[&str]) -> Result<String> {
        let output = Command::new(program("bluffctl")?)
            .arg("--runtime-dir")
            .arg(self.folder.join("run"))
            .args(arguments)
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "bluffctl {}: {said}",
            arguments.join(" ")
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn resize(&self, volume: usize, bytes: u64) -> Result<()> {
        let (volume, bytes) = (format!("disk{volume}"), bytes.to_string());
        self.ctl(&["volume", "resize", &volume, &bytes])
    }
}

/// A `bluffd` that runs, with virtio-blk functions.
#[derive(Debug)]
struct RunningBluffd(Daemon);

impl Running for RunningBluffd {
    fn socket(&self, volume: usize) -> PathBuf {
        socket(&self.0.folder, volume)
    }

    fn resize(&mut self, volume: usize, bytes: u64) -> Result<()> {
        self.0.resize(volume, bytes)
    }

    fn kill(&mut self) -> Result<()> {
        self.0.process()?.kill()
    }

    fn restart(&mut self) -> Result<()> {
        self.0.restart()
    }

    fn check(&mut self) -> Result<()> {
        self.0.process()?.check_alive()
    }
}

/// `bluff-reference`: virtio-blk on the stock rust-vmm stack, one process for each volume.
#[derive(Clone, Copy, Debug)]
pub struct Reference;

impl Peer for Reference {
    type Ability = Ability;

    fn name(&self) -> &'static str {
        "reference"
    }

    fn has(&self, ability: Ability) -> bool {
        // See docs/reference.md for what the stock stack lacks, and why.
        ability == Ability::WriteBack
    }
}

impl Backend for Reference {
    fn start(&self, folder: &Path, volumes: &[Volume]) -> Result<Box<dyn Running>> {
        refuse_more(volumes)?;
        let mut running = RunningReference {
            folder: folder.into(),
            volumes: volumes.into(),
            processes: vec![],
        };
        running.restart()?;
        Ok(Box::new(running))
    }
}

/// Processes of `bluff-reference`.
#[derive(Debug)]
struct RunningReference {
    folder: PathBuf,
    volumes: Vec<Volume>,
    processes: Vec<Process>,
}

impl Running for RunningReference {
    fn socket(&self, volume: usize) -> PathBuf {
        self.folder.join(format!("reference{volume}.sock"))
    }

    fn resize(&mut self, _: usize, _: u64) -> Result<()> {
        anyhow::bail!("bluff-reference cannot resize")
    }

    fn kill(&mut self) -> Result<()> {
        self.processes.iter_mut().try_for_each(Process::kill)
    }

    fn restart(&mut self) -> Result<()> {
        self.processes.clear();
        for (i, volume) in self.volumes.iter().enumerate() {
            let socket = self.socket(i);
            let _ = std::fs::remove_file(&socket);
            let mut command = Command::new(program("bluff-reference")?);
            command
                .arg("--socket-path")
                .arg(&socket)
                .stdin(Stdio::null());
            command
                .arg("--volume")
                .arg(format!("file:{}", volume.path.display()));
            command.arg("--num-queues").arg(volume.queues.to_string());
            let log = self.folder.join(format!("reference{i}.log"));
            let mut process = Process::spawn(&mut command, "bluff-reference", &log)?;
            let end = Instant::now() + READY;
            while !socket.exists() {
                process.check_alive()?;
                ensure!(Instant::now() < end, "bluff-reference does not listen");
                std::thread::sleep(Duration::from_millis(5));
            }
            self.processes.push(process);
        }
        Ok(())
    }

    fn check(&mut self) -> Result<()> {
        self.processes.iter_mut().try_for_each(Process::check_alive)
    }
}
