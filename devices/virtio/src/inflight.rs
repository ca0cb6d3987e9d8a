//! Requests in flight, recorded in shared memory in the standard vhost-user layout ("Inflight I/O
//! tracking"), so that they can be done again after the death of the process.
//!
//! The region is the front end's to change, so what is read from it is checked. A process that is
//! killed leaves its stores up to some point in program order: the orderings here only have to
//! keep the compiler from moving them, and a store with release ordering does that on any machine.
//!
//! Unsafe, because the region is shared memory.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use bluff_memory::Mapping;

use crate::RingError;

/// One queue's part of an in-flight region.
#[derive(Clone, Debug)]
pub struct InflightQueue {
    /// The region, which all queues share.
    pub region: Arc<Mapping>,
    /// Offset of this queue's part in bytes; a multiple of 64.
    pub offset: u64,
    /// Length of the part in bytes.
    pub len: u64,
}

impl InflightQueue {
    /// Forgets what is recorded: the queue was reset, so its driver has dropped its requests, and the next
    /// start begins a new record.
    pub fn forget(&self) {
        // Both layouts have the version in the same place.
        if let Ok(part) = Part::<SplitHeader, SplitEntry>::new(self.clone(), 0) {
            store16(&part.header().version, 0);
        }
    }
}

/// The bytes that a queue's part takes, whichever kind of ring it is: a multiple of 64.
pub fn queue_len(queue_size: u16) -> u64 {
    (size_of::<PackedHeader>() as u64 + size_of::<PackedEntry>() as u64 * u64::from(queue_size))
        .next_multiple_of(64)
}

#[repr(C)]
struct SplitHeader {
    features: AtomicU64,
    version: AtomicU16,
    desc_num: AtomicU16,
    last_batch_head: AtomicU16,
    used_idx: AtomicU16,
}

#[repr(C)]
struct SplitEntry {
    inflight: AtomicU8,
    _padding: [u8; 5],
    next: AtomicU16,
    counter: AtomicU64,
}

#[repr(C)]
struct PackedHeader {
    features: AtomicU64,
    version: AtomicU16,
    desc_num: AtomicU16,
    free_head: AtomicU16,
    old_free_head: AtomicU16,
    /// `used_idx`, `old_used_idx`, `used_wrap_counter`, `old_used_wrap_counter` and two bytes of padding:
    /// [`Used`]. They are stored as one: a death between an index and its wrap counter would leave a
    /// position that never was.
    used: AtomicU64,
    _padding: [u8; 8],
}

/// Where a packed ring's device stands, and where it stood before the batch that is being published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Used {
    new: (u16, bool),
    old: (u16, bool),
}

impl Used {
    fn load(h: &PackedHeader) -> Self {
        let b = h.used.load(Ordering::Relaxed).to_ne_bytes();
        Self {
            new: (u16::from_le_bytes([b[0], b[1]]), b[4] != 0),
            old: (u16::from_le_bytes([b[2], b[3]]), b[5] != 0),
        }
    }

    fn store(self, h: &PackedHeader) {
        let ([a, b], [c, d]) = (self.new.0.to_le_bytes(), self.old.0.to_le_bytes());
        let bytes = [a, b, c, d, u8::from(self.new.1), u8::from(self.old.1), 0, 0];
        step(Step::Store);
        h.used.store(u64::from_ne_bytes(bytes), Ordering::Release);
    }
}

#[repr(C)]
struct PackedEntry {
    inflight: AtomicU8,
    _padding: u8,
    next: AtomicU16,
    last: AtomicU16,
    num: AtomicU16,
    counter: AtomicU64,
    id: AtomicU16,
    flags: AtomicU16,
    len: AtomicU32,
    addr: AtomicU64,
}

const _: () = assert!(size_of::<SplitHeader>() == 16 && size_of::<SplitEntry>() == 16);
const _: () = assert!(size_of::<PackedHeader>() == 32 && size_of::<PackedEntry>() == 32);

/// The version of both layouts.
const VERSION: u16 = 1;

/// Typed access to one queue's part: a header and as many entries as the queue has descriptors.
struct Part<H, E> {
    queue: InflightQueue,
    size: u16,
    layout: std::marker::PhantomData<(H, E)>,
}

impl<H, E> std::fmt::Debug for Part<H, E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Part({} of {:?})", self.size, self.queue)
    }
}

impl<H, E> Part<H, E> {
    fn new(queue: InflightQueue, size: u16) -> Result<Self, RingError> {
        let need = (size_of::<H>() + size_of::<E>() * usize::from(size)) as u64;
        let end = queue.offset.checked_add(need);
        if queue.len < need || end.is_none_or(|e| e > queue.region.len()) {
            return Err(RingError::Inflight("too short for the queue"));
        }
        let at = queue.region.ptr() as u64 + queue.offset;
        if !at.is_multiple_of(8) {
            return Err(RingError::Inflight("not aligned to 8 bytes"));
        }
        Ok(Self {
            queue,
            size,
            layout: std::marker::PhantomData,
        })
    }

