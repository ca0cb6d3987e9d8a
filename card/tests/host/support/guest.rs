//! A guest without a VM: its memory, its rings, a load that the checker judges.
//!
//! It is as strict as a kernel's driver: it sleeps until it is interrupted, and notifies only when it is asked to. An
//! interrupt or a notification that gets lost is a test that hangs until its limit.
//!
//! Unsafe, because the events are waited for by their numbers.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bluff_front_end::{Error, FrontEnd, Options, ring_features};
use bluff_testing::Chance;
use bluff_virtio_driver::{
    BlkConfig, Completion, Config, DriverQueue, Features, Memory, PackedDriver, Position,
    Positions, RegionConfig, Request, SplitDriver, Status,
};
use rustix::event::{PollFd, PollFlags};

use super::LIMIT;
use super::checker::{BLOCK, Checker};

pub type Blk = bluff_virtio_driver::Blk<Box<dyn DriverQueue>>;

/// Requests in flight in one queue at most.
pub const SLOTS: u16 = 128;
/// Descriptors of a queue.
const RING: u16 = 512;
/// Sectors of a block.
pub const SECTORS: u64 = (BLOCK / 512) as u64;
const WRITE_ZEROES: u64 = 1 << 14;
const FLUSH: u64 = 1 << 9;
/// What a guest's buffers hold before something is read into them.
const POISON: [u8; BLOCK] = [0xa5; BLOCK];

/// The region of rings and requests, and where status bytes lie.
pub const RINGS: usize = 0;
/// The region of data.
pub const DATA: usize = 1;
/// A region that nothing lies in.
pub const SPARE: usize = 2;

/// What a guest negotiates.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub packed: bool,
    pub event_idx: bool,
    pub indirect: bool,
    pub queues: u16,
    /// Whether requests in flight are recorded.
    pub inflight: bool,
}

impl Shape {
    pub const SPLIT: Self = Self {
        packed: false,
        event_idx: true,
        indirect: false,
        queues: 2,
        inflight: true,
    };
    pub const PACKED: Self = Self {
        packed: true,
        ..Self::SPLIT
    };
    pub const BOTH: [Self; 2] = [Self::SPLIT, Self::PACKED];

    pub fn without_inflight(self) -> Self {
        Self {
            inflight: false,
            ..self
        }
    }

    fn features(&self) -> Features {
        Features {
            event_idx: self.event_idx,
            indirect: self.indirect,
            in_order: false,
        }
    }

    fn queue(&self, memory: &Arc<Memory>) -> Box<dyn DriverQueue> {
        let mut config = Config::new(RING, self.features());
        config.indirect_entries = if self.indirect { 4 } else { 0 };
        match self.packed {
            true => Box::new(PackedDriver::new(memory, &config).unwrap()),
            false => Box::new(SplitDriver::new(memory, &config).unwrap()),
        }
    }

    /// The base of a queue that stands at its beginning.
    fn first_base(&self) -> u32 {
        let start = Positions {
            avail: Position::default(),
            used: Position::default(),
        };
        if self.packed { start.packed_base() } else { 0 }
    }
}

/// A guest with its front end.
pub struct Guest {
    pub memory: Arc<Memory>,
    pub front_end: FrontEnd,
    pub blks: Vec<Blk>,
    shape: Shape,
    chance: Chance,
    /// Whether requests may fail.
    pub may_fail: bool,
    /// How the last requests ended, if they are watched.
    pub ended: Option<Vec<Completion>>,
}

/// Memory of a guest: rings and data apart.
pub fn new_memory() -> Arc<Memory> {
    let region = |guest_addr, size| RegionConfig {
        guest_addr,
        size,
        file_offset: 0,
    };
    Memory::new(&[
        region(0, 256 << 10),
        region(1 << 20, 2 << 20),
        region(1 << 32, 1 << 20),
    ])
    .unwrap()
}

impl Guest {
    /// A guest whose front end is connected, and whose queues run.
    pub fn start(socket: &Path, shape: Shape) -> Self {
        let mut guest = Self::connect(socket, shape).unwrap();
        guest.start_queues();
        guest
    }

