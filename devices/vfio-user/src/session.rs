//! A session with a client, as a state machine without I/O.
//!
//! ```text
//!            connect          VERSION            unmap, reset, write that take time
//!   Idle ------------> Fresh ---------> Ready <-----------------------------> Busy
//!    ^                   |                 |            finished               |
//!    |                   `---- bad ----.   | bad stream                        |
//!    | finished                        v   v                                   |
//!   Ending <-------------------------- Failed                                  |
//!    ^-------------------------------------------------------- end ------------'
//! ```
//!
//! Commands are served in the order they came, one after another (vfio-user, "Command Concurrency"): while one is not
//! answered, later ones wait here, and when enough do, in the socket. Replies to commands of ours are taken in at once, or an unmap
//! that waits for a DMA message would wait for ever.

mod access;
mod info;
mod irqs;
mod memory;
mod resume;

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use zerocopy::IntoBytes;

use crate::capabilities::{Agreed, negotiate};
use crate::dma::{Dma, DmaDone};
use crate::framing::{self, Framer, Kind, Message};
use crate::mappings::Mappings;
use crate::request::Request;
use crate::spec::{self, RawVersion, command, flag};
use crate::target::{Progress, Target, Ticket};
use crate::{Counters, Errno, Error, Limits, Mapping};

/// Commands that wait here before no more are read.
const MAX_BACKLOG: usize = 64;
/// Descriptors that come with them.
const MAX_BACKLOG_FILES: usize = 64;
/// Refused commands that are remembered for the log.
const MAX_REFUSED: usize = 8;

/// A message to send, in one piece: QEMU gives up where it reads less than a header at once.
#[derive(Debug)]
pub struct Outgoing {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The descriptors to send along with the first byte, at most [`MAX_FILES`](crate::framing::MAX_FILES).
    pub files: Vec<Arc<OwnedFd>>,
}

/// A command that was refused, for the log.
#[derive(Debug)]
pub struct Refused {
    /// Its number.
    pub command: u16,
    /// Why.
    pub error: Error,
}

/// The payload of a reply.
#[derive(Debug, Default)]
struct Reply {
    payload: Vec<u8>,
    files: Vec<Arc<OwnedFd>>,
}

impl Reply {
    fn of(parts: &[&[u8]]) -> Self {
        Self {
            payload: parts.concat(),
            files: Vec::new(),
        }
    }
}

/// An answer to a command.
enum Answer {
    Now(Reply),
    Later(Ticket, Later),
}

/// What is left of a command that waits for the target.
#[derive(Debug)]
enum Later {
    /// Its reply.
    Reply(Reply),
    /// Writes that come after the one that is not settled, and the reply.
    Writes(access::Writes),
}

/// To what a reply goes.
#[derive(Clone, Copy, Debug)]
struct Asked {
    id: u16,
    command: u16,
    /// A reply is wanted.
    wanted: bool,
}

#[derive(Debug)]
enum State {
    /// No client.
    Idle,
    /// A client that has to say its version first.
    Fresh,
    /// The next command can be served.
    Ready(Agreed),
    /// A command is not answered yet.
    Busy {
        agreed: Agreed,
        ticket: Ticket,
        asked: Asked,
        later: Later,
    },
    /// Nothing of the client is looked at any more. The error is taken out when it is told.
    Failed(Option<Error>),
    /// The client has gone; the target still holds something of it.
    Ending(Ticket),
}

/// Sessions with the clients of one function, one client after another.
///
/// Whoever drives it, for a connection: [`connect`](Self::connect); then [`receive`](Self::receive) what the socket gives while
/// [`wants_input`](Self::wants_input), and send what [`poll_transmit`](Self::poll_transmit) gives; at the end of the stream, or when `receive`
/// fails, send what there is to send as far as the socket takes it, close the socket, and [`end`](Self::end). After each call look at
/// [`poll_dma`](Self::poll_dma), [`poll_refused`](Self::poll_refused) and [`poll_timeout`](Self::poll_timeout).
#[derive(Debug)]
pub struct Session<T> {
    target: T,
    limits: Limits,
    state: State,
    framer: Framer,
    backlog: VecDeque<Message>,
    outgoing: VecDeque<Outgoing>,
    outgoing_bytes: usize,
    next_ticket: u64,
    mappings: Mappings,
    dma: Dma,
    refused: VecDeque<Refused>,
    /// How many of the commands in the backlog have waited behind another one.
    delayed: usize,
    counters: Arc<Counters>,
}

