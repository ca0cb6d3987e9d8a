//! What both kinds of virtqueue have in common: geometry, features, the trait and what a device can do wrong.

use std::sync::Arc;

use crate::memory::{Memory, MemoryError, Span};

/// Descriptor flag: the chain continues (§2.7.5, §2.8.6).
pub(crate) const DESC_F_NEXT: u16 = 1;
/// Descriptor flag: the device writes this buffer.
pub(crate) const DESC_F_WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub(crate) const DESC_F_INDIRECT: u16 = 4;
/// Bytes of a descriptor of either kind, and so of an entry of an indirect table.
pub(crate) const DESC_LEN: usize = 16;

/// Rings and tables start on lines of their own, two by two, since processors prefetch pairs: what the driver writes
/// never shares a line with what the device writes.
const RING_ALIGN: u64 = 128;

/// One element of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// Whether the device writes it (else it reads it).
    pub device_writable: bool,
}

impl Buffer {
    /// A buffer that the device reads.
    pub fn readable(addr: u64, len: u32) -> Self {
        Self {
            addr,
            len,
            device_writable: false,
        }
    }

    /// A buffer that the device writes.
    pub fn writable(addr: u64, len: u32) -> Self {
        Self {
            addr,
            len,
            device_writable: true,
        }
    }

    pub(crate) fn flags(&self) -> u16 {
        if self.device_writable {
            DESC_F_WRITE
        } else {
            0
        }
    }
}

/// Negotiated features that change how a virtqueue works (§6).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Features {
    /// VIRTIO_F_EVENT_IDX: notifications are suppressed by position.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC: a chain may be a table of descriptors.
    pub indirect: bool,
    /// VIRTIO_F_IN_ORDER: the device uses buffers in the order in which they were made available.
    pub in_order: bool,
}

/// Guest-physical addresses of the three areas of a virtqueue (§2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Descriptor table or descriptor ring.
    pub descriptors: u64,
    /// Driver area: available ring, or driver event suppression.
    pub driver: u64,
    /// Device area: used ring, or device event suppression.
    pub device: u64,
}

/// A position in a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Split: a free-running index. Packed: the descriptor, below the queue size.
    pub index: u16,
    /// Packed: the wrap counter that goes with it. Split: always true.
    pub wrap: bool,
}

impl Default for Position {
    /// Where every queue starts: index 0, wrap counter 1 (§2.8.1).
    fn default() -> Self {
        Self {
            index: 0,
            wrap: true,
        }
    }
}

/// Where a virtqueue stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Positions {
    /// The next chain will be published here.
    pub avail: Position,
    /// The next used entry is awaited here.
    pub used: Position,
}

impl Positions {
    /// The value of vhost-user's SET_VRING_BASE for a split ring whose device has fetched every published chain.
    pub fn split_base(&self) -> u32 {
        u32::from(self.avail.index)
    }

    /// The value of vhost-user's SET_VRING_BASE for a packed ring: the available position below, the used one above,
    /// each with its wrap counter in bit 15.
    pub fn packed_base(&self) -> u32 {
        let half = |at: Position| u32::from(at.index) | u32::from(at.wrap) << 15;
        half(self.avail) | half(self.used) << 16
    }
}

/// How to set up a virtqueue.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// Descriptors. Packed: 1 to 32768. Split: the specification wants a power of two; anything up to 32768 is taken, so
    /// that a test can see what a device does with the rest.
    pub size: u16,
    /// Negotiated features.
    pub features: Features,
    /// Entries of the indirect table that each chain of [`DriverQueue::add`] may use; 0: none is allocated.
    pub indirect_entries: u16,
    /// Where the areas lie; `None`: allocated, each on cache lines of its own.
    pub layout: Option<Layout>,
    /// Where both sides start.
    pub start: Position,
}

impl Config {
    /// A queue of `size` descriptors from position 0, with areas of its own and no indirect tables.
    pub fn new(size: u16, features: Features) -> Self {
        Self {
            size,
            features,
            indirect_entries: 0,
            layout: None,
            start: Position::default(),
        }
    }
}

/// A chain that stays with its queue and is made available again and again: see [`DriverQueue::fix`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fixed(pub(crate) u16);

/// A chain that the device has used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// What the caller gave with the chain.
    pub token: u64,
    /// Bytes that the device says it wrote. For the skipped chains of an IN_ORDER batch: all writable bytes, as these
    /// count as used in full (§2.7.9, §2.8.8).
    pub written: u32,
}

