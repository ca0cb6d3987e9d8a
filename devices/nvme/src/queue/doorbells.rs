//! Doorbells: registers in memory, and their shadows in the host's (Base 2.1 §3.1.4.16, §5.2.5, §B.5).
//!
//! ```text
//!   host's write, trapped --> Doorbells::ring -----> register <-- straight from the host, where the page is mapped
//!                                                      |
//!   a queue's Doorbell: value() <----------------------+---- or, once the host has given buffers, the shadow
//!                       ask(), quiet() ----------------------------> its event index
//! ```
//!
//! # Why no ring is lost
//! *Trapped*: the store comes before the wake, which is a lock and a message; who is woken looks after it. *Mapped*: nobody is woken, so
//! its reader must not sleep ([`bluff_reactor::Poll::Always`]). *By descriptor*: stored before the event, see [`crate::bells`].
//! *Shadow*: as a ring's event index. The host stores the shadow, has a full fence, and reads the event index; we store the
//! event index, have a full fence, and read the shadow ([`Doorbell::ask`]). Of two fences in a single order one comes first (C11
//! §7.17.4, "sequentially consistent fences"), so at least one side reads what the other has stored: either we see
//! the new value, or the host sees that it has to ring.
//!
//! # Why an event index has to be moved while we poll
//! The host rings when its value passes the event index. An index that stays where it is would be passed once in each round of the
//! queue. The entry before the queue's own index is the last one that the host's value can reach, so an index there is never passed; and
//! one that lags by half a queue only by a host with more than half of the queue outstanding.
//!
//! # Whose values
//! Anyone's: each value is checked by its queue. The registers are in a file that the host may have mapped, of a size that is sealed.
//!
//! Unsafe, because doorbells are shared with a host and accessed through pointers.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bluff_memory::{GuestMemory, Mapping, Space};
use bluff_pci::{Area, PAGE};

use super::QueueError;
use super::sync::{AtomicU32, Ordering, fence};

/// Offset of the first doorbell in BAR 0 (PCIe transport 1.1 §3.1.2, with CAP.DSTRD 0).
pub(crate) const OFFSET: u64 = 0x1000;

/// Which doorbell of a queue's two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// Submission queue tail.
    Tail,
    /// Completion queue head.
    Head,
}

/// The doorbell registers of a controller.
#[derive(Debug)]
pub(crate) struct Doorbells {
    area: Area,
    mapping: Mapping,
    queues: u32,
}

impl Doorbells {
    /// Doorbells of `queues` pairs of queues, with the admin queues'.
    ///
    /// # Errors
    /// Where there is no memory for them.
    pub(crate) fn new(queues: u32) -> io::Result<Arc<Self>> {
        Self::map(Area::new(OFFSET, Self::bytes(queues))?, queues)
    }

    /// Those that another process had, by their file: a host may have mapped it.
    ///
    /// # Errors
    /// Where it is not such a file.
    pub(crate) fn open(file: OwnedFd, queues: u32) -> io::Result<Arc<Self>> {
        let area = Area {
            offset: OFFSET,
            len: Self::bytes(queues),
            file: Arc::new(file),
            file_offset: OFFSET,
        };
        Self::map(area, queues)
    }

    fn bytes(queues: u32) -> u64 {
        (u64::from(queues) * 8).next_multiple_of(PAGE)
    }

    fn map(area: Area, queues: u32) -> io::Result<Arc<Self>> {
        let len = area.len;
        let file = area.file.try_clone()?;
        let mapping = Mapping::new(file, area.file_offset, len).map_err(io::Error::other)?;
        Ok(Arc::new(Self {
            area,
            mapping,
            queues,
        }))
    }

    /// What a host may map, or have its kernel store to.
    pub(crate) fn area(&self) -> &Area {
        &self.area
    }

    /// Where a doorbell is in their area.
    pub(crate) fn offset(qid: u16, side: Side) -> u64 {
        u64::from(qid) * 8 + if side == Side::Head { 4 } else { 0 }
    }

