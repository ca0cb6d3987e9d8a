//! One attachment on the loop: its connection and its session.
//!
//! What it does for the loop is [`Attached`]; the rest is its own.

mod keep;

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use bluff_attachment::limit::Limit;
use bluff_attachment::{Attached, Post, Removed, descriptor, stream};
use bluff_pci::{PciEvent, PciFunction};
use event_manager::EventSet;

use crate::attachment::{Attachment, AttachmentEvent, Listener, Options, Resume};
use crate::framing::MAX_FILES;
use crate::function::PciTarget;
use crate::{Error, Outgoing, Progress, Session, Ticket};
use keep::Keeping;

/// Reads from one client in a turn of the loop, so that a flood of messages does not hold up others.
const BUDGET: usize = 64;
/// How often in a row a socket may be said to be ready and have nothing. More than once is no accident: out-of-band data, for
/// one, is reported for ever and is not in the stream.
const VAIN: u8 = 8;

/// What a function tells its slot.
pub enum News {
    /// It has done what the session asked for.
    Finished(Ticket),
    /// Something has happened to it.
    Event(PciEvent),
}

/// A message that the client has not read all of.
struct Unsent {
    message: Outgoing,
    /// Bytes that went.
    sent: usize,
}

/// One attachment.
pub struct Slot {
    name: String,
    session: Session<PciTarget>,
    events: Listener,
    socket: Option<UnixStream>,
    /// Connections that are over, until the loop has forgotten them.
    retired: Vec<UnixStream>,
    unsent: Option<Unsent>,
    /// A client that waits until the one before it is gone.
    next: Option<UnixStream>,
    why: Option<String>,
    /// The version was told.
    negotiated: bool,
    removal: Option<Removed<Box<dyn PciFunction>>>,
    limit: Limit,
    /// How often in a row the connection was readable and had nothing.
    vain: u8,
    keeping: Option<Keeping>,
}

impl Attached for Slot {
    const PROTOCOL: &'static str = "vfio-user";
    const BUFFER: usize = 64 << 10;

    type Attachment = Attachment;
    type Function = Box<dyn PciFunction>;
    type Resume = Resume;
    type News = News;
    type Role = ();