impl<T: Target> Session<T> {
    /// Sessions with the clients of `target`.
    ///
    /// # Panics
    /// Where the limits have no page size.
    pub fn new(target: T, limits: Limits) -> Self {
        Self::counted(target, limits, Arc::default())
    }

    /// As [`Session::new`], with counters that somebody else reads.
    ///
    /// # Panics
    /// As [`Session::new`].
    pub fn counted(target: T, limits: Limits, counters: Arc<Counters>) -> Self {
        assert!(limits.pgsizes != 0, "no page size");
        Self {
            target,
            limits,
            state: State::Idle,
            framer: Framer::new(limits.max_message()),
            backlog: VecDeque::new(),
            outgoing: VecDeque::new(),
            outgoing_bytes: 0,
            next_ticket: 0,
            mappings: Mappings::default(),
            dma: Dma::default(),
            refused: VecDeque::new(),
            delayed: 0,
            counters,
        }
    }

    /// How many messages there were, with all clients.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// The function; its clients have to be gone.
    pub fn into_target(self) -> T {
        self.target
    }

    /// The function.
    pub fn target(&self) -> &T {
        &self.target
    }

    /// The function.
    pub fn target_mut(&mut self) -> &mut T {
        &mut self.target
    }

    /// Whether a client may come: there is none, and nothing is left of the last one.
    pub fn is_idle(&self) -> bool {
        matches!(self.state, State::Idle)
    }

    /// Whether a command waits for the target.
    pub fn is_busy(&self) -> bool {
        matches!(self.state, State::Busy { .. })
    }

    /// Whether a message has begun and is not whole: a stream that ends now is cut.
    pub fn is_within_message(&self) -> bool {
        self.framer.is_within_message()
    }

    /// What has come of the message that is not whole yet.
    pub(crate) fn partial(&self) -> (&[u8], &[OwnedFd], bool) {
        self.framer.partial()
    }

    /// How far may be read without reading past a message; see [`Framer::missing`].
    pub fn missing(&self) -> usize {
        self.framer.missing()
    }

    /// What is mapped, by address.
    pub fn mappings(&self) -> impl Iterator<Item = &Mapping> {
        self.mappings.iter()
    }

    /// What was agreed on with the client.
    pub fn agreed(&self) -> Option<Agreed> {
        match &self.state {
            State::Ready(agreed) | State::Busy { agreed, .. } => Some(*agreed),
            _ => None,
        }
    }

    /// A client has come.
    ///
    /// # Panics
    /// Where the session is not idle.
    pub fn connect(&mut self) {
        assert!(self.is_idle(), "a client beside another one");
        self.state = State::Fresh;
    }

    /// Whether the socket is to be read: not while more waits here than is good. What comes all the same is taken.
    pub fn wants_input(&self) -> bool {
        let serving = matches!(
            self.state,
            State::Fresh | State::Ready(_) | State::Busy { .. }
        );
        let bytes: usize = self.backlog.iter().map(|m| m.payload.len()).sum();
        let files: usize = self.backlog.iter().map(|m| m.files.len()).sum();
        serving
            && self.outgoing_bytes < self.limits.max_message()
            && self.backlog.len() < MAX_BACKLOG
            && bytes < self.limits.max_message()
            && files < MAX_BACKLOG_FILES
    }

    /// Takes what one read of the socket gave. `truncated`: the kernel has dropped descriptors.
    ///
    /// # Errors
    /// The client cannot be understood, or no version was agreed on: the session is to be ended. Said once; what comes
    /// afterwards is dropped.
    pub fn receive(
        &mut self,
        bytes: &[u8],
        files: Vec<OwnedFd>,
        truncated: bool,
    ) -> Result<(), Error> {
        if !matches!(
            self.state,
            State::Fresh | State::Ready(_) | State::Busy { .. }
        ) {
            return Ok(());
        }
        let mut whole = VecDeque::new();
        let pushed = self.framer.push(bytes, files, truncated, &mut whole);
        for message in whole {
            self.counters.received(message.header.command);
            match message.header.kind {
                Kind::Command { .. } => self.backlog.push_back(message),
                Kind::Reply { error } => {
                    let (id, command) = (message.header.id, message.header.command);
                    if let Err(e) = self.dma.reply(id, command, error, &message.payload) {
                        // After what came before it.
                        self.advance();
                        self.fail(e);
                        break;
                    }
                }
            }
        }
        self.advance();
        if let Err(e) = pushed {
            self.fail(e);
        }
        match &mut self.state {
            State::Failed(error) => error.take().map_or(Ok(()), Err),
            _ => Ok(()),
        }
    }

