//! What makes a session survive the death of the process that serves it.
//!
//! ```text
//!   socket --peek--> Session: effects --> Commit --> Keeper: record, consume, reply
//! ```
//!
//! A message stays in its socket until its effect and its reply are recorded. Whoever records also
//! takes the message off the socket and sends the reply, in this order and alone, so that a session
//! that is killed anywhere leaves one of two things: the message is still in the socket and the
//! record is the one before it, then the next process looks at the message again (every effect can be
//! repeated); or the record is there, then the message and its reply are the keeper's affair. The
//! records are numbered, so that one which arrives twice is not applied twice.
//!
//! [`Direct`] keeps nothing: for a session that lives and dies with its process, which may then take
//! messages off the socket as it reads them. [`Ledger`] is what a
//! control process does with the commits that it receives.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use crate::stream;

/// Names a descriptor for as long as the session uses it. Never used twice in a session.
pub type Key = u64;

/// Descriptors by key.
pub type Descriptors = BTreeMap<Key, OwnedFd>;

/// One step of a session, to be recorded as a whole.
#[derive(Debug, Default)]
pub struct Commit {
    /// The number of the record: each is one more than the one before. The first of a connection is
    /// at least 1.
    pub seq: u64,
    /// The session's state after it, as the attachment writes it; empty where nobody keeps it.
    pub state: Vec<u8>,
    /// New descriptors.
    pub files: Vec<(Key, OwnedFd)>,
    /// Descriptors that are not needed any more.
    pub dropped: Vec<Key>,
    /// How many bytes are to be taken off the socket.
    pub consume: usize,
    /// What is to be sent then; may be empty.
    pub reply: Vec<u8>,
    /// Descriptors to be sent with it.
    pub reply_files: Vec<OwnedFd>,
}

impl Commit {
    /// As one message for a seqpacket socket, with the descriptors that go along: those of `files`, then
    /// those of the reply.
    pub fn encode(&self) -> (Vec<u8>, Vec<BorrowedFd<'_>>) {
        let mut out = Vec::with_capacity(48 + self.state.len() + self.reply.len());
        let mut word = |w: u64| out.extend_from_slice(&w.to_ne_bytes());
        word(self.seq);
        word(self.consume as u64);
        word(self.state.len() as u64);
        word(self.reply.len() as u64);
        word(self.reply_files.len() as u64);
        word(self.files.len() as u64);
        word(self.dropped.len() as u64);
        self.files.iter().for_each(|(key, _)| word(*key));
        self.dropped.iter().for_each(|key| word(*key));
        out.extend_from_slice(&self.state);
        out.extend_from_slice(&self.reply);
        let files = self.files.iter().map(|(_, f)| f.as_fd());
        let files = files.chain(self.reply_files.iter().map(AsFd::as_fd));
        (out, files.collect())
    }

    /// From such a message.
    ///
    /// # Errors
    /// `InvalidData` where lengths or descriptors do not fit: the process that sent it parses hostile
    /// bytes, so it is not to be trusted.
    pub fn decode(bytes: &[u8], files: Vec<OwnedFd>) -> io::Result<Self> {
        let bad = || io::Error::from(io::ErrorKind::InvalidData);
        let mut rest = bytes;
        let mut word = || {
            let (head, tail) = rest.split_first_chunk::<8>().ok_or_else(bad)?;
            rest = tail;
            Ok::<_, io::Error>(u64::from_ne_bytes(*head))
        };
        let (seq, consume) = (word()?, word()?);
        let (state, reply) = (word()?, word()?);
        let (reply_files, new, dropped) = (word()?, word()?, word()?);
        if reply_files.checked_add(new) != Some(files.len() as u64) {
            return Err(bad());
        }
        // Bounded by the descriptors that really came.
        let keys = (0..new).map(|_| word()).collect::<Result<Vec<_>, _>>()?;
        if dropped > bytes.len() as u64 / 8 {
            return Err(bad());
        }
        let dropped = (0..dropped).map(|_| word()).collect::<Result<_, _>>()?;
        if state.checked_add(reply) != Some(rest.len() as u64) {
            return Err(bad());
        }
        let (state, reply) = rest.split_at(state as usize);
        let mut files = files.into_iter();
        Ok(Self {
            seq,
            state: state.to_vec(),
            files: keys.into_iter().zip(files.by_ref()).collect(),
            dropped,
            consume: usize::try_from(consume).map_err(|_| bad())?,
            reply: reply.to_vec(),
            reply_files: files.collect(),
        })
    }
}

