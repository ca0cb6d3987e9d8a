//! Back ends: starting one, measuring it, ending it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bluff_qemu::hostdir::HostDir;

use crate::attack::{self, Attack, Latency};
use crate::load::{self, Count};
use crate::net;
use crate::nvme;
use crate::report::One;
use crate::ring;
use crate::rows::{Peer, Volume, Work};

/// The core of the back ends.
const CORE: usize = 1;
/// The size of volumes that hold data.
const BYTES: u64 = 256 << 20;
/// How long a back end may take to listen.
const START: Duration = Duration::from_secs(10);

/// Where the programs are.
pub struct Programs {
    ours: PathBuf,
    tools: HostDir,
    disk: PathBuf,
    /// For sockets and files on tmpfs.
    folder: tempfile::TempDir,
}

impl Programs {
    /// Programs of the release build in `ours`, those of others in the host folder, files for O_DIRECT
    /// in `disk`.
    pub fn new(ours: &Path, disk: &Path) -> Result<Self> {
        fs::create_dir_all(disk)?;
        let disk = &fs::canonicalize(disk)?;
        let folder = tempfile::Builder::new()
            .prefix("bluff-bench-")
            .tempdir_in("/dev/shm")?;
        Ok(Self {
            ours: ours.into(),
            tools: HostDir::qemu_11()?,
            disk: disk.into(),
            folder,
        })
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("blk0.sock")
    }

    /// The file of a volume that has one, filled, so that nothing is measured on holes.
    fn file(&self, volume: Volume) -> Result<Option<PathBuf>> {
        let path = match volume {
            Volume::Null | Volume::Ram => return Ok(None),
            Volume::Tmpfs => self.folder.path().join("volume.raw"),
            Volume::Disk => self.disk.join("bench.raw"),
        };
        if fs::metadata(&path).map_or(0, |m| m.len()) != BYTES {
            fs::write(&path, vec![0x5a; BYTES as usize])?;
            fs::File::open(&path)?.sync_all()?;
        }
        Ok(Some(path))
    }
}

impl Drop for Programs {
    fn drop(&mut self) {
        // The folder goes by itself; the disk's file is large.
        let _ = fs::remove_file(self.disk.join("bench.raw"));
    }
}

/// One measurement of `peer`.
pub fn measure(programs: &Programs, peer: &Peer, work: &Work, span: Duration) -> Result<One> {
    let packed = match peer {
        Peer::Ideal => return load::ideal(work, span, CORE).map(|c| One::new(c, None)),
        Peer::Memcpy => {
            return load::memcpy(work, span, CORE, BYTES as usize).map(|c| One::new(c, None));
        }
        Peer::Calls => {
            let file = programs.file(work.volume)?.context("a row with a file")?;
            return load::calls(work, span, CORE, &file).map(|c| One::new(c, None));
        }
        Peer::Ring(device) => {
            // About the span, as a request costs less than a microsecond.
            let (spent, requests) = ring::time(*device, work.depth, span.as_micros() as u64)?;
            let count = Count {
                requests,
                span: spent,
            };
            return Ok(One::new(count, Some(spent)));
        }
        Peer::Bluffd { packed, .. } => *packed,
        Peer::Nvme | Peer::Reference | Peer::StorageDaemon => false,
    };
    let file = programs.file(work.volume)?;
    let socket = match peer {
        Peer::Nvme => programs.folder.path().join("nvme0.sock"),
        _ => programs.socket(),
    };
    let _ = fs::remove_file(&socket);
    let command = match peer {
        Peer::Nvme => card(
            programs,
            Kind::Nvme,
            "always",
            &uri(work, file.as_deref()),
            1,
            work.queues,
        )?,
        Peer::Bluffd { poll, .. } => bluffd(programs, poll, work, file.as_deref())?,
        Peer::Reference => reference(programs, work, file.as_deref()),
        _ => storage_daemon(programs, work, file.as_deref())?,
    };
    let mut running = Running::start(command, &socket)?;
    let mut cpu = Vec::new();
    let pid = running.child.id();
    let around = || {
        cpu.push(cpu_time(pid)?);
        Ok(())
    };
    let count: Result<Count> = match peer {
        Peer::Nvme => nvme::measure(&socket, work, span, around),
        _ => load::vhost_user(&socket, work, packed, span, around),
    };
    let count = count.with_context(|| running.said())?;
    running.end()?;
    let [from, to] = cpu[..] else {
        bail!("measured once before and once after")
    };
    Ok(One::new(count, Some(to - from)))
}

