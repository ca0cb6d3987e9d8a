//! Frames, and batches of them.
//!
//! Unsafe, because the rest of a frame lies in memory that is only lent.
#![allow(unsafe_code)]

use std::fmt;

use bluff_memory::IoVec;
use bluff_packet::{Frame as Packet, Malformed, parse_into};

use crate::Offload;

/// Bytes of a frame that its sender copies, and that may be looked at: all headers lie there, or the frame is not understood.
pub const HEAD: usize = 256;
/// The most bytes of a head: what was put in front counts too, also where the frame was copied since.
pub const HEAD_MAX: usize = HEADROOM + HEAD;
/// Bytes free before them, for the headers of a tunnel (Ethernet, IPv6, UDP, Geneve with options).
pub const HEADROOM: usize = 128;
/// The most frames of a batch.
pub const BATCH: usize = 32;
/// The longest frame, in bytes: the largest IP packet (65,535) behind an Ethernet header with two tags. IPv6 jumbograms are not served.
pub const MAX_FRAME: usize = 65_535 + 14 + 8;

/// A frame: its head on the card, the rest where its sender has it.
pub struct Frame {
    bytes: [u8; HEADROOM + HEAD_MAX],
    /// Where it begins in `bytes`.
    start: u16,
    /// Where the head ends in `bytes`.
    end: u16,
    /// Its pieces in the batch's list.
    tail: (u32, u32),
    tail_len: u32,
    /// What is left to do on it.
    pub offload: Offload,
    /// What its headers say, where somebody has read them. It is of the frame as it was then.
    pub packet: Option<Packet>,
    /// A hash of its flow, the same in both directions; 0 where nobody has computed it.
    pub hash: u32,
}

impl Frame {
    fn new() -> Self {
        Self {
            bytes: [0; HEADROOM + HEAD_MAX],
            start: HEADROOM as u16,
            end: HEADROOM as u16,
            tail: (0, 0),
            tail_len: 0,
            offload: Offload::default(),
            packet: None,
            hash: 0,
        }
    }

    /// Its first bytes: at least the first [`HEAD`] of what the sender gave, or the whole frame.
    #[inline]
    pub fn head(&self) -> &[u8] {
        &self.bytes[usize::from(self.start)..usize::from(self.end)]
    }

    /// As [`Frame::head`], to be changed.
    #[inline]
    pub fn head_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[usize::from(self.start)..usize::from(self.end)]
    }

    /// The whole length in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        usize::from(self.end - self.start) + self.tail_len as usize
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What its headers say. They are read where nobody has read them yet.
    ///
    /// # Errors
    /// Those of [`bluff_packet::parse`].
    #[inline]
    pub fn parse(&mut self) -> Result<&Packet, Malformed> {
        if self.packet.is_none() {
            let len = self.len();
            let head = &self.bytes[usize::from(self.start)..usize::from(self.end)];
            parse_into(head, len, &mut self.packet)?;
        }
        Ok(self.packet.as_ref().expect("it was read"))
    }

    /// What was put before it by [`Batch::push_with`], `n` bytes, where nothing was put in front since.
    #[inline]
    pub fn before(&self, n: usize) -> &[u8] {
        &self.bytes[HEADROOM - n..HEADROOM]
    }

    /// How many bytes could still be put in front.
    pub fn headroom(&self) -> usize {
        usize::from(self.start)
    }

    /// Puts `n` bytes in front and gives them to be written. What the offloads say of places in the frame follows.
    ///
    /// # Panics
    /// Where there is no such room: the caller knows [`HEADROOM`] and what it has used of it.
    #[inline]
    pub fn prepend(&mut self, n: usize) -> &mut [u8] {
        assert!(n <= self.headroom(), "no room for {n} more bytes");
        self.start -= n as u16;
        self.shift(n as i32);
        let start = usize::from(self.start);
        &mut self.bytes[start..start + n]
    }

    /// Takes `n` bytes off the front.
    ///
    /// # Panics
    /// Where the head has fewer, or an offload speaks of them.
    #[inline]
    pub fn strip(&mut self, n: usize) {
        assert!(n <= self.head().len(), "not in the head");
        self.start += n as u16;
        self.shift(-(n as i32));
    }

    /// Makes room for `bytes` behind the first `at` bytes and puts them there: a VLAN tag behind the addresses.
    ///
    /// # Panics
    /// As [`Frame::prepend`], and where the head has fewer than `at` bytes.
    pub fn insert(&mut self, at: usize, bytes: &[u8]) {
        let n = bytes.len();
        self.prepend(n);
        let head = self.head_mut();
        head.copy_within(n..n + at, 0);
        head[at..at + n].copy_from_slice(bytes);
    }

    /// Takes `n` bytes out behind the first `at`.
    ///
    /// # Panics
    /// As [`Frame::strip`].
    pub fn remove(&mut self, at: usize, n: usize) {
        self.head_mut().copy_within(0..at, n);
        self.strip(n);
    }

    fn shift(&mut self, by: i32) {
        let moved = |at: u16| u16::try_from(i32::from(at) + by).expect("a place in the frame");
        if let crate::Csum::Partial { start, .. } = &mut self.offload.csum {
            *start = moved(*start);
        }
        if let Some(gso) = &mut self.offload.gso {
            for place in [&mut gso.network, &mut gso.transport, &mut gso.headers] {
                *place = moved(*place);
            }
        }
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frame")
            .field("len", &self.len())
            .field("offload", &self.offload)
            .finish_non_exhaustive()
    }
}

