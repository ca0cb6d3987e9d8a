//! Packed virtqueues (virtio 1.3 §2.8).
//!
//! Unsafe, because rings lie in guest memory and are accessed through pointers that were resolved
//! once for an epoch.
#![allow(unsafe_code)]

use std::sync::Arc;

use bluff_memory::{GuestMemory, MemoryError};

use crate::chain::{INDIRECT, NEXT, WRITE};
use crate::inflight::{Again, Packed as Tracker, Saved, Step, step};
use crate::ring::{Done, Held, Translator};
use crate::sync::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence, need_event};
use crate::table::Table;
use crate::{
    Chain, ChainError, Limits, Pop, Position, QueueLog, QueueSetup, Ring as _, RingAddresses,
    RingError, StoppedQueue, features,
};

/// `VIRTQ_DESC_F_AVAIL` and `VIRTQ_DESC_F_USED` (§2.8.1).
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
/// Values of the event suppression flags (§2.8.14).
const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_DESC: u16 = 2;

/// A slot of the descriptor ring (§2.8.13). Little-endian.
#[repr(C)]
pub(crate) struct Slot {
    pub(crate) addr: AtomicU64,
    pub(crate) len: AtomicU32,
    pub(crate) id: AtomicU16,
    pub(crate) flags: AtomicU16,
}

/// An event suppression structure (§2.8.14). Little-endian.
#[repr(C)]
pub(crate) struct Events {
    pub(crate) off_wrap: AtomicU16,
    pub(crate) flags: AtomicU16,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Slot>() == 16 && size_of::<Events>() == 4);

/// Pointers to the parts of a ring in one epoch of memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parts {
    pub(crate) ring: *const Slot,
    pub(crate) driver: *const Events,
    pub(crate) device: *const Events,
}

impl Parts {
    /// Resolves a ring (§2.8.10: alignment and sizes).
    pub(crate) fn resolve(
        memory: &GuestMemory,
        at: &RingAddresses,
        size: u16,
    ) -> Result<Self, MemoryError> {
        let part = |addr, len, align| memory.contiguous(at.space, addr, len, align);
        Ok(Self {
            ring: part(at.desc, 16 * u64::from(size), 16)?.cast(),
            driver: part(at.driver, 4, 4)?.cast(),
            device: part(at.device, 4, 4)?.cast(),
        })
    }
}

/// A position in the ring with its wrap counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    at: u16,
    wrap: bool,
}

impl Place {
    /// `n` slots on, `n` being no more than the size.
    #[inline]
    fn plus(self, n: u16, size: u16) -> Self {
        let at = u32::from(self.at) + u32::from(n);
        match at >= u32::from(size) {
            true => Self {
                at: (at - u32::from(size)) as u16,
                wrap: !self.wrap,
            },
            false => Self {
                at: at as u16,
                wrap: self.wrap,
            },
        }
    }

    /// `n` slots back, `n` being no more than the size.
    fn minus(self, n: u16, size: u16) -> Self {
        match self.at.checked_sub(n) {
            Some(at) => Self {
                at,
                wrap: self.wrap,
            },
            None => Self {
                at: size - (n - self.at),
                wrap: !self.wrap,
            },
        }
    }

    /// The two bits that a slot has here when the driver has made it available.
    #[inline]
    fn avail_bits(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }

    /// The two bits that it has when the device has used it.
    #[inline]
    fn used_bits(self) -> u16 {
        if self.wrap { AVAIL | USED } else { 0 }
    }

    fn packed(self) -> u16 {
        self.at | u16::from(self.wrap) << 15
    }
}

/// A packed virtqueue.
#[derive(Debug)]
pub struct Ring {
    parts: Parts,
    size: u16,
    event_idx: bool,
    indirect: Option<u16>,
    translator: Translator,
    addresses: RingAddresses,
    avail: Place,
    used: Place,
    held: Held,
    /// Slots of chains in flight: the driver cannot have more of them than there are.
    slots: u32,
    tracker: Option<Tracker>,
    /// Chains that are to be done again, the first one last.
    again: Vec<Again>,
    /// The chain that is being read, for the tracker.
    saved: Vec<Saved>,
    /// Nobody was notified since the start: the first time is not suppressed.
    fresh: bool,
    /// Slots that were used since the driver was last considered for a notification.
    untold: u16,
    log: Option<QueueLog>,
    /// The guest address of the descriptor ring, which the log wants.
    ring_addr: Option<u64>,
}

// SAFETY: the pointers lead into memory that `translator` keeps mapped, on any thread.
unsafe impl Send for Ring {}

