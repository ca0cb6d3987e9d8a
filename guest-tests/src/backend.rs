//! What serves functions to guests.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bluff_qemu::hostdir::HostDir;
use bluff_qemu::process::Process;
use bluff_qemu::qmp::Qmp;
use serde_json::json;

use crate::runner::Peer;

/// A virtio-blk function over a raw file, which is there already and has the volume's size.
#[derive(Clone, Debug)]
pub struct Volume {
    /// The file.
    pub path: PathBuf,
    /// How many queues are offered.
    pub queues: u16,
    /// What stands before the file, as `layers` of `bluffd`'s configuration: `{ kind = "delay", read = "2ms" }, …`. Where it is not
    /// empty, the back end must claim [`Ability::Layers`].
    pub layers: String,
    /// The front end listens, and the back end connects; it must claim [`Ability::Connects`].
    pub connects: bool,
}

impl Volume {
    /// The front end listens.
    pub fn connects(mut self) -> Self {
        self.connects = true;
        self
    }

    /// With these layers.
    pub fn layers(mut self, layers: &str) -> Self {
        self.layers = layers.into();
        self
    }
}

/// What not every back end can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ability {
    /// VIRTIO_F_RING_PACKED (virtio 1.3 §2.8).
    Packed,
    /// A back end that was killed with requests in flight loses none of them, by VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD.
    Inflight,
    /// A front end that writes dirty pages' log: live migration.
    Migration,
    /// A front end hears that a volume was resized.
    Resize,
    /// What User-Mode Linux insists on: VHOST_USER_PROTOCOL_F_BACKEND_REQ.
    BackendRequests,
    /// It says that it has a write-back cache (virtio 1.3 §5.2.5), and so is asked to flush.
    WriteBack,
    /// [`Volume::connects`].
    Connects,
    /// [`Volume::layers`]: storage that is slow, or that never answers.
    Layers,
}

/// A kind of back end.
pub trait Backend: Peer<Ability = Ability> {
    /// Starts one that serves these volumes, with its sockets and logs in `folder`. Its sockets listen when this returns.
    fn start(&self, folder: &Path, volumes: &[Volume]) -> Result<Box<dyn Running>>;
}

/// A back end that runs. Dropping it ends it.
pub trait Running: Send {
    /// The socket of a volume's function.
    fn socket(&self, volume: usize) -> PathBuf;

    /// Grows a volume; its file is extended first. Front ends hear of it.
    fn resize(&mut self, volume: usize, bytes: u64) -> Result<()>;

    /// Ends it without warning, as `kill -9` does.
    fn kill(&mut self) -> Result<()>;

    /// Starts it again, on the same sockets, after its end.
    fn restart(&mut self) -> Result<()>;

    /// An error where it has ended by itself.
    fn check(&mut self) -> Result<()>;
}

/// `qemu-storage-daemon` of QEMU 11.1: split rings, no in-flight region.
#[derive(Clone, Copy, Debug, Default)]
pub struct StorageDaemon;

impl Peer for StorageDaemon {
    type Ability = Ability;

    fn name(&self) -> &'static str {
        "storage-daemon"
    }

    fn has(&self, ability: Ability) -> bool {
        matches!(
            ability,
            Ability::Migration | Ability::Resize | Ability::BackendRequests
        )
    }
}

impl Backend for StorageDaemon {
    fn start(&self, folder: &Path, volumes: &[Volume]) -> Result<Box<dyn Running>> {
        refuse_more(volumes)?;
        let mut running = RunningDaemon {
            folder: folder.into(),
            volumes: volumes.into(),
            tools: HostDir::qemu_11()?,
            process: None,
        };
        running.restart()?;
        Ok(Box::new(running))
    }
}

/// For a back end that has no layers, and only listens.
pub(crate) fn refuse_more(volumes: &[Volume]) -> Result<()> {
    ensure!(
        volumes
            .iter()
            .all(|volume| volume.layers.is_empty() && !volume.connects),
        "this back end has no layers, and connects to nobody"
    );
    Ok(())
}

struct RunningDaemon {
    folder: PathBuf,
    volumes: Vec<Volume>,
    tools: HostDir,
    process: Option<Process>,
}

impl RunningDaemon {
    fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn monitor(&self) -> PathBuf {
        self.file("monitor.sock")
    }
}

impl Running for RunningDaemon {
    fn socket(&self, volume: usize) -> PathBuf {
        self.file(&format!("function{volume}.sock"))
    }

    fn resize(&mut self, volume: usize, bytes: u64) -> Result<()> {
        let bound = Duration::from_secs(20);
        let mut qmp = Qmp::connect(&self.monitor(), bound)?;
        let arguments = json!({ "node-name": format!("volume{volume}"), "size": bytes });
        qmp.execute("block_resize", arguments, bound).map(drop)
    }

    fn kill(&mut self) -> Result<()> {
        self.process.as_mut().context("it does not run")?.kill()
    }

    fn restart(&mut self) -> Result<()> {
        // First: one that still runs must let go of its sockets.
        self.process = None;
        let pid_file = self.file("pid");
        for stale in [&pid_file, &self.monitor()] {
            let _ = std::fs::remove_file(stale);
        }
        let mut command = self.tools.command("qemu-storage-daemon")?;
        command
            .arg("--chardev")
            .arg(format!(
                "socket,id=monitor,path={},server=on,wait=off",
                self.monitor().display()
            ))
            .args(["--monitor", "chardev=monitor"])
            .arg("--pidfile")
            .arg(&pid_file)
            .stdin(Stdio::null());
        for (index, volume) in self.volumes.iter().enumerate() {
            let socket = self.socket(index);
            let _ = std::fs::remove_file(&socket);
            let node = json!({
                "driver": "raw", "node-name": format!("volume{index}"), "discard": "unmap",
                // Two daemons have one file open in a migration.
                "file": { "driver": "file", "filename": volume.path, "locking": "off", "discard": "unmap" },
            });
            let export = json!({
                "type": "vhost-user-blk", "id": format!("function{index}"), "node-name": format!("volume{index}"),
                "addr": { "type": "unix", "path": socket }, "writable": true, "num-queues": volume.queues,
            });
            command
                .arg("--blockdev")
                .arg(node.to_string())
                .arg("--export")
                .arg(export.to_string());
        }
        let mut process = Process::spawn(
            &mut command,
            "qemu-storage-daemon",
            &self.file("storage-daemon.log"),
        )?;
        let end = Instant::now() + Duration::from_secs(20);
        // It writes its id when everything stands.
        while !pid_file.exists() {
            process.check_alive()?;
            ensure!(
                Instant::now() < end,
                "qemu-storage-daemon does not get ready"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        self.process = Some(process);
        Ok(())
    }

    fn check(&mut self) -> Result<()> {
        self.process
            .as_mut()
            .context("it was not started")?
            .check_alive()
    }
}