/// Up to [`BATCH`] frames, which are handed on together. It is filled again and again, and allocates nothing after its start.
pub struct Batch {
    frames: Box<[Frame]>,
    len: usize,
    pieces: Vec<IoVec>,
}

impl Default for Batch {
    fn default() -> Self {
        Self {
            frames: (0..BATCH).map(|_| Frame::new()).collect(),
            len: 0,
            pieces: Vec::with_capacity(4 * BATCH),
        }
    }
}

impl Batch {
    /// Forgets all frames.
    #[inline]
    pub fn clear(&mut self) {
        self.len = 0;
        self.pieces.clear();
    }

    /// Whether no other fits.
    #[inline]
    pub fn is_full(&self) -> bool {
        self.len == BATCH
    }

    /// The frames.
    #[inline]
    pub fn frames(&self) -> &[Frame] {
        &self.frames[..self.len]
    }

    /// As [`Batch::frames`], to be changed.
    #[inline]
    pub fn frames_mut(&mut self) -> &mut [Frame] {
        &mut self.frames[..self.len]
    }

    /// The rest of frame `i`, behind its head.
    #[inline]
    pub fn tail(&self, i: usize) -> &[IoVec] {
        let (first, end) = self.frames[i].tail;
        &self.pieces[first as usize..end as usize]
    }

    /// Adds a frame whose head `fill` writes into the place that it is given: `before` bytes that are not the frame's (a header of the
    /// sender's own), and then the first bytes of it, up to [`HEAD_MAX`]. `fill` says how many bytes it wrote in all. Nothing is added where those
    /// are not more than `before`.
    ///
    /// # Panics
    /// Where `before` is over [`HEADROOM`], or the batch is full.
    #[inline(always)]
    pub fn push_with(
        &mut self,
        before: usize,
        fill: impl FnOnce(&mut [u8]) -> usize,
    ) -> Option<&mut Frame> {
        assert!(before <= HEADROOM);
        let pieces = self.pieces.len() as u32;
        let frame = &mut self.frames[self.len];
        let room = &mut frame.bytes[HEADROOM - before..];
        let filled = fill(room).min(before + HEAD_MAX);
        if filled <= before {
            return None;
        }
        frame.start = HEADROOM as u16;
        frame.end = (HEADROOM + filled - before) as u16;
        frame.tail = (pieces, pieces);
        frame.tail_len = 0;
        frame.offload = Offload::default();
        frame.packet = None;
        frame.hash = 0;
        self.len += 1;
        Some(frame)
    }

    /// Adds a frame of at most [`HEAD_MAX`] bytes, copied.
    ///
    /// # Panics
    /// Where it is longer, or the batch is full.
    pub fn push(&mut self, frame: &[u8]) -> Option<&mut Frame> {
        assert!(frame.len() <= HEAD_MAX, "the rest has to be lent");
        self.push_with(0, |room| {
            room[..frame.len()].copy_from_slice(frame);
            frame.len()
        })
    }

