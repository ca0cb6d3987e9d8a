//! A `bluffd` whose data half is a process, and what kills that.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use bluff_card::control::client::Client;
use bluff_card::control::{FunctionEntry, Request, Response, Status};
use rustix::process::{Pid, Signal};

/// How long anything may take before a test fails.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Waits for a condition.
pub fn until<T>(what: &str, mut is: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = is() {
            return found;
        }
        assert!(start.elapsed() < LIMIT, "waited in vain for {what}");
        std::thread::yield_now();
    }
}

/// A daemon that said "ready".
pub struct Card {
    pub dir: tempfile::TempDir,
    child: Child,
    client: Client,
}

impl Card {
    /// One function `blk0` with two queues, on a file of `blocks` blocks of 4 KiB.
    pub fn start(blocks: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = std::fs::File::create(dir.path().join("disk")).unwrap();
        file.set_len(blocks * 4096).unwrap();
        let config = format!(
            "[card]\ndata = \"process\"\n[volume.disk0]\nuri = \"file:{}\"\n\
             [function.blk0]\nkind = \"virtio-blk\"\nattach = \"vhost-user\"\nvolume = \"disk0\"\n\
             queues = 2\n",
            dir.path().join("disk").display()
        );
        std::fs::write(dir.path().join("card.toml"), config).unwrap();
        let stderr = std::fs::File::create(dir.path().join("log")).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_bluffd"))
            .arg("--config")
            .arg(dir.path().join("card.toml"))
            .arg("--runtime-dir")
            .arg(dir.path().join("run"))
            .arg("--state-dir")
            .arg(dir.path().join("state"))
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = child.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        let log = || std::fs::read_to_string(dir.path().join("log"));
        assert_eq!(line, "ready\n", "{}", log().unwrap());
        let client = Client::connect(&dir.path().join("run")).unwrap();
        Self { dir, child, client }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("run/blk0.sock")
    }

    pub fn disk(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn ask(&mut self, request: Request) -> Response {
        let answer = self.client.ask(request);
        answer.unwrap_or_else(|error| panic!("{error:#}; {}", self.log()))
    }

    pub fn status(&mut self) -> Status {
        match self.ask(Request::Status) {
            Response::Status(status) => status,
            other => panic!("{other:?}"),
        }
    }

    pub fn function(&mut self) -> FunctionEntry {
        let id = "blk0".parse().unwrap();
        match self.ask(Request::ShowFunction { id }) {
            Response::Function(function) => *function,
            other => panic!("{other:?}"),
        }
    }

    /// Kills the data half, and waits until there is another.
    pub fn kill_data_half(&mut self) {
        let before = self.status();
        kill(before.data_pid.expect("it is a process"));
        until("another data half", || {
            (self.status().restarts > before.restarts).then_some(())
        });
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        until("the daemon's end", || self.child.try_wait().unwrap())
    }

    pub fn terminate(mut self) {
        let pid = Pid::from_child(&self.child);
        rustix::process::kill_process(pid, Signal::TERM).unwrap();
        let status = self.wait();
        assert!(status.success(), "{status}; {}", self.log());
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Kills a process; one that is gone already is none the worse.
pub fn kill(pid: u32) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let _ = rustix::process::kill_process(pid, Signal::KILL);
}

/// The children of a process.
pub fn children(pid: u32) -> Vec<u32> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let text = std::fs::read_to_string(Path::new(&path)).unwrap_or_default();
    text.split_whitespace()
        .map(|pid| pid.parse().unwrap())
        .collect()
}
