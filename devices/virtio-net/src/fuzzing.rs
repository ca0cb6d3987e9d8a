//! A hostile driver of the control queue in bytes, for cargo-fuzz and for a smoke test that runs everywhere.
//!
//! ```text
//!   bytes --> ring kind, features --> [ command | raw chain | poke | frame | turns | stop and start | memory | death ] ...
//! ```
//! The same bytes do the same each time but for the clock: the reactor is stepped, and the port leads back to the device. What is set decides where its own frames come
//! out again, so that filters, tables, hashes and coalescing are used with whatever could be set.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bluff_memory::{GuestMemory, Region, RegionSpec, Space};
use bluff_net::{Cause, Pair};
use bluff_reactor::{Options, Poll, Reactor, UringUse};
use bluff_virtio::{
    Position, QueueChange, QueueSetup, RingAddresses, Stop, VirtioDevice, features,
};

use crate::spec::feature;
use crate::{Net, NetOptions};

/// Guest address of the memory.
const BASE: u64 = 0x1_0000;
/// Bytes of it.
const MEMORY: u64 = 0x4_0000;
/// Bytes for the parts of a queue's ring.
const RING: u64 = 0x1000;
const DRIVER: u64 = 0x800;
const DEVICE: u64 = 0xa00;
/// Where commands and frames lie.
const DATA: u64 = BASE + 0x1_0000;
/// Entries of each ring.
const SIZE: u16 = 32;
const PAIRS: u16 = 2;
/// Turns within which a queue has stopped.
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

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.u8()).collect()
    }
}

/// Where a driver stands in one ring.
#[derive(Clone, Copy)]
struct Driver {
    avail: u16,
    wrap: bool,
    next: u16,
}

const FRESH: Driver = Driver {
    avail: 0,
    wrap: true,
    next: 0,
};

struct World {
    reactor: Reactor,
    device: Net,
    memory: Arc<GuestMemory>,
    features: u64,
    packed: bool,
    drivers: Vec<Driver>,
}

fn memory(old: &GuestMemory) -> Arc<GuestMemory> {
    let kept = old.regions().next().cloned();
    let region = kept.unwrap_or_else(|| {
        let file = File::options().read(true).write(true).open("/dev/zero");
        let spec = RegionSpec {
            guest: BASE,
            len: MEMORY,
            user: BASE,
            offset: 0,
            file: OwnedFd::from(file.expect("/dev/zero can be opened")),
        };
        Region::new(spec, &GuestMemory::empty()).expect("anonymous memory")
    });
    GuestMemory::new(vec![region]).expect("one region")
}

fn device() -> (Reactor, Net) {
    let options = Options {
        uring: UringUse::Off,
        ..Options::default()
    };
    let reactor = Reactor::new(&options).expect("a reactor");
    let options = NetOptions {
        pairs: PAIRS,
        mac: [2, 0, 0, 0, 0, 1],
        speed: None,
        control_queue: true,
        poll: Poll::Always,
        reactors: vec![reactor.handle()],
    };
    let device = Net::new(Arc::new(Pair::loopback()), options);
    (reactor, device)
}

impl World {
    fn new(input: &mut Input<'_>) -> Self {
        let kind = input.u8();
        let when = |bit: u8, feature: u64| if kind >> bit & 1 != 0 { feature } else { 0 };
        let packed = kind & 1 != 0;
        let (reactor, mut device) = device();
        let ring = features::VERSION_1
            | features::INDIRECT_DESC
            | when(0, features::RING_PACKED)
            | when(1, features::EVENT_IDX)
            | when(2, features::IN_ORDER);
        let less = when(3, feature::MQ | feature::RSS)
            | when(4, feature::HASH_REPORT)
            | when(5, feature::CTRL_RX)
            | when(6, feature::MRG_RXBUF);
        let features = device.features() & !features::RING & !less | ring;
        device.set_features(features);
        let mut this = Self {
            reactor,
            device,
            memory: memory(&GuestMemory::empty()),
            features,
            packed,
            drivers: Vec::new(),
        };
        this.drivers = vec![FRESH; usize::from(this.control()) + 1];
        this.start_all();
        this
    }

    /// The control queue's number (§5.1.2).
    fn control(&self) -> u16 {
        match self.features & (feature::MQ | feature::RSS) {
            0 => 2,
            _ => 2 * PAIRS,
        }
    }

