//! The driver's side of a split ring and of virtio-blk requests, as small as tests need it.
#![allow(dead_code)]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bluff_reference::spec::{Header, Segment};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::IntoBytes;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// A descriptor without its links: address, length, whether the device writes.
pub type Part = (u64, u32, bool);

pub struct Ring {
    pub mem: Arc<GuestMemoryMmap>,
    /// Guest address of the table; the rings lie 0x4000 and 0x6000 after it.
    pub base: u64,
    pub size: u16,
    next: u16,
    avail: u16,
    used: u16,
}

impl Ring {
    pub fn new(mem: Arc<GuestMemoryMmap>, base: u64, size: u16) -> Self {
        Self::at(mem, base, size, 0)
    }

    /// A ring that has been in use: both indices are there already.
    pub fn at(mem: Arc<GuestMemoryMmap>, base: u64, size: u16, index: u16) -> Self {
        assert!(size <= 512);
        mem.write_slice(&[0; 0xa000], GuestAddress(base)).unwrap();
        let this = Self {
            mem,
            base,
            size,
            next: 0,
            avail: index,
            used: index,
        };
        this.put(this.avail_at() + 2, index);
        this.put(this.used_at() + 2, index);
        this
    }

    pub fn avail_at(&self) -> u64 {
        self.base + 0x4000
    }

    pub fn used_at(&self) -> u64 {
        self.base + 0x6000
    }

    /// The device's queue, made ready.
    pub fn queue(&self, max: u16) -> Queue {
        let mut queue = Queue::new(max).unwrap();
        queue.set_size(self.size);
        queue
            .try_set_desc_table_address(GuestAddress(self.base))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(self.avail_at()))
            .unwrap();
        queue
            .try_set_used_ring_address(GuestAddress(self.used_at()))
            .unwrap();
        queue.set_next_avail(self.avail);
        queue.set_next_used(self.used);
        queue.set_ready(true);
        queue
    }

    fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.mem.write_obj(value, GuestAddress(at)).unwrap();
    }

    pub fn descriptor(&self, table: u64, i: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = table + 16 * u64::from(i);
        self.put(at, addr);
        self.put(at + 8, len);
        self.put(at + 12, flags);
        self.put(at + 14, next);
    }

    fn flags(parts: &[Part], i: usize) -> u16 {
        let more = if i + 1 < parts.len() { NEXT } else { 0 };
        more | if parts[i].2 { WRITE } else { 0 }
    }

    /// Puts a chain into the table and the available ring; it is seen with [`Ring::publish`].
    pub fn add(&mut self, parts: &[Part]) -> u16 {
        let head = self.next % self.size;
        for (i, &(addr, len, _)) in parts.iter().enumerate() {
            let here = self.next % self.size;
            let next = (here + 1) % self.size;
            self.descriptor(self.base, here, addr, len, Self::flags(parts, i), next);
            self.next = next;
        }
        self.offer(head);
        head
    }

    /// The same with an indirect table at guest address `table`.
    pub fn add_indirect(&mut self, table: u64, parts: &[Part]) -> u16 {
        for (i, &(addr, len, _)) in parts.iter().enumerate() {
            let flags = Self::flags(parts, i);
            self.descriptor(table, i as u16, addr, len, flags, i as u16 + 1);
        }
        let head = self.next % self.size;
        let len = 16 * parts.len() as u32;
        self.descriptor(self.base, head, table, len, INDIRECT, 0);
        self.next = (head + 1) % self.size;
        self.offer(head);
        head
    }

    pub fn offer(&mut self, head: u16) {
        let at = self.avail_at() + 4 + 2 * u64::from(self.avail % self.size);
        self.put(at, head);
        self.avail = self.avail.wrapping_add(1);
    }

    pub fn publish(&self) {
        let at = GuestAddress(self.avail_at() + 2);
        self.mem.store(self.avail, at, Ordering::Release).unwrap();
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    /// Whether the device wants a kick for what was published since `old`.
    pub fn wants_kick(&self, event_idx: bool, old: u16) -> bool {
        if event_idx {
            let at = GuestAddress(self.used_at() + 4 + 8 * u64::from(self.size));
            let event: u16 = self.mem.load(at, Ordering::Relaxed).unwrap();
            let (new, event) = (self.avail, event);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            let flags: u16 = self
                .mem
                .load(GuestAddress(self.used_at()), Ordering::Relaxed)
                .unwrap();
            flags & 1 == 0
        }
    }

    pub fn avail_index(&self) -> u16 {
        self.avail
    }

    /// Asks for an interrupt at the next used entry but `after`.
    pub fn set_used_event(&self, after: u16) {
        let at = GuestAddress(self.avail_at() + 4 + 2 * u64::from(self.size));
        let event = self.used.wrapping_add(after);
        self.mem.store(event, at, Ordering::SeqCst).unwrap();
    }

    /// Where there is no event index: whether the driver wants no interrupts.
    pub fn set_no_interrupt(&self, on: bool) {
        let at = GuestAddress(self.avail_at());
        self.mem.store(u16::from(on), at, Ordering::SeqCst).unwrap();
    }

    /// Takes the next used entry: head and length.
    pub fn take_used(&mut self) -> Option<(u32, u32)> {
        let index: u16 = self
            .mem
            .load(GuestAddress(self.used_at() + 2), Ordering::Acquire)
            .unwrap();
        if index == self.used {
            return None;
        }
        let at = self.used_at() + 4 + 8 * u64::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        let id = self.mem.read_obj(GuestAddress(at)).unwrap();
        let len = self.mem.read_obj(GuestAddress(at + 4)).unwrap();
        Some((id, len))
    }

    /// Writes a request header to `at`.
    pub fn header(&self, at: u64, kind: u32, sector: u64) {
        let header = Header {
            kind: kind.into(),
            reserved: 0.into(),
            sector: sector.into(),
        };
        let at = GuestAddress(at);
        self.mem.write_slice(header.as_bytes(), at).unwrap();
    }

    /// Writes a discard or write zeroes segment to `at`.
    pub fn segment(&self, at: u64, sector: u64, num_sectors: u32, flags: u32) {
        let segment = Segment {
            sector: sector.into(),
            num_sectors: num_sectors.into(),
            flags: flags.into(),
        };
        let at = GuestAddress(at);
        self.mem.write_slice(segment.as_bytes(), at).unwrap();
    }

    pub fn fill(&self, at: u64, len: usize, byte: u8) {
        let bytes = vec![byte; len];
        self.mem.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    pub fn byte(&self, at: u64) -> u8 {
        self.mem.read_obj(GuestAddress(at)).unwrap()
    }
}