impl Ring {
    /// Takes up a ring where `setup` says.
    ///
    /// # Errors
    /// [`RingError`] where the size, the position or the addresses are not allowed, or the in-flight
    /// region lies.
    pub fn new(setup: &QueueSetup, limits: Limits) -> Result<Self, RingError> {
        if setup.size == 0 || setup.size > 32768 {
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
        let (size, p) = (setup.size, setup.position);
        if p.avail >= size || p.used >= size {
            return Err(RingError::Position(p.avail.max(p.used)));
        }
        let mut avail = Place {
            at: p.avail,
            wrap: p.avail_wrap,
        };
        let mut used = Place {
            at: p.used,
            wrap: p.used_wrap,
        };
        let (mut tracker, mut again, mut slots) = (None, Vec::new(), 0);
        if let Some(region) = &setup.inflight {
            let published = |at: u16, wrap: bool| {
                // SAFETY: `at` was checked to be below the size.
                let flags = unsafe { &(*parts.ring.add(usize::from(at))).flags };
                let bits = u16::from_le(flags.load(Ordering::Acquire)) & (AVAIL | USED);
                bits != Place { at, wrap }.avail_bits()
            };
            let (t, r) = Tracker::open(region.clone(), size, (used.at, used.wrap), published)?;
            used = Place {
                at: r.used.0,
                wrap: r.used.1,
            };
            avail = used.plus(r.slots as u16, size);
            Self::unpublish(&parts, used, r.slots, size);
            (tracker, again, slots) = (Some(t), r.again, r.slots);
        }
        let has = |bit: u64| setup.features & bit != 0;
        let mut this = Self {
            parts,
            size,
            event_idx: has(features::EVENT_IDX),
            indirect: has(features::INDIRECT_DESC).then_some(limits.indirect),
            translator: Translator::new(setup.memory.clone()),
            addresses: setup.addresses,
            avail,
            used,
            // A buffer ID is the driver's choice among all 16-bit numbers.
            held: Held::new(1 << 16, size, setup.features),
            slots,
            tracker,
            again,
            saved: Vec::new(),
            fresh: true,
            untold: 0,
            log: None,
            ring_addr: None,
        };
        this.set_log(setup.log.clone());
        Ok(this)
    }

    /// Takes back what a death in the middle of [`crate::Ring::publish`] left in slots behind a batch's
    /// first one. The driver never saw it; but it would, when smaller batches have led it there.
    #[cold]
    fn unpublish(parts: &Parts, used: Place, slots: u32, size: u16) {
        let mut place = used;
        for _ in 0..slots {
            // SAFETY: positions are below the size.
            let flags = unsafe { &(*parts.ring.add(usize::from(place.at))).flags };
            let bits = u16::from_le(flags.load(Ordering::Relaxed)) & (AVAIL | USED);
            if bits == place.used_bits() {
                step(Step::Store);
                flags.store(place.avail_bits().to_le(), Ordering::Release);
            }
            place = place.plus(1, size);
        }
    }

    #[inline(always)]
    fn slot(&self, at: u16) -> &Slot {
        // SAFETY: positions are below the size; the ring is resolved in the epoch that the translator
        // keeps.
        unsafe { &*self.parts.ring.add(usize::from(at)) }
    }

    /// Reads the slot at `at`, whose flags were read before.
    #[inline(always)]
    fn read(&self, at: u16, flags: u16) -> Saved {
        let slot = self.slot(at);
        // Relaxed: ordered by the acquire of the first slot's flags.
        Saved {
            addr: u64::from_le(slot.addr.load(Ordering::Relaxed)),
            len: u32::from_le(slot.len.load(Ordering::Relaxed)),
            id: u16::from_le(slot.id.load(Ordering::Relaxed)),
            flags,
        }
    }

    /// The flags of the first slot that is not taken yet, where the driver has made it available.
    #[inline(always)]
    fn available(&self) -> Option<u16> {
        // Acquire: the driver writes this slot's flags last of all the chain (§2.8.21.1.1), so the rest
        // of the chain and the data are seen after them.
        let flags = u16::from_le(self.slot(self.avail.at).flags.load(Ordering::Acquire));
        (flags & (AVAIL | USED) == self.avail.avail_bits()).then_some(flags)
    }

    /// One descriptor of a chain: a buffer, or a table of them.
    #[inline(always)]
    fn element(&mut self, d: &Saved, only: bool, chain: &mut Chain) -> Result<(), ChainError> {
        let Translator {
            memory,
            hint,
            scratch,
        } = &mut self.translator;
        if d.flags & INDIRECT == 0 {
            return chain.push(memory, hint, d.addr, d.len, d.flags & WRITE != 0);
        }
        // A table is a chain of its own (§2.8.7, §2.8.19).
        let limit = self.indirect.filter(|_| only).ok_or(ChainError::Indirect)?;
        let table = Table::new(memory, hint, d.addr, d.len, scratch)?;
        if table.count() > u32::from(limit) {
            return Err(ChainError::TooLong(limit));
        }
        for index in 0..table.count() {
            // Address; length, ID, flags.
            let (addr, rest) = table.get(index);
            let (len, flags) = (rest as u32, (rest >> 48) as u16);
            if flags & INDIRECT != 0 {
                return Err(ChainError::Indirect);
            }
            // Only the write flag counts in a table; its elements follow each other (§2.8.7).
            chain.push(memory, hint, addr, len, flags & WRITE != 0)?;
        }
        Ok(())
    }

    /// Does a recorded chain again.
    #[cold]
    fn pop_again(&mut self, again: &Again, chain: &mut Chain) -> Result<Pop, RingError> {
        let count = again.chain.len();
        let mut result = Ok(());
        for d in &again.chain {
            if result.is_ok() {
                result = self.element(d, count == 1, chain);
            }
        }
        (chain.slots, chain.entry) = (count as u16, again.entry);
        chain.id = again.chain.last().map_or(0, |d| d.id);
        self.held.popped(chain.id)?;
        if let Err(e) = result.and_then(|()| chain.end()) {
            return Ok(Pop::Bad(e));
        }
        Ok(Pop::Chain)
    }

    /// Marks a used slot.
    #[cold]
    fn log_slot(&self, at: u16) {
        if let (Some(QueueLog { log, .. }), Some(ring)) = (&self.log, self.ring_addr) {
            log.mark(ring + 16 * u64::from(at), 16);
        }
    }

    fn set_events(&self, off_wrap: u16, flags: u16) {
        // SAFETY: a part of the ring.
        let events = unsafe { &*self.parts.device };
        events.off_wrap.store(off_wrap.to_le(), Ordering::Relaxed);
        // Release: who sees the flags sees the offset that goes with them.
        events.flags.store(flags.to_le(), Ordering::Release);
        if let Some(QueueLog { log, .. }) = &self.log
            && let Some(at) = self
                .translator
                .guest(self.addresses.space, self.addresses.device)
        {
            log.mark(at, 4);
        }
    }

    /// Whether the driver wants to hear of the last `count` slots that were used (§2.8.14).
    #[inline]
    fn wants_event(&mut self, count: u16) -> bool {
        // SAFETY: a part of the ring.
        let events = unsafe { &*self.parts.driver };
        // Acquire: the offset that goes with the flags, or a newer one.
        let flags = u16::from_le(events.flags.load(Ordering::Acquire));
        if flags == EVENT_DISABLE {
            return false;
        }
        if flags != EVENT_DESC || !self.event_idx || std::mem::take(&mut self.fresh) {
            return true;
        }
        let off_wrap = u16::from_le(events.off_wrap.load(Ordering::Relaxed));
        let (off, wrap) = (off_wrap & 0x7fff, off_wrap >> 15 != 0);
        // As an index that runs on: one round back where the wrap counters differ.
        let event = if wrap == self.used.wrap {
            off
        } else {
            off.wrapping_sub(self.size)
        };
        let new = self.used.at;
        need_event(event, new, new.wrapping_sub(count))
    }
}

impl crate::Ring for Ring {
    #[inline(always)]
    fn pop(&mut self, chain: &mut Chain) -> Result<Pop, RingError> {
        chain.clear();
        if let Some(again) = self.again.pop() {
            return self.pop_again(&again, chain);
        }
        let Some(mut flags) = self.available() else {
            return Ok(Pop::Empty);
        };
        let (mut place, mut count, mut result) = (self.avail, 0u16, Ok(()));
        self.saved.clear();
        let free = u32::from(self.size) - self.slots;
        loop {
            if u32::from(count) == free {
                return Err(RingError::Endless);
            }
            let d = self.read(place.at, flags);
            place = place.plus(1, self.size);
            count += 1;
            let last = flags & NEXT == 0;
            if result.is_ok() {
                result = self.element(&d, count == 1 && last, chain);
            }
            if self.tracker.is_some() {
                self.saved.push(d);
            }
            if last {
                // The buffer ID stands in the last descriptor (§2.8.6).
                chain.id = d.id;
                break;
            }
            // Relaxed: made available together with the first.
            flags = u16::from_le(self.slot(place.at).flags.load(Ordering::Relaxed));
        }
        chain.slots = count;
        self.held.popped(chain.id)?;
        if let Some(tracker) = &mut self.tracker {
            chain.entry = tracker.popped(&self.saved)?;
        }
        self.avail = place;
        self.slots += u32::from(count);
        if let Err(e) = result.and_then(|()| chain.end()) {
            return Ok(Pop::Bad(e));
        }
        Ok(Pop::Chain)
    }