/// A back end's process.
struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    fn start(mut command: Command, socket: &Path) -> Result<Self> {
        let log = socket.with_extension("log");
        let out = fs::File::create(&log)?;
        command
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out);
        let child = command.spawn().with_context(|| format!("{command:?}"))?;
        let mut this = Self { child, log };
        let start = Instant::now();
        // A socket file is there before it listens: a connection tells.
        while std::os::unix::net::UnixStream::connect(socket).is_err() {
            if let Some(status) = this.child.try_wait()? {
                bail!("it ended with {status}: {}", this.said());
            }
            ensure!(
                start.elapsed() < START,
                "it does not listen: {}",
                this.said()
            );
            std::thread::yield_now();
        }
        Ok(this)
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn end(&mut self) -> Result<()> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A kind of function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// virtio-blk over vhost-user.
    Blk,
    /// NVMe over vfio-user.
    Nvme,
    /// virtio-net over vhost-user.
    Net,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Blk => "blk",
            Self::Nvme => "nvme",
            Self::Net => "net",
        }
    }

    /// What its functions stand on: a volume of this kind, or a network.
    fn stands_on(self, uri: &str) -> String {
        match self {
            Self::Blk | Self::Nvme => format!("[volume.disk]\nuri = \"{uri}\"\n"),
            Self::Net => "[network.blue]\n".to_owned(),
        }
    }

    /// The keys of a function on that.
    fn keys(self) -> &'static str {
        match self {
            Self::Blk => "kind = \"virtio-blk\"\nattach = \"vhost-user\"\nvolume = \"disk\"",
            Self::Nvme => "kind = \"nvme\"\nattach = \"vfio-user\"\nnamespaces = [\"disk\"]",
            Self::Net => "kind = \"virtio-net\"\nattach = \"vhost-user\"\nnetwork = \"blue\"",
        }
    }
}

/// The share of a core that bluffd takes with `functions` functions that are attached and have nothing to do.
pub fn idle(programs: &Programs, kind: Kind, functions: u16, span: Duration) -> Result<f64> {
    let folder = programs.folder.path();
    let command = card(programs, kind, "adaptive", "null:?size=1TiB", functions, 1)?;
    let socket = |i| folder.join(format!("{}{i}.sock", kind.name()));
    let mut running = Running::start(command, &socket(functions - 1))?;
    let pid = running.child.id();
    let measure = || {
        let (from, start) = (cpu_time(pid)?, Instant::now());
        std::thread::sleep(span);
        let spent = cpu_time(pid)? - from;
        Ok(spent.as_secs_f64() / start.elapsed().as_secs_f64())
    };
    let share = match kind {
        Kind::Blk => load::idle((0..functions).map(socket), measure),
        Kind::Nvme => nvme::idle((0..functions).map(socket), measure),
        Kind::Net => net::measure::idle((0..functions).map(socket), measure),
    };
    let share = share.with_context(|| running.said())?;
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    for line in rollup.lines().filter(|line| line.contains("Hugetlb")) {
        let kib = line.split_whitespace().nth(1);
        ensure!(kib == Some("0"), "hugepages are in use: {line}");
    }
    running.end()?;
    Ok(share)
}

