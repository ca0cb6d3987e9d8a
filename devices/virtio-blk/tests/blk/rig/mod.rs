//! A device on a reactor of its own, and a driver that was written apart from it.

pub mod log;
pub mod raw;
pub mod stall;

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bluff_block::{Uri, Volume};
use bluff_memory::{GuestMemory, Region, RegionSpec, Space};
use bluff_reactor::{Handle, Options, Poll};
use bluff_virtio::inflight::InflightQueue;
use bluff_virtio::{
    Notifier, Position, QueueChange, QueueLog, QueueSetup, RingAddresses, Stop, StoppedQueue,
    VirtioDevice, features,
};
use bluff_virtio_blk::{Blk, BlkOptions};
use bluff_virtio_driver as driver;
use driver::{DriverQueue, PackedDriver, SplitDriver};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Where the guest's memory begins.
pub const BASE: u64 = 0x4000_0000;

/// An epoch of the driver's memory, as an attachment would make it.
pub fn epoch(memory: &driver::Memory) -> Arc<GuestMemory> {
    let specs = memory.regions().iter().map(|r| RegionSpec {
        guest: r.config().guest_addr,
        len: r.config().size,
        user: r.user_addr(),
        offset: r.config().file_offset,
        file: r.as_fd().try_clone_to_owned().unwrap(),
    });
    let none = GuestMemory::empty();
    GuestMemory::new(specs.map(|s| Region::new(s, &none).unwrap()).collect()).unwrap()
}

/// Which kind of ring, with which features.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    pub packed: bool,
    pub event_idx: bool,
    pub in_order: bool,
    pub indirect: bool,
}

impl Kind {
    pub const SPLIT: Self = Self {
        packed: false,
        event_idx: true,
        in_order: false,
        indirect: true,
    };
    pub const PACKED: Self = Self {
        packed: true,
        ..Self::SPLIT
    };

    /// Every combination.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..16).map(|bits| Self {
            packed: bits & 1 != 0,
            event_idx: bits & 2 != 0,
            in_order: bits & 4 != 0,
            indirect: bits & 8 != 0,
        })
    }

    pub fn driver(self, memory: &Arc<driver::Memory>, size: u16) -> Box<dyn DriverQueue> {
        let features = driver::Features {
            event_idx: self.event_idx,
            indirect: self.indirect,
            in_order: self.in_order,
        };
        let config = driver::Config {
            indirect_entries: 64,
            ..driver::Config::new(size, features)
        };
        match self.packed {
            true => Box::new(PackedDriver::new(memory, &config).unwrap()),
            false => Box::new(SplitDriver::new(memory, &config).unwrap()),
        }
    }

    pub fn features(self) -> u64 {
        let when = |on: bool, bit: u64| if on { bit } else { 0 };
        features::VERSION_1
            | when(self.packed, features::RING_PACKED)
            | when(self.event_idx, features::EVENT_IDX)
            | when(self.in_order, features::IN_ORDER)
            | when(self.indirect, features::INDIRECT_DESC)
    }
}

/// A running device.
pub struct Rig {
    pub device: Blk,
    pub reactor: Handle,
    thread: Option<JoinHandle<()>>,
    pub kick: EventFd,
    pub call: EventFd,
    pub features: u64,
}

/// How long anything may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until `what` is there.
pub fn wait<T>(mut what: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(t) = what() {
            return t;
        }
        assert!(start.elapsed() < PATIENCE, "nothing came in {PATIENCE:?}");
        std::thread::yield_now();
    }
}

pub fn ram(options: &str) -> Arc<dyn Volume> {
    bluff_block::ram::open(Uri::parse(&format!("ram:?{options}")).unwrap()).unwrap()
}

/// A queue from its start: `at` are the guest addresses of its descriptors, its driver's and its device's area.
pub fn bare(
    index: u16,
    size: u16,
    features: u64,
    at: [u64; 3],
    memory: &Arc<GuestMemory>,
) -> QueueSetup {
    QueueSetup {
        index,
        size,
        features,
        addresses: addresses(at),
        position: Position::START,
        memory: memory.clone(),
        kick: None,
        call: None,
        error: None,
        inflight: None,
        log: None,
        enabled: true,
    }
}

