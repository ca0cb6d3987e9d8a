//! Split virtqueues (virtio 1.3 §2.7).
//!
//! Unsafe, because rings lie in guest memory and are accessed through pointers that were resolved
//! once for an epoch.
#![allow(unsafe_code)]

use std::sync::Arc;

use bluff_memory::{GuestMemory, MemoryError};

use crate::chain::{Descriptor, INDIRECT, NEXT, WRITE};
use crate::inflight::{Split as Tracker, Step, step};
use crate::ring::{Held, Translator};
use crate::sync::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence, need_event};
use crate::table::{self, Table};
use crate::{
    Chain, ChainError, Limits, Pop, Position, QueueLog, QueueSetup, Ring as _, RingAddresses,
    RingError, StoppedQueue, features,
};

/// The driver asks for no notification (`VIRTQ_AVAIL_F_NO_INTERRUPT`).
const NO_INTERRUPT: u16 = 1;
/// The device asks for no notification (`VIRTQ_USED_F_NO_NOTIFY`).
const NO_NOTIFY: u16 = 1;

/// Pointers to the parts of a ring in one epoch of memory.
///
/// All fields are little-endian. Each is an atomic, as the driver accesses it at the same time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parts {
    pub(crate) desc: *const [AtomicU64; 2],
    pub(crate) avail_flags: *const AtomicU16,
    pub(crate) avail_idx: *const AtomicU16,
    pub(crate) avail_ring: *const AtomicU16,
    pub(crate) used_event: *const AtomicU16,
    pub(crate) used_flags: *const AtomicU16,
    pub(crate) used_idx: *const AtomicU16,
    pub(crate) used_ring: *const [AtomicU32; 2],
    pub(crate) avail_event: *const AtomicU16,
}

impl Parts {
    /// Resolves a ring (virtio 1.3 §2.7: alignment and sizes of the parts).
    pub(crate) fn resolve(
        memory: &GuestMemory,
        at: &RingAddresses,
        size: u16,
    ) -> Result<Self, MemoryError> {
        let n = usize::from(size);
        let part = |addr, len: usize, align| memory.contiguous(at.space, addr, len as u64, align);
        let desc = part(at.desc, 16 * n, 16)?;
        let avail = part(at.driver, 6 + 2 * n, 2)?;
        let used = part(at.device, 6 + 8 * n, 4)?;
        Ok(Self {
            desc: desc.cast(),
            avail_flags: avail.cast(),
            avail_idx: avail.wrapping_add(2).cast(),
            avail_ring: avail.wrapping_add(4).cast(),
            used_event: avail.wrapping_add(4 + 2 * n).cast(),
            used_flags: used.cast(),
            used_idx: used.wrapping_add(2).cast(),
            used_ring: used.wrapping_add(4).cast(),
            avail_event: used.wrapping_add(4 + 8 * n).cast(),
        })
    }
}

/// A split virtqueue.
#[derive(Debug)]
pub struct Ring {
    parts: Parts,
    size: u16,
    mask: u16,
    event_idx: bool,
    indirect: Option<u16>,
    translator: Translator,
    addresses: RingAddresses,
    /// What is looked at next, free-running.
    next_avail: u16,
    /// The driver's index when it was last read.
    seen_avail: u16,
    /// What is used next, free-running.
    next_used: u16,
    /// Where `next_used` stood when the driver was last considered for a notification.
    told_used: Option<u16>,
    held: Held,
    tracker: Option<Tracker>,
    /// Heads that are to be done again, the first one last.
    again: Vec<u16>,
    log: Option<QueueLog>,
}

// SAFETY: the pointers lead into memory that `translator` keeps mapped, on any thread.
unsafe impl Send for Ring {}

