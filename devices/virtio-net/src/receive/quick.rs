//! The common case of a receive queue: nothing waits, and each frame goes as it is into a buffer of one piece.
//!
//! Buffers are found first, and asked for; when they are written their lines have come, all at the same time.
//!
//! Unsafe, because frames are written into the guest's memory.
#![allow(unsafe_code)]

use bluff_memory::IoVec;
use bluff_net::{BATCH, Batch, Csum, Offloads};
use bluff_virtio::{Chain, Pop, Ring, RingError};

use super::Shape;
use crate::header::header;
use crate::spec::Header;

/// Bytes of a buffer that are asked for: what small frames need. The rest of a long one comes by the processor's own foresight.
const NEAR: usize = 128;

/// What was written.
pub(super) struct Written {
    pub(super) frames: usize,
    pub(super) bytes: u64,
}

/// Chains for a batch.
pub(super) struct Chains(Box<[Chain; BATCH]>);

impl Default for Chains {
    fn default() -> Self {
        Self(Box::new(std::array::from_fn(|_| Chain::default())))
    }
}

impl Chains {
    /// Writes as many of the frames as it can, from the first one on; the others are for the long way. `takes`: what may be left undone on them. `budget`: descriptors that may still be
    /// looked at.
    #[inline(always)]
    pub(super) fn fill<R: Ring>(
        &mut self,
        ring: &mut R,
        shape: Shape,
        takes: Offloads,
        budget: &mut usize,
        batch: &Batch,
        which: &[u8],
    ) -> Result<Written, RingError> {
        let frames = batch.frames();
        let mut found = 0;
        for i in which {
            let frame = &frames[usize::from(*i)];
            let as_it_is = match frame.offload.csum {
                Csum::Partial { .. } => takes.contains(Offloads::CSUM),
                Csum::Unknown | Csum::Valid => true,
            };
            if *budget == 0 || frame.offload.gso.is_some() || !as_it_is {
                break;
            }
            let total = shape.header + frame.len();
            let chain = &mut self.0[found];
            let fits = match ring.pop(chain)? {
                Pop::Empty => break,
                Pop::Bad(_) => false,
                Pop::Chain => matches!(chain.writable(), [one] if one.len() >= total),
            };
            *budget = budget.saturating_sub(1 + chain.walked() as usize);
            if !fits {
                ring.put_back(chain);
                break;
            }
            chain.prefetch_writable(total.min(NEAR));
            found += 1;
        }
        let mut written = Written {
            frames: found,
            bytes: 0,
        };
        for (chain, i) in self.0[..found].iter_mut().zip(which) {
            let i = usize::from(*i);
            let frame = &frames[i];
            let before = header(&frame.offload, takes.contains(Offloads::CSUM));
            let before: [u8; size_of::<Header>()] = zerocopy::transmute!(before);
            let total = shape.header + frame.len();
            let to = chain
                .fill()
                .first()
                .map_or(std::ptr::null_mut(), IoVec::ptr);
            // SAFETY: the piece belongs to the ring's epoch, which the ring keeps, has room for both, and nothing borrows guest memory.
            unsafe { batch.write_whole(i, &before, to) };
            ring.complete(chain, total as u32);
            written.bytes += frame.len() as u64;
        }
        Ok(written)
    }
}
