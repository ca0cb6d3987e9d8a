//! Bounce buffers: aligned memory of a bounded size that the kernel may use for as long as it likes.
//!
//! Unsafe, because it maps memory and copies between it and the host's buffers.
#![allow(unsafe_code)]

use std::io;

use bluff_block::Buffers;

/// The unit in bytes; every buffer is aligned to it, which is enough for any O_DIRECT.
pub(crate) const UNIT: usize = 4096;
/// The size of a channel's arena in bytes. It is touched from its beginning on, so that a channel at
/// a low depth uses little of it.
const SIZE: usize = 8 << 20;
/// The largest buffer in bytes; longer operations take several rounds.
pub(crate) const LARGEST: usize = 512 << 10;

const UNITS: usize = SIZE / UNIT;

/// A mapping that the kernel reads and writes.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: *mut u8,
    len: usize,
}

// SAFETY: an address and a length; who uses the memory sees to it that nobody else does.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub(crate) fn new(len: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice; the result is checked.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            base: base.cast(),
            len,
        })
    }

    pub(crate) fn ptr(&self) -> *mut u8 {
        self.base
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length; whoever let the kernel use it has waited or
        // leaked this.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

/// A buffer of an arena, in units. Given back by [`Arena::free`].
#[derive(Debug)]
pub(crate) struct Bounce {
    start: u32,
    units: u32,
}

/// The bounce buffers of one channel.
#[derive(Debug)]
pub(crate) struct Arena {
    mapping: Mapping,
    /// A bit for each unit that is taken.
    taken: [u64; UNITS / 64],
}

impl Arena {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            mapping: Mapping::new(SIZE)?,
            taken: [0; UNITS / 64],
        })
    }

    /// A buffer of `len` bytes or, where that is not to be had in one piece, of fewer, and how many
    /// of `len` fit.
    pub(crate) fn take(&mut self, len: u64) -> Option<(Bounce, usize)> {
        let len = len.min(LARGEST as u64) as usize;
        let mut units = len.div_ceil(UNIT).max(1);
        loop {
            if let Some(start) = self.find(units) {
                self.mark(start, units, true);
                let bounce = Bounce {
                    start: start as u32,
                    units: units as u32,
                };
                return Some((bounce, len.min(units * UNIT)));
            }
            if units == 1 {
                return None;
            }
            units /= 2;
        }
    }

    /// The first place where `units` units in a row are free.
    fn find(&self, units: usize) -> Option<usize> {
        let mut at = 0;
        while at + units <= UNITS {
            let (word, bit) = (at / 64, at % 64);
            // Skip what is taken, as far as this word says.
            let skip = (self.taken[word] >> bit).trailing_ones() as usize;
            if skip > 0 {
                at += skip.min(64 - bit);
                continue;
            }
            let run = self.run(at, units);
            if run >= units {
                return Some(at);
            }
            at += run;
        }
        None
    }

    /// How many units from `at` on are free, counted up to `enough`.
    fn run(&self, at: usize, enough: usize) -> usize {
        let mut n = 0;
        while n < enough && at + n < UNITS {
            let (word, bit) = ((at + n) / 64, (at + n) % 64);
            let free = (self.taken[word] >> bit).trailing_zeros() as usize;
            let free = free.min(64 - bit);
            n += free;
            if bit + free < 64 {
                break;
            }
        }
        n
    }

    fn mark(&mut self, start: usize, units: usize, taken: bool) {
        for unit in start..start + units {
            let bit = 1 << (unit % 64);
            let was = self.taken[unit / 64] & bit != 0;
            assert_ne!(was, taken, "a bounce buffer has one user");
            self.taken[unit / 64] ^= bit;
        }
    }

    pub(crate) fn free(&mut self, bounce: Bounce) {
        self.mark(bounce.start as usize, bounce.units as usize, false);
    }

    pub(crate) fn ptr(&self, bounce: &Bounce) -> *mut u8 {
        self.mapping
            .ptr()
            .wrapping_add(bounce.start as usize * UNIT)
    }

    /// Copies `len` bytes from byte `skip` of `from` on into the buffer.
    pub(crate) fn fill(&self, bounce: &Bounce, from: &Buffers, skip: u64, len: usize) {
        assert!(len <= bounce.units as usize * UNIT);
        let mut to = self.ptr(bounce);
        each(from, skip, len, |host, n| {
            // SAFETY: the host's buffer is mapped (contract of `Buffers`), ours was checked above;
            // the kernel does not have it now.
            unsafe { std::ptr::copy_nonoverlapping(host, to, n) };
            to = to.wrapping_add(n);
        });
    }

    /// Copies the first `len` bytes of the buffer to byte `skip` of `to` and on.
    pub(crate) fn drain(&self, bounce: &Bounce, to: &Buffers, skip: u64, len: usize) {
        assert!(len <= bounce.units as usize * UNIT);
        let mut from = self.ptr(bounce);
        each(to, skip, len, |host, n| {
            // SAFETY: as above, the other way.
            unsafe { std::ptr::copy_nonoverlapping(from, host, n) };
            from = from.wrapping_add(n);
        });
    }

    /// Keeps the memory mapped for ever: the kernel may still use it.
    pub(crate) fn leak(self) {
        std::mem::forget(self.mapping);
    }
}

/// Calls `f` with the pieces of `len` bytes from byte `skip` on.
fn each(buffers: &Buffers, mut skip: u64, mut len: usize, mut f: impl FnMut(*mut u8, usize)) {
    for v in buffers.as_slice() {
        let here = v.len() as u64;
        if skip >= here {
            skip -= here;
            continue;
        }
        let n = ((here - skip) as usize).min(len);
        if n == 0 {
            return;
        }
        f(v.ptr().wrapping_add(skip as usize), n);
        skip = 0;
        len -= n;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bluff_testing::Chance;

    #[test]
    fn buffers_never_overlap_and_all_come_back() {
        let mut arena = Arena::new().unwrap();
        let mut held: Vec<(Bounce, usize)> = Vec::new();
        let mut chance = Chance::new(1);
        for round in 0..20_000 {
            if round % 3 != 0 || held.is_empty() {
                let len = 1 + chance.below(LARGEST as u64 * 2) as usize;
                match arena.take(len as u64) {
                    Some((b, n)) => {
                        assert!(n > 0 && n <= len && n <= b.units as usize * UNIT);
                        assert!((b.start + b.units) as usize <= UNITS);
                        for (other, _) in &held {
                            let apart = b.start + b.units <= other.start
                                || other.start + other.units <= b.start;
                            assert!(apart);
                        }
                        held.push((b, n));
                    }
                    None => {
                        let taken: u32 = arena.taken.iter().map(|w| w.count_ones()).sum();
                        assert_eq!(taken as usize, UNITS, "refused although a unit is free");
                    }
                }
            } else {
                let (b, _) = held.swap_remove(chance.below(held.len() as u64) as usize);
                arena.free(b);
            }
        }
        for (b, _) in held {
            arena.free(b);
        }
        assert!(arena.taken.iter().all(|&w| w == 0));
        let (b, n) = arena.take(LARGEST as u64 + 1).unwrap();
        assert_eq!((b.start, n), (0, LARGEST));
    }
}