    fn at(&self) -> *const u8 {
        self.queue
            .region
            .ptr()
            .wrapping_add(self.queue.offset as usize)
    }

    fn header(&self) -> &H {
        // SAFETY: H is made of atomics and padding, aligned to 8; the mapping holds it (checked in
        // `new`) and lives as long as self.
        unsafe { &*self.at().cast::<H>() }
    }

    fn entry(&self, index: u16) -> &E {
        assert!(index < self.size, "index checked by the caller");
        // SAFETY: as for the header; the index is below the count that was checked.
        unsafe {
            &*self
                .at()
                .add(size_of::<H>())
                .cast::<E>()
                .add(usize::from(index))
        }
    }

    fn healthy(&self) -> Result<(), RingError> {
        match self.queue.region.is_poisoned() {
            true => Err(RingError::Inflight("its file shrank")),
            false => Ok(()),
        }
    }
}

fn load16(cell: &AtomicU16) -> u16 {
    u16::from_le(cell.load(Ordering::Relaxed))
}

fn load64(cell: &AtomicU64) -> u64 {
    u64::from_le(cell.load(Ordering::Relaxed))
}

fn store8(cell: &AtomicU8, value: u8) {
    step(Step::Store);
    cell.store(value, Ordering::Release);
}

fn store16(cell: &AtomicU16, value: u16) {
    step(Step::Store);
    cell.store(value.to_le(), Ordering::Release);
}

fn store64(cell: &AtomicU64, value: u64) {
    step(Step::Store);
    cell.store(value.to_le(), Ordering::Release);
}

/// Where tracking is in its steps; tests end it at each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A chain was read, and nothing recorded yet.
    BeforeEntry,
    /// A chain is recorded as in flight.
    AfterEntry,
    /// A batch is linked, and the driver cannot see it yet.
    BeforeUsed,
    /// The driver can see the batch, which is still recorded as in flight.
    AfterUsed,
    /// The batch is no longer recorded.
    Settled,
    /// Before any one store to the region, to a used index, or to the flags of a packed ring's slots.
    Store,
}

#[cfg(any(not(test), loom))]
#[inline(always)]
pub(crate) fn step(_: Step) {}

#[cfg(all(test, not(loom)))]
pub(crate) use steps::step;

#[cfg(all(test, not(loom)))]
pub(crate) mod steps {
    //! Lets a test end the ring at a step, as a kill would: what is in shared memory stays.
    use super::Step;
    use std::cell::{Cell, RefCell};

    thread_local!(static END: Cell<Option<(Step, u32)>> = const { Cell::new(None) });

    type Watch = Box<dyn FnMut()>;
    thread_local!(static WATCH: RefCell<Option<Watch>> = const { RefCell::new(None) });

    /// Has `watch` called at every step.
    pub(crate) fn watch(watch: Option<Watch>) {
        WATCH.set(watch);
    }

    /// The `n`th time that `at` is reached (from 0), [`step`] panics with the step.
    pub(crate) fn end_at(at: Option<(Step, u32)>) {
        END.set(at);
    }

    pub(crate) fn step(here: Step) {
        WATCH.with_borrow_mut(|watch| {
            if let Some(watch) = watch {
                watch();
            }
        });
        match END.get() {
            Some((at, 0)) if at == here => {
                END.set(None);
                std::panic::panic_any(here);
            }
            Some((at, n)) if at == here => END.set(Some((at, n - 1))),
            _ => {}
        }
    }
}

/// What a split ring records.
#[derive(Debug)]
pub(crate) struct Split {
    part: Part<SplitHeader, SplitEntry>,
    counter: u64,
}

impl Split {
    /// Opens the region, finishes what a death cut short, and says which heads are in flight, the
    /// last one that was popped first. `used` is the used index in the ring.
    pub(crate) fn open(
        queue: InflightQueue,
        size: u16,
        used: u16,
    ) -> Result<(Self, Vec<u16>), RingError> {
        let part = Part::<SplitHeader, SplitEntry>::new(queue, size)?;
        let h = part.header();
        match load16(&h.version) {
            0 => {
                h.features.store(0, Ordering::Relaxed);
                store16(&h.desc_num, size);
                store16(&h.last_batch_head, 0);
                store16(&h.used_idx, used);
                for i in 0..size {
                    store8(&part.entry(i).inflight, 0);
                }
                store16(&h.version, VERSION);
            }
            VERSION if load16(&h.desc_num) == size => {}
            VERSION => return Err(RingError::Inflight("made for another queue size")),
            _ => return Err(RingError::Inflight("of an unknown version")),
        }
        let batch = used.wrapping_sub(load16(&h.used_idx));
        if batch > size {
            return Err(RingError::Inflight("used index is not the ring's"));
        }
        let mut at = load16(&h.last_batch_head);
        for _ in 0..batch {
            if at >= size {
                return Err(RingError::Inflight("last batch leaves the table"));
            }
            let entry = part.entry(at);
            store8(&entry.inflight, 0);
            at = load16(&entry.next);
        }
        store16(&h.used_idx, used);
        let mut again: Vec<(u64, u16)> = (0..size)
            .filter(|&i| part.entry(i).inflight.load(Ordering::Relaxed) == 1)
            .map(|i| (load64(&part.entry(i).counter), i))
            .collect();
        again.sort_unstable_by(|a, b| b.cmp(a));
        part.healthy()?;
        let counter = again.first().map_or(0, |(c, _)| c.wrapping_add(1));
        Ok((
            Self { part, counter },
            again.into_iter().map(|(_, head)| head).collect(),
        ))
    }

