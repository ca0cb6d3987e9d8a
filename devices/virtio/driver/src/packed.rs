//! The driver's side of a packed virtqueue (virtio 1.3 §2.8).
//!
//! ```text
//!   descriptors   [addr len id flags] * size    driver makes available, device overwrites with used ones
//!   driver area   off_wrap flags                which interrupts the driver wants
//!   device area   off_wrap flags                which notifications the device wants
//! ```

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::memory::{Memory, Span, fence};
use crate::queue::{
    Areas, Buffer, Config, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DESC_LEN, DriverQueue,
    Error, Features, Fixed, Layout, Position, Positions, Shape, Tables, Used, Violation, shape,
};

/// `VIRTQ_DESC_F_AVAIL` (§2.8.1).
const DESC_F_AVAIL: u16 = 1 << 7;
/// `VIRTQ_DESC_F_USED`.
const DESC_F_USED: u16 = 1 << 15;

/// Offsets in a descriptor (§2.8.13).
const DESC_ADDR: usize = 0;
const DESC_SIZE: usize = 8;
const DESC_ID: usize = 12;
const DESC_FLAGS: usize = 14;

/// Offsets in an event suppression structure (§2.8.14).
const EVENT_OFF_WRAP: usize = 0;
const EVENT_FLAGS: usize = 2;
/// `RING_EVENT_FLAGS_*` (§2.8.10).
const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_DESC: u16 = 2;

/// In the id of each descriptor but a chain's last: only the last one's counts (§2.8.6), and a device that takes another
/// shall be found out.
const ID_UNUSED: u16 = u16::MAX;

/// No fixed chain.
const NONE: u16 = u16::MAX;

/// What the driver remembers of the chain with a buffer id.
#[derive(Debug, Clone, Copy)]
struct Slot {
    token: u64,
    writable: u32,
    /// Number of the chain since the start, wrapping.
    sequence: u32,
    descriptors: u16,
    /// The fixed chain that it is, or `NONE`.
    fixed: u16,
    in_flight: bool,
}

/// A chain kept for resubmission.
#[derive(Debug)]
struct FixedChain {
    buffers: Box<[Buffer]>,
    shape: Shape,
    token: u64,
    in_flight: bool,
    table: Option<Tables>,
}

/// A position with its wrap counter, moving.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cursor {
    index: u16,
    wrap: bool,
}

impl Cursor {
    #[inline(always)]
    fn advance(&mut self, by: u16, size: u16) {
        // In 32 bits: 32768 + 32767 would still fit 16, but only just, and the compiler does not mind.
        let index = u32::from(self.index) + u32::from(by);
        if index >= u32::from(size) {
            self.index = (index - u32::from(size)) as u16;
            self.wrap = !self.wrap;
        } else {
            self.index = index as u16;
        }
    }

    /// AVAIL and USED bits of a descriptor made available in this lap (§2.8.1).
    #[inline(always)]
    fn avail_bits(self) -> u16 {
        if self.wrap { DESC_F_AVAIL } else { DESC_F_USED }
    }

    /// AVAIL and USED bits of a descriptor used in this lap.
    #[inline(always)]
    fn used_bits(self) -> u16 {
        if self.wrap {
            DESC_F_AVAIL | DESC_F_USED
        } else {
            0
        }
    }

    fn off_wrap(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }

    fn position(self) -> Position {
        Position {
            index: self.index,
            wrap: self.wrap,
        }
    }
}

