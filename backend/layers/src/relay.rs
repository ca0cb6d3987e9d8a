//! What both layers have in common: a volume that hands most things on, and operations under tags of their own in an inner
//! channel.

use std::collections::VecDeque;
use std::time::Instant;

use bluff_block::{BlockError, Cancel, Channel, Completion, Op, Tag};

/// What a layer leaves to the volume in its field `$inner`: everything but [`Volume::open`](bluff_block::Volume::open).
macro_rules! hand_on {
    ($inner:ident) => {
        fn geometry(&self) -> bluff_block::Geometry {
            self.$inner.geometry()
        }

        fn max_channels(&self) -> usize {
            self.$inner.max_channels()
        }

        fn lock(&self) -> Result<(), bluff_block::BlockError> {
            self.$inner.lock()
        }

        fn unlock(&self) {
            self.$inner.unlock();
        }

        fn resize(&self, size: u64) -> Result<(), bluff_block::BlockError> {
            self.$inner.resize(size)
        }

        fn events(&self) -> &bluff_block::Events {
            self.$inner.events()
        }
    };
}
pub(crate) use hand_on;

/// How many operations a layer takes.
pub(crate) const DEPTH: usize = 1024;

/// An operation in a layer, with what the layer knows of it.
pub(crate) struct Slot<T> {
    pub(crate) op: Op,
    /// What the inner channel gets in its place, where that is another.
    pub(crate) instead: Option<Op>,
    place: Place,
    /// Its completion, whatever it says, is not to wait any more.
    pub(crate) cancelled: bool,
    pub(crate) extra: T,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In the layer's hands.
    Held,
    /// To be given to the inner channel when that is not busy.
    Ready,
    /// In the inner channel.
    Inside,
}

/// Operations and the inner channel.
pub(crate) struct Relay<T> {
    // First: the inner channel goes before what its operations name.
    pub(crate) inner: Box<dyn Channel>,
    slots: Vec<Option<Slot<T>>>,
    free: Vec<u32>,
    ready: VecDeque<u32>,
    inside: usize,
    ops: Vec<Op>,
    /// What the inner channel has completed.
    inner_done: Vec<Completion>,
    /// What the layer has completed.
    pub(crate) done: Vec<Completion>,
}

impl<T> Relay<T> {
    pub(crate) fn new(inner: Box<dyn Channel>) -> Self {
        Self {
            inner,
            slots: Vec::with_capacity(DEPTH),
            free: Vec::with_capacity(DEPTH),
            ready: VecDeque::with_capacity(DEPTH),
            inside: 0,
            ops: Vec::with_capacity(DEPTH),
            inner_done: Vec::with_capacity(DEPTH),
            done: Vec::with_capacity(DEPTH),
        }
    }

    /// How many more operations the layer takes.
    pub(crate) fn room(&self) -> usize {
        let held = self.slots.len() - self.free.len();
        DEPTH.saturating_sub(held + self.done.len())
    }

    /// How many of them are with the inner channel, or on the way to it.
    pub(crate) fn inside(&self) -> usize {
        self.inside + self.ready.len()
    }

    /// Holds an operation.
    pub(crate) fn hold(&mut self, op: &Op, extra: T) -> u32 {
        let slot = Some(Slot {
            op: *op,
            instead: None,
            place: Place::Held,
            cancelled: false,
            extra,
        });
        match self.free.pop() {
            Some(id) => {
                self.slots[id as usize] = slot;
                id
            }
            None => {
                self.slots.push(slot);
                (self.slots.len() - 1) as u32
            }
        }
    }

    pub(crate) fn get(&mut self, id: u32) -> &mut Slot<T> {
        self.slots[id as usize].as_mut().expect("a held operation")
    }

    /// The operation, where there is one.
    pub(crate) fn peek(&self, id: u32) -> Option<&Slot<T>> {
        self.slots[id as usize].as_ref()
    }

    /// Passes a held operation on, at the next [`Relay::push`].
    pub(crate) fn pass(&mut self, id: u32) {
        self.get(id).place = Place::Ready;
        self.ready.push_back(id);
    }

    /// Completes an operation that is held.
    pub(crate) fn finish(&mut self, id: u32, result: Result<(), BlockError>) {
        let slot = self.slots[id as usize].take().expect("a held operation");
        assert!(slot.place == Place::Held, "the inner channel has it");
        self.free.push(id);
        let tag = slot.op.tag;
        self.done.push(Completion { tag, result });
    }

    /// The operation with the layer's own tag.
    fn find(&self, tag: Tag) -> Option<u32> {
        self.slots
            .iter()
            .position(|s| s.as_ref().is_some_and(|s| s.op.tag == tag))
            .map(|i| i as u32)
    }

    /// All operations that `pick` picks.
    pub(crate) fn all(&self, pick: impl Fn(&Slot<T>) -> bool) -> Vec<u32> {
        let picked = |i: &u32| self.slots[*i as usize].as_ref().is_some_and(&pick);
        (0..self.slots.len() as u32).filter(picked).collect()
    }

    /// Gives the inner channel what it takes; says how many.
    pub(crate) fn push(&mut self) -> usize {
        if self.ready.is_empty() {
            return 0;
        }
        self.ops.clear();
        for &id in &self.ready {
            let slot = self.slots[id as usize].as_ref().expect("a ready operation");
            let mut op = slot.instead.unwrap_or(slot.op);
            op.tag = Tag(u64::from(id));
            self.ops.push(op);
        }
        let n = self.inner.submit(&self.ops);
        for id in self.ready.drain(..n) {
            let slot = self.slots[id as usize].as_mut().expect("a ready operation");
            slot.place = Place::Inside;
        }
        self.inside += n;
        n
    }

    /// Polls the inner channel and gives it what waits, until neither has an effect. What it has
    /// finished is held again, and appended to `ended`.
    pub(crate) fn pump(&mut self, now: Instant, ended: &mut Vec<(u32, Result<(), BlockError>)>) {
        loop {
            let pushed = self.push();
            if pushed > 0 {
                self.inner.kick();
            }
            self.inner.poll(now, &mut self.inner_done);
            let finished = self.inner_done.len();
            for c in self.inner_done.drain(..) {
                let id = c.tag.0 as u32;
                let slot = self.slots[id as usize]
                    .as_mut()
                    .expect("an inner operation");
                slot.place = Place::Held;
                ended.push((id, c.result));
            }
            self.inside -= finished;
            if pushed == 0 && finished == 0 {
                return;
            }
        }
    }

    /// Cancels an operation, as [`Channel::cancel`].
    ///
    /// # Errors
    /// The number of one that is held, for the layer to finish.
    pub(crate) fn cancel(&mut self, tag: Tag) -> Result<Cancel, u32> {
        let Some(id) = self.find(tag) else {
            let finished = self.done.iter().any(|c| c.tag == tag);
            return Ok(if finished {
                Cancel::Soon
            } else {
                Cancel::Unknown
            });
        };
        let slot = self.get(id);
        slot.cancelled = true;
        match slot.place {
            Place::Held => Err(id),
            Place::Ready => {
                slot.place = Place::Held;
                self.ready.retain(|&i| i != id);
                Err(id)
            }
            Place::Inside => Ok(self.inner.cancel(Tag(u64::from(id)))),
        }
    }
}
