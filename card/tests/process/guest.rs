//! A guest that writes and reads at random, and knows what it has to find.
//!
//! At most one request for a block is in flight at a time, so a read finds exactly what was written last.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bluff_front_end::{FrontEnd, Options, ring_features};
use bluff_testing::Chance;
use bluff_virtio_driver::{
    Blk, BlkConfig, Config, DriverQueue, Features, Memory, PackedDriver, Request, SplitDriver,
    Status,
};
use rustix::event::{PollFd, PollFlags};

const BLOCK: u64 = 4096;
const DEPTH: u16 = 32;
const SIZE: u16 = 128;
/// A card that completes nothing for so long has lost something.
const STUCK: Duration = Duration::from_secs(30);

/// How a guest drives its disk.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    pub packed: bool,
    /// Whether the front end has in-flight regions.
    pub inflight: bool,
}

pub const KINDS: [Kind; 4] = {
    const fn kind(packed: bool, inflight: bool) -> Kind {
        Kind { packed, inflight }
    }
    [
        kind(false, false),
        kind(false, true),
        kind(true, false),
        kind(true, true),
    ]
};

/// What other threads see of a guest, and tell it.
#[derive(Debug, Default)]
pub struct Shared {
    pub completed: AtomicU64,
    /// The longest time without a completion, in microseconds; whoever looks sets it back.
    pub gap_us: AtomicU64,
    pub stop: AtomicBool,
}

struct Queue {
    blk: Blk<Box<dyn DriverQueue + Send>>,
    /// What each slot is about.
    slots: Vec<(u64, u32)>,
}

pub struct Guest {
    pub front: FrontEnd,
    memory: Arc<Memory>,
    queues: Vec<Queue>,
    /// By block: the number of what was written last, and whether a request is under way.
    blocks: Vec<(u32, bool)>,
    chance: Chance,
    pub shared: Arc<Shared>,
}

impl Guest {
    /// Connects and starts two queues.
    pub fn connect(socket: &Path, kind: Kind, blocks: u64, seed: u64) -> Self {
        let memory = Memory::flat(1 << 30, 2 << 20).unwrap();
        let features = Features {
            event_idx: true,
            indirect: true,
            in_order: false,
        };
        let options = Options {
            queues: 2,
            queue_size: SIZE,
            inflight: kind.inflight,
            ..Options::new(ring_features(features, kind.packed))
        };
        let mut front = FrontEnd::connect(socket, &memory, options).unwrap();
        let config = Config {
            indirect_entries: 3,
            ..Config::new(SIZE, features)
        };
        let queues = (0..2).map(|index| {
            let (queue, base): (Box<dyn DriverQueue + Send>, u32) = if kind.packed {
                let queue = PackedDriver::new(&memory, &config).unwrap();
                let base = queue.positions().packed_base();
                (Box::new(queue), base)
            } else {
                let queue = SplitDriver::new(&memory, &config).unwrap();
                let base = queue.positions().split_base();
                (Box::new(queue), base)
            };
            front.start(index, &*queue, base).unwrap();
            let config = BlkConfig {
                depth: DEPTH,
                capacity: blocks * BLOCK / 512,
                indirect: index == 1,
                ..BlkConfig::default()
            };
            Queue {
                blk: Blk::new(&memory, queue, config).unwrap(),
                slots: vec![(0, 0); DEPTH.into()],
            }
        });
        let queues = queues.collect();
        Self {
            front,
            memory,
            queues,
            blocks: vec![(0, false); blocks as usize],
            chance: Chance::new(seed),
            shared: Arc::default(),
        }
    }

    /// What was written last to each block.
    pub fn written(&self) -> Vec<u32> {
        self.blocks.iter().map(|(number, _)| *number).collect()
    }

    /// Finds what another guest has written.
    pub fn go_on_from(&mut self, written: &[u32]) {
        for (block, number) in self.blocks.iter_mut().zip(written) {
            block.0 = *number;
        }
    }

    /// Reads and writes until so many requests are completed, then waits for what is in flight.
    pub fn run(&mut self, enough: impl Fn(u64) -> bool) {
        let mut last = Instant::now();
        loop {
            let stopping = enough(self.shared.completed.load(Ordering::Relaxed));
            let mut completed = 0;
            let mut in_flight = 0;
            for index in 0..self.queues.len() {
                completed += self.take(index);
                if !stopping {
                    self.fill(index);
                }
                in_flight += self.queues[index].blk.in_flight();
            }
            if completed > 0 {
                let gap = last.elapsed().as_micros() as u64;
                last = Instant::now();
                self.shared.gap_us.fetch_max(gap, Ordering::Relaxed);
                self.shared
                    .completed
                    .fetch_add(completed, Ordering::Relaxed);
            }
            if stopping && in_flight == 0 {
                return;
            }
            assert!(last.elapsed() < STUCK, "{in_flight} requests are lost");
            self.sleep();
        }
    }

