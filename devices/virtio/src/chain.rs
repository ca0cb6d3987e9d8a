//! One request of the driver: a chain of buffers, translated and checked.

use bluff_memory::{DirtyLog, GuestMemory, Hint, IoVec};

use crate::ChainError;

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
    readable: usize,
    /// The driver has begun with writable buffers.
    writing: bool,
}

impl Chain {
    #[inline]
    pub(crate) fn clear(&mut self) {
        self.iov.clear();
        self.addr.clear();
        self.readable = 0;
        self.writing = false;
    }

    /// Appends a buffer. One without bytes is skipped, wherever it points.
    #[inline(always)]
    pub(crate) fn push(
        &mut self,
        memory: &GuestMemory,
        hint: &mut Hint,
        addr: u64,
        len: u32,
        writable: bool,
    ) -> Result<(), ChainError> {
        if writable {
            self.writing = true;
        } else if self.writing {
            return Err(ChainError::Order);
        }
        if len == 0 {
            return Ok(());
        }
        match memory.one(hint, addr, len) {
            Some(ptr) => {
                self.iov.push(IoVec::new(ptr, len as usize));
                self.addr.push(addr);
            }
            None => self.push_pieces(memory, addr, len)?,
        }
        if !writable {
            self.readable = self.iov.len();
        }
        Ok(())
    }

    /// A buffer over several regions.
    #[cold]
    fn push_pieces(&mut self, memory: &GuestMemory, addr: u64, len: u32) -> Result<(), ChainError> {
        let before = self.iov.len();
        memory
            .segments(addr, len, &mut self.iov)
            .map_err(|_| ChainError::Unmapped { addr, len })?;
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
        &self.iov[..self.readable]
    }

    /// What the device may write, in order. No piece is empty.
    #[inline]
    pub fn writable(&self) -> &[IoVec] {
        &self.iov[self.readable..]
    }

    /// Whether the pieces of all buffers are mapped in `memory` too.
    pub fn mapped_in(&self, memory: &GuestMemory) -> bool {
        self.iov.iter().all(|v| memory.maps(*v))
    }

    /// Marks everything that the device may have written. How much it did write is not always known
    /// (a read that failed, an I/O that was cut short), so all of it counts.
    pub(crate) fn mark(&self, log: &DirtyLog) {
        for (piece, addr) in self.iov.iter().zip(&self.addr).skip(self.readable) {
            log.mark(*addr, piece.len() as u64);
        }
    }
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
