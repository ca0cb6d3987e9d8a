//! A device that does DMA when its registers say so, the loop that presents it, and a client.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use bluff_attachment::stream;
use bluff_memory::GuestMemory;
use bluff_pci::config::{Identity, Link, MsixPlace};
use bluff_pci::{Area, Bar, ConfigSpace, Device, Dma, Done, Function, IoEvent, Resources};
pub use bluff_vfio_user::spec::{self, command, flag, irq, region};
use bluff_vfio_user::{
    Attachment, AttachmentEvent, Counters, LoopHandle, Options, SessionLoop, framing,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
pub use zerocopy::IntoBytes;
use zerocopy::{FromBytes, Immutable, KnownLayout};

pub const PAGE: u64 = 4096;
pub const EINVAL: i32 = 22;
/// How long anything may take that is not to take any time.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// The function's bound.
pub const BOUND: Duration = Duration::from_secs(1);

/// As QEMU 11.1.3 sends it.
pub const QEMU: &str = r#"{"capabilities": {"pgsizes": 4096, "max_msg_fds": 16, "max_dma_maps": 65535, "max_data_xfer_size": 1048576, "migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, "write_multiple": true}}"#;

/// Registers of BAR 0: what is written to it goes to the address, as eight bytes, and vector 0 is signalled.
pub const WRITE_TO: u64 = 0;
/// Reads eight bytes from the address that is written here.
pub const READ_FROM: u64 = 8;
/// What was read; all ones where that failed.
pub const RESULT: u64 = 16;
/// The one that the device writes.
pub const DATA: u64 = 24;
/// Asserts INTx where it is not 0.
pub const LEVEL: u64 = 32;
/// The page that can be mapped.
pub const AREA: u64 = 0x1000;
pub const TABLE: u64 = 0x2000;
pub const BAR0: u64 = 0x4000;
pub const VECTORS: u16 = 40;

/// The command register, and its bits.
pub const COMMAND: u64 = 4;
pub const MEMORY: u16 = 2;
pub const MASTER: u16 = 4;
/// Device Control, with the bit that resets the function.
pub const DEVICE_CONTROL: u64 = 0x54 + 8;
pub const FLR: u16 = 1 << 15;

/// A call that takes its time.
pub struct Waiting {
    pub what: &'static str,
    pub bound: Duration,
    pub done: Done,
}

/// What a test sees of a device.
#[derive(Clone, Default)]
pub struct Seen {
    state: Arc<(Mutex<State>, Condvar)>,
}

#[derive(Default)]
struct State {
    late: bool,
    waiting: Vec<Waiting>,
    /// How often it was given memory, or had it taken away.
    changes: usize,
    regions: usize,
    events: Vec<AttachmentEvent>,
}

impl Seen {
    /// From now on changes and resets are over later.
    pub fn hold(&self, late: bool) {
        self.state.0.lock().unwrap().late = late;
    }

    fn over(&self, what: &'static str, bound: Duration, done: Done) {
        let mut state = self.state.0.lock().unwrap();
        state.changes += 1;
        if state.late {
            state.waiting.push(Waiting { what, bound, done });
            self.state.1.notify_all();
            return;
        }
        drop(state);
        done();
    }

    fn until<T>(&self, mut get: impl FnMut(&mut State) -> Option<T>) -> T {
        let start = Instant::now();
        let mut state = self.state.0.lock().unwrap();
        loop {
            if let Some(got) = get(&mut state) {
                return got;
            }
            assert!(start.elapsed() < PATIENCE, "nothing happens");
            state = self.state.1.wait_timeout(state, PATIENCE).unwrap().0;
        }
    }

    /// The next call that waits to be over.
    pub fn next(&self) -> Waiting {
        self.until(|s| (!s.waiting.is_empty()).then(|| s.waiting.remove(0)))
    }

    pub fn changes(&self) -> usize {
        self.state.0.lock().unwrap().changes
    }

    /// How many regions of memory the device has.
    pub fn regions(&self) -> usize {
        self.state.0.lock().unwrap().regions
    }

    /// Waits until the attachment says something; all since the last call.
    pub fn event(&self) -> AttachmentEvent {
        self.until(|s| (!s.events.is_empty()).then(|| s.events.remove(0)))
    }

    /// Waits for just this.
    pub fn expect(&self, want: AttachmentEvent) {
        assert_eq!(self.event(), want);
    }
}

pub struct Echo {
    seen: Seen,
    resources: Resources,
    memory: Option<Arc<GuestMemory>>,
    data: u64,
    result: u64,
    event: EventFd,
}

impl Device for Echo {
    fn read(&mut self, _: u8, offset: u64, to: &mut [u8]) {
        let value = match offset {
            RESULT => self.result,
            DATA => self.data,
            _ => 0,
        };
        let bytes = value.to_le_bytes();
        to.copy_from_slice(&bytes[..to.len()]);
    }

    fn write(&mut self, _: u8, offset: u64, from: &[u8]) {
        let mut bytes = [0; 8];
        bytes[..from.len()].copy_from_slice(from);
        let value = u64::from_le_bytes(bytes);
        match offset {
            WRITE_TO => {
                let memory = self.memory.clone().unwrap_or_default();
                if memory.write(value, &self.data.to_le_bytes()).is_ok() {
                    self.resources.vectors[0].signal();
                } else {
                    self.resources.vectors[1].signal();
                }
            }
            READ_FROM => {
                let memory = self.memory.clone().unwrap_or_default();
                let mut got = [0xff; 8];
                let read = memory.read(value, &mut got);
                self.result = read.map_or(u64::MAX, |()| u64::from_le_bytes(got));
            }
            DATA => self.data = value,
            LEVEL if value != 0 => drop(self.resources.intx.as_ref().unwrap().assert()),
            LEVEL => self.resources.intx.as_ref().unwrap().deassert(),
            _ => {}
        }
    }

    fn set_dma(&mut self, dma: Dma, bound: Duration, done: Done) {
        let (what, memory) = match dma {
            Dma::Off => ("off", None),
            Dma::On(memory) => ("on", Some(memory)),
        };
        self.seen.state.0.lock().unwrap().regions = memory.as_ref().map_or(0, |m| m.len());
        self.memory = memory;
        self.seen.over(what, bound, done);
    }

    fn reset(&mut self, bound: Duration, done: Done) {
        (self.memory, self.data, self.result) = (None, 0, 0);
        self.seen.state.0.lock().unwrap().regions = 0;
        self.seen.over("reset", bound, done);
    }

    fn io_events(&mut self, bar: u8) -> Vec<IoEvent> {
        let event = |offset| IoEvent {
            offset,
            len: 4,
            value: None,
            event: self.event.try_clone().unwrap(),
        };
        match bar {
            0 => vec![event(AREA), event(AREA + 4)],
            _ => Vec::new(),
        }
    }
}

const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0010,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
    class: 0x01_08_02,
    revision: 7,
};

