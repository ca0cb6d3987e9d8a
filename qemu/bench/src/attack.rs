//! `--attack`: how long requests of one function take while another one on its reactor is attacked.
//!
//! ```text
//!   core 0: a driver, one request at a time ------- blk0 --- reactor, core 1
//!           now and then a step of the attack ----- blk1 ---'
//! ```
//!
//! One thread does both, so that the attacker takes none of the driver's time while a request is measured.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bluff_front_end::{FrontEnd, Options, ring_features};
use bluff_virtio_driver::{
    Blk, BlkConfig, Buffer, Config, DriverQueue, Features, Memory, Request, SplitDriver,
};

const BASE: u64 = 1 << 30;
const LEN: u64 = 8 << 20;
const SIZE: u16 = 512;
/// Where no guest has memory.
const NOWHERE: u64 = 0xdead_0000_0000;
/// A request that takes longer is lost.
const STUCK: Duration = Duration::from_secs(10);

/// What the neighbour does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attack {
    /// It is attached and quiet: what the others are compared with.
    Quiet,
    /// 32 chains whose buffers lie in no memory.
    BadChains,
    /// A chain as long as the ring, bad at its end.
    LongChains,
    /// A ring whose index makes no sense, and kicks on it.
    BrokenRing,
    /// 16 kicks for nothing.
    Kicks,
    /// It goes in the middle of its requests and comes again.
    Reconnects,
}

impl Attack {
    /// All of them, the quiet one first.
    pub const ALL: [Self; 6] = [
        Self::Quiet,
        Self::BadChains,
        Self::LongChains,
        Self::BrokenRing,
        Self::Kicks,
        Self::Reconnects,
    ];

    /// How long it waits between two steps.
    fn pause(self) -> Duration {
        match self {
            // Which takes a session some milliseconds.
            Self::Reconnects => Duration::from_millis(20),
            _ => Duration::from_millis(1),
        }
    }

    /// Its name in the table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Quiet => "quiet",
            Self::BadChains => "chains without memory",
            Self::LongChains => "chains as long as the ring",
            Self::BrokenRing => "a broken ring",
            Self::Kicks => "kicks for nothing",
            Self::Reconnects => "reconnections",
        }
    }
}

/// Latencies of the function that is not attacked.
#[derive(Clone, Copy, Debug)]
pub struct Latency {
    /// The median.
    pub p50: Duration,
    /// 99 of 100 take no longer.
    pub p99: Duration,
}

/// Measures the function on `good` while the one on `bad` is attacked.
///
/// # Errors
/// Where a session is refused, or a request of the good function fails or is lost.
pub fn measure(good: &Path, bad: &Path, attack: Attack, span: Duration) -> Result<Latency> {
    let (_front, mut blk) = victim(good)?;
    let mut attacker = Attacker::new(bad, attack)?;
    let (start, mut next) = (Instant::now(), Instant::now());
    let mut taken = Vec::with_capacity(1 << 21);
    loop {
        let begun = Instant::now();
        if begun - start >= span {
            break;
        }
        if begun >= next {
            attacker.step()?;
            next = begun + attack.pause();
            continue;
        }
        blk.submit(Request::In { sector: 0 })?;
        blk.publish();
        while blk.poll()?.is_none() {
            ensure!(begun.elapsed() < STUCK, "a request is lost");
        }
        taken.push(begun.elapsed());
    }
    taken.sort_unstable();
    let at = |share: f64| taken[(taken.len() as f64 * share) as usize];
    ensure!(taken.len() >= 1000, "too few requests");
    Ok(Latency {
        p50: at(0.50),
        p99: at(0.99),
    })
}

type Queue = SplitDriver;

fn attach(path: &Path) -> Result<(FrontEnd, Arc<Memory>, Queue)> {
    let memory = Memory::flat(BASE, LEN)?;
    memory.populate();
    let features = Features::default();
    let options = Options {
        queue_size: SIZE,
        ..Options::new(ring_features(features, false))
    };
    let mut front = FrontEnd::connect(path, &memory, options).context("the session")?;
    let mut queue = SplitDriver::new(&memory, &Config::new(SIZE, features))?;
    queue.disable_interrupts();
    front.start(0, &queue, 0)?;
    Ok((front, memory, queue))
}

fn victim(path: &Path) -> Result<(FrontEnd, Blk<Queue>)> {
    let (front, memory, queue) = attach(path)?;
    let blk = Blk::new(&memory, queue, BlkConfig::default())?;
    Ok((front, blk))
}

struct Attacker<'a> {
    attack: Attack,
    path: &'a Path,
    front: FrontEnd,
    queue: Queue,
    status: u64,
}

impl<'a> Attacker<'a> {
    fn new(path: &'a Path, attack: Attack) -> Result<Self> {
        let (front, memory, queue) = attach(path)?;
        let status = memory.alloc(1, 1)?;
        if attack == Attack::BrokenRing {
            // The index of the driver's area (virtio 1.3 §2.7.6).
            memory.write(queue.layout().driver + 2, &(2 * SIZE).to_le_bytes())?;
        }
        Ok(Self {
            attack,
            path,
            front,
            queue,
            status,
        })
    }

    fn step(&mut self) -> Result<()> {
        while self.queue.pop_used()?.is_some() {}
        let (nowhere, status) = (
            Buffer::readable(NOWHERE, 16),
            Buffer::writable(self.status, 1),
        );
        match self.attack {
            Attack::Quiet => return Ok(()),
            Attack::BadChains => self.offer(&[nowhere, status], 32),
            Attack::LongChains => {
                let mut chain = vec![Buffer::readable(BASE, 1); usize::from(SIZE) - 2];
                chain.extend([nowhere, status]);
                self.offer(&chain, 1);
            }
            Attack::BrokenRing => self.front.kick(0),
            Attack::Kicks => (0..16).for_each(|_| self.front.kick(0)),
            Attack::Reconnects => {
                self.offer(&[nowhere, status], 32);
                self.front.disconnect();
                // It is refused until the old session has ended.
                let start = Instant::now();
                *self = loop {
                    match Self::new(self.path, self.attack) {
                        Ok(new) => break new,
                        Err(e) => ensure!(start.elapsed() < STUCK, "it cannot come again: {e}"),
                    }
                };
            }
        }
        Ok(())
    }

    fn offer(&mut self, chain: &[Buffer], count: usize) {
        for _ in 0..count {
            if self.queue.add(chain, false, 0).is_err() {
                break;
            }
        }
        if self.queue.publish() {
            self.front.kick(0);
        }
    }
}
