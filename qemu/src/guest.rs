//! A virtual machine under QEMU: started, spoken to, and gone when it is dropped.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::agent::{Agent, Job, Output};
pub use crate::builder::Builder;
use crate::device::{Nvme, VfioUserPci, VhostUserBlk};
use crate::emulator::{Accel, Qemu};
use crate::image::Image;
use crate::process::{Process, tail};
use crate::qmp::{Event, Qmp};

/// A reply to a QMP command that only changes state.
pub(crate) const QMP_BOUND: Duration = Duration::from_secs(20);
/// How often a boot is tried where the emulator is known to spoil some.
const BOOT_ATTEMPTS: u32 = 5;

/// A virtual machine. Dropping it kills QEMU and removes the folder of its sockets and logs.
pub struct Guest {
    // Dropped in this order: QEMU goes before its folder does.
    pub(crate) agent: Agent,
    pub(crate) process: Mutex<Process>,
    pub(crate) qmp: Mutex<Qmp>,
    pub(crate) boot_id: Mutex<Option<String>>,
    /// How much of the console was written before this boot.
    pub(crate) console_before: AtomicUsize,
    pub(crate) version: (u32, u32, u32),
    pub(crate) accel: Accel,
    pub(crate) boot_timeout: Duration,
    pub(crate) script_timeout: Duration,
    pub(crate) folder: TempDir,
}

impl Guest {
    /// A guest with 512 MiB, two processors and no disk.
    pub fn builder(qemu: &Qemu, image: &Image) -> Builder {
        Builder::new(qemu, image)
    }

    /// Runs a script and waits for it.
    pub fn run(&self, script: &str) -> Result<Output> {
        let run = || {
            let job = self.agent.spawn(script)?;
            let end = Instant::now() + self.script_timeout;
            while !job.has_ended_within(Duration::from_secs(1)) && Instant::now() < end {
                self.check_alive()?;
            }
            job.wait(Duration::ZERO)
                .with_context(|| format!("the bound is {:?}", self.script_timeout))
        };
        run().map_err(|error| self.explain(error))
    }

    /// An error if QEMU has ended or the guest's kernel has panicked. A panicked kernel stays as it is, for its console to be read.
    pub fn check_alive(&self) -> Result<()> {
        self.process
            .lock()
            .expect("no holder panics")
            .check_alive()?;
        ensure!(!self.has_panicked(), "the guest's kernel panicked");
        let hangs = self.breaks_kernels()
            && self
                .console_since_boot()
                .contains("detected stalls on CPUs");
        ensure!(!hangs, "the guest's kernel hangs");
        Ok(())
    }

    /// Whether the guest's kernel is broken in a way that the emulator is known for, so that a test may start over.
    pub fn was_broken_by_emulator(&self) -> bool {
        self.breaks_kernels()
            && [
                "Kernel panic",
                "Oops",
                "BUG: ",
                "detected stalls",
                "segfault",
                "general protection",
            ]
            .iter()
            .any(|sign| self.console_since_boot().contains(sign))
    }

    fn has_panicked(&self) -> bool {
        self.console_since_boot()
            .contains("Kernel panic - not syncing")
    }

    fn console_since_boot(&self) -> String {
        let console = std::fs::read(self.console()).unwrap_or_default();
        let since = console
            .get(self.console_before.load(Ordering::Relaxed)..)
            .unwrap_or_default();
        String::from_utf8_lossy(since).into_owned()
    }

    /// Runs a script that must succeed, and gives its standard output.
    pub fn sh(&self, script: &str) -> Result<String> {
        let output = self.run(script)?;
        output
            .check()
            .with_context(|| format!("in the guest: {script}"))
            .map_err(|error| self.explain(error))
    }

    /// Starts a script and goes on. I/O that may hang belongs here.
    pub fn spawn(&self, script: &str) -> Result<Job> {
        self.agent
            .spawn(script)
            .map_err(|error| self.explain(error))
    }

    /// Starts a script that outlives the connection to the agent, and so a migration. Its outputs go to files.
    pub fn detach(&self, name: &str, script: &str) -> Result<Detached> {
        let detached = Detached(format!("/run/detached-{name}"));
        let folder = &detached.0;
        self.put(&format!("{folder}/script"), 0o755, script.as_bytes())?;
        self.sh(&format!(
            "cd {folder} && rm -f status && (sh script >stdout 2>stderr; echo $? >status.new; mv status.new status) </dev/null >/dev/null 2>&1 &"
        ))?;
        Ok(detached)
    }

