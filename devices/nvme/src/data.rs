//! Where a command's data is: from PRPs and SGLs to pieces of mapped memory (Base 2.1 §4.3).
//!
//! ```text
//!   PRP 1 --> first page, from an offset      SGL descriptor --> a data block, or a segment of descriptors
//!   PRP 2 --> second page, or a list of pages                     the last of which may lead to the next segment
//!               the last of which may lead to the next list
//! ```
//! Lists and segments are copied once and then looked at. How many of them there are is bounded by the length that the command moves:
//! each list but the first leads to a page at least; and by [`MOST_DESCRIPTORS`] for SGLs, where a block may be empty. So loops
//! end.
//!
//! An address in a BAR of the function, or anywhere else that is not the host's memory, is not mapped, and nothing more.
//!
//! Of SGLs data blocks, segments and last segments are offered, of any alignment; no bit buckets, no keys, no offsets. The length of the data
//! is the command's, neither more nor less (SGLS, Identify Controller).
//!
//! Unsafe, because lists are copied out of memory that a host shares.
#![allow(unsafe_code)]

use bluff_memory::{Access, GuestMemory, Hint, IoVec};

use crate::spec::{Command, DataPointer, SglDescriptor, Status};

/// Most descriptors of a command's SGL, those that lead to segments among them.
pub(crate) const MOST_DESCRIPTORS: usize = 1024;

/// Descriptors that are copied at once: a page of them.
const SEGMENT: usize = 256;
/// Entries of the largest page of a list that a command can have: see [`Resolver::new`].
const LIST: usize = 512;

/// Types of SGL descriptors (Base 2.1 Figure 112), with subtype 0: an address.
mod sgl {
    pub(super) const DATA: u8 = 0x00;
    pub(super) const SEGMENT: u8 = 0x20;
    pub(super) const LAST: u8 = 0x30;
}

/// Resolves data pointers in one epoch of memory.
pub(crate) struct Resolver {
    page_shift: u8,
    hint: Hint,
    list: Box<[u64; LIST]>,
}

impl std::fmt::Debug for Resolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Resolver").finish_non_exhaustive()
    }
}

impl Resolver {
    /// For memory pages of `1 << page_shift` bytes (CC.MPS), of at least 4 KiB.
    pub(crate) fn new(page_shift: u8) -> Self {
        assert!((12..=16).contains(&page_shift), "CAP.MPSMIN, CAP.MPSMAX");
        Self {
            page_shift,
            hint: Hint::default(),
            list: Box::new([0; LIST]),
        }
    }

    /// The epoch is another one.
    pub(crate) fn forget(&mut self) {
        self.hint = Hint::default();
    }

    /// Appends the pieces of a command's data, of `len` bytes, to `out`. `access`: what is done there; a host behind its IOMMU may
    /// have given no other right. Lists and segments are read.
    ///
    /// # Errors
    /// The status of the command; `out` is then of no use.
    #[inline(always)]
    pub(crate) fn resolve(
        &mut self,
        memory: &GuestMemory,
        access: Access,
        command: &Command,
        len: u32,
        out: &mut Vec<IoVec>,
    ) -> Result<(), Status> {
        match command.data_pointer() {
            Some(DataPointer::Prp(first, second)) => {
                self.prp(memory, access, first, second, len, out)
            }
            Some(DataPointer::Sgl(descriptor)) => self.sgl(memory, access, &descriptor, len, out),
            None => Err(Status::INVALID_FIELD),
        }
    }