    /// A guest whose front end is connected.
    pub fn connect(socket: &Path, shape: Shape) -> Result<Self, Error> {
        let memory = new_memory();
        let mut options = Options::new(ring_features(shape.features(), shape.packed));
        options.queues = shape.queues;
        options.queue_size = RING;
        options.inflight = shape.inflight;
        let front_end = FrontEnd::connect(socket, &memory, options)?;
        let config = BlkConfig {
            depth: SLOTS,
            indirect: shape.indirect,
            ..BlkConfig::default()
        };
        let blk = |_| Blk::new(&memory, shape.queue(&memory), config).unwrap();
        Ok(Self {
            blks: (0..shape.queues).map(blk).collect(),
            memory,
            front_end,
            shape,
            chance: Chance::new(7),
            may_fail: false,
            ended: None,
        })
    }

    /// Starts every queue at its beginning.
    pub fn start_queues(&mut self) {
        for i in 0..self.shape.queues {
            let base = self.shape.first_base();
            self.start_queue(i, base).unwrap();
        }
    }

    pub fn start_queue(&mut self, index: u16, base: u32) -> Result<(), Error> {
        let queue = self.blks[usize::from(index)].queue();
        self.front_end.start(index, queue, base)
    }

    /// Connects to a daemon that was started after the one before died, and goes on.
    pub fn reconnect(&mut self, socket: &Path) -> Result<(), Error> {
        self.front_end.reconnect(socket)
    }

    /// Starts every queue where it was when the daemon died.
    pub fn recover_queues(&mut self) -> Result<(), Error> {
        for i in 0..self.shape.queues {
            let queue = self.blks[usize::from(i)].queue();
            let base = self.front_end.recovery_base(i, queue)?;
            self.start_queue(i, base)?;
        }
        Ok(())
    }

    /// Ends the connection in the middle of everything, makes another and goes on, as a front end does that knows its
    /// back end to keep the requests in flight.
    pub fn hang_up_and_come_back(&mut self, socket: &Path) {
        self.front_end.disconnect();
        self.reconnect(socket).unwrap();
        self.recover_queues().unwrap();
    }

    /// GET_VRING_BASE, and a start from there.
    pub fn stop_and_start(&mut self, index: u16) {
        let base = self.front_end.stop(index).unwrap();
        self.start_queue(index, base).unwrap();
    }

    /// RESET_DEVICE; then the driver begins anew.
    pub fn reset(&mut self, checker: &mut Checker) {
        self.front_end.reset().unwrap();
        checker.abandon();
        self.begin_anew();
    }

    /// Forgets what was in flight, and starts every queue at its beginning.
    pub fn begin_anew(&mut self) {
        for blk in &mut self.blks {
            blk.restart();
        }
        self.start_queues();
    }

    pub fn in_flight(&self) -> usize {
        self.blks.iter().map(|b| usize::from(b.in_flight())).sum()
    }

    /// Takes what came back; says how much that was.
    pub fn take(&mut self, checker: &mut Checker) -> u64 {
        let mut taken = 0;
        for (q, blk) in self.blks.iter_mut().enumerate() {
            while let Some(completion) = blk.poll().expect("the device keeps the rules") {
                let Completion {
                    slot,
                    request,
                    status,
                    ..
                } = completion;
                let ok = status == Status::Ok;
                assert!(ok || self.may_fail, "{request:?} ends with {status:?}");
                let addr = blk.data_addr(slot);
                checker.end((q as u16, slot), ok, || {
                    let mut data = vec![0; BLOCK];
                    self.memory.read(addr, &mut data).unwrap();
                    data
                });
                if let Some(ended) = &mut self.ended {
                    ended.push(completion);
                }
                taken += 1;
            }
        }
        taken
    }

    /// Adds one request to a queue, unpublished.
    pub fn submit(&mut self, checker: &mut Checker, queue: u16, request: Request) {
        let blk = &mut self.blks[usize::from(queue)];
        let slot = blk.next_slot().expect("a free slot");
        let (token, data) = ((queue, slot), blk.data_addr(slot));
        match request {
            Request::In { sector } => {
                self.memory.write(data, &POISON).unwrap();
                checker.begin_read(token, sector / SECTORS);
            }
            Request::Out { sector } => {
                let content = checker.begin_write(token, sector / SECTORS);
                self.memory.write(data, &content).unwrap();
            }
            Request::WriteZeroes {
                sector, sectors, ..
            } => {
                assert_eq!(
                    u64::from(sectors),
                    SECTORS,
                    "the checker knows whole blocks"
                );
                checker.begin_zeroes(token, sector / SECTORS);
            }
            Request::Flush => checker.begin_flush(token),
            other => panic!("the checker knows nothing of {other:?}"),
        }
        blk.submit(request).unwrap();
    }

