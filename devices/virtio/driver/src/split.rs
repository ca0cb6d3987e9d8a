//! The driver's side of a split virtqueue (virtio 1.3 §2.7).
//!
//! ```text
//!   descriptors   [addr len flags next] * size         driver writes, device reads
//!   driver area   flags idx ring[size] used_event      driver writes, device reads
//!   device area   flags idx {id len}[size] avail_event device writes, driver reads
//! ```

mod in_order;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::memory::{Memory, Span, fence};
use crate::queue::{
    Areas, Buffer, Config, DESC_F_INDIRECT, DESC_F_NEXT, DESC_LEN, DriverQueue, Error, Features,
    Fixed, Layout, Position, Positions, Shape, Tables, Used, Violation, passed, shape,
};

use in_order::Batch;

/// Offset of `flags` in the available and the used ring.
const RING_FLAGS: usize = 0;
/// Offset of `idx` in the available and the used ring.
const RING_IDX: usize = 2;
/// Offset of the first entry in the available and the used ring.
const RING_ENTRIES: usize = 4;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (§2.7.6).
const AVAIL_F_NO_INTERRUPT: u16 = 1;
/// `VIRTQ_USED_F_NO_NOTIFY` (§2.7.8).
const USED_F_NO_NOTIFY: u16 = 1;

/// No fixed chain.
const NONE: u16 = u16::MAX;

/// What the driver remembers of the chain that starts at a descriptor.
#[derive(Debug, Clone, Copy)]
struct Slot {
    token: u64,
    writable: u32,
    /// Available index at which it was last added.
    position: u16,
    /// Its last descriptor, for the free list.
    tail: u16,
    descriptors: u16,
    /// The fixed chain that it is, or `NONE`.
    fixed: u16,
    in_flight: bool,
}

/// A chain kept for resubmission.
#[derive(Debug)]
struct FixedChain {
    /// IN_ORDER only: what to write at the next place.
    buffers: Box<[Buffer]>,
    shape: Shape,
    token: u64,
    in_flight: bool,
    table: Option<Tables>,
}

/// The driver's side of a split virtqueue.
#[derive(Debug)]
pub struct SplitDriver {
    areas: Areas,
    features: Features,
    size: u16,
    /// `size - 1` where the size is a power of two.
    mask: Option<u16>,
    /// Next available index, counting what is not published.
    avail_next: u16,
    avail_published: u16,
    used_next: u16,
    /// The device's used index as last seen: read again only when it is reached, as each look may cost a cache miss.
    used_seen: u16,
    /// Head of the list of free descriptors; IN_ORDER: the next one in ring order (§2.7.5).
    free_head: u16,
    free: u16,
    /// Links of chains and of the free list. Private: the shared table may have been damaged.
    links: Box<[u16]>,
    /// By head.
    slots: Box<[Slot]>,
    /// IN_ORDER: heads by available position.
    order: Box<[u16]>,
    batch: Batch,
    fixed: Vec<FixedChain>,
    /// Where each fixed chain lies (IN_ORDER: unused): apart from the rest, as it is all that a resubmission reads.
    heads: Vec<u16>,
    memory: Arc<Memory>,
}

impl SplitDriver {
    /// Lays out a queue in `memory` and zeroes its areas.
    pub fn new(memory: &Arc<Memory>, config: &Config) -> Result<Self, Error> {
        let size = u64::from(config.size);
        let areas = Areas::new(
            memory,
            config,
            [size * DESC_LEN as u64, size * 2 + 6, size * 8 + 6],
        )?;
        let slot = Slot {
            token: 0,
            writable: 0,
            position: 0,
            tail: 0,
            descriptors: 0,
            fixed: NONE,
            in_flight: false,
        };
        let mut driver = Self {
            areas,
            features: config.features,
            size: config.size,
            mask: config.size.is_power_of_two().then(|| config.size - 1),
            avail_next: 0,
            avail_published: 0,
            used_next: 0,
            used_seen: 0,
            free_head: 0,
            free: 0,
            links: vec![0; usize::from(config.size)].into(),
            slots: vec![slot; usize::from(config.size)].into(),
            order: vec![
                0;
                if config.features.in_order {
                    usize::from(config.size)
                } else {
                    0
                }
            ]
            .into(),
            batch: Batch::default(),
            fixed: Vec::new(),
            heads: Vec::new(),
            memory: memory.clone(),
        };
        driver.start(config.start.index);
        Ok(driver)
    }

