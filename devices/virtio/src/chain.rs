//! One request of the driver: a chain of buffers, translated and checked.
//!
//! Unsafe, because headers and status bytes are copied from and to guest memory.
#![allow(unsafe_code)]

use std::sync::atomic::{Ordering, compiler_fence};

use bluff_memory::{DirtyLog, GuestMemory, Hint, IoVec};

use crate::{ChainError, QueueLog, prefetch};

/// Bytes of a line of a processor's cache. Where they are others, a hint comes too often.
const LINE: usize = 64;

/// The most pieces of a chain: what the kernel takes in one vector (`IOV_MAX`). It also bounds what a
/// driver with a long queue can have a chain grow to, which is kept.
const PIECES: usize = 1024;

/// A chain that was taken off a ring.
///
/// It is filled again and again, so that it costs no allocation once it has grown to the size of
/// what the driver sends. Its buffers belong to the epoch of memory that the ring had when it was
/// popped.
#[derive(Debug, Default)]
pub struct Chain {
    pub(crate) id: u16,
    /// Ring slots that it takes (packed rings).
    pub(crate) slots: u16,
    /// Its entry in the in-flight region (packed rings).
    pub(crate) entry: u16,
    iov: Vec<IoVec>,
    /// The guest address of each piece.
    addr: Vec<u64>,
    /// Where the readable pieces that have not been taken begin, and where they end.
    first: usize,
    readable: usize,
    /// The status byte, where it was taken off: our address and the guest's.
    status: Option<(*mut u8, u64)>,
    /// The driver has begun with writable buffers.
    writing: bool,
    /// It was walked to its end, so the last writable byte is known.
    whole: bool,
    /// The first buffer that lies in no memory.
    unmapped: Option<(u64, u32)>,
    /// That is so of the last writable one.
    status_unmapped: bool,
    /// The device may have written the data buffers.
    filled: bool,
    /// Descriptors that were looked at.
    walked: u32,
}

// SAFETY: the status pointer is an address like those in the pieces; a chain goes where its ring goes.
unsafe impl Send for Chain {}

impl Chain {
    #[inline]
    pub(crate) fn clear(&mut self) {
        self.iov.clear();
        self.addr.clear();
        (self.first, self.readable, self.status) = (0, 0, None);
        (self.writing, self.whole, self.unmapped) = (false, false, None);
        (self.status_unmapped, self.filled, self.walked) = (false, false, 0);
    }

    /// Says that nothing comes after what was pushed.
    #[inline(always)]
    pub(crate) fn end(&mut self) -> Result<(), ChainError> {
        self.whole = true;
        match self.unmapped {
            None => Ok(()),
            Some((addr, len)) => Err(ChainError::Unmapped { addr, len }),
        }
    }

    /// Appends a buffer. One without bytes is skipped, wherever it points; one that is not in memory
    /// is told at the end, as a status byte that comes after it can be written all the same.
    #[inline(always)]
    pub(crate) fn push(
        &mut self,
        memory: &GuestMemory,
        hint: &mut Hint,
        addr: u64,
        len: u32,
        writable: bool,
    ) -> Result<(), ChainError> {
        self.walked += 1;
        if writable {
            self.writing = true;
        } else if self.writing {
            return Err(ChainError::Order);
        }
        if len == 0 {
            return Ok(());
        }
        if self.iov.len() >= PIECES {
            return Err(ChainError::TooLong(PIECES as u16));
        }
        match memory.one(hint, addr, len) {
            Some(ptr) => {
                self.iov.push(IoVec::new(ptr, len as usize));
                self.addr.push(addr);
                self.status_unmapped = false;
            }
            None => self.push_pieces(memory, addr, len, writable)?,
        }
        if !writable {
            self.readable = self.iov.len();
        }
        Ok(())
    }

