//! Indirect tables (virtio 1.3 §2.7.5.3, §2.8.7).
//!
//! Unsafe, because a table lies in guest memory.
#![allow(unsafe_code)]

use bluff_memory::{GuestMemory, Hint, IoVec};

use crate::ChainError;
use crate::chain::{DESC_LEN, Descriptor};

/// The longest table that is looked at, in descriptors: what 16-bit indices reach.
const LONGEST: u32 = 1 << 16;

/// An indirect table, in one piece or in several where it spans regions.
///
/// It is not copied as a whole: it may be 1 MiB long, and its chain short.
pub(crate) enum Table<'a> {
    Direct { at: *const u8, count: u32 },
    Pieces { pieces: &'a [IoVec], count: u32 },
}

impl<'a> Table<'a> {
    /// The table of `len` bytes at guest address `addr`. `scratch` takes its pieces where it spans regions.
    #[inline]
    pub(crate) fn new(
        memory: &GuestMemory,
        hint: &mut Hint,
        addr: u64,
        len: u32,
        scratch: &'a mut Vec<IoVec>,
    ) -> Result<Self, ChainError> {
        if len == 0 || !len.is_multiple_of(DESC_LEN) || len / DESC_LEN > LONGEST {
            return Err(ChainError::Table(len));
        }
        if let Some(at) = memory.one(hint, addr, len) {
            return Ok(Self::Direct {
                at,
                count: len / DESC_LEN,
            });
        }
        scratch.clear();
        memory
            .segments(addr, len, scratch)
            .map_err(|_| ChainError::Unmapped { addr, len })?;
        Ok(Self::Pieces {
            pieces: scratch,
            count: len / DESC_LEN,
        })
    }

    /// How many descriptors it has.
    #[inline]
    pub(crate) fn count(&self) -> u32 {
        match self {
            Self::Direct { count, .. } | Self::Pieces { count, .. } => *count,
        }
    }

    /// The two halves of the descriptor at `index`, which is below `count`. Never ask for the same twice: the
    /// driver may have changed it.
    #[inline]
    pub(crate) fn get(&self, index: u32) -> (u64, u64) {
        assert!(index < self.count(), "index checked by the caller");
        match self {
            Self::Direct { at, .. } => {
                let at = at.wrapping_add((index * DESC_LEN) as usize);
                // The specification asks for no alignment of tables; drivers have one of 8 at least.
                if at.cast::<u64>().is_aligned() {
                    let at = at.cast::<[u64; 2]>();
                    // SAFETY: below the table's length, which was resolved in the ring's epoch, and aligned; the
                    // driver may write it meanwhile, hence volatile.
                    let [a, b] = unsafe {
                        [
                            (&raw const (*at)[0]).read_volatile(),
                            (&raw const (*at)[1]).read_volatile(),
                        ]
                    };
                    (u64::from_le(a), u64::from_le(b))
                } else {
                    // SAFETY: as above; of bytes.
                    halves(unsafe { at.cast::<[u8; DESC_LEN as usize]>().read_volatile() })
                }
            }
            Self::Pieces { pieces, .. } => halves(gather(pieces, (index * DESC_LEN) as usize)),
        }
    }

    /// As a descriptor of a split ring.
    #[inline]
    pub(crate) fn split(&self, index: u32) -> Descriptor {
        let (addr, rest) = self.get(index);
        split(addr, rest)
    }
}

fn halves(bytes: [u8; DESC_LEN as usize]) -> (u64, u64) {
    let bytes = u128::from_le_bytes(bytes);
    (bytes as u64, (bytes >> 64) as u64)
}

/// The descriptor at byte `from` of a table in pieces, one of which may end in its middle.
#[cold]
fn gather(pieces: &[IoVec], mut from: usize) -> [u8; DESC_LEN as usize] {
    let mut bytes = [0; DESC_LEN as usize];
    let mut done = 0;
    for piece in pieces {
        if from >= piece.len() {
            from -= piece.len();
            continue;
        }
        let n = (piece.len() - from).min(bytes.len() - done);
        for byte in &mut bytes[done..done + n] {
            // SAFETY: inside of the piece, which was resolved in the ring's epoch.
            *byte = unsafe { piece.ptr().add(from).read_volatile() };
            from += 1;
        }
        (done, from) = (done + n, 0);
        if done == bytes.len() {
            break;
        }
    }
    bytes
}

/// The two halves of a split ring's descriptor.
#[inline]
pub(crate) fn split(addr: u64, rest: u64) -> Descriptor {
    Descriptor {
        addr,
        len: rest as u32,
        flags: (rest >> 32) as u16,
        next: (rest >> 48) as u16,
    }
}
