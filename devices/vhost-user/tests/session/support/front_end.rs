//! Front ends that send anything.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use bluff_vhost_user::framing::{self, HEADER_LEN};
use bluff_vhost_user::unix;
use bluff_virtio::features;
use vmm_sys_util::eventfd::EventFd;

use super::*;

/// A front end that sends whatever a test wants.
pub struct Raw {
    pub socket: UnixStream,
    /// Ask for acknowledgements.
    pub ack: bool,
}

pub type Answer = Option<(Vec<u8>, Vec<OwnedFd>)>;

impl Raw {
    pub fn new(socket: UnixStream) -> Self {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        Self { socket, ack: true }
    }

    /// Sends a request; `false` where the connection is closed.
    pub fn send(&self, request: u32, payload: &[u8], files: &[BorrowedFd<'_>]) -> bool {
        self.bytes(&framing::request(request, self.ack, payload), files)
    }

    pub fn bytes(&self, mut bytes: &[u8], files: &[BorrowedFd<'_>]) -> bool {
        let mut files = files;
        let end = Instant::now() + PATIENCE;
        while !bytes.is_empty() {
            match unix::send(self.socket.as_fd(), bytes, files) {
                Ok(n) => {
                    bytes = &bytes[n..];
                    files = &[];
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    assert!(Instant::now() < end, "the back end does not read");
                    std::thread::yield_now();
                }
                Err(_) => return false,
            }
        }
        true
    }

    fn exactly(&self, len: usize) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
        let mut bytes = vec![0; len];
        let mut files = Vec::new();
        let mut at = 0;
        while at < len {
            match unix::take(self.socket.as_fd(), &mut bytes[at..]) {
                Ok(got) if got.len == 0 => return None,
                Ok(got) => {
                    at += got.len;
                    files.extend(got.files);
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    wait_readable(self.socket.as_fd());
                }
                Err(_) => return None,
            }
        }
        Some((bytes, files))
    }

    /// The next reply to `request`; `None` where the connection is closed.
    pub fn reply(&self, request: u32) -> Answer {
        let (head, mut files) = self.exactly(HEADER_LEN)?;
        let (answered, len) = framing::parse_reply(head.try_into().unwrap()).unwrap();
        assert_eq!(answered, request, "a reply to another request");
        if len == 0 {
            return Some((Vec::new(), files));
        }
        let (body, more) = self.exactly(len)?;
        files.extend(more);
        Some((body, files))
    }

    /// Whether nothing has come.
    pub fn is_quiet(&self) -> bool {
        let mut buf = [0];
        matches!(unix::peek(self.socket.as_fd(), &mut buf, false),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock)
    }

    pub fn ask(&self, request: u32, payload: &[u8], files: &[BorrowedFd<'_>]) -> Answer {
        if !self.send(request, payload, files) {
            return None;
        }
        self.reply(request)
    }

    /// Whether a request is acknowledged. `false` also where the connection is closed.
    pub fn ok(&self, request: u32, payload: &[u8], files: &[BorrowedFd<'_>]) -> bool {
        self.ask(request, payload, files)
            .is_some_and(|(body, _)| body == [0; 8])
    }

    pub fn number(&self, request: u32) -> u64 {
        let (body, _) = self.ask(request, &[], &[]).expect("an answer");
        u64::from_ne_bytes(body.try_into().unwrap())
    }

    pub fn set(&self, request: u32, number: u64) -> bool {
        self.ok(request, &number.to_ne_bytes(), &[])
    }

    /// Whether the connection is closed, waiting for it.
    pub fn is_closed(&self) -> bool {
        let mut buf = [0; 256];
        loop {
            match unix::take(self.socket.as_fd(), &mut buf) {
                Ok(got) if got.len == 0 => return true,
                Ok(_) => {}
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    if !wait_readable(self.socket.as_fd()) {
                        return false;
                    }
                }
                Err(_) => return true,
            }
        }
    }

    /// As QEMU begins.
    pub fn negotiate(&self) {
        let features = self.number(GET_FEATURES);
        assert_ne!(features & F_PROTOCOL, 0);
        let protocol = self.number(GET_PROTOCOL_FEATURES);
        assert!(self.set(SET_PROTOCOL_FEATURES, protocol));
        assert!(self.ok(SET_OWNER, &[], &[]));
        assert!(self.set(
            SET_FEATURES,
            features & !features::LOG_ALL & !features::RING_PACKED
        ));
    }

    /// One region of memory at guest address 0.
    pub fn memory(&self) -> OwnedFd {
        let file = unix::sealed_memory(c"guest", MEMORY).unwrap();
        assert!(self.ok(
            SET_MEM_TABLE,
            &table(&[(0, MEMORY, USER, 0)]),
            &[file.as_fd()]
        ));
        file
    }

    /// Everything of a ring but its start.
    pub fn ring(&self, index: u32, size: u32) {
        assert!(self.ok(SET_VRING_NUM, &words(&[index, size]), &[]));
        assert!(self.ok(SET_VRING_BASE, &words(&[index, 0]), &[]));
        assert!(self.ok(SET_VRING_ADDR, &addr(index, 0), &[]));
    }

    pub fn kick(&self, index: u32) -> EventFd {
        let (file, event) = eventfd();
        assert!(self.ok(
            SET_VRING_KICK,
            &u64::from(index).to_ne_bytes(),
            &[file.as_fd()]
        ));
        event
    }

    pub fn start(&self, index: u32) {
        self.ring(index, 128);
        self.kick(index);
        assert!(self.ok(SET_VRING_ENABLE, &words(&[index, 1]), &[]));
    }

    pub fn base(&self, index: u32) -> u32 {
        let (body, _) = self
            .ask(GET_VRING_BASE, &words(&[index, 0]), &[])
            .expect("an answer");
        assert_eq!(body[..4], index.to_ne_bytes());
        u32::from_ne_bytes(body[4..].try_into().unwrap())
    }
}

/// Waits for bytes or the end; `false` where nothing comes.
pub fn wait_readable(socket: BorrowedFd<'_>) -> bool {
    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
    let epoll = Epoll::new().unwrap();
    let event = EpollEvent::new(EventSet::IN, 0);
    epoll
        .ctl(ControlOperation::Add, socket.as_raw_fd(), event)
        .unwrap();
    let mut ready = [EpollEvent::default()];
    epoll.wait(PATIENCE.as_millis() as i32, &mut ready).unwrap() == 1
}

pub fn eventfd() -> (OwnedFd, EventFd) {
    let event = EventFd::new(0).unwrap();
    let clone = event.try_clone().unwrap();
    // SAFETY: the clone gives its descriptor away.
    #[allow(unsafe_code)]
    let file = unsafe { OwnedFd::from_raw_fd(clone.into_raw_fd()) };
    (file, event)
}
