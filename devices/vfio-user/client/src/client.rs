//! A session with a server: what was agreed on, who waits for which reply.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use serde_json::Value;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::spec::{self, DEFAULT_TRANSFER, HEADER, Header, QEMU_FDS, command, flag};
use crate::{DmaMemory, Error, Message, Socket};

/// What a client is set up with. The default is what QEMU 11.1 proposes.
#[derive(Clone)]
pub struct Options {
    /// How long a reply is waited for: 10 s. QEMU waits for 5.
    pub limit: Duration,
    /// Bytes of data in a message that the client takes: 1 MiB.
    pub max_transfer: u64,
    /// Descriptors of a message that the client takes: 16.
    pub max_fds: u64,
    /// Whether `REGION_WRITE_MULTI` is proposed.
    pub write_multiple: bool,
    /// Version data to be sent instead of all that.
    pub version: Option<String>,
    /// What answers DMA messages; none: they are answered with `EFAULT`.
    pub memory: Option<Arc<dyn DmaMemory>>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            limit: Duration::from_secs(10),
            max_transfer: DEFAULT_TRANSFER,
            max_fds: QEMU_FDS as u64,
            write_multiple: true,
            version: None,
            memory: None,
        }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let memory = self.memory.is_some();
        write!(f, "Options({:?}, memory: {memory})", self.limit)
    }
}

impl Options {
    /// As QEMU 11.1.3 words it, and in its order.
    fn proposal(&self) -> String {
        self.version.clone().unwrap_or_else(|| {
            format!(
                r#"{{"capabilities": {{"pgsizes": 4096, "max_msg_fds": {}, "max_dma_maps": 65535, "max_data_xfer_size": {}, "migration": {{"max_bitmap_size": 268435456, "pgsize": 4096}}, "write_multiple": {}}}}}"#,
                self.max_fds, self.max_transfer, self.write_multiple
            )
        })
    }
}

/// What the server takes ("VFIO_USER_VERSION").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// Descriptors in a message.
    pub max_fds: u64,
    /// Bytes of data in a message.
    pub max_transfer: u64,
    /// Mappings at a time.
    pub max_dma_maps: u64,
    /// Page sizes of mappings, one bit for each.
    pub pgsizes: u64,
    /// `REGION_WRITE_MULTI`.
    pub write_multiple: bool,
}

impl Default for Agreed {
    fn default() -> Self {
        Self {
            max_fds: 1,
            max_transfer: DEFAULT_TRANSFER,
            max_dma_maps: 65535,
            pgsizes: 4096,
            write_multiple: false,
        }
    }
}

/// A command that was sent, whose reply is to be waited for.
#[derive(Debug)]
#[must_use]
pub struct Sent {
    id: u16,
    command: u16,
}

/// A reply that says that the command was done.
#[derive(Debug)]
pub struct Reply {
    command: u16,
    /// What follows the header.
    pub body: Vec<u8>,
    /// What came with it.
    pub files: Vec<OwnedFd>,
}

impl Reply {
    pub(crate) fn wrong(&self, what: &'static str) -> Error {
        Error::Reply {
            command: self.command,
            what,
        }
    }

    /// That it has neither payload nor descriptors.
    pub(crate) fn empty(&self) -> Result<(), Error> {
        if !self.body.is_empty() {
            return Err(self.wrong("it has a payload, and should have none"));
        }
        self.no_files()
    }

    pub(crate) fn no_files(&self) -> Result<(), Error> {
        if !self.files.is_empty() {
            return Err(self.wrong("it has descriptors, and should have none"));
        }
        Ok(())
    }

    /// The structure at its beginning, and what follows that.
    pub(crate) fn head<T: FromBytes + KnownLayout + Immutable>(&self) -> Result<(T, &[u8]), Error> {
        T::read_from_prefix(&self.body).map_err(|_| self.wrong("it is too short"))
    }
}

/// What is known of a command that was sent.
enum Slot {
    Waiting {
        command: u16,
    },
    Come(Message),
    /// Nobody waits any more; the reply, should it come, is dropped.
    Forgotten,
}