    /// A trapped write to the doorbell at `offset` of their area; then its reader is to be woken. `None`: there is none there.
    pub(crate) fn ring(&self, offset: u64, value: u32) -> Option<(u16, Side)> {
        let number = u32::try_from(offset / 4).ok()?;
        if !offset.is_multiple_of(4) || number / 2 >= self.queues {
            return None;
        }
        let side = match number % 2 {
            0 => Side::Tail,
            _ => Side::Head,
        };
        let qid = (number / 2) as u16;
        // Release: what the host wrote before its doorbell came to us in order, and goes on so.
        self.register(qid, side)?
            .store(value.to_le(), Ordering::Release);
        Some((qid, side))
    }

    fn register(&self, qid: u16, side: Side) -> Option<&AtomicU32> {
        let ptr = self.place(qid, side)?;
        // SAFETY: inside of the mapping, which `self` keeps; the host stores there too, and it is an atomic.
        Some(unsafe { &*ptr })
    }

    fn place(&self, qid: u16, side: Side) -> Option<*const AtomicU32> {
        (u32::from(qid) < self.queues).then(|| at(self.mapping.ptr(), usize::from(qid), side))
    }
}

fn at(first: *mut u8, qid: usize, side: Side) -> *const AtomicU32 {
    let skip = qid * 8 + if side == Side::Head { 4 } else { 0 };
    first.wrapping_add(skip).cast_const().cast()
}

/// The buffers of Doorbell Buffer Config: guest addresses of two pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shadow {
    /// Shadow doorbells.
    pub(crate) doorbells: u64,
    /// Event indices.
    pub(crate) events: u64,
    /// Bytes of a memory page (CC.MPS), which is the length of each.
    pub(crate) page: u64,
}

impl Shadow {
    /// Whether both can be reached.
    pub(crate) fn is_in(&self, memory: &GuestMemory) -> bool {
        let there = |addr: u64| {
            let aligned = addr.is_multiple_of(self.page);
            aligned && memory.contiguous(Space::Guest, addr, self.page, 4).is_ok()
        };
        there(self.doorbells) && there(self.events)
    }
}

/// A doorbell, for its queue.
#[derive(Debug)]
pub(super) struct Doorbell {
    qid: u16,
    side: Side,
    doorbells: Arc<Doorbells>,
    register: *const AtomicU32,
    shadow: Option<Pair>,
    /// Keeps the shadow mapped.
    memory: Option<Arc<GuestMemory>>,
    /// The event index that the host has.
    told: u16,
}

/// A shadow doorbell, and its event index.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pair {
    pub(super) value: *const AtomicU32,
    pub(super) event: *const AtomicU32,
}

impl Pair {
    fn value(&self) -> &AtomicU32 {
        // SAFETY: resolved in the epoch that the doorbell keeps; an atomic, as the host stores there too.
        unsafe { &*self.value }
    }

    fn event(&self) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { &*self.event }
    }

    /// Asks to be rung when the value passes `index`; says whether it is another than `seen` already.
    #[inline]
    pub(super) fn ask(&self, index: u16, seen: u16) -> bool {
        self.event()
            .store(u32::from(index).to_le(), Ordering::Relaxed);
        // Our wish must be visible before we look for the last time: see the top of this file.
        fence(Ordering::SeqCst);
        u32::from_le(self.value().load(Ordering::Relaxed)) as u16 != seen
    }
}

impl Doorbell {
    /// The doorbell of a queue, with the value that it has.
    pub(super) fn new(
        qid: u16,
        side: Side,
        doorbells: &Arc<Doorbells>,
    ) -> Result<Self, QueueError> {
        let place = doorbells.place(qid, side);
        let register = place.ok_or(QueueError::Doorbell(qid))?;
        Ok(Self {
            qid,
            side,
            doorbells: doorbells.clone(),
            register,
            shadow: None,
            memory: None,
            told: 0,
        })
    }

    /// That of a queue that is being made: its register is 0 (Base 2.1 §3.1.4.16).
    pub(super) fn clear(&self) {
        if let Some(register) = self.doorbells.register(self.qid, self.side) {
            register.store(0, Ordering::Relaxed);
        }
    }

