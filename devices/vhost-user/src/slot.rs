//! One attachment on the loop: its connection, its session, its keeper.
//!
//! What it does for the loop is [`Attached`]; the rest is its own.

use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use bluff_attachment::{Attached, Post, Removed};
use bluff_virtio::{DeviceEvent, VirtioDevice};
use event_manager::EventSet;

use crate::attachment::{Attachment, AttachmentEvent, Listener, Negotiated, Options, Resume};
use crate::keeper::{Keeper, Progress};
use crate::limit::Limit;
use crate::session::{Done, Session, Step};
use crate::{Error, channel, reader, unix};

/// Reads from one front end in a turn of the loop, so that a flood of messages does not hold up others.
const BUDGET: usize = 64;
/// Which of a slot's descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The front end.
    Connection,
    /// The channel for requests of the back end.
    Channel,
}

/// What a device tells its slot.
pub enum News {
    /// It has done what the session asked for.
    Done(Done),
    /// Something has happened to it.
    Event(DeviceEvent),
}

/// Whether the keeper waits for the front end to read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sending {
    No,
    Blocked(u64),
}

/// One attachment.
pub struct Slot {
    name: String,
    session: Session,
    keeper: Box<dyn Keeper>,
    events: Listener,
    socket: Option<UnixStream>,
    /// Connections that are over, until the loop has forgotten them.
    retired: Vec<UnixStream>,
    sending: Sending,
    /// A front end that waits until the one before it is gone.
    next: Option<UnixStream>,
    why: Option<String>,
    /// What was last told of this connection's session.
    told: Option<Negotiated>,
    removal: Option<Removed<Box<dyn VirtioDevice>>>,
    limit: Limit,
    /// How often in a row the connection was readable and had nothing.
    vain: u8,
}

impl Attached for Slot {
    const PROTOCOL: &'static str = "vhost-user";

    type Attachment = Attachment;
    type Function = Box<dyn VirtioDevice>;
    type Resume = Resume;
    type News = News;
    type Role = Role;

    fn new(attachment: Attachment, post: Post<News>) -> Self {
        let Attachment {
            name,
            mut device,
            options,
            events,
        } = attachment;
        let Options {
            bound,
            descriptors,
            net,
            keeper,
        } = options;
        let tell = post.clone();
        device.on_event(Arc::new(move |event| tell(News::Event(event))));
        let done = Arc::new(move |done| post(News::Done(done)));
        let mut session = Session::new(device, net, bound, keeper.keeps(), done);
        session.limit_descriptors(descriptors);
        Self {
            name,
            session,
            keeper,
            events,
            socket: None,
            retired: Vec::new(),
            sending: Sending::No,
            next: None,
            why: None,
            told: None,
            removal: None,
            limit: Limit::default(),
            vain: 0,
        }
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn interests(&mut self) -> Vec<(Role, RawFd, EventSet)> {
        let mut wants = Vec::new();
        if let Some(socket) = &self.socket {
            // While a message is being worked on only the end of the connection is of interest.
            let mut set = EventSet::READ_HANG_UP;
            if self.sending != Sending::No {
                set |= EventSet::OUT;
            } else if self.session.is_ready() {
                set |= EventSet::IN;
            }
            wants.push((Role::Connection, socket.as_raw_fd(), set));
        }
        if let Some(channel) = self.session.channel() {
            let mut set = EventSet::IN;
            if channel.is_blocked() {
                set |= EventSet::OUT;
            }
            wants.push((Role::Channel, channel.socket().as_raw_fd(), set));
        }
        wants
    }

    fn bury(&mut self) {
        self.retired.clear();
        drop(self.session.take_retired());
    }

    fn is_connected(&self) -> bool {
        self.socket.is_some()
    }

    fn ready(&mut self, role: Role, set: EventSet, _buffer: &mut [u8], now: Instant) {
        match role {
            Role::Connection => self.connection_ready(set, now),
            Role::Channel => {
                let state = self.session.channel().map(|c| c.ready());
                match state {
                    None => {}
                    // Both ends of it are closed, or worse: nothing else would silence it.
                    Some(Ok(_)) if set.intersects(EventSet::HANG_UP | EventSet::ERROR) => {
                        self.session.drop_channel();
                    }
                    Some(Ok(channel::State::Open)) => {}
                    Some(Ok(channel::State::Closed)) => self.session.drop_channel(),
                    Some(Err(e)) => {
                        self.log(now, &format!("back-end channel is closed: {}", chain(&e)));
                        self.session.drop_channel();
                    }
                }
            }
        }
    }

    fn news(&mut self, news: News, now: Instant) {
        match news {
            News::Done(done) => {
                let step = self.session.done(done, now);
                self.drive(step, now);
            }
            News::Event(event) => self.device_event(event, now),
        }
    }

    fn given(&mut self, resume: Resume, now: Instant) {
        let Resume { socket, recorded } = resume;
        let Some((state, files)) = recorded else {
            return self.accepted(socket, now);
        };
        if !self.is_free() {
            self.log(now, "a second session is turned away");
            (self.events)(&self.name, AttachmentEvent::Refused);
            return;
        }
        self.socket = Some(socket);
        let step = match self.session.resume(state, files) {
            Ok(()) => Step::Ready,
            Err(e) => Step::Close(e),
        };
        (self.events)(&self.name, AttachmentEvent::Connected);
        self.drive(step, now);
    }

    fn committed(&mut self, seq: u64, now: Instant) {
        let step = self.session.committed(seq, now);
        self.drive(step, now);
    }

    fn tick(&mut self, now: Instant) {
        if self.socket.is_some() && self.session.is_poisoned() {
            self.log(now, &format!("connection is closed: {}", Error::Poisoned));
            self.hang_up(Some(Error::Poisoned.to_string()), now);
        }
    }

    fn remove(&mut self, removal: Removed<Self::Function>, now: Instant) {
        self.removal = Some(removal);
        self.next = None;
        if self.socket.is_some() {
            self.why = Some("the function is removed".into());
            let step = self.session.leave();
            self.drive(step, now);
        }
    }

    fn is_removed(&self) -> bool {
        self.removal.is_some() && self.session.is_idle()
    }

    fn finish(self) {
        let Self {
            session, removal, ..
        } = self;
        if let Some(removal) = removal {
            removal(session.into_device());
        }
    }
}

impl Slot {
    /// Whether a front end can be taken up.
    fn is_free(&self) -> bool {
        self.session.is_idle() && self.socket.is_none() && self.removal.is_none()
    }

