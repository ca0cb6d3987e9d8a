//! A queue of a device, on its reactor.
//!
//! Unsafe, because the kernel is given pointers to what frames lend, and writes into a buffer out of which frames are lent.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bluff_memory::IoVec;
use bluff_packet::parse;
use bluff_reactor::{Actor, Context, Event, Glance, Turn};
use zerocopy::{FromBytes, IntoBytes};

use super::device::Queue;
use super::header::{HEADER_TUNNEL, Header, is_own};
use super::{Carries, Shared};
use crate::{Batch, Cause, Counters, HEAD, Lane, MAX_FRAME, Offloads, Port, Receive, Registration};

/// Bytes of the longest frame with its header.
const WHOLE: usize = MAX_FRAME + HEADER_TUNNEL;
/// Bytes that the frames of a batch are read into: some of 64 KiB, or 32 of any ordinary length.
const BUFFER: usize = 4 * WHOLE;

/// Reads frames of one queue.
pub(super) struct Worker {
    file: Rc<File>,
    header: usize,
    index: usize,
    carries: Carries,
    shared: Arc<Shared>,
    counters: Arc<Counters>,
    port: Arc<dyn Port>,
    /// `None`: the port could not be opened, and what comes is dropped.
    lane: Option<Box<dyn Lane>>,
    registration: Option<Registration>,
    buffer: Box<[u8]>,
    batch: Batch,
    glance: Glance,
}

/// Writes frames to one queue.
struct Outward {
    file: Rc<File>,
    header: usize,
    carries: Carries,
    /// What the kernel completes.
    completes: Offloads,
    counters: Arc<Counters>,
    pieces: Vec<IoVec>,
    scratch: Option<Box<Batch>>,
}

impl Worker {
    pub(super) fn new(
        cx: &mut Context<'_>,
        queue: Queue,
        index: usize,
        carries: Carries,
        completes: Offloads,
        port: &Arc<dyn Port>,
        shared: Arc<Shared>,
    ) -> Self {
        let Queue { file, header } = queue;
        let events = epoll::Events::EPOLLIN | epoll::Events::EPOLLET;
        if let Err(e) = cx.register(file.as_raw_fd(), 0, events) {
            log::error!("frames of a tap device cannot be waited for: {e}");
        }
        let lane = port
            .open(cx, index as u16)
            .inspect_err(|e| log::error!("frames of a tap device lead nowhere: {e}"))
            .ok();
        let (file, counters) = (Rc::new(file), shared.counters[index].clone());
        let outward = Rc::new(RefCell::new(Outward {
            file: file.clone(),
            header,
            carries,
            completes,
            counters: counters.clone(),
            pieces: Vec::new(),
            scratch: None,
        }));
        let registration = Registration::new(cx, outward);
        shared.set_outlet(index, Some(registration.outlet().clone()), port);
        Self {
            file,
            header,
            index,
            carries,
            counters,
            shared,
            port: port.clone(),
            lane,
            registration: Some(registration),
            buffer: Box::default(),
            batch: Batch::default(),
            glance: Glance::default(),
        }
    }

    /// Reads a header and a frame to the beginning of `room`, of [`WHOLE`] bytes at least; `None`: there is none.
    ///
    /// # Safety
    /// `room` is writable, and nothing is lent of it.
    unsafe fn read(&self, room: *mut u8) -> io::Result<Option<usize>> {
        // SAFETY: the caller's promise.
        let n = unsafe { libc::read(self.file.as_raw_fd(), room.cast(), WHOLE) };
        match n {
            n if n >= 0 => Ok(Some(n as usize)),
            _ => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
                e => Err(e),
            },
        }
    }

    /// Adds what was read to the batch; `false`: it makes no sense.
    ///
    /// # Safety
    /// `whole` is not written to before the batch is cleared.
    unsafe fn add(&mut self, whole: &[u8]) -> bool {
        let Some((before, frame)) = whole.split_at_checked(self.header) else {
            return false;
        };
        let mut bytes = [0; HEADER_TUNNEL];
        bytes[..before.len()].copy_from_slice(before);
        let header = Header::read_from_bytes(&bytes).expect("of its length");
        let body = frame.len();
        let (head, rest) = frame.split_at(body.min(HEAD));
        let Ok(packet) = parse(head, body) else {
            return false;
        };
        let Ok(offload) = header.offload(&packet, head, body) else {
            return false;
        };
        if self.batch.push(head).is_none() {
            return false;
        }
        let rest = IoVec::new(rest.as_ptr().cast_mut(), rest.len());
        // SAFETY: the caller's promise.
        unsafe { self.batch.lend(&[rest]) };
        let last = self.batch.frames().len() - 1;
        let own = is_own(&offload, &packet);
        let frame = &mut self.batch.frames_mut()[last];
        frame.offload = offload;
        if own || self.carries == Carries::Tunnels {
            // In a tunnel it is whoever unwraps the frame that knows its headers.
            frame.packet = Some(packet);
        } else {
            // Before anybody looks at the frame: nothing is written later over what was checked.
            self.batch.lent().complete_checksum(last);
        }
        true
    }
}