#[derive(Default)]
struct Slots {
    next: u16,
    by_id: HashMap<u16, Slot>,
}

impl Slots {
    fn claim(&mut self, sent: &Sent) -> Option<Message> {
        if matches!(self.by_id.get(&sent.id), Some(Slot::Come(_)))
            && let Some(Slot::Come(message)) = self.by_id.remove(&sent.id)
        {
            return Some(message);
        }
        None
    }
}

/// A vfio-user client.
pub struct Client {
    socket: Socket,
    options: Options,
    agreed: Agreed,
    slots: Mutex<Slots>,
    /// Who reads; it is taken with `slots` in hand, and held without.
    reader: Mutex<()>,
    /// A message was read, or its reader goes.
    came: Condvar,
    broken: AtomicBool,
    sent: [AtomicU64; command::COUNTED],
    received: AtomicU64,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Client({:?})", self.agreed)
    }
}

impl Client {
    /// Connects and agrees on a version.
    ///
    /// # Errors
    /// Where nobody listens or the server does not agree.
    pub fn connect(path: &Path, options: Options) -> Result<Self, Error> {
        Self::over(UnixStream::connect(path)?, options)
    }

    /// As [`Client::connect`], over a stream that is connected.
    ///
    /// # Errors
    /// Where the server does not agree.
    pub fn over(stream: UnixStream, options: Options) -> Result<Self, Error> {
        // The largest messages are data with 16 bytes before it; version data is far below.
        let max = HEADER + 16 + (options.max_transfer.max(1 << 16) as usize);
        let mut client = Self {
            socket: Socket::new(stream, max),
            options,
            agreed: Agreed::default(),
            slots: Mutex::default(),
            reader: Mutex::new(()),
            came: Condvar::new(),
            broken: AtomicBool::new(false),
            sent: [const { AtomicU64::new(0) }; command::COUNTED],
            received: AtomicU64::new(0),
        };
        client.agreed = client.negotiate()?;
        Ok(client)
    }

    fn negotiate(&self) -> Result<Agreed, Error> {
        let text = self.options.proposal();
        let head = spec::Version::default();
        let asked = [head.as_bytes(), text.as_bytes(), &[0]];
        let asked_len: usize = asked.iter().map(|p| p.len()).sum();
        let reply = self.ask(command::VERSION, &asked, &[])?;
        reply.no_files()?;
        let (version, data): (spec::Version, _) = reply.head()?;
        if version.major.get() != 0 {
            return Err(reply.wrong("another major version"));
        }
        if version.minor.get() != 0 {
            return Err(reply.wrong("a minor version above the proposed one"));
        }
        // QEMU's proposal has blanks to spare; another text of a test's may be too short for any answer.
        if self.options.version.is_none() && reply.body.len() > asked_len {
            return Err(reply.wrong("it is longer than the request: QEMU has no room for it"));
        }
        let data = match data {
            [] => return Ok(Agreed::default()),
            [text @ .., 0] => text,
            _ => return Err(reply.wrong("its data has no NUL at the end")),
        };
        let data: Value =
            serde_json::from_slice(data).map_err(|_| reply.wrong("its data is no JSON"))?;
        let none = Value::Object(serde_json::Map::new());
        let list = data.get("capabilities").unwrap_or(&none);
        if !list.is_object() {
            return Err(reply.wrong("capabilities are no object"));
        }
        let number = |name: &str, default: u64| match list.get(name) {
            None => Ok(default),
            Some(n) => n.as_u64().ok_or(reply.wrong("a capability is no number")),
        };
        let default = Agreed::default();
        Ok(Agreed {
            max_fds: number("max_msg_fds", default.max_fds)?,
            max_transfer: number("max_data_xfer_size", default.max_transfer)?,
            max_dma_maps: number("max_dma_maps", default.max_dma_maps)?,
            pgsizes: number("pgsizes", default.pgsizes)?,
            write_multiple: match list.get("write_multiple") {
                None => false,
                Some(on) => on
                    .as_bool()
                    .ok_or(reply.wrong("write_multiple is no boolean"))?,
            },
        })
    }

