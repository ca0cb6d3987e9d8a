//! The two devices, and one driver that does the same to both.
//!
//! ```text
//!                .--> memory, ring --> bluff_reference::Oracle --> Recorder
//!   driver ------|
//!                '--> memory, ring --> bluff_virtio_blk::Blk ----> Recorder
//! ```

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bluff_block::{Buffers, Kind, Op, OpenContext, Tag};
use bluff_memory::{GuestMemory, IoVec, Region, RegionSpec, Space};
use bluff_reactor::{Actor, Context, Options, Poll, Reactor, Turn};
use bluff_reference::spec::{WRITEBACK_OFFSET, feature};
use bluff_reference::{Device, DeviceOptions, Oracle};
use bluff_testing::Chance;
use bluff_virtio::{
    DeviceEvent, Notifier, Position, QueueSetup, RingAddresses, Stop, VirtioDevice, features,
};
use bluff_virtio_blk::{Blk, BlkOptions};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::recorder::{Recorder, Shape};
use crate::ring::{INDIRECT, NEXT, Ring, WRITE};

/// Where the guest's memory begins.
pub const BASE: u64 = 0x4000_0000;
/// Bytes of each of two regions that adjoin for the guest, and only for the guest.
pub const REGION: u64 = 512 << 10;
/// Where they meet.
pub const SEAM: u64 = BASE + REGION;
pub const END: u64 = SEAM + REGION;
/// Where buffers and tables may lie; the ring is before.
pub const DATA: u64 = BASE + 0xa000;
const SERIAL: &str = "the same for both";

/// Memory that is used for all scripts: the same file as the stack maps it, and as we do.
pub struct Memory {
    stock: Arc<GuestMemoryMmap>,
    epoch: Arc<GuestMemory>,
}

impl Memory {
    pub fn new() -> Self {
        let files = [BASE, SEAM].map(|at| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(REGION).unwrap();
            (at, file)
        });
        let stock = files.iter().map(|(at, file)| {
            let file = FileOffset::new(file.try_clone().unwrap(), 0);
            (GuestAddress(*at), REGION as usize, Some(file))
        });
        let stock = GuestMemoryMmap::from_ranges_with_files(stock).unwrap();
        let region = |(guest, file)| {
            let spec = RegionSpec {
                guest,
                len: REGION,
                user: guest,
                offset: 0,
                file: OwnedFd::from(file),
            };
            Region::new(spec, &GuestMemory::empty()).unwrap()
        };
        Self {
            stock: Arc::new(stock),
            epoch: GuestMemory::new(files.into_iter().map(region).collect()).unwrap(),
        }
    }
}

/// What the driver negotiates and chooses.
#[derive(Clone, Copy, Debug)]
pub struct Choices {
    pub shape: Shape,
    pub queue_size: u16,
    /// Where both indices of the ring begin.
    pub index: u16,
    pub event_idx: bool,
    pub indirect: bool,
    /// Where the volume has them.
    pub flush: bool,
    pub config_wce: bool,
}

/// Finish what is there.
const FINISH: Stop = Stop {
    bound: Duration::from_secs(1),
    leave: false,
    answer: true,
};

/// Turns within which all that is available has been done.
const TURNS: usize = 10_000;

/// What came back: the lengths by their heads, and whether the driver was notified.
pub type Used = (BTreeMap<u16, u32>, bool);

struct Ours {
    device: Blk,
    epoch: Arc<GuestMemory>,
    ring: Ring,
    volume: Arc<Recorder>,
    call: EventFd,
    broken: Arc<Mutex<bool>>,
}

struct Theirs {
    device: Arc<Device>,
    oracle: Oracle,
    ring: Ring,
    queue: Queue,
    volume: Arc<Recorder>,
}