impl Actor for Worker {
    fn event(&mut self, _: &mut Context<'_>, _: Event) {
        self.glance.told();
    }

    fn turn(&mut self, cx: &mut Context<'_>) -> Turn {
        if self.shared.closed.load(Ordering::Relaxed) {
            cx.unregister(self.file.as_raw_fd());
            self.shared.set_outlet(self.index, None, &self.port);
            self.registration = None;
            return Turn::Done;
        }
        if !self.glance.is_due() {
            return Turn::Idle;
        }
        if self.buffer.is_empty() {
            self.buffer = vec![0; BUFFER].into();
        }
        self.batch.clear();
        // By pointer, as what is lent of one part stays while another is written.
        let base = self.buffer.as_mut_ptr();
        let (mut at, mut read, mut bytes) = (0, false, 0);
        while !self.batch.is_full() && BUFFER - at >= WHOLE {
            // SAFETY: so many bytes are left of the buffer, and what was lent lies before them.
            match unsafe { self.read(base.add(at)) } {
                Ok(Some(len)) => {
                    read = true;
                    // SAFETY: the kernel has written them, and the rest of this turn does not.
                    let added = unsafe { self.add(std::slice::from_raw_parts(base.add(at), len)) };
                    if added {
                        bytes += (len - self.header) as u64;
                    } else {
                        self.shared.malformed.fetch_add(1, Ordering::Relaxed);
                    }
                    // Each begins at a multiple of the alignment that copies are fast with.
                    at = (at + len).next_multiple_of(64).min(BUFFER);
                }
                Ok(None) => break,
                Err(e) => {
                    // It has been set down, or taken away.
                    log::debug!("a tap device: {e}");
                    break;
                }
            }
        }
        if !read {
            self.glance.found_nothing();
            return Turn::Idle;
        }
        let frames = self.batch.frames().len() as u64;
        if let Some(lane) = self.lane.as_mut().filter(|_| frames > 0) {
            self.counters.sent.passed(frames, bytes);
            lane.send(cx.now(), self.batch.lent());
        }
        self.batch.clear();
        Turn::Worked
    }
}

impl Outward {
    /// Gives a frame to the kernel, with what is left to do on it.
    fn write(&mut self, batch: &Batch, i: usize) {
        let frame = &batch.frames()[i];
        let (head, len) = (frame.head(), frame.len());
        let header = Header::new(&frame.offload, head, len, self.carries);
        let header = &header.as_bytes()[..self.header];
        self.pieces.clear();
        // Both are only read.
        self.pieces
            .push(IoVec::new(header.as_ptr().cast_mut(), header.len()));
        self.pieces
            .push(IoVec::new(head.as_ptr().cast_mut(), head.len()));
        self.pieces.extend_from_slice(batch.tail(i));
        // SAFETY: header and head are borrowed, the rest is lent during this call; the kernel only reads them.
        let written = unsafe {
            libc::writev(
                self.file.as_raw_fd(),
                IoVec::as_raw(&self.pieces),
                self.pieces.len() as libc::c_int,
            )
        };
        if written >= 0 {
            return self.counters.received.passed(1, len as u64);
        }
        let cause = match io::Error::last_os_error().raw_os_error() {
            Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => Cause::Congested,
            // It is not up.
            Some(libc::EIO | libc::EBADFD) => Cause::LinkDown,
            _ => Cause::Refused,
        };
        self.counters.received.drops.add(cause, 1);
    }

    /// As [`Outward::write`], after what the kernel cannot do was done.
    #[cold]
    fn write_done(&mut self, batch: &Batch, i: usize) {
        let mut scratch = self.scratch.take().unwrap_or_default();
        match batch.frames()[i].offload.gso {
            Some(_) => batch.segment(i, &mut scratch, |mut segments| {
                for k in 0..segments.frames().len() {
                    if !self.completes.contains(Offloads::CSUM) {
                        segments.complete_checksum(k);
                    }
                    self.write(&segments, k);
                }
            }),
            // Every kernel completes checksums.
            None => self.write(batch, i),
        }
        scratch.clear();
        self.scratch = Some(scratch);
    }
}

impl Receive for Outward {
    fn receive(&mut self, batch: &Batch, which: &[u8]) {
        for i in which.iter().map(|i| usize::from(*i)) {
            let frame = &batch.frames()[i];
            let network = frame.offload.gso.map_or(0, |gso| usize::from(gso.network));
            let ipv4 = frame.head().get(network).is_some_and(|b| b >> 4 == 4);
            if self.completes.contains(frame.offload.needs(ipv4)) {
                self.write(batch, i);
            } else {
                self.write_done(batch, i);
            }
        }
    }
}
