//! VIRTIO_F_IN_ORDER on a split virtqueue: batches that one used entry closes (virtio 1.3 §2.7.9), and fixed chains that
//! move through the table, since descriptors are taken in ring order (§2.7.5).

use super::SplitDriver;
use crate::queue::{Error, Fixed, Used, Violation};

/// An IN_ORDER batch that one used entry closed, being handed out chain by chain.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Batch {
    /// Index after its last chain; equal to the used position: there is no batch.
    pub(super) end: u16,
    /// Written length of its last chain.
    pub(super) written: u32,
}

impl SplitDriver {
    /// IN_ORDER: one used entry may close a batch, at the place of the batch's first chain (§2.7.9).
    pub(super) fn pop_in_order(&mut self) -> Result<Used, Error> {
        if self.batch.end == self.used_next {
            let (head, written) = self.used_entry()?;
            let end = self.slots[usize::from(head)].position.wrapping_add(1);
            let batch = end.wrapping_sub(self.used_next);
            let used = self.used_seen.wrapping_sub(self.used_next);
            if batch > used {
                return Err(Violation::OutOfOrder {
                    id: head,
                    batch,
                    used,
                }
                .into());
            }
            self.batch = Batch { end, written };
        }
        let head = self.order[self.place(self.used_next)];
        let last = self.used_next.wrapping_add(1) == self.batch.end;
        let written = if last {
            self.batch.written
        } else {
            self.slots[usize::from(head)].writable
        };
        Ok(self.retire(head, written))
    }

    /// Makes an IN_ORDER fixed chain available: written at the next place in ring order (§2.7.5).
    pub(super) fn resubmit_in_order(&mut self, fixed: Fixed) -> Result<(), Error> {
        let index = usize::from(fixed.0);
        let (in_flight, shape) = (self.fixed[index].in_flight, self.fixed[index].shape);
        if in_flight {
            return Err(Error::InFlight);
        }
        if self.free < shape.descriptors {
            return Err(Error::Full);
        }
        // Taken out for the call, so that the queue can be borrowed; an empty box allocates nothing.
        let buffers = std::mem::take(&mut self.fixed[index].buffers);
        let table = self.fixed[index]
            .table
            .as_ref()
            .map(|table| table.table(0).0);
        let head = self.write_chain(&buffers, table, shape);
        let chain = &mut self.fixed[index];
        chain.buffers = buffers;
        chain.in_flight = true;
        self.slots[usize::from(head)].token = chain.token;
        self.slots[usize::from(head)].fixed = fixed.0;
        self.make_available(head);
        Ok(())
    }
}