    /// Puts both sides at `index` with nothing in flight. Runs before the device does, so needs no ordering.
    fn start(&mut self, index: u16) {
        self.areas.descriptors.zero();
        self.areas.driver.zero();
        self.areas.device.zero();
        self.areas
            .driver
            .store_u16(RING_FLAGS, 0, Ordering::Relaxed);
        self.areas
            .driver
            .store_u16(RING_IDX, index, Ordering::Relaxed);
        self.areas
            .driver
            .store_u16(self.used_event_offset(), index, Ordering::Relaxed);
        self.areas
            .device
            .store_u16(RING_FLAGS, 0, Ordering::Relaxed);
        self.areas
            .device
            .store_u16(RING_IDX, index, Ordering::Relaxed);
        self.areas
            .device
            .store_u16(self.avail_event_offset(), index, Ordering::Relaxed);
        (self.avail_next, self.avail_published) = (index, index);
        (self.used_next, self.used_seen) = (index, index);
        self.batch = Batch {
            end: index,
            written: 0,
        };
        self.free_head = 0;
        self.free = self.size;
        for (i, link) in self.links.iter_mut().enumerate() {
            *link = ((i + 1) % usize::from(self.size)) as u16;
        }
        for slot in &mut self.slots {
            slot.in_flight = false;
            slot.fixed = NONE;
        }
    }

    fn used_event_offset(&self) -> usize {
        RING_ENTRIES + usize::from(self.size) * 2
    }

    fn avail_event_offset(&self) -> usize {
        RING_ENTRIES + usize::from(self.size) * 8
    }

    /// Where an index lies in a ring.
    #[inline(always)]
    fn place(&self, index: u16) -> usize {
        match self.mask {
            Some(mask) => usize::from(index & mask),
            None => usize::from(index % self.size),
        }
    }

    /// Writes a chain's descriptors from `free_head` on and takes them off the free list. Returns the head.
    ///
    /// Plain writes: the device may not look at them before it has acquired the index that `publish` releases.
    fn write_chain(&mut self, chain: &[Buffer], indirect: Option<u64>, shape: Shape) -> u16 {
        let head = self.free_head;
        let mut tail = head;
        if let Some(table) = indirect {
            let len = (chain.len() * DESC_LEN) as u32;
            write_descriptor(
                &self.areas.descriptors,
                usize::from(head),
                table,
                len,
                DESC_F_INDIRECT,
                0,
            );
        } else {
            let mut at = head;
            for (i, buffer) in chain.iter().enumerate() {
                let link = self.links[usize::from(at)];
                let more = i + 1 < chain.len();
                let (flags, next) = if more {
                    (buffer.flags() | DESC_F_NEXT, link)
                } else {
                    (buffer.flags(), 0)
                };
                write_descriptor(
                    &self.areas.descriptors,
                    usize::from(at),
                    buffer.addr,
                    buffer.len,
                    flags,
                    next,
                );
                tail = at;
                at = link;
            }
        }
        self.free_head = self.links[usize::from(tail)];
        self.free -= shape.descriptors;
        let slot = &mut self.slots[usize::from(head)];
        slot.writable = shape.writable;
        slot.tail = tail;
        slot.descriptors = shape.descriptors;
        head
    }

    /// Puts a head into the available ring, unpublished.
    #[inline(always)]
    fn make_available(&mut self, head: u16) {
        let place = self.place(self.avail_next);
        // Plain write: ordered by the release of the index in `publish`.
        self.areas.driver.write_u16(RING_ENTRIES + place * 2, head);
        if self.features.in_order {
            self.order[place] = head;
        }
        let slot = &mut self.slots[usize::from(head)];
        slot.position = self.avail_next;
        slot.in_flight = true;
        self.avail_next = self.avail_next.wrapping_add(1);
    }

    /// Looks at the device's used index. Returns whether there is anything to pop.
    #[inline]
    fn refresh(&mut self) -> Result<bool, Error> {
        // Acquire, to pair with the device's release of the index: the used entries up to it, and all that the device
        // wrote into the buffers before, are visible afterwards. It also keeps our reuse of the chain's descriptors and
        // buffers after the device's last read of them, which its release closes.
        let to = self.areas.device.load_u16(RING_IDX, Ordering::Acquire);
        let in_flight = self.avail_published.wrapping_sub(self.used_next);
        if to.wrapping_sub(self.used_next) > in_flight {
            return Err(Violation::UsedIndex {
                from: self.used_next,
                to,
                in_flight,
            }
            .into());
        }
        self.used_seen = to;
        Ok(to != self.used_next)
    }

