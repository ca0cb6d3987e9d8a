//! A submission queue (Base 2.1 §3.3.1).

use std::sync::Arc;

use bluff_memory::GuestMemory;

use super::doorbells::{Doorbell, Side};
use super::entries::Entries;
use super::{Doorbells, InvalidValue, QueueError, Shadow};
use crate::spec::Command;

/// A submission queue, in an epoch of memory or in none.
#[derive(Debug)]
pub(crate) struct SubmissionQueue {
    qid: u16,
    size: u32,
    entries: Entries<8>,
    doorbell: Doorbell,
    /// What is taken next.
    head: u16,
    /// How many were ever taken.
    taken: u64,
    /// Where the host's entries end, as far as we have looked.
    tail: u16,
    /// A value that made no sense, and was said.
    bad: Option<u16>,
}

impl SubmissionQueue {
    /// An empty queue of `size` entries (2 to 65,536) at guest address `base`. It has no memory yet.
    ///
    /// # Errors
    /// [`QueueError::Doorbell`].
    pub(crate) fn new(
        qid: u16,
        base: u64,
        size: u32,
        doorbells: &Arc<Doorbells>,
    ) -> Result<Self, QueueError> {
        let this = Self::resume(qid, base, size, doorbells, 0)?;
        this.doorbell.clear();
        Ok(this)
    }

    /// One that another process has taken `taken` commands from.
    ///
    /// # Errors
    /// As [`SubmissionQueue::new`].
    pub(crate) fn resume(
        qid: u16,
        base: u64,
        size: u32,
        doorbells: &Arc<Doorbells>,
        taken: u64,
    ) -> Result<Self, QueueError> {
        assert!((2..=1 << 16).contains(&size), "checked at its creation");
        let head = (taken % u64::from(size)) as u16;
        Ok(Self {
            qid,
            size,
            entries: Entries::new(base, size),
            doorbell: Doorbell::new(qid, Side::Tail, doorbells)?,
            head,
            taken,
            tail: head,
            bad: None,
        })
    }

    /// Its identifier.
    pub(crate) fn qid(&self) -> u16 {
        self.qid
    }

    /// How many commands were ever taken.
    #[inline(always)]
    pub(crate) fn taken(&self) -> u64 {
        self.taken
    }

    /// The head, as completions tell it: entries before it may be used again (Base 2.1 §4.2.1, SQHD).
    #[inline]
    pub(crate) fn head(&self) -> u16 {
        self.head
    }

    /// Moves to an epoch, or to none; its shadow doorbell moves with it. With `fresh` the host's shadow is set to where we have looked
    /// last: it is given now, or the queue is new.
    ///
    /// # Errors
    /// [`QueueError::Memory`]; it cannot be used then.
    pub(crate) fn set_memory(
        &mut self,
        memory: Option<&Arc<GuestMemory>>,
        shadow: Option<&Shadow>,
        fresh: bool,
    ) -> Result<(), QueueError> {
        let qid = self.qid;
        let moved = self.entries.set_memory(memory);
        moved.map_err(|source| QueueError::Memory { qid, source })?;
        let value = fresh.then_some(self.tail);
        let shadowed = self.doorbell.set_shadow(shadow, memory, value, self.head);
        if shadowed.is_err() {
            // Its register says nothing: the host writes the shadow.
            let _ = self.entries.set_memory(None);
        }
        shadowed
    }

    /// Looks at the doorbell; says how many commands wait.
    ///
    /// # Errors
    /// [`InvalidValue`] at or past the size; it is ignored, and what waits stays as it was.
    #[inline(always)]
    pub(crate) fn look(&mut self) -> Result<u32, InvalidValue> {
        let tail = self.doorbell.value();
        if tail != self.tail {
            if u32::from(tail) >= self.size {
                return self.invalid(tail);
            }
            (self.tail, self.bad) = (tail, None);
        }
        Ok(self.waiting())
    }

    #[cold]
    fn invalid(&mut self, value: u16) -> Result<u32, InvalidValue> {
        match self.bad.replace(value) {
            Some(bad) if bad == value => Ok(self.waiting()),
            _ => Err(InvalidValue(value)),
        }
    }

    /// How many commands wait, as far as we have looked.
    #[inline(always)]
    pub(crate) fn waiting(&self) -> u32 {
        match self.tail.checked_sub(self.head) {
            Some(n) => u32::from(n),
            None => u32::from(self.tail) + self.size - u32::from(self.head),
        }
    }

    /// Takes a copy of the next command, as far as [`SubmissionQueue::look`] has seen any.
    #[inline(always)]
    pub(crate) fn fetch(&mut self) -> Option<Command> {
        if self.head == self.tail {
            return None;
        }
        let words = self.entries.load(u32::from(self.head))?;
        self.head = match u32::from(self.head) + 1 {
            n if n == self.size => 0,
            n => n as u16,
        };
        self.taken = self.taken.wrapping_add(1);
        self.doorbell.quiet(self.head, self.size, self.size / 2);
        // Loaded and kept as the bytes are.
        Some(zerocopy::transmute!(words))
    }

    /// Whether a look would find what the last one found, and nothing waits.
    #[inline(always)]
    pub(crate) fn is_quiet(&self) -> bool {
        let value = self.doorbell.value();
        self.head == self.tail && (value == self.tail || Some(value) == self.bad)
    }

    /// Asks to be told of new commands; says whether there are some already. A doorbell with a value that was refused is no
    /// command.
    pub(crate) fn arm(&mut self) -> bool {
        if self.head != self.tail {
            return true;
        }
        let seen = self.bad.unwrap_or(self.tail);
        self.doorbell.ask(self.tail, seen)
    }

    /// Whether there is memory to use it.
    pub(crate) fn is_on(&self) -> bool {
        self.entries.is_on()
    }
}
