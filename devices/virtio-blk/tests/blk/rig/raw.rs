//! A ring whose every byte the test writes, beside a neighbour that behaves, on a reactor that the test steps.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bluff_block::Volume;
use bluff_memory::GuestMemory;
use bluff_reactor::{Options, Poll, Reactor};
use bluff_virtio::{
    DeviceEvent, QueueChange, QueueLog, QueueSetup, Stop, StoppedQueue, VirtioDevice, features,
};
use bluff_virtio_blk::{Blk, BlkOptions};
use bluff_virtio_driver as driver;
use driver::{DriverQueue, RegionConfig, Request, Status};

use super::{BASE, FINISH, Kind, bare};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
/// Bytes of each of the guest's two regions.
pub const REGION: u64 = 1 << 20;
/// The guest address where the second region begins: they adjoin for the guest, and only for the guest.
pub const SEAM: u64 = BASE + REGION;
pub const END: u64 = BASE + 2 * REGION;

/// A descriptor of a chain.
#[derive(Clone, Copy, Debug)]
pub struct D {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
}

pub fn d(addr: u64, len: u32, flags: u16) -> D {
    D { addr, len, flags }
}

/// A ring that keeps no rule of its own.
pub struct Raw {
    pub memory: Arc<driver::Memory>,
    pub packed: bool,
    pub size: u16,
    pub desc: u64,
    pub driver: u64,
    pub device: u64,
    /// Split: the available index. Packed: the next slot.
    pub avail: u16,
    pub wrap: bool,
    used: u16,
    used_wrap: bool,
    /// Packed: slots of each buffer ID.
    slots: HashMap<u16, u16>,
    next: u16,
    /// Chains made available.
    pub offered: u64,
}

impl Raw {
    pub fn new(memory: &Arc<driver::Memory>, packed: bool, size: u16) -> Self {
        let n = u64::from(size);
        let (avail, used) = match packed {
            true => (4, 4),
            false => (6 + 2 * n, 6 + 8 * n),
        };
        Self {
            desc: memory.alloc(16 * n, 4096).unwrap(),
            driver: memory.alloc(avail, 4096).unwrap(),
            device: memory.alloc(used, 4096).unwrap(),
            memory: memory.clone(),
            packed,
            size,
            avail: 0,
            wrap: true,
            used: 0,
            used_wrap: true,
            slots: HashMap::new(),
            next: 0,
            offered: 0,
        }
    }

    /// The guest addresses of its three parts.
    fn parts(&self) -> [u64; 3] {
        [self.desc, self.driver, self.device]
    }

    /// Split: the table's descriptor `i`, with any `next`.
    pub fn descriptor(&self, i: u16, d: D, next: u16) {
        let at = self.desc + 16 * u64::from(i);
        self.memory.write(at, &bytes(d, next)).unwrap();
    }

    /// Split: the next entry of the available ring names `head`.
    pub fn offer(&mut self, head: u16) {
        let at = self.driver + 4 + 2 * u64::from(self.avail % self.size);
        self.memory.write_u16(at, head).unwrap();
        self.set_avail(self.avail.wrapping_add(1));
    }

    /// Split: the available index.
    pub fn set_avail(&mut self, to: u16) {
        self.avail = to;
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.memory.write_u16(self.driver + 2, to).unwrap();
    }

    /// Makes a direct chain available as a driver would; gives what it will be known by.
    pub fn chain(&mut self, chain: &[D]) -> u16 {
        self.offered += 1;
        let head = self.next;
        if self.packed {
            self.packed_chain(chain, head, false);
            self.next = self.next.wrapping_add(1);
            return head;
        }
        for (i, d) in chain.iter().enumerate() {
            let index = (head + i as u16) % self.size;
            let next = (index + 1) % self.size;
            let more = if i + 1 < chain.len() { NEXT } else { 0 };
            self.descriptor(
                index,
                D {
                    flags: d.flags | more,
                    ..*d
                },
                next,
            );
        }
        self.next = (head + chain.len() as u16) % self.size;
        self.offer(head);
        head
    }

