//! The entries of a queue, by number, in one epoch of memory.
//!
//! Unsafe, because entries lie in host memory and are accessed through pointers that were resolved once for an epoch.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bluff_memory::{GuestMemory, MemoryError, Space};

/// What is resolved in one piece at least, in bytes: the smallest memory page. A queue begins with a page (Base 2.1 Figures 36,
/// 37, 152, 156), and the sizes of entries divide it, so no entry lies in two.
const PIECE: u64 = 4096;

/// Entries of `N` 64-bit words.
///
/// A queue is contiguous for the host (CAP.CQR), not for us: behind a vIOMMU each of its pages may be a region.
#[derive(Debug)]
pub(super) struct Entries<const N: usize> {
    base: u64,
    count: u32,
    place: Place,
}

#[derive(Debug)]
enum Place {
    /// The host lets us not reach it now.
    Off,
    /// All in one region.
    Whole(
        *const [AtomicU64; 0],
        #[allow(dead_code, reason = "keeps it mapped")] Arc<GuestMemory>,
    ),
    /// Its pages.
    Pieces(
        Box<[*const [AtomicU64; 0]]>,
        #[allow(dead_code, reason = "keeps it mapped")] Arc<GuestMemory>,
    ),
}

impl<const N: usize> Entries<N> {
    const BYTES: u64 = 8 * N as u64;

    /// `count` entries at guest address `base`, which cannot be used yet.
    pub(super) fn new(base: u64, count: u32) -> Self {
        Self {
            base,
            count,
            place: Place::Off,
        }
    }

    /// Moves to another epoch; `None`: there is none now.
    pub(super) fn set_memory(
        &mut self,
        memory: Option<&Arc<GuestMemory>>,
    ) -> Result<(), MemoryError> {
        self.place = Place::Off;
        let Some(memory) = memory else { return Ok(()) };
        let len = u64::from(self.count) * Self::BYTES;
        let part = |addr, len| {
            // 16 bytes: what a 64-bit access needs, and more than a file's offset has to have.
            memory
                .contiguous(Space::Guest, addr, len, 16)
                .map(|ptr| ptr.cast_const().cast::<[AtomicU64; 0]>())
        };
        if let Ok(whole) = part(self.base, len) {
            self.place = Place::Whole(whole, memory.clone());
            return Ok(());
        }
        // The table is as large as the queue is: 8 bytes for 4096.
        let pieces: Result<Box<[_]>, _> = (0..len.div_ceil(PIECE))
            .map(|i| {
                let skip = i * PIECE;
                let addr = self.base.checked_add(skip);
                let addr = addr.ok_or(MemoryError::Unmapped {
                    addr: self.base,
                    len,
                })?;
                part(addr, PIECE.min(len - skip))
            })
            .collect();
        self.place = Place::Pieces(pieces?, memory.clone());
        Ok(())
    }

    /// Whether they can be used.
    #[inline]
    pub(super) fn is_on(&self) -> bool {
        !matches!(self.place, Place::Off)
    }

    /// The words of an entry; `None` where they cannot be used.
    #[inline(always)]
    fn words(&self, index: u32) -> Option<&[AtomicU64; N]> {
        assert!(index < self.count);
        let skip = u64::from(index) * Self::BYTES;
        let ptr = match &self.place {
            Place::Whole(whole, _) => whole.cast::<u8>().wrapping_add(skip as usize),
            Place::Pieces(pieces, _) => {
                let piece = pieces[(skip / PIECE) as usize].cast::<u8>();
                piece.wrapping_add((skip % PIECE) as usize)
            }
            Place::Off => return None,
        };
        // SAFETY: inside of what was resolved, and aligned for it, in the epoch that `place` keeps mapped for as long as `self` is
        // borrowed. The host changes the words too, and they are atomics.
        Some(unsafe { &*ptr.cast::<[AtomicU64; N]>() })
    }

    /// A copy of an entry.
    #[inline(always)]
    pub(super) fn load(&self, index: u32) -> Option<[u64; N]> {
        let words = self.words(index)?;
        // Relaxed: ordered by the acquire of the doorbell. The host may change them meanwhile; then we have what we read.
        Some(std::array::from_fn(|i| words[i].load(Ordering::Relaxed)))
    }

    /// Stores an entry so that whoever sees its last word sees the others, and all that was stored before.
    #[inline(always)]
    pub(super) fn store(&self, index: u32, entry: [u64; N]) -> bool {
        let Some(words) = self.words(index) else {
            return false;
        };
        for i in 0..N - 1 {
            words[i].store(entry[i], Ordering::Relaxed);
        }
        words[N - 1].store(entry[N - 1], Ordering::Release);
        true
    }
}
