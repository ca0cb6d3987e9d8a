//! A ring, its driver, and the in-flight region that outlives the ring.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Once};

use bluff_memory::{GuestMemory, Mapping, Region, RegionSpec, Space};
use bluff_testing::Chance;
use bluff_virtio_driver as driver;
use driver::{Buffer, DriverQueue, PackedDriver, SplitDriver};

use crate::inflight::{InflightQueue, Step, queue_len, steps};
use crate::{
    Chain, Limits, Pop, Position, QueueLog, QueueSetup, Ring, RingAddresses, RingError, features,
    packed, split,
};

pub(super) const BASE: u64 = 0x10_0000;
/// Bytes that each request has in guest memory, and how many requests there is room for.
pub(super) const ROOM: u64 = 64;
pub(super) const ROOMS: u64 = 512;

/// What the driver and the region look like.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) packed: bool,
    pub(super) in_order: bool,
    pub(super) size: u16,
}

/// Guest, driver and region; the device comes and goes.
pub(super) struct World {
    pub(super) shape: Shape,
    pub(super) memory: Arc<driver::Memory>,
    pub(super) log: Option<QueueLog>,
    epoch: Arc<GuestMemory>,
    pub(super) driver: Box<dyn DriverQueue>,
    pub(super) data: u64,
    pub(super) region: std::fs::File,
    /// Requests that the driver waits for, by the order in which they were made available.
    pub(super) waiting: BTreeMap<u64, ()>,
    next: u64,
    /// How many the device has begun, again and again.
    pub(super) begun: u64,
}

/// A chain that the device works on.
pub(super) type Work = (u64, Chain);

/// What is left of a device that came to its end.
pub(super) enum Ended {
    /// It was killed at a step.
    Killed,
    /// The ring was broken.
    Broken(RingError),
}

impl World {
    pub(super) fn new(shape: Shape) -> Self {
        let memory = driver::Memory::flat(BASE, 1 << 20).unwrap();
        let specs = memory.regions().iter().map(|r| RegionSpec {
            guest: r.config().guest_addr,
            len: r.config().size,
            user: r.user_addr(),
            offset: r.config().file_offset,
            file: r.as_fd().try_clone_to_owned().unwrap(),
        });
        let none = GuestMemory::empty();
        let epoch =
            GuestMemory::new(specs.map(|s| Region::new(s, &none).unwrap()).collect()).unwrap();
        let features = driver::Features {
            event_idx: true,
            indirect: true,
            in_order: shape.in_order,
        };
        let config = driver::Config {
            indirect_entries: 8,
            ..driver::Config::new(shape.size, features)
        };
        let driver: Box<dyn DriverQueue> = match shape.packed {
            true => Box::new(PackedDriver::new(&memory, &config).unwrap()),
            false => Box::new(SplitDriver::new(&memory, &config).unwrap()),
        };
        let data = memory.alloc(ROOM * ROOMS, 64).unwrap();
        let len = queue_len(shape.size).next_multiple_of(4096);
        let shared = driver::Memory::flat(0, len).unwrap();
        let region: OwnedFd = shared.regions()[0].as_fd().try_clone_to_owned().unwrap();
        Self {
            shape,
            memory,
            log: None,
            epoch,
            driver,
            data,
            region: region.into(),
            waiting: BTreeMap::new(),
            next: 0,
            begun: 0,
        }
    }

    pub(super) fn inflight(&self) -> InflightQueue {
        let len = queue_len(self.shape.size);
        let fd: OwnedFd = self.region.try_clone().unwrap().into();
        InflightQueue {
            region: Arc::new(Mapping::new(fd, 0, len).unwrap()),
            offset: 0,
            len,
        }
    }

    /// A device, as a new process would start it: it knows nothing but what is in shared memory.
    pub(super) fn open(&self) -> Result<Box<dyn Ring>, RingError> {
        self.open_with(self.inflight())
    }

    pub(super) fn open_with(&self, inflight: InflightQueue) -> Result<Box<dyn Ring>, RingError> {
        self.open_at(Position::START, Some(inflight))
    }

    pub(super) fn open_at(
        &self,
        position: Position,
        inflight: Option<InflightQueue>,
    ) -> Result<Box<dyn Ring>, RingError> {
        let layout = self.driver.layout();
        let when = |on: bool, bit: u64| if on { bit } else { 0 };
        let setup = QueueSetup {
            index: 0,
            size: self.shape.size,
            features: features::VERSION_1
                | features::EVENT_IDX
                | features::INDIRECT_DESC
                | when(self.shape.packed, features::RING_PACKED)
                | when(self.shape.in_order, features::IN_ORDER),
            addresses: RingAddresses {
                space: Space::Guest,
                desc: layout.descriptors,
                driver: layout.driver,
                device: layout.device,
            },
            position,
            memory: self.epoch.clone(),
            kick: None,
            call: None,
            error: None,
            inflight,
            log: self.log.clone(),
            enabled: true,
        };
        let limits = Limits { indirect: 8 };
        Ok(match self.shape.packed {
            true => Box::new(packed::Ring::new(&setup, limits)?),
            false => Box::new(split::Ring::new(&setup, limits)?),
        })
    }