/// What a device did that the specification forbids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// The used index moved by more than what is in flight, or backwards (§2.7.8).
    #[error("used index went from {from} to {to} with {in_flight} chains in flight")]
    UsedIndex {
        /// What had been used up to here.
        from: u16,
        /// What the device wrote.
        to: u16,
        /// Published and not used.
        in_flight: u16,
    },
    /// A used entry names no chain that is published and not yet used.
    #[error("used id {id} is not in flight")]
    UsedId {
        /// What the device wrote.
        id: u32,
    },
    /// More bytes written than the chain has writable.
    #[error("used length {written} of chain {id}, which has {writable} writable bytes")]
    UsedLength {
        /// The chain.
        id: u16,
        /// What the device wrote.
        written: u32,
        /// Writable bytes of the chain.
        writable: u32,
    },
    /// IN_ORDER: the used entry's chain is not covered by the used index, so it is neither next nor the end of a batch.
    #[error("used id {id} closes a batch of {batch}, but only {used} chains are used")]
    OutOfOrder {
        /// The chain.
        id: u16,
        /// Chains from the next one in order up to this one.
        batch: u16,
        /// Chains that the used index covers.
        used: u16,
    },
    /// Packed: the flags of the next used descriptor are neither as the driver wrote them nor those of a used one (§2.8.1).
    #[error("flags {flags:#06x} of descriptor {index} are neither available nor used in this lap")]
    UsedFlags {
        /// The descriptor.
        index: u16,
        /// Its flags.
        flags: u16,
    },
}

/// Why a queue refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device broke the specification; the queue did not move.
    #[error("the device broke the specification")]
    Device(#[from] Violation),
    /// Too few free descriptors now.
    #[error("the queue is full")]
    Full,
    /// Empty, longer than the queue (or the indirect table), or with readable buffers after writable ones (§2.7.4.2).
    #[error("not a chain that a driver may make available")]
    BadChain,
    /// An indirect table was asked for without the feature or without tables.
    #[error("indirect descriptors were not negotiated")]
    NoIndirect,
    /// The fixed chain is in flight.
    #[error("the fixed chain is in flight")]
    InFlight,
    /// The queue's size is 0 or over 32768, its start is not inside, or an area is not aligned (16, 4, 4).
    #[error("bad queue geometry")]
    BadGeometry,
    /// The areas do not lie in guest memory.
    #[error("no memory for the queue")]
    Memory(#[from] MemoryError),
}

/// The driver's side of a virtqueue.
///
/// Chains are added, then published together; used ones are popped one by one. Nothing allocates after `new` and `fix`.
/// The device may be in another thread or process; the methods never wait for it.
pub trait DriverQueue {
    /// Descriptors.
    fn size(&self) -> u16;

    /// Where the areas are.
    fn layout(&self) -> Layout;

    /// Negotiated features.
    fn features(&self) -> Features;

    /// Positions: of what is published, and of what was popped.
    fn positions(&self) -> Positions;

    /// Chains added and not popped, published or not.
    fn in_flight(&self) -> u16;

    /// Descriptors that neither a chain in flight nor a fixed chain occupies.
    fn free_descriptors(&self) -> u16;

    /// Writes a chain without publishing it; `indirect`: as one table. Returns its head (split) or buffer id (packed).
    fn add(&mut self, chain: &[Buffer], indirect: bool, token: u64) -> Result<u16, Error>;

    /// Keeps a chain for [`DriverQueue::resubmit`] without making it available. An indirect one gets a table of its own.
    /// Split rings without IN_ORDER write its descriptors here, once, and set them aside; other rings dictate where each
    /// descriptor goes, and so are written at each submission.
    fn fix(&mut self, chain: &[Buffer], indirect: bool, token: u64) -> Result<Fixed, Error>;

    /// Makes a fixed chain available again, as `add` would.
    fn resubmit(&mut self, fixed: Fixed) -> Result<(), Error>;

    /// Publishes what was added since the last time, all at once. Returns whether the device must be notified.
    fn publish(&mut self) -> bool;

    /// Takes the next used chain.
    fn pop_used(&mut self) -> Result<Option<Used>, Error>;

    /// Asks for an interrupt at the next used buffer. Returns true if there is one already: then no interrupt may come
    /// for it, and the caller pops instead of sleeping.
    fn enable_interrupts(&mut self) -> bool {
        self.enable_interrupts_after(1)
    }

    /// As `enable_interrupts`, once `count` more positions are used: chains in a split ring, descriptors in a packed one.
    /// Without EVENT_IDX the device cannot count, and `count` is taken for 1. Clamped to the queue size.
    fn enable_interrupts_after(&mut self, count: u16) -> bool;

    /// Asks for no interrupt. With EVENT_IDX a split ring can only ask for one that is a whole lap of the index away.
    fn disable_interrupts(&mut self);

    /// Starts again at position 0, after the device has confirmed RING_RESET or a device reset (§2.6.1). Everything in
    /// flight is forgotten; fixed chains stay. Returns how many chains were in flight.
    fn restart(&mut self) -> u16;
}

impl<Q: DriverQueue + ?Sized> DriverQueue for Box<Q> {
    fn size(&self) -> u16 {
        (**self).size()
    }
    fn layout(&self) -> Layout {
        (**self).layout()
    }
    fn features(&self) -> Features {
        (**self).features()
    }
    fn positions(&self) -> Positions {
        (**self).positions()
    }
    fn in_flight(&self) -> u16 {
        (**self).in_flight()
    }
    fn free_descriptors(&self) -> u16 {
        (**self).free_descriptors()
    }
    fn add(&mut self, chain: &[Buffer], indirect: bool, token: u64) -> Result<u16, Error> {
        (**self).add(chain, indirect, token)
    }
    fn fix(&mut self, chain: &[Buffer], indirect: bool, token: u64) -> Result<Fixed, Error> {
        (**self).fix(chain, indirect, token)
    }
    fn resubmit(&mut self, fixed: Fixed) -> Result<(), Error> {
        (**self).resubmit(fixed)
    }
    fn publish(&mut self) -> bool {
        (**self).publish()
    }
    fn pop_used(&mut self) -> Result<Option<Used>, Error> {
        (**self).pop_used()
    }
    fn enable_interrupts_after(&mut self, count: u16) -> bool {
        (**self).enable_interrupts_after(count)
    }
    fn disable_interrupts(&mut self) {
        (**self).disable_interrupts();
    }
    fn restart(&mut self) -> u16 {
        (**self).restart()
    }
}

/// What a ring needs to know of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Descriptors that it takes in the ring or table.
    pub descriptors: u16,
    /// Bytes that the device may write.
    pub writable: u32,
}

