//! One queue: chains in, operations out, used entries back.
//!
//! Unsafe, because an operation names guest memory that it does not own.
#![allow(unsafe_code)]

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bluff_block::{BlockError, Buffers, Completion, Geometry, Kind, Op, Tag};
use bluff_memory::IoVec;
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory};

use crate::Device;
use crate::request::{Parser, Request, status};

/// Most of its requests that one look at the ring takes, so that queues of one thread get their
/// turns and stopping never waits for long.
pub(crate) const BATCH: usize = 256;

/// What a look at the ring found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// So many chains; 0 where there are none, or where no more can be in flight.
    Chains(usize),
    /// The ring itself is wrong: its memory is not there, or its index went too far.
    Broken,
}

/// A request that is with the volume.
struct Slot<G> {
    head: u16,
    /// Keeps what `buffers` and `status_at` name mapped.
    mem: Option<G>,
    status_at: GuestAddress,
    written: u32,
    buffers: Vec<IoVec>,
    /// Operations that have yet to end.
    pending: u32,
    result: Result<(), BlockError>,
}

/// One queue's requests. `G` is a hold on guest memory.
pub(crate) struct Lane<G> {
    index: u16,
    device: Arc<Device>,
    parser: Parser,
    slots: Vec<Slot<G>>,
    free: Vec<u16>,
    /// Finished, not yet in the used ring: head and length.
    used: Vec<(u16, u32)>,
    cut: Vec<(usize, usize, u64)>,
}

impl<G, M> Lane<G>
where
    G: Deref<Target = M> + Clone,
    M: GuestMemory,
{
    pub(crate) fn new(index: u16, device: Arc<Device>) -> Self {
        // The driver cannot have more chains out than the queue has entries.
        let count = device.options().queue_size;
        let slot = || Slot {
            head: 0,
            mem: None,
            status_at: GuestAddress(0),
            written: 0,
            buffers: Vec::new(),
            pending: 0,
            result: Ok(()),
        };
        Self {
            index,
            device,
            parser: Parser::default(),
            slots: (0..count).map(|_| slot()).collect(),
            free: (0..count).rev().collect(),
            used: Vec::new(),
            cut: Vec::new(),
        }
    }

    /// How many chains were taken and not yet given back.
    pub(crate) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len() + self.used.len()
    }

    /// Whether some are to be given back.
    pub(crate) fn has_finished(&self) -> bool {
        !self.used.is_empty()
    }

    /// Whether some are with the volume.
    pub(crate) fn outstanding(&self) -> bool {
        self.free.len() < self.slots.len()
    }

    /// Whether chains can be taken.
    pub(crate) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Takes up to `limit` available chains and appends the operations that they ask for.
    pub(crate) fn take(
        &mut self,
        queue: &mut Queue,
        mem: &G,
        limit: usize,
        ops: &mut Vec<Op>,
    ) -> Taken {
        let limit = limit.min(self.free.len());
        let Ok(mut chains) = queue.iter(mem.deref()) else {
            return Taken::Broken;
        };
        let geometry = self.device.geometry();
        let mut count = 0;
        while count < limit {
            let Some(chain) = chains.next() else { break };
            count += 1;
            let head = chain.head_index();
            let index = *self.free.last().expect("no more chains than free slots");
            let slot = &mut self.slots[usize::from(index)];
            slot.buffers.clear();
            let request = self
                .parser
                .parse(chain, mem.deref(), &self.device, &mut slot.buffers);
            match request {
                Request::Unanswerable => self.used.push((head, 0)),
                Request::Answered {
                    status_at,
                    status,
                    written,
                } => {
                    // Cannot fail: the parser looked, and `mem` is the same.
                    let _ = mem.write_obj(status as u8, status_at);
                    self.used.push((head, written));
                }
                Request::Volume {
                    status_at,
                    kind,
                    offset,
                    len,
                    written,
                } => {
                    slot.head = head;
                    slot.status_at = status_at;
                    slot.written = written;
                    slot.mem = Some(mem.clone());
                    self.free.pop();
                    self.begin(&geometry, index, (kind, offset, len), ops);
                }
            }
        }
        Taken::Chains(count)
    }

    /// Appends the operations of a request, or ends it at once where it is not one that the volume does.
    fn begin(
        &mut self,
        geometry: &Geometry,
        index: u16,
        (kind, offset, len): (Kind, u64, u64),
        ops: &mut Vec<Op>,
    ) {
        let tag = Tag(u64::from(self.index) << 16 | u64::from(index));
        let slot = &mut self.slots[usize::from(index)];
        let whole = Op {
            tag,
            kind,
            offset,
            len,
            buffers: Buffers::NONE,
        };
        // A request may be longer than the volume takes at once; it is checked as a whole, so that
        // nothing of it is done where a part is out of range.
        let limits = Geometry {
            max_transfer: u32::MAX,
            ..*geometry
        };
        slot.result = match kind {
            Kind::Read | Kind::Write { .. } if len > u64::from(u32::MAX) => {
                Err(BlockError::Invalid)
            }
            _ => whole.check(&limits),
        };
        if slot.result.is_err() || (len == 0 && kind != Kind::Flush) {
            self.end(index);
            return;
        }
        if !kind.has_data() {
            slot.pending = 1;
            ops.push(whole);
            return;
        }
        cut(
            &mut slot.buffers,
            u64::from(geometry.max_transfer),
            &mut self.cut,
        );
        slot.pending = self.cut.len() as u32;
        let mut at = offset;
        for &(from, to, len) in &self.cut {
            // SAFETY: `slot.buffers` is not touched while operations are pending, and `slot.mem`
            // keeps what it names mapped. The memory is the guest's; nothing here borrows it.
            let buffers = unsafe { Buffers::new(&slot.buffers[from..to]) };
            ops.push(Op {
                tag,
                kind,
                offset: at,
                len,
                buffers,
            });
            at += len;
        }
    }

    /// An operation of this lane has ended.
    pub(crate) fn complete(&mut self, completion: &Completion) {
        let index = completion.tag.0 as u16;
        let slot = &mut self.slots[usize::from(index)];
        assert!(slot.pending > 0, "a completion for each operation, and one");
        slot.pending -= 1;
        if slot.result.is_ok() {
            slot.result = completion.result;
        }
        if slot.pending == 0 {
            self.end(index);
        }
    }

    /// Which lane an operation belongs to.
    pub(crate) fn of(tag: Tag) -> u16 {
        (tag.0 >> 16) as u16
    }

    fn end(&mut self, index: u16) {
        let slot = &mut self.slots[usize::from(index)];
        let mem = slot.mem.take().expect("held while it is in flight");
        // Cannot fail: the parser looked, and `mem` is the same.
        let _ = mem.write_obj(status(slot.result) as u8, slot.status_at);
        // Of a read that failed only the status counts as written.
        let written = slot.result.map_or(1, |()| slot.written);
        self.used.push((slot.head, written));
        self.free.push(index);
    }

    /// Gives finished chains back. Says whether the driver wants to be notified.
    pub(crate) fn publish(&mut self, queue: &mut Queue, mem: &M) -> bool {
        if self.used.is_empty() {
            return false;
        }
        for (head, written) in self.used.drain(..) {
            // A head past the queue's end has no entry to be given back in; memory that is gone
            // has no ring. Either way the driver broke its queue, and nobody waits.
            if let Err(e) = queue.add_used(mem, head, written) {
                log::debug!("a chain cannot be given back: {e}");
            }
        }
        match queue.needs_notification(mem) {
            Ok(wanted) => wanted && !suppressed(queue, mem),
            Err(_) => true,
        }
    }
}