/// The driver's side of a packed virtqueue.
#[derive(Debug)]
pub struct PackedDriver {
    areas: Areas,
    features: Features,
    size: u16,
    /// Where the next chain goes, counting what is not published.
    avail: Cursor,
    /// First descriptor that is not published, and the flags it is going to have.
    first: Cursor,
    first_flags: u16,
    /// Where the next used descriptor is awaited.
    used: Cursor,
    /// Chains added, published and popped since the start.
    added: u32,
    published: u32,
    popped: u32,
    /// Free descriptors.
    free: u16,
    /// Buffer ids not in flight: a stack of which `free_ids` are there.
    ids: Box<[u16]>,
    free_ids: u16,
    /// By buffer id.
    slots: Box<[Slot]>,
    /// IN_ORDER: buffer ids by sequence, modulo the length (a power of two, so that the sequence may wrap).
    order: Box<[u16]>,
    /// IN_ORDER: the sequence after the last chain of the batch being handed out, and that chain's length.
    batch_end: u32,
    batch_written: u32,
    fixed: Vec<FixedChain>,
    memory: Arc<Memory>,
}

impl PackedDriver {
    /// Lays out a queue in `memory` and initialises its areas.
    pub fn new(memory: &Arc<Memory>, config: &Config) -> Result<Self, Error> {
        let areas = Areas::new(
            memory,
            config,
            [u64::from(config.size) * DESC_LEN as u64, 4, 4],
        )?;
        if config.start.index >= config.size {
            return Err(Error::BadGeometry);
        }
        let size = usize::from(config.size);
        let slot = Slot {
            token: 0,
            writable: 0,
            sequence: 0,
            descriptors: 0,
            fixed: NONE,
            in_flight: false,
        };
        let start = Cursor {
            index: config.start.index,
            wrap: config.start.wrap,
        };
        let mut driver = Self {
            areas,
            features: config.features,
            size: config.size,
            avail: start,
            first: start,
            first_flags: 0,
            used: start,
            added: 0,
            published: 0,
            popped: 0,
            free: 0,
            ids: vec![0; size].into(),
            free_ids: 0,
            slots: vec![slot; size].into(),
            order: vec![
                0;
                if config.features.in_order {
                    size.next_power_of_two()
                } else {
                    0
                }
            ]
            .into(),
            batch_end: 0,
            batch_written: 0,
            fixed: Vec::new(),
            memory: memory.clone(),
        };
        driver.start(start);
        Ok(driver)
    }

    /// Puts both sides at `at` with nothing in flight. Runs before the device does, so needs no ordering.
    fn start(&mut self, at: Cursor) {
        self.areas.driver.zero();
        self.areas.device.zero();
        for area in [&self.areas.driver, &self.areas.device] {
            area.store_u16(EVENT_OFF_WRAP, 0, Ordering::Relaxed);
            area.store_u16(EVENT_FLAGS, EVENT_ENABLE, Ordering::Relaxed);
        }
        for index in 0..self.size {
            // What is before the position was used in this lap, what is behind it in the one before: for the start at 0
            // with wrap counter 1 all flags are zero, as after allocation.
            let lap = Cursor {
                index,
                wrap: if index < at.index { at.wrap } else { !at.wrap },
            };
            let offset = usize::from(index) * DESC_LEN;
            self.areas.descriptors.write_u64(offset + DESC_ADDR, 0);
            self.areas.descriptors.write_u32(offset + DESC_SIZE, 0);
            self.areas.descriptors.write_u16(offset + DESC_ID, 0);
            self.areas.descriptors.store_u16(
                offset + DESC_FLAGS,
                lap.used_bits(),
                Ordering::Relaxed,
            );
        }
        (self.avail, self.first, self.used) = (at, at, at);
        (self.added, self.published, self.popped, self.batch_end) = (0, 0, 0, 0);
        (self.free, self.free_ids) = (self.size, self.size);
        for (i, id) in self.ids.iter_mut().enumerate() {
            // A stack: the last is the first to be taken.
            *id = self.size - 1 - i as u16;
        }
        for slot in &mut self.slots {
            slot.in_flight = false;
        }
    }

