//! A hostile driver in bytes, for cargo-fuzz and for a smoke test that runs everywhere.
//!
//! ```text
//!   bytes --> ring kind, features, size --> [ chain | poke | offer | turns | stop and start | memory
//!                                             | volume holds | record | log | death ] ...
//! ```
//! The same bytes do the same each time: the reactor is stepped, and the volume is in memory.
//!
//! Unsafe, because the record of what is in flight is written as its owner would, behind the device's back.
#![allow(unsafe_code)]

mod slow;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bluff_block::Uri;
use bluff_memory::{DirtyLog, GuestMemory, Mapping, Region, RegionSpec, Space};
use bluff_reactor::{Options, Poll, Reactor, UringUse};
use bluff_virtio::inflight::{InflightQueue, queue_len};
use bluff_virtio::{
    Position, QueueChange, QueueLog, QueueSetup, RingAddresses, Stop, VirtioDevice, features,
};

use crate::{Blk, BlkOptions};

/// Guest address of the first of two regions that adjoin for the guest only.
const BASE: u64 = 0x1_0000;
/// Bytes of a region.
const REGION: u64 = 0x1_0000;
/// Parts of the ring.
const DESC: u64 = BASE;
const DRIVER: u64 = BASE + 0x4000;
const DEVICE: u64 = BASE + 0x6000;
/// Turns within which a queue has stopped whose volume cancels at once. A reactor that is busy looks
/// at its clock once in a while only.
const TURNS: usize = 1024;

/// What is left of the input; zeroes follow it.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn u8(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    /// An address: mostly in memory, now and then beyond it.
    fn addr(&mut self) -> u64 {
        match self.u16() {
            0xffff => u64::MAX - u64::from(self.u16()),
            n => BASE + u64::from(n) * 2 + u64::from(n & 1),
        }
    }

    fn len(&mut self) -> u32 {
        match self.u8() {
            0xff => u32::MAX - u32::from(self.u8()),
            n if n >= 0x80 => u32::from(n - 0x80) * 512,
            n => u32::from(n),
        }
    }
}

/// A device, its ring's geometry, and where its driver stands.
struct World {
    reactor: Reactor,
    device: Blk,
    memory: Arc<GuestMemory>,
    features: u64,
    size: u16,
    packed: bool,
    /// Operations lie with the volume.
    hold: Arc<AtomicBool>,
    /// Where requests in flight are recorded, if they are.
    record: Option<InflightQueue>,
    log: Option<QueueLog>,
    /// Requests that devices before this one did, and that failed.
    before: (u64, u64),
    /// The driver's next place, its wrap counter, and the next free descriptor.
    avail: u16,
    wrap: bool,
    next: u16,
}

/// What gives shared memory of its own to each that maps it.
fn zeroes() -> OwnedFd {
    let file = File::options().read(true).write(true).open("/dev/zero");
    OwnedFd::from(file.expect("/dev/zero can be opened"))
}

fn record(size: u16) -> InflightQueue {
    let len = queue_len(size);
    InflightQueue {
        region: Arc::new(Mapping::new(zeroes(), 0, len).expect("anonymous memory")),
        offset: 0,
        len,
    }
}

fn log() -> QueueLog {
    let size = (BASE + 2 * REGION) / bluff_memory::LOG_PAGE / 8;
    QueueLog {
        log: Arc::new(DirtyLog::new(zeroes(), 0, size).expect("anonymous memory")),
        used: Some(DEVICE),
    }
}

fn memory(old: &GuestMemory, regions: u64) -> Arc<GuestMemory> {
    let region = |i: u64| {
        let start = BASE + i * REGION;
        let kept = old.regions().find(|r| r.guest() == start);
        kept.cloned().unwrap_or_else(|| {
            let spec = RegionSpec {
                guest: start,
                len: REGION,
                user: start,
                offset: 0,
                file: zeroes(),
            };
            Region::new(spec, &GuestMemory::empty()).expect("anonymous memory")
        })
    };
    GuestMemory::new((0..regions).map(region).collect()).expect("they adjoin")
}

/// A device on a reactor of its own.
fn device(hold: &Arc<AtomicBool>) -> (Reactor, Blk) {
    let options = Options {
        uring: UringUse::Off,
        ..Options::default()
    };
    let reactor = Reactor::new(&options).expect("a reactor");
    let uri = Uri::parse("ram:?size=256KiB").expect("a good URI");
    let volume = slow::Slow {
        inner: bluff_block::ram::open(uri).expect("a small volume"),
        hold: hold.clone(),
    };
    let options = BlkOptions {
        queues: 1,
        serial: "fuzz".into(),
        config_wce: true,
        poll: Poll::Always,
        reactors: vec![reactor.handle()],
    };
    let device = Blk::new(Arc::new(volume), options);
    (reactor, device)
}

