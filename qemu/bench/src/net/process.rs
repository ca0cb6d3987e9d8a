//! A process of a measurement: it ends with this one, however that ends.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// How long it may take to listen.
const START: Duration = Duration::from_secs(60);

/// A process that runs.
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` on these cores (as taskset has them); what it prints goes to `log`. It must be the thread that lives as long as
    /// this process which does so: the end of that thread is the end of the child.
    pub fn start(command: &Command, cores: &str, log: &Path) -> Result<Self> {
        let mut all = Command::new("setpriv");
        all.args(["--pdeathsig", "KILL", "taskset", "-c", cores]);
        all.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            if let Some(value) = value {
                all.env(name, value);
            }
        }
        let out = File::create(log)?;
        all.stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out);
        let child = all.spawn().with_context(|| format!("{all:?}"))?;
        Ok(Self {
            child,
            log: log.into(),
        })
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it listens on this socket.
    pub fn listens(&mut self, socket: &Path) -> Result<()> {
        let start = Instant::now();
        // A socket file is there before it listens: a connection tells.
        while UnixStream::connect(socket).is_err() {
            if let Some(status) = self.child.try_wait()? {
                bail!("it ended with {status}: {}", self.said());
            }
            ensure!(
                start.elapsed() < START,
                "it does not listen: {}",
                self.said()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// What it has printed.
    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Asks it to end, and waits.
    pub fn end(&mut self) -> Result<()> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
