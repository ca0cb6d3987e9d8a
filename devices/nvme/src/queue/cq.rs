//! A completion queue (Base 2.1 §3.3.1, §4.2).
//!
//! An entry is reserved before a command is taken. So a completion always has its place: a host that never moves the
//! head is not served any more, and nobody else notices.

use std::sync::Arc;

use bluff_memory::GuestMemory;
use zerocopy::little_endian::U16;

use super::doorbells::{Doorbell, Side};
use super::entries::Entries;
use super::{Doorbells, InvalidValue, QueueError, Shadow};
use crate::spec::{Completion, Status};

/// A completion queue, in an epoch of memory or in none.
#[derive(Debug)]
pub(crate) struct CompletionQueue {
    qid: u16,
    size: u32,
    entries: Entries<2>,
    doorbell: Doorbell,
    /// What is written next.
    tail: u16,
    /// How many there ever were.
    posted: u64,
    /// What the host reads next, as far as we have looked.
    head: u16,
    /// Inverted in each round; an entry with it is new (Base 2.1 §4.2.4).
    phase: bool,
    /// Entries that commands in flight will need.
    reserved: u32,
    bad: Option<u16>,
}

impl CompletionQueue {
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
        let this = Self::resume(qid, base, size, doorbells, 0, 0)?;
        this.doorbell.clear();
        Ok(this)
    }

    /// One that another process has posted to: `posted` entries ever, of which the host had read those before `head`.
    ///
    /// # Errors
    /// As [`CompletionQueue::new`]; and [`QueueError::Position`] for a head that is none.
    pub(crate) fn resume(
        qid: u16,
        base: u64,
        size: u32,
        doorbells: &Arc<Doorbells>,
        posted: u64,
        head: u16,
    ) -> Result<Self, QueueError> {
        assert!((2..=1 << 16).contains(&size), "checked at its creation");
        if u32::from(head) >= size {
            return Err(QueueError::Position(qid));
        }
        let size_64 = u64::from(size);
        Ok(Self {
            qid,
            size,
            entries: Entries::new(base, size),
            doorbell: Doorbell::new(qid, Side::Head, doorbells)?,
            tail: (posted % size_64) as u16,
            posted,
            head,
            phase: (posted / size_64).is_multiple_of(2),
            reserved: 0,
            bad: None,
        })
    }

    /// How many entries were ever posted.
    #[inline(always)]
    pub(crate) fn posted(&self) -> u64 {
        self.posted
    }

    /// What the host reads next, as far as we have looked.
    #[inline(always)]
    pub(crate) fn head(&self) -> u16 {
        self.head
    }

    /// As [`CompletionQueue::reserve`], where nobody has looked whether there is room.
    ///
    /// # Errors
    /// [`QueueError::Position`]: there is none.
    pub(crate) fn reserve_again(&mut self) -> Result<(), QueueError> {
        if self.unread() + self.reserved + 1 >= self.size {
            return Err(QueueError::Position(self.qid));
        }
        self.reserved += 1;
        Ok(())
    }

    /// Its identifier.
    pub(crate) fn qid(&self) -> u16 {
        self.qid
    }

    /// As [`super::SubmissionQueue::set_memory`].
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
        let value = fresh.then_some(self.head);
        let shadowed = self.doorbell.set_shadow(shadow, memory, value, self.head);
        if shadowed.is_err() {
            // Its register says nothing: the host writes the shadow.
            let _ = self.entries.set_memory(None);
        }
        shadowed
    }

    /// Entries that the host has not read, as far as we have looked.
    #[inline(always)]
    pub(crate) fn unread(&self) -> u32 {
        match self.tail.checked_sub(self.head) {
            Some(n) => u32::from(n),
            None => u32::from(self.tail) + self.size - u32::from(self.head),
        }
    }

    /// How many more commands can be taken. The host's head is looked at only where it may matter: the line that it is in is the
    /// host's.
    ///
    /// # Errors
    /// [`InvalidValue`]: the host claims to have read what was not written. It is ignored.
    #[inline(always)]
    pub(crate) fn room(&mut self) -> Result<u32, InvalidValue> {
        let mut looked = Ok(());
        if (self.unread() + self.reserved) * 2 >= self.size {
            looked = self.look();
        }
        // One stays free: a full queue must not look like an empty one (Base 2.1 §3.3.1.1).
        looked.map(|()| self.size - 1 - self.unread() - self.reserved)
    }

    /// Looks at the host's head.
    ///
    /// # Errors
    /// As [`CompletionQueue::room`].
    pub(crate) fn look(&mut self) -> Result<(), InvalidValue> {
        let head = self.doorbell.value();
        if head == self.head {
            return Ok(());
        }
        let read = (u32::from(head) + self.size - u32::from(self.head)) % self.size;
        if u32::from(head) >= self.size || read > self.unread() {
            return match self.bad.replace(head) {
                Some(bad) if bad == head => Ok(()),
                _ => Err(InvalidValue(head)),
            };
        }
        (self.head, self.bad) = (head, None);
        // Looked at once in half a round, so it does not lag any more than that.
        self.doorbell.quiet(head, self.size, 1);
        Ok(())
    }

    /// Reserves an entry for a command that is taken now: at most [`CompletionQueue::room`] times.
    #[inline(always)]
    pub(crate) fn reserve(&mut self) {
        self.reserved += 1;
        debug_assert!(self.unread() + self.reserved < self.size);
    }

    /// Gives an entry back whose command will not be answered.
    pub(crate) fn release(&mut self) {
        self.reserved -= 1;
    }

    /// Answers a command, in an entry that was reserved for it. `false`: there is no memory now; nothing has happened.
    #[inline(always)]
    pub(crate) fn post(&mut self, completion: &Completion) -> bool {
        let entry = Completion {
            status: completion.status | U16::from(u16::from(self.phase)),
            ..*completion
        };
        // The phase tag is in the last word, which is stored with release: whoever sees it sees all of the entry, and the data
        // that the command brought (Base 2.1 §4.2.4: the host looks at the phase tag, then at the rest).
        let words: [u64; 2] = zerocopy::transmute!(entry);
        if !self.entries.store(u32::from(self.tail), words) {
            return false;
        }
        self.advance();
        true
    }

    /// As [`CompletionQueue::post`], for a completion that may have been posted before this queue was [resumed](CompletionQueue::resume).
    pub(crate) fn post_unless_there(&mut self, completion: &Completion) -> bool {
        match self.entries.load(u32::from(self.tail)) {
            None => false,
            Some(words) => {
                let found: Completion = zerocopy::transmute!(words);
                // The tag is in the lowest bit.
                if (found.status.get() & 1 != 0) != self.phase {
                    return self.post(completion);
                }
                self.advance();
                true
            }
        }
    }

    #[inline(always)]
    fn advance(&mut self) {
        self.reserved -= 1;
        // Wraps only where another process has written what cannot be.
        self.posted = self.posted.wrapping_add(1);
        self.tail = match u32::from(self.tail) + 1 {
            n if n == self.size => {
                self.phase = !self.phase;
                0
            }
            n => n as u16,
        };
    }

    /// Whether the host has read everything; looks.
    ///
    /// # Errors
    /// As [`CompletionQueue::room`].
    pub(crate) fn is_read(&mut self) -> Result<bool, InvalidValue> {
        if self.unread() > 0 {
            self.look()?;
        }
        Ok(self.unread() == 0)
    }

    /// Asks to be told when the host reads on; says whether it has already.
    pub(crate) fn arm(&mut self) -> bool {
        let seen = self.bad.unwrap_or(self.head);
        self.doorbell.ask(self.head, seen)
    }

    /// Whether there is memory to use it.
    pub(crate) fn is_on(&self) -> bool {
        self.entries.is_on()
    }
}

/// A completion of a command, but for its phase tag.
#[inline(always)]
pub(crate) fn completion(
    sq_id: u16,
    sq_head: u16,
    cid: U16,
    dw0: u32,
    status: Status,
) -> Completion {
    Completion {
        dw0: dw0.into(),
        dw1: 0.into(),
        sq_head: sq_head.into(),
        sq_id: sq_id.into(),
        cid,
        status: Completion::field(status, false),
    }
}
