//! Frames from one thread to another: a ring of bytes, bounded, with one writer and one reader.
//!
//! All receivers of a reactor are reached through it, those of different tenants among them, so each has a **share**: it may have as much waiting as is free ([`Sender::share`]). One receiver that is
//! flooded gets half of the ring, two get a third each, and whoever has nothing waiting always finds as much free as each of those has (Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory packet switches", 1998). The writer
//! counts what it puts in by receiver, the reader what it takes out; a difference of them is what waits.
//!
//! Unsafe, because the ring's free bytes are not initialised, and what a batch is lent out of it is named by pointers.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use bluff_memory::IoVec;
use rtrb::chunks::ChunkError;
use rtrb::{Consumer, Producer, RingBuffer};

use crate::{BATCH, Batch, Csum, Gso, GsoKind, Lent, Offload};

/// Bytes of a mailbox: a lone receiver's share of it is what a transmit queue sends in a turn (1 MiB). Its pages cost nothing before they are used.
pub(crate) const SIZE: usize = 2 << 20;
/// Bytes before each frame.
const HEADER: usize = 32;
/// Records begin at multiples of so many bytes.
const ALIGN: usize = 16;

/// Whom a frame is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Envelope {
    pub(crate) slot: u32,
    pub(crate) generation: u32,
}

/// Receivers whose shares are told apart. Those of a reactor that has more share with others.
const SHARES: usize = 512;

/// Bytes that were taken out, by receiver. They wrap.
type Taken = Arc<[AtomicU32; SHARES]>;

pub(crate) struct Sender {
    ring: Producer<u8>,
    /// Bytes that were put in, by receiver. They wrap.
    put: Box<[u32; SHARES]>,
    taken: Taken,
}

pub(crate) struct Receiver {
    ring: Consumer<u8>,
    taken: Taken,
}

/// What a receiver may be sent now.
pub(crate) struct Share {
    /// Bytes of its own that wait.
    waiting: u32,
    /// Bytes that are free.
    free: u32,
}

/// Bytes that a frame takes.
fn whole(len: usize) -> usize {
    (HEADER + len).next_multiple_of(ALIGN)
}

/// A mailbox.
pub(crate) fn channel(size: usize) -> (Sender, Receiver) {
    let (producer, consumer) = RingBuffer::new(size);
    let taken: Taken = Arc::new([const { AtomicU32::new(0) }; SHARES]);
    let sender = Sender {
        ring: producer,
        put: Box::new([0; SHARES]),
        taken: taken.clone(),
    };
    let receiver = Receiver {
        ring: consumer,
        taken,
    };
    (sender, receiver)
}

/// What stands before a frame. It never leaves this process.
fn header(len: u32, head: u16, to: Envelope, hash: u32, offload: &Offload) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    let words = [len, to.slot, to.generation, hash];
    for (at, word) in bytes.chunks_exact_mut(4).zip(words) {
        at.copy_from_slice(&word.to_ne_bytes());
    }
    let (csum, start, offset) = match offload.csum {
        Csum::Unknown => (0, 0, 0),
        Csum::Valid => (1, 0, 0),
        Csum::Partial { start, offset } => (2, start, offset),
    };
    let (kind, gso) = match offload.gso {
        None => (0, [0; 4]),
        Some(gso) => {
            let kind = match gso.kind {
                GsoKind::Tcp4 => 1,
                GsoKind::Tcp6 => 2,
                GsoKind::Udp => 3,
            };
            let places = [gso.size, gso.network, gso.transport, gso.headers];
            (kind | u16::from(gso.ecn) << 4, places)
        }
    };
    let [size, network, transport, headers] = gso;
    let halves = [
        csum | kind << 8,
        start,
        offset,
        size,
        network,
        transport,
        headers,
        head,
    ];
    for (at, half) in bytes[16..].chunks_exact_mut(2).zip(halves) {
        at.copy_from_slice(&half.to_ne_bytes());
    }
    bytes
}

