//! The ideal ring: the least that a virtio-blk device on a split ring can do.
//!
//! Reads the available entries, walks each chain, reads the 16-byte header, writes the status byte, publishes once per
//! batch. It moves no data and checks nothing: a malformed ring makes it panic (never touch other memory). A benchmark
//! that puts it behind the same driver learns what the ring and the caches alone cost; a device is measured against that.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::memory::{Memory, MemoryError, Span, fence};
use crate::queue::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DESC_LEN, Layout, passed};

const RING_FLAGS: usize = 0;
const RING_IDX: usize = 2;
const RING_ENTRIES: usize = 4;
const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// Where the ideal device finds its queue.
#[derive(Debug, Clone, Copy)]
pub struct IdealConfig {
    /// Guest address and length of the one piece of memory that holds the rings, tables and requests.
    pub guest: (u64, u64),
    /// The areas.
    pub layout: Layout,
    /// Descriptors; a power of two.
    pub size: u16,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// Index at which both sides start.
    pub start: u16,
}

/// The ideal device.
#[derive(Debug)]
pub struct IdealDevice {
    descriptors: Span,
    driver: Span,
    device: Span,
    guest: Span,
    base: u64,
    mask: u16,
    event_idx: bool,
    next: u16,
    /// Used index at the last look at the driver's wish.
    told: u16,
    /// Sum of the sectors of all requests: keeps the header from being read in vain.
    sectors: u64,
}

impl IdealDevice {
    /// A device on a queue that a driver has laid out.
    pub fn new(memory: &Arc<Memory>, config: &IdealConfig) -> Result<Self, MemoryError> {
        assert!(
            config.size.is_power_of_two(),
            "the ideal device masks indices"
        );
        let size = u64::from(config.size);
        Ok(Self {
            descriptors: memory.span(config.layout.descriptors, size * DESC_LEN as u64)?,
            driver: memory.span(config.layout.driver, size * 2 + 6)?,
            device: memory.span(config.layout.device, size * 8 + 6)?,
            guest: memory.span(config.guest.0, config.guest.1)?,
            base: config.guest.0,
            mask: config.size - 1,
            event_idx: config.event_idx,
            next: config.start,
            told: config.start,
            sectors: 0,
        })
    }

    /// Serves everything that is available and publishes it at once. Returns the number of requests.
    #[inline]
    pub fn poll(&mut self) -> u16 {
        // Acquire: the entries, descriptors and headers that the driver released with the index are visible.
        let available = self.driver.load_u16(RING_IDX, Ordering::Acquire);
        let count = available.wrapping_sub(self.next);
        if count == 0 {
            return 0;
        }
        while self.next != available {
            let place = usize::from(self.next & self.mask);
            let head = self.driver.read_u16(RING_ENTRIES + place * 2);
            let written = self.serve(head);
            self.device
                .write_u32_pair(RING_ENTRIES + place * 8, u32::from(head), written);
            self.next = self.next.wrapping_add(1);
        }
        // Release: statuses and used entries happen before a load that sees the index, and our last look at each
        // descriptor before the driver's reuse of it.
        self.device
            .store_u16(RING_IDX, self.next, Ordering::Release);
        count
    }

    /// Whether the driver wants an interrupt for what was published since the last time. Costs a full fence, so the loop
    /// of a benchmark whose driver polls leaves it out.
    pub fn wants_interrupt(&mut self) -> bool {
        let old = std::mem::replace(&mut self.told, self.next);
        // The index is stored, then the wish looked at; the driver does it the other way round, with a fence too.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.driver.load_u16(
                RING_ENTRIES + (usize::from(self.mask) + 1) * 2,
                Ordering::Relaxed,
            );
            passed(event, self.next, old)
        } else {
            old != self.next
                && self.driver.load_u16(RING_FLAGS, Ordering::Relaxed) & AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Asks for a notification at the next available chain. Returns true if there is one already.
    pub fn arm(&mut self) -> bool {
        if self.event_idx {
            let offset = RING_ENTRIES + (usize::from(self.mask) + 1) * 8;
            self.device.store_u16(offset, self.next, Ordering::Relaxed);
        } else {
            self.device.store_u16(RING_FLAGS, 0, Ordering::Relaxed);
        }
        // The wish is stored, then the index looked at: the mirror of the driver's publication.
        fence(Ordering::SeqCst);
        self.driver.load_u16(RING_IDX, Ordering::Relaxed) != self.next
    }

    /// Asks for no notification.
    pub fn disarm(&mut self) {
        if self.event_idx {
            let offset = RING_ENTRIES + (usize::from(self.mask) + 1) * 8;
            self.device
                .store_u16(offset, self.next.wrapping_sub(1), Ordering::Relaxed);
        } else {
            self.device
                .store_u16(RING_FLAGS, USED_F_NO_NOTIFY, Ordering::Relaxed);
        }
    }

    /// Sum of the sectors of all requests served.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Serves one chain. Returns the bytes that a real device would have written.
    #[inline(always)]
    fn serve(&mut self, head: u16) -> u32 {
        let (mut addr, mut len, mut flags, mut next) = descriptor(&self.descriptors, 0, head);
        if flags & DESC_F_INDIRECT != 0 {
            return self.serve_indirect(self.offset(addr));
        }
        self.read_header(addr);
        let mut written = 0;
        let mut left = self.mask;
        while flags & DESC_F_NEXT != 0 {
            assert!(left != 0, "a chain is no longer than the queue");
            left -= 1;
            (addr, len, flags, next) = descriptor(&self.descriptors, 0, next);
            written += if flags & DESC_F_WRITE != 0 { len } else { 0 };
        }
        self.write_status(addr, len);
        written
    }

    fn serve_indirect(&mut self, table: usize) -> u32 {
        let (mut addr, mut len, mut flags, mut next) = descriptor(&self.guest, table, 0);
        self.read_header(addr);
        let mut written = 0;
        let mut left = u16::MAX;
        while flags & DESC_F_NEXT != 0 {
            assert!(left != 0, "an indirect chain ends");
            left -= 1;
            (addr, len, flags, next) = descriptor(&self.guest, table, next);
            written += if flags & DESC_F_WRITE != 0 { len } else { 0 };
        }
        self.write_status(addr, len);
        written
    }

    #[inline(always)]
    fn read_header(&mut self, addr: u64) {
        let header = self.offset(addr);
        let (kind, sector) = self.guest.read_u64_pair(header);
        self.sectors = self.sectors.wrapping_add(sector).wrapping_add(kind >> 32);
    }

    #[inline(always)]
    fn write_status(&mut self, addr: u64, len: u32) {
        let status = self.offset(addr) + len as usize - 1;
        self.guest.write_u8(status, 0);
    }

    #[inline(always)]
    fn offset(&self, addr: u64) -> usize {
        addr.wrapping_sub(self.base) as usize
    }
}

/// Address, length, flags and next of a descriptor.
#[inline(always)]
fn descriptor(span: &Span, table: usize, index: u16) -> (u64, u32, u16, u16) {
    let at = table + usize::from(index) * DESC_LEN;
    let (addr, rest) = span.read_u64_pair(at);
    (addr, rest as u32, (rest >> 32) as u16, (rest >> 48) as u16)
}