pub struct Pair<'a> {
    reactor: &'a mut Reactor,
    ours: Ours,
    theirs: Theirs,
    choices: Choices,
    pub features: u64,
    /// What the driver has made available, and both have given back.
    index: u16,
    /// Ours was started, and has published nothing yet.
    fresh: bool,
}

impl<'a> Pair<'a> {
    pub fn new(
        reactor: &'a mut Reactor,
        memories: &[Memory; 2],
        choices: Choices,
        chance: &mut Chance,
    ) -> Self {
        let volumes = [(); 2].map(|()| Arc::new(Recorder::new(choices.shape)));
        let content = chance.bytes(choices.shape.size as usize);
        for volume in &volumes {
            transfer(reactor, volume, Kind::Write { fua: false }, content.clone());
        }
        let [ours, theirs] = volumes;
        let Choices {
            queue_size: size,
            index,
            ..
        } = choices;
        let ring = |memory: &Memory| Ring::at(memory.stock.clone(), BASE, size, index);

        let options = DeviceOptions {
            serial: SERIAL.into(),
            ..DeviceOptions::default()
        };
        let device = Arc::new(Device::new(theirs.clone(), options));
        let theirs_ring = ring(&memories[1]);
        let theirs = Theirs {
            oracle: Oracle::new(device.clone()).unwrap(),
            queue: theirs_ring.queue(size),
            ring: theirs_ring,
            volume: theirs,
            device,
        };

        let options = BlkOptions {
            queues: 1,
            serial: SERIAL.into(),
            config_wce: true,
            poll: Poll::Always,
            reactors: vec![reactor.handle()],
        };
        let mut device = Blk::new(ours.clone(), options);
        let broken: Arc<Mutex<bool>> = Arc::default();
        let tell = broken.clone();
        device.on_event(Arc::new(move |event| {
            *tell.lock().unwrap() |= matches!(event, DeviceEvent::QueueBroken { .. });
        }));
        let ours = Ours {
            device,
            epoch: memories[0].epoch.clone(),
            ring: ring(&memories[0]),
            volume: ours,
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
            broken,
        };
        let mut this = Self {
            reactor,
            ours,
            theirs,
            choices,
            features: 0,
            index,
            fresh: false,
        };
        this.negotiate();
        this.start();
        this
    }

    /// The driver takes of what both offer.
    fn negotiate(&mut self) {
        let when = |on: bool, bit: u64| if on { bit } else { 0 };
        let choices = &self.choices;
        let wanted = !(features::RING | feature::FLUSH | feature::CONFIG_WCE)
            | features::VERSION_1
            | when(choices.event_idx, features::EVENT_IDX)
            | when(choices.indirect, features::INDIRECT_DESC)
            | when(choices.flush, feature::FLUSH)
            | when(choices.config_wce, feature::CONFIG_WCE);
        self.features = self.ours.device.features() & self.theirs.device.features() & wanted;
        self.ours.device.set_features(self.features);
        self.theirs.device.set_acked(self.features);
        let event_idx = self.features & features::EVENT_IDX != 0;
        self.theirs.queue.set_event_idx(event_idx);
        if self.features & feature::CONFIG_WCE != 0 {
            let mut mode = [0];
            self.ours.device.read_config(WRITEBACK_OFFSET, &mut mode);
            assert_eq!(
                mode[..],
                self.theirs.device.read_config(WRITEBACK_OFFSET, 1)
            );
            if self.index != 0 {
                // A device that did not see this driver begin does not know what it was told.
                self.set_writeback(mode == [1]);
            }
        }
    }

    fn start(&mut self) {
        let ring = &self.ours.ring;
        let setup = QueueSetup {
            index: 0,
            size: self.choices.queue_size,
            features: self.features,
            addresses: RingAddresses {
                space: Space::Guest,
                desc: ring.base,
                driver: ring.avail_at(),
                device: ring.used_at(),
            },
            position: Position {
                avail: self.index,
                used: self.index,
                ..Position::START
            },
            memory: self.ours.epoch.clone(),
            kick: None,
            call: Some(Notifier::new(self.ours.call.try_clone().unwrap()).unwrap()),
            error: None,
            inflight: None,
            log: None,
            enabled: true,
        };
        self.ours.device.start_queue(setup).unwrap();
        // One that goes on where another was notifies its driver, to be sure.
        self.turns(4);
        let _ = self.ours.call.read();
        self.fresh = true;
    }