    #[inline]
    fn complete(&mut self, chain: &Chain, written: u32) {
        // After the data, before the used descriptor.
        chain.mark(self.log.as_ref());
        self.held.complete(chain, written);
    }

    #[inline]
    fn publish_quietly(&mut self) -> bool {
        let Some(first) = self.held.done.first() else {
            return false;
        };
        let (start, first_slots) = (self.used, first.slots);
        let total = self.held.done.iter().fold(0, |n, d| n + d.slots);
        self.used = start.plus(total, self.size);
        if let Some(tracker) = &self.tracker {
            tracker.batch(
                self.held.done.iter().map(|d| d.entry),
                self.used.at,
                self.used.wrap,
            );
        }
        // All but the first: the driver looks at slots in order, so it sees none of them before the
        // first one's flags (§2.8.9, §2.8.22).
        let mut place = start.plus(first_slots, self.size);
        for done in &self.held.done[1..] {
            let slot = self.slot(place.at);
            slot.id.store(done.id.to_le(), Ordering::Relaxed);
            slot.len.store(done.written.to_le(), Ordering::Relaxed);
            step(Step::Store);
            slot.flags.store(
                (place.used_bits() | written_bit(done)).to_le(),
                Ordering::Relaxed,
            );
            if self.log.is_some() {
                self.log_slot(place.at);
            }
            place = place.plus(done.slots, self.size);
        }
        let first = self.held.done[0];
        let slot = self.slot(start.at);
        slot.id.store(first.id.to_le(), Ordering::Relaxed);
        slot.len.store(first.written.to_le(), Ordering::Relaxed);
        // Release: the data and every slot of the batch are seen by whoever acquires these flags.
        let flags = start.used_bits() | written_bit(&first);
        step(Step::Store);
        slot.flags.store(flags.to_le(), Ordering::Release);
        if self.log.is_some() {
            // After the write, or a front end that clears the mark in between sends the page without it.
            self.log_slot(start.at);
        }
        if let Some(tracker) = &self.tracker {
            tracker.settle(self.held.done.iter().map(|d| d.entry));
        }
        for done in &self.held.done {
            self.held.in_use.give(done.id);
        }
        self.held.count -= self.held.done.len() as u16;
        self.slots -= u32::from(total);
        self.held.done.clear();
        self.untold = self.untold.saturating_add(total);
        true
    }

