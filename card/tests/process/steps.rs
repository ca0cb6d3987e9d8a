//! A data half that is killed at each step of each message of a session, by a control half that knows where it is.
//!
//! ```text
//!   looked at (peeked) -> handled, sent -> recorded, taken off the socket, replied -> told
//!        Waiting             Handled                    Recorded                     Told
//! ```

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bluff_card::message::{DESCRIPTORS_MAX, FromData, Link, Numbered, ToData, pair, record};
use bluff_card::spec::{Attach, CardSpec, DeviceSpec, FunctionSpec, Id, SocketMode, VolumeSpec};
use bluff_vhost_user::keeper::{BOUNDS, Commit, Ledger, Progress};
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, Signal};

use crate::card::{LIMIT, kill, until};
use crate::guest::{Guest, Kind};

const BLOCKS: u64 = 64;

/// Where it dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The message after this one has come, and nobody has looked at it.
    Waiting,
    /// Its effect is there, and nobody knows.
    Handled,
    /// It is recorded and answered, and the data half does not know.
    Recorded,
    /// The data half knows.
    Told,
}

pub const STEPS: [Step; 4] = [Step::Waiting, Step::Handled, Step::Recorded, Step::Told];

/// A data half, and control's end of the socket.
struct Half {
    child: Child,
    link: Link<Numbered<ToData>, Numbered<FromData>>,
    number: u64,
}

fn id(name: &str) -> Id {
    name.parse().unwrap()
}

impl Half {
    fn start(disk: &Path) -> Self {
        let (ours, theirs) = pair().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_bluffd"))
            .args(["--data-half", "--state-dir", "/nonexistent"])
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .env("RUST_LOG", "error")
            .spawn()
            .unwrap();
        let mut half = Self {
            child,
            link: Link::new(ours),
            number: 0,
        };
        let card = CardSpec::default();
        half.say(ToData::Start { card }, Vec::new());
        let spec = VolumeSpec {
            uri: format!("file:{}", disk.display()),
            layers: Vec::new(),
        };
        let volume = id("disk0");
        half.say(ToData::OpenVolume { volume, spec }, Vec::new());
        let spec = FunctionSpec {
            attach: Attach::VhostUser,
            socket: None,
            mode: SocketMode::Server,
            device: DeviceSpec::VirtioBlk {
                volume: id("disk0"),
                config_wce: false,
            },
            queues: 2,
            poll: None,
            stop_timeout_ms: 1000,
        };
        let function = id("blk0");
        let message = ToData::AttachFunction {
            function,
            spec,
            subsystem: None,
            descriptors: 1000,
            files: 0,
        };
        half.say(message, Vec::new());
        while !matches!(half.hear().0, FromData::FunctionAttached { .. }) {}
        half
    }

    fn say(&mut self, message: ToData, descriptors: Vec<OwnedFd>) {
        self.number += 1;
        let number = self.number;
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        let sent = self.link.send(&Numbered { number, message }, &borrowed);
        assert!(sent.unwrap());
    }

    fn hear(&mut self) -> (FromData, Vec<OwnedFd>) {
        let limit = LIMIT.try_into().unwrap();
        let ready =
            rustix::event::poll(&mut [PollFd::new(&self.link, PollFlags::IN)], Some(&limit));
        assert!(ready.unwrap() > 0, "the data half says nothing");
        let (message, descriptors) = self.link.receive().unwrap().expect("it is there");
        if let FromData::Failed { error, .. } = &message.message {
            panic!("{error}");
        }
        (message.message, descriptors)
    }

    fn hand_over(&mut self, connection: &UnixStream, ledger: &Ledger) {
        let mut descriptors = vec![OwnedFd::from(connection.try_clone().unwrap())];
        let snapshot = ledger.snapshot().unwrap();
        let recorded = snapshot.is_some();
        if let Some((state, files)) = snapshot {
            descriptors.push(record::write(&state).unwrap());
            let mut files: VecDeque<_> = files.into_iter().collect();
            while !files.is_empty() {
                let part = files.drain(..files.len().min(DESCRIPTORS_MAX));
                let (keys, files) = part.unzip();
                let function = id("blk0");
                self.say(ToData::Restore { function, keys }, files);
            }
        }
        let function = id("blk0");
        self.say(ToData::Connection { function, recorded }, descriptors);
    }

    /// The next step of the session, if it comes soon.
    fn commit(&mut self) -> Option<Commit> {
        let limit = Duration::from_millis(10).try_into().unwrap();
        let mut fds = [PollFd::new(&self.link, PollFlags::IN)];
        if rustix::event::poll(&mut fds, Some(&limit)).unwrap() == 0 {
            return None;
        }
        match self.hear() {
            (FromData::Commit { .. }, mut descriptors) => {
                let bytes = record::read(descriptors.remove(0).as_fd(), BOUNDS.record).unwrap();
                Some(Commit::decode(&bytes, descriptors).unwrap())
            }
            (FromData::FrontEnd { .. }, _) => None,
            (other, _) => panic!("{other:?}"),
        }
    }

