//! Memory for operations.
//!
//! Unsafe, because operations name memory that they do not own.
#![allow(unsafe_code)]

use bluff_memory::IoVec;
use bluff_testing::Chance;

use crate::{Buffers, Kind, Op, Tag};

/// What lies between the pieces; a channel that touches it fails.
const GAP: u8 = 0xa5;

/// Memory of its own for one operation: pieces of odd lengths with guarded gaps between them.
#[derive(Debug)]
pub struct Memory {
    /// Held by its address: the channel writes into it.
    base: *mut [u8],
    pieces: Vec<IoVec>,
    len: usize,
}

impl Memory {
    /// `len` bytes in pieces of the lengths that `cut` gives one after another (0 is taken as 1).
    pub fn new(len: usize, mut cut: impl FnMut() -> usize) -> Self {
        let mut lengths = Vec::new();
        let mut left = len;
        while left > 0 {
            let n = cut().clamp(1, left);
            lengths.push(n);
            left -= n;
        }
        let total: usize = lengths.iter().map(|n| n + 3).sum::<usize>() + 3;
        let base = Box::into_raw(vec![GAP; total].into_boxed_slice());
        let mut at = base.cast::<u8>().wrapping_add(3);
        let pieces = lengths
            .iter()
            .map(|&n| {
                let piece = IoVec::new(at, n);
                at = at.wrapping_add(n + 3);
                piece
            })
            .collect();
        Self { base, pieces, len }
    }

    /// `len` bytes in one piece.
    pub fn whole(len: usize) -> Self {
        Self::new(len, || len)
    }

    /// `len` bytes cut by chance: now and then into single bytes, at most into 64 pieces.
    pub fn random(len: usize, random: &mut Chance) -> Self {
        let most = (len / 32).max(2) as u64;
        let mut n = 0;
        Self::new(len, || {
            n += 1;
            match (n, random.below(4)) {
                (64.., _) => len,
                (_, 0) => 1,
                (_, 1) => 511,
                _ => 1 + random.below(most) as usize,
            }
        })
    }

    /// Holds these bytes.
    pub fn holding(bytes: &[u8], random: &mut Chance) -> Self {
        let memory = Self::random(bytes.len(), random);
        memory.set(bytes);
        memory
    }

    /// Puts `bytes` in.
    pub fn set(&self, bytes: &[u8]) {
        assert_eq!(self.buffers().copy_from(bytes), self.len);
    }

    /// What is in it. No operation may be in flight.
    ///
    /// # Panics
    /// Where something wrote between the pieces.
    pub fn get(&self) -> Vec<u8> {
        let mut out = vec![0; self.len];
        assert_eq!(self.buffers().copy_to(&mut out), self.len);
        let mut at = self.base.cast::<u8>();
        let ends = self.pieces.iter().map(|p| (p.ptr(), p.len()));
        let last = (at.wrapping_add(self.base.len()), 0);
        for (start, len) in ends.chain([last]) {
            while at < start {
                // SAFETY: inside of the allocation.
                assert_eq!(unsafe { at.read_volatile() }, GAP, "a gap was written");
                at = at.wrapping_add(1);
            }
            at = start.wrapping_add(len);
        }
        out
    }

    /// Names the pieces. The memory must stay until the operation is over; the rig sees to it that
    /// nothing is left in flight when a case ends.
    pub fn buffers(&self) -> Buffers {
        // SAFETY: the vector is not changed, and the cases keep the memory as long as the operation.
        unsafe { Buffers::new(&self.pieces) }
    }

    /// An operation over all of it.
    pub fn op(&self, tag: u64, kind: Kind, offset: u64) -> Op {
        Op {
            tag: Tag(tag),
            kind,
            offset,
            len: self.len as u64,
            buffers: self.buffers(),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: made by `Box::into_raw` in `new`; no operation names it any more.
        drop(unsafe { Box::from_raw(self.base) });
    }
}