    /// Writes one descriptor. The first one of a batch keeps its old flags until `publish`; the others get theirs at
    /// once, since a device takes descriptors in ring order and so cannot come to them before the first.
    #[inline(always)]
    fn write_descriptor(&mut self, addr: u64, len: u32, id: u16, flags: u16) {
        let offset = usize::from(self.avail.index) * DESC_LEN;
        let flags = flags | self.avail.avail_bits();
        self.areas.descriptors.write_u64(offset + DESC_ADDR, addr);
        self.areas.descriptors.write_u32(offset + DESC_SIZE, len);
        self.areas.descriptors.write_u16(offset + DESC_ID, id);
        if self.avail == self.first {
            self.first_flags = flags;
        } else {
            // Relaxed: made visible by the release in `publish`, as all the rest of the batch.
            self.areas
                .descriptors
                .store_u16(offset + DESC_FLAGS, flags, Ordering::Relaxed);
        }
        self.avail.advance(1, self.size);
    }

    /// Makes a chain available, unpublished. There must be room.
    #[inline]
    fn make_available(
        &mut self,
        chain: &[Buffer],
        indirect: Option<u64>,
        shape: Shape,
        token: u64,
        fixed: u16,
    ) -> u16 {
        self.free_ids -= 1;
        let id = self.ids[usize::from(self.free_ids)];
        if let Some(table) = indirect {
            self.write_descriptor(table, (chain.len() * DESC_LEN) as u32, id, DESC_F_INDIRECT);
        } else {
            let last = chain.len() - 1;
            for buffer in &chain[..last] {
                self.write_descriptor(
                    buffer.addr,
                    buffer.len,
                    ID_UNUSED,
                    buffer.flags() | DESC_F_NEXT,
                );
            }
            self.write_descriptor(chain[last].addr, chain[last].len, id, chain[last].flags());
        }
        self.free -= shape.descriptors;
        self.slots[usize::from(id)] = Slot {
            token,
            writable: shape.writable,
            sequence: self.added,
            descriptors: shape.descriptors,
            fixed,
            in_flight: true,
        };
        if self.features.in_order {
            let place = self.added as usize & (self.order.len() - 1);
            self.order[place] = id;
        }
        self.added = self.added.wrapping_add(1);
        id
    }

    /// Flags of the descriptor at the used position.
    #[inline(always)]
    fn used_flags(&self, order: Ordering) -> u16 {
        self.areas
            .descriptors
            .load_u16(usize::from(self.used.index) * DESC_LEN + DESC_FLAGS, order)
    }

    /// Reads and checks the used descriptor at the used position: the id, and the bytes written. `None`: not used yet.
    #[inline]
    fn used_entry(&self) -> Result<Option<(u16, u32)>, Violation> {
        // Acquire, to pair with the device's release of the flags: id, length and all that the device wrote into the
        // buffers are visible afterwards, and our reuse of descriptors and buffers comes after the device's last look.
        let flags = self.used_flags(Ordering::Acquire);
        let bits = flags & (DESC_F_AVAIL | DESC_F_USED);
        if bits != self.used.used_bits() {
            // While a published chain is in flight, this descriptor is one that we wrote in this lap.
            if self.published != self.popped && bits != self.used.avail_bits() {
                return Err(Violation::UsedFlags {
                    index: self.used.index,
                    flags,
                });
            }
            return Ok(None);
        }
        let offset = usize::from(self.used.index) * DESC_LEN;
        let id = self.areas.descriptors.read_u16(offset + DESC_ID);
        // The length means nothing unless the device says that it wrote (§2.8.4).
        let len = self.areas.descriptors.read_u32(offset + DESC_SIZE);
        let written = if flags & DESC_F_WRITE == 0 { 0 } else { len };
        let Some(slot) = self
            .slots
            .get(usize::from(id))
            .filter(|slot| slot.in_flight)
        else {
            return Err(Violation::UsedId { id: u32::from(id) });
        };
        // Added but not yet published: the device cannot know of it.
        let age = self.added.wrapping_sub(slot.sequence);
        if age <= self.added.wrapping_sub(self.published) {
            return Err(Violation::UsedId { id: u32::from(id) });
        }
        if written > slot.writable {
            return Err(Violation::UsedLength {
                id,
                written,
                writable: slot.writable,
            });
        }
        Ok(Some((id, written)))
    }