    /// Until a notification comes, unless there is something already. One that is lost is found out.
    fn sleep(&mut self) {
        let there = self.queues.iter_mut().fold(false, |there, queue| {
            there | queue.blk.queue().enable_interrupts()
        });
        if there {
            return;
        }
        let events: Vec<_> = (0..2).map(|i| self.front.events(i)).collect();
        let mut fds: Vec<_> = events
            .iter()
            .map(|e| PollFd::from_borrowed_fd(borrow(&e.call), PollFlags::IN))
            .collect();
        let limit = STUCK.try_into().unwrap();
        let came = rustix::event::poll(&mut fds, Some(&limit)).unwrap();
        assert!(came > 0, "a notification is lost");
        for event in events {
            let _ = event.call.read();
        }
    }

    fn take(&mut self, index: usize) -> u64 {
        let mut count = 0;
        loop {
            let queue = &mut self.queues[index];
            // The driver's side finds what completes twice, or was never asked for.
            let Some(done) = queue.blk.poll().unwrap() else {
                return count;
            };
            count += 1;
            assert_eq!(done.status, Status::Ok, "{:?}", done.request);
            let (block, number) = queue.slots[usize::from(done.slot)];
            match done.request {
                Request::In { .. } => {
                    let mut data = vec![0; BLOCK as usize];
                    self.memory
                        .read(queue.blk.data_addr(done.slot), &mut data)
                        .unwrap();
                    check(block, number, &data);
                }
                Request::Out { .. } => {}
                Request::Flush => continue,
                other => panic!("{other:?}"),
            }
            self.blocks[block as usize].1 = false;
        }
    }

    fn fill(&mut self, index: usize) {
        while let Some(slot) = self.queues[index].blk.next_slot() {
            let block = self.chance.below(self.blocks.len() as u64);
            let sector = block * BLOCK / 512;
            let request = match self.chance.below(16) {
                0 => Request::Flush,
                _ if self.blocks[block as usize].1 => continue,
                1..8 => Request::In { sector },
                _ => Request::Out { sector },
            };
            if request != Request::Flush {
                let state = &mut self.blocks[block as usize];
                state.1 = true;
                state.0 += u32::from(matches!(request, Request::Out { .. }));
                let number = state.0;
                let queue = &mut self.queues[index];
                queue.slots[usize::from(slot)] = (block, number);
                let data = match request {
                    Request::Out { .. } => content(block, number),
                    // Nothing that a read could be taken for.
                    _ => vec![0xa5; BLOCK as usize],
                };
                self.memory.write(queue.blk.data_addr(slot), &data).unwrap();
            }
            self.queues[index].blk.submit(request).unwrap();
        }
        if self.queues[index].blk.publish() {
            self.front.kick(index as u16);
        }
    }

    /// Whether the connection still stands.
    pub fn is_connected(&self) -> bool {
        let mut fds = [PollFd::new(self.front.stream(), PollFlags::RDHUP)];
        let now = Duration::ZERO.try_into().unwrap();
        rustix::event::poll(&mut fds, Some(&now)).unwrap() == 0
    }

    /// What the volume holds is what was written.
    pub fn check_disk(&self, disk: &Path) {
        let bytes = std::fs::read(disk).unwrap();
        for (block, (number, _)) in self.blocks.iter().enumerate() {
            let data = &bytes[block * BLOCK as usize..][..BLOCK as usize];
            check(block as u64, *number, data);
        }
    }
}

fn content(block: u64, number: u32) -> Vec<u8> {
    if number == 0 {
        return vec![0; BLOCK as usize];
    }
    let word = (block << 32 | u64::from(number)).to_le_bytes();
    word.repeat(BLOCK as usize / 8)
}

fn check(block: u64, number: u32, data: &[u8]) {
    let found = u64::from_le_bytes(data[..8].try_into().unwrap());
    assert!(
        data == content(block, number),
        "block {block} holds {found:#x} and not write {number}"
    );
}

fn borrow(fd: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: borrowed from `fd`, which outlives the borrow.
    #[allow(unsafe_code)]
    unsafe {
        BorrowedFd::borrow_raw(fd.as_raw_fd())
    }
}
