//! What split and packed rings have in common.

use std::sync::Arc;

use bluff_memory::{GuestMemory, Hint, IoVec, Space};

use crate::{Chain, ChainError, QueueLog, RingError, StoppedQueue, features};

/// What was found on a ring.
#[derive(Debug, PartialEq, Eq)]
pub enum Pop {
    /// Nothing is available.
    Empty,
    /// The chain was filled.
    Chain,
    /// The chain was taken off the ring, but cannot be served: complete it with nothing written.
    Bad(ChainError),
}

/// One virtqueue as its device sees it.
///
/// # Contract
/// Each chain that was popped (good or bad) is completed once, in any order; what is not is in
/// flight. Completions are seen by the driver after [`Ring::publish`].
pub trait Ring {
    /// Takes the next chain. What is to be done again after a restart comes first.
    ///
    /// # Errors
    /// [`RingError`]: the ring is broken and must not be used again.
    fn pop(&mut self, chain: &mut Chain) -> Result<Pop, RingError>;

    /// Has the next [`Ring::publish`] give `chain` back, with `written` bytes written into its
    /// writable part.
    fn complete(&mut self, chain: &Chain, written: u32);

    /// Puts a chain back as if it had never been popped: the last one that was, and then the one before it, and so on. It must not have
    /// been completed, nor written to. Only of rings that record nothing in flight.
    fn put_back(&mut self, chain: &Chain);

    /// Logs what may have been written into `chain` by an I/O that was cut short: the chain is not given
    /// back, but its pages have changed.
    fn cut_short(&self, chain: &Chain);

    /// Makes completions visible, all at once; says whether the driver wants to be notified.
    #[inline]
    fn publish(&mut self) -> bool {
        self.publish_quietly() && self.wants_notification()
    }

    /// Makes completions visible, all at once; says whether there were any. Whether the driver wants to be notified of them is asked later, by
    /// [`Ring::wants_notification`]: at the latest after as many chains as the ring has entries.
    fn publish_quietly(&mut self) -> bool;

    /// Whether the driver wants, now, to be notified of what was published since this was last asked.
    fn wants_notification(&mut self) -> bool;

    /// Asks the driver to notify. `true`: something is available already.
    fn enable_notifications(&mut self) -> bool;

    /// Asks the driver not to notify.
    fn disable_notifications(&mut self);

    /// Moves to another epoch of memory. Chains in flight keep what they were popped with.
    ///
    /// # Errors
    /// [`RingError::Memory`] where the ring itself is not there any more: it is broken.
    fn set_memory(&mut self, memory: Arc<GuestMemory>) -> Result<(), RingError>;

    /// The epoch of memory that it uses.
    fn memory(&self) -> &Arc<GuestMemory>;

    /// Starts or ends logging. What the device may have written of the ring itself is marked at once.
    fn set_log(&mut self, log: Option<QueueLog>);

    /// How many chains of an earlier life are still to be popped.
    fn again(&self) -> usize;

    /// Where it would go on, and how much is in flight.
    fn position(&self) -> StoppedQueue;
}

/// How chains of a ring are looked at.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The most descriptors in an indirect table's chain.
    pub indirect: u16,
}

/// Memory, and what was last found there.
#[derive(Debug)]
pub(crate) struct Translator {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) hint: Hint,
    /// For indirect tables that span regions: their pieces.
    pub(crate) scratch: Vec<IoVec>,
}

impl Translator {
    pub(crate) fn new(memory: Arc<GuestMemory>) -> Self {
        Self {
            memory,
            hint: Hint::default(),
            scratch: Vec::new(),
        }
    }

    pub(crate) fn set(&mut self, memory: Arc<GuestMemory>) {
        self.memory = memory;
        self.hint = Hint::default();
    }

    /// The guest address of a part of the ring, which the log wants.
    pub(crate) fn guest(&self, space: Space, addr: u64) -> Option<u64> {
        match space {
            Space::Guest => Some(addr),
            Space::User => self.memory.guest_of_user(addr),
        }
    }
}

/// Buffers of a ring that are in use: a bit for each head, or for each buffer ID.
#[derive(Debug)]
pub(crate) struct InUse(Box<[u64]>);