/// Where a ring's three parts lie in the guest's memory.
pub fn addresses([desc, driver, device]: [u64; 3]) -> RingAddresses {
    RingAddresses {
        space: Space::Guest,
        desc,
        driver,
        device,
    }
}

impl Rig {
    pub fn new(volume: Arc<dyn Volume>, queues: u16, poll: Poll) -> Self {
        Self::on(volume, queues, poll, Options::default())
    }

    pub fn on(volume: Arc<dyn Volume>, queues: u16, poll: Poll, options: Options) -> Self {
        let (reactor, thread) = Handle::spawn(options).unwrap();
        let options = BlkOptions {
            queues,
            serial: "rig".into(),
            config_wce: true,
            poll,
            reactors: vec![reactor.clone()],
        };
        let device = Blk::new(volume, options);
        let eventfd = || EventFd::new(EFD_NONBLOCK).unwrap();
        let features = device.features();
        Self {
            device,
            reactor,
            thread: Some(thread),
            kick: eventfd(),
            call: eventfd(),
            features,
        }
    }

    /// The setup for a driver's queue, from its start.
    pub fn setup(
        &self,
        index: u16,
        kind: Kind,
        queue: &dyn DriverQueue,
        memory: &Arc<GuestMemory>,
    ) -> QueueSetup {
        let ring = features::RING & !features::RING_RESET;
        let features = (self.features & !ring) | kind.features();
        let layout = queue.layout();
        let at = [layout.descriptors, layout.driver, layout.device];
        QueueSetup {
            kick: Some(self.kick.try_clone().unwrap()),
            call: Some(Notifier::new(self.call.try_clone().unwrap()).unwrap()),
            ..bare(index, queue.size(), features, at, memory)
        }
    }

    /// Starts a queue as a driver would that has negotiated everything.
    pub fn start(&mut self, setup: QueueSetup) {
        self.device.set_features(setup.features);
        self.device.start_queue(setup).unwrap();
    }

    /// Stops a queue and waits for it.
    pub fn stop(&mut self, index: u16, stop: Stop) -> Option<StoppedQueue> {
        let (tx, rx) = mpsc::channel();
        self.device
            .stop_queue(index, stop, Box::new(move |s| tx.send(s).unwrap()));
        rx.recv_timeout(PATIENCE)
            .expect("a queue stops within its bound")
    }

    pub fn set_log(&mut self, index: u16, log: Option<QueueLog>) {
        let (tx, rx) = mpsc::channel();
        let done = Box::new(move || tx.send(()).unwrap());
        self.device
            .change_queue(index, QueueChange::Log { log, done });
        rx.recv_timeout(PATIENCE).expect("the log is taken up");
    }

    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }
}

/// Finish what is there; the driver lives on.
pub const FINISH: Stop = Stop {
    bound: Duration::from_secs(1),
    leave: false,
    answer: true,
};

/// The driver has gone, and what it asked for with it.
pub const RESET: Stop = Stop {
    bound: Duration::from_millis(100),
    leave: false,
    answer: false,
};

/// An in-flight region of one queue, in a file that the test may write as a front end could.
pub fn inflight(size: u16) -> (File, InflightQueue) {
    let len = bluff_virtio::inflight::queue_len(size);
    let memory = driver::Memory::flat(0, len.next_multiple_of(4096)).unwrap();
    let fd = || memory.regions()[0].as_fd().try_clone_to_owned().unwrap();
    let region = Arc::new(bluff_memory::Mapping::new(fd(), 0, len).unwrap());
    let queue = InflightQueue {
        region,
        offset: 0,
        len,
    };
    (fd().into(), queue)
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.reactor.stop();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            if !std::thread::panicking() {
                ended.expect("the reactor ends without a panic");
            }
        }
    }
}