    /// Reads and checks the used entry at the used position: the head, and the bytes written.
    #[inline]
    fn used_entry(&self) -> Result<(u16, u32), Violation> {
        let entry = RING_ENTRIES + self.place(self.used_next) * 8;
        let (id, written) = self.areas.device.read_u32_pair(entry);
        let Some(slot) = self.slots.get(id as usize).filter(|slot| slot.in_flight) else {
            return Err(Violation::UsedId { id });
        };
        // Added but not yet published: the device cannot know of it.
        let age = self.avail_next.wrapping_sub(slot.position);
        if age <= self.avail_next.wrapping_sub(self.avail_published) {
            return Err(Violation::UsedId { id });
        }
        if written > slot.writable {
            return Err(Violation::UsedLength {
                id: id as u16,
                written,
                writable: slot.writable,
            });
        }
        Ok((id as u16, written))
    }

    /// Gives a chain's descriptors back (unless it is fixed) and hands it out.
    #[inline]
    fn retire(&mut self, head: u16, written: u32) -> Used {
        let in_order = self.features.in_order;
        let slot = &mut self.slots[usize::from(head)];
        slot.in_flight = false;
        let (token, tail, descriptors, fixed) =
            (slot.token, slot.tail, slot.descriptors, slot.fixed);
        self.used_next = self.used_next.wrapping_add(1);
        if in_order {
            // Descriptors come free in ring order too: only their count matters.
            self.free += descriptors;
            if fixed != NONE {
                self.fixed[usize::from(fixed)].in_flight = false;
            }
        } else if fixed == NONE {
            self.links[usize::from(tail)] = self.free_head;
            self.free_head = head;
            self.free += descriptors;
        }
        Used { token, written }
    }

    /// Writes a fixed chain's descriptors to where they stay. Needs its descriptors to be free.
    fn place_fixed(&mut self, index: u16) {
        let chain = &mut self.fixed[usize::from(index)];
        let (shape, token) = (chain.shape, chain.token);
        let buffers = std::mem::take(&mut chain.buffers);
        let table = chain.table.as_ref().map(|table| table.table(0).0);
        let head = self.write_chain(&buffers, table, shape);
        self.fixed[usize::from(index)].buffers = buffers;
        self.heads[usize::from(index)] = head;
        self.slots[usize::from(head)].fixed = index;
        self.slots[usize::from(head)].token = token;
    }
}

/// Writes one descriptor: two stores, as nothing reads it before the index that covers it is released.
#[inline]
fn write_descriptor(span: &Span, index: usize, addr: u64, len: u32, flags: u16, next: u16) {
    let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
    span.write_u64_pair(index * DESC_LEN, addr, rest);
}

/// Writes an indirect table: chained by `next`, in order (§2.7.5.3).
fn write_table(span: &Span, offset: usize, chain: &[Buffer]) {
    for (i, buffer) in chain.iter().enumerate() {
        let more = i + 1 < chain.len();
        let (flags, next) = if more {
            (buffer.flags() | DESC_F_NEXT, i as u16 + 1)
        } else {
            (buffer.flags(), 0)
        };
        write_descriptor(
            span,
            offset / DESC_LEN + i,
            buffer.addr,
            buffer.len,
            flags,
            next,
        );
    }
}

impl DriverQueue for SplitDriver {
    fn size(&self) -> u16 {
        self.size
    }

    fn layout(&self) -> Layout {
        self.areas.layout
    }

    fn features(&self) -> Features {
        self.features
    }

    fn positions(&self) -> Positions {
        Positions {
            avail: Position {
                index: self.avail_published,
                wrap: true,
            },
            used: Position {
                index: self.used_next,
                wrap: true,
            },
        }
    }

    fn in_flight(&self) -> u16 {
        self.avail_next.wrapping_sub(self.used_next)
    }

    fn free_descriptors(&self) -> u16 {
        self.free
    }

    fn add(&mut self, chain: &[Buffer], indirect: bool, token: u64) -> Result<u16, Error> {
        let limit = match (&self.areas.tables, indirect) {
            (Some(tables), true) => tables.entries,
            (None, true) => return Err(Error::NoIndirect),
            (_, false) => self.size,
        };
        let shape = shape(chain, indirect, limit, self.features)?;
        if self.free < shape.descriptors {
            return Err(Error::Full);
        }
        let table = self
            .areas
            .tables
            .as_ref()
            .filter(|_| indirect)
            .map(|tables| {
                // One table per descriptor: this one is as free as its descriptor.
                let (addr, offset) = tables.table(self.free_head);
                write_table(tables.span(), offset, chain);
                addr
            });
        let head = self.write_chain(chain, table, shape);
        let slot = &mut self.slots[usize::from(head)];
        slot.token = token;
        slot.fixed = NONE;
        self.make_available(head);
        Ok(head)
    }

