//! Operations and completions.
//!
//! Unsafe, because an operation names buffers that it does not own.
#![allow(unsafe_code)]

use bluff_memory::IoVec;

use crate::{BlockError, Geometry};

/// What the submitter recognises a completion by. Unique among the operations in flight of one
/// channel; layers put tags of their own below.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(pub u64);

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads into the buffers.
    Read,
    /// Writes from the buffers.
    Write {
        /// Force unit access: completed only when it would survive a power cut.
        fua: bool,
    },
    /// Completes when every write that was completed before it was submitted, on any channel of the
    /// volume, would survive a power cut.
    Flush,
    /// The range is not needed any more; it may read as anything until it is written again.
    Discard,
    /// The range reads as zeroes afterwards.
    WriteZeroes {
        /// Storage may be given back.
        unmap: bool,
        /// As for writes.
        fua: bool,
    },
}

impl Kind {
    /// Whether it changes the medium's contents.
    pub fn is_write(self) -> bool {
        matches!(
            self,
            Self::Write { .. } | Self::Discard | Self::WriteZeroes { .. }
        )
    }

    /// Whether it carries buffers.
    pub fn has_data(self) -> bool {
        matches!(self, Self::Read | Self::Write { .. })
    }
}

/// The buffers of an operation: a slice of [`IoVec`]s without its lifetime.
#[derive(Clone, Copy, Debug)]
pub struct Buffers {
    ptr: *const IoVec,
    len: usize,
}

impl Buffers {
    /// No buffers.
    pub const NONE: Self = Self {
        ptr: std::ptr::NonNull::dangling().as_ptr(),
        len: 0,
    };

    /// Names `slice`.
    ///
    /// # Safety
    /// Until the operation that carries it has been completed (or was not accepted), `slice` stays
    /// where it is and as it is, and the memory that its elements name stays mapped. For a read that
    /// memory is not borrowed anywhere in this process; it may be shared with others that change
    /// it at any time.
    pub unsafe fn new(slice: &[IoVec]) -> Self {
        Self {
            ptr: slice.as_ptr(),
            len: slice.len(),
        }
    }

    /// The elements.
    pub fn as_slice(&self) -> &[IoVec] {
        // SAFETY: `new` was promised that they stay; the borrow cannot outlive the operation.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }

    /// The sum of their lengths in bytes.
    pub fn total(&self) -> u64 {
        IoVec::total(self.as_slice())
    }

    /// Copies the first `to.len()` bytes out, fewer where there are fewer; says how many.
    pub fn copy_to(&self, to: &mut [u8]) -> usize {
        let mut done = 0;
        for v in self.as_slice() {
            let n = v.len().min(to.len() - done);
            // SAFETY: the memory is mapped (contract of `new`); `to` is ours, so they do not
            // overlap; the length fits both.
            unsafe { std::ptr::copy_nonoverlapping(v.ptr(), to[done..].as_mut_ptr(), n) };
            done += n;
        }
        done
    }

    /// Copies `from` into the first bytes, as far as they reach; says how many.
    pub fn copy_from(&self, from: &[u8]) -> usize {
        let mut done = 0;
        for v in self.as_slice() {
            let n = v.len().min(from.len() - done);
            // SAFETY: as above; nothing in this process borrows the target.
            unsafe { std::ptr::copy_nonoverlapping(from[done..].as_ptr(), v.ptr(), n) };
            done += n;
        }
        done
    }
}

/// An operation on a volume.
#[derive(Clone, Copy, Debug)]
pub struct Op {
    /// What its completion will carry.
    pub tag: Tag,
    /// What is to be done.
    pub kind: Kind,
    /// First byte on the volume; a multiple of the block size. 0 for a flush.
    pub offset: u64,
    /// Length in bytes; a multiple of the block size. For reads and writes also the sum of the
    /// buffers' lengths. 0 for a flush.
    pub len: u64,
    /// Where the data goes or comes from.
    pub buffers: Buffers,
}

impl Op {
    /// An operation without buffers.
    pub fn without_data(tag: Tag, kind: Kind, offset: u64, len: u64) -> Self {
        Self {
            tag,
            kind,
            offset,
            len,
            buffers: Buffers::NONE,
        }
    }

