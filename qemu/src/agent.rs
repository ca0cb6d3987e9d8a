//! The host's side of the guest agent: scripts run in a guest as if it were a shell.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use guest_agent::{Decoder, Frame, Kind};

/// What a script did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// The exit status; 128 plus the signal for a shell that was killed.
    pub status: i32,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Standard output as text, without white space at its end.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_string()
    }

    /// The text, if the status is 0; or else an error with both outputs.
    pub fn check(&self) -> Result<String> {
        let stderr = String::from_utf8_lossy(&self.stderr);
        ensure!(
            self.status == 0,
            "status {}\nstdout: {}\nstderr: {}",
            self.status,
            self.text(),
            stderr.trim_end()
        );
        Ok(self.text())
    }
}

/// How the agent is reached.
#[derive(Debug)]
pub enum Link {
    /// A socket that can be connected to again and again (QEMU's).
    Path(PathBuf),
    /// One end of a pair whose other end the guest has for its lifetime.
    Pair(UnixStream),
}

#[derive(Default)]
struct Record {
    output: Output,
    ended: bool,
}

#[derive(Default)]
struct State {
    /// The nonce that was answered last, and the boot id of the kernel that did.
    hello: Option<(u64, String)>,
    jobs: HashMap<u32, Record>,
    /// Connections so far. What an earlier one's reader still has to say does not count.
    connection: u64,
    stream: Option<UnixStream>,
    /// Why nothing more comes.
    broken: Option<String>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Held for a whole frame.
    sending: Mutex<()>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }

    /// Waits until `done` gives something or the time is over.
    fn wait<T>(&self, end: Instant, mut done: impl FnMut(&mut State) -> Option<T>) -> Option<T> {
        let mut state = self.lock();
        loop {
            if let Some(value) = done(&mut state) {
                return Some(value);
            }
            let left = end.checked_duration_since(Instant::now())?;
            state = self
                .changed
                .wait_timeout(state, left)
                .expect("no holder panics")
                .0;
        }
    }

    fn send(&self, frame: &Frame) -> Result<()> {
        let stream = self
            .lock()
            .stream
            .as_ref()
            .context("the agent is not connected")?
            .try_clone()?;
        // A guest that reads nothing any more must not hold the test for ever.
        stream.set_write_timeout(Some(Duration::from_secs(30)))?;
        let _whole = self.sending.lock().expect("no holder panics");
        (&stream)
            .write_all(&frame.encode())
            .context("send to the agent")
    }
}

/// A connection to the agent of one guest.
pub struct Agent {
    link: Link,
    shared: Arc<Shared>,
    next_job: AtomicU32,
}

impl Agent {
    /// Not connected yet.
    pub fn new(link: Link) -> Self {
        let shared = Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            sending: Mutex::new(()),
        };
        Self {
            link,
            shared: Arc::new(shared),
            // After a migration another `Agent` speaks to the same guest: its jobs must not have the names of those that still run.
            next_job: AtomicU32::new(nonce() as u32),
        }
    }

    /// Connects anew and waits until the guest answers. `alive` is asked now and then, and ends the wait with its error. An answer
    /// by the kernel that booted as `before` does not count: it is about to go.
    pub fn connect(
        &self,
        before: Option<&str>,
        bound: Duration,
        mut alive: impl FnMut() -> Result<()>,
    ) -> Result<String> {
        let end = Instant::now() + bound;
        self.disconnect();
        let stream = match &self.link {
            Link::Path(path) => UnixStream::connect(path)
                .with_context(|| format!("connect to {}", path.display()))?,
            Link::Pair(stream) => stream.try_clone()?,
        };
        let number = {
            let mut state = self.shared.lock();
            state.connection += 1;
            state.stream = Some(stream.try_clone()?);
            state.broken = None;
            state.hello = None;
            state.connection
        };
        let shared = self.shared.clone();
        std::thread::spawn(move || read_frames(&shared, number, stream));
        let mine = nonce();
        self.shared
            .send(&Frame::new(Kind::Hello, 0, mine.to_le_bytes()))?;
        let mut asked = Instant::now();
        loop {
            let found = self.shared.wait(
                end.min(Instant::now() + Duration::from_millis(100)),
                |state| {
                    let answered = state
                        .hello
                        .as_ref()
                        .filter(|(nonce, boot)| *nonce == mine && Some(boot.as_str()) != before);
                    answered.map(|(_, boot)| boot.clone())
                },
            );
            if let Some(boot) = found {
                return Ok(boot);
            }
            alive()?;
            ensure!(
                Instant::now() < end,
                "the guest did not answer within {bound:?}"
            );
            if asked.elapsed() > Duration::from_secs(2) {
                // A kernel that was on its way out may have swallowed the question.
                asked = Instant::now();
                self.shared
                    .send(&Frame::new(Kind::Hello, 0, mine.to_le_bytes()))?;
            }
        }
    }

    /// Lets the connection go. Jobs that have not ended are lost.
    pub fn disconnect(&self) {
        let mut state = self.shared.lock();
        state.connection += 1;
        state.broken = Some("the connection to the agent was given up".into());
        if let (Some(stream), Link::Path(_)) = (state.stream.take(), &self.link) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        self.shared.changed.notify_all();
    }

    /// Starts a script without input.
    pub fn spawn(&self, script: &str) -> Result<Job> {
        self.start(script, false)
    }

    /// Starts a script that reads what [`Job::write`] gives it.
    pub fn spawn_with_input(&self, script: &str) -> Result<Job> {
        self.start(script, true)
    }

    fn start(&self, script: &str, input: bool) -> Result<Job> {
        let id = self.next_job.fetch_add(1, Ordering::Relaxed);
        self.shared.lock().jobs.insert(id, Record::default());
        let job = Job {
            shared: self.shared.clone(),
            id,
            script: script.into(),
        };
        let mut payload = vec![u8::from(input)];
        payload.extend_from_slice(script.as_bytes());
        self.shared.send(&Frame::new(Kind::Run, id, payload))?;
        Ok(job)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.disconnect();
    }
}