    /// For whoever is called with it.
    #[inline]
    pub fn lent(&mut self) -> Lent<'_> {
        Lent(self)
    }

    /// Takes frame `i` away; those behind it follow up.
    #[cold]
    pub fn remove(&mut self, i: usize) {
        // What it lends stays until the batch is cleared; nobody looks at it.
        self.frames[i..self.len].rotate_left(1);
        self.len -= 1;
    }

    /// Takes the last frame away again.
    pub fn pop(&mut self) {
        self.len -= 1;
        self.pieces.truncate(self.frames[self.len].tail.0 as usize);
    }

    /// Lends the rest of the last frame.
    ///
    /// # Safety
    /// Until the batch is cleared the memory that `pieces` name stays mapped, and nothing in this process borrows it mutably. Others may
    /// change it at any time.
    #[inline]
    pub unsafe fn lend(&mut self, pieces: &[IoVec]) {
        let frame = &mut self.frames[self.len - 1];
        let len = IoVec::total(pieces);
        for piece in pieces.iter().filter(|piece| !piece.is_empty()) {
            // Pages that lie one behind the other are one piece for whoever copies them.
            match self.pieces[frame.tail.0 as usize..].last_mut() {
                Some(last) if last.ptr().wrapping_add(last.len()) == piece.ptr() => {
                    *last = IoVec::new(last.ptr(), last.len() + piece.len());
                }
                _ => self.pieces.push(*piece),
            }
        }
        frame.tail.1 = self.pieces.len() as u32;
        frame.tail_len += u32::try_from(len).expect("a frame is shorter");
    }

    /// Copies the frame's bytes from `from` on to `to`, as far as they reach; says how many.
    pub fn copy_to(&self, i: usize, from: usize, to: &mut [u8]) -> usize {
        let head = self.frames[i].head();
        let (mut skip, mut done) = (from, 0);
        if skip < head.len() {
            let n = (head.len() - skip).min(to.len());
            to[..n].copy_from_slice(&head[skip..skip + n]);
            (skip, done) = (0, n);
        } else {
            skip -= head.len();
        }
        for piece in self.tail(i) {
            if skip >= piece.len() {
                skip -= piece.len();
                continue;
            }
            let n = (piece.len() - skip).min(to.len() - done);
            let at = piece.ptr().wrapping_add(skip);
            // SAFETY: lent until the batch is cleared (contract of `lend`), and `to` is borrowed, so they do not overlap; n bytes are
            // left of both.
            unsafe { std::ptr::copy_nonoverlapping(at, to[done..].as_mut_ptr(), n) };
            (skip, done) = (0, done + n);
            if done == to.len() {
                break;
            }
        }
        done
    }

    /// Writes what follows the first `from` bytes of `before` and frame `i` together into `to`, as far as both reach; says how many bytes.
    ///
    /// # Safety
    /// The memory that `to` names is mapped, and nothing in this process borrows it. Others may change it at any time.
    #[inline]
    pub unsafe fn write_to(&self, i: usize, before: &[u8], from: usize, to: &[IoVec]) -> usize {
        let head = self.frames[i].head();
        let mut place = Place {
            to,
            at: 0,
            written: 0,
        };
        let mut skip = from;
        for part in [before, head] {
            if skip < part.len() {
                let part = &part[skip..];
                // SAFETY: borrowed, and the caller's promise for `to`.
                unsafe { place.write(part.as_ptr(), part.len()) };
            }
            skip = skip.saturating_sub(part.len());
        }
        for piece in self.tail(i) {
            if skip < piece.len() {
                let start = piece.ptr().wrapping_add(skip);
                // SAFETY: lent until the batch is cleared (contract of `lend`), and the caller's promise for `to`.
                unsafe { place.write(start, piece.len() - skip) };
            }
            skip = skip.saturating_sub(piece.len());
        }
        place.written
    }

    /// Writes `before` and frame `i` to `to`.
    ///
    /// # Safety
    /// There is room for both at `to`: it is mapped, and nothing in this process borrows it. Others may change it at any time.
    #[inline]
    pub unsafe fn write_whole<const N: usize>(&self, i: usize, before: &[u8; N], to: *mut u8) {
        let head = self.frames[i].head();
        let mut at = to.wrapping_add(N);
        // SAFETY: the caller's promise; what is borrowed is not there.
        unsafe {
            std::ptr::copy_nonoverlapping(before.as_ptr(), to, N);
            std::ptr::copy_nonoverlapping(head.as_ptr(), at, head.len());
        }
        at = at.wrapping_add(head.len());
        for piece in self.tail(i) {
            // SAFETY: lent until the batch is cleared (contract of `lend`), and the caller's promise. They may overlap: a guest can have one buffer
            // read and written.
            unsafe { std::ptr::copy(piece.ptr(), at, piece.len()) };
            at = at.wrapping_add(piece.len());
        }
    }
}

/// A batch as those see it who are called with it: they may change heads, and may not keep what is lent.
#[derive(Debug)]
pub struct Lent<'a>(&'a mut Batch);

impl std::ops::Deref for Lent<'_> {
    type Target = Batch;

    fn deref(&self) -> &Batch {
        self.0
    }
}

impl Lent<'_> {
    /// The frames, to be changed.
    #[inline]
    pub fn frames_mut(&mut self) -> &mut [Frame] {
        self.0.frames_mut()
    }

    /// For a call within the call.
    #[inline]
    pub fn again(&mut self) -> Lent<'_> {
        Lent(self.0)
    }

    pub(crate) fn batch_mut(&mut self) -> &mut Batch {
        self.0
    }
}

/// Where bytes go that are written one after the other.
struct Place<'a> {
    to: &'a [IoVec],
    /// How much of the first piece is full.
    at: usize,
    written: usize,
}

impl Place<'_> {
    /// # Safety
    /// `len` bytes at `from` are readable, and the pieces are writable.
    #[inline]
    unsafe fn write(&mut self, mut from: *const u8, mut len: usize) {
        while len > 0
            && let Some(piece) = self.to.first()
        {
            let n = (piece.len() - self.at).min(len);
            // SAFETY: n bytes are left of both. They may overlap: a guest can have one buffer read and written.
            unsafe { std::ptr::copy(from, piece.ptr().wrapping_add(self.at), n) };
            from = from.wrapping_add(n);
            (len, self.written, self.at) = (len - n, self.written + n, self.at + n);
            if self.at == piece.len() {
                (self.to, self.at) = (&self.to[1..], 0);
            }
        }
    }
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.frames()).finish()
    }
}