    /// The driver makes up to `n` requests available, in chains of any shape.
    pub(super) fn submit(&mut self, chance: &mut Chance, n: u64) {
        for _ in 0..n {
            let (readable, writable) = (chance.below(3), 1 + chance.below(2));
            if !self.submit_chain(readable, writable, chance.percent(30)) {
                break;
            }
        }
        self.driver.publish();
    }

    /// Adds one request: a header, more readable and writable descriptors; `false` where the ring is full.
    pub(super) fn submit_chain(&mut self, readable: u64, writable: u64, indirect: bool) -> bool {
        let at = self.data + ROOM * (self.next % ROOMS);
        let mut chain = vec![Buffer::readable(at, 8)];
        chain.extend((0..readable).map(|i| Buffer::readable(at + 8 + i, 1)));
        chain.extend((0..writable).map(|i| Buffer::writable(at + 32 + i, 1)));
        self.memory.write(at, &self.next.to_le_bytes()).unwrap();
        self.memory.write(at + 32, &[0xff; 2]).unwrap();
        if self.driver.add(&chain, indirect, self.next).is_err() {
            return false;
        }
        self.waiting.insert(self.next, ());
        self.next += 1;
        true
    }

    /// The driver takes what was used: each of its requests once, and nothing else.
    pub(super) fn reap(&mut self) -> u64 {
        let mut n = 0;
        while let Some(used) = self.driver.pop_used().expect("the device breaks no rule") {
            let known = self.waiting.remove(&used.token);
            assert!(known.is_some(), "request {} completed twice", used.token);
            let status = self.data + ROOM * (used.token % ROOMS) + 32;
            let mut byte = [0; 2];
            self.memory.read(status, &mut byte).unwrap();
            assert!(byte.contains(&0), "no status was written");
            n += 1;
        }
        n
    }
}

/// A device at work. It sees to it that each of its lives begins requests in the order of their submission.
pub(super) struct Device {
    ring: Box<dyn Ring>,
    works: Vec<Work>,
    last: Option<u64>,
}

impl Device {
    pub(super) fn new(ring: Box<dyn Ring>) -> Self {
        Self {
            ring,
            works: Vec::new(),
            last: None,
        }
    }

    /// Asks for notifications, and not for them again.
    pub(super) fn sleep(&mut self) {
        self.ring.enable_notifications();
        self.ring.disable_notifications();
    }

    pub(super) fn busy(&self) -> usize {
        self.works.len()
    }

    /// Takes up to `n` chains.
    pub(super) fn take(&mut self, world: &mut World, n: u64) -> Result<(), RingError> {
        for _ in 0..n {
            let mut chain = Chain::default();
            match self.ring.pop(&mut chain)? {
                Pop::Empty => break,
                Pop::Bad(e) => panic!("a good chain was called bad: {e}"),
                Pop::Chain => {}
            }
            let mut token = [0; 8];
            assert!(chain.take_front(&mut token) && chain.take_status());
            let token = u64::from_le_bytes(token);
            assert!(
                world.waiting.contains_key(&token),
                "{token} was acknowledged, and is done again"
            );
            assert!(
                self.last.is_none_or(|last| last < token),
                "{token} after {:?}",
                self.last
            );
            self.last = Some(token);
            world.begun += 1;
            self.works.push((token, chain));
        }
        Ok(())
    }

    /// Completes up to `n` of what it works on, in any order, and publishes them as one batch.
    pub(super) fn finish(&mut self, chance: &mut Chance, n: u64) {
        for _ in 0..n.min(self.works.len() as u64) {
            let which = chance.below(self.works.len() as u64) as usize;
            let (_, chain) = self.works.swap_remove(which);
            chain.set_status(0);
            self.ring.complete(&chain, u32::from(chance.percent(50)));
        }
        self.ring.publish();
    }
}

/// Runs `life` until it ends, at `end` at the latest: what is in shared memory stays, the rest is gone.
pub(super) fn live<T>(
    end: Option<(Step, u32)>,
    life: impl FnOnce() -> Result<T, RingError>,
) -> Result<T, Ended> {
    silence();
    steps::end_at(end);
    let result = catch_unwind(AssertUnwindSafe(life));
    steps::end_at(None);
    match result {
        Ok(Ok(t)) => Ok(t),
        Ok(Err(e)) => Err(Ended::Broken(e)),
        Err(panic) if panic.is::<Step>() => Err(Ended::Killed),
        Err(panic) => resume_unwind(panic),
    }
}

/// A kill is no news.
fn silence() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !info.payload().is::<Step>() {
                hook(info);
            }
        }));
    });
}