/// A number that no other connection of this or another process has chosen lately.
fn nonce() -> u64 {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let clock = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    clock.as_nanos() as u64
        ^ (u64::from(std::process::id()) << 40)
        ^ COUNT.fetch_add(1, Ordering::Relaxed)
}

fn read_frames(shared: &Shared, connection: u64, mut stream: UnixStream) {
    let mut decoder = Decoder::default();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let read = stream.read(&mut buffer);
        let mut state = shared.lock();
        if state.connection != connection {
            return;
        }
        match read {
            Ok(length) if length > 0 => {
                decoder.push(&buffer[..length]);
                while let Some(frame) = decoder.next_frame() {
                    take(&mut state, frame);
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            other => {
                let why = other
                    .err()
                    .map_or("the guest closed the connection".into(), |error| {
                        error.to_string()
                    });
                state.broken = Some(why);
                shared.changed.notify_all();
                return;
            }
        }
        shared.changed.notify_all();
    }
}

fn take(state: &mut State, frame: Frame) {
    if frame.kind == Kind::Hello {
        if let Some((nonce, boot)) = frame.payload.split_first_chunk() {
            state.hello = Some((
                u64::from_le_bytes(*nonce),
                String::from_utf8_lossy(boot).into_owned(),
            ));
        }
        return;
    }
    let Some(job) = state.jobs.get_mut(&frame.id) else {
        return;
    };
    match frame.kind {
        Kind::Stdout => job.output.stdout.extend_from_slice(&frame.payload),
        Kind::Stderr => job.output.stderr.extend_from_slice(&frame.payload),
        Kind::Exit => {
            job.output.status = frame.number().unwrap_or(-1);
            job.ended = true;
        }
        Kind::Hello | Kind::Run | Kind::Stdin | Kind::Kill => {}
    }
}

/// A script that runs in the guest. Dropping it forgets it, and does not end it.
pub struct Job {
    shared: Arc<Shared>,
    id: u32,
    script: String,
}

impl Job {
    /// Waits for its end. An error where the time is over or the guest is gone; the job goes on in the former case.
    pub fn wait(&self, bound: Duration) -> Result<Output> {
        let found = self.shared.wait(Instant::now() + bound, |state| {
            let job = &state.jobs[&self.id];
            match (&state.broken, job.ended) {
                (_, true) => Some(Ok(job.output.clone())),
                (Some(why), false) => Some(Err(why.clone())),
                (None, false) => None,
            }
        });
        match found {
            Some(Ok(output)) => Ok(output),
            Some(Err(why)) => bail!("lost the script `{}`: {why}", self.name()),
            None => {
                let so_far = self.so_far();
                let stderr = String::from_utf8_lossy(&so_far.stderr).into_owned();
                bail!(
                    "`{}` did not end within {bound:?}\nstdout: {}\nstderr: {stderr}",
                    self.name(),
                    so_far.text()
                )
            }
        }
    }

    /// Waits until it has ended, or can never be heard of again; false when the time is over.
    pub fn has_ended_within(&self, bound: Duration) -> bool {
        let over = |state: &mut State| {
            (state.jobs[&self.id].ended || state.broken.is_some()).then_some(())
        };
        self.shared.wait(Instant::now() + bound, over).is_some()
    }

    /// What it wrote until now; its status means nothing before its end.
    pub fn so_far(&self) -> Output {
        self.shared.lock().jobs[&self.id].output.clone()
    }

    /// Waits until it has written this to standard output.
    pub fn wait_for(&self, text: &str, bound: Duration) -> Result<()> {
        let found = self.shared.wait(Instant::now() + bound, |state| {
            let job = &state.jobs[&self.id];
            let there = job
                .output
                .stdout
                .windows(text.len())
                .any(|window| window == text.as_bytes());
            (there || job.ended || state.broken.is_some()).then_some(there)
        });
        ensure!(
            found == Some(true),
            "`{}` did not write {text:?}; {:?}",
            self.name(),
            self.so_far()
        );
        Ok(())
    }

    /// Gives it input, if it was started with some.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        // An empty frame would close the input, so an empty slice sends none.
        bytes
            .chunks(32 * 1024)
            .try_for_each(|piece| self.shared.send(&Frame::new(Kind::Stdin, self.id, piece)))
    }

    /// Closes its input.
    pub fn close_input(&self) -> Result<()> {
        self.shared.send(&Frame::new(Kind::Stdin, self.id, []))
    }

    /// Sends a signal to it and all that it started.
    pub fn signal(&self, signal: i32) -> Result<()> {
        self.shared
            .send(&Frame::new(Kind::Kill, self.id, signal.to_le_bytes()))
    }

    fn name(&self) -> &str {
        self.script.trim().lines().next().unwrap_or_default()
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.shared.lock().jobs.remove(&self.id);
    }
}