    /// What was agreed on.
    pub fn agreed(&self) -> Agreed {
        self.agreed
    }

    /// What it was set up with.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The connection, for bytes of any kind. Replies to what is sent there are strays to every other method.
    pub fn socket(&self) -> &Socket {
        &self.socket
    }

    pub(crate) fn dma_memory(&self) -> Option<&dyn DmaMemory> {
        self.options.memory.as_deref()
    }

    /// How many messages were sent: commands, and answers to those of the server.
    pub fn sent(&self) -> u64 {
        self.sent.iter().map(|n| n.load(Ordering::Relaxed)).sum()
    }

    /// How many messages of a [`command`] were sent; those of [`command::DMA_READ`] and [`command::DMA_WRITE`] are answers.
    pub fn sent_of(&self, command: u16) -> u64 {
        let count = self.sent.get(usize::from(command));
        count.map_or(0, |n| n.load(Ordering::Relaxed))
    }

    /// How many messages came.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().expect("nobody panics with it")
    }

    pub(crate) fn send_as(
        &self,
        id: u16,
        command: u16,
        flags: u32,
        error: u32,
        body: &[&[u8]],
        files: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        if self.broken.load(Ordering::Relaxed) {
            return Err(Error::Broken);
        }
        let size = HEADER + body.iter().map(|p| p.len()).sum::<usize>();
        let header = Header {
            id: id.into(),
            command: command.into(),
            size: (size as u32).into(),
            flags: flags.into(),
            error: error.into(),
        };
        let mut parts: [&[u8]; 4] = [&[]; 4];
        parts[0] = header.as_bytes();
        parts[1..=body.len()].copy_from_slice(body);
        // A number that is none of the known ones is counted among them somewhere.
        self.sent[usize::from(command) % command::COUNTED].fetch_add(1, Ordering::Relaxed);
        self.socket.send(&parts[..=body.len()], files)
    }

    /// Sends a command of any kind, in up to three parts, and does not wait for its reply.
    ///
    /// # Errors
    /// Where it cannot be sent.
    pub fn send(
        &self,
        command: u16,
        body: &[&[u8]],
        files: &[BorrowedFd<'_>],
    ) -> Result<Sent, Error> {
        let id = {
            let mut slots = self.slots();
            while slots.by_id.contains_key(&slots.next) {
                slots.next = slots.next.wrapping_add(1);
            }
            let id = slots.next;
            slots.next = id.wrapping_add(1);
            slots.by_id.insert(id, Slot::Waiting { command });
            id
        };
        let sent = self.send_as(id, command, flag::COMMAND, 0, body, files);
        if sent.is_err() {
            self.slots().by_id.remove(&id);
        }
        sent.map(|()| Sent { id, command })
    }

    /// Sends a command that wants no reply.
    ///
    /// # Errors
    /// Where it cannot be sent.
    pub fn post(
        &self,
        command: u16,
        body: &[&[u8]],
        files: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        // "Message IDs can be re-used, even concurrently": no reply comes that could be taken for another's.
        self.send_as(u16::MAX, command, flag::NO_REPLY, 0, body, files)
    }

    /// Sends a command and waits for its reply.
    ///
    /// # Errors
    /// [`Error::Refused`] where the server refuses, [`Error::Timeout`], and what is wrong with the stream.
    pub fn ask(
        &self,
        command: u16,
        body: &[&[u8]],
        files: &[BorrowedFd<'_>],
    ) -> Result<Reply, Error> {
        let sent = self.send(command, body, files)?;
        self.wait(sent)
    }

    /// Waits for a reply as long as [`Options::limit`] says.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn wait(&self, sent: Sent) -> Result<Reply, Error> {
        let limit = self.options.limit;
        self.wait_for(sent, limit)?.map_err(|sent| {
            self.forget(sent);
            Error::Timeout(limit)
        })
    }

    /// Waits for a reply no more. It may come yet, and is then dropped.
    pub fn forget(&self, sent: Sent) {
        let mut slots = self.slots();
        match slots.by_id.get_mut(&sent.id) {
            Some(slot @ Slot::Waiting { .. }) => *slot = Slot::Forgotten,
            _ => drop(slots.by_id.remove(&sent.id)),
        }
    }

    /// Waits for a reply no longer than `limit`, and gives the command back if there is none.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn wait_for(&self, sent: Sent, limit: Duration) -> Result<Result<Reply, Sent>, Error> {
        match self.until(limit, |slots| slots.claim(&sent))? {
            Some(message) => Ok(Ok(check(sent.command, message)?)),
            None => Ok(Err(sent)),
        }
    }

    /// Answers DMA messages of the server until `limit` is over; how many messages came, for whomever.
    ///
    /// # Errors
    /// What is wrong with the stream.
    pub fn serve(&self, limit: Duration) -> Result<u64, Error> {
        let before = self.received();
        let none: Option<()> = self.until(limit, |_| None)?;
        assert_eq!(none, None, "nothing is waited for");
        Ok(self.received() - before)
    }

    /// Reads messages, or has another thread read them, until `there` finds what it looks for.
    fn until<T>(
        &self,
        limit: Duration,
        mut there: impl FnMut(&mut Slots) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let end = Instant::now() + limit;
        loop {
            let mut slots = self.slots();
            if let Some(found) = there(&mut slots) {
                return Ok(Some(found));
            }
            let rest = end.saturating_duration_since(Instant::now());
            match self.reader.try_lock() {
                Ok(reading) => {
                    drop(slots);
                    let came = self.read_one(rest);
                    drop(reading);
                    // With the lock: who found the reader at work is waiting by now, and misses nothing.
                    let slots = self.slots();
                    self.came.notify_all();
                    drop(slots);
                    if !came? {
                        return Ok(None);
                    }
                }
                Err(TryLockError::WouldBlock) if rest.is_zero() => return Ok(None),
                Err(TryLockError::WouldBlock) => {
                    let waited = self.came.wait_timeout(slots, rest);
                    drop(waited.expect("nobody panics with it"));
                }
                Err(TryLockError::Poisoned(_)) => return Err(Error::Broken),
            }
        }
    }

    /// Takes one message; whether one came within `limit`. Called by whoever holds `reader`.
    fn read_one(&self, limit: Duration) -> Result<bool, Error> {
        if self.broken.load(Ordering::Relaxed) {
            return Err(Error::Broken);
        }
        let result = self.take_one(limit);
        if let Err(error) = &result
            && !matches!(error, Error::Closed)
        {
            self.broken.store(true, Ordering::Relaxed);
        }
        result
    }

    fn take_one(&self, limit: Duration) -> Result<bool, Error> {
        let Some(message) = self.socket.receive(limit)? else {
            return Ok(false);
        };
        self.received.fetch_add(1, Ordering::Relaxed);
        match message.header.flags.get() & flag::TYPE {
            flag::COMMAND => self.answer(&message)?,
            flag::REPLY => self.keep(message)?,
            _ => return Err(Error::Framing("it is neither command nor reply")),
        }
        Ok(true)
    }

    fn keep(&self, message: Message) -> Result<(), Error> {
        let (id, of) = (message.header.id.get(), message.header.command.get());
        let mut slots = self.slots();
        match slots.by_id.get_mut(&id) {
            Some(slot @ Slot::Waiting { .. }) => {
                if !matches!(slot, Slot::Waiting { command } if *command == of) {
                    return Err(Error::Stray { id, command: of });
                }
                *slot = Slot::Come(message);
            }
            Some(Slot::Forgotten) => drop(slots.by_id.remove(&id)),
            Some(Slot::Come(_)) | None => return Err(Error::Stray { id, command: of }),
        }
        Ok(())
    }
}

fn check(command: u16, message: Message) -> Result<Reply, Error> {
    let reply = Reply {
        command,
        body: message.body,
        files: message.files,
    };
    if message.header.flags.get() & flag::ERROR == 0 {
        return Ok(reply);
    }
    // "If an error occurs, the reply message must only include the reply header."
    reply.empty()?;
    Err(Error::Refused {
        command,
        errno: message.header.error.get() as i32,
    })
}