impl InUse {
    fn new(bits: usize) -> Self {
        Self(vec![0; bits.div_ceil(64)].into_boxed_slice())
    }

    /// Takes `id`; an error where it is taken.
    #[inline]
    fn take(&mut self, id: u16) -> Result<(), RingError> {
        let (word, bit) = (&mut self.0[usize::from(id) / 64], 1u64 << (id % 64));
        if *word & bit != 0 {
            return Err(RingError::InUse(id));
        }
        *word |= bit;
        Ok(())
    }

    #[inline]
    pub(crate) fn give(&mut self, id: u16) {
        let (word, bit) = (&mut self.0[usize::from(id) / 64], 1u64 << (id % 64));
        assert!(*word & bit != 0, "completed twice, or never popped");
        *word &= !bit;
    }
}

/// The chains that the device holds: those that it popped, and has not given back.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) in_use: InUse,
    /// How many there are.
    pub(crate) count: u16,
    /// What the next publication gives back.
    pub(crate) done: Vec<Done>,
    order: Option<Order>,
}

impl Held {
    /// None yet, of a ring of `size` whose buffers have one of `ids` names.
    pub(crate) fn new(ids: usize, size: u16, features: u64) -> Self {
        let in_order = features & features::IN_ORDER != 0;
        Self {
            in_use: InUse::new(ids),
            count: 0,
            done: Vec::with_capacity(usize::from(size)),
            order: in_order.then(Order::default),
        }
    }

    /// One more; an error where the device holds it already.
    #[inline(always)]
    pub(crate) fn popped(&mut self, id: u16) -> Result<(), RingError> {
        self.in_use.take(id)?;
        self.count += 1;
        if let Some(order) = &mut self.order {
            order.popped(id);
        }
        Ok(())
    }

    /// The last one less.
    pub(crate) fn put_back(&mut self, id: u16) {
        self.in_use.give(id);
        self.count -= 1;
        if let Some(order) = &mut self.order {
            let last = order.waiting.pop_back();
            assert!(matches!(last, Some(None)), "the last one, not completed");
        }
    }

    /// Has the next publication give `chain` back, or a later one where those before it are not complete.
    #[inline]
    pub(crate) fn complete(&mut self, chain: &Chain, written: u32) {
        match &mut self.order {
            // Made in its place: a copy by way of the stack would be read before it is written out.
            None => self.done.push(Done::new(chain, written)),
            Some(order) => order.done(Done::new(chain, written), &mut self.done),
        }
    }
}

/// A completion that the driver does not see yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Done {
    pub(crate) id: u16,
    pub(crate) slots: u16,
    pub(crate) entry: u16,
    pub(crate) written: u32,
}

impl Done {
    #[inline]
    fn new(chain: &Chain, written: u32) -> Self {
        Self {
            id: chain.id,
            slots: chain.slots,
            entry: chain.entry,
            written,
        }
    }
}

/// Completions that wait for their turn (`VIRTIO_F_IN_ORDER`, virtio 1.3 §2.7.9, §2.8.8).
#[derive(Debug, Default)]
struct Order {
    /// In the order in which they were popped.
    waiting: std::collections::VecDeque<Option<Done>>,
    /// How many have left `waiting`.
    left: u64,
    /// By id: how many had been popped before it. As long as the highest id that was seen.
    place: Vec<u64>,
}

impl Order {
    fn popped(&mut self, id: u16) {
        let (id, count) = (usize::from(id), self.waiting.len() as u64);
        if self.place.len() <= id {
            self.place.resize(id + 1, 0);
        }
        self.place[id] = self.left + count;
        self.waiting.push_back(None);
    }

    /// Moves what may be given back now to `out`.
    fn done(&mut self, done: Done, out: &mut Vec<Done>) {
        let place = (self.place[usize::from(done.id)] - self.left) as usize;
        assert!(self.waiting[place].is_none(), "completed once");
        self.waiting[place] = Some(done);
        while let Some(Some(first)) = self.waiting.front() {
            out.push(*first);
            self.waiting.pop_front();
            self.left += 1;
        }
    }
}