    /// Packed: a chain with any ID, and without an end if `endless`.
    pub fn packed_chain(&mut self, chain: &[D], id: u16, endless: bool) {
        let mut flags = Vec::new();
        for (i, d) in chain.iter().enumerate() {
            let at = self.desc + 16 * u64::from(self.avail);
            let more = if i + 1 < chain.len() || endless {
                NEXT
            } else {
                0
            };
            let f = d.flags | more | if self.wrap { 1 << 7 } else { 1 << 15 };
            let mut b = bytes(*d, 0);
            b[12..14].copy_from_slice(&id.to_le_bytes());
            self.memory.write(at, &b[..14]).unwrap();
            flags.push((at + 14, f));
            self.avail += 1;
            if self.avail == self.size {
                (self.avail, self.wrap) = (0, !self.wrap);
            }
        }
        self.slots.insert(id, chain.len() as u16);
        for (at, f) in flags.into_iter().rev() {
            self.memory.write_u16(at, f).unwrap();
        }
    }

    /// What was used next: id and length.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        let m = &self.memory;
        if !self.packed {
            if m.read_u16(self.device + 2).unwrap() == self.used {
                return None;
            }
            let at = self.device + 4 + 8 * u64::from(self.used % self.size);
            self.used = self.used.wrapping_add(1);
            let (id, len) = (m.read_u32(at).unwrap(), m.read_u32(at + 4).unwrap());
            return Some((u16::try_from(id).unwrap(), len));
        }
        let at = self.desc + 16 * u64::from(self.used);
        let flags = m.read_u16(at + 14).unwrap();
        let bits = flags & (1 << 7 | 1 << 15);
        if bits != if self.used_wrap { 1 << 7 | 1 << 15 } else { 0 } {
            return None;
        }
        let (id, len) = (m.read_u16(at + 12).unwrap(), m.read_u32(at + 8).unwrap());
        self.used += self.slots[&id];
        if self.used >= self.size {
            (self.used, self.used_wrap) = (self.used - self.size, !self.used_wrap);
        }
        Some((id, len))
    }

    /// What the device may write of the ring.
    pub fn writable(&self) -> [(u64, u64); 2] {
        let n = u64::from(self.size);
        match self.packed {
            true => [(self.desc, 16 * n), (self.device, 4)],
            false => [(self.device, 6 + 8 * n), (self.device, 0)],
        }
    }
}

/// A descriptor as it stands in a table.
pub fn bytes(d: D, next: u16) -> [u8; 16] {
    let mut b = [0; 16];
    b[..8].copy_from_slice(&d.addr.to_le_bytes());
    b[8..12].copy_from_slice(&d.len.to_le_bytes());
    b[12..14].copy_from_slice(&d.flags.to_le_bytes());
    b[14..].copy_from_slice(&next.to_le_bytes());
    b
}

/// A device with two queues: the attacker's, and a neighbour's with a guest of its own.
pub struct Attack {
    pub reactor: Reactor,
    pub device: Blk,
    pub events: Arc<Mutex<Vec<DeviceEvent>>>,
    pub memory: Arc<driver::Memory>,
    pub epoch: Arc<GuestMemory>,
    pub raw: Raw,
    features: u64,
    neighbour: driver::Blk<Box<dyn DriverQueue>>,
    round: u64,
}

/// Turns within which anything is over.
pub const TURNS: usize = 16;

impl Attack {
    pub fn new(packed: bool, size: u16) -> Self {
        Self::on(packed, size, super::ram("size=16MiB"))
    }

    pub fn on(packed: bool, size: u16, volume: Arc<dyn Volume>) -> Self {
        Self::polled(packed, size, volume, Poll::Always)
    }