    pub(crate) fn popped(&mut self, head: u16) {
        step(Step::BeforeEntry);
        let entry = self.part.entry(head);
        store64(&entry.counter, self.counter);
        self.counter = self.counter.wrapping_add(1);
        store8(&entry.inflight, 1);
        step(Step::AfterEntry);
    }

    /// Before the used index moves.
    pub(crate) fn batch(&self, heads: impl Iterator<Item = u16>) {
        let h = self.part.header();
        for head in heads {
            store16(&self.part.entry(head).next, load16(&h.last_batch_head));
            store16(&h.last_batch_head, head);
        }
        step(Step::BeforeUsed);
    }

    /// After the used index moved to `used`.
    pub(crate) fn settle(&self, heads: impl Iterator<Item = u16>, used: u16) {
        step(Step::AfterUsed);
        for head in heads {
            store8(&self.part.entry(head).inflight, 0);
        }
        store16(&self.part.header().used_idx, used);
        step(Step::Settled);
    }
}

/// A descriptor as a packed ring's region keeps it: the ring's own may be overwritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Saved {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) id: u16,
    pub(crate) flags: u16,
}

/// What a packed ring records.
#[derive(Debug)]
pub(crate) struct Packed {
    part: Part<PackedHeader, PackedEntry>,
    counter: u64,
}

/// A chain that is to be done again.
#[derive(Debug)]
pub(crate) struct Again {
    /// Its entry in the region.
    pub(crate) entry: u16,
    pub(crate) chain: Box<[Saved]>,
}

/// What a packed ring goes on from.
#[derive(Debug)]
pub(crate) struct Recovered {
    /// The used position, with its wrap counter.
    pub(crate) used: (u16, bool),
    /// What is in flight, the last chain that was popped first.
    pub(crate) again: Vec<Again>,
    /// How many ring slots these take.
    pub(crate) slots: u32,
}

impl Packed {
    /// Opens the region, finishes or rolls back what a death cut short. `start` is the used position
    /// of a fresh region; `published(pos, wrap)` says whether the ring's slot at `pos` has been
    /// given back to a driver that makes buffers available with `wrap`.
    pub(crate) fn open(
        queue: InflightQueue,
        size: u16,
        start: (u16, bool),
        published: impl Fn(u16, bool) -> bool,
    ) -> Result<(Self, Recovered), RingError> {
        let part = Part::<PackedHeader, PackedEntry>::new(queue, size)?;
        let h = part.header();
        match load16(&h.version) {
            0 => Self::initialise(&part, start),
            VERSION if load16(&h.desc_num) == size => {}
            VERSION => return Err(RingError::Inflight("made for another queue size")),
            _ => return Err(RingError::Inflight("of an unknown version")),
        }
        let Used { mut new, old } = Used::load(h);
        if new.0 >= size || old.0 >= size {
            return Err(RingError::Inflight("used index outside of the ring"));
        }
        // Wrap counters too: a batch of all slots leaves the index where it was.
        if new != old && published(old.0, old.1) {
            store16(&h.old_free_head, load16(&h.free_head));
        } else {
            new = old;
            store16(&h.free_head, load16(&h.old_free_head));
        }
        Used { new, old: new }.store(h);
        let (recovered, counter) = Self::collect(&part, new)?;
        part.healthy()?;
        Ok((Self { part, counter }, recovered))
    }

    fn initialise(part: &Part<PackedHeader, PackedEntry>, start: (u16, bool)) {
        let h = part.header();
        h.features.store(0, Ordering::Relaxed);
        store16(&h.desc_num, part.size);
        store16(&h.free_head, 0);
        store16(&h.old_free_head, 0);
        let (new, old) = (start, start);
        Used { new, old }.store(h);
        for i in 0..part.size {
            store8(&part.entry(i).inflight, 0);
            store16(&part.entry(i).next, i + 1);
        }
        store16(&h.version, VERSION);
    }