/// How far a commit has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Recorded, consumed and replied.
    Done,
    /// The front end does not read its replies: call [`Keeper::flush`] when its socket is writable.
    Blocked,
    /// Somebody else does it, and will say so
    /// (`LoopHandle::committed` of the attachment).
    Later,
}

/// Who records what a session does.
///
/// # Contract
/// One commit at a time: the next one comes when the one before is done. A commit whose number is not
/// above the last one's has no effect. `socket` is the front end's.
pub trait Keeper: Send {
    /// A front end has connected.
    ///
    /// # Errors
    /// Where it cannot be kept; the connection is then closed.
    fn connected(&mut self, socket: BorrowedFd<'_>) -> io::Result<()>;

    /// Whether states and descriptors are kept. `false` saves the session from making them.
    fn keeps(&self) -> bool;

    /// Records, then consumes, then replies.
    ///
    /// # Errors
    /// Where the socket or the record fails: the session ends.
    fn commit(&mut self, socket: BorrowedFd<'_>, commit: Commit) -> io::Result<Progress>;

    /// Goes on with a reply that was blocked.
    ///
    /// # Errors
    /// As [`Keeper::commit`].
    fn flush(&mut self, socket: BorrowedFd<'_>) -> io::Result<Progress>;

    /// The session has ended: everything that was kept for it is to be dropped.
    fn ended(&mut self);
}

/// Replies that wait for the front end to read.
#[derive(Debug, Default)]
struct Outbox {
    waiting: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
}

impl Outbox {
    fn push(&mut self, reply: Vec<u8>, files: Vec<OwnedFd>) {
        if !reply.is_empty() {
            self.waiting.push_back((reply, files));
        }
    }

    fn flush(&mut self, socket: BorrowedFd<'_>) -> io::Result<Progress> {
        while let Some((bytes, files)) = self.waiting.front_mut() {
            let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
            match stream::send(socket, bytes, &borrowed) {
                Ok(n) => {
                    // They went with the first byte.
                    files.clear();
                    bytes.drain(..n);
                    if bytes.is_empty() {
                        self.waiting.pop_front();
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Progress::Blocked),
                Err(e) => return Err(e),
            }
        }
        Ok(Progress::Done)
    }
}

/// Consumes and replies in this process, and keeps nothing.
#[derive(Debug, Default)]
pub struct Direct {
    outbox: Outbox,
}

impl Keeper for Direct {
    fn connected(&mut self, _socket: BorrowedFd<'_>) -> io::Result<()> {
        self.outbox = Outbox::default();
        Ok(())
    }

    fn keeps(&self) -> bool {
        false
    }

    fn commit(&mut self, socket: BorrowedFd<'_>, commit: Commit) -> io::Result<Progress> {
        stream::discard(socket, commit.consume)?;
        self.outbox.push(commit.reply, commit.reply_files);
        self.flush(socket)
    }

    fn flush(&mut self, socket: BorrowedFd<'_>) -> io::Result<Progress> {
        self.outbox.flush(socket)
    }

    fn ended(&mut self) {
        self.outbox = Outbox::default();
    }
}

/// What a session may have recorded at most, as its attachment bounds it. Whoever sends the records may be in a host's hand.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Bytes that a step takes off the socket, and of its reply: the longest message.
    pub message: usize,
    /// Descriptors of a reply.
    pub files: usize,
    /// Descriptors that are kept at once: all that a session can name, and those of one more message.
    pub kept: usize,
    /// Bytes of a step with all that belongs to it, as [`Commit::encode`] has it.
    pub record: usize,
}

/// What is recorded of one session, and who consumes and replies on its behalf: the control half.
#[derive(Debug)]
pub struct Ledger {
    bounds: Bounds,
    seq: u64,
    state: Vec<u8>,
    files: Descriptors,
    outbox: Outbox,
    replies: u64,
}

impl Ledger {
    /// Nothing is recorded yet.
    pub fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            seq: 0,
            state: Vec::new(),
            files: Descriptors::new(),
            outbox: Outbox::default(),
            replies: 0,
        }
    }

    /// What may be recorded.
    pub fn bounds(&self) -> &Bounds {
        &self.bounds
    }

    /// The number of the last record; 0 where there is none.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// How many descriptors are kept.
    pub fn descriptors(&self) -> usize {
        self.files.len()
    }

    /// How many replies were sent or wait for the front end.
    pub fn replies(&self) -> u64 {
        self.replies
    }

    /// What another process needs to go on: the state's bytes and duplicates of its descriptors. `None`
    /// before the first record: then it starts as with a fresh connection.
    ///
    /// # Errors
    /// Where descriptors cannot be duplicated.
    pub fn snapshot(&self) -> io::Result<Option<(Vec<u8>, Descriptors)>> {
        if self.seq == 0 {
            return Ok(None);
        }
        let mut files = Descriptors::new();
        for (key, file) in &self.files {
            files.insert(*key, file.try_clone()?);
        }
        Ok(Some((self.state.clone(), files)))
    }

    /// Applies a commit, unless it was applied before.
    ///
    /// # Errors
    /// `InvalidData` where records are missing, one comes before the one before it is done, or one
    /// is over the bounds: whoever sends them may be in the host's hand. Else whatever the socket
    /// says.
    pub fn apply(&mut self, socket: BorrowedFd<'_>, commit: Commit) -> io::Result<Progress> {
        if commit.seq <= self.seq {
            return self.flush(socket);
        }
        let is_next = self.seq == 0 || commit.seq == self.seq + 1;
        // Those that a step replaces go after those that it brings.
        let fits = commit.consume <= self.bounds.message
            && commit.reply.len() <= self.bounds.message
            && commit.reply_files.len() <= self.bounds.files
            && self.files.len() + commit.files.len() <= self.bounds.kept;
        if !is_next || !fits || !self.outbox.waiting.is_empty() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.seq = commit.seq;
        self.state = commit.state;
        self.files.extend(commit.files);
        for key in &commit.dropped {
            self.files.remove(key);
        }
        // From here on the message is done, whoever dies.
        stream::discard(socket, commit.consume)?;
        self.replies += u64::from(!commit.reply.is_empty());
        self.outbox.push(commit.reply, commit.reply_files);
        self.flush(socket)
    }

    /// Goes on with a reply that was blocked.
    ///
    /// # Errors
    /// Whatever the socket says.
    pub fn flush(&mut self, socket: BorrowedFd<'_>) -> io::Result<Progress> {
        self.outbox.flush(socket)
    }

    fn start_over(&mut self) {
        *self = Self::new(self.bounds);
    }
}

/// A ledger in the same process, shared with whoever starts the session again.
impl Keeper for Arc<Mutex<Ledger>> {
    fn connected(&mut self, _socket: BorrowedFd<'_>) -> io::Result<()> {
        lock(self).start_over();
        Ok(())
    }