/// The latency of a function beside another one on the same reactor that is attacked.
pub fn attacked(programs: &Programs, attack: Attack, span: Duration) -> Result<Latency> {
    let folder = programs.folder.path();
    let command = card(programs, Kind::Blk, "always", "null:?size=1TiB", 2, 1)?;
    let [good, bad] = ["blk0.sock", "blk1.sock"].map(|name| folder.join(name));
    let mut running = Running::start(command, &bad)?;
    let latency = attack::measure(&good, &bad, attack, span)
        .with_context(|| format!("{attack:?}: {}", running.said()))?;
    running.end()?;
    Ok(latency)
}

fn bluffd(programs: &Programs, poll: &str, work: &Work, file: Option<&Path>) -> Result<Command> {
    card(programs, Kind::Blk, poll, &uri(work, file), 1, work.queues)
}

/// The volume of a row.
fn uri(work: &Work, file: Option<&Path>) -> String {
    match (work.volume, file) {
        (Volume::Null, _) => "null:?size=1TiB".to_owned(),
        (_, Some(path)) => format!("file:{}", path.display()),
        (_, None) => format!("ram:?size={BYTES}"),
    }
}

/// bluffd with functions blk0, blk1, … or nvme0, nvme1, … on one volume.
fn card(
    programs: &Programs,
    kind: Kind,
    poll: &str,
    uri: &str,
    functions: u16,
    queues: u16,
) -> Result<Command> {
    let folder = programs.folder.path();
    let config = folder.join("card.toml");
    let mut text = format!(
        "[card]\nreactors = [{CORE}]\npoll = \"{poll}\"\n\n{}",
        kind.stands_on(uri)
    );
    for i in 0..functions {
        text += &format!(
            "\n[function.{}{i}]\n{}\nqueues = {queues}\n",
            kind.name(),
            kind.keys()
        );
    }
    fs::write(&config, text)?;
    let mut command = pinned(&programs.ours.join("bluffd"));
    command
        .arg("--config")
        .arg(config)
        .arg("--runtime-dir")
        .arg(folder);
    command.arg("--state-dir").arg(folder.join("state"));
    Ok(command)
}

fn reference(programs: &Programs, work: &Work, file: Option<&Path>) -> Command {
    let mut command = pinned(&programs.ours.join("bluff-reference"));
    command
        .arg("--socket-path")
        .arg(programs.socket())
        .arg("--volume")
        .arg(uri(work, file));
    command
        .arg("--num-queues")
        .arg(work.queues.to_string())
        .args(["--queue-size", "512", "--poll"]);
    command
}

fn storage_daemon(programs: &Programs, work: &Work, file: Option<&Path>) -> Result<Command> {
    let node = match (file, work.volume) {
        (Some(path), volume) => format!(
            "driver=file,node-name=n,filename={},aio=io_uring,cache.direct={}",
            path.display(),
            if volume == Volume::Disk { "on" } else { "off" }
        ),
        (None, _) => "driver=null-co,node-name=n,size=1099511627776,read-zeroes=off".to_owned(),
    };
    let inner = programs.tools.command("qemu-storage-daemon")?;
    let mut command = pinned(Path::new(inner.get_program()));
    command.args(inner.get_args());
    command.args([
        "--object",
        "iothread,id=t0",
        "--blockdev",
        &node,
        "--export",
    ]);
    command.arg(format!(
        "type=vhost-user-blk,id=e,node-name=n,iothread=t0,writable=on,num-queues={},\
         addr.type=unix,addr.path={}",
        work.queues,
        programs.socket().display()
    ));
    Ok(command)
}

fn pinned(program: &Path) -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", &CORE.to_string()]).arg(program);
    command
}

/// The CPU time of a process and its threads, to the nanosecond where the kernel has it.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let mut total = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(task?.path().join("schedstat"))?;
        let first = text
            .split_whitespace()
            .next()
            .context("schedstat has a first field")?;
        total += first.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(total))
}
