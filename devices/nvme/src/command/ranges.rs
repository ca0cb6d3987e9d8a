//! Ranges: those of a command, and those that come as its data.

use zerocopy::FromBytes;

use super::{MCL, MSSRL};
use crate::namespace::Namespace;
use crate::spec::Status;
use crate::spec::nvm::{Range, SourceRange};

/// Bytes of a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Span {
    /// The first one.
    pub(crate) offset: u64,
    /// How many.
    pub(crate) len: u64,
}

impl Span {
    /// `blocks` logical blocks of a namespace, from `slba` on.
    ///
    /// # Errors
    /// [`Status::LBA_RANGE`] where they do not lie in it.
    #[inline(always)]
    pub(crate) fn of(slba: u64, blocks: u64, namespace: &Namespace) -> Result<Self, Status> {
        let end = slba.checked_add(blocks).ok_or(Status::LBA_RANGE)?;
        if end > namespace.blocks() {
            return Err(Status::LBA_RANGE);
        }
        // Neither can overflow: what lies in a volume has 64 bits in bytes.
        let shift = namespace.lba_shift();
        Ok(Self {
            offset: slba << shift,
            len: blocks << shift,
        })
    }

    /// Takes up to `most` bytes off its front.
    pub(crate) fn take(&mut self, most: u64) -> Self {
        let len = self.len.min(most);
        let front = Self { len, ..*self };
        self.offset += len;
        self.len -= len;
        front
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.offset < other.offset + other.len && other.offset < self.offset + self.len
    }
}

/// Reads the ranges of a Dataset Management command; all are right, or none is used. Empty ones are left out.
///
/// # Errors
/// The command's status.
pub(crate) fn deallocate(
    data: &[u8],
    namespace: &Namespace,
    out: &mut Vec<Span>,
) -> Result<(), Status> {
    out.clear();
    for bytes in data.chunks_exact(size_of::<Range>()) {
        let range = Range::read_from_bytes(bytes).expect("of this size");
        let span = Span::of(range.slba.get(), u64::from(range.blocks.get()), namespace)?;
        if span.len > 0 {
            out.push(span);
        }
    }
    Ok(())
}

/// What a Copy does.
#[derive(Debug)]
pub(crate) struct CopyPlan {
    /// The sources, in order.
    pub(crate) from: Vec<Span>,
    /// The destination, as long as all of them.
    pub(crate) to: Span,
}

/// Reads the source ranges of a Copy command to byte `to`; all are right, or none is used.
///
/// # Errors
/// The command's status.
pub(crate) fn copy(data: &[u8], to: u64, namespace: &Namespace) -> Result<CopyPlan, Status> {
    let (mut from, mut blocks) = (Vec::new(), 0u32);
    for bytes in data.chunks_exact(size_of::<SourceRange>()) {
        let range = SourceRange::read_from_bytes(bytes).expect("of this size");
        let count = u32::from(range.blocks_z.get()) + 1;
        if count > u32::from(MSSRL) {
            return Err(Status::SIZE_LIMIT);
        }
        // 128 ranges of 4096 blocks at most.
        blocks += count;
        from.push(Span::of(range.slba.get(), u64::from(count), namespace)?);
    }
    if blocks > MCL {
        return Err(Status::SIZE_LIMIT);
    }
    let to = Span::of(to >> namespace.lba_shift(), u64::from(blocks), namespace)?;
    // It is done piece by piece, so what overlaps would be neither the old nor the new.
    if from.iter().any(|span| span.overlaps(&to)) {
        return Err(Status::OVERLAPPING_RANGE);
    }
    Ok(CopyPlan { from, to })
}