    pub fn polled(packed: bool, size: u16, volume: Arc<dyn Volume>, poll: Poll) -> Self {
        let reactor = Reactor::new(&Options::default()).unwrap();
        let options = BlkOptions {
            queues: 2,
            serial: "attack".into(),
            config_wce: true,
            poll,
            reactors: vec![reactor.handle()],
        };
        let mut device = Blk::new(volume, options);
        let events: Arc<Mutex<Vec<DeviceEvent>>> = Arc::default();
        let sink = events.clone();
        device.on_event(Arc::new(move |e| sink.lock().unwrap().push(e)));
        let region = |guest_addr, file_offset| RegionConfig {
            guest_addr,
            size: REGION,
            file_offset,
        };
        let memory = driver::Memory::new(&[region(BASE, 0), region(SEAM, 8192)]).unwrap();
        // The ring and everything that a test does not place by itself.
        let raw = Raw::new(&memory, packed, size);
        let other = driver::Memory::flat(BASE, 1 << 20).unwrap();
        let kind = if packed { Kind::PACKED } else { Kind::SPLIT };
        let queue = kind.driver(&other, 16);
        let layout = queue.layout();
        let features = device.features() & !features::RING | kind.features();
        device.set_features(features);
        let epoch = super::epoch(&memory);
        let first = bare(0, size, features, raw.parts(), &epoch);
        device.start_queue(first).unwrap();
        let at = [layout.descriptors, layout.driver, layout.device];
        let second = bare(1, 16, features, at, &super::epoch(&other));
        device.start_queue(second).unwrap();
        let config = driver::BlkConfig {
            depth: 4,
            capacity: 1 << 14,
            ..driver::BlkConfig::default()
        };
        let neighbour = driver::Blk::new(&other, queue, config).unwrap();
        let mut this = Self {
            reactor,
            device,
            events,
            memory,
            epoch,
            raw,
            features,
            neighbour,
            round: 0,
        };
        this.turns(TURNS);
        this
    }

    pub fn turns(&mut self, n: usize) {
        for _ in 0..n {
            self.reactor.step(Some(Duration::ZERO));
        }
    }

    /// What queue 0 would be started with: its ring, from the beginning.
    pub fn setup(&self) -> QueueSetup {
        let (size, at) = (self.raw.size, self.raw.parts());
        bare(0, size, self.features, at, &self.epoch)
    }

    /// As [`Attack::on`], with queue 0 started as `change` wants it.
    pub fn with(
        packed: bool,
        size: u16,
        volume: Arc<dyn Volume>,
        change: impl FnOnce(&mut QueueSetup),
    ) -> Self {
        let mut this = Self::on(packed, size, volume);
        this.stop(super::RESET);
        let mut setup = this.setup();
        change(&mut setup);
        this.start(setup);
        this
    }

    pub fn start(&mut self, setup: QueueSetup) {
        self.device.start_queue(setup).unwrap();
        self.turns(TURNS);
    }

    pub fn set_log(&mut self, log: Option<QueueLog>) {
        let (tx, rx) = channel();
        let done = Box::new(move || tx.send(()).unwrap());
        self.device.change_queue(0, QueueChange::Log { log, done });
        super::wait(|| {
            self.turns(1);
            rx.try_recv().ok()
        });
    }

    /// Writes an indirect table of `chain`, linked one after the other; gives its descriptor.
    pub fn table(&self, at: u64, chain: &[D]) -> D {
        for (i, x) in chain.iter().enumerate() {
            let more = if i + 1 < chain.len() { NEXT } else { 0 };
            let x = D {
                flags: x.flags | more,
                ..*x
            };
            let mut entry = bytes(x, i as u16 + 1);
            if self.raw.packed {
                // ID and flags instead of flags and next (§2.8.13).
                entry[12..].copy_from_slice(&[0, 0, x.flags as u8, 0]);
            }
            self.memory.write(at + 16 * i as u64, &entry).unwrap();
        }
        d(at, 16 * chain.len() as u32, INDIRECT)
    }

    /// The next chain that is given back within the bound.
    pub fn back(&mut self) -> Option<(u16, u32)> {
        for _ in 0..TURNS {
            if let Some(used) = self.raw.used() {
                return Some(used);
            }
            self.turns(1);
        }
        None
    }

    pub fn broken(&self) -> bool {
        self.queue_broken(0)
    }

    fn queue_broken(&self, index: u16) -> bool {
        let broken = |e: &DeviceEvent| matches!(e, DeviceEvent::QueueBroken { queue, .. } if *queue == index);
        self.events.lock().unwrap().iter().any(broken)
    }

    /// The neighbour is served as if nothing were.
    pub fn neighbour_lives(&mut self) {
        for _ in 0..4 {
            let sector = self.round % 1000 * 8;
            self.round += 1;
            for request in [Request::Out { sector }, Request::In { sector }] {
                self.neighbour.submit(request).unwrap();
                self.neighbour.publish();
                let mut turns = 0;
                let done = loop {
                    if let Some(done) = self.neighbour.poll().unwrap() {
                        break done;
                    }
                    assert!(turns < TURNS, "the neighbour starves");
                    turns += 1;
                    self.turns(1);
                };
                assert_eq!(done.status, Status::Ok);
            }
        }
        assert!(!self.queue_broken(1));
    }