/// virtio-queue knows the event index, but not the flag that takes its place where EVENT_IDX was not
/// negotiated (virtio 1.3 §2.7.7.2).
fn suppressed<M: GuestMemory>(queue: &Queue, mem: &M) -> bool {
    if queue.event_idx_enabled() {
        return false;
    }
    let flags = mem.load::<u16>(GuestAddress(queue.avail_ring()), Ordering::Relaxed);
    flags.is_ok_and(|f| u32::from(u16::from_le(f)) & VRING_AVAIL_F_NO_INTERRUPT != 0)
}

/// Divides `buffers` into runs of `max` bytes, the last one shorter: first and last element (exclusive) and length of
/// each. An element that lies across a border is cut in two.
fn cut(buffers: &mut Vec<IoVec>, max: u64, runs: &mut Vec<(usize, usize, u64)>) {
    runs.clear();
    let (mut from, mut len, mut i) = (0, 0, 0);
    while i < buffers.len() {
        let room = max - len;
        let here = buffers[i].len() as u64;
        if here > room {
            let mut rest = buffers[i];
            rest.advance(room as usize);
            buffers[i].truncate(room as usize);
            buffers.insert(i + 1, rest);
        }
        len += here.min(room);
        i += 1;
        if len == max || i == buffers.len() {
            runs.push((from, i, len));
            (from, len) = (i, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_requests_are_cut_at_the_volumes_limit() {
        let mut data = [0u8; 64];
        let base = data.as_mut_ptr();
        let piece = |at: usize, len| IoVec::new(base.wrapping_add(at), len);
        let mut buffers = vec![piece(0, 5), piece(5, 20), piece(25, 7), piece(32, 16)];
        let mut runs = Vec::new();
        cut(&mut buffers, 16, &mut runs);
        let lens: Vec<_> = buffers.iter().map(IoVec::len).collect();
        assert_eq!(lens, [5, 11, 9, 7, 16]);
        assert_eq!(runs, [(0, 2, 16), (2, 4, 16), (4, 5, 16)]);
        let mut at = base.cast_const();
        for b in &buffers {
            assert_eq!(b.ptr().cast_const(), at);
            at = at.wrapping_add(b.len());
        }
    }
}