    fn start_all(&mut self) {
        for index in 0..=self.control() {
            self.start(index, Position::START);
        }
    }

    fn ring(index: u16) -> u64 {
        BASE + RING * u64::from(index)
    }

    fn start(&mut self, index: u16, position: Position) {
        let at = Self::ring(index);
        let setup = QueueSetup {
            index,
            size: SIZE,
            features: self.features,
            addresses: RingAddresses {
                space: Space::Guest,
                desc: at,
                driver: at + DRIVER,
                device: at + DEVICE,
            },
            position,
            memory: self.memory.clone(),
            kick: None,
            call: None,
            error: None,
            inflight: None,
            log: None,
            enabled: true,
        };
        self.device.start_queue(setup).expect("it does not run");
    }

    fn turns(&mut self, n: usize) {
        for _ in 0..n {
            self.reactor.step(Some(Duration::ZERO));
        }
    }

    fn stop(&mut self, index: u16, answer: bool) -> Option<Position> {
        let stopped = Arc::new(Mutex::new(None));
        let to = stopped.clone();
        let stop = Stop {
            bound: Duration::ZERO,
            leave: false,
            answer,
        };
        let done = Box::new(move |s| *to.lock().expect("one thread") = Some(s));
        self.device.stop_queue(index, stop, done);
        for _ in 0..TURNS {
            self.turns(1);
            if let Some(stopped) = stopped.lock().expect("one thread").take() {
                return stopped.map(|s| s.position);
            }
        }
        panic!("queue {index} does not stop");
    }

    fn change_memory(&mut self, index: u16) {
        self.memory = memory(&self.memory);
        let (tx, rx) = channel();
        let change = QueueChange::Memory {
            memory: self.memory.clone(),
            bound: Duration::ZERO,
            done: Box::new(move || {
                let _ = tx.send(());
            }),
        };
        self.device.change_queue(index, change);
        for _ in 0..TURNS {
            self.turns(1);
            if rx.try_recv().is_ok() {
                return;
            }
        }
        panic!("memory is not let go");
    }

    /// The process dies, and another goes on with what was saved.
    fn die(&mut self) {
        let saved = self.device.save();
        for index in 0..=self.control() {
            self.stop(index, true);
        }
        (self.reactor, self.device) = device();
        self.device.load(&saved).expect("what was saved");
        self.device.set_features(self.features);
        let again = self.device.save();
        assert_eq!(again[2..], saved[2..], "what was set is set");
        // Its driver begins anew, which makes no difference to what was set.
        let zeroes = vec![0; (RING * u64::from(self.control() + 1)) as usize];
        self.poke(BASE, &zeroes);
        self.drivers.fill(FRESH);
        self.start_all();
    }

    fn poke(&self, addr: u64, bytes: &[u8]) {
        // What lies outside of memory goes nowhere.
        let _ = self.memory.write(addr, bytes);
    }

    /// Makes a chain available by the rules.
    fn emit(&mut self, index: u16, chain: &[(u64, u32, u16)]) {
        let (at, packed) = (Self::ring(index), self.packed);
        let mut driver = self.drivers[usize::from(index)];
        let head = driver.next;
        let mut first = None;
        for (i, &(addr, len, flags)) in chain.iter().enumerate() {
            let flags = flags & !1 | u16::from(i + 1 < chain.len());
            let mut b = [0; 16];
            b[..8].copy_from_slice(&addr.to_le_bytes());
            b[8..12].copy_from_slice(&len.to_le_bytes());
            if packed {
                let bits = if driver.wrap { 1 << 7 } else { 1 << 15 };
                b[12..14].copy_from_slice(&head.to_le_bytes());
                b[14..].copy_from_slice(&(flags | bits).to_le_bytes());
                let place = at + 16 * u64::from(driver.avail);
                match first {
                    None => first = Some((place, b)),
                    Some(_) => self.poke(place, &b),
                }
                driver.avail += 1;
                if driver.avail == SIZE {
                    (driver.avail, driver.wrap) = (0, !driver.wrap);
                }
            } else {
                let (entry, next) = (driver.next % SIZE, (driver.next + 1) % SIZE);
                b[12..14].copy_from_slice(&flags.to_le_bytes());
                b[14..].copy_from_slice(&next.to_le_bytes());
                self.poke(at + 16 * u64::from(entry), &b);
            }
            driver.next = driver.next.wrapping_add(1);
        }
        match first {
            Some((place, b)) => self.poke(place, &b),
            None => {
                let slot = u64::from(driver.avail % SIZE);
                let head = (head % SIZE).to_le_bytes();
                self.poke(at + DRIVER + 4 + 2 * slot, &head);
                driver.avail = driver.avail.wrapping_add(1);
                self.poke(at + DRIVER + 2, &driver.avail.to_le_bytes());
            }
        }
        self.drivers[usize::from(index)] = driver;
    }