/// A function, what is seen of its device, and the area that can be mapped.
pub fn function() -> (Function<Echo>, Seen, Area) {
    let seen = Seen::default();
    let area = Area::new(AREA, PAGE).unwrap();
    let space = ConfigSpace::builder(IDENTITY)
        .bar(0, Bar::memory_64(BAR0).with_areas(vec![area.clone()]))
        .intx()
        .power_management(true)
        .msix(VECTORS, MsixPlace::in_bar(0, TABLE as u32, VECTORS))
        .express(Link::default())
        .build();
    let function = Function::new(space, |resources| Echo {
        seen: seen.clone(),
        resources,
        memory: None,
        data: 0,
        result: 0,
        event: EventFd::new(EFD_NONBLOCK).unwrap(),
    });
    (function, seen, area)
}

/// A loop with one function, or more.
pub struct Card {
    sessions: SessionLoop,
    seen: Mutex<Vec<Seen>>,
}

impl Drop for Card {
    /// The loop waits for its functions, also where a test has failed.
    fn drop(&mut self) {
        for seen in self.seen.lock().unwrap().iter() {
            seen.hold(false);
            let waiting = std::mem::take(&mut seen.state.0.lock().unwrap().waiting);
            waiting.into_iter().for_each(|w| (w.done)());
        }
    }
}

