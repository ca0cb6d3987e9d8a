//! `DMA_MAP`, `DMA_UNMAP`, and the reset.

use std::os::fd::OwnedFd;

use zerocopy::IntoBytes;

use super::{Answer, Later, Reply, Session};
use crate::capabilities::Agreed;
use crate::mappings::Bounds;
use crate::spec::RawDmaUnmap;
use crate::target::{Progress, Target};
use crate::{Errno, Error, Mapping};

impl<T: Target> Session<T> {
    pub(super) fn dma_map(
        &mut self,
        agreed: &Agreed,
        mapping: Mapping,
        file: Option<OwnedFd>,
    ) -> Result<Answer, Error> {
        let bounds = Bounds {
            count: agreed.max_dma_maps as usize,
            bytes: self.limits.max_mapped,
            page: self.limits.page(),
        };
        self.mappings.check(&mapping, &bounds)?;
        let ticket = self.ticket();
        let mapped = self.target.map(mapping, file, ticket);
        let progress = mapped.map_err(Error::Target)?;
        self.mappings.insert(mapping);
        Ok(match progress {
            Progress::Done => Answer::Now(Reply::default()),
            Progress::Pending => Answer::Later(ticket, Later::Reply(Reply::default())),
        })
    }

    /// `range`: address and size; `None` for all. A range without any mapping is answered as any other: nothing of it is in use
    /// afterwards. Behind an IOMMU of its guest, QEMU unmaps whole ranges whatever is in them.
    pub(super) fn dma_unmap(
        &mut self,
        raw: &RawDmaUnmap,
        range: Option<(u64, u64)>,
    ) -> Result<Answer, Error> {
        let gone = match range {
            None => self.mappings.clear(),
            Some((address, size)) => self.mappings.remove(address, size, self.limits.page())?,
        };
        // "The server responds with the original DMA entry in the request."
        let reply = Reply::of(&[raw.as_bytes()]);
        if gone.is_empty() {
            return Ok(Answer::Now(reply));
        }
        // What the client has not answered it will not answer while it waits for this reply (QEMU).
        self.dma.fail_where(Errno::FAULT, |address, len| {
            let after = gone.partition_point(|m| m.address <= address);
            let before = after.checked_sub(1).map(|i| gone[i]);
            before.is_some_and(|m| address - m.address < m.size)
                || gone.get(after).is_some_and(|m| m.address - address < len)
        });
        let ticket = self.ticket();
        Ok(match self.target.unmap(&gone, ticket) {
            Progress::Done => Answer::Now(reply),
            Progress::Pending => Answer::Later(ticket, Later::Reply(reply)),
        })
    }

    pub(super) fn reset(&mut self) -> Answer {
        self.dma.fail_where(Errno::CANCELED, |_, _| true);
        let ticket = self.ticket();
        match self.target.reset(ticket) {
            Progress::Done => Answer::Now(Reply::default()),
            Progress::Pending => Answer::Later(ticket, Later::Reply(Reply::default())),
        }
    }
}
