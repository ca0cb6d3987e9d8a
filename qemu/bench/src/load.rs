//! The driver's side of a measurement.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bluff_front_end::{FrontEnd, Options, ring_features};
use bluff_virtio_driver::{
    Blk, BlkConfig, Config, DriverQueue, Features, IdealConfig, IdealDevice, Memory, PackedDriver,
    Pattern, Request, SplitDriver,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::rows::{READ, Work};

/// Where the guest's memory begins.
const BASE: u64 = 1 << 30;
/// Descriptors of a queue: room for 128 chains of three.
const SIZE: u16 = 512;
/// What is done before the measurement begins.
const WARM: Duration = Duration::from_millis(50);
/// A back end that has not completed anything for so long is broken.
const STUCK: Duration = Duration::from_secs(10);

/// Pins the calling thread.
pub fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    Ok(sched_setaffinity(None, &set)?)
}

/// Requests in a span.
#[derive(Clone, Copy, Debug)]
pub struct Count {
    /// How many.
    pub requests: u64,
    /// The span.
    pub span: Duration,
}

fn memory(work: &Work) -> Result<(Arc<Memory>, u64)> {
    let data = u64::from(work.len) * u64::from(work.depth) * u64::from(work.queues);
    let len = (data + (4 << 20)).next_multiple_of(2 << 20);
    let memory = Memory::flat(BASE, len)?;
    memory.populate();
    Ok((memory, len))
}

fn blk<Q: DriverQueue>(
    memory: &Arc<Memory>,
    queue: Q,
    work: &Work,
    bytes: u64,
    seed: u64,
) -> Result<Blk<Q>> {
    let config = BlkConfig {
        depth: work.depth,
        request_len: work.len,
        segments: 1,
        capacity: bytes / 512,
        pattern: if work.random {
            Pattern::Random
        } else {
            Pattern::Sequential
        },
        read_percent: if work.write { 0 } else { 100 },
        indirect: false,
        seed,
    };
    Ok(Blk::new(memory, queue, config)?)
}

/// Drives the queues until `span` is over; `wait` is called when the driver would sleep.
fn drive<Q: DriverQueue>(
    blks: &mut [Blk<Q>],
    span: Duration,
    kick: impl Fn(usize),
    wait: Option<&dyn Fn() -> Result<()>>,
) -> Result<Count> {
    let start = Instant::now();
    let (mut requests, mut spins, mut last) = (0u64, 0u32, (0u64, start));
    loop {
        let mut step = 0;
        for (i, blk) in blks.iter_mut().enumerate() {
            let did = blk.step()?;
            step += u64::from(did.completed);
            if did.kick {
                kick(i);
            }
        }
        requests += step;
        if step == 0
            && let Some(wait) = wait
            && !blks
                .iter_mut()
                .fold(false, |there, b| there | b.queue().enable_interrupts())
        {
            wait()?;
            blks.iter_mut().for_each(|b| b.queue().disable_interrupts());
        }
        spins += 1;
        if spins.is_multiple_of(64) || wait.is_some() {
            let now = Instant::now();
            if now - start >= span {
                return Ok(Count {
                    requests,
                    span: now - start,
                });
            }
            if requests != last.0 {
                last = (requests, now);
            }
            ensure!(now - last.1 < STUCK, "nothing was completed for {STUCK:?}");
        }
    }
}

fn finish<Q: DriverQueue>(blks: &mut [Blk<Q>], kick: impl Fn(usize)) -> Result<()> {
    let start = Instant::now();
    for (i, blk) in blks.iter_mut().enumerate() {
        kick(i);
        while blk.in_flight() > 0 {
            blk.drain()?;
            ensure!(start.elapsed() < STUCK, "requests are not finished");
        }
    }
    Ok(())
}