    /// Resolves PRP entries 1 and 2 (§4.3.1).
    ///
    /// # Errors
    /// As [`Resolver::resolve`].
    #[inline(always)]
    pub(crate) fn prp(
        &mut self,
        memory: &GuestMemory,
        access: Access,
        first: u64,
        second: u64,
        len: u32,
        out: &mut Vec<IoVec>,
    ) -> Result<(), Status> {
        let page = 1u32 << self.page_shift;
        if first & 3 != 0 {
            return Err(Status::PRP_OFFSET);
        }
        let offset = first as u32 & (page - 1);
        let here = len.min(page - offset);
        self.piece(memory, access, first, here, out)?;
        let left = len - here;
        if left == 0 {
            return Ok(());
        }
        if left <= page {
            if second & u64::from(page - 1) != 0 {
                return Err(Status::PRP_OFFSET);
            }
            return self.piece(memory, access, second, left, out);
        }
        self.prp_list(memory, access, second, left, out)
    }

    /// Resolves lists, from the one at `at` on, for `left` bytes.
    fn prp_list(
        &mut self,
        memory: &GuestMemory,
        access: Access,
        mut at: u64,
        mut left: u32,
        out: &mut Vec<IoVec>,
    ) -> Result<(), Status> {
        let page = 1u32 << self.page_shift;
        let mask = u64::from(page - 1);
        // The first list may begin anywhere in a page; later ones begin with it (§4.3.1).
        let mut align = 7;
        loop {
            if at & align != 0 {
                return Err(Status::PRP_OFFSET);
            }
            let wanted = left.div_ceil(page);
            let room = (page - (at & mask) as u32) / 8;
            let chained = wanted > room;
            // A page that does not hold all of them ends with a pointer to the next list.
            let (count, mut next) = if chained {
                (room - 1, None)
            } else {
                (wanted, Some(0))
            };
            let mut done = 0;
            while done < count || next.is_none() {
                let n = (room.min(count + u32::from(chained)) - done).min(LIST as u32);
                self.copy_list(memory, at + u64::from(done) * 8, n as usize)?;
                for i in 0..n as usize {
                    let entry = self.list[i];
                    if done + i as u32 == count {
                        next = Some(entry);
                        break;
                    }
                    if entry & mask != 0 {
                        return Err(Status::PRP_OFFSET);
                    }
                    let here = left.min(page);
                    self.piece(memory, access, entry, here, out)?;
                    left -= here;
                }
                done += n;
            }
            if !chained {
                return Ok(());
            }
            at = next.expect("the last entry of a chained list");
            align = mask;
        }
    }

    /// Copies `n` entries of a list, which lie in one page.
    fn copy_list(&mut self, memory: &GuestMemory, at: u64, n: usize) -> Result<(), Status> {
        // At most LIST, as the caller has seen to.
        let bytes = 8 * n;
        let list = &mut self.list[..n];
        let Some(from) = memory.one_for(Access::Read, &mut self.hint, at, bytes as u32) else {
            let mut copy = [0; 8 * LIST];
            memory
                .read(at, &mut copy[..bytes])
                .map_err(|_| Status::DATA_TRANSFER_ERROR)?;
            for (to, from) in list.iter_mut().zip(copy.chunks_exact(8)) {
                *to = u64::from_le_bytes(from.try_into().expect("of this size"));
            }
            return Ok(());
        };
        // SAFETY: resolved in this epoch, and `list` has that many bytes; they do not overlap, as guest memory is not ours.
        unsafe { std::ptr::copy_nonoverlapping(from, list.as_mut_ptr().cast::<u8>(), bytes) };
        for entry in list {
            *entry = u64::from_le(*entry);
        }
        Ok(())
    }

