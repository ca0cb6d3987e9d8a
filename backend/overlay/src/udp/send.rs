//! The way out: frames into datagrams, those of one flow together.
//!
//! Unsafe, because the kernel is given what frames lend.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use bluff_memory::IoVec;
use bluff_net::{Batch, Cause, Lent, all_of, places};
use bluff_packet::Vni;

use super::Shared;
use super::socket::{self, Address, Outgoing, Slots};
use crate::underlay::Uplink;

/// Source ports of a reactor.
const FLOWS: usize = 16;
/// Datagrams of one call at most, as kernels before 6.9 have it.
const SEGMENTS: usize = 64;
/// Bytes of them: of an IP packet, less its headers.
const BYTES: usize = 65_000;

/// The sockets of a reactor.
pub(super) struct Senders {
    shared: Arc<Shared>,
    sockets: Vec<OwnedFd>,
    /// The kernel cuts what belongs together.
    segments: bool,
    pieces: Vec<IoVec>,
    messages: Vec<Outgoing>,
    slots: Slots,
    scratch: Batch,
}

/// The way out of a port.
pub(super) struct Way(pub(super) Rc<RefCell<Senders>>);

impl Uplink for Way {
    fn send(&mut self, _: Instant, batch: &mut Lent<'_>, which: u32, vni: Vni, to: IpAddr) {
        self.0.borrow_mut().send(batch, which, vni, to);
    }
}

impl Senders {
    pub(super) fn new(shared: Arc<Shared>) -> io::Result<Self> {
        Ok(Self {
            sockets: (0..FLOWS)
                .map(|_| socket::sender(shared.local))
                .collect::<io::Result<_>>()?,
            shared,
            segments: true,
            pieces: Vec::new(),
            messages: Vec::new(),
            slots: Slots::default(),
            scratch: Batch::default(),
        })
    }

    fn send(&mut self, batch: &mut Lent<'_>, which: u32, vni: Vni, to: IpAddr) {
        if to.is_ipv4() != self.shared.local.is_ipv4() {
            let n = u64::from(which.count_ones());
            return self.shared.drops.sent.add_shared(Cause::Nowhere, n);
        }
        let header = self.shared.kind.header(vni);
        let to = Address::new(SocketAddr::new(to, self.shared.port));
        let mut whole = which;
        for i in places(which) {
            if batch.frames()[i].offload.gso.is_none() {
                // The kernel knows nothing of what is inside.
                batch.complete_checksum(i);
                continue;
            }
            whole &= !(1 << i);
            let mut scratch = std::mem::take(&mut self.scratch);
            batch.segment(i, &mut scratch, |mut segments| {
                for k in 0..segments.frames().len() {
                    segments.complete_checksum(k);
                }
                let all = all_of(&segments);
                self.send_whole(&segments, all, &header, &to);
            });
            self.scratch = scratch;
        }
        self.send_whole(batch, whole, &header, &to);
    }

    /// Sends frames, each of which is one datagram.
    fn send_whole(&mut self, batch: &Batch, which: u32, header: &[u8; 8], to: &Address) {
        let flow = |i: usize| batch.frames()[i].hash as usize >> 28;
        let mut left = which;
        while left != 0 {
            let its = flow(left.trailing_zeros() as usize);
            let same = places(left).filter(|i| flow(*i) == its);
            let same = same.fold(0u32, |set, i| set | 1 << i);
            left &= !same;
            self.gather(batch, same, header);
            self.give(its, to);
        }
    }

    /// Makes messages of the frames of one flow: neighbours of one length go together.
    fn gather(&mut self, batch: &Batch, which: u32, header: &[u8; 8]) {
        self.pieces.clear();
        self.messages.clear();
        // Of the message that is being made: datagrams, bytes, and whether its last one was shorter.
        let (mut count, mut bytes, mut open) = (0, 0, false);
        for i in places(which) {
            let head = batch.frames()[i].head();
            let len = header.len() + batch.frames()[i].len();
            let first = self.pieces.len();
            // Both are only read.
            self.pieces
                .push(IoVec::new(header.as_ptr().cast_mut(), header.len()));
            self.pieces
                .push(IoVec::new(head.as_ptr().cast_mut(), head.len()));
            self.pieces.extend_from_slice(batch.tail(i));
            let pieces = self.pieces.len() - first;
            if let Some(last) = self.messages.last_mut()
                && open
                && self.segments
                && len <= usize::from(last.segment)
                && count < SEGMENTS
                && bytes + len <= BYTES
                && last.count + pieces <= libc::UIO_MAXIOV as usize
            {
                last.count += pieces;
                (count, bytes) = (count + 1, bytes + len);
                open = len == usize::from(last.segment);
                continue;
            }
            let segment = u16::try_from(len).unwrap_or(0);
            self.messages.push(Outgoing {
                first,
                count: pieces,
                segment,
            });
            (count, bytes, open) = (1, len, segment > 0);
        }
        for message in &mut self.messages {
            // One datagram needs not be cut; older kernels say no to it.
            let len: usize = self.pieces[message.first..message.first + message.count]
                .iter()
                .map(IoVec::len)
                .sum();
            if len <= usize::from(message.segment) {
                message.segment = 0;
            }
        }
    }

    /// Gives the messages to the kernel.
    fn give(&mut self, flow: usize, to: &Address) {
        let (mut done, mut again) = (0, true);
        while done < self.messages.len() {
            let left = &self.messages[done..];
            // SAFETY: the pieces are a header and heads, which are borrowed by our caller, and what the batch was lent.
            let sent = unsafe {
                socket::send(&self.sockets[flow], to, left, &self.pieces, &mut self.slots)
            };
            let error = match sent {
                Ok(n) => {
                    (done, again) = (done + n, true);
                    continue;
                }
                Err(e) => e,
            };
            let segment = left[0].segment > 0;
            let cause = match error.raw_os_error() {
                Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => Cause::Congested,
                Some(libc::EMSGSIZE) => Cause::TooLong,
                Some(libc::EINVAL | libc::EIO) if segment => {
                    // Not here: from now on one by one.
                    self.segments = false;
                    Cause::Refused
                }
                // An answer to something earlier, perhaps: it is told once.
                _ if std::mem::take(&mut again) => continue,
                _ => Cause::Refused,
            };
            self.shared.drops.sent.add_shared(cause, 1);
            done += 1;
        }
    }
}
