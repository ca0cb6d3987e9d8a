//! Indirect tables (virtio 1.3 §2.7.5.3, §2.8.7).
//!
//! Unsafe, because a table lies in guest memory.
#![allow(unsafe_code)]

use bluff_memory::{GuestMemory, Hint};

use crate::ChainError;
use crate::chain::{DESC_LEN, Descriptor};

/// The longest table that is looked at, in descriptors: what 16-bit indices reach.
const LONGEST: u32 = 1 << 16;

/// An indirect table: in guest memory, or copied where it spans regions.
pub(crate) enum Table<'a> {
    Direct { at: *const u8, count: u32 },
    Copied(&'a [u8]),
}

impl<'a> Table<'a> {
    /// The table of `len` bytes at guest address `addr`. `scratch` takes it where it spans regions.
    #[inline]
    pub(crate) fn new(
        memory: &GuestMemory,
        hint: &mut Hint,
        addr: u64,
        len: u32,
        scratch: &'a mut Vec<u8>,
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
        // At most 1 MiB, and only as much as the guest really has at that address.
        scratch.resize(len as usize, 0);
        memory
            .read(addr, scratch)
            .map_err(|_| ChainError::Unmapped { addr, len })?;
        Ok(Self::Copied(scratch))
    }

    /// How many descriptors it has.
    #[inline]
    pub(crate) fn count(&self) -> u32 {
        match self {
            Self::Direct { count, .. } => *count,
            Self::Copied(bytes) => bytes.len() as u32 / DESC_LEN,
        }
    }

    /// A copy of the descriptor at `index`, which is below `count`. Never ask for the same twice: the
    /// driver may have changed it.
    #[inline]
    pub(crate) fn get(&self, index: u32) -> [u8; DESC_LEN as usize] {
        assert!(index < self.count(), "index checked by the caller");
        match self {
            Self::Direct { at, .. } => {
                // SAFETY: below the table's length, which was resolved in the ring's epoch; the
                // driver may write it meanwhile, hence volatile, of bytes without alignment.
                unsafe {
                    at.add((index * DESC_LEN) as usize)
                        .cast::<[u8; DESC_LEN as usize]>()
                        .read_volatile()
                }
            }
            Self::Copied(bytes) => {
                let from = (index * DESC_LEN) as usize;
                bytes[from..from + DESC_LEN as usize]
                    .try_into()
                    .expect("16 bytes")
            }
        }
    }

    /// As a descriptor of a split ring.
    #[inline]
    pub(crate) fn split(&self, index: u32) -> Descriptor {
        let b = self.get(index);
        split(
            u64::from_le_bytes(b[..8].try_into().expect("8 bytes")),
            u64::from_le_bytes(b[8..].try_into().expect("8 bytes")),
        )
    }
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
