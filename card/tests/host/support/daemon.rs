//! The real `bluffd` in a folder of its own.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use bluff_card::control::client::Client;
use bluff_card::control::{Request, Response};
use bluff_card::stats::QueueStatistics;
use bluff_testing::times;
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, Signal};

use super::{LIMIT, until};

/// No daemon of a test lives longer, so that no front end waits for ever for an answer of a hung one.
fn life() -> Duration {
    Duration::from_secs(times(120, 3600))
}

/// A folder with a configuration, volumes and sockets.
pub struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    /// `config` is a card.toml, in which `$DIR` stands for the folder.
    pub fn new(config: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = config.replace("$DIR", dir.path().to_str().unwrap());
        std::fs::write(dir.path().join("card.toml"), config).unwrap();
        Self { dir }
    }

    /// With one function `blk0` on a file of `size` bytes, wrapped in `layers` (a TOML array).
    pub fn with_disk(size: u64, layers: &str) -> Self {
        Self::with_disk_and_card(size, layers, "")
    }

    /// As [`Place::with_disk`], with more lines about the card.
    pub fn with_disk_and_card(size: u64, layers: &str, card: &str) -> Self {
        let place = Self::new(&format!(
            "[card]\npoll_us = 20\n{card}\n[volume.disk0]\nuri = \"file:$DIR/disk0.raw\"\nlayers = {layers}\n{}",
            function("blk0", "disk0")
        ));
        place.make_file("disk0.raw", size);
        place
    }

    pub fn make_file(&self, name: &str, size: u64) {
        let file = std::fs::File::create(self.path(name)).unwrap();
        file.set_len(size).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn socket(&self, function: &str) -> PathBuf {
        self.path(&format!("run/{function}.sock"))
    }

    /// The command line of a daemon here.
    pub fn arguments(&self) -> Vec<String> {
        let at = |name: &str| self.path(name).to_str().unwrap().to_owned();
        let (config, run, state) = (at("card.toml"), at("run"), at("state"));
        let words = [
            "--config",
            &config,
            "--runtime-dir",
            &run,
            "--state-dir",
            &state,
        ];
        let words = words.map(str::to_owned);
        [vec![env!("CARGO_BIN_EXE_bluffd").to_owned()], words.into()].concat()
    }

    pub fn start(&self) -> Daemon {
        let arguments = self.arguments();
        let mut command = Command::new(&arguments[0]);
        command.args(&arguments[1..]);
        self.start_by(command)
    }

    /// Starts a daemon by a command that becomes it.
    pub fn start_by(&self, mut command: Command) -> Daemon {
        let log = self.path("log");
        let stderr = std::fs::File::options()
            .append(true)
            .create(true)
            .open(&log);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.stderr(stderr.unwrap()).spawn().unwrap();
        watch(&child);
        let said = first_line(child.stdout.take().unwrap());
        let runtime_dir = self.path("run");
        let daemon = Daemon {
            child,
            log,
            runtime_dir,
        };
        let said = said.recv_timeout(LIMIT);
        assert_eq!(said.as_deref(), Ok("ready\n"));
        daemon
    }
}

/// A function of two queues on a volume, as a table of card.toml.
pub fn function(id: &str, volume: &str) -> String {
    format!(
        "[function.{id}]\nkind = \"virtio-blk\"\nattach = \"vhost-user\"\nvolume = \"{volume}\"\nqueues = 2\n"
    )
}

fn first_line(from: ChildStdout) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        let _ = BufReader::new(from).read_line(&mut line);
        sender.send(line)
    });
    receiver
}

/// Ends a daemon that lives too long.
fn watch(child: &Child) {
    let pidfd = rustix::process::pidfd_open(Pid::from_child(child), PidfdFlags::empty()).unwrap();
    std::thread::spawn(move || {
        let life = life();
        let mut ended = [PollFd::new(&pidfd, PollFlags::IN)];
        if let Ok(0) = rustix::event::poll(&mut ended, Some(&life.try_into().unwrap())) {
            eprintln!("a daemon is still there after {life:?}, and is killed");
            let _ = rustix::process::pidfd_send_signal(&pidfd, Signal::KILL);
        }
    });
}