    /// A request that is as it should be: header, data, status. Gives the chain, and where its status will be.
    pub fn request(&self, kind: u32, sector: u64, len: u32) -> ([D; 3], u64) {
        let at = self
            .memory
            .alloc_in(0, 32 + u64::from(len), 64)
            .expect("room for a request");
        self.header(at, kind, sector);
        self.memory.write_u8(at + 16, 0xff).unwrap();
        let data = if kind == 1 { 0 } else { WRITE };
        let chain = [d(at, 16, 0), d(at + 32, len, data), d(at + 16, 1, WRITE)];
        (chain, at + 16)
    }

    pub fn header(&self, at: u64, kind: u32, sector: u64) {
        self.memory.write_u32(at, kind).unwrap();
        self.memory.write_u32(at + 4, 0).unwrap();
        self.memory.write_u64(at + 8, sector).unwrap();
    }

    pub fn status(&self, at: u64) -> u8 {
        self.memory.read_u8(at).unwrap()
    }

    /// The attacker's own queue serves a good request.
    pub fn queue_lives(&mut self) {
        let (chain, status) = self.request(0, 0, 512);
        let id = self.raw.chain(&chain);
        assert_eq!(self.back(), Some((id, 513)), "the queue goes on");
        assert_eq!(self.status(status), 0);
        assert!(!self.broken());
    }

    /// All of the guest's memory.
    pub fn snapshot(&self) -> Vec<u8> {
        let mut all = vec![0; (END - BASE) as usize];
        self.memory.read(BASE, &mut all).unwrap();
        all
    }

    /// Nothing but the ring's own parts and `offered` has changed since the snapshot.
    pub fn unchanged(&self, before: &[u8], offered: &[(u64, u64)]) {
        let after = self.snapshot();
        let ring = self.raw.writable();
        let mut allowed = vec![false; after.len()];
        for (addr, len) in ring.iter().chain(offered) {
            allowed[(addr - BASE) as usize..][..*len as usize].fill(true);
        }
        for (i, ok) in allowed.iter().enumerate() {
            assert!(
                *ok || before[i] == after[i],
                "{:#x} changed, and was not offered",
                BASE + i as u64
            );
        }
    }

    /// Stops queue 0 and waits for it.
    pub fn stop(&mut self, stop: Stop) -> Option<StoppedQueue> {
        let rx = self.begin_stop(stop);
        super::wait(|| {
            self.turns(1);
            rx.try_recv().ok()
        })
    }

    pub fn begin_stop(&mut self, stop: Stop) -> Receiver<Option<StoppedQueue>> {
        let (tx, rx) = channel();
        let done = Box::new(move |s| tx.send(s).unwrap());
        self.device.stop_queue(0, stop, done);
        rx
    }

    /// A chain that is given back with nothing done; everybody lives.
    pub fn refused(&mut self, id: u16, before: &[u8]) {
        assert_eq!(self.back(), Some((id, 0)), "given back as it was");
        self.unchanged(before, &[]);
        self.neighbour_lives();
        self.queue_lives();
    }

    /// A chain that is answered with an error and nothing else; everybody lives.
    pub fn failed(&mut self, id: u16, status: u64, before: &[u8]) {
        assert_eq!(self.back(), Some((id, 1)), "the status alone was written");
        assert_eq!(self.status(status), 1, "VIRTIO_BLK_S_IOERR");
        self.unchanged(before, &[(status, 1)]);
        self.neighbour_lives();
        self.queue_lives();
    }

    /// The queue is broken: nothing comes back, and it ends in order.
    pub fn ends_broken(mut self, before: &[u8]) {
        assert_eq!(self.back(), None);
        assert!(self.broken(), "the queue is in its error state");
        self.unchanged(before, &[]);
        self.neighbour_lives();
        assert!(self.stop(FINISH).is_some());
        self.neighbour_lives();
    }
}

/// Both kinds of ring.
pub const KINDS: [bool; 2] = [false, true];