fn parse(bytes: &[u8; HEADER]) -> (usize, usize, Envelope, u32, Offload) {
    let word = |i: usize| {
        let at = &bytes[4 * i..4 * i + 4];
        u32::from_ne_bytes(at.try_into().expect("four bytes"))
    };
    let half = |i: usize| {
        let at = &bytes[16 + 2 * i..18 + 2 * i];
        u16::from_ne_bytes(at.try_into().expect("two bytes"))
    };
    let csum = match half(0) & 0xff {
        0 => Csum::Unknown,
        1 => Csum::Valid,
        _ => Csum::Partial {
            start: half(1),
            offset: half(2),
        },
    };
    let kind = match half(0) >> 8 & 0xf {
        0 => None,
        1 => Some(GsoKind::Tcp4),
        2 => Some(GsoKind::Tcp6),
        _ => Some(GsoKind::Udp),
    };
    let gso = kind.map(|kind| Gso {
        kind,
        ecn: half(0) >> 12 != 0,
        size: half(3),
        network: half(4),
        transport: half(5),
        headers: half(6),
    });
    let to = Envelope {
        slot: word(1),
        generation: word(2),
    };
    let (len, head) = (word(0) as usize, usize::from(half(7)));
    (len, head, to, word(3), Offload { csum, gso })
}

impl Sender {
    /// The reader has gone.
    pub(crate) fn is_closed(&self) -> bool {
        self.ring.is_abandoned()
    }

    /// What `to` may be sent: looked up once for each batch.
    pub(crate) fn share(&self, to: Envelope) -> Share {
        let at = to.slot as usize % SHARES;
        // Relaxed: it is a count, and orders nothing. An old one makes the share smaller.
        let taken = self.taken[at].load(Ordering::Relaxed);
        Share {
            waiting: self.put[at].wrapping_sub(taken),
            free: self.ring.slots() as u32,
        }
    }

    /// Puts frame `i` of `batch` in, for `to`; `false` where there is no room, or its share is used up.
    pub(crate) fn put_shared(
        &mut self,
        batch: &Batch,
        i: usize,
        to: Envelope,
        share: &mut Share,
    ) -> bool {
        if share.waiting >= share.free || !self.put(batch, i, to) {
            return false;
        }
        let bytes = whole(batch.frames()[i].len()) as u32;
        (share.waiting, share.free) = (share.waiting + bytes, share.free - bytes);
        let put = &mut self.put[to.slot as usize % SHARES];
        *put = put.wrapping_add(bytes);
        true
    }

    /// Puts frame `i` of `batch` in, for `to`, whatever its share; `false` where there is no room.
    pub(crate) fn put(&mut self, batch: &Batch, i: usize, to: Envelope) -> bool {
        let frame = &batch.frames()[i];
        let len = frame.len();
        let whole = whole(len);
        let mut chunk = match self.ring.write_chunk_uninit(whole) {
            Ok(chunk) => chunk,
            Err(ChunkError::TooFewSlots(_)) => return false,
        };
        let (first, second) = chunk.as_mut_slices();
        let parts = [
            (first.as_mut_ptr().cast::<u8>(), first.len()),
            (second.as_mut_ptr().cast::<u8>(), second.len()),
        ];
        let mut at = 0;
        let mut write = |from: *const u8, len: usize| {
            let mut done = 0;
            while done < len {
                let (start, room) = if at < parts[0].1 {
                    (parts[0].0.wrapping_add(at), parts[0].1 - at)
                } else {
                    let skip = at - parts[0].1;
                    (parts[1].0.wrapping_add(skip), parts[1].1 - skip)
                };
                let n = room.min(len - done);
                assert!(n > 0, "the chunk is as long as the record");
                // SAFETY: n bytes are left at `start` inside the chunk, which is ours; `from` is readable for `len` bytes (below), and
                // lies in no ring.
                unsafe { std::ptr::copy_nonoverlapping(from.add(done), start, n) };
                (at, done) = (at + n, done + n);
            }
        };
        let head = frame.head().len() as u16;
        let before = header(len as u32, head, to, frame.hash, &frame.offload);
        write(before.as_ptr(), HEADER);
        write(frame.head().as_ptr(), frame.head().len());
        for piece in batch.tail(i) {
            // Lent until the batch is cleared (contract of `Batch::lend`).
            write(piece.ptr(), piece.len());
        }
        write([0; ALIGN].as_ptr(), whole - HEADER - len);
        // SAFETY: all of it was written.
        unsafe { chunk.commit_all() };
        true
    }
}