    #[inline]
    fn wants_notification(&mut self) -> bool {
        // As for split rings: what was used must be visible before we look at the driver's wish.
        fence(Ordering::SeqCst);
        // More than a lap has passed every place that the driver can name.
        let count = std::mem::take(&mut self.untold).min(self.size);
        self.wants_event(count)
    }

    fn enable_notifications(&mut self) -> bool {
        match self.event_idx {
            true => self.set_events(self.avail.packed(), EVENT_DESC),
            false => self.set_events(0, EVENT_ENABLE),
        }
        // Our wish must be visible before the last look (see `split`).
        fence(Ordering::SeqCst);
        self.available().is_some() || !self.again.is_empty()
    }

    fn disable_notifications(&mut self) {
        self.set_events(0, EVENT_DISABLE);
    }

    fn set_memory(&mut self, memory: Arc<GuestMemory>) -> Result<(), RingError> {
        self.parts = Parts::resolve(&memory, &self.addresses, self.size)?;
        self.translator.set(memory);
        self.ring_addr = self
            .translator
            .guest(self.addresses.space, self.addresses.desc);
        Ok(())
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        &self.translator.memory
    }

    fn set_log(&mut self, log: Option<QueueLog>) {
        self.ring_addr = self
            .translator
            .guest(self.addresses.space, self.addresses.desc);
        self.log = log;
        // A process that died may have written here and not have come to marking it.
        if let (Some(QueueLog { log, .. }), Some(ring)) = (&self.log, self.ring_addr) {
            log.mark(ring, 16 * u64::from(self.size));
        }
    }

    fn put_back(&mut self, chain: &Chain) {
        assert!(self.tracker.is_none(), "what is recorded stays in flight");
        self.held.put_back(chain.id);
        self.avail = self.avail.minus(chain.slots, self.size);
        self.slots -= u32::from(chain.slots);
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
                avail: self.avail.at,
                avail_wrap: self.avail.wrap,
                used: self.used.at,
                used_wrap: self.used.wrap,
            },
            in_flight: self.held.count + self.again.len() as u16,
        }
    }
}

/// A used descriptor says whether anything was written (§2.8.5).
#[inline]
fn written_bit(done: &Done) -> u16 {
    if done.written > 0 { WRITE } else { 0 }
}
