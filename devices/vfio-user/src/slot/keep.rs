//! A slot whose session is recorded: a message stays in its socket until its effect and its reply are, and whoever records takes it off
//! and replies.
//!
//! ```text
//!   look --> receive --(busy: finished)--> commit --> keeper --> committed --> look
//! ```

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use bluff_attachment::keeper::{Descriptors, Keeper, Progress};
use bluff_attachment::stream;

use super::{BUDGET, Slot};
use crate::Error;
use crate::attachment::AttachmentEvent;
use crate::framing::MAX_FILES;
use crate::record::{Record, Recorder};
use crate::spec::HEADER_LEN;

/// How far the present message has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// None is.
    Free,
    /// The session works on one of so many bytes.
    Working(usize),
    /// The step of this number is being recorded, or its reply waits for a client that does not read.
    Committing { seq: u64, blocked: bool },
}

/// What a recorded slot has besides.
pub(super) struct Keeping {
    keeper: Box<dyn Keeper>,
    recorder: Recorder,
    phase: Phase,
    /// Why the connection is closed when the last step is recorded.
    closing: Option<String>,
}

impl Keeping {
    pub(super) fn new(keeper: Box<dyn Keeper>) -> Self {
        Self {
            keeper,
            recorder: Recorder::default(),
            phase: Phase::Free,
            closing: None,
        }
    }

    pub(super) fn connected(&mut self, socket: &UnixStream) -> io::Result<()> {
        self.recorder = self.recorder.next();
        self.keeper.connected(socket.as_fd())
    }

    pub(super) fn is_free(&self) -> bool {
        self.phase == Phase::Free
    }

    pub(super) fn is_blocked(&self) -> bool {
        matches!(self.phase, Phase::Committing { blocked: true, .. })
    }

    pub(super) fn hung_up(&mut self) {
        self.phase = Phase::Free;
        self.closing = None;
    }

    pub(super) fn ended(&mut self) {
        self.keeper.ended();
    }
}

impl Slot {
    /// Takes up a connection in mid-session.
    pub(super) fn resumed(
        &mut self,
        socket: UnixStream,
        record: &Record,
        files: &Descriptors,
        now: Instant,
    ) {
        let free = self.session.is_idle() && self.socket.is_none() && self.removal.is_none();
        let Some(keeping) = self.keeping.as_mut().filter(|_| free) else {
            self.log(now, "a second session is turned away");
            return (self.events)(&self.name, AttachmentEvent::Refused);
        };
        self.socket = Some(socket);
        (self.vain, self.negotiated) = (0, false);
        (self.events)(&self.name, AttachmentEvent::Connected);
        match self.session.resume(record, files) {
            Ok(()) => {
                keeping.recorder = Recorder::resumed(record, &self.session);
                self.look_after(now);
            }
            Err(e) => {
                self.log(now, &format!("session is not taken up: {e}"));
                self.hang_up(Some(e.to_string()));
            }
        }
    }

    /// Looks at the next message, and has the session do what it says.
    pub(super) fn look(&mut self, buffer: &mut [u8], now: Instant) {
        for _ in 0..BUDGET {
            let Some(socket) = self.socket.as_ref().filter(|_| self.wants_input()) else {
                return;
            };
            let mut want = self.session.missing();
            if !self.session.is_within_message() {
                match stream::peek(socket.as_fd(), &mut buffer[..HEADER_LEN], 0) {
                    Ok(head) if head.len == HEADER_LEN => {
                        let size = buffer[4..8].try_into().expect("four bytes");
                        // Of one that is too large the header is enough.
                        let size = u32::from_ne_bytes(size) as usize;
                        want = size.clamp(HEADER_LEN, buffer.len() - 1);
                    }
                    Ok(_) => {}
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                    Err(e) => return self.broken(&e),
                }
            }
            want = want.min(buffer.len() - 1);
            // One byte more: a look goes on to the next bytes that carry descriptors, but for them it ends behind these. So where it
            // is that long, the descriptors are not those of this message.
            let mut got = match stream::peek(socket.as_fd(), &mut buffer[..=want], MAX_FILES) {
                Ok(got) => got,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => return self.broken(&e),
            };
            self.vain = 0;
            if got.len == 0 {
                return self.end_of_stream();
            }
            if got.len > want {
                got = stream::Received {
                    len: want,
                    ..stream::Received::default()
                };
            }
            let received = self
                .session
                .receive(&buffer[..got.len], got.files, got.truncated);
            if let Some(keeping) = &mut self.keeping {
                keeping.phase = Phase::Working(got.len);
                keeping.closing = received.as_ref().err().map(Error::to_string);
            }
            if let Err(e) = received {
                self.log(now, &format!("connection is closed: {e}"));
            }
            self.worked(now);
        }
    }

    /// Records the present message, where the session is done with it.
    pub(super) fn worked(&mut self, now: Instant) {
        self.look_after(now);
        let (Some(keeping), Some(socket)) = (&mut self.keeping, &self.socket) else {
            return;
        };
        let Phase::Working(consume) = keeping.phase else {
            return;
        };
        if self.session.is_busy() {
            return;
        }
        let reply = self.session.poll_transmit();
        let commit = keeping.recorder.commit(&self.session, consume, reply);
        let seq = keeping.recorder.seq();
        let progress = commit.and_then(|commit| keeping.keeper.commit(socket.as_fd(), commit));
        let blocked = match progress {
            Ok(Progress::Blocked) => true,
            Ok(Progress::Done | Progress::Later) => false,
            Err(e) => return self.broken(&e),
        };
        keeping.phase = Phase::Committing { seq, blocked };
        if matches!(progress, Ok(Progress::Done)) {
            self.recorded(seq);
        }
    }

    /// Goes on with a reply that the client has not read.
    pub(super) fn flush(&mut self) {
        let (Some(keeping), Some(socket)) = (&mut self.keeping, &self.socket) else {
            return;
        };
        let Phase::Committing { seq, blocked: true } = keeping.phase else {
            return;
        };
        match keeping.keeper.flush(socket.as_fd()) {
            Ok(Progress::Done) => self.recorded(seq),
            Ok(_) => {}
            Err(e) => self.broken(&e),
        }
    }

    /// The step numbered `seq` is recorded, and its reply is sent or on its way. Of no effect for any but the last.
    pub(super) fn recorded(&mut self, seq: u64) {
        let Some(keeping) = &mut self.keeping else {
            return;
        };
        match keeping.phase {
            Phase::Committing { seq: last, .. } if last == seq => keeping.phase = Phase::Free,
            _ => return,
        }
        if let Some(why) = keeping.closing.take() {
            self.hang_up(Some(why));
        }
    }
}