impl World {
    fn new(input: &mut Input<'_>) -> Self {
        let kind = input.u8();
        let when = |bit: u8, feature: u64| if kind >> bit & 1 != 0 { feature } else { 0 };
        let packed = kind & 1 != 0;
        let size = match packed {
            true => 1 + u16::from(input.u8()),
            false => 1 << (input.u8() % 9),
        };
        let hold = Arc::default();
        let (reactor, mut device) = device(&hold);
        let ring = features::VERSION_1
            | when(0, features::RING_PACKED)
            | when(1, features::EVENT_IDX)
            | when(2, features::INDIRECT_DESC)
            | when(3, features::IN_ORDER);
        let features = device.features() & !features::RING | ring;
        device.set_features(features);
        let memory = memory(&GuestMemory::empty(), 2);
        Self {
            reactor,
            device,
            memory,
            features,
            size,
            packed,
            hold,
            record: (kind >> 4 & 1 != 0).then(|| record(size)),
            log: (kind >> 5 & 1 != 0).then(log),
            before: (0, 0),
            avail: 0,
            wrap: true,
            next: 0,
        }
    }

    fn start(&mut self, position: Position) {
        let setup = QueueSetup {
            index: 0,
            size: self.size,
            features: self.features,
            addresses: RingAddresses {
                space: Space::Guest,
                desc: DESC,
                driver: DRIVER,
                device: DEVICE,
            },
            position,
            memory: self.memory.clone(),
            kick: None,
            call: None,
            error: None,
            inflight: self.record.clone(),
            log: self.log.clone(),
            enabled: true,
        };
        self.device.start_queue(setup).expect("it does not run");
    }

    fn turns(&mut self, n: usize) {
        for _ in 0..n {
            self.reactor.step(Some(Duration::ZERO));
        }
    }

    /// Stops the queue, which must end; says where.
    fn stop(&mut self, answer: bool, leave: bool) -> Option<Position> {
        let stopped = Arc::new(Mutex::new(None));
        let to = stopped.clone();
        let stop = Stop {
            bound: Duration::ZERO,
            leave: leave && self.record.is_some(),
            answer,
        };
        let done = Box::new(move |s| *to.lock().expect("one thread") = Some(s));
        self.device.stop_queue(0, stop, done);
        for _ in 0..TURNS {
            self.turns(1);
            if let Some(stopped) = stopped.lock().expect("one thread").take() {
                return stopped.map(|s| s.position);
            }
        }
        panic!("the queue does not stop");
    }

    fn change_memory(&mut self, regions: u64) {
        let old = self.memory.clone();
        self.memory = memory(&old, regions);
        let (tx, rx) = channel();
        let change = QueueChange::Memory {
            memory: self.memory.clone(),
            bound: Duration::ZERO,
            done: Box::new(move || tx.send(()).expect("the test waits")),
        };
        self.device.change_queue(0, change);
        for _ in 0..TURNS {
            self.turns(1);
            if rx.try_recv().is_ok() {
                return;
            }
        }
        panic!("memory is not let go");
    }

    /// Where logging begins or ends while requests are in flight.
    fn change_log(&mut self) {
        self.log = match self.log {
            Some(_) => None,
            None => Some(log()),
        };
        let (tx, rx) = channel();
        let change = QueueChange::Log {
            log: self.log.clone(),
            done: Box::new(move || tx.send(()).expect("the test waits")),
        };
        self.device.change_queue(0, change);
        self.turns(2);
        rx.try_recv().expect("a log is taken up at once");
    }

    /// The process dies, with all that it has in flight; another one starts where it was.
    fn die(&mut self) {
        self.before = self.counts();
        (self.reactor, self.device) = device(&self.hold);
        self.device.set_features(self.features);
        self.start(Position::START);
    }

    /// How many requests were done, and how many failed.
    fn counts(&self) -> (u64, u64) {
        let c = &self.device.counters()[0];
        let done = [&c.reads, &c.writes, &c.flushes, &c.discards];
        let done: u64 = done.map(|n| n.load(Ordering::Relaxed)).iter().sum();
        let failed = c.errors.load(Ordering::Relaxed);
        (self.before.0 + done, self.before.1 + failed)
    }