/// A function on a loop.
#[derive(Clone)]
pub struct Port {
    pub name: &'static str,
    pub handle: LoopHandle,
    pub seen: Seen,
    pub area: Area,
    pub counters: Arc<Counters>,
}

impl Card {
    pub fn new() -> Self {
        Self {
            sessions: SessionLoop::spawn().unwrap(),
            seen: Mutex::default(),
        }
    }

    pub fn add(&self, name: &'static str) -> Port {
        let (function, seen, area) = function();
        self.seen.lock().unwrap().push(seen.clone());
        let events = seen.clone();
        let listener = Arc::new(move |_: &str, event| {
            let (state, changed) = &*events.state;
            state.lock().unwrap().events.push(event);
            changed.notify_all();
        });
        let options = Options {
            bound: BOUND,
            ..Options::default()
        };
        let attachment = Attachment::new(name, Box::new(function), options, listener);
        let counters = attachment.counters();
        self.sessions.handle().add(attachment).unwrap();
        Port {
            name,
            handle: self.sessions.handle(),
            seen,
            area,
            counters,
        }
    }
}

impl Port {
    /// Connects, without a word.
    pub fn fresh(&self) -> Client {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.handle.connection(self.name, theirs);
        Client {
            socket: ours,
            next_id: 0,
        }
    }

    /// As QEMU after its first message.
    pub fn client(&self) -> Client {
        let mut client = self.fresh();
        client.negotiate();
        client
    }

    /// A client whose function may do DMA.
    pub fn master(&self) -> Client {
        let mut client = self.client();
        client.command(MEMORY | MASTER);
        client
    }

    /// The client has gone, and the function is free.
    pub fn gone(&self) -> Option<String> {
        loop {
            if let AttachmentEvent::Disconnected(why) = self.seen.event() {
                return why;
            }
        }
    }

    /// Takes the function away; it comes when it is free.
    pub fn remove(&self) -> Receiver<Box<dyn bluff_pci::PciFunction>> {
        let (tx, rx) = channel();
        self.handle.remove(self.name, move |function| {
            let _ = tx.send(function);
        });
        rx
    }
}

#[derive(Debug)]
pub struct Reply {
    pub id: u16,
    pub command: u16,
    pub errno: i32,
    pub body: Vec<u8>,
    pub files: Vec<OwnedFd>,
}

impl Reply {
    pub fn read<T: FromBytes + KnownLayout + Immutable>(&self) -> (T, &[u8]) {
        assert_eq!(self.errno, 0);
        T::read_from_prefix(&self.body).unwrap()
    }
}

pub struct Client {
    pub socket: UnixStream,
    next_id: u16,
}

impl Client {
    pub fn negotiate(&mut self) {
        let body = [&[0; 4], QEMU.as_bytes(), &[0]].concat();
        assert_eq!(self.ask(command::VERSION, &body).errno, 0);
    }

    /// The bytes of a command.
    pub fn message(&mut self, command: u16, flags: u32, body: &[u8]) -> Vec<u8> {
        self.next_id = self.next_id.wrapping_add(1);
        framing::message(self.next_id, command, flags, 0, &[body])
    }

    pub fn give(&self, mut bytes: &[u8], files: &[BorrowedFd<'_>]) {
        let mut files = files;
        while !bytes.is_empty() {
            match stream::send(self.socket.as_fd(), bytes, files) {
                Ok(n) => bytes = &bytes[n..],
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    std::thread::yield_now();
                    continue;
                }
                Err(e) => panic!("{e}"),
            }
            files = &[];
        }
    }