    /// Clears the free list's marks and finds what is in flight; also says what the next counter is.
    ///
    /// What is found is copied, as the front end may change the region at any time.
    fn collect(
        part: &Part<PackedHeader, PackedEntry>,
        used: (u16, bool),
    ) -> Result<(Recovered, u64), RingError> {
        let (h, size) = (part.header(), part.size);
        // Each entry is free, or belongs to one chain in flight, or the region lies.
        let mut seen = vec![false; usize::from(size)];
        let mut visit = |i: u16| match seen.get_mut(usize::from(i)) {
            Some(s) if !*s => {
                *s = true;
                Ok(())
            }
            _ => Err(RingError::Inflight(
                "an entry is listed twice, or outside of the table",
            )),
        };
        let mut free = 0u32;
        let mut at = load16(&h.free_head);
        while at != size {
            visit(at)?;
            store8(&part.entry(at).inflight, 0);
            at = load16(&part.entry(at).next);
            free += 1;
        }
        let mut heads: Vec<(u64, u16)> = (0..size)
            .filter(|&i| part.entry(i).inflight.load(Ordering::Relaxed) == 1)
            .map(|i| (load64(&part.entry(i).counter), i))
            .collect();
        heads.sort_unstable_by(|a, b| b.cmp(a));
        let mut slots = 0u32;
        let mut again = Vec::with_capacity(heads.len());
        for &(_, head) in &heads {
            let num = load16(&part.entry(head).num);
            let mut chain = Vec::new();
            let mut at = head;
            for i in 0..num {
                visit(at)?;
                if i + 1 == num && at != load16(&part.entry(head).last) {
                    return Err(RingError::Inflight("a chain does not end where it says"));
                }
                let entry = part.entry(at);
                chain.push(Saved {
                    addr: load64(&entry.addr),
                    len: u32::from_le(entry.len.load(Ordering::Relaxed)),
                    id: load16(&entry.id),
                    flags: load16(&entry.flags),
                });
                at = load16(&entry.next);
            }
            if num == 0 {
                return Err(RingError::Inflight("a chain without descriptors"));
            }
            slots += u32::from(num);
            let chain = chain.into_boxed_slice();
            again.push(Again { entry: head, chain });
        }
        if free + slots != u32::from(size) {
            return Err(RingError::Inflight("entries are missing"));
        }
        let counter = heads.first().map_or(0, |(c, _)| c.wrapping_add(1));
        Ok((Recovered { used, again, slots }, counter))
    }

    /// Records a chain; gives its entry.
    pub(crate) fn popped(&mut self, chain: &[Saved]) -> Result<u16, RingError> {
        step(Step::BeforeEntry);
        let (h, size) = (self.part.header(), self.part.size);
        let lies = RingError::Inflight("no free entry");
        let head = load16(&h.old_free_head);
        if head >= size {
            return Err(lies);
        }
        let first = self.part.entry(head);
        store16(&first.num, 0);
        store64(&first.counter, self.counter);
        self.counter = self.counter.wrapping_add(1);
        store8(&first.inflight, 1);
        for (i, saved) in chain.iter().enumerate() {
            let at = load16(&h.free_head);
            if at >= size {
                return Err(lies);
            }
            if i + 1 == chain.len() {
                store16(&first.last, at);
            }
            store16(&first.num, i as u16 + 1);
            let entry = self.part.entry(at);
            store64(&entry.addr, saved.addr);
            entry.len.store(saved.len.to_le(), Ordering::Release);
            store16(&entry.flags, saved.flags);
            store16(&entry.id, saved.id);
            store16(&h.free_head, load16(&entry.next));
        }
        store16(&h.old_free_head, load16(&h.free_head));
        step(Step::AfterEntry);
        Ok(head)
    }

    /// Before the flags of the batch's first slot are written; `used` is the position after it.
    pub(crate) fn batch(&self, heads: impl Iterator<Item = u16>, used: u16, wrap: bool) {
        let h = self.part.header();
        for head in heads {
            let last = load16(&self.part.entry(head).last).min(self.part.size - 1);
            store16(&self.part.entry(last).next, load16(&h.free_head));
            store16(&h.free_head, head);
        }
        let old = Used::load(h).old;
        let new = (used, wrap);
        Used { new, old }.store(h);
        step(Step::BeforeUsed);
    }

    /// After the flags of the batch's first slot were written.
    pub(crate) fn settle(&self, heads: impl Iterator<Item = u16>) {
        step(Step::AfterUsed);
        let h = self.part.header();
        for head in heads {
            store8(&self.part.entry(head).inflight, 0);
        }
        store16(&h.old_free_head, load16(&h.free_head));
        let new = Used::load(h).new;
        Used { new, old: new }.store(h);
        step(Step::Settled);
    }
}
