//! The loop of sessions, with slots that count the bytes of one connection.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use bluff_attachment::{Attached, Post, Removed, SessionLoop};
use event_manager::EventSet;

const PATIENCE: Duration = Duration::from_secs(20);

/// What happens to a slot.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Bytes(usize),
    News(u32),
    Committed(u64),
    Gone,
}

struct Counter {
    name: &'static str,
    seen: Sender<Seen>,
    /// Who asks for the way to the slot.
    post: Sender<Post<u32>>,
}

struct Slot {
    counter: Counter,
    socket: Option<UnixStream>,
    retired: Option<UnixStream>,
    removal: Option<Removed<&'static str>>,
}

impl Slot {
    fn see(&self, seen: Seen) {
        let _ = self.counter.seen.send(seen);
    }
}

impl Attached for Slot {
    const PROTOCOL: &'static str = "counter";
    const BUFFER: usize = 4;

    type Attachment = Counter;
    type Function = &'static str;
    type Resume = UnixStream;
    type News = u32;
    type Role = ();

    fn new(counter: Counter, post: Post<u32>) -> Self {
        let _ = counter.post.send(post);
        Self {
            counter,
            socket: None,
            retired: None,
            removal: None,
        }
    }

    fn name(&self) -> &str {
        self.counter.name
    }

    fn interests(&mut self) -> Vec<((), RawFd, EventSet)> {
        let socket = self.socket.iter();
        socket.map(|s| ((), s.as_raw_fd(), EventSet::IN)).collect()
    }

    fn bury(&mut self) {
        self.retired = None;
    }

    fn is_connected(&self) -> bool {
        self.socket.is_some()
    }

    fn ready(&mut self, (): (), _set: EventSet, buffer: &mut [u8], _now: Instant) {
        match self.socket.as_mut().map(|s| s.read(buffer)) {
            Some(Ok(n)) if n > 0 => self.see(Seen::Bytes(n)),
            _ => {
                self.retired = self.socket.take();
                self.see(Seen::Gone);
            }
        }
    }

    fn news(&mut self, news: u32, _now: Instant) {
        self.see(Seen::News(news));
    }

    fn given(&mut self, socket: UnixStream, _now: Instant) {
        self.socket = Some(socket);
    }

    fn committed(&mut self, seq: u64, _now: Instant) {
        self.see(Seen::Committed(seq));
    }

    fn tick(&mut self, _now: Instant) {}

    fn remove(&mut self, removal: Removed<&'static str>, _now: Instant) {
        self.removal = Some(removal);
    }

    /// Not before its host has gone.
    fn is_removed(&self) -> bool {
        self.removal.is_some() && self.socket.is_none()
    }

    fn finish(self) {
        if let Some(removal) = self.removal {
            removal(self.counter.name);
        }
    }
}

/// What a test has of a slot: what it saw, and the way to it.
type Ends = (Receiver<Seen>, Receiver<Post<u32>>);

fn counter(name: &'static str) -> (Counter, Ends) {
    let ((seen, sees), (post, posts)) = (channel(), channel());
    (Counter { name, seen, post }, (sees, posts))
}

fn connect(sessions: &SessionLoop<Slot>, name: &str) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    sessions.handle().connection(name, theirs);
    ours
}

#[test]
fn each_slot_hears_what_is_for_it() {
    let sessions = SessionLoop::<Slot>::spawn().unwrap();
    let [a, b] = ["a", "b"].map(|name| {
        let (slot, ends) = counter(name);
        sessions.handle().add(slot).unwrap();
        ends
    });
    let mut host = connect(&sessions, "a");
    host.write_all(&[0; 6]).unwrap();
    // The buffer bounds a read.
    for n in [4, 2] {
        assert_eq!(a.0.recv_timeout(PATIENCE), Ok(Seen::Bytes(n)));
    }
    let post = b.1.recv_timeout(PATIENCE).unwrap();
    post(7);
    sessions.handle().committed("b", 9);
    sessions.handle().committed("nobody", 10);
    assert_eq!(b.0.recv_timeout(PATIENCE), Ok(Seen::News(7)));
    assert_eq!(b.0.recv_timeout(PATIENCE), Ok(Seen::Committed(9)));
    // A connection to nobody is closed.
    assert_eq!(connect(&sessions, "nobody").read(&mut [0]).unwrap(), 0);
    drop(host);
    assert_eq!(a.0.recv_timeout(PATIENCE), Ok(Seen::Gone));
    drop(sessions);
    assert_eq!(b.0.try_iter().count(), 0);
    // Who reaches for a loop that has ended is not held up.
    post(8);
}

#[test]
fn a_name_is_free_when_its_function_has_come_back() {
    let sessions = SessionLoop::<Slot>::spawn().unwrap();
    let handle = sessions.handle();
    let (first, ends) = counter("a");
    handle.add(first).unwrap();
    let taken = handle.add(counter("a").0).unwrap_err();
    assert_eq!(taken.kind(), ErrorKind::AlreadyExists);
    let host = connect(&sessions, "a");
    let (tx, rx) = channel();
    handle.remove("a", move |function| tx.send(function).unwrap());
    // It still has its host.
    let taken = handle.add(counter("a").0).unwrap_err();
    assert_eq!(taken.kind(), ErrorKind::AlreadyExists);
    assert!(rx.try_recv().is_err());
    drop(host);
    assert_eq!(rx.recv_timeout(PATIENCE), Ok("a"));
    let (second, other) = counter("a");
    handle.add(second).unwrap();
    // Not even by the way to the one before it.
    ends.1.recv_timeout(PATIENCE).unwrap()(1);
    handle.committed("a", 2);
    assert_eq!(other.0.recv_timeout(PATIENCE), Ok(Seen::Committed(2)));
    // Nobody is there to be removed: nobody is told.
    let (tx, rx) = channel::<()>();
    handle.remove("b", move |_| drop(tx));
    let dropped = Err(RecvTimeoutError::Disconnected);
    assert_eq!(rx.recv_timeout(PATIENCE), dropped);
    drop(sessions);
    let late = handle.add(counter("c").0);
    assert!(late.is_err_and(|e| e.kind() == ErrorKind::BrokenPipe));
}