    fn keeps(&self) -> bool {
        true
    }

    fn commit(&mut self, socket: BorrowedFd<'_>, commit: Commit) -> io::Result<Progress> {
        lock(self).apply(socket, commit)
    }

    fn flush(&mut self, socket: BorrowedFd<'_>) -> io::Result<Progress> {
        lock(self).flush(socket)
    }

    fn ended(&mut self) {
        lock(self).start_over();
    }
}

fn lock(ledger: &Arc<Mutex<Ledger>>) -> std::sync::MutexGuard<'_, Ledger> {
    // A panic elsewhere leaves whole records: every field is set before anything can fail.
    ledger.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::descriptor::sealed_memory;

    const BOUNDS: Bounds = Bounds {
        message: 5000,
        files: 8,
        kept: 3,
        record: 1 << 20,
    };

    fn commit(seq: u64) -> Commit {
        Commit {
            seq,
            state: vec![1, 2, 3],
            files: vec![(9, sealed_memory(c"x", 1).unwrap())],
            dropped: vec![4, 5],
            consume: 3,
            reply: b"reply".to_vec(),
            reply_files: vec![sealed_memory(c"x", 1).unwrap()],
        }
    }

    #[test]
    fn commits_survive_the_wire_and_lies_are_refused() {
        let sent = commit(7);
        let (bytes, files) = sent.encode();
        let own = |n: usize| -> Vec<OwnedFd> {
            let files = files.iter().take(n);
            files.map(|f| f.try_clone_to_owned().unwrap()).collect()
        };
        let got = Commit::decode(&bytes, own(2)).unwrap();
        assert_eq!((got.seq, got.consume), (7, 3));
        assert_eq!((got.state, got.reply), (vec![1, 2, 3], b"reply".to_vec()));
        assert_eq!((got.files[0].0, got.dropped), (9, vec![4, 5]));
        assert_eq!(got.reply_files.len(), 1);
        assert!(Commit::decode(&bytes, own(1)).is_err());
        for cut in 0..bytes.len() {
            assert!(Commit::decode(&bytes[..cut], own(2)).is_err(), "{cut}");
        }
        for word in 2..7 {
            let mut lie = bytes.clone();
            lie[8 * word..8 * word + 8].copy_from_slice(&u64::MAX.to_ne_bytes());
            assert!(Commit::decode(&lie, own(2)).is_err(), "{word}");
        }
    }

