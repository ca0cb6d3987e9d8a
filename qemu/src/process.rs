//! Child processes that end with their owner.
#![allow(unsafe_code)] // signals and pidfd are not in the standard library; numbers go in, nothing else

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// Everything that runs now, for [`kill_all`].
static RUNNING: Mutex<Vec<(u32, bool)>> = Mutex::new(Vec::new());

/// A child process whose output goes to a file. It is killed and waited for when this is dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
    ended: Option<ExitStatus>,
    group: bool,
}

impl Process {
    /// Starts it, with its standard output and error in `log`. Its input stays as the command has it.
    pub fn spawn(command: &mut Command, name: &str, log: &Path) -> Result<Self> {
        Self::start(command, name, log, false)
    }

    /// Starts it in a process group of its own, which is killed as a whole. For a program that has children which do not notice its
    /// end; an interrupt from the terminal does not reach the group.
    pub fn spawn_group(command: &mut Command, name: &str, log: &Path) -> Result<Self> {
        Self::start(command.process_group(0), name, log, true)
    }

    fn start(command: &mut Command, name: &str, log: &Path, group: bool) -> Result<Self> {
        let file = File::create(log).with_context(|| format!("create {}", log.display()))?;
        let child = command
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("start {name} ({:?})", command.get_program()))?;
        RUNNING
            .lock()
            .expect("a list of numbers")
            .push((child.id(), group));
        Ok(Self {
            child,
            name: name.into(),
            log: log.into(),
            ended: None,
            group,
        })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended, and how.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait()?;
            if self.ended.is_some() {
                forget(self.child.id());
            }
        }
        Ok(self.ended)
    }

    /// An error that says how it ended and what it wrote last, if it has ended.
    pub fn check_alive(&mut self) -> Result<()> {
        match self.ended()? {
            None => Ok(()),
            Some(status) => bail!("{} ended ({status}):\n{}", self.name, tail(&self.log, 20)),
        }
    }

    /// Waits for its end.
    pub fn wait(&mut self, bound: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.ended()? {
            return Ok(status);
        }
        let pidfd = pidfd(self.child.id())?;
        let mut poll = libc::pollfd {
            fd: pidfd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one structure that lives until the call returns.
        unsafe {
            libc::poll(
                &mut poll,
                1,
                i32::try_from(bound.as_millis()).unwrap_or(i32::MAX),
            )
        };
        match self.ended()? {
            Some(status) => Ok(status),
            None => bail!("{} did not end within {bound:?}", self.name),
        }
    }

    /// Sends a signal, e.g. `libc::SIGTERM`.
    pub fn signal(&mut self, signal: i32) -> Result<()> {
        if self.ended()?.is_none() {
            // SAFETY: numbers; the child is not waited for yet, so its id is still its own.
            unsafe { libc::kill(self.child.id() as libc::pid_t, signal) };
        }
        Ok(())
    }

    /// Kills it and waits for its end.
    pub fn kill(&mut self) -> Result<()> {
        if self.group && self.ended()?.is_none() {
            // SAFETY: numbers; the group's leader is not waited for yet, so the id is still its own.
            unsafe { libc::kill(-(self.child.id() as libc::pid_t), libc::SIGKILL) };
        }
        self.signal(libc::SIGKILL)?;
        self.wait(Duration::from_secs(20)).map(drop)
    }

    /// Kills the processes that it has started itself, and not those of them; it goes on. Answers how many there were.
    pub fn kill_children(&mut self) -> Result<usize> {
        self.check_alive()?;
        let mut count = 0;
        for task in std::fs::read_dir(format!("/proc/{}/task", self.id()))?.flatten() {
            // A thread can end meanwhile.
            let children =
                std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            for child in children.split_whitespace() {
                let child: libc::pid_t = child.parse().context("a process id")?;
                // SAFETY: numbers. The child is waited for by its parent only, which may do so at any time; then the id is nobody's
                // before the kernel has given out all others.
                unsafe { libc::kill(child, libc::SIGKILL) };
                count += 1;
            }
        }
        Ok(count)
    }

    /// The file of its output.
    pub fn log(&self) -> &Path {
        &self.log
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("{}: {error:#}", self.name);
        }
    }
}

fn forget(pid: u32) {
    RUNNING
        .lock()
        .expect("a list of numbers")
        .retain(|(running, _)| *running != pid);
}

/// Kills what still runs: for a test runner that gives up on a case and cannot drop what the case owns.
pub fn kill_all() {
    for (pid, group) in RUNNING.lock().expect("a list of numbers").drain(..) {
        let pid = pid as libc::pid_t;
        // SAFETY: numbers; these children are not waited for yet.
        unsafe { libc::kill(if group { -pid } else { pid }, libc::SIGKILL) };
    }
}

/// The processor time of all children that have ended until now, and of theirs: unlike wall time, it says on a busy machine, too, what
/// a test costs.
pub fn children_time() -> Duration {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: one structure that lives until the call returns; all zeroes is a value of it.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_CHILDREN, usage.as_mut_ptr());
        usage.assume_init()
    };
    [usage.ru_utime, usage.ru_stime]
        .iter()
        .map(|time| {
            Duration::from_secs(time.tv_sec as u64) + Duration::from_micros(time.tv_usec as u64)
        })
        .sum()
}

fn pidfd(pid: u32) -> Result<OwnedFd> {
    // SAFETY: numbers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error()).context("pidfd_open");
    }
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// The last lines of a file, for error messages; empty where it cannot be read.
pub fn tail(path: &Path, lines: usize) -> String {
    let bytes = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<_> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_ends_with_its_owner() {
        let folder = tempfile::tempdir().expect("a folder");
        let log = folder.path().join("log");
        let mut process = Process::spawn(
            Command::new("sh").args(["-c", "echo hello; exec sleep 60"]),
            "sleep",
            &log,
        )
        .expect("sh");
        let pid = process.id();
        assert!(process.wait(Duration::from_millis(50)).is_err());
        process.check_alive().expect("alive");
        drop(process);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
        assert_eq!(tail(&log, 3), "hello");
    }

    #[test]
    fn children_are_killed_and_their_parent_is_not() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut process = Process::spawn(
            Command::new("sh").args(["-c", "sleep 60; echo $?; exec sleep 60"]),
            "sh",
            &folder.path().join("log"),
        )
        .expect("sh");
        let end = std::time::Instant::now() + Duration::from_secs(20);
        while process.kill_children().expect("it runs") == 0 {
            assert!(std::time::Instant::now() < end, "no child");
        }
        while tail(process.log(), 1) != "137" {
            assert!(
                std::time::Instant::now() < end,
                "the shell does not go on: {}",
                tail(process.log(), 3)
            );
        }
        process.check_alive().expect("alive");
    }

    #[test]
    fn an_end_is_reported_with_its_output() {
        let folder = tempfile::tempdir().expect("a folder");
        let log = folder.path().join("log");
        let mut process = Process::spawn(
            Command::new("sh").args(["-c", "echo why; exit 3"]),
            "sh",
            &log,
        )
        .expect("sh");
        assert_eq!(
            process.wait(Duration::from_secs(20)).expect("ends").code(),
            Some(3)
        );
        let error = process.check_alive().expect_err("ended").to_string();
        assert!(error.contains("why") && error.contains('3'), "{error}");
    }
}
