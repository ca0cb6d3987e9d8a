//! A small packed device, written from virtio 1.3 §2.8 alone: raw accesses to guest memory, no care for speed.

use std::collections::VecDeque;
use std::sync::Arc;

use bluff_virtio_driver::{Buffer, Layout, Memory, Position};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A chain as the device found it.
#[derive(Debug, Clone)]
pub struct Chain {
    pub id: u16,
    pub buffers: Vec<Buffer>,
    /// Descriptors that it takes in the ring.
    pub descriptors: u16,
}

/// The device's side: where it looks next, and where it writes next.
pub struct PackedDevice {
    memory: Arc<Memory>,
    layout: Layout,
    size: u16,
    avail: (u16, bool),
    used: (u16, bool),
    /// Fetched and not used.
    pub held: VecDeque<Chain>,
}

impl PackedDevice {
    pub fn new(memory: &Arc<Memory>, layout: Layout, size: u16, start: Position) -> Self {
        let at = (start.index, start.wrap);
        Self {
            memory: memory.clone(),
            layout,
            size,
            avail: at,
            used: at,
            held: VecDeque::new(),
        }
    }

    fn step(&self, (index, wrap): (u16, bool)) -> (u16, bool) {
        if index + 1 == self.size {
            (0, !wrap)
        } else {
            (index + 1, wrap)
        }
    }

    fn descriptor(&self, table: u64, index: u16) -> (u64, u32, u16, u16) {
        let at = table + u64::from(index) * 16;
        let word = |offset| self.memory.read_u16(at + offset).expect("in memory");
        (
            self.memory.read_u64(at).expect("in memory"),
            self.memory.read_u32(at + 8).expect("in memory"),
            word(12),
            word(14),
        )
    }

    /// Fetches the next available chain into `held`.
    pub fn fetch(&mut self) -> bool {
        let (_, _, _, flags) = self.descriptor(self.layout.descriptors, self.avail.0);
        let (avail, used) = (flags & 0x80 != 0, flags & 0x8000 != 0);
        if avail != self.avail.1 || used == self.avail.1 {
            return false;
        }
        let mut chain = Chain {
            id: 0,
            buffers: Vec::new(),
            descriptors: 0,
        };
        loop {
            let (addr, len, id, flags) = self.descriptor(self.layout.descriptors, self.avail.0);
            assert_eq!(
                flags & 0x80 != 0,
                self.avail.1,
                "every descriptor of a chain is marked in its own lap"
            );
            assert_eq!(flags & 0x8000 != 0, !self.avail.1);
            self.avail = self.step(self.avail);
            chain.descriptors += 1;
            chain.id = id;
            if flags & INDIRECT != 0 {
                assert_eq!(
                    (flags & (NEXT | WRITE), len % 16, chain.descriptors),
                    (0, 0, 1)
                );
                for i in 0..(len / 16) as u16 {
                    let (addr, len, _, flags) = self.descriptor(addr, i);
                    assert_eq!(flags & !WRITE, 0, "all else is reserved in a table");
                    chain.buffers.push(Buffer {
                        addr,
                        len,
                        device_writable: flags & WRITE != 0,
                    });
                }
                break;
            }
            chain.buffers.push(Buffer {
                addr,
                len,
                device_writable: flags & WRITE != 0,
            });
            if flags & NEXT == 0 {
                break;
            }
        }
        self.held.push_back(chain);
        true
    }

    /// Fetches all that is available.
    pub fn fetch_all(&mut self) -> usize {
        std::iter::from_fn(|| self.fetch().then_some(())).count()
    }

    /// Writes a used descriptor for a held chain. Returns whether the driver wants an interrupt.
    pub fn use_chain(&mut self, which: usize, written: u32) -> bool {
        let chain = self.held.remove(which).expect("held");
        self.write_used(chain.id, written, chain.descriptors)
    }

    /// IN_ORDER: uses the first `count` held chains with one descriptor, which names the last of them.
    pub fn use_batch(&mut self, count: usize, written: u32) -> bool {
        let batch: Vec<_> = self.held.drain(..count).collect();
        let descriptors = batch.iter().map(|chain| chain.descriptors).sum();
        self.write_used(batch[count - 1].id, written, descriptors)
    }

    fn write_used(&mut self, id: u16, written: u32, descriptors: u16) -> bool {
        let at = self.layout.descriptors + u64::from(self.used.0) * 16;
        self.memory.write_u32(at + 8, written).expect("in memory");
        self.memory.write_u16(at + 12, id).expect("in memory");
        let wrap = if self.used.1 { 0x8080 } else { 0 };
        let write = if written != 0 { WRITE } else { 0 };
        self.memory
            .write_u16(at + 14, wrap | write)
            .expect("in memory");
        let flags = self
            .memory
            .read_u16(self.layout.driver + 2)
            .expect("in memory");
        let off_wrap = self.memory.read_u16(self.layout.driver).expect("in memory");
        let event = (off_wrap & 0x7fff, off_wrap & 0x8000 != 0);
        let mut passed = false;
        for _ in 0..descriptors {
            passed |= self.used == event;
            self.used = self.step(self.used);
        }
        match flags {
            0 => true,
            1 => false,
            2 => passed,
            other => panic!("event flags {other}"),
        }
    }

    /// Asks for a notification when the descriptor `ahead` of the next one becomes available.
    pub fn listen_at(&self, ahead: u16) {
        let at = (0..ahead).fold(self.avail, |at, _| self.step(at));
        self.set_event(2, at.0 | u16::from(at.1) << 15);
    }

    /// Writes the device's event suppression structure.
    pub fn set_event(&self, flags: u16, off_wrap: u16) {
        self.memory
            .write_u16(self.layout.device, off_wrap)
            .expect("in memory");
        self.memory
            .write_u16(self.layout.device + 2, flags)
            .expect("in memory");
    }
}
