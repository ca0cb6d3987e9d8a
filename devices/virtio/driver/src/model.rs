//! Guest memory under loom: the face of `memory`, on loom's atomics and race-checked cells.
//!
//! Each two bytes have an atomic and a cell. `load_*` and `store_*` go to the atomics; `read_*` and `write_*` go to the
//! cells, where loom reports any two accesses that no handshake orders. A location is only ever used in one of the two
//! ways, by the driver and by the device.

use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU16, Ordering};

/// Where the one region of modelled memory lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionConfig {
    /// Guest-physical address of its first byte.
    pub guest_addr: u64,
    /// Bytes.
    pub size: u64,
    /// Not used by the model.
    pub file_offset: u64,
}

/// Why memory could not be made or reached.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The region does not hold the whole range.
    #[error("no guest memory at {addr:#x}, {len:#x} bytes")]
    OutOfBounds {
        /// Guest-physical address.
        addr: u64,
        /// Bytes asked for.
        len: u64,
    },
    /// The allocator has no room left.
    #[error("no room for {0:#x} bytes of guest memory")]
    Exhausted(u64),
}

#[derive(Debug)]
struct Granule {
    control: AtomicU16,
    data: UnsafeCell<u16>,
}

/// Modelled guest memory: one region.
#[derive(Debug)]
pub struct Memory {
    base: u64,
    granules: Box<[Granule]>,
    allocated: std::sync::Mutex<u64>,
}

// SAFETY: loom runs its threads one at a time and reports accesses to cells that nothing orders.
#[allow(unsafe_code)]
unsafe impl Sync for Memory {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Send for Memory {}

impl Memory {
    /// One region of `size` bytes at guest address `guest_addr`.
    pub fn flat(guest_addr: u64, size: u64) -> Result<Arc<Self>, MemoryError> {
        let granule = |_| Granule {
            control: AtomicU16::new(0),
            data: UnsafeCell::new(0),
        };
        Ok(Arc::new(Self {
            base: guest_addr,
            granules: (0..size / 2).map(granule).collect(),
            allocated: Default::default(),
        }))
    }

    /// Gives out `len` bytes, aligned to 16 at most: modelled memory is small, and has no cache lines.
    pub fn alloc(&self, len: u64, align: u64) -> Result<u64, MemoryError> {
        let mut allocated = self.allocated.lock().expect("no panic while allocating");
        let start = allocated.next_multiple_of(align.min(16));
        if start + len > self.granules.len() as u64 * 2 {
            return Err(MemoryError::Exhausted(len));
        }
        *allocated = start + len;
        Ok(self.base + start)
    }

    /// A window on `len` bytes.
    pub fn span(self: &Arc<Self>, addr: u64, len: u64) -> Result<Span, MemoryError> {
        let first = addr
            .checked_sub(self.base)
            .filter(|first| first + len <= self.granules.len() as u64 * 2);
        let first = first.ok_or(MemoryError::OutOfBounds { addr, len })? as usize;
        Ok(Span {
            first,
            len: len as usize,
            memory: self.clone(),
        })
    }
}

/// A window on modelled memory.
#[derive(Debug, Clone)]
pub struct Span {
    first: usize,
    len: usize,
    memory: Arc<Memory>,
}

#[allow(missing_docs, unsafe_code)]
impl Span {
    pub fn load_u16(&self, offset: usize, order: Ordering) -> u16 {
        self.granule(offset).control.load(order)
    }

    pub fn store_u16(&self, offset: usize, value: u16, order: Ordering) {
        self.granule(offset).control.store(value, order);
    }

    pub fn read_u8(&self, offset: usize) -> u8 {
        self.read_u16(offset & !1).to_le_bytes()[offset & 1]
    }

    pub fn write_u8(&self, offset: usize, value: u8) {
        // SAFETY: loom checks that nothing accesses the cell at the same time.
        self.granule(offset & !1).data.with_mut(|cell| unsafe {
            let mut bytes = (*cell).to_le_bytes();
            bytes[offset & 1] = value;
            *cell = u16::from_le_bytes(bytes);
        });
    }

    pub fn read_u16(&self, offset: usize) -> u16 {
        // SAFETY: as above.
        self.granule(offset).data.with(|cell| unsafe { *cell })
    }

    pub fn write_u16(&self, offset: usize, value: u16) {
        // SAFETY: as above.
        self.granule(offset)
            .data
            .with_mut(|cell| unsafe { *cell = value });
    }

    pub fn read_u32(&self, offset: usize) -> u32 {
        u32::from(self.read_u16(offset)) | u32::from(self.read_u16(offset + 2)) << 16
    }

    pub fn write_u32(&self, offset: usize, value: u32) {
        self.write_u16(offset, value as u16);
        self.write_u16(offset + 2, (value >> 16) as u16);
    }

    pub fn read_u64(&self, offset: usize) -> u64 {
        u64::from(self.read_u32(offset)) | u64::from(self.read_u32(offset + 4)) << 32
    }

    pub fn write_u64(&self, offset: usize, value: u64) {
        self.write_u32(offset, value as u32);
        self.write_u32(offset + 4, (value >> 32) as u32);
    }

    pub fn read_u64_pair(&self, offset: usize) -> (u64, u64) {
        (self.read_u64(offset), self.read_u64(offset + 8))
    }

    pub fn write_u64_pair(&self, offset: usize, first: u64, second: u64) {
        self.write_u64(offset, first);
        self.write_u64(offset + 8, second);
    }

    pub fn read_u32_pair(&self, offset: usize) -> (u32, u32) {
        (self.read_u32(offset), self.read_u32(offset + 4))
    }

    pub fn write_u32_pair(&self, offset: usize, first: u32, second: u32) {
        self.write_u32(offset, first);
        self.write_u32(offset + 4, second);
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Zeroes the cells. The atomics are zero from the start, and each needless store would multiply loom's work.
    pub fn zero(&self) {
        for offset in (0..self.len).step_by(2) {
            self.write_u16(offset, 0);
        }
    }

    fn granule(&self, offset: usize) -> &Granule {
        assert!(
            offset < self.len && offset % 2 == 0,
            "offset is inside the span and aligned"
        );
        &self.memory.granules[(self.first + offset) / 2]
    }
}

pub(crate) fn fence(order: Ordering) {
    loom::sync::atomic::fence(order);
}