impl Ring {
    /// Takes up a ring where `setup` says.
    ///
    /// # Errors
    /// [`RingError`] where the size or the addresses are not allowed, or the in-flight region lies.
    pub fn new(setup: &QueueSetup, limits: Limits) -> Result<Self, RingError> {
        if !setup.size.is_power_of_two() || setup.size > 32768 {
            return Err(RingError::Size(setup.size));
        }
        let parts = Parts::resolve(&setup.memory, &setup.addresses, setup.size)?;
        Self::with_parts(parts, setup, limits)
    }

    pub(crate) fn with_parts(
        parts: Parts,
        setup: &QueueSetup,
        limits: Limits,
    ) -> Result<Self, RingError> {
        let size = setup.size;
        // SAFETY: resolved; the setup's epoch is kept below.
        let used = u16::from_le(unsafe { &*parts.used_idx }.load(Ordering::Acquire));
        let (mut tracker, mut again) = (None, Vec::new());
        let mut avail = setup.position.avail;
        if let Some(region) = &setup.inflight {
            let (t, heads) = Tracker::open(region.clone(), size, used)?;
            // What the region knows is newer than what the front end was told.
            avail = used.wrapping_add(heads.len() as u16);
            (tracker, again) = (Some(t), heads);
        }
        let has = |bit: u64| setup.features & bit != 0;
        let mut this = Self {
            parts,
            size,
            mask: size - 1,
            event_idx: has(features::EVENT_IDX),
            indirect: has(features::INDIRECT_DESC).then_some(limits.indirect),
            translator: Translator::new(setup.memory.clone()),
            addresses: setup.addresses,
            next_avail: avail,
            seen_avail: avail,
            next_used: used,
            told_used: None,
            held: Held::new(usize::from(size), size, setup.features),
            tracker,
            again,
            log: None,
        };
        this.set_log(setup.log.clone());
        Ok(this)
    }

    /// The next head, and whether it is done again.
    #[inline(always)]
    fn next_head(&mut self) -> Result<Option<u16>, RingError> {
        if let Some(head) = self.again.pop() {
            self.held.popped(head)?;
            return Ok(Some(head));
        }
        if self.next_avail == self.seen_avail {
            // Acquire: what the driver wrote before its index (entries, descriptors, data) is seen
            // after it (§2.7.13.3.1 is the driver's half).
            // SAFETY: a part of the ring in the epoch that the translator keeps.
            let idx = u16::from_le(unsafe { &*self.parts.avail_idx }.load(Ordering::Acquire));
            if idx == self.next_avail {
                return Ok(None);
            }
            if idx.wrapping_sub(self.next_avail) > self.size {
                return Err(RingError::AvailIndex {
                    avail: idx,
                    next: self.next_avail,
                    size: self.size,
                });
            }
            self.seen_avail = idx;
        }
        let slot = usize::from(self.next_avail & self.mask);
        // SAFETY: below the size.
        let head = unsafe { &*self.parts.avail_ring.add(slot) };
        // Relaxed: ordered by the acquire of the index.
        let head = u16::from_le(head.load(Ordering::Relaxed));
        if head >= self.size {
            return Err(RingError::Head(head));
        }
        self.held.popped(head)?;
        self.next_avail = self.next_avail.wrapping_add(1);
        if let Some(tracker) = &mut self.tracker {
            tracker.popped(head);
        }
        Ok(Some(head))
    }

    /// A copy of the descriptor at `index`, which is below the size.
    #[inline(always)]
    fn descriptor(&self, index: u16) -> Descriptor {
        // SAFETY: below the size.
        let d = unsafe { &*self.parts.desc.add(usize::from(index)) };
        // Relaxed: ordered by the acquire of the index; the driver may change it meanwhile, and then
        // we have what we read.
        let (addr, rest) = (d[0].load(Ordering::Relaxed), d[1].load(Ordering::Relaxed));
        table::split(u64::from_le(addr), u64::from_le(rest))
    }