    /// Gives a chain's descriptors and id back and hands it out.
    #[inline]
    fn retire(&mut self, id: u16, written: u32) -> Used {
        let slot = &mut self.slots[usize::from(id)];
        slot.in_flight = false;
        let (token, descriptors, fixed) = (slot.token, slot.descriptors, slot.fixed);
        if fixed != NONE {
            self.fixed[usize::from(fixed)].in_flight = false;
        }
        self.ids[usize::from(self.free_ids)] = id;
        self.free_ids += 1;
        self.free += descriptors;
        self.popped = self.popped.wrapping_add(1);
        self.used.advance(descriptors, self.size);
        Used { token, written }
    }

    /// IN_ORDER: one used descriptor may close a batch, at the place of the batch's first descriptor (§2.8.8).
    fn pop_in_order(&mut self) -> Result<Option<Used>, Error> {
        if self.batch_end == self.popped {
            let Some((id, written)) = self.used_entry()? else {
                return Ok(None);
            };
            // In flight and published, so between the next chain in order and the last one published.
            self.batch_end = self.slots[usize::from(id)].sequence.wrapping_add(1);
            self.batch_written = written;
        }
        let id = self.order[self.popped as usize & (self.order.len() - 1)];
        let last = self.popped.wrapping_add(1) == self.batch_end;
        let written = if last {
            self.batch_written
        } else {
            self.slots[usize::from(id)].writable
        };
        Ok(Some(self.retire(id, written)))
    }
}

/// Writes an indirect table: in order, without links; ids and all flags but WRITE are reserved (§2.8.7).
fn write_table(span: &Span, offset: usize, chain: &[Buffer]) {
    for (i, buffer) in chain.iter().enumerate() {
        let at = offset + i * DESC_LEN;
        span.write_u64(at + DESC_ADDR, buffer.addr);
        span.write_u32(at + DESC_SIZE, buffer.len);
        span.write_u16(at + DESC_ID, 0);
        span.write_u16(at + DESC_FLAGS, buffer.flags());
    }
}