    fn connected(&mut self, socket: UnixStream, now: Instant) {
        if let Err(e) = self.keeper.connected(socket.as_fd()) {
            self.log(now, &format!("connection is not kept: {e}"));
            return;
        }
        self.socket = Some(socket);
        self.session.connect();
        self.vain = 0;
        (self.events)(&self.name, AttachmentEvent::Connected);
        self.drive(Step::Ready, now);
    }

    fn connection_ready(&mut self, set: EventSet, now: Instant) {
        let ended = EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR;
        if let Sending::Blocked(seq) = self.sending
            && let Some(socket) = &self.socket
            && !set.intersects(ended)
        {
            match self.keeper.flush(socket.as_fd()) {
                Ok(Progress::Done) => {
                    self.sending = Sending::No;
                    let step = self.session.committed(seq, now);
                    self.drive(step, now);
                }
                Ok(_) => {}
                Err(e) => self.drive(Step::Close(e.into()), now),
            }
            return;
        }
        if self.session.is_ready() && self.sending == Sending::No {
            // What was sent before the end is read first; reading resets this.
            self.vain += 1;
            let step = match self.vain > channel::VAIN {
                true => Step::Close(Error::Unreadable),
                false => Step::Ready,
            };
            self.drive(step, now);
        } else if set.intersects(ended) {
            self.hang_up(None, now);
        }
    }

    fn accepted(&mut self, socket: UnixStream, now: Instant) {
        // A front end that comes back at once may be seen before its old connection's end is.
        if let Some(old) = &self.socket
            && unix::is_hung_up(old.as_fd())
        {
            self.hang_up(None, now);
        }
        // One that waits may have given up: it must not bar who comes after it.
        self.next = self.next.take().filter(|n| !unix::is_hung_up(n.as_fd()));
        if self.is_free() {
            self.connected(socket, now);
        } else if self.socket.is_none() && self.next.is_none() && self.removal.is_none() {
            self.next = Some(socket);
        } else {
            self.log(now, "a second front end is turned away");
            (self.events)(&self.name, AttachmentEvent::Refused);
        }
    }

    /// A device has done something, or a keeper has.
    fn drive(&mut self, step: Step, now: Instant) {
        self.steps(step, now);
        self.tell_negotiated();
    }

    fn tell_negotiated(&mut self) {
        let now = self.session.negotiated();
        if self.socket.is_some() && self.told != Some(now) {
            self.told = Some(now);
            (self.events)(&self.name, AttachmentEvent::Negotiated(now));
        }
    }