/// Checks a chain as a driver has to (§2.7.4.2, §2.7.5.3.1): a judge must not be the first to err.
pub(crate) fn shape(
    chain: &[Buffer],
    indirect: bool,
    limit: u16,
    features: Features,
) -> Result<Shape, Error> {
    if indirect && !features.indirect {
        return Err(Error::NoIndirect);
    }
    let ordered = chain.is_sorted_by_key(|buffer| buffer.device_writable);
    if chain.is_empty() || chain.len() > usize::from(limit) || !ordered {
        return Err(Error::BadChain);
    }
    let sum = |buffers: &mut dyn Iterator<Item = &Buffer>| {
        buffers.map(|buffer| u64::from(buffer.len)).sum::<u64>()
    };
    if sum(&mut chain.iter()) > u64::from(u32::MAX) {
        return Err(Error::BadChain);
    }
    let writable = sum(&mut chain.iter().filter(|buffer| buffer.device_writable)) as u32;
    let descriptors = if indirect { 1 } else { chain.len() as u16 };
    Ok(Shape {
        descriptors,
        writable,
    })
}

/// The three areas of a queue and its indirect tables.
#[derive(Debug)]
pub(crate) struct Areas {
    pub layout: Layout,
    pub descriptors: Span,
    pub driver: Span,
    pub device: Span,
    pub tables: Option<Tables>,
}

/// One indirect table for each chain that can be in flight.
#[derive(Debug)]
pub(crate) struct Tables {
    addr: u64,
    span: Span,
    pub entries: u16,
}

impl Tables {
    pub(crate) fn new(memory: &Arc<Memory>, count: u16, entries: u16) -> Result<Self, MemoryError> {
        let len = u64::from(count) * u64::from(entries) * DESC_LEN as u64;
        let addr = memory.alloc(len, RING_ALIGN)?;
        Ok(Self {
            addr,
            span: memory.span(addr, len)?,
            entries,
        })
    }

    /// Guest address of the table, and its offset in the span.
    #[inline]
    pub(crate) fn table(&self, index: u16) -> (u64, usize) {
        let offset = usize::from(index) * usize::from(self.entries) * DESC_LEN;
        (self.addr + offset as u64, offset)
    }

    pub(crate) fn span(&self) -> &Span {
        &self.span
    }
}

impl Areas {
    /// Allocates what the configuration leaves open. Lengths are in bytes: descriptors, driver area, device area.
    pub(crate) fn new(
        memory: &Arc<Memory>,
        config: &Config,
        lens: [u64; 3],
    ) -> Result<Self, Error> {
        if !(1..=32768).contains(&config.size) {
            return Err(Error::BadGeometry);
        }
        let layout = match config.layout {
            Some(layout) => layout,
            None => Layout {
                descriptors: memory.alloc(lens[0], RING_ALIGN)?,
                driver: memory.alloc(lens[1], RING_ALIGN)?,
                // Rounded up, so that what is allocated next does not share the last line of the device area.
                device: memory.alloc(lens[2].next_multiple_of(RING_ALIGN), RING_ALIGN)?,
            },
        };
        // The alignments of §2.7 and §2.8.10.1; the accesses below rely on them.
        if layout.descriptors % 16 != 0 || layout.driver % 4 != 0 || layout.device % 4 != 0 {
            return Err(Error::BadGeometry);
        }
        let tables = match config.indirect_entries {
            0 => None,
            entries => Some(Tables::new(memory, config.size, entries)?),
        };
        Ok(Self {
            layout,
            descriptors: memory.span(layout.descriptors, lens[0])?,
            driver: memory.span(layout.driver, lens[1])?,
            device: memory.span(layout.device, lens[2])?,
            tables,
        })
    }
}

/// Whether a position that moved from `old` to `new` went past `event` (§2.7.10, on free-running indices).
#[inline]
pub(crate) fn passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