/// Measures a back end that listens on `socket`. `before` and `after` are called around the span that
/// counts.
pub fn vhost_user(
    socket: &Path,
    work: &Work,
    packed: bool,
    span: Duration,
    mut around: impl FnMut() -> Result<()>,
) -> Result<Count> {
    let (memory, _) = memory(work)?;
    let features = Features {
        event_idx: work.sleeps,
        indirect: false,
        in_order: false,
    };
    let options = Options {
        queues: work.queues,
        queue_size: SIZE,
        ..Options::new(ring_features(features, packed))
    };
    let mut front = FrontEnd::connect(socket, &memory, options).context("the session")?;
    let capacity = front.config(60)?[..8].try_into().map(u64::from_le_bytes)?;
    let bytes = capacity.saturating_mul(512);
    let config = Config::new(SIZE, features);
    // Generic from here on: a boxed queue would cost the driver more than the device takes.
    if packed {
        let new = || Ok(PackedDriver::new(&memory, &config)?);
        let base = |queue: &PackedDriver| queue.positions().packed_base();
        let mut blks = start(&mut front, &memory, work, bytes, new, base)?;
        run(&front, &mut blks, work, span, &mut around)
    } else {
        let new = || Ok(SplitDriver::new(&memory, &config)?);
        let base = |queue: &SplitDriver| queue.positions().split_base();
        let mut blks = start(&mut front, &memory, work, bytes, new, base)?;
        run(&front, &mut blks, work, span, &mut around)
    }
}

/// Attaches a front end to each socket, has each function do one read, and calls `measure` while all of them
/// have nothing to do.
pub fn idle(
    sockets: impl ExactSizeIterator<Item = PathBuf>,
    measure: impl FnOnce() -> Result<f64>,
) -> Result<f64> {
    let features = Features {
        event_idx: true,
        ..Features::default()
    };
    let work = Work {
        queues: sockets.len() as u16,
        ..READ
    };
    let (memory, _) = memory(&work)?;
    let options = Options {
        queue_size: SIZE,
        ..Options::new(ring_features(features, false))
    };
    let mut attached = Vec::new();
    for socket in sockets {
        let mut front = FrontEnd::connect(&socket, &memory, options)?;
        let mut queue = SplitDriver::new(&memory, &Config::new(SIZE, features))?;
        queue.enable_interrupts();
        front.start(0, &queue, 0)?;
        let mut one = blk(&memory, queue, &work, 1 << 40, 1)?;
        one.submit(Request::In { sector: 0 })?;
        one.publish();
        let start = Instant::now();
        front.kick(0);
        while one.poll()?.is_none() {
            ensure!(start.elapsed() < STUCK, "the first read is not finished");
        }
        attached.push((front, one));
    }
    measure()
}

/// Starts the work's queues and puts a load on each.
fn start<Q: DriverQueue>(
    front: &mut FrontEnd,
    memory: &Arc<Memory>,
    work: &Work,
    bytes: u64,
    new: impl Fn() -> Result<Q>,
    base: impl Fn(&Q) -> u32,
) -> Result<Vec<Blk<Q>>> {
    let mut blks = Vec::new();
    for i in 0..work.queues {
        let mut queue = new()?;
        // Who polls wants no notification, and the back end should not pay for any.
        queue.disable_interrupts();
        front.start(i, &queue, base(&queue)).context("a queue")?;
        blks.push(blk(memory, queue, work, bytes, u64::from(i) + 1)?);
    }
    Ok(blks)
}

fn run<Q: DriverQueue>(
    front: &FrontEnd,
    blks: &mut [Blk<Q>],
    work: &Work,
    span: Duration,
    around: &mut impl FnMut() -> Result<()>,
) -> Result<Count> {
    let kick = |i: usize| front.kick(i as u16);
    let sleep = || {
        let events: Vec<_> = (0..work.queues).map(|i| front.events(i)).collect();
        let mut fds: Vec<_> = events
            .iter()
            .map(|e| PollFd::from_borrowed_fd(borrow(&e.call), PollFlags::IN))
            .collect();
        let limit = rustix::time::Timespec {
            tv_sec: 10,
            tv_nsec: 0,
        };
        ensure!(poll(&mut fds, Some(&limit))? > 0, "no notification came");
        for e in events {
            let _ = e.call.read();
        }
        Ok(())
    };
    let wait: Option<&dyn Fn() -> Result<()>> = if work.sleeps { Some(&sleep) } else { None };
    drive(blks, WARM, kick, wait)?;
    around()?;
    let count = drive(blks, span, kick, wait)?;
    around()?;
    finish(blks, kick)?;
    Ok(count)
}