impl Receiver {
    /// Nothing is in it.
    pub(crate) fn is_empty(&self) -> bool {
        self.ring.is_empty()
    }

    /// Nothing is in it, and nothing will come.
    pub(crate) fn is_over(&self) -> bool {
        // In this order, and so seen: what was put in before the writer went. The ring's own look is a relaxed one.
        let gone = self.ring.is_abandoned();
        fence(Ordering::Acquire);
        gone && self.ring.is_empty()
    }

    /// Shows up to a batch of frames to `deliver`, and takes out as many as it says; says how many.
    pub(crate) fn take(
        &mut self,
        batch: &mut Batch,
        envelopes: &mut [Envelope; BATCH],
        deliver: impl FnOnce(Lent<'_>, &[Envelope]) -> usize,
    ) -> usize {
        let slots = self.ring.slots();
        let Ok(chunk) = self.ring.read_chunk(slots) else {
            return 0;
        };
        let (first, second) = chunk.as_slices();
        let (mut at, mut n) = (0, 0);
        let mut ends = [0; BATCH];
        batch.clear();
        while at < slots && n < BATCH {
            let mut bytes = [0; HEADER];
            copy(first, second, at, &mut bytes);
            let (len, head, to, hash, offload) = parse(&bytes);
            let body = at + HEADER;
            let frame = batch.push_with(0, |room| {
                copy(first, second, body, &mut room[..head]);
                head
            });
            at += whole(len);
            let frame = frame.expect("nobody puts one in without bytes");
            (frame.hash, frame.offload) = (hash, offload);
            let pieces = pieces(first, second, body + head, len - head);
            // SAFETY: the chunk is ours until it is committed, after the batch was cleared; nothing borrows it mutably.
            unsafe { batch.lend(&pieces) };
            (envelopes[n], ends[n]) = (to, at);
            n += 1;
        }
        let taken = deliver(batch.lent(), &envelopes[..n]);
        batch.clear();
        let mut before = 0;
        for (i, run) in runs(&envelopes[..taken]) {
            let end = ends[i + run - 1];
            let cell = &self.taken[envelopes[i].slot as usize % SHARES];
            // Nobody else writes it.
            let sum = cell
                .load(Ordering::Relaxed)
                .wrapping_add((end - before) as u32);
            cell.store(sum, Ordering::Relaxed);
            before = end;
        }
        chunk.commit(before);
        taken
    }
}

/// Where frames of one receiver begin, and how many there are.
fn runs(envelopes: &[Envelope]) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    envelopes.chunk_by(PartialEq::eq).map(move |run| {
        let begin = at;
        at += run.len();
        (begin, run.len())
    })
}

/// Copies from two slices as if they were one.
fn copy(first: &[u8], second: &[u8], at: usize, to: &mut [u8]) {
    let n = first.len().saturating_sub(at).min(to.len());
    to[..n].copy_from_slice(&first[at.min(first.len())..][..n]);
    let skip = (at + n) - first.len().min(at + n);
    let rest = to.len() - n;
    if rest > 0 {
        to[n..].copy_from_slice(&second[skip..skip + rest]);
    }
}

/// Names bytes of two slices as if they were one. Those are only read.
fn pieces(first: &[u8], second: &[u8], at: usize, len: usize) -> [IoVec; 2] {
    let n = first.len().saturating_sub(at).min(len);
    let skip = (at + n).saturating_sub(first.len());
    let one = first.as_ptr().wrapping_add(at);
    let two = second.as_ptr().wrapping_add(skip);
    [
        IoVec::new(one.cast_mut(), n),
        IoVec::new(two.cast_mut(), len - n),
    ]
}