    fn new(attachment: Attachment, post: Post<News>) -> Self {
        let Attachment {
            name,
            mut function,
            options,
            events,
            counters,
        } = attachment;
        let Options {
            bound,
            limits,
            keeper,
        } = options;
        let tell = post.clone();
        function.on_event(Arc::new(move |event| tell(News::Event(event))));
        let finish = Arc::new(move |ticket| post(News::Finished(ticket)));
        let mut target = PciTarget::new(function, limits, bound, finish);
        if keeper.is_some() {
            target.keep();
        }
        Self {
            name,
            session: Session::counted(target, limits, counters),
            events,
            socket: None,
            retired: Vec::new(),
            unsent: None,
            next: None,
            why: None,
            negotiated: false,
            removal: None,
            limit: Limit::default(),
            vain: 0,
            keeping: keeper.map(Keeping::new),
        }
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn interests(&mut self) -> Vec<((), RawFd, EventSet)> {
        let Some(socket) = &self.socket else {
            return Vec::new();
        };
        let mut set = EventSet::READ_HANG_UP;
        if self.is_blocked() {
            set |= EventSet::OUT;
        }
        if self.wants_input() {
            set |= EventSet::IN;
        }
        vec![((), socket.as_raw_fd(), set)]
    }

    fn bury(&mut self) {
        self.retired.clear();
    }

    fn is_connected(&self) -> bool {
        self.socket.is_some()
    }

    fn ready(&mut self, (): (), set: EventSet, buffer: &mut [u8], now: Instant) {
        let before = self.is_blocked();
        match self.keeping {
            None => self.transmit(now),
            Some(_) => self.flush(),
        }
        let moved = before && !self.is_blocked();
        let ended = EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR;
        if self.wants_input() && set.intersects(EventSet::IN | ended) {
            // What was sent before the end is read first; reading resets this.
            self.vain += u8::from(!moved);
            match self.vain > VAIN {
                true => self.hang_up(Some(Error::Unreadable.to_string())),
                false if self.keeping.is_some() => self.look(buffer, now),
                false => self.read(buffer, now),
            }
        } else if set.intersects(ended) {
            self.hang_up(None);
        }
    }

    fn news(&mut self, news: News, now: Instant) {
        match news {
            News::Finished(ticket) => self.finished(ticket, now),
            News::Event(event) => self.function_event(event, now),
        }
    }

    fn given(&mut self, resume: Resume, now: Instant) {
        match resume.recorded {
            None => self.accepted(resume.socket, now),
            Some((record, files)) => self.resumed(resume.socket, &record, &files, now),
        }
    }

    fn committed(&mut self, seq: u64, _now: Instant) {
        self.recorded(seq);
    }

    fn tick(&mut self, now: Instant) {
        if self.socket.is_some() && self.session.target().is_poisoned() {
            let why = "the client has shrunk its memory";
            self.log(now, &format!("connection is closed: {why}"));
            self.hang_up(Some(why.into()));
        }
    }

    fn remove(&mut self, removal: Removed<Self::Function>, _now: Instant) {
        self.removal = Some(removal);
        self.next = None;
        self.hang_up(Some("the function is removed".into()));
    }

    fn is_removed(&self) -> bool {
        self.removal.is_some() && self.session.is_idle()
    }

    fn finish(self) {
        if let Some(removal) = self.removal {
            removal(self.session.into_target().into_function());
        }
    }
}

impl Slot {
    /// Takes a client up, now or when the one before it has gone.
    fn accepted(&mut self, socket: UnixStream, now: Instant) {
        // A client that comes back at once may be seen before its old connection's end is.
        if let Some(old) = &self.socket
            && descriptor::is_hung_up(old.as_fd())
        {
            self.hang_up(None);
        }
        // One that waits may have given up: it must not bar who comes after it.
        let waits = |n: &UnixStream| !descriptor::is_hung_up(n.as_fd());
        self.next = self.next.take().filter(waits);
        let taken = self.socket.is_some() || self.next.is_some() || self.removal.is_some();
        match (taken, self.session.is_idle()) {
            (false, true) => self.connected(socket, now),
            (false, false) => self.next = Some(socket),
            (true, _) => {
                self.log(now, "a second client is turned away");
                (self.events)(&self.name, AttachmentEvent::Refused);
            }
        }
    }

    fn connected(&mut self, socket: UnixStream, now: Instant) {
        if let Some(keeping) = &mut self.keeping
            && let Err(e) = keeping.connected(&socket)
        {
            return self.log(now, &format!("connection is not kept: {e}"));
        }
        self.socket = Some(socket);
        self.session.connect();
        self.vain = 0;
        self.negotiated = false;
        (self.events)(&self.name, AttachmentEvent::Connected);
    }

    /// Whether the client does not read what it was sent.
    fn is_blocked(&self) -> bool {
        match &self.keeping {
            None => self.unsent.is_some(),
            Some(keeping) => keeping.is_blocked(),
        }
    }

    /// Whether the connection is to be read. What is kept is done one after the other.
    fn wants_input(&self) -> bool {
        let free = |keeping: &Keeping| keeping.is_free() && !self.session.is_busy();
        self.session.wants_input() && self.keeping.as_ref().is_none_or(free)
    }

    fn read(&mut self, buffer: &mut [u8], now: Instant) {
        for _ in 0..BUDGET {
            let Some(socket) = &self.socket else { return };
            if !self.session.wants_input() {
                return;
            }
            // Never past the end of a message: descriptors belong to the one that they came with.
            let want = self.session.missing().min(buffer.len());
            let got = match stream::take(socket.as_fd(), &mut buffer[..want], MAX_FILES) {
                Ok(got) => got,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => return self.broken(&e),
            };
            self.vain = 0;
            if got.len == 0 {
                return self.end_of_stream();
            }
            let received = self
                .session
                .receive(&buffer[..got.len], got.files, got.truncated);
            self.transmit(now);
            if let Err(e) = received {
                self.log(now, &format!("connection is closed: {e}"));
                return self.hang_up(Some(e.to_string()));
            }
        }
    }