    fn record(&mut self, connection: &UnixStream, ledger: &mut Ledger, commit: Commit) {
        let seq = commit.seq;
        let progress = ledger.apply(connection.as_fd(), commit).unwrap();
        assert_eq!(progress, Progress::Done);
        let function = id("blk0");
        self.say(ToData::Committed { function, seq }, Vec::new());
    }

    fn signal(&self, signal: Signal) {
        rustix::process::kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for Half {
    fn drop(&mut self) {
        kill(self.child.id());
        let _ = self.child.wait();
    }
}

/// What a whole session came to.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The number of the last record.
    pub steps: u64,
    pub replies: u64,
}

/// A session from its first message to the last, in which the data half dies at `step` of the record numbered `at`, if any.
pub fn session(kind: Kind, death: Option<(Step, u64)>) -> Outcome {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    let file = std::fs::File::create(&disk).unwrap();
    file.set_len(BLOCKS * 4096).unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let front_end = std::thread::spawn(move || {
        let mut guest = Guest::connect(&path, kind, BLOCKS, 5);
        guest.run(|completed| completed >= 100);
        for index in 0..2 {
            guest.front.stop(index).unwrap();
        }
        assert!(guest.is_connected());
        guest
    });
    let (connection, _) = listener.accept().unwrap();
    let mut death = death;
    let mut ledger = Ledger::new(BOUNDS);
    let mut half = Half::start(&disk);
    half.hand_over(&connection, &ledger);
    // The guest keeps its connection until it is looked at.
    while !front_end.is_finished() {
        let Some(commit) = half.commit() else {
            continue;
        };
        let seq = commit.seq;
        let dies = death.take_if(|(_, at)| *at == seq);
        match dies.map(|(step, _)| step) {
            None => {
                half.record(&connection, &mut ledger, commit);
                continue;
            }
            Some(Step::Handled) => drop(commit),
            Some(Step::Recorded) => {
                let progress = ledger.apply(connection.as_fd(), commit).unwrap();
                assert_eq!(progress, Progress::Done);
            }
            Some(Step::Told) => half.record(&connection, &mut ledger, commit),
            Some(Step::Waiting) => {
                half.signal(Signal::STOP);
                half.record(&connection, &mut ledger, commit);
                // The last message has none after it.
                let limit = Duration::from_millis(50).try_into().unwrap();
                let mut fds = [PollFd::new(&connection, PollFlags::IN)];
                rustix::event::poll(&mut fds, Some(&limit)).unwrap();
            }
        }
        drop(half);
        half = Half::start(&disk);
        half.hand_over(&connection, &ledger);
    }
    let guest = front_end.join().unwrap();
    guest.check_disk(&disk);
    assert!(death.is_none(), "the session is shorter than {death:?}");
    Outcome {
        steps: ledger.seq(),
        replies: ledger.replies(),
    }
}

/// A data half dies while the kernel still has writes of it. Until these have ended nobody gets the volume's lock, so that they
/// cannot land on what is written again. `freeze` stops the file system of `disk` until its answer is dropped.
pub fn dies_with_writes_under_way<F>(dir: &Path, disk: &Path, freeze: impl FnOnce() -> Option<F>) {
    let file = std::fs::File::create(disk).unwrap();
    file.set_len(BLOCKS * 4096).unwrap();
    file.sync_all().unwrap();
    let uri = format!("file:{}", disk.display());
    let rival = bluff_file::open(bluff_block::Uri::parse(&uri).unwrap()).unwrap();
    let path = dir.join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let shared = std::sync::Arc::new(crate::guest::Shared::default());
    let seen = shared.clone();
    let front_end = std::thread::spawn(move || {
        let mut guest = Guest::connect(&path, crate::guest::KINDS[0], BLOCKS, 5);
        guest.shared = seen.clone();
        guest.run(|_| seen.stop.load(Ordering::Relaxed));
        guest
    });
    let (connection, _) = listener.accept().unwrap();
    let mut ledger = Ledger::new(BOUNDS);
    let mut half = Half::start(disk);
    half.hand_over(&connection, &ledger);
    let completed = || shared.completed.load(Ordering::Relaxed);
    while completed() < 200 {
        if let Some(commit) = half.commit() {
            half.record(&connection, &mut ledger, commit);
        }
        assert!(!front_end.is_finished());
    }

    let frozen = freeze();
    // Every slot of the guest ends up with a write that hangs, or a read of its block.
    let mut last = (completed(), Instant::now());
    until("writes that hang", || {
        if completed() != last.0 {
            last = (completed(), Instant::now());
        }
        (frozen.is_none() || last.1.elapsed() > Duration::from_millis(300)).then_some(())
    });
    half.signal(Signal::KILL);
    if frozen.is_some() {
        assert!(rival.lock().is_err(), "its writes may still land");
    }
    drop(frozen);
    until("the end of its writes", || rival.lock().ok());
    rival.unlock();
    drop(half);
    half = Half::start(disk);
    half.hand_over(&connection, &ledger);
    shared.stop.store(true, Ordering::Relaxed);
    while !front_end.is_finished() {
        if let Some(commit) = half.commit() {
            half.record(&connection, &mut ledger, commit);
        }
    }
    let guest = front_end.join().unwrap();
    assert!(guest.is_connected());
    drop(half);
    guest.check_disk(disk);
}