    /// Writes a file in the guest, and the folders on the way to it.
    pub fn put(&self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let script = format!("mkdir -p $(dirname {path}) && cat >{path} && chmod {mode:o} {path}");
        let job = self.agent.spawn_with_input(&script)?;
        job.write(content)?;
        job.close_input()?;
        job.wait(self.script_timeout)?
            .check()
            .with_context(|| format!("put {path} into the guest"))?;
        Ok(())
    }

    /// Reads a file of the guest.
    pub fn get(&self, path: &str) -> Result<Vec<u8>> {
        let output = self.run(&format!("cat {path}"))?;
        output
            .check()
            .with_context(|| format!("get {path} from the guest"))?;
        Ok(output.stdout)
    }

    /// Sends a QMP command with 20 s for its reply.
    pub fn qmp(&self, command: &str, arguments: Value) -> Result<Value> {
        self.qmp_within(command, arguments, QMP_BOUND)
    }

    /// Sends a QMP command with a bound of its own.
    pub fn qmp_within(&self, command: &str, arguments: Value, bound: Duration) -> Result<Value> {
        let done = self
            .qmp
            .lock()
            .expect("no holder panics")
            .execute(command, arguments, bound);
        done.map_err(|error| self.explain(error))
    }

    /// Waits for a QMP event; see [`Qmp::wait_event`].
    pub fn wait_event(
        &self,
        name: &str,
        fits: impl Fn(&Value) -> bool,
        bound: Duration,
    ) -> Result<Event> {
        let event = self
            .qmp
            .lock()
            .expect("no holder panics")
            .wait_event(name, fits, bound);
        event.map_err(|error| self.explain(error))
    }

    /// Presses the reset button. Answers how long QEMU took; the guest boots meanwhile.
    pub fn system_reset(&self) -> Result<Duration> {
        self.qmp.lock().expect("no holder panics").forget_events()?;
        let began = Instant::now();
        self.qmp("system_reset", json!({}))?;
        self.wait_event("RESET", |_| true, QMP_BOUND)?;
        Ok(began.elapsed())
    }

    /// Lets the guest's kernel reboot, and waits for its next boot.
    pub fn reboot(&self) -> Result<()> {
        self.qmp.lock().expect("no holder panics").forget_events()?;
        let _gone = self.agent.spawn("sync; reboot -f")?;
        self.wait_event("RESET", |_| true, self.script_timeout)?;
        self.wait_for_boot()
    }

    /// Waits until the guest answers, after a reset: in a boot that was not seen before.
    pub fn wait_for_boot(&self) -> Result<()> {
        let before = self.boot_id.lock().expect("no holder panics").clone();
        self.meet(before.as_deref())
    }

    /// Finds the agent of a guest that has migrated here.
    pub fn wait_for_agent(&self) -> Result<()> {
        self.meet(None)
    }

    fn meet(&self, before: Option<&str>) -> Result<()> {
        let mut attempts = 1;
        let boot = loop {
            match self
                .agent
                .connect(before, self.boot_timeout, || self.check_alive())
            {
                Ok(boot) => break boot,
                Err(_)
                    if self.breaks_kernels() && attempts < BOOT_ATTEMPTS && self.has_panicked() =>
                {
                    eprintln!(
                        "the kernel panicked under the translator of QEMU {:?}; boot {attempts} of {BOOT_ATTEMPTS} at most",
                        self.version
                    );
                    attempts += 1;
                    let written = std::fs::metadata(self.console())?.len();
                    self.console_before
                        .store(written as usize, Ordering::Relaxed);
                    self.system_reset()?;
                }
                Err(error) => return Err(self.explain(error)),
            }
        };
        *self.boot_id.lock().expect("no holder panics") = Some(boot);
        Ok(())
    }

    /// QEMU 7.2's translator spoils flags and return addresses: one boot of ten ends in a panic, and some guests hang later; also
    /// without any device of ours, with one processor, in one thread, and without chained blocks. `Accel::arguments` avoids the instruction
    /// that shows it most. QEMU 8.1 mended translation of code that is being patched, as Linux patches its own.
    fn breaks_kernels(&self) -> bool {
        self.accel == Accel::Tcg && self.version < (8, 1, 0)
    }