    /// A command as a good driver makes it, and then, perhaps, longer, shorter or in other pieces.
    fn command(&mut self, input: &mut Input<'_>) {
        let (which, small) = (input.u8(), input.u8());
        let (class, number) = (which % 8, which / 8 % 5);
        let number16 = |n: u8| u16::from(n % 6).to_le_bytes();
        let mut data = match (class, number) {
            (0, _) => vec![small & 1],
            (1, 0) => {
                let n = usize::from(small % 80);
                let mut table = (n as u32).to_le_bytes().to_vec();
                table.extend(input.bytes(6));
                table.resize(4 + 6 * n, 2);
                table.extend([1, 0, 0, 0]);
                table.extend(input.bytes(6));
                table
            }
            (1, _) => vec![2, 0, 0, 0, 0, small],
            (2, _) => input.bytes(2),
            (4, 0) => number16(small).to_vec(),
            (4, 1) => {
                let mut data = input.u16().to_le_bytes().to_vec();
                let len = 1u16 << (small % 9);
                data.extend([0, 0]);
                data.extend((len - 1).to_le_bytes());
                for _ in 0..=len {
                    data.extend([input.u8() % 3, 0]);
                }
                data.extend([input.u8() % 3, 0, 40]);
                data.extend(input.bytes(40));
                data
            }
            (4, 2) => {
                let mut data = vec![small, 1];
                data.extend([0; 10]);
                data.push(input.u8() % 42);
                data.extend(input.bytes(usize::from(*data.last().expect("not empty"))));
                data
            }
            (5, _) => {
                let bits = feature::GUEST_CSUM
                    | if small & 1 != 0 {
                        feature::GUEST_TSO4
                    } else {
                        0
                    }
                    | if small & 2 != 0 {
                        feature::GUEST_USO4
                    } else {
                        0
                    };
                (if small & 4 != 0 { 0 } else { bits })
                    .to_le_bytes()
                    .to_vec()
            }
            (6, 0 | 1) => input.bytes(8),
            (6, _) => {
                let mut data = number16(small).to_vec();
                data.extend([0; 2]);
                data.extend(input.bytes(8));
                data
            }
            _ => Vec::new(),
        };
        data.splice(0..0, [class, number]);
        let tweak = input.u8();
        match tweak >> 6 {
            3 => data.truncate(usize::from(tweak & 63)),
            2 => data.resize(data.len() + usize::from(tweak & 63), tweak),
            _ => {}
        }
        self.poke(DATA, &data);
        let cut = u32::from(input.u8()).min(data.len() as u32);
        let rest = data.len() as u32 - cut;
        let answer = u32::from(input.u8() % 12);
        // Where the answer lies: apart, or in the command.
        let to = if tweak & 0x20 != 0 {
            DATA
        } else {
            DATA + 0x8000
        };
        let chain = [
            (DATA, cut, 0),
            (DATA + u64::from(cut), rest, 0),
            (to, answer, 2),
        ];
        self.emit(self.control(), &chain);
    }