/// A daemon that said "ready"; killed when dropped.
pub struct Daemon {
    child: Child,
    log: PathBuf,
    runtime_dir: PathBuf,
}

impl Daemon {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// `kill -9`.
    pub fn kill_at_once(&self) {
        rustix::process::kill_process(Pid::from_child(&self.child), Signal::KILL).unwrap();
    }

    /// `kill -9` of its data half.
    pub fn kill_data_half(&self) {
        let mut client = Client::connect(&self.runtime_dir).unwrap();
        let half = until("a data half", || match client.ask(Request::Status) {
            Ok(Response::Status(status)) => status.data_pid,
            other => panic!("{other:?}"),
        });
        let half = Pid::from_raw(half as i32).unwrap();
        rustix::process::kill_process(half, Signal::KILL).unwrap();
    }

    /// `kill -9`, and waits until nothing is left of it.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn assert_alive(&mut self) {
        assert_eq!(self.child.try_wait().unwrap(), None, "the daemon has ended");
    }

    /// Asks it to end; it has to do so cleanly.
    pub fn terminate(mut self) {
        rustix::process::kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        let status = until("the daemon's end", || self.child.try_wait().unwrap());
        assert!(status.success(), "{status}");
    }

    /// How many descriptors it has open.
    pub fn descriptors(&self) -> usize {
        let all = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap();
        all.count()
    }

    /// Whether it has memory of a guest mapped.
    pub fn maps_guests(&self) -> bool {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.pid())).unwrap();
        maps.contains("memfd:guest")
    }

    /// Waits until it holds nothing of any front end: no memory, and no more descriptors than `baseline`.
    pub fn until_let_go(&self, baseline: usize) {
        until("the end of the front end's memory", || {
            (!self.maps_guests()).then_some(())
        });
        until("the end of the front end's descriptors", || {
            (self.descriptors() <= baseline).then_some(())
        });
    }

    /// Asks it by its control socket.
    pub fn ask(&self, request: Request) -> anyhow::Result<Response> {
        Client::connect(&self.runtime_dir)?.ask(request)
    }

    /// How many requests of a function are on their way to its volume.
    pub fn in_flight(&self, function: &str) -> u32 {
        self.queues(function).iter().map(|q| q.in_flight).sum()
    }

    /// What the queues of a function have counted.
    pub fn queues(&self, function: &str) -> Vec<QueueStatistics> {
        let mut client = Client::connect(&self.runtime_dir).unwrap();
        let function = Some(function.parse().unwrap());
        match client.ask(Request::Statistics { function }).unwrap() {
            Response::Statistics(all) => all.functions.into_iter().flat_map(|f| f.queues).collect(),
            other => panic!("{other:?}"),
        }
    }

    /// What its threads are doing, for the report of a hang: those of its data half too, and what the kernel works on
    /// for them.
    pub fn threads(&self) -> String {
        let read = |path: PathBuf| std::fs::read_to_string(path).unwrap_or_default();
        let list = |pid: u32| std::fs::read_dir(format!("/proc/{pid}/task"));
        let tasks = |pid: u32| list(pid).into_iter().flatten().flatten().map(|t| t.path());
        let children = tasks(self.pid()).flat_map(|task| {
            let all = read(task.join("children"));
            all.split_whitespace()
                .flat_map(str::parse)
                .collect::<Vec<u32>>()
        });
        let mut lines = String::new();
        for task in [self.pid()].into_iter().chain(children).flat_map(tasks) {
            let [name, at] = ["comm", "wchan"].map(|file| read(task.join(file)));
            lines += &format!("{} {} {at}\n", task.display(), name.trim());
        }
        lines
    }

    pub fn log(&self) -> String {
        read_log(&self.log)
    }
}

fn read_log(log: &Path) -> String {
    std::fs::read_to_string(log).unwrap_or_default()
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("the daemon said:\n{}", self.log());
        }
    }
}