    /// Makes what was submitted visible, and notifies the device if it wants that.
    pub fn publish(&mut self) {
        for (q, blk) in self.blks.iter_mut().enumerate() {
            if blk.publish() {
                self.front_end.kick(q as u16);
            }
        }
    }

    /// Keeps `depth` requests of all kinds in flight in each queue.
    pub fn fill(&mut self, checker: &mut Checker, depth: u16) {
        for queue in 0..self.shape.queues {
            while self.blks[usize::from(queue)].in_flight() < depth {
                let request = self.any_request(checker.blocks());
                self.submit(checker, queue, request);
            }
        }
        self.publish();
    }

    fn any_request(&mut self, blocks: u64) -> Request {
        // A part of them goes where others go, so that they meet.
        let span = if self.chance.below(4) == 0 {
            blocks.min(16)
        } else {
            blocks
        };
        let sector = self.chance.below(span) * SECTORS;
        let features = self.front_end.features();
        match self.chance.below(100) {
            0..5 if features & FLUSH != 0 => Request::Flush,
            5..10 if features & WRITE_ZEROES != 0 => Request::WriteZeroes {
                sector,
                sectors: SECTORS as u32,
                unmap: self.chance.below(2) == 0,
            },
            10..55 => Request::In { sector },
            _ => Request::Out { sector },
        }
    }

    /// Sleeps until an interrupt comes, or something has come back already. Whether it did, within `limit`.
    pub fn wait(&mut self, limit: Duration) -> bool {
        let mut there = false;
        for blk in &mut self.blks {
            there |= blk.queue().enable_interrupts();
        }
        let mut interrupted = there;
        if !there {
            let fds = (0..self.shape.queues).map(|q| {
                let fd = self.front_end.events(q).call.as_raw_fd();
                borrow(fd)
            });
            let mut fds: Vec<_> = fds
                .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
                .collect();
            let limit = limit.try_into().unwrap();
            interrupted = rustix::event::poll(&mut fds, Some(&limit)).unwrap() > 0;
        }
        for (q, blk) in self.blks.iter_mut().enumerate() {
            blk.queue().disable_interrupts();
            // Nothing to read where another queue's is what came.
            let _ = self.front_end.events(q as u16).call.read();
        }
        interrupted
    }

    /// Takes at least one completion.
    pub fn take_some(&mut self, checker: &mut Checker) -> u64 {
        let start = Instant::now();
        loop {
            match self.take(checker) {
                0 => {}
                taken => return taken,
            }
            if !self.wait(LIMIT) {
                let found = self.take(checker);
                panic!(
                    "no interrupt; {found} requests have come back without one, {} are in flight",
                    self.in_flight()
                );
            }
            assert!(start.elapsed() < 2 * LIMIT, "interrupts for nothing");
        }
    }

    /// Runs the load until so many requests have come back.
    pub fn run(&mut self, checker: &mut Checker, completions: u64, depth: u16) {
        let mut done = 0;
        while done < completions {
            self.fill(checker, depth);
            done += self.take_some(checker);
        }
    }

    /// Waits until all has come back.
    pub fn settle(&mut self, checker: &mut Checker) {
        while self.in_flight() > 0 {
            self.take_some(checker);
        }
        assert_eq!(checker.in_flight(), 0);
    }

    /// Flushes, and waits for it and for all before it.
    pub fn flush(&mut self, checker: &mut Checker) {
        self.submit(checker, 0, Request::Flush);
        self.publish();
        self.settle(checker);
    }

    /// All that lies in the region of data.
    pub fn data(&self) -> Vec<u8> {
        let region = self.memory.regions()[DATA].config();
        let mut data = vec![0; region.size as usize];
        self.memory.read(region.guest_addr, &mut data).unwrap();
        data
    }

    /// Waits until all has come back, and reads everything.
    pub fn verify(&mut self, checker: &mut Checker) {
        self.settle(checker);
        for block in 0..checker.blocks() {
            let queue = (block % u64::from(self.shape.queues)) as u16;
            while self.blks[usize::from(queue)].in_flight() == SLOTS {
                self.publish();
                self.take_some(checker);
            }
            let sector = block * SECTORS;
            self.submit(checker, queue, Request::In { sector });
        }
        self.publish();
        self.settle(checker);
    }
}

/// A descriptor of the guest's, for as long as a wait lasts.
fn borrow(fd: i32) -> BorrowedFd<'static> {
    // SAFETY: the events that own it are not replaced while the guest waits.
    unsafe { BorrowedFd::borrow_raw(fd) }
}