    /// The value now. What the host wrote before it is visible after this.
    #[inline(always)]
    pub(super) fn value(&self) -> u16 {
        let cell = match &self.shadow {
            None => {
                // SAFETY: in the mapping that `doorbells` keeps; an atomic, as others store there too.
                unsafe { &*self.register }
            }
            Some(pair) => pair.value(),
        };
        // Acquire: pairs with the host's barrier between its entries and its doorbell (Base 2.1 §3.3.1.2.1), and with
        // the release in `ring`. The upper half is reserved.
        u32::from_le(cell.load(Ordering::Acquire)) as u16
    }

    /// Takes its value from a shadow from now on, or from its register. The admin queues have no shadow: the host has to write their
    /// registers in any case (Base 2.1 §B.5). A queue whose shadow would not lie in the page has none either.
    ///
    /// The shadow gets `value`, where the host has to go on. `index` is where its queue stands.
    pub(super) fn set_shadow(
        &mut self,
        shadow: Option<&Shadow>,
        memory: Option<&Arc<GuestMemory>>,
        value: Option<u16>,
        index: u16,
    ) -> Result<(), QueueError> {
        (self.shadow, self.memory) = (None, None);
        let end = (u64::from(self.qid) + 1) * 8;
        let shadow = shadow.filter(|s| self.qid != 0 && end <= s.page);
        let (Some(shadow), Some(memory)) = (shadow, memory) else {
            return Ok(());
        };
        let page = |addr| {
            let page = memory.contiguous(Space::Guest, addr, shadow.page, 4);
            page.map_err(|source| QueueError::Memory {
                qid: self.qid,
                source,
            })
        };
        let pair = Pair {
            value: at(page(shadow.doorbells)?, usize::from(self.qid), self.side),
            event: at(page(shadow.events)?, usize::from(self.qid), self.side),
        };
        if let Some(value) = value {
            pair.value()
                .store(u32::from(value).to_le(), Ordering::Relaxed);
        }
        (self.shadow, self.memory) = (Some(pair), Some(memory.clone()));
        self.stay_behind(index);
        Ok(())
    }

    /// Asks to be rung when the value passes `index`; says whether it is another than `seen` already, which is `index` or a value that makes no
    /// sense: whoever mends that goes on from `index`. Without a shadow there is nothing to ask: every write is trapped.
    pub(super) fn ask(&mut self, index: u16, seen: u16) -> bool {
        match &self.shadow {
            Some(pair) => {
                self.told = index;
                pair.ask(index, seen)
            }
            None => self.value() != seen,
        }
    }

    /// While its queue, of `size` entries, is polled at `index`: keeps the event index out of the host's way. It may lag by `lag` entries.
    #[inline(always)]
    pub(super) fn quiet(&mut self, index: u16, size: u32, lag: u32) {
        if self.shadow.is_some() && before(index, self.told, size) > lag {
            self.stay_behind_in(index, size);
        }
    }

    fn stay_behind(&mut self, index: u16) {
        // Where the queue stands: the next change of value is told. That is right until `quiet` moves it.
        if let Some(pair) = &self.shadow {
            self.told = index;
            pair.event()
                .store(u32::from(index).to_le(), Ordering::Relaxed);
        }
    }

    #[cold]
    fn stay_behind_in(&mut self, index: u16, size: u32) {
        let last = match index {
            0 => (size - 1) as u16,
            n => n - 1,
        };
        if let Some(pair) = &self.shadow {
            self.told = last;
            pair.event()
                .store(u32::from(last).to_le(), Ordering::Relaxed);
        }
    }
}

/// How many entries `index` is ahead of `told`. Of a `told` that is no index of the queue (a host's value that made no sense): any number
/// above its size.
fn before(index: u16, told: u16, size: u32) -> u32 {
    match index.checked_sub(told) {
        Some(n) => u32::from(n),
        None => (u32::from(index) + size).wrapping_sub(u32::from(told)),
    }
}