    fn end_of_stream(&mut self) {
        let cut = self.session.is_within_message();
        self.hang_up(cut.then(|| Error::Truncated.to_string()));
    }

    /// The socket fails.
    fn broken(&mut self, e: &io::Error) {
        // It went, without having read what was sent to it last.
        let gone = [io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset];
        self.hang_up((!gone.contains(&e.kind())).then(|| e.to_string()));
    }

    /// Sends what there is to send, as far as the client reads.
    fn transmit(&mut self, now: Instant) {
        let Some(socket) = &self.socket else { return };
        let mut failed = None;
        loop {
            let next = match self.unsent.take() {
                Some(unsent) => Some(unsent),
                None => (self.session.poll_transmit()).map(|message| Unsent { message, sent: 0 }),
            };
            let Some(mut next) = next else { break };
            // In one call, and with the first byte its descriptors: QEMU gives up on a header in pieces.
            let files = match next.sent {
                0 => next.message.files.iter().map(AsFd::as_fd).collect(),
                _ => Vec::new(),
            };
            match stream::send(socket.as_fd(), &next.message.bytes[next.sent..], &files) {
                Ok(n) => {
                    next.sent += n;
                    if next.sent < next.message.bytes.len() {
                        self.unsent = Some(next);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.unsent = Some(next);
                    break;
                }
                Err(e) => {
                    failed = Some(e);
                    break;
                }
            }
        }
        self.look_after(now);
        if let Some(e) = failed {
            self.broken(&e);
        }
    }

    /// What the session has to say besides messages.
    fn look_after(&mut self, now: Instant) {
        while let Some(refused) = self.session.poll_refused() {
            let line = format!("command {} is refused: {}", refused.command, refused.error);
            self.log(now, &line);
        }
        // No function uses messages for DMA yet.
        while self.session.poll_dma().is_some() {}
        if !self.negotiated && self.session.agreed().is_some() {
            self.negotiated = true;
            (self.events)(&self.name, AttachmentEvent::Negotiated);
        }
    }

    /// A function has done what a session asked for.
    fn finished(&mut self, ticket: Ticket, now: Instant) {
        let was_idle = self.session.is_idle();
        self.session.finished(ticket);
        if !was_idle && self.session.is_idle() {
            self.ended(now);
        }
        match self.keeping {
            None => self.transmit(now),
            Some(_) => self.worked(now),
        }
    }

    /// Ends the session; `why` where that is not the client's decision.
    fn hang_up(&mut self, why: Option<String>) {
        let Some(socket) = self.socket.take() else {
            return;
        };
        if let Some(keeping) = &mut self.keeping {
            keeping.hung_up();
            // The keeper holds it too, and the client is not to wait for that.
            let _ = socket.shutdown(Shutdown::Both);
        }
        self.retired.push(socket);
        self.unsent = None;
        self.why = why;
        if self.session.end() == Progress::Done {
            self.ended(Instant::now());
        }
    }

    fn ended(&mut self, now: Instant) {
        if let Some(keeping) = &mut self.keeping {
            keeping.ended();
        }
        let why = self.why.take();
        (self.events)(&self.name, AttachmentEvent::Disconnected(why));
        // None where the function is being removed.
        if let Some(next) = self.next.take() {
            self.connected(next, now);
        }
    }

    /// The function says something.
    fn function_event(&mut self, event: PciEvent, now: Instant) {
        match event {
            PciEvent::NotifierHung(interrupt) => {
                let line = format!(
                    "{interrupt:?}: its descriptor blocks and is given up: \
                     the driver is not interrupted until the client sends another"
                );
                self.log(now, &line);
            }
            PciEvent::Failed { cause } => {
                self.log(now, &format!("the device needs a reset: {cause}"));
                (self.events)(&self.name, AttachmentEvent::Failed(cause));
                // One cause is memory that is not there any more.
                self.tick(now);
            }
        }
    }

    fn log(&mut self, now: Instant, line: &str) {
        self.limit.warn(now, &self.name, line);
    }
}