    /// Walks the chain at `head` (§2.7.5, §2.7.13.2).
    #[inline(always)]
    fn walk(&mut self, head: u16, chain: &mut Chain) -> Result<(), ChainError> {
        let mut index = head;
        for _ in 0..self.size {
            let d = self.descriptor(index);
            if d.flags & INDIRECT != 0 {
                // Zero or more direct descriptors may come before (§2.7.5.3.2).
                return self.walk_table(&d, chain);
            }
            let Translator { memory, hint, .. } = &mut self.translator;
            chain.push(memory, hint, d.addr, d.len, d.flags & WRITE != 0)?;
            if d.flags & NEXT == 0 {
                return chain.end();
            }
            if d.next >= self.size {
                return Err(ChainError::Index(d.next));
            }
            index = d.next;
        }
        Err(ChainError::TooLong(self.size))
    }

    fn walk_table(&mut self, outer: &Descriptor, chain: &mut Chain) -> Result<(), ChainError> {
        let limit = self.indirect.ok_or(ChainError::Indirect)?;
        if outer.flags & NEXT != 0 {
            return Err(ChainError::Indirect);
        }
        let Translator {
            memory,
            hint,
            scratch,
        } = &mut self.translator;
        let table = Table::new(memory, hint, outer.addr, outer.len, scratch)?;
        let mut index = 0;
        for _ in 0..limit {
            let d = table.split(index);
            if d.flags & INDIRECT != 0 {
                return Err(ChainError::Indirect);
            }
            chain.push(memory, hint, d.addr, d.len, d.flags & WRITE != 0)?;
            if d.flags & NEXT == 0 {
                return chain.end();
            }
            index = u32::from(d.next);
            if index >= table.count() {
                return Err(ChainError::Index(d.next));
            }
        }
        Err(ChainError::TooLong(limit))
    }

    /// Marks the used ring's entries from `old` to `new`.
    #[cold]
    fn log_used(&self, old: u16, new: u16) {
        let Some(QueueLog {
            log,
            used: Some(at),
        }) = &self.log
        else {
            return;
        };
        for i in 0..new.wrapping_sub(old) {
            let slot = old.wrapping_add(i) & self.mask;
            log.mark(at.saturating_add(4 + 8 * u64::from(slot)), 8);
        }
    }

    /// Marks `len` bytes of the used ring from byte `from` on.
    #[cold]
    fn log_part(&self, from: u64, len: u64) {
        if let Some(QueueLog {
            log,
            used: Some(at),
        }) = &self.log
        {
            log.mark(at.saturating_add(from), len);
        }
    }

    fn avail_moved(&self) -> bool {
        // Relaxed: nothing is read on the strength of this; `next_head` acquires.
        // SAFETY: a part of the ring.
        let idx = u16::from_le(unsafe { &*self.parts.avail_idx }.load(Ordering::Relaxed));
        idx != self.next_avail || !self.again.is_empty()
    }
}

impl crate::Ring for Ring {
    #[inline(always)]
    fn pop(&mut self, chain: &mut Chain) -> Result<Pop, RingError> {
        let Some(head) = self.next_head()? else {
            return Ok(Pop::Empty);
        };
        chain.clear();
        chain.id = head;
        match self.walk(head, chain) {
            Ok(()) => Ok(Pop::Chain),
            Err(e) => Ok(Pop::Bad(e)),
        }
    }

    #[inline]
    fn complete(&mut self, chain: &Chain, written: u32) {
        // After the data, before the used entry.
        chain.mark(self.log.as_ref());
        self.held.complete(chain, written);
    }