    /// A buffer over several regions.
    #[cold]
    fn push_pieces(
        &mut self,
        memory: &GuestMemory,
        addr: u64,
        len: u32,
        writable: bool,
    ) -> Result<(), ChainError> {
        let before = self.iov.len();
        let found = memory.segments(addr, len, &mut self.iov);
        self.status_unmapped = writable && found.is_err();
        if found.is_err() {
            self.unmapped.get_or_insert((addr, len));
        }
        if self.iov.len() > PIECES {
            return Err(ChainError::TooLong(PIECES as u16));
        }
        let mut at = addr;
        for piece in &self.iov[before..] {
            self.addr.push(at);
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// The head's index, or the buffer ID: what the driver recognises it by.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// What the device may read, in order. No piece is empty.
    #[inline]
    pub fn readable(&self) -> &[IoVec] {
        &self.iov[self.first..self.readable]
    }

    /// What the device may write, in order. No piece is empty. To write there, [`Chain::fill`] it.
    #[inline]
    pub fn writable(&self) -> &[IoVec] {
        &self.iov[self.readable..]
    }

    /// What the device may write, in order, to be written: from now on it counts as changed for a
    /// dirty log.
    #[inline]
    pub fn fill(&mut self) -> &[IoVec] {
        self.filled = true;
        self.writable()
    }

    /// Has the first bytes of what may be read come near: those of a header and of a frame's own headers.
    #[inline]
    pub fn prefetch_readable(&self) {
        for piece in self.readable().iter().take(2) {
            prefetch::read(piece.ptr());
            if piece.len() > LINE {
                prefetch::read(piece.ptr().wrapping_add(LINE));
            }
        }
    }

    /// Has the first `len` bytes of the first buffer that may be written come near; at most 256.
    #[inline]
    pub fn prefetch_writable(&self, len: usize) {
        let Some(piece) = self.writable().first() else {
            return;
        };
        let len = len.min(piece.len()).min(4 * LINE);
        for at in (0..len).step_by(LINE) {
            prefetch::write(piece.ptr().wrapping_add(at));
        }
    }

    /// How many descriptors it was made of, which is what finding it cost.
    #[inline]
    pub fn walked(&self) -> u32 {
        self.walked
    }

    /// Copies the first `to.len()` readable bytes and takes them off; `false`, and nothing is taken,
    /// where there are fewer.
    #[inline]
    pub fn take_front(&mut self, to: &mut [u8]) -> bool {
        // The common case: the driver gives the header a buffer of its own.
        if let Some(piece) = self.iov[self.first..self.readable].first()
            && piece.len() == to.len()
        {
            // SAFETY: resolved in the ring's epoch, which the ring keeps; as long as `to`.
            unsafe { copy(piece.ptr(), to) };
            self.first += 1;
            return true;
        }
        self.take_front_pieces(to)
    }

    #[cold]
    fn take_front_pieces(&mut self, to: &mut [u8]) -> bool {
        if IoVec::total(self.readable()) < to.len() as u64 {
            return false;
        }
        let mut done = 0;
        while done < to.len() {
            let piece = &mut self.iov[self.first];
            let n = piece.len().min(to.len() - done);
            // SAFETY: as above; n bytes are left of it.
            unsafe { copy(piece.ptr(), &mut to[done..done + n]) };
            done += n;
            piece.advance(n);
            // Readable pieces are not logged, so their guest addresses need not follow.
            self.first += usize::from(piece.is_empty());
        }
        true
    }

    /// Copies the first readable bytes and takes them off, as many as there are and `to` has room for; says how many.
    #[inline]
    pub fn read_front(&mut self, to: &mut [u8]) -> usize {
        let mut done = 0;
        while let Some(piece) = self.iov[self.first..self.readable].first_mut() {
            let n = piece.len().min(to.len() - done);
            // SAFETY: resolved in the ring's epoch, which the ring keeps; n bytes are left of both.
            unsafe { copy(piece.ptr(), &mut to[done..done + n]) };
            done += n;
            if n < piece.len() {
                piece.advance(n);
                break;
            }
            self.first += 1;
        }
        done
    }

    /// Takes the last writable byte off, to be written by [`Chain::set_status`]; `false` where there
    /// is none, or where a bad chain does not tell which it is.
    #[inline]
    pub fn take_status(&mut self) -> bool {
        if self.iov.len() == self.readable || self.status.is_some() {
            return false;
        }
        if !self.whole || self.status_unmapped {
            return false;
        }
        let (last, at) = (self.iov.len() - 1, self.addr[self.iov.len() - 1]);
        let piece = &mut self.iov[last];
        let keep = piece.len() - 1;
        self.status = Some((piece.ptr().wrapping_add(keep), at + keep as u64));
        if keep == 0 {
            self.iov.pop();
            self.addr.pop();
        } else {
            piece.truncate(keep);
        }
        true
    }

    /// Writes the byte that was taken off, if one was.
    #[inline]
    pub fn set_status(&self, status: u8) {
        if let Some((at, _)) = self.status {
            // SAFETY: resolved in an epoch that the ring, or who revokes it, keeps.
            unsafe { at.write_volatile(status) };
        }
    }

    /// Writes into the first writable bytes, as many as there are; says how many.
    pub fn write_front(&mut self, from: &[u8]) -> usize {
        let mut done = 0;
        for piece in self.fill() {
            let n = piece.len().min(from.len() - done);
            // SAFETY: resolved in the ring's epoch, which the ring keeps; nothing borrows guest memory; n bytes are left of both.
            unsafe { std::ptr::copy_nonoverlapping(from[done..].as_ptr(), piece.ptr(), n) };
            done += n;
        }
        done
    }

    /// Whether the pieces of all buffers are mapped in `memory` too.
    pub fn mapped_in(&self, memory: &GuestMemory) -> bool {
        let status = self.status.map(|(at, _)| IoVec::new(at, 1));
        self.iov.iter().chain(&status).all(|v| memory.maps(*v))
    }

    /// Marks everything that the device may have written. How much it did write is not always known
    /// (a read that failed, an I/O that was cut short), so all of it counts that was to be filled; buffers of a
    /// request that was refused may be as long as the memory, and were not touched.
    #[inline]
    pub(crate) fn mark(&self, log: Option<&QueueLog>) {
        if let Some(QueueLog { log, .. }) = log {
            self.mark_pages(log);
        }
    }

    #[cold]
    fn mark_pages(&self, log: &DirtyLog) {
        if self.filled {
            for (piece, addr) in self.iov.iter().zip(&self.addr).skip(self.readable) {
                log.mark(*addr, piece.len() as u64);
            }
        }
        if let Some((_, addr)) = self.status {
            log.mark(addr, 1);
        }
    }
}

/// Copies bytes that the driver may change meanwhile: what is decided on the copy stays decided.
///
/// # Safety
/// `to.len()` bytes at `from` are mapped.
#[inline]
unsafe fn copy(from: *const u8, to: &mut [u8]) {
    // SAFETY: the caller's promise; `to` is borrowed, and guest memory never is.
    unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) };
    // The compiler may not take what is still at `from` for what was copied.
    compiler_fence(Ordering::SeqCst);
}

/// A source of descriptors that has been read into memory of our own, or that is read once each.
pub(crate) struct Descriptor {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

/// The driver says that another descriptor follows.
pub(crate) const NEXT: u16 = 1;
/// The device may write the buffer.
pub(crate) const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub(crate) const INDIRECT: u16 = 4;
/// Bytes of a descriptor, in either format.
pub(crate) const DESC_LEN: u32 = 16;