    /// A byte of the record.
    fn poke_record(&self, at: u16, byte: u8) {
        if let Some(record) = &self.record {
            let at = u64::from(at) % record.len;
            let cell = record.region.ptr().wrapping_add(at as usize);
            // SAFETY: inside of the mapping, which `record` keeps; other threads there are none.
            unsafe { AtomicU8::from_ptr(cell) }.store(byte, Ordering::Relaxed);
        }
    }

    fn poke(&self, addr: u64, bytes: &[u8]) {
        // What lies outside of memory goes nowhere.
        let _ = self.memory.write(addr, bytes);
    }

    /// A chain of a few descriptors that need not make sense.
    fn chain(&mut self, input: &mut Input<'_>) {
        let shape = input.u8();
        let count = usize::from(shape & 7) + 1;
        let one = |i| {
            let (addr, len, flags) = (input.addr(), input.len(), u16::from(input.u8() & 7));
            // Mostly as it should be.
            let flags = match shape & 0x80 {
                0 => flags & !1 | u16::from(i + 1 < count),
                _ => flags,
            };
            (addr, len, flags)
        };
        let chain: Vec<_> = (0..count).map(one).collect();
        self.emit(&chain);
    }

    /// A request as a good driver makes it; then, perhaps, one of its descriptors is another.
    fn request(&mut self, input: &mut Input<'_>) {
        let at = BASE + 0x8000 + 32 * u64::from(input.u8());
        let kind = [0, 1, 4, 8, 11, 13][usize::from(input.u8() % 6)];
        let mut header = [0; 16];
        header[0] = kind;
        header[8] = input.u8();
        self.poke(at, &header);
        let writable = if kind == 0 || kind == 8 { 2 } else { 0 };
        let len = match kind {
            11 | 13 => 16,
            8 => 20,
            _ => 512 * (1 + u32::from(input.u8() % 16)),
        };
        let mut chain = vec![
            (at, 16, 1),
            (input.addr(), len, 1 | writable),
            (at + 16, 1, 2),
        ];
        if kind == 4 {
            chain.remove(1);
        }
        let tweak = input.u8();
        if tweak & 0x80 != 0 {
            let which = usize::from(tweak) % chain.len();
            chain[which].1 = input.len();
            chain[which].2 ^= u16::from(input.u8() & 7);
        }
        self.emit(&chain);
    }

    /// Makes a chain available by the rules.
    fn emit(&mut self, chain: &[(u64, u32, u16)]) {
        let head = self.next;
        let mut first = None;
        for &(addr, len, flags) in chain {
            let mut b = [0; 16];
            b[..8].copy_from_slice(&addr.to_le_bytes());
            b[8..12].copy_from_slice(&len.to_le_bytes());
            if self.packed {
                let bits = if self.wrap { 1 << 7 } else { 1 << 15 };
                b[12..14].copy_from_slice(&head.to_le_bytes());
                b[14..].copy_from_slice(&(flags | bits).to_le_bytes());
                let at = DESC + 16 * u64::from(self.avail);
                match first {
                    None => first = Some((at, b)),
                    Some(_) => self.poke(at, &b),
                }
                self.avail += 1;
                if self.avail == self.size {
                    (self.avail, self.wrap) = (0, !self.wrap);
                }
            } else {
                let index = self.next % self.size;
                let next = (self.next + 1) % self.size;
                b[12..14].copy_from_slice(&flags.to_le_bytes());
                b[14..].copy_from_slice(&next.to_le_bytes());
                self.poke(DESC + 16 * u64::from(index), &b);
            }
            self.next = self.next.wrapping_add(1);
        }
        match first {
            Some((at, b)) => self.poke(at, &b),
            None => self.offer(head % self.size),
        }
    }

