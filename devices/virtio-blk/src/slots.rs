//! Requests in flight on one queue.

use bluff_block::Kind;
use bluff_virtio::Chain;

use crate::spec::status;

/// Most requests of one queue that are in flight at once; the rest waits in the ring.
pub(crate) const MOST: usize = 1024;

/// What a request counts as when it is completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    Read,
    Write,
    Flush,
    Ranges,
}

impl Class {
    pub(crate) fn of(kind: Kind) -> Self {
        match kind {
            Kind::Read => Self::Read,
            Kind::Write { .. } => Self::Write,
            Kind::Flush => Self::Flush,
            Kind::Discard | Kind::WriteZeroes { .. } => Self::Ranges,
        }
    }
}

/// One request in flight.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) chain: Chain,
    pub(crate) class: Class,
    /// Bytes of data.
    pub(crate) len: u64,
    /// Operations that are not completed yet; 0 for a free slot.
    pub(crate) pending: u16,
    /// How many operations there were.
    pub(crate) parts: u16,
    /// What the driver will be told.
    pub(crate) status: u8,
    /// An operation was cancelled: it is done again, or the driver is told, as the stop says.
    pub(crate) cancelled: bool,
    /// It uses memory that has gone, which somebody waits for.
    pub(crate) revoked: bool,
}

impl Slot {
    /// Begins a request of `parts` operations.
    #[inline]
    pub(crate) fn begin(&mut self, class: Class, len: u64, parts: u16) {
        (self.class, self.len, self.status) = (class, len, status::OK);
        (self.pending, self.parts) = (parts, parts);
    }
}

/// The slots of a queue. They are made as they are needed and kept.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

impl Slots {
    /// How many requests are in flight.
    #[inline]
    pub(crate) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Takes a slot with an empty chain, where fewer than [`MOST`] are taken.
    #[inline]
    pub(crate) fn take(&mut self) -> Option<u32> {
        if let Some(index) = self.free.pop() {
            return Some(index);
        }
        if self.slots.len() == MOST {
            return None;
        }
        self.slots.push(Slot {
            chain: Chain::default(),
            class: Class::Flush,
            len: 0,
            pending: 0,
            parts: 0,
            status: status::OK,
            cancelled: false,
            revoked: false,
        });
        Some((self.slots.len() - 1) as u32)
    }

    /// Whether no more can be taken.
    pub(crate) fn full(&self) -> bool {
        self.free.is_empty() && self.slots.len() == MOST
    }

    #[inline]
    pub(crate) fn give(&mut self, index: u32) {
        self.free.push(index);
    }

    #[inline]
    pub(crate) fn get(&mut self, index: u32) -> &mut Slot {
        &mut self.slots[index as usize]
    }

    /// The requests in flight, with their numbers.
    pub(crate) fn busy(&mut self) -> impl Iterator<Item = (u32, &mut Slot)> {
        self.slots
            .iter_mut()
            .enumerate()
            .filter(|(_, s)| s.pending > 0)
            .map(|(i, s)| (i as u32, s))
    }
}
