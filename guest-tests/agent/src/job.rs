//! Jobs: shell scripts, each with its own process group and thread.
//!
//! The thread passes on output as it comes. A job ends with its shell: what a background process that inherited the output writes
//! later is not passed on, because waiting for it would keep the job open for as long as a daemon lives.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};

use guest_agent::{Frame, Kind};

use crate::sys;

/// The way to the host, shared by all jobs.
pub type Port = Arc<Mutex<File>>;

const SCRIPTS: &str = "/run/jobs";

/// Sends a whole frame.
pub fn send(port: &Port, frame: &Frame) -> io::Result<()> {
    crate::write_frame(
        &mut port.lock().expect("no job panics while it writes"),
        frame,
    )
}

struct Job {
    group: u32,
    input: Option<Sender<Vec<u8>>>,
}

/// The jobs of this boot.
pub struct Jobs {
    port: Port,
    jobs: HashMap<u32, Job>,
}

impl Jobs {
    /// No jobs yet.
    pub fn new(port: Port) -> io::Result<Self> {
        fs::create_dir_all(SCRIPTS)?;
        Ok(Self {
            port,
            jobs: HashMap::new(),
        })
    }

    /// Does what the host asks of a job.
    pub fn handle(&mut self, frame: Frame) -> io::Result<()> {
        match frame.kind {
            Kind::Run => match self.start(&frame) {
                Ok(job) => drop(self.jobs.insert(frame.id, job)),
                Err(error) => {
                    send(
                        &self.port,
                        &Frame::new(Kind::Stderr, frame.id, format!("agent: {error}\n")),
                    )?;
                    send(
                        &self.port,
                        &Frame::new(Kind::Exit, frame.id, 127i32.to_le_bytes()),
                    )?;
                }
            },
            Kind::Stdin => {
                if let Some(job) = self.jobs.get_mut(&frame.id) {
                    match &job.input {
                        Some(input) if !frame.payload.is_empty() => drop(input.send(frame.payload)),
                        _ => job.input = None,
                    }
                }
            }
            Kind::Kill => {
                if let (Some(job), Some(signal)) = (self.jobs.get(&frame.id), frame.number()) {
                    sys::kill_group(job.group, signal);
                }
            }
            Kind::Hello | Kind::Stdout | Kind::Stderr | Kind::Exit => {}
        }
        Ok(())
    }

    fn start(&self, frame: &Frame) -> io::Result<Job> {
        let (with_input, script) = frame
            .payload
            .split_first()
            .ok_or(io::ErrorKind::InvalidData)?;
        // A file, not an argument: a script can be longer than the kernel lets one argument be.
        let path = format!("{SCRIPTS}/{}", frame.id);
        fs::write(&path, script)?;
        let input = if *with_input == 1 {
            Stdio::piped()
        } else {
            Stdio::null()
        };
        let mut child = Command::new("/bin/sh")
            .arg(&path)
            .current_dir("/")
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", "/")
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()?;
        let group = child.id();
        let input = child.stdin.take().map(|mut pipe| {
            let (sender, receiver) = channel::<Vec<u8>>();
            // A thread of its own, so that a job that reads nothing does not stop the agent.
            std::thread::spawn(move || {
                receiver.iter().try_for_each(|bytes| pipe.write_all(&bytes))
            });
            sender
        });
        let (port, id) = (self.port.clone(), frame.id);
        std::thread::spawn(move || {
            let status = follow(&port, id, child).unwrap_or_else(|error| {
                eprintln!("agent: job {id}: {error}");
                127
            });
            let _ = fs::remove_file(path);
            if let Err(error) = send(&port, &Frame::new(Kind::Exit, id, status.to_le_bytes())) {
                eprintln!("agent: job {id}: {error}");
            }
        });
        Ok(Job { group, input })
    }
}

/// Passes on a job's output until its shell has ended and the pipes are empty.
fn follow(port: &Port, id: u32, mut child: Child) -> io::Result<i32> {
    let mut out = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
    let mut err = child.stderr.take().ok_or(io::ErrorKind::BrokenPipe)?;
    sys::set_nonblocking(&out)?;
    sys::set_nonblocking(&err)?;
    let ended = sys::pidfd(child.id())?;
    let mut fds = [out.as_raw_fd(), err.as_raw_fd(), ended.as_raw_fd()].map(|fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    });
    loop {
        sys::poll(&mut fds)?;
        // Looked at before the pipes are read: so what the shell wrote before its end is all in them now.
        let over = fds[2].revents != 0;
        if !pass_on(port, Frame::new(Kind::Stdout, id, []), &mut out)? {
            fds[0].fd = -1;
        }
        if !pass_on(port, Frame::new(Kind::Stderr, id, []), &mut err)? {
            fds[1].fd = -1;
        }
        if over {
            let status = child.wait()?;
            return Ok(status
                .code()
                .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)));
        }
    }
}

/// Sends what a pipe holds. False when it is closed.
fn pass_on(port: &Port, mut frame: Frame, pipe: &mut impl Read) -> io::Result<bool> {
    loop {
        frame.payload.resize(32 * 1024, 0);
        match pipe.read(&mut frame.payload) {
            Ok(0) => return Ok(false),
            Ok(length) => {
                frame.payload.truncate(length);
                send(port, &frame)?;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