    /// Adds a vhost-user-blk function to a running guest; it should name a bus with hot-plug.
    pub fn add_vhost_user_blk(&self, function: &VhostUserBlk) -> Result<()> {
        self.qmp("chardev-add", function.chardev(self.version))?;
        let added = self.qmp("device_add", Value::Object(function.device()));
        if added.is_err() {
            let _ = self.qmp("chardev-remove", json!({ "id": function.chardev_id() }));
        }
        added.map(drop)
    }

    /// Takes a vhost-user-blk function away, and waits until the guest has let it go.
    pub fn remove_vhost_user_blk(&self, function: &VhostUserBlk, bound: Duration) -> Result<()> {
        self.device_del(function.id(), bound)?;
        self.qmp("chardev-remove", json!({ "id": function.chardev_id() }))
            .map(drop)
    }

    /// Pulls the cable of a network function out, or puts it in, as far as QEMU and its guest are concerned.
    pub fn set_link(&self, function: &str, up: bool) -> Result<()> {
        self.qmp("set_link", json!({ "name": function, "up": up }))
            .map(drop)
    }

    /// Adds a vfio-user function to a running guest; it should name a bus with hot-plug.
    pub fn add_vfio_user(&self, function: &VfioUserPci) -> Result<()> {
        self.qmp("device_add", Value::Object(function.device()))
            .map(drop)
    }

    /// Adds QEMU's own NVMe controller to a running guest, with its first namespace; it should name a bus with hot-plug.
    pub fn add_nvme(&self, controller: &Nvme) -> Result<()> {
        for (command, arguments) in controller.plug() {
            self.qmp(command, arguments)?;
        }
        Ok(())
    }

    /// Takes away a controller that [`Guest::add_nvme`] added, and waits until the guest has let it go.
    pub fn remove_nvme(&self, controller: &Nvme, bound: Duration) -> Result<()> {
        self.device_del(controller.id(), bound)?;
        for (command, arguments) in controller.unplug() {
            self.qmp(command, arguments)?;
        }
        Ok(())
    }

    /// How many operations a second a throttle group lets through; 0 is without limit.
    pub fn throttle(&self, group: &str, operations: u64) -> Result<()> {
        let limits = json!({ "iops-total": operations });
        let path = format!("/objects/{group}");
        self.qmp(
            "qom-set",
            json!({ "path": path, "property": "limits", "value": limits }),
        )
        .map(drop)
    }

    /// Takes a device away, and waits until the guest has let it go.
    pub fn device_del(&self, id: &str, bound: Duration) -> Result<()> {
        self.qmp("device_del", json!({ "id": id }))?;
        self.wait_event("DEVICE_DELETED", |data| data["device"] == id, bound)
            .map(drop)
    }

    /// Plugs in memory, as a memfd that back ends map, and answers how long QEMU took. It needs a slot; see
    /// [`memory_slots`](Builder::memory_slots).
    pub fn add_memory(&self, id: &str, mib: u32) -> Result<Duration> {
        let began = Instant::now();
        let size = u64::from(mib) << 20;
        self.qmp(
            "object-add",
            json!({ "qom-type": "memory-backend-memfd", "id": format!("{id}-ram"), "size": size, "share": true }),
        )?;
        self.qmp(
            "device_add",
            json!({ "driver": "pc-dimm", "id": id, "memdev": format!("{id}-ram") }),
        )?;
        Ok(began.elapsed())
    }

    /// Stops the processors and the devices, and answers how long that took; `cont` by QMP goes on.
    pub fn stop(&self) -> Result<Duration> {
        let began = Instant::now();
        self.qmp("stop", json!({}))?;
        Ok(began.elapsed())
    }

    /// Begins a live migration to a guest that was started as [`incoming`](Builder::incoming).
    pub fn migrate_start(&self, to: &Guest) -> Result<()> {
        let uri = format!("unix:{}", to.folder.path().join("migration.sock").display());
        to.qmp("migrate-incoming", json!({ "uri": uri }))?;
        self.qmp("migrate", json!({ "uri": uri })).map(drop)
    }

    /// How the migration stands: QMP's `query-migrate`.
    pub fn migration(&self) -> Result<Value> {
        self.qmp("query-migrate", json!({}))
    }

    /// Migrates live, waits for the end, and finds the agent at the other side. Answers QMP's statistics (`downtime` is in ms).
    pub fn migrate_to(&self, to: &Guest, bound: Duration) -> Result<Value> {
        self.migrate_start(to)?;
        let statistics = self.wait_migration("completed", bound)?;
        to.wait_event("RESUME", |_| true, bound)?;
        self.agent.disconnect();
        to.wait_for_agent()?;
        Ok(statistics)
    }