    fn turns(&mut self, n: usize) {
        for _ in 0..n {
            self.reactor.step(Some(Duration::ZERO));
        }
    }

    /// Stops ours: it is where theirs is.
    pub fn stop(&mut self) {
        let stopped = Arc::new(Mutex::new(None));
        let to = stopped.clone();
        let done = Box::new(move |s| *to.lock().unwrap() = s);
        self.ours.device.stop_queue(0, FINISH, done);
        for _ in 0..TURNS {
            self.turns(1);
            if let Some(stopped) = stopped.lock().unwrap().take() {
                assert_eq!(stopped.in_flight, 0);
                let theirs = (
                    self.theirs.queue.next_avail(),
                    self.theirs.queue.next_used(),
                );
                assert_eq!((stopped.position.avail, stopped.position.used), theirs);
                return;
            }
        }
        panic!("the queue does not stop");
    }

    /// Stops ours and starts another that goes on where it was.
    pub fn restart(&mut self) {
        self.stop();
        self.start();
    }

    /// The driver chooses write-back, or write-through.
    pub fn set_writeback(&mut self, on: bool) {
        let ours = self
            .ours
            .device
            .write_config(WRITEBACK_OFFSET, &[u8::from(on)]);
        let theirs = self
            .theirs
            .device
            .write_config(WRITEBACK_OFFSET, &[u8::from(on)]);
        assert_eq!(ours.is_ok(), theirs);
    }

    /// The same for both rings.
    pub fn driver(&mut self, mut act: impl FnMut(&mut Ring)) {
        act(&mut self.ours.ring);
        act(&mut self.theirs.ring);
    }

    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        self.driver(|ring| ring.mem.write_slice(bytes, GuestAddress(at)).unwrap());
    }

    /// A descriptor in the ring or in a table.
    pub fn descriptor(&mut self, table: u64, i: u16, piece: Piece, next: Option<u16>) {
        let flags = piece.flags | if next.is_some() { NEXT } else { 0 };
        // What follows nothing may be anything.
        let next = next.unwrap_or(0xabcd);
        self.driver(|ring| ring.descriptor(table, i, piece.addr, piece.len, flags, next));
    }

    /// Whether ours notifies the driver in any case: one that was just started cannot know which event
    /// index its driver was told of last.
    pub fn notifies(&self) -> bool {
        self.fresh && self.features & features::EVENT_IDX != 0
    }

    /// A byte of ours and of theirs.
    pub fn bytes(&self, at: u64) -> [u8; 2] {
        [&self.ours.ring, &self.theirs.ring].map(|ring| ring.byte(at))
    }

    /// Both devices do what was offered since: `count` chains.
    pub fn serve(&mut self, count: u16) -> [Used; 2] {
        self.driver(|ring| ring.publish());
        self.index = self.index.wrapping_add(count);
        let mut used = BTreeMap::new();
        let mut turns = 0;
        while used.len() < usize::from(count) {
            self.turns(1);
            while let Some((head, len)) = self.ours.ring.take_used() {
                let again = used.insert(u16::try_from(head).unwrap(), len);
                assert_eq!(again, None, "{head} is given back twice");
            }
            turns += 1;
            assert!(turns < TURNS, "{} of {count} chains come back", used.len());
        }
        self.turns(2);
        assert_eq!(self.ours.ring.take_used(), None);
        assert!(!*self.ours.broken.lock().unwrap(), "the ring is broken");
        let ours = (used, self.ours.call.read().is_ok());
        self.fresh = false;

        let Theirs {
            oracle,
            ring,
            queue,
            ..
        } = &mut self.theirs;
        let (n, notified) = oracle.process(queue, &*ring.mem).expect("a good ring");
        assert_eq!(n, usize::from(count));
        let mut used = BTreeMap::new();
        while let Some((head, len)) = ring.take_used() {
            assert_eq!(used.insert(u16::try_from(head).unwrap(), len), None);
        }
        [ours, (used, notified)]
    }

    /// All of memory is the same on both sides, but for the order of the used ring and what a device
    /// writes there for itself.
    pub fn same_memory(&self) {
        let ring = &self.theirs.ring;
        let used = ring.used_at();
        let parts = [(BASE, used), (used + 6 + 8 * u64::from(ring.size), END)];
        for (from, to) in parts {
            let [ours, theirs] = [&self.ours.ring, &self.theirs.ring]
                .map(|ring| ring.bytes(from, (to - from) as usize));
            if ours != theirs {
                let i = (0..ours.len()).find(|&i| ours[i] != theirs[i]).unwrap();
                panic!(
                    "{:#x} is {:#x}, and theirs {:#x}",
                    from + i as u64,
                    ours[i],
                    theirs[i]
                );
            }
        }
    }

    /// Both asked their volumes for the same, in the same order.
    pub fn same_operations(&self) -> usize {
        let ours = self.ours.volume.take();
        assert_eq!(ours, self.theirs.volume.take());
        ours.len()
    }

    /// The volumes hold the same.
    pub fn same_contents(&mut self) {
        let [ours, theirs] = [&self.ours.volume, &self.theirs.volume].map(|volume| {
            let empty = vec![0; self.choices.shape.size as usize];
            transfer(self.reactor, volume, Kind::Read, empty)
        });
        if let Some(i) = (0..ours.len()).find(|&i| ours[i] != theirs[i]) {
            panic!(
                "byte {i} of the volume is {:#x}, and theirs {:#x}",
                ours[i], theirs[i]
            );
        }
    }
}