    /// Resolves an SGL (§4.3.2).
    ///
    /// # Errors
    /// As [`Resolver::resolve`].
    pub(crate) fn sgl(
        &mut self,
        memory: &GuestMemory,
        access: Access,
        first: &SglDescriptor,
        len: u32,
        out: &mut Vec<IoVec>,
    ) -> Result<(), Status> {
        let mut left = len;
        let (mut segment, mut seen) = (*first, 1);
        if first.identifier == sgl::DATA {
            self.block(memory, access, first, &mut left, out)?;
            return finished(left);
        }
        let mut copy = [SglDescriptor::default(); SEGMENT];
        loop {
            let last = match segment.identifier {
                sgl::LAST => true,
                sgl::SEGMENT => false,
                _ => return Err(Status::SGL_TYPE),
            };
            let bytes = segment.length.get();
            if bytes == 0 || !bytes.is_multiple_of(16) {
                return Err(Status::INVALID_SGL_SEGMENT);
            }
            let count = bytes as usize / 16;
            seen += count;
            if seen > MOST_DESCRIPTORS {
                return Err(Status::INVALID_SGL_COUNT);
            }
            let (mut next, mut done) = (None, 0);
            while done < count {
                let n = (count - done).min(SEGMENT);
                let skip = (done * 16) as u64;
                let at = segment.address.get().checked_add(skip);
                let at = at.ok_or(Status::DATA_TRANSFER_ERROR)?;
                self.copy_segment(memory, at, &mut copy[..n])?;
                for (i, descriptor) in copy[..n].iter().enumerate() {
                    match descriptor.identifier {
                        sgl::DATA => self.block(memory, access, descriptor, &mut left, out)?,
                        sgl::SEGMENT | sgl::LAST if last => {
                            return Err(Status::INVALID_SGL_SEGMENT);
                        }
                        sgl::SEGMENT | sgl::LAST if done + i + 1 == count => {
                            next = Some(*descriptor);
                        }
                        // Only the last one of a segment leads to another.
                        sgl::SEGMENT | sgl::LAST => return Err(Status::INVALID_SGL_COUNT),
                        _ => return Err(Status::SGL_TYPE),
                    }
                }
                done += n;
            }
            match (last, next) {
                (true, _) => return finished(left),
                (false, Some(descriptor)) => segment = descriptor,
                // A segment that is not the last one leads nowhere.
                (false, None) => return Err(Status::INVALID_SGL_SEGMENT),
            }
        }
    }

    fn copy_segment(
        &mut self,
        memory: &GuestMemory,
        at: u64,
        to: &mut [SglDescriptor],
    ) -> Result<(), Status> {
        use zerocopy::IntoBytes;
        let to = to.as_mut_bytes();
        match memory.one_for(Access::Read, &mut self.hint, at, to.len() as u32) {
            // SAFETY: resolved in this epoch with the length of `to`, which is ours.
            Some(from) => unsafe {
                std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len());
            },
            None => memory
                .read(at, to)
                .map_err(|_| Status::DATA_TRANSFER_ERROR)?,
        }
        Ok(())
    }

    /// A data block: all of it is used.
    fn block(
        &mut self,
        memory: &GuestMemory,
        access: Access,
        descriptor: &SglDescriptor,
        left: &mut u32,
        out: &mut Vec<IoVec>,
    ) -> Result<(), Status> {
        let len = descriptor.length.get();
        *left = left.checked_sub(len).ok_or(Status::SGL_DATA_LENGTH)?;
        if len == 0 {
            return Ok(());
        }
        self.piece(memory, access, descriptor.address.get(), len, out)
    }

    /// Appends `len` bytes at `addr`; what adjoins in our addresses is one piece.
    #[inline(always)]
    fn piece(
        &mut self,
        memory: &GuestMemory,
        access: Access,
        addr: u64,
        len: u32,
        out: &mut Vec<IoVec>,
    ) -> Result<(), Status> {
        let Some(ptr) = memory.one_for(access, &mut self.hint, addr, len) else {
            return memory
                .segments_for(access, addr, len, out)
                .map_err(|_| Status::DATA_TRANSFER_ERROR);
        };
        if let Some(last) = out.last_mut()
            && last.ptr().wrapping_add(last.len()) == ptr
        {
            *last = IoVec::new(last.ptr(), last.len() + len as usize);
            return Ok(());
        }
        out.push(IoVec::new(ptr, len as usize));
        Ok(())
    }
}

/// The data has to be as long as the command says.
fn finished(left: u32) -> Result<(), Status> {
    match left {
        0 => Ok(()),
        _ => Err(Status::SGL_DATA_LENGTH),
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