    /// Whether the operation is one that a volume of this shape does. Every kind of volume may rely on it: the submitter (a device) checks,
    /// once, before it submits.
    ///
    /// # Errors
    /// The error that the operation is to be completed with.
    #[inline]
    pub fn check(&self, g: &Geometry) -> Result<(), BlockError> {
        if self.kind == Kind::Flush {
            return Ok(());
        }
        let mask = u64::from(g.block_size) - 1;
        if (self.offset | self.len) & mask != 0 {
            return Err(BlockError::Invalid);
        }
        match self.offset.checked_add(self.len) {
            Some(end) if end <= g.size => {}
            _ => return Err(BlockError::OutOfRange),
        }
        if self.kind.is_write() && g.read_only {
            return Err(BlockError::ReadOnly);
        }
        let max = match self.kind {
            Kind::Read | Kind::Write { .. } => u64::from(g.max_transfer),
            Kind::Discard => g.discard.ok_or(BlockError::Unsupported)?.max,
            Kind::WriteZeroes { .. } => g.write_zeroes.ok_or(BlockError::Unsupported)?.max,
            Kind::Flush => u64::MAX,
        };
        if self.len > max {
            Err(BlockError::Invalid)
        } else {
            Ok(())
        }
    }
}

/// The end of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The operation's tag.
    pub tag: Tag,
    /// How it went. A read that failed may have written any part of its buffers.
    pub result: Result<(), BlockError>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DiscardLimits, ZeroLimits};

    fn shape() -> Geometry {
        Geometry {
            max_transfer: 8192,
            discard: Some(DiscardLimits {
                max: 4096,
                granularity: 512,
            }),
            write_zeroes: Some(ZeroLimits {
                max: 2048,
                unmap: false,
            }),
            ..Geometry::new(512, 1 << 20)
        }
    }

    fn check(g: &Geometry, kind: Kind, offset: u64, len: u64) -> Result<(), BlockError> {
        Op::without_data(Tag(1), kind, offset, len).check(g)
    }

    const WRITE: Kind = Kind::Write { fua: false };
    const ZEROES: Kind = Kind::WriteZeroes {
        unmap: true,
        fua: false,
    };

    #[test]
    fn what_a_volume_does() {
        let g = shape();
        let last = g.size - 512;
        for kind in [Kind::Read, WRITE, Kind::Discard, ZEROES] {
            assert_eq!(check(&g, kind, 0, 512), Ok(()));
            assert_eq!(check(&g, kind, last, 512), Ok(()));
            assert_eq!(check(&g, kind, g.size, 0), Ok(()));
            assert_eq!(check(&g, kind, last, 1024), Err(BlockError::OutOfRange));
            assert_eq!(
                check(&g, kind, u64::MAX - 511, 512),
                Err(BlockError::OutOfRange)
            );
            assert_eq!(
                check(&g, kind, 0, u64::MAX - 511),
                Err(BlockError::OutOfRange)
            );
            assert_eq!(check(&g, kind, 1, 512), Err(BlockError::Invalid));
            assert_eq!(check(&g, kind, 0, 511), Err(BlockError::Invalid));
        }
        for (kind, max) in [
            (Kind::Read, 8192),
            (WRITE, 8192),
            (Kind::Discard, 4096),
            (ZEROES, 2048),
        ] {
            assert_eq!(check(&g, kind, 0, max), Ok(()));
            assert_eq!(check(&g, kind, 0, max + 512), Err(BlockError::Invalid));
        }
        assert_eq!(check(&g, Kind::Flush, 0, 0), Ok(()));
    }

    #[test]
    fn what_it_does_not() {
        let bare = Geometry::new(4096, 1 << 20);
        assert_eq!(
            check(&bare, Kind::Discard, 0, 4096),
            Err(BlockError::Unsupported)
        );
        assert_eq!(check(&bare, ZEROES, 0, 4096), Err(BlockError::Unsupported));
        assert_eq!(check(&bare, WRITE, 512, 4096), Err(BlockError::Invalid));
        let read_only = Geometry {
            read_only: true,
            ..shape()
        };
        for kind in [WRITE, Kind::Discard, ZEROES] {
            assert_eq!(check(&read_only, kind, 0, 512), Err(BlockError::ReadOnly));
        }
        assert_eq!(check(&read_only, Kind::Read, 0, 512), Ok(()));
        assert_eq!(check(&read_only, Kind::Flush, 0, 0), Ok(()));
    }

    #[test]
    fn copies_stop_where_either_ends() {
        let mut memory = [1u8, 2, 3, 4, 5, 6];
        let pieces = [
            IoVec::new(memory.as_mut_ptr(), 2),
            IoVec::new(memory.as_mut_ptr().wrapping_add(3), 3),
        ];
        // SAFETY: both outlive the buffers, and nothing else touches the memory meanwhile.
        let buffers = unsafe { Buffers::new(&pieces) };
        assert_eq!(buffers.total(), 5);
        let mut out = [0; 8];
        assert_eq!(buffers.copy_to(&mut out), 5);
        assert_eq!(out, [1, 2, 4, 5, 6, 0, 0, 0]);
        assert_eq!(buffers.copy_to(&mut out[..3]), 3);
        assert_eq!(buffers.copy_from(&[9, 8, 7]), 3);
        assert_eq!(memory, [9, 8, 3, 7, 5, 6]);
        assert_eq!(Buffers::NONE.total(), 0);
    }
}