/// A buffer, and whether it is written or a table.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
}

impl Piece {
    pub fn data(addr: u64, len: u32, writable: bool) -> Self {
        let flags = if writable { WRITE } else { 0 };
        Self { addr, len, flags }
    }

    pub fn table(addr: u64, entries: usize) -> Self {
        Self {
            addr,
            len: 16 * entries as u32,
            flags: INDIRECT,
        }
    }
}

/// Who is woken by a channel that never wakes anybody.
struct Idle;

impl Actor for Idle {
    fn turn(&mut self, _: &mut Context<'_>) -> Turn {
        Turn::Done
    }
}

/// Reads or writes a whole volume, past its record.
fn transfer(reactor: &mut Reactor, volume: &Recorder, kind: Kind, mut data: Vec<u8>) -> Vec<u8> {
    let id = reactor.context().insert(Poll::Never, |_, _| Box::new(Idle));
    let context = OpenContext {
        waker: reactor.context().waker(id),
        uring: None,
    };
    let mut channel = volume.ram().open(&context).unwrap();
    let buffers = [IoVec::new(data.as_mut_ptr(), data.len())];
    // SAFETY: `data` and `buffers` outlive the channel's only operation, which is done below.
    #[allow(unsafe_code)]
    let buffers = unsafe { Buffers::new(&buffers) };
    let op = Op {
        tag: Tag(0),
        kind,
        offset: 0,
        len: data.len() as u64,
        buffers,
    };
    assert_eq!(channel.submit(&[op]), 1);
    channel.kick();
    let mut done = Vec::new();
    channel.poll(Instant::now(), &mut done);
    assert!(matches!(done[..], [c] if c.result == Ok(())), "{done:?}");
    data
}

/// A reactor for all scripts.
pub fn reactor() -> Reactor {
    Reactor::new(&Options::default()).unwrap()
}