impl DriverQueue for PackedDriver {
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
            avail: self.first.position(),
            used: self.used.position(),
        }
    }

    fn in_flight(&self) -> u16 {
        self.added.wrapping_sub(self.popped) as u16
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
                // One table per id: this one is as free as the id that the chain is about to get.
                let (addr, offset) = tables.table(self.ids[usize::from(self.free_ids) - 1]);
                write_table(tables.span(), offset, chain);
                addr
            });
        Ok(self.make_available(chain, table, shape, token, NONE))
    }

    fn fix(&mut self, chain: &[Buffer], indirect: bool, token: u64) -> Result<Fixed, Error> {
        let limit = if indirect { u16::MAX } else { self.size };
        let shape = shape(chain, indirect, limit, self.features)?;
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
        self.fixed.push(FixedChain {
            buffers: chain.into(),
            shape,
            token,
            in_flight: false,
            table,
        });
        Ok(Fixed(index))
    }

    #[inline]
    fn resubmit(&mut self, fixed: Fixed) -> Result<(), Error> {
        let chain = &mut self.fixed[usize::from(fixed.0)];
        if chain.in_flight {
            return Err(Error::InFlight);
        }
        if self.free < chain.shape.descriptors {
            return Err(Error::Full);
        }
        chain.in_flight = true;
        let (shape, token) = (chain.shape, chain.token);
        let table = chain.table.as_ref().map(|table| table.table(0).0);
        // Taken out for the call, so that the queue can be borrowed; an empty box allocates nothing.
        let buffers = std::mem::take(&mut chain.buffers);
        self.make_available(&buffers, table, shape, token, fixed.0);
        self.fixed[usize::from(fixed.0)].buffers = buffers;
        Ok(())
    }

    fn publish(&mut self) -> bool {
        if self.added == self.published {
            return false;
        }
        // Release: everything of the batch (requests, tables, descriptors, the flags of all but this one) happens before
        // a load of these flags that sees them available. The device comes to the rest only by way of this descriptor,
        // so one release publishes the batch (§2.8.6 asks for the first descriptor of a chain to be last).
        let offset = usize::from(self.first.index) * DESC_LEN + DESC_FLAGS;
        self.areas
            .descriptors
            .store_u16(offset, self.first_flags, Ordering::Release);
        let old = self.first;
        self.first = self.avail;
        self.published = self.added;
        // As on a split ring: our store, the fence, then the device's wish; the device does it the other way round. Of
        // two sequentially consistent fences one is first, so at least one side sees the other's store.
        fence(Ordering::SeqCst);
        // Acquire: the device writes the position before it says that positions count, so that a position read after
        // `EVENT_DESC` is at least as new as that.
        match self.areas.device.load_u16(EVENT_FLAGS, Ordering::Acquire) {
            EVENT_DISABLE => false,
            EVENT_DESC if self.features.event_idx => {
                let event = self
                    .areas
                    .device
                    .load_u16(EVENT_OFF_WRAP, Ordering::Relaxed);
                // On one line, on which this lap of the old position starts at 0: a descriptor with the other wrap
                // counter is in the next lap if it lies at or before the position, else it was in the last one.
                let size = u32::from(self.size);
                let line = |index: u16, wrap: bool| {
                    u32::from(index) + if wrap == old.wrap { 0 } else { size }
                };
                let event = line(event & 0x7fff, event >> 15 != 0);
                // A batch that fills the ring comes back to its own place, one lap on.
                let new = line(self.avail.index, self.avail.wrap);
                (line(old.index, old.wrap)..new).contains(&event)
            }
            _ => true,
        }
    }

    #[inline]
    fn pop_used(&mut self) -> Result<Option<Used>, Error> {
        if self.features.in_order {
            return self.pop_in_order();
        }
        let Some((id, written)) = self.used_entry()? else {
            return Ok(None);
        };
        Ok(Some(self.retire(id, written)))
    }

    fn enable_interrupts_after(&mut self, count: u16) -> bool {
        if self.features.event_idx {
            let mut event = self.used;
            event.advance(count.clamp(1, self.size) - 1, self.size);
            self.areas
                .driver
                .store_u16(EVENT_OFF_WRAP, event.off_wrap(), Ordering::Relaxed);
            // Release: a device that sees `EVENT_DESC` sees the position.
            self.areas
                .driver
                .store_u16(EVENT_FLAGS, EVENT_DESC, Ordering::Release);
        } else {
            self.areas
                .driver
                .store_u16(EVENT_FLAGS, EVENT_ENABLE, Ordering::Relaxed);
        }
        // As in `publish`, the sides exchanged.
        fence(Ordering::SeqCst);
        // In a batch being handed out, the next chain is used although its descriptor does not say so. With `count` over
        // 1 the chains before the event do count as pending: the device's position cannot be read from a packed ring.
        self.batch_end != self.popped && self.features.in_order
            || self.used_flags(Ordering::Relaxed) & (DESC_F_AVAIL | DESC_F_USED)
                == self.used.used_bits()
    }

    fn disable_interrupts(&mut self) {
        // Only a hint, so no ordering is needed.
        self.areas
            .driver
            .store_u16(EVENT_FLAGS, EVENT_DISABLE, Ordering::Relaxed);
    }

    fn restart(&mut self) -> u16 {
        let dropped = self.in_flight();
        self.start(Cursor {
            index: 0,
            wrap: true,
        });
        for chain in &mut self.fixed {
            chain.in_flight = false;
        }
        dropped
    }
}
