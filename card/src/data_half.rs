//! Starting the data half, as a thread or as a process.
//!
//! Either way it is one function that gets one end of a socket pair ([`crate::message`]) and runs until it was drained or
//! the other end closes. A process is this very program, started anew, with the socket as its standard input: so no
//! descriptor number has to be agreed upon, and nothing else is inherited.

use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags};

use crate::message;

/// The argument that turns `bluffd` into a data half.
pub const ARGUMENT: &str = "data-half";

/// What the data half is told ahead of the first message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Where state is kept that outlives the daemon.
    pub state_dir: PathBuf,
    /// Whether it is a process of its own, which may lock itself in.
    pub is_process: bool,
}

/// The data half itself: serves the socket until it is drained, or the other end closes.
pub type Body = fn(OwnedFd, &Options) -> Result<()>;

/// A data half that was started.
#[derive(Debug)]
pub enum DataHalf {
    /// It runs in this process; the receiver gets what it ended with.
    Thread(Receiver<Result<()>>),
    /// It is a child.
    Process(Child),
}

impl DataHalf {
    /// Starts it as a thread; the socket is control's end.
    ///
    /// # Errors
    /// Where the system has no more threads or descriptors.
    pub fn spawn_thread(body: Body, options: Options) -> Result<(OwnedFd, Self)> {
        let (ours, theirs) = message::pair().context("a socket pair")?;
        let (sender, receiver) = sync_channel(1);
        let run = move || {
            let result = body(theirs, &options);
            // Nobody may be left to hear it, when the daemon has given up waiting.
            let _ = sender.send(result);
        };
        std::thread::Builder::new()
            .name("data".to_owned())
            .spawn(run)
            .context("the data half's thread")?;
        Ok((ours, Self::Thread(receiver)))
    }

    /// Starts this program again as a data half; the socket is control's end.
    ///
    /// # Errors
    /// Where the system has no more processes or descriptors.
    pub fn spawn_process(options: &Options) -> Result<(OwnedFd, Self)> {
        let (ours, theirs) = message::pair().context("a socket pair")?;
        // The program that runs, also if its file was replaced since.
        let mut command = Command::new("/proc/self/exe");
        command
            .arg(format!("--{ARGUMENT}"))
            .arg("--state-dir")
            .arg(&options.state_dir);
        // "ready" is the daemon's to say, so the standard output is not shared.
        command.stdin(Stdio::from(theirs)).stdout(Stdio::null());
        // What a terminal tells its group is for the daemon, which drains first.
        command.process_group(0);
        let child = command.spawn().context("the data half's process")?;
        Ok((ours, Self::Process(child)))
    }

    /// Its process, where it has one.
    pub fn pid(&self) -> Option<u32> {
        match self {
            Self::Thread(_) => None,
            Self::Process(child) => Some(child.id()),
        }
    }

    /// Whether it was ended from outside, by a signal that no mistake of its own raises. Waits for its end, if it is about to.
    pub fn was_killed(&mut self, within: Duration) -> bool {
        let Self::Process(child) = self else {
            return false;
        };
        let status = match wait(child, within) {
            Ok(true) => child.try_wait().ok().flatten(),
            Ok(false) | Err(_) => None,
        };
        let signal = status.and_then(|status| status.signal());
        let from_outside = [libc::SIGKILL, libc::SIGTERM, libc::SIGINT, libc::SIGHUP];
        signal.is_some_and(|signal| from_outside.contains(&signal))
    }

    /// Waits until it has ended. A process that does not is killed.
    ///
    /// # Errors
    /// What it ended with, or that it did not.
    pub fn end(self, within: Duration) -> Result<()> {
        match self {
            Self::Thread(result) => match result.recv_timeout(within) {
                Ok(result) => result,
                Err(RecvTimeoutError::Timeout) => bail!("the data half does not end"),
                Err(RecvTimeoutError::Disconnected) => bail!("the data half panicked"),
            },
            Self::Process(mut child) => {
                let has_ended = matches!(child.try_wait(), Ok(Some(_))) || wait(&child, within)?;
                if !has_ended {
                    child.kill().context("killing the data half")?;
                }
                let status = child.wait().context("waiting for the data half")?;
                match (has_ended, status.success()) {
                    (true, true) => Ok(()),
                    (true, false) => bail!("the data half ended with {status}"),
                    (false, _) => bail!("the data half did not end, and was killed"),
                }
            }
        }
    }
}

fn wait(child: &Child, within: Duration) -> Result<bool> {
    let pid = Pid::from_child(child);
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())
        .context("a descriptor of the data half")?;
    let deadline = Instant::now() + within;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = left.try_into().context("the time to wait")?;
        match rustix::event::poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&left)) {
            Ok(ended) => return Ok(ended > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("waiting for the data half"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{FromData, Link, LinkError, Numbered, ToData};

    fn options() -> Options {
        Options {
            state_dir: "/var/lib/x".into(),
            is_process: false,
        }
    }

    fn answers_once(socket: OwnedFd, options: &Options) -> Result<()> {
        assert_eq!(options.state_dir, PathBuf::from("/var/lib/x"));
        let mut link: Link<Numbered<FromData>, Numbered<ToData>> = Link::new(socket);
        let (message, _) = link.receive()?.context("it blocks")?;
        link.send(
            &Numbered {
                number: message.number,
                message: FromData::Drained,
            },
            &[],
        )?;
        Ok(())
    }

    #[test]
    fn a_thread_speaks_over_its_socket_and_ends() {
        let (socket, half) = DataHalf::spawn_thread(answers_once, options()).unwrap();
        let mut link: Link<Numbered<ToData>, Numbered<FromData>> = Link::new(socket);
        link.send(
            &Numbered {
                number: 9,
                message: ToData::Drain { within_ms: 0 },
            },
            &[],
        )
        .unwrap();
        assert_eq!(
            link.receive().unwrap().unwrap().0,
            Numbered {
                number: 9,
                message: FromData::Drained
            }
        );
        assert!(matches!(link.receive(), Err(LinkError::Closed)));
        half.end(Duration::from_secs(10)).unwrap();
    }

    #[test]
    fn a_thread_that_fails_or_panics_says_so() {
        let (_socket, half) = DataHalf::spawn_thread(|_, _| bail!("no luck"), options()).unwrap();
        assert_eq!(
            half.end(Duration::from_secs(10)).unwrap_err().to_string(),
            "no luck"
        );
        let (_socket, half) =
            DataHalf::spawn_thread(|_, _| panic!("on purpose"), options()).unwrap();
        assert!(
            half.end(Duration::from_secs(10))
                .unwrap_err()
                .to_string()
                .contains("panicked")
        );
    }

    #[test]
    fn one_that_does_not_end_is_not_waited_for_for_ever() {
        let (socket, half) = DataHalf::spawn_thread(answers_once, options()).unwrap();
        assert!(
            half.end(Duration::ZERO)
                .unwrap_err()
                .to_string()
                .contains("does not end")
        );
        drop(socket);
        let child = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let error = DataHalf::Process(child).end(Duration::ZERO).unwrap_err();
        assert!(error.to_string().contains("was killed"), "{error}");
    }
}