    /// A frame to the device itself, with a header that need not make sense, and a buffer for it.
    fn frame(&mut self, input: &mut Input<'_>) {
        let at = DATA + 0x1_0000;
        let len = 12 + usize::from(input.u8());
        let mut bytes = vec![0; 12 + 8];
        bytes[0] = input.u8() & 1;
        bytes.extend([2, 0, 0, 0, 0, input.u8() & 3, 2, 0, 0, 0, 0, 1]);
        match input.u8() % 3 {
            0 => bytes.extend([0x81, 0, 0, 7, 8, 6]),
            1 => bytes.extend([8, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0]),
            _ => bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 20, 6, 64]),
        }
        bytes.extend(input.bytes(24));
        bytes.resize(bytes.len().max(len), 1);
        self.poke(at, &bytes);
        let pair = u16::from(input.u8()) % (self.control() / 2);
        self.emit(2 * pair + 1, &[(at, bytes.len() as u32, 0)]);
        let room = u32::from(input.u8()) * 4;
        let to = u16::from(input.u8()) % (self.control() / 2);
        self.emit(2 * to, &[(at + 0x2000, room, 2)]);
    }

    /// A chain of the control queue that need not make sense.
    fn chain(&mut self, input: &mut Input<'_>) {
        let count = usize::from(input.u8() & 3) + 1;
        let one = |_| {
            let addr = match input.u16() {
                0xffff => u64::MAX,
                n => DATA + u64::from(n),
            };
            (addr, u32::from(input.u16()), u16::from(input.u8() & 6))
        };
        let chain: Vec<_> = (0..count).map(one).collect();
        self.emit(self.control(), &chain);
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() % 20 {
            0..=7 => self.command(input),
            8..=10 => self.frame(input),
            11 => self.chain(input),
            12 => {
                // Its rings, or a command that is being read.
                let at = BASE + u64::from(input.u16()) * 3;
                self.poke(at, &[input.u8()]);
            }
            13 => {
                let how = input.u8();
                let index = u16::from(how >> 1) % (self.control() + 1);
                let position = self.stop(index, how & 1 != 0);
                self.start(index, position.unwrap_or(Position::START));
            }
            14 => {
                let index = u16::from(input.u8()) % (self.control() + 1);
                self.change_memory(index);
            }
            15 => self.die(),
            16 => self.device.cable().set_link(input.u8() & 1 != 0),
            n => self.turns(1 + 2 * usize::from(n & 3)),
        }
    }
}

/// Runs a device under a driver that does what `data` says. It must not panic, its queues must stop, and what was set must survive it. Gives how many frames its driver
/// received, and how many were filtered out.
pub fn fuzz_control(data: &[u8]) -> (u64, u64) {
    let mut input = Input(data);
    let mut world = World::new(&mut input);
    let mut before = (0, 0);
    while !input.0.is_empty() {
        let counts = world.counts();
        let device = world.device.counters()[0].clone();
        world.step(&mut input);
        // Another device counts from 0.
        if !Arc::ptr_eq(&device, &world.device.counters()[0]) {
            before = (before.0 + counts.0, before.1 + counts.1);
        }
    }
    world.turns(8);
    let (received, filtered) = world.counts();
    for index in 0..=world.control() {
        world.stop(index, true);
    }
    (before.0 + received, before.1 + filtered)
}

impl World {
    fn counts(&self) -> (u64, u64) {
        let all = self.device.counters().iter().map(|c| &c.received);
        all.fold((0, 0), |(received, filtered), c| {
            (
                received + c.frames.load(Ordering::Relaxed),
                filtered + c.drops.get(Cause::Filtered),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bluff_testing::{Chance, is_emulated, is_long};
    use proptest::prelude::*;

    /// Scripts get as far as frames that are received, and that are filtered out.
    #[test]
    fn scripts_reach_the_receive_queues() {
        let (mut received, mut filtered) = (0, 0);
        let mut chance = Chance::new(1);
        for _ in 0..600 {
            let data: Vec<u8> = chance.bytes(400).into_iter().map(|b| b % 160).collect();
            let (r, f) = fuzz_control(&data);
            (received, filtered) = (received + r, filtered + f);
        }
        assert!(
            received > 100 && filtered > 10,
            "{received} received, {filtered} filtered"
        );
    }

    fn cases() -> ProptestConfig {
        ProptestConfig {
            cases: match (is_long(), is_emulated()) {
                (true, _) => 50_000,
                (_, true) => 200,
                _ => 700,
            },
            failure_persistence: None,
            ..ProptestConfig::default()
        }
    }

    proptest! {
        #![proptest_config(cases())]

        #[test]
        fn any_driver_is_survived(data in prop::collection::vec(any::<u8>(), 0..500)) {
            fuzz_control(&data);
        }

        /// Small numbers, which are what means something in a command.
        #[test]
        fn any_plausible_driver_is_survived(data in prop::collection::vec(0u8..40, 0..500)) {
            fuzz_control(&data);
        }
    }
}