    fn fail(&mut self, error: Error) {
        if !matches!(self.state, State::Failed(_)) {
            self.state = State::Failed(Some(error));
            self.backlog.clear();
        }
    }

    /// The next message to send.
    pub fn poll_transmit(&mut self) -> Option<Outgoing> {
        if let Some(next) = self.outgoing.pop_front() {
            self.outgoing_bytes -= next.bytes.len();
            self.advance();
            self.counters.sent(&next.bytes);
            return Some(next);
        }
        let max = self.agreed().map_or(0, |a| self.max_dma(&a));
        let bytes = self.dma.transmit(max)?;
        self.counters.sent(&bytes);
        Some(Outgoing {
            bytes,
            files: Vec::new(),
        })
    }

    /// A ticket that the target was given: what it stands for is over. One that is of no more use is ignored.
    pub fn finished(&mut self, ticket: Ticket) {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Busy {
                agreed,
                ticket: waiting,
                asked,
                later,
            } if waiting == ticket => {
                self.state = State::Ready(agreed);
                self.delayed = self.backlog.len();
                let answer = match later {
                    Later::Reply(reply) => Ok(Answer::Now(reply)),
                    Later::Writes(writes) => self.settled(writes),
                };
                self.answer(asked, answer);
                self.advance();
            }
            State::Ending(waiting) if waiting == ticket => {}
            other => self.state = other,
        }
    }

    /// The client has gone, or is to go. When it is [`Progress::Done`], or the session [idle](Self::is_idle) later, the next one may come.
    pub fn end(&mut self) -> Progress {
        match self.state {
            State::Idle => return Progress::Done,
            State::Ending(_) => return Progress::Pending,
            _ => {}
        }
        self.framer = Framer::new(self.limits.max_message());
        self.backlog.clear();
        self.delayed = 0;
        self.outgoing.clear();
        self.outgoing_bytes = 0;
        self.mappings.clear();
        self.dma.end();
        let ticket = self.ticket();
        let progress = self.target.disconnected(ticket);
        self.state = match progress {
            Progress::Done => State::Idle,
            Progress::Pending => State::Ending(ticket),
        };
        progress
    }

    /// A command that was refused since the last call, for a log with a limit. Of many at once some are forgotten.
    pub fn poll_refused(&mut self) -> Option<Refused> {
        self.refused.pop_front()
    }

    /// When to call [`Session::handle_timeout`].
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.dma.deadline()
    }

    /// Time has passed: DMA messages without an answer have failed.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.dma.timeout(now);
    }

    /// Reads memory of the client by `DMA_READ`; the answer comes from [`Session::poll_dma`], with `tag`.
    ///
    /// # Errors
    /// `EFAULT` where it is not mapped as readable; `ENOTSUP` where the client takes no such messages; `EBUSY` where too much is
    /// under way; `EINVAL` for no bytes.
    pub fn dma_read(
        &mut self,
        tag: u64,
        address: u64,
        len: usize,
        now: Instant,
    ) -> Result<(), Errno> {
        self.check_dma(address, len, |m| m.read)?;
        self.dma
            .read(tag, address, len, now + self.limits.dma_timeout)
    }

    /// Writes memory of the client by `DMA_WRITE`; as [`Session::dma_read`]. The data is there when the operation is
    /// over and not before, so interrupts about it wait until then.
    ///
    /// # Errors
    /// As [`Session::dma_read`].
    pub fn dma_write(
        &mut self,
        tag: u64,
        address: u64,
        data: Vec<u8>,
        now: Instant,
    ) -> Result<(), Errno> {
        self.check_dma(address, data.len(), |m| m.write)?;
        self.dma
            .write(tag, address, data, now + self.limits.dma_timeout)
    }

    /// A DMA operation that is over.
    pub fn poll_dma(&mut self) -> Option<DmaDone> {
        self.dma.done()
    }

    fn check_dma(
        &self,
        address: u64,
        len: usize,
        usable: impl Fn(&Mapping) -> bool,
    ) -> Result<(), Errno> {
        let agreed = self.agreed().ok_or(Errno::NOTCONN)?;
        if len == 0 {
            return Err(Errno::INVAL);
        }
        if !self.mappings.covers(address, len as u64, usable) {
            return Err(Errno::FAULT);
        }
        if self.max_dma(&agreed) == 0 {
            return Err(Errno::NOTSUP);
        }
        Ok(())
    }

    /// Bytes of data in one DMA message: what both sides take.
    fn max_dma(&self, agreed: &Agreed) -> usize {
        agreed.client_xfer.min(self.limits.max_data_xfer_size) as usize
    }

    fn ticket(&mut self) -> Ticket {
        self.next_ticket += 1;
        Ticket(self.next_ticket)
    }

    fn send(&mut self, message: Option<Outgoing>) {
        if let Some(message) = message {
            self.outgoing_bytes += message.bytes.len();
            self.outgoing.push_back(message);
        }
    }

    /// Serves what waits, as long as the client reads the replies.
    fn advance(&mut self) {
        while matches!(self.state, State::Fresh | State::Ready(_))
            && self.outgoing_bytes < self.limits.max_message()
            && let Some(message) = self.backlog.pop_front()
        {
            match self.delayed.checked_sub(1) {
                Some(less) => self.delayed = less,
                None => self.target.begin(),
            }
            self.handle(message);
        }
    }

    fn handle(&mut self, message: Message) {
        let framing::Header {
            id, command, kind, ..
        } = message.header;
        let asked = Asked {
            id,
            command,
            wanted: kind == Kind::Command { no_reply: false },
        };
        let answer = self.serve(message);
        self.answer(asked, answer);
    }

    fn answer(&mut self, asked: Asked, answer: Result<Answer, Error>) {
        let Asked {
            id,
            command,
            wanted,
        } = asked;
        let error = match answer {
            Ok(Answer::Now(reply)) => {
                let message = wanted.then(|| Outgoing {
                    bytes: framing::message(id, command, flag::REPLY, 0, &[&reply.payload]),
                    files: reply.files,
                });
                return self.send(message);
            }
            Ok(Answer::Later(ticket, later)) => {
                let State::Ready(agreed) = self.state else {
                    unreachable!("served in another state");
                };
                self.state = State::Busy {
                    agreed,
                    ticket,
                    asked,
                    later,
                };
                return;
            }
            Err(error) => error,
        };
        if wanted {
            // "If an error occurs, the reply message must only include the reply header."
            let (flags, errno) = (flag::REPLY | flag::ERROR, error.errno().get() as u32);
            self.send(Some(Outgoing {
                bytes: framing::message(id, command, flags, errno, &[]),
                files: Vec::new(),
            }));
        }
        if matches!(self.state, State::Fresh) {
            self.fail(error);
        } else if self.refused.len() < MAX_REFUSED {
            self.refused.push_back(Refused { command, error });
        }
    }

    fn serve(&mut self, message: Message) -> Result<Answer, Error> {
        let State::Ready(agreed) = self.state else {
            return self.version(message);
        };
        Ok(Answer::Now(match Request::parse(message)? {
            Request::Version { .. } => return Err(Error::Again),
            Request::DmaMap { mapping, file } => {
                return self.dma_map(&agreed, mapping, file);
            }
            Request::DmaUnmap {
                raw,
                all,
                address,
                size,
            } => return self.dma_unmap(&raw, (!all).then_some((address, size))),
            Request::DeviceInfo => self.device_info(),
            Request::RegionInfo { index, argsz } => self.region_info(&agreed, index, argsz)?,
            Request::IoFds { index, argsz } => self.io_fds(&agreed, index, argsz)?,
            Request::IrqInfo { index } => self.irq_info(index)?,
            Request::SetIrqs {
                index,
                start,
                count,
                action,
                data,
            } => self.set_irqs(index, start, count, action, data)?,
            Request::RegionRead {
                region,
                offset,
                count,
            } => self.region_read(region, offset, count)?,
            Request::RegionWrite {
                region,
                offset,
                data,
            } => return self.region_write(region, offset, &data),
            Request::WriteMulti(writes) => return self.write_multi(&agreed, writes),
            Request::Reset => return Ok(self.reset()),
        }))
    }

    /// The first message.
    fn version(&mut self, message: Message) -> Result<Answer, Error> {
        if message.header.command != command::VERSION {
            return Err(Error::Version("another command came first"));
        }
        if message.header.kind != (Kind::Command { no_reply: false }) {
            return Err(Error::Version("no reply is wanted"));
        }
        let Request::Version { major, data } = Request::parse(message)? else {
            unreachable!("that is what its command says");
        };
        if major != spec::MAJOR {
            return Err(Error::Version("another major version"));
        }
        let (agreed, data) = negotiate(&data, &self.limits)?;
        let raw = RawVersion {
            major: spec::MAJOR.into(),
            // "Equal to or less than the minor version proposed", which can be no less than ours.
            minor: spec::MINOR.into(),
        };
        self.state = State::Ready(agreed);
        Ok(Answer::Now(Reply::of(&[raw.as_bytes(), &data])))
    }
}