    /// Breaks a migration off, and waits until this side has the guest again.
    pub fn migrate_cancel(&self, bound: Duration) -> Result<()> {
        self.qmp("migrate_cancel", json!({}))?;
        self.wait_migration("cancelled", bound).map(drop)
    }

    /// Bounds what migrations send, in bytes a second.
    pub fn migration_bandwidth(&self, bytes: u64) -> Result<()> {
        self.qmp("migrate-set-parameters", json!({ "max-bandwidth": bytes }))
            .map(drop)
    }

    /// Waits until a migration has this status (`completed`, `cancelled`); another final one is an error.
    pub fn wait_migration(&self, status: &str, bound: Duration) -> Result<Value> {
        let end = Instant::now() + bound;
        loop {
            let statistics = self.migration()?;
            let found = statistics["status"].as_str().unwrap_or_default();
            if found == status {
                return Ok(statistics);
            }
            ensure!(
                !["completed", "cancelled", "failed"].contains(&found),
                "the migration is {found}: {statistics}"
            );
            ensure!(
                Instant::now() < end,
                "the migration is {found} after {bound:?}: {statistics}"
            );
            // QEMU announces migration only to those who ask with a capability that changes other things.
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends QEMU by QMP, and answers how long it took.
    pub fn quit(self, bound: Duration) -> Result<Duration> {
        let began = Instant::now();
        self.qmp("quit", json!({}))?;
        self.process
            .lock()
            .expect("no holder panics")
            .wait(bound)
            .map_err(|error| self.explain(error))?;
        Ok(began.elapsed())
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.process.lock().expect("no holder panics").id()
    }

    /// The folder of this guest's sockets and logs.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// What the guest wrote to its console.
    pub fn console(&self) -> PathBuf {
        self.folder.path().join("console.log")
    }

    /// Waits until what the guest has written to its console fits, over all its boots, and gives that. For guests without an agent.
    pub fn wait_console(&self, fits: impl Fn(&str) -> bool, bound: Duration) -> Result<String> {
        let end = Instant::now() + bound;
        loop {
            let text = std::fs::read(self.console()).unwrap_or_default();
            let text = String::from_utf8_lossy(&text).into_owned();
            if fits(&text) {
                return Ok(text);
            }
            self.check_alive()?;
            if Instant::now() >= end {
                let late = anyhow::anyhow!("the console has not what it should after {bound:?}");
                return Err(self.explain(late));
            }
            // QEMU tells nobody that it has written to a file.
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Adds what the console, the BIOS and QEMU said last.
    fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        let mut text = String::new();
        for (what, file) in [
            ("QEMU", "qemu.log"),
            ("BIOS", "bios.log"),
            ("console", "console.log"),
        ] {
            let end = tail(&self.folder.path().join(file), 30);
            if !end.is_empty() {
                text.push_str(&format!("\n--- {what}, last lines:\n{end}"));
            }
        }
        if text.is_empty() {
            error
        } else {
            anyhow::anyhow!("{error:#}{text}")
        }
    }
}

/// A script that [`Guest::detach`] has started. It is in the guest's memory, so it can be asked for wherever the guest is now.
#[derive(Clone, Debug)]
pub struct Detached(String);

impl Detached {
    /// Waits for its end.
    pub fn wait(&self, guest: &Guest, bound: Duration) -> Result<Output> {
        let folder = &self.0;
        let seconds = bound.as_secs().max(1);
        let job = guest.spawn(&format!(
            "timeout {seconds} sh -c 'until [ -e {folder}/status ]; do sleep 0.1; done'"
        ))?;
        let ended = job.wait(bound + Duration::from_secs(20))?;
        let stdout = guest.get(&format!("{folder}/stdout"))?;
        let stderr = guest.get(&format!("{folder}/stderr"))?;
        let (out, err) = (
            String::from_utf8_lossy(&stdout),
            String::from_utf8_lossy(&stderr),
        );
        ensure!(
            ended.status == 0,
            "{folder} did not end within {bound:?}\nstdout: {out}\nstderr: {err}"
        );
        let status = guest.sh(&format!("cat {folder}/status"))?.parse()?;
        Ok(Output {
            status,
            stdout,
            stderr,
        })
    }
}