    fn steps(&mut self, mut step: Step, now: Instant) {
        let mut budget = BUDGET;
        loop {
            step = match step {
                Step::Wait => break,
                Step::Ready => {
                    if budget == 0 || self.sending != Sending::No {
                        break;
                    }
                    budget -= 1;
                    match self.read(now) {
                        Some(step) => step,
                        None => break,
                    }
                }
                Step::Commit(commit) => {
                    let Some(socket) = &self.socket else { break };
                    let seq = commit.seq;
                    match self.keeper.commit(socket.as_fd(), commit) {
                        Ok(Progress::Done) => self.session.committed(seq, now),
                        Ok(Progress::Blocked) => {
                            self.sending = Sending::Blocked(seq);
                            break;
                        }
                        Ok(Progress::Later) => break,
                        Err(e) => Step::Close(e.into()),
                    }
                }
                Step::Close(e) => {
                    self.log(now, &format!("connection is closed: {}", chain(&e)));
                    if let Some(socket) = &self.socket {
                        // A keeper may hold it too, and the front end is not to wait for that.
                        let _ = socket.shutdown(Shutdown::Both);
                    }
                    self.close(Some(chain(&e)));
                    self.session.end()
                }
                Step::Ended => {
                    self.ended(now);
                    break;
                }
            };
            if let Some(e) = self.session.take_refused() {
                self.log(now, &format!("request is refused: {}", chain(&e)));
            }
        }
    }

    /// Reads on: never past the end of a message.
    fn read(&mut self, now: Instant) -> Option<Step> {
        let socket = self.socket.as_ref()?.as_fd();
        let framer = self.session.framer();
        let read = if self.keeper.keeps() {
            reader::look(socket, framer)
        } else {
            reader::take(socket, framer)
        };
        if !matches!(read, Ok(None)) {
            self.vain = 0;
        }
        match read {
            Ok(None) => None,
            Ok(Some(piece)) if !piece.bytes.is_empty() => Some(self.session.receive(piece, now)),
            Ok(Some(_)) if !framer.bytes().is_empty() => Some(Step::Close(Error::Truncated)),
            Ok(Some(_)) => {
                self.close(None);
                Some(self.session.end())
            }
            Err(e) => Some(Step::Close(e)),
        }
    }

    /// Ends the session; `why` where that is not the front end's decision.
    fn hang_up(&mut self, why: Option<String>, now: Instant) {
        if self.socket.is_some() {
            self.close(why);
            let step = self.session.end();
            self.drive(step, now);
        }
    }

    fn close(&mut self, why: Option<String>) {
        self.retired.extend(self.socket.take());
        self.told = None;
        self.sending = Sending::No;
        self.why = why;
    }

    fn ended(&mut self, now: Instant) {
        self.keeper.ended();
        let why = self.why.take();
        // There is one still where it was to see the answers first.
        self.close(None);
        (self.events)(&self.name, AttachmentEvent::Disconnected(why));
        // None where the function is being removed.
        if let Some(next) = self.next.take() {
            self.connected(next, now);
        }
    }

    /// The device says something.
    fn device_event(&mut self, event: DeviceEvent, now: Instant) {
        match &event {
            DeviceEvent::NotifierHung(index) => {
                let line = format!(
                    "queue {index}: its call or error descriptor blocks and is given up: \
                     the driver is not notified until the front end sends another"
                );
                self.log(now, &line);
            }
            DeviceEvent::QueueBroken { queue, cause } => {
                self.log(now, &format!("queue {queue} is broken: {cause}"));
            }
            DeviceEvent::StateChanged => {
                let step = self.session.state_changed();
                return self.drive(step, now);
            }
            DeviceEvent::ConfigChanged => {}
        }
        if self.session.device_event(event) {
            self.needs_reset(now);
        }
    }

    fn needs_reset(&mut self, now: Instant) {
        self.log(now, "a ring is broken: the device needs a reset");
        (self.events)(&self.name, AttachmentEvent::NeedsReset);
        self.tell_negotiated();
        // One cause is memory that is not there any more.
        self.tick(now);
    }

    fn log(&mut self, now: Instant, line: &str) {
        self.limit.warn(now, &self.name, line);
    }
}

/// An error with what caused it, in one line.
fn chain(e: &Error) -> String {
    let mut line = e.to_string();
    let mut source = std::error::Error::source(e);
    while let Some(cause) = source {
        line = format!("{line}: {cause}");
        source = cause.source();
    }
    line
}