    /// Sends a command; its message ID.
    pub fn send(&mut self, command: u16, flags: u32, body: &[u8], files: &[BorrowedFd<'_>]) -> u16 {
        let bytes = self.message(command, flags, body);
        self.give(&bytes, files);
        self.next_id
    }

    /// The next message; `None` at the end of the connection.
    pub fn next(&mut self) -> Option<Reply> {
        let mut files = Vec::new();
        let head = self.exactly(spec::HEADER_LEN, &mut files)?;
        let raw = spec::RawHeader::read_from_bytes(&head).unwrap();
        let len = raw.size.get() as usize - spec::HEADER_LEN;
        let body = self.exactly(len, &mut files)?;
        Some(Reply {
            id: raw.id.get(),
            command: raw.command.get(),
            errno: raw.error.get() as i32,
            body,
            files,
        })
    }

    fn exactly(&self, len: usize, files: &mut Vec<OwnedFd>) -> Option<Vec<u8>> {
        let (mut bytes, mut at, start) = (vec![0; len], 0, Instant::now());
        while at < len {
            match stream::take(self.socket.as_fd(), &mut bytes[at..], 16) {
                Ok(got) if got.len == 0 => return None,
                Ok(got) => {
                    // QEMU wants a header in one piece.
                    assert!(at > 0 || got.len >= len.min(spec::HEADER_LEN));
                    at += got.len;
                    files.extend(got.files);
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    assert!(start.elapsed() < PATIENCE, "no answer");
                    wait(self.socket.as_fd());
                }
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(e) => panic!("{e}"),
            }
        }
        Some(bytes)
    }

    /// Whether nothing has come yet. For what must not come: only what the loop has done for sure by now is seen.
    pub fn has_nothing(&self) -> bool {
        stream::peek(self.socket.as_fd(), &mut [0], 0).is_err()
    }

    pub fn ask_with(&mut self, command: u16, body: &[u8], files: &[BorrowedFd<'_>]) -> Reply {
        let id = self.send(command, 0, body, files);
        let reply = self.next().expect("a reply");
        assert_eq!((reply.id, reply.command), (id, command));
        reply
    }

    pub fn ask(&mut self, command: u16, body: &[u8]) -> Reply {
        self.ask_with(command, body, &[])
    }

    pub fn read(&mut self, region: u32, offset: u64, len: usize) -> Vec<u8> {
        let reply = self.ask(command::REGION_READ, &access(region, offset, len as u32));
        assert_eq!(reply.errno, 0);
        reply.body[16..].to_vec()
    }

    pub fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        let reply = self.ask(command::REGION_WRITE, &write(region, offset, data));
        assert_eq!(reply.errno, 0);
    }

    pub fn read_u64(&mut self, offset: u64) -> u64 {
        u64::from_le_bytes(self.read(0, offset, 8).try_into().unwrap())
    }

    pub fn write_u64(&mut self, offset: u64, value: u64) {
        self.write(0, offset, &value.to_le_bytes());
    }

    /// Sets the command register.
    pub fn command(&mut self, value: u16) {
        self.write(region::PCI_CONFIG, COMMAND, &value.to_le_bytes());
    }

    /// Maps, for reading and writing; the errno.
    pub fn map(&mut self, address: u64, size: u64, file: &File, offset: u64) -> i32 {
        self.map_for(3, address, size, file, offset)
    }

    pub fn map_for(
        &mut self,
        flags: u32,
        address: u64,
        size: u64,
        file: &File,
        offset: u64,
    ) -> i32 {
        let body = map(address, size, flags, offset);
        self.ask_with(command::DMA_MAP, &body, &[file.as_fd()])
            .errno
    }

    pub fn unmap(&mut self, address: u64, size: u64) -> i32 {
        self.ask(command::DMA_UNMAP, &unmap(address, size, 0)).errno
    }

    /// Has the device write to memory; whether it could.
    pub fn device_writes(&mut self, address: u64, data: u64) {
        self.write_u64(DATA, data);
        self.write_u64(WRITE_TO, address);
    }

    /// What the device reads there; all ones where it cannot.
    pub fn device_reads(&mut self, address: u64) -> u64 {
        self.write_u64(READ_FROM, address);
        self.read_u64(RESULT)
    }

    /// Gives vectors from `start` on an eventfd each.
    pub fn vectors(&mut self, start: u32, count: usize) -> Vec<EventFd> {
        let events: Vec<_> = (0..count)
            .map(|_| EventFd::new(EFD_NONBLOCK).unwrap())
            .collect();
        assert_eq!(self.set_irqs(irq::MSIX, start, &events), 0);
        events
    }

    pub fn set_irqs(&mut self, index: u32, start: u32, files: &[impl AsRawFd]) -> i32 {
        let flags = irq::DATA_EVENTFD | irq::ACTION_TRIGGER;
        let body = irqs(flags, index, start, files.len() as u32);
        // SAFETY: they are open as long as the call lasts.
        #[allow(unsafe_code)]
        let files: Vec<_> = files
            .iter()
            .map(|f| unsafe { BorrowedFd::borrow_raw(f.as_raw_fd()) })
            .collect();
        self.ask_with(command::DEVICE_SET_IRQS, &body, &files).errno
    }

    /// Whether the server has closed the connection.
    pub fn is_closed(&mut self) -> bool {
        self.next().is_none()
    }
}

/// Waits until a socket is readable.
#[allow(unsafe_code)]
fn wait(socket: BorrowedFd<'_>) {
    let mut poll = libc::pollfd {
        fd: socket.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one entry, which is ours.
    unsafe { libc::poll(&raw mut poll, 1, 1000) };
}

pub fn memory(len: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    file
}

pub fn word_of(file: &File, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    std::os::unix::fs::FileExt::read_at(file, &mut bytes, offset).unwrap();
    u64::from_le_bytes(bytes)
}

pub fn set_word(file: &File, offset: u64, value: u64) {
    std::os::unix::fs::FileExt::write_at(file, &value.to_le_bytes(), offset).unwrap();
}

/// A descriptor to send, and the end that sees it closed.
pub fn canary() -> (UnixStream, OwnedFd) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (ours, theirs.into())
}

/// Waits until the other side has closed it.
pub fn is_released(mut canary: UnixStream) -> bool {
    canary.set_read_timeout(Some(PATIENCE)).unwrap();
    matches!(canary.read(&mut [0]), Ok(0))
}

/// Mappings of a file in this process.
pub fn mapped(file: &File) -> usize {
    use std::os::unix::fs::MetadataExt;
    let inode = format!(" {} ", file.metadata().unwrap().ino());
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines()
        .filter(|l| format!("{l} ").contains(&inode))
        .count()
}

/// What was heard of an eventfd, once it was heard of.
pub fn heard(event: &EventFd) -> u64 {
    let start = Instant::now();
    loop {
        if let Ok(n) = event.read() {
            return n;
        }
        assert!(start.elapsed() < PATIENCE, "no interrupt");
        std::thread::yield_now();
    }
}

pub fn duplicate(file: &impl AsFd) -> OwnedFd {
    file.as_fd().try_clone_to_owned().unwrap()
}

pub fn map(address: u64, size: u64, flags: u32, offset: u64) -> Vec<u8> {
    let raw = spec::RawDmaMap {
        argsz: 32.into(),
        flags: flags.into(),
        offset: offset.into(),
        address: address.into(),
        size: size.into(),
    };
    raw.as_bytes().to_vec()
}

pub fn unmap(address: u64, size: u64, flags: u32) -> Vec<u8> {
    let raw = spec::RawDmaUnmap {
        argsz: 24.into(),
        flags: flags.into(),
        address: address.into(),
        size: size.into(),
    };
    raw.as_bytes().to_vec()
}

pub fn irqs(flags: u32, index: u32, start: u32, count: u32) -> Vec<u8> {
    words(&[20, flags, index, start, count])
}

pub fn access(region: u32, offset: u64, count: u32) -> Vec<u8> {
    let raw = spec::RawRegionAccess {
        offset: offset.into(),
        region: region.into(),
        count: count.into(),
    };
    raw.as_bytes().to_vec()
}

pub fn write(region: u32, offset: u64, data: &[u8]) -> Vec<u8> {
    [&access(region, offset, data.len() as u32), data].concat()
}

pub fn words(words: &[u32]) -> Vec<u8> {
    words.as_bytes().to_vec()
}

/// One of the writes of a REGION_WRITE_MULTI.
pub fn small(region: u32, offset: u64, count: u32, data: u64) -> Vec<u8> {
    [&access(region, offset, count), data.as_bytes()].concat()
}

pub fn multi(writes: &[Vec<u8>]) -> Vec<u8> {
    [(writes.len() as u64).as_bytes().to_vec(), writes.concat()].concat()
}