    /// Split: the next available entry.
    fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail % self.size);
        self.poke(DRIVER + 4 + 2 * slot, &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        self.poke(DRIVER + 2, &self.avail.to_le_bytes());
    }

    /// One step of the script.
    fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() % 20 {
            0..=2 => self.request(input),
            3 | 4 => self.chain(input),
            5 | 6 => self.header(input),
            // A descriptor of a table.
            7 | 8 => {
                let (at, mut b) = (input.addr(), [0; 16]);
                b[..8].copy_from_slice(&input.addr().to_le_bytes());
                b[8..12].copy_from_slice(&input.len().to_le_bytes());
                b[12..14].copy_from_slice(&u16::from(input.u8()).to_le_bytes());
                b[14..].copy_from_slice(&u16::from(input.u8()).to_le_bytes());
                self.poke(at, &b);
            }
            9 => {
                let (at, byte) = (input.addr(), input.u8());
                self.poke(at, &[byte]);
            }
            10 if !self.packed => {
                let head = input.u16();
                self.offer(head);
            }
            11 => {
                let how = input.u8();
                let position = self.stop(how & 1 != 0, how & 2 != 0);
                self.start(position.unwrap_or(Position::START));
            }
            12 => {
                let regions = u64::from(input.u8() % 3);
                self.change_memory(regions);
            }
            13 | 14 => {
                self.hold.fetch_xor(true, Ordering::Relaxed);
            }
            15 => {
                // Its head, or one of the first entries.
                let (at, byte) = (input.u8(), input.u8());
                self.poke_record(u16::from(at), byte);
            }
            16 => self.change_log(),
            17 => self.die(),
            n => self.turns(1 + 2 * usize::from(n & 1)),
        }
    }

    /// A request's header.
    fn header(&mut self, input: &mut Input<'_>) {
        let at = input.addr();
        let mut b = [0; 16];
        b[0] = input.u8() % 15;
        b[8..10].copy_from_slice(&input.u16().to_le_bytes());
        b[15] = input.u8() & 0x80;
        self.poke(at, &b);
    }
}

/// Runs a device under a driver that does what `data` says. It must not panic, and its queue must stop.
/// Gives how many requests were done, and how many failed.
pub fn fuzz_ring(data: &[u8]) -> (u64, u64) {
    let mut input = Input(data);
    let mut world = World::new(&mut input);
    world.start(Position::START);
    while !input.0.is_empty() {
        world.step(&mut input);
    }
    world.turns(4);
    world.stop(true, false);
    world.counts()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bluff_testing::{Chance, is_emulated, is_long};
    use proptest::prelude::*;

    /// Found by the fuzzer: a stop that finishes what an earlier life left finds the ring broken.
    #[test]
    fn a_ring_that_breaks_while_it_stops_is_stopped() {
        const RECORDED: u8 = 1 << 4;
        for turns in 0..4 {
            // 8 entries.
            let mut world = World::new(&mut Input(&[RECORDED, 3]));
            world.start(Position::START);
            world.hold.store(true, Ordering::Relaxed);
            world.request(&mut Input(&[]));
            world.turns(4);
            world.die();
            world.offer(0x7fff);
            world.turns(turns);
            world.stop(true, false);
        }
    }

    /// Found by the fuzzer: the last request in memory that has gone ends in the turn that finds the ring
    /// broken.
    #[test]
    fn memory_is_let_go_by_a_ring_that_breaks() {
        let mut world = World::new(&mut Input(&[0, 3]));
        world.start(Position::START);
        world.hold.store(true, Ordering::Relaxed);
        // A read into the second region.
        world.request(&mut Input(&[0, 0, 0, 0, 0x00, 0x90]));
        world.turns(4);
        world.offer(0x7fff);
        world.hold.store(false, Ordering::Relaxed);
        world.change_memory(1);
        world.stop(true, false);
    }

    /// Scripts get as far as storage, and into the error paths.
    #[test]
    fn scripts_reach_the_volume() {
        let (mut done, mut failed) = (0, 0);
        let mut chance = Chance::new(1);
        for _ in 0..3000 {
            let data: Vec<u8> = chance.bytes(400).into_iter().map(|b| b % 160).collect();
            let (d, f) = fuzz_ring(&data);
            (done, failed) = (done + d, failed + f);
        }
        assert!(done > 20 && failed > 1000, "{done} done, {failed} failed");
    }

    fn cases() -> ProptestConfig {
        ProptestConfig {
            cases: match (is_long(), is_emulated()) {
                (true, _) => 100_000,
                (_, true) => 500,
                _ => 2000,
            },
            failure_persistence: None,
            ..ProptestConfig::default()
        }
    }

    proptest! {
        #![proptest_config(cases())]

        #[test]
        fn any_driver_is_survived(data in prop::collection::vec(any::<u8>(), 0..600)) {
            fuzz_ring(&data);
        }

        /// Small numbers, which are what means something in a ring.
        #[test]
        fn any_plausible_driver_is_survived(data in prop::collection::vec(0u8..40, 0..600)) {
            fuzz_ring(&data);
        }
    }
}