    #[inline]
    fn publish_quietly(&mut self) -> bool {
        if self.held.done.is_empty() {
            return false;
        }
        if let Some(tracker) = &self.tracker {
            tracker.batch(self.held.done.iter().map(|d| d.id));
        }
        let old = self.next_used;
        let mut new = old;
        for done in &self.held.done {
            self.held.in_use.give(done.id);
            // SAFETY: below the size.
            let slot = unsafe { &*self.parts.used_ring.add(usize::from(new & self.mask)) };
            // Relaxed: the release of the index orders them.
            slot[0].store(u32::from(done.id).to_le(), Ordering::Relaxed);
            slot[1].store(done.written.to_le(), Ordering::Relaxed);
            new = new.wrapping_add(1);
        }
        self.next_used = new;
        self.held.count -= self.held.done.len() as u16;
        if self.log.is_some() {
            self.log_used(old, new);
        }
        // Release: the data and the entries are seen by whoever acquires the index (§2.7.8.2).
        step(Step::Store);
        // SAFETY: a part of the ring.
        unsafe { &*self.parts.used_idx }.store(new.to_le(), Ordering::Release);
        if self.log.is_some() {
            // After the write, or a front end that clears the mark in between sends the page without it.
            self.log_part(2, 2);
        }
        if let Some(tracker) = &self.tracker {
            tracker.settle(self.held.done.iter().map(|d| d.id), new);
        }
        self.held.done.clear();
        true
    }

    #[inline]
    fn wants_notification(&mut self) -> bool {
        let new = self.next_used;
        // The index must be visible before we look whether the driver sleeps; the driver makes its
        // wish visible before it looks at the index (§2.7.7.2). Both need a full fence, or each may
        // read the other's old value and the notification is lost.
        fence(Ordering::SeqCst);
        if !self.event_idx {
            // SAFETY: a part of the ring.
            let flags = unsafe { &*self.parts.avail_flags }.load(Ordering::Relaxed);
            return u16::from_le(flags) & NO_INTERRUPT == 0;
        }
        // SAFETY: a part of the ring.
        let event = u16::from_le(unsafe { &*self.parts.used_event }.load(Ordering::Relaxed));
        match self.told_used.replace(new) {
            Some(told) => need_event(event, new, told),
            None => true,
        }
    }

    fn enable_notifications(&mut self) -> bool {
        if self.event_idx {
            // SAFETY: a part of the ring.
            let event = unsafe { &*self.parts.avail_event };
            event.store(self.next_avail.to_le(), Ordering::Relaxed);
            if self.log.is_some() {
                self.log_part(4 + 8 * u64::from(self.size), 2);
            }
        } else {
            self.set_no_notify(false);
        }
        // Our wish must be visible before we look at the index for the last time: the mirror image of
        // the fence in `publish`, for the driver's notifications (§2.7.10).
        fence(Ordering::SeqCst);
        self.avail_moved()
    }

    fn disable_notifications(&mut self) {
        // With an event index there is nothing to do: the old one is behind the driver soon, and a
        // notification too many does no harm.
        if !self.event_idx {
            self.set_no_notify(true);
        }
    }

    fn set_memory(&mut self, memory: Arc<GuestMemory>) -> Result<(), RingError> {
        self.parts = Parts::resolve(&memory, &self.addresses, self.size)?;
        self.translator.set(memory);
        Ok(())
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        &self.translator.memory
    }

    fn set_log(&mut self, log: Option<QueueLog>) {
        self.log = log;
        // A process that died may have written here and not have come to marking it.
        self.log_part(0, 6 + 8 * u64::from(self.size));
    }

    fn put_back(&mut self, chain: &Chain) {
        assert!(self.tracker.is_none(), "what is recorded stays in flight");
        self.held.put_back(chain.id);
        self.next_avail = self.next_avail.wrapping_sub(1);
    }

    fn cut_short(&self, chain: &Chain) {
        chain.mark(self.log.as_ref());
    }

    fn again(&self) -> usize {
        self.again.len()
    }

    fn position(&self) -> StoppedQueue {
        StoppedQueue {
            position: Position {
                avail: self.next_avail,
                avail_wrap: true,
                used: self.next_used,
                used_wrap: true,
            },
            in_flight: self.held.count + self.again.len() as u16,
        }
    }
}

impl Ring {
    fn set_no_notify(&self, on: bool) {
        let flags = if on { NO_NOTIFY } else { 0 };
        // SAFETY: a part of the ring.
        unsafe { &*self.parts.used_flags }.store(flags.to_le(), Ordering::Relaxed);
        if self.log.is_some() {
            self.log_part(0, 2);
        }
    }
}