    fn fix(&mut self, chain: &[Buffer], indirect: bool, token: u64) -> Result<Fixed, Error> {
        let limit = if indirect { u16::MAX } else { self.size };
        let shape = shape(chain, indirect, limit, self.features)?;
        if !self.features.in_order && self.free < shape.descriptors {
            return Err(Error::Full);
        }
        let table = match indirect {
            true => Some(Tables::new(&self.memory, 1, chain.len() as u16)?),
            false => None,
        };
        if let Some(table) = &table {
            write_table(table.span(), 0, chain);
        }
        let index = u16::try_from(self.fixed.len())
            .ok()
            .filter(|index| *index != NONE)
            .ok_or(Error::Full)?;
        self.heads.push(0);
        self.fixed.push(FixedChain {
            buffers: chain.into(),
            shape,
            token,
            in_flight: false,
            table,
        });
        if !self.features.in_order {
            self.place_fixed(index);
        }
        Ok(Fixed(index))
    }

    #[inline]
    fn resubmit(&mut self, fixed: Fixed) -> Result<(), Error> {
        if self.features.in_order {
            return self.resubmit_in_order(fixed);
        }
        let head = self.heads[usize::from(fixed.0)];
        if self.slots[usize::from(head)].in_flight {
            return Err(Error::InFlight);
        }
        self.make_available(head);
        Ok(())
    }

    fn publish(&mut self) -> bool {
        let (old, new) = (self.avail_published, self.avail_next);
        if old == new {
            return false;
        }
        // Release: descriptors, tables, ring entries and the requests in the buffers happen before a load of this index
        // that sees it. A device that acquires the index sees them whole.
        self.areas
            .driver
            .store_u16(RING_IDX, new, Ordering::Release);
        self.avail_published = new;
        // Store the index, then look whether the device wants to hear of it; the device stores its wish, then looks at
        // the index. Only if both sides put a sequentially consistent fence between the two does one of them see the
        // other's store; with release and acquire alone both may see the old value, and the device sleeps for ever.
        fence(Ordering::SeqCst);
        if self.features.event_idx {
            let event = self
                .areas
                .device
                .load_u16(self.avail_event_offset(), Ordering::Relaxed);
            passed(event, new, old)
        } else {
            self.areas.device.load_u16(RING_FLAGS, Ordering::Relaxed) & USED_F_NO_NOTIFY == 0
        }
    }

    #[inline]
    fn pop_used(&mut self) -> Result<Option<Used>, Error> {
        if self.used_next == self.used_seen && !self.refresh()? {
            return Ok(None);
        }
        if self.features.in_order {
            return self.pop_in_order().map(Some);
        }
        let (head, written) = self.used_entry()?;
        Ok(Some(self.retire(head, written)))
    }

    fn enable_interrupts_after(&mut self, count: u16) -> bool {
        let wait = if self.features.event_idx {
            count.clamp(1, self.size)
        } else {
            1
        };
        if self.features.event_idx {
            // The device interrupts when its index moves past the event, so for the next entry the event is the entry
            // itself (§2.7.7).
            let event = self.used_next.wrapping_add(wait - 1);
            self.areas
                .driver
                .store_u16(self.used_event_offset(), event, Ordering::Relaxed);
        } else {
            self.areas
                .driver
                .store_u16(RING_FLAGS, 0, Ordering::Relaxed);
        }
        // The mirror of `publish`: our wish is stored before the fence, and the device's index looked at behind it.
        // Either the device sees the wish after it has published, or we see what it published.
        fence(Ordering::SeqCst);
        let used = self.areas.device.load_u16(RING_IDX, Ordering::Relaxed);
        used.wrapping_sub(self.used_next) >= wait
    }

    fn disable_interrupts(&mut self) {
        // Only a hint: an interrupt that comes nevertheless is harmless, so no ordering is needed.
        if self.features.event_idx {
            // There is no "never". One behind the position is the furthest away: 65535 entries from now.
            let event = self.used_next.wrapping_sub(1);
            self.areas
                .driver
                .store_u16(self.used_event_offset(), event, Ordering::Relaxed);
        } else {
            self.areas
                .driver
                .store_u16(RING_FLAGS, AVAIL_F_NO_INTERRUPT, Ordering::Relaxed);
        }
    }

    fn restart(&mut self) -> u16 {
        let dropped = self.in_flight();
        self.start(0);
        for index in 0..self.fixed.len() {
            self.fixed[index].in_flight = false;
            if !self.features.in_order {
                self.place_fixed(index as u16);
            }
        }
        dropped
    }
}