fn borrow(fd: &impl std::os::fd::AsRawFd) -> std::os::fd::BorrowedFd<'_> {
    // SAFETY: borrowed from `fd`, which outlives the borrow.
    #[allow(unsafe_code)]
    unsafe {
        std::os::fd::BorrowedFd::borrow_raw(fd.as_raw_fd())
    }
}

/// Measures the ideal ring, on a thread pinned to `cpu`.
pub fn ideal(work: &Work, span: Duration, cpu: usize) -> Result<Count> {
    let (memory, len) = memory(work)?;
    let config = Config::new(SIZE, Features::default());
    let (mut blks, mut devices) = (Vec::new(), Vec::new());
    for i in 0..work.queues {
        let queue = SplitDriver::new(&memory, &config)?;
        let ideal = IdealConfig {
            guest: (BASE, len),
            layout: queue.layout(),
            size: SIZE,
            event_idx: false,
            start: 0,
        };
        devices.push(IdealDevice::new(&memory, &ideal)?);
        blks.push(blk(&memory, queue, work, 1 << 40, u64::from(i) + 1)?);
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let device = scope.spawn(|| {
            pin(cpu)?;
            while !stop.load(Ordering::Relaxed) {
                for device in &mut devices {
                    device.poll();
                }
            }
            anyhow::Ok(())
        });
        let measured = drive(&mut blks, WARM, |_| {}, None)
            .and_then(|_| drive(&mut blks, span, |_| {}, None))
            .and_then(|count| finish(&mut blks, |_| {}).map(|()| count));
        stop.store(true, Ordering::Relaxed);
        device.join().expect("the ideal device does not panic")?;
        measured
    })
}

/// Does `one` again and again on a thread pinned to `cpu`: nothing but what is given. It is told which of the
/// requests in flight it is, counted from 0.
pub fn alone(
    work: &Work,
    span: Duration,
    cpu: usize,
    mut one: impl FnMut(usize) -> Result<()> + Send,
) -> Result<Count> {
    let repeat = || {
        pin(cpu)?;
        let start = Instant::now();
        let mut requests = 0u64;
        for slot in (0..usize::from(work.depth)).cycle() {
            one(slot)?;
            requests += 1;
            if requests.is_multiple_of(64) && start.elapsed() >= span {
                break;
            }
        }
        anyhow::Ok(Count {
            requests,
            span: start.elapsed(),
        })
    };
    std::thread::scope(|scope| scope.spawn(repeat).join().expect("it does not panic"))
}

/// Copies the work's buffers out of as much memory as a ram volume has.
pub fn memcpy(work: &Work, span: Duration, cpu: usize, volume: usize) -> Result<Count> {
    let len = work.len as usize;
    let from = vec![1u8; volume];
    let mut to = vec![0u8; len * usize::from(work.depth)];
    let mut from = from.chunks_exact(len).cycle();
    alone(work, span, cpu, |slot| {
        let to = &mut to[slot * len..][..len];
        to.copy_from_slice(std::hint::black_box(from.next().context("a chunk")?));
        std::hint::black_box(to);
        Ok(())
    })
}

/// Reads or writes the work's buffers in a file, with a system call for each.
pub fn calls(work: &Work, span: Duration, cpu: usize, file: &Path) -> Result<Count> {
    let file = File::options().read(true).write(true).open(file)?;
    let len = work.len as usize;
    let blocks = file.metadata()?.len() / u64::from(work.len);
    let mut buffers = vec![1u8; len * usize::from(work.depth)];
    let mut n = 0u64;
    alone(work, span, cpu, |slot| {
        let buffer = &mut buffers[slot * len..][..len];
        n = if work.random {
            // Knuth's generator for 64 bits; the upper ones are the good ones.
            n.wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407)
        } else {
            n.wrapping_add(1 << 32)
        };
        let at = (n >> 32) % blocks * u64::from(work.len);
        if work.write {
            file.write_all_at(buffer, at)?;
        } else {
            file.read_exact_at(buffer, at)?;
        }
        Ok(())
    })
}
