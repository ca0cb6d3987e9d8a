//! A loop with functions, and a client.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bluff_attachment::stream;
use bluff_pci::Area;
use bluff_vfio_user::keeper::Keeper;
use bluff_vfio_user::{
    Attachment, AttachmentEvent, Counters, LoopHandle, Options, SessionLoop, framing,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use zerocopy::FromBytes;

pub use crate::device::*;
pub use crate::wire::*;

/// How long anything may take that is not to take any time.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// The function's bound.
pub const BOUND: Duration = Duration::from_secs(1);

/// The command register, and its bits.
pub const COMMAND: u64 = 4;
pub const MEMORY: u16 = 2;
pub const MASTER: u16 = 4;
/// Device Control, with the bit that resets the function.
pub const DEVICE_CONTROL: u64 = 0x54 + 8;
pub const FLR: u16 = 1 << 15;

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
        self.add_kept(name, None)
    }

    /// One whose sessions are recorded.
    pub fn add_kept(&self, name: &'static str, keeper: Option<Box<dyn Keeper>>) -> Port {
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
            keeper,
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
        self.handle.connection(self.name, theirs.into());
        Client::over(ours)
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

pub struct Client {
    pub socket: UnixStream,
    next_id: u16,
}

impl Client {
    pub fn over(socket: UnixStream) -> Self {
        Self { socket, next_id: 0 }
    }

    pub fn negotiate(&mut self) {
        assert_eq!(self.ask(command::VERSION, &version(QEMU)).errno, 0);
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
        let files = files.into_iter().map(Arc::new).collect();
        Some(Reply::new(raw, &body, files))
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
        reply.answers(id, command);
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
        let body = map_at(address, size, flags, offset);
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

pub fn irqs(flags: u32, index: u32, start: u32, count: u32) -> Vec<u8> {
    words(&[20, flags, index, start, count])
}