    #[test]
    fn a_commit_that_arrives_twice_is_applied_once() {
        let (front, back) = UnixStream::pair().unwrap();
        stream::send(front.as_fd(), b"abcdef", &[]).unwrap();
        let mut ledger = Ledger::new(BOUNDS);
        for _ in 0..2 {
            assert_eq!(
                ledger.apply(back.as_fd(), commit(1)).unwrap(),
                Progress::Done
            );
        }
        assert_eq!((ledger.seq(), ledger.replies()), (1, 1));
        let mut buf = [0; 64];
        let rest = stream::peek(back.as_fd(), &mut buf, 0).unwrap();
        assert_eq!(&buf[..rest.len], b"def");
        let reply = stream::take(front.as_fd(), &mut buf, 8).unwrap();
        assert_eq!((&buf[..reply.len], reply.files.len()), (&b"reply"[..], 1));
        assert!(
            stream::take(front.as_fd(), &mut buf, 8).is_err(),
            "one reply"
        );
        assert!(ledger.apply(back.as_fd(), commit(3)).is_err(), "a gap");
        let lies: [fn(&mut Commit); 4] = [
            |c| c.consume = usize::MAX,
            |c| c.reply = vec![0; 5001],
            |c| c.reply_files = (0..9).map(|_| sealed_memory(c"x", 1).unwrap()).collect(),
            // With the one that is kept already.
            |c| {
                c.files = (10..13)
                    .map(|k| (k, sealed_memory(c"x", 1).unwrap()))
                    .collect()
            },
        ];
        for lie in lies {
            let mut next = commit(2);
            lie(&mut next);
            assert!(ledger.apply(back.as_fd(), next).is_err());
        }
        assert_eq!(ledger.seq(), 1);
    }

    #[test]
    fn a_reply_waits_for_a_front_end_that_does_not_read() {
        let (front, back) = UnixStream::pair().unwrap();
        while stream::send(back.as_fd(), &[0; 1000], &[]).is_ok() {}
        stream::send(front.as_fd(), b"abc", &[]).unwrap();
        let mut direct = Direct::default();
        assert_eq!(
            direct.commit(back.as_fd(), commit(1)).unwrap(),
            Progress::Blocked
        );
        assert_eq!(direct.flush(back.as_fd()).unwrap(), Progress::Blocked);
        let mut buf = vec![0; 1 << 16];
        let mut seen = Vec::new();
        let mut files = 0;
        loop {
            while let Ok(got) = stream::take(front.as_fd(), &mut buf, 8) {
                seen.extend_from_slice(&buf[..got.len]);
                files += got.files.len();
            }
            if direct.flush(back.as_fd()).unwrap() == Progress::Done {
                break;
            }
        }
        while let Ok(got) = stream::take(front.as_fd(), &mut buf, 8) {
            seen.extend_from_slice(&buf[..got.len]);
            files += got.files.len();
        }
        assert!(seen.ends_with(b"reply"));
        assert_eq!(files, 1);
    }
}
