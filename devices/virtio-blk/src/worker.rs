//! The worker of one queue: chains in, operations out, completions back.
//!
//! Unsafe, because operations name the buffers of chains.
#![allow(unsafe_code)]

mod control;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use bluff_block::{
    BlockError, Buffers, ChannelHandle, Completion, Geometry, InUse, Kind, Op, Volume,
};
use bluff_reactor::{Actor, Context, Event, Turn};
use bluff_virtio::inflight::InflightQueue;
use bluff_virtio::{
    Chain, DeviceEvent, Limits, Notice, Notifier, Pop, Position, Queue, QueueSetup, Ring,
    RingError, with_ring,
};
use vmm_sys_util::eventfd::EventFd;

use crate::config::SEG_MAX;
use crate::counters::{QueueCounters, add};
use crate::request::{self, Mode, RangeOp, Refused, Request};
use crate::slots::{Class, Slots};
use crate::spec::{ID_LEN, status};
pub(crate) use control::{Message, drops};
use control::{Revocation, State};

/// Chains taken from a ring in one turn.
const CHAINS: usize = 32;
/// Bytes after which a turn takes no more chains.
const BYTES: u64 = 1 << 20;
/// What a descriptor counts: a chain of as many as a ring has is a turn of its own.
const DESCRIPTOR: u64 = 256;
/// How often a ring without a kick descriptor is looked at while it is idle.
const UNTOLD: Duration = Duration::from_millis(1);
/// The token of the kick descriptor.
const KICK: u16 = 0;

/// What all workers of a device share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) volume: Arc<dyn Volume>,
    /// The volume's size in bytes, which can change.
    pub(crate) size: AtomicU64,
    /// Write-back, or write-through.
    pub(crate) writeback: AtomicBool,
    pub(crate) id: [u8; ID_LEN],
}

/// Says what happened to a queue.
pub(crate) type Tell = Arc<dyn Fn(DeviceEvent) + Send + Sync>;

/// One queue's worker.
pub(crate) struct Worker {
    index: u16,
    shared: Arc<Shared>,
    counters: Arc<QueueCounters>,
    tell: Tell,
    mailbox: Receiver<Message>,
    state: State,
    enabled: bool,
    kick: Option<EventFd>,
    io: Io,
    queue: Queue,
    call: Option<Notifier>,
    error: Option<Notifier>,
    revocations: Vec<Revocation>,
    /// Where requests in flight are recorded.
    record: Option<InflightQueue>,
    /// Another process may have worked on the ring before.
    resumed: bool,
    /// The volume's lock, once it is ours.
    lock: Option<InUse>,
}

/// Everything that a batch needs beside the ring.
struct Io {
    channel: ChannelHandle,
    slots: Slots,
    /// Operations that the channel has not taken yet.
    ops: Vec<Op>,
    done: Vec<Completion>,
    ranges: Vec<RangeOp>,
    geometry: Geometry,
    mode: Mode,
    tally: Tally,
    /// What was cancelled stays recorded as in flight.
    leave: bool,
    /// How many requests were left so.
    left: usize,
    /// The ring must not be touched any more: it is broken, or the driver has gone.
    mute: bool,
}

/// Which chains a turn may take.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Take {
    /// All that there are.
    All,
    /// Those that an earlier life left.
    Again,
    /// None.
    Nothing,
}

/// What a turn adds to the counters.
#[derive(Default)]
struct Tally {
    reads: u64,
    writes: u64,
    flushes: u64,
    discards: u64,
    bytes_read: u64,
    bytes_written: u64,
    errors: u64,
}

impl Worker {
    /// Builds the worker on its reactor.
    ///
    /// # Errors
    /// Where the ring or the channel cannot be had; mailbox and error descriptor come back.
    pub(crate) fn new(
        cx: &mut Context<'_>,
        setup: QueueSetup,
        shared: Arc<Shared>,
        counters: Arc<QueueCounters>,
        tell: Tell,
        mailbox: Receiver<Message>,
        error: Option<Notifier>,
    ) -> Result<Self, (StartError, Receiver<Message>, Option<Notifier>)> {
        let parts = Queue::new(
            &setup,
            Limits {
                indirect: SEG_MAX + 2,
            },
        )
        .map_err(StartError::from)
        .and_then(|queue| Ok((queue, ChannelHandle::open(cx, &shared.volume)?)));
        let (queue, channel) = match parts {
            Ok(parts) => parts,
            Err(e) => return Err((e, mailbox, error)),
        };
        let geometry = shared.volume.geometry();
        let mode = Mode {
            features: setup.features,
            writeback: true,
            volatile: geometry.volatile_cache,
        };
        let mut worker = Self {
            index: setup.index,
            shared,
            counters,
            tell,
            mailbox,
            state: State::Locking {
                since: cx.now(),
                next: cx.now(),
                told: false,
            },
            enabled: setup.enabled,
            kick: None,
            io: Io {
                channel,
                slots: Slots::default(),
                ops: Vec::with_capacity(CHAINS),
                done: Vec::with_capacity(CHAINS),
                ranges: Vec::new(),
                geometry,
                mode,
                tally: Tally::default(),
                leave: false,
                left: 0,
                mute: false,
            },
            queue,
            call: setup.call,
            error,
            revocations: Vec::new(),
            resumed: setup.inflight.is_some() || setup.position != Position::START,
            record: setup.inflight,
            lock: None,
        };
        worker.set_kick(cx, setup.kick);
        Ok(worker)
    }

    /// Serves the ring: completions first, then new chains, as far as the budget goes.
    fn serve(&mut self, now: Instant) -> Result<bool, RingError> {
        self.io.geometry.size = self.shared.size.load(Ordering::Relaxed);
        let take = match (self.serves(), self.finishes_again()) {
            (true, _) => Take::All,
            // What the driver has made available since is for whoever starts the queue next.
            (false, true) => Take::Again,
            (false, false) => Take::Nothing,
        };
        let (io, shared) = (&mut self.io, &*self.shared);
        // One match for the batch; below it the ring's kind is known.
        let batch = with_ring!(&mut self.queue, ring => io.batch(&mut **ring, take, shared, now));
        // Completions may have come also where the ring then turned out to be broken.
        let (worked, notify) = match &batch {
            Ok(done) => *done,
            Err(_) => (true, false),
        };
        if worked {
            self.io.count(&self.counters);
            if notify {
                self.notify();
            }
            if !self.revocations.is_empty() {
                self.check_revocations();
            }
        }
        batch.map(|_| worked)
    }

    /// Notifies the driver.
    fn notify(&self) {
        match self.call.as_ref().map(Notifier::notify) {
            Some(Notice::Given) => add(&self.counters.interrupts, 1),
            Some(Notice::Hung) => self.hung(),
            Some(Notice::Dropped) | None => {}
        }
    }

    /// A notifier has blocked. Our attachment says so: it knows how often that may be said.
    #[cold]
    fn hung(&self) {
        add(&self.counters.hung, 1);
        (self.tell)(DeviceEvent::NotifierHung(self.index));
    }

    fn set_kick(&mut self, cx: &mut Context<'_>, kick: Option<EventFd>) {
        if let Some(old) = self.kick.take() {
            cx.unregister(old.as_raw_fd());
        }
        let Some(kick) = kick else { return };
        // Edge-triggered, and never read: each write to an eventfd is an edge, whatever it counts. So a kick costs
        // no system call, and a descriptor that is none, or that a hostile front end made blocking, cannot
        // hold the reactor or have it spin.
        let events = epoll::Events::EPOLLIN | epoll::Events::EPOLLET;
        match cx.register(kick.as_raw_fd(), KICK, events) {
            Ok(()) => self.kick = Some(kick),
            // The ring is polled from now on, as without a descriptor.
            Err(e) => log::debug!(
                "queue {}: kick descriptor cannot be watched: {e}",
                self.index
            ),
        }
    }
}

impl Io {
    #[inline(always)]
    fn batch<R: Ring>(
        &mut self,
        ring: &mut R,
        take: Take,
        shared: &Shared,
        now: Instant,
    ) -> Result<(bool, bool), RingError> {
        let mut worked = self.collect(ring, now);
        // What is waiting for the channel goes first; while it waits, the ring is not read.
        if take != Take::Nothing && self.ops.is_empty() {
            worked |= self.take(ring, take, shared)?;
        }
        if !self.ops.is_empty() && self.submit() {
            worked = true;
            // What was completed at once is seen at once.
            self.collect(ring, now);
        }
        let notify = worked && !self.mute && ring.publish();
        Ok((worked, notify))
    }

    /// Takes chains off the ring and turns them into operations, or answers them.
    #[inline(always)]
    fn take<R: Ring>(
        &mut self,
        ring: &mut R,
        take: Take,
        shared: &Shared,
    ) -> Result<bool, RingError> {
        let (mut chains, mut bytes) = (0, 0);
        while chains < CHAINS && bytes < BYTES && (take == Take::All || ring.again() > 0) {
            let Some(index) = self.slots.take() else {
                break;
            };
            let chain = &mut self.slots.get(index).chain;
            match ring.pop(chain) {
                Ok(Pop::Chain) => {
                    bytes += u64::from(chain.walked()) * DESCRIPTOR;
                    bytes += self.begin(ring, index, shared);
                }
                Ok(Pop::Bad(e)) => {
                    log::debug!("bad chain: {e}");
                    bytes += u64::from(chain.walked()) * DESCRIPTOR;
                    let refused = refuse(chain);
                    self.answer(ring, index, Err(refused));
                }
                Ok(Pop::Empty) => {
                    self.slots.give(index);
                    break;
                }
                Err(e) => {
                    self.slots.give(index);
                    return Err(e);
                }
            }
            chains += 1;
        }
        Ok(chains > 0)
    }

    /// Begins the request in a slot; says how many bytes it moves.
    #[inline(always)]
    fn begin<R: Ring>(&mut self, ring: &mut R, index: u32, shared: &Shared) -> u64 {
        // After the chain was taken: a mode that was set before it was made available holds for it.
        self.mode.writeback = shared.writeback.load(Ordering::Relaxed);
        let tag = self.channel.tag(index, 0);
        let slot = self.slots.get(index);
        let answer = match request::parse(&mut slot.chain, &self.mode) {
            Ok(Request::Data { kind, offset, len }) => {
                let data = match kind {
                    Kind::Read => slot.chain.writable(),
                    _ => slot.chain.readable(),
                };
                // SAFETY: the chain stays as it is until the slot is given back, which is after the
                // completion; its vector does not move with the slot. The memory is kept by the ring,
                // or by the revocation that waits for this slot.
                let buffers = unsafe { Buffers::new(data) };
                let op = Op {
                    tag,
                    kind,
                    offset,
                    len,
                    buffers,
                };
                match op.check(&self.geometry) {
                    Ok(()) => {
                        if kind == Kind::Read {
                            slot.chain.fill();
                        }
                        slot.begin(Class::of(kind), len, 1);
                        self.ops.push(op);
                        return len;
                    }
                    Err(e) => Err(Refused::Status(request::status_of(e))),
                }
            }
            Ok(Request::Flush) => {
                slot.begin(Class::Flush, 0, 1);
                let kind = Kind::Flush;
                self.ops.push(Op {
                    tag,
                    kind,
                    offset: 0,
                    len: 0,
                    buffers: Buffers::NONE,
                });
                return 0;
            }
            Ok(Request::Id) => Ok(copy_id(&mut slot.chain, &shared.id)),
            Ok(Request::Ranges { zeroes }) => {
                match request::ranges(
                    &mut slot.chain,
                    zeroes,
                    &self.mode,
                    &self.geometry,
                    &mut self.ranges,
                ) {
                    Ok(()) if self.ranges.is_empty() => Ok(0),
                    Ok(()) => {
                        slot.begin(Class::Ranges, 0, self.ranges.len() as u16);
                        for (part, &(kind, offset, len)) in self.ranges.iter().enumerate() {
                            let tag = self.channel.tag(index, part as u16);
                            let buffers = Buffers::NONE;
                            self.ops.push(Op {
                                tag,
                                kind,
                                offset,
                                len,
                                buffers,
                            });
                        }
                        return 0;
                    }
                    Err(status) => Err(Refused::Status(status)),
                }
            }
            Err(refused) => Err(refused),
        };
        self.answer(ring, index, answer);
        0
    }

    /// Answers a request that needs no operation: with the bytes that were written before the status,
    /// or with what is wrong.
    fn answer<R: Ring>(&mut self, ring: &mut R, index: u32, answer: Result<u32, Refused>) {
        let slot = self.slots.get(index);
        let written = match answer {
            Ok(bytes) => {
                slot.chain.set_status(status::OK);
                // The status counts where nothing that was not written comes before it.
                let all = bluff_memory::IoVec::total(slot.chain.writable());
                bytes + u32::from(u64::from(bytes) == all)
            }
            Err(refused) => {
                self.tally.errors += 1;
                match refused {
                    Refused::Status(s) => {
                        slot.chain.set_status(s);
                        written_without_data(&slot.chain)
                    }
                    Refused::NoStatus => 0,
                }
            }
        };
        ring.complete(&slot.chain, written);
        self.slots.give(index);
    }

    /// Offers operations to the channel; says whether it took any.
    #[inline(always)]
    fn submit(&mut self) -> bool {
        let n = self.channel.submit(&self.ops);
        if n == self.ops.len() {
            self.ops.clear();
        } else {
            self.ops.drain(..n);
        }
        if n > 0 {
            self.channel.kick();
        }
        n > 0
    }

    /// Takes completions from the channel and completes what is finished.
    #[inline(always)]
    fn collect<R: Ring>(&mut self, ring: &mut R, now: Instant) -> bool {
        if self.slots.in_flight() == 0 {
            return false;
        }
        self.channel.poll(now, &mut self.done);
        if self.done.is_empty() {
            return false;
        }
        for i in 0..self.done.len() {
            let completion = self.done[i];
            self.completed(ring, completion);
        }
        self.done.clear();
        true
    }

    #[inline(always)]
    fn completed<R: Ring>(&mut self, ring: &mut R, completion: Completion) {
        let index = ChannelHandle::slot(completion.tag);
        let slot = self.slots.get(index);
        slot.pending -= 1;
        if let Err(e) = completion.result {
            slot.cancelled |= e == BlockError::Cancelled;
            if slot.status == status::OK {
                slot.status = request::status_of(e);
            }
        }
        if slot.pending > 0 {
            return;
        }
        if self.mute {
            ring.cut_short(&slot.chain);
            return self.slots.give(index);
        }
        if slot.cancelled {
            // What becomes of it is for the stop or the revocation to say: `control` looks after it.
            return self.set_aside(ring, index);
        }
        slot.revoked = false;
        slot.chain.set_status(slot.status);
        let written = if slot.status == status::OK {
            let t = &mut self.tally;
            match slot.class {
                Class::Read => {
                    t.reads += 1;
                    t.bytes_read += slot.len;
                }
                Class::Write => {
                    t.writes += 1;
                    t.bytes_written += slot.len;
                }
                Class::Flush => t.flushes += 1,
                Class::Ranges => t.discards += 1,
            }
            // At most 16 MiB and the status.
            if slot.class == Class::Read {
                slot.len as u32 + 1
            } else {
                written_without_data(&slot.chain)
            }
        } else {
            self.tally.errors += 1;
            written_without_data(&slot.chain)
        };
        ring.complete(&slot.chain, written);
        self.slots.give(index);
    }

    fn count(&mut self, c: &QueueCounters) {
        let t = std::mem::take(&mut self.tally);
        for (cell, n) in [
            (&c.reads, t.reads),
            (&c.writes, t.writes),
            (&c.flushes, t.flushes),
            (&c.discards, t.discards),
            (&c.bytes_read, t.bytes_read),
            (&c.bytes_written, t.bytes_written),
            (&c.errors, t.errors),
        ] {
            if n > 0 {
                add(cell, n);
            }
        }
        c.in_flight
            .store(self.slots.in_flight() as u64, Ordering::Relaxed);
    }
}

/// What a request reports as written that failed, or that has no data: of the bytes that come first in its
/// buffers nothing is sure, so they cannot be counted; where there are none the status comes first.
fn written_without_data(chain: &Chain) -> u32 {
    u32::from(chain.writable().is_empty())
}

/// How a bad chain is answered: with an error where its status byte is known, which is so where a buffer lies in
/// memory that we do not have. A driver need not look at the used length.
pub(crate) fn refuse(chain: &mut Chain) -> Refused {
    if chain.take_status() {
        Refused::Status(status::IOERR)
    } else {
        Refused::NoStatus
    }
}

/// Copies the identification into a chain, as much as fits; says how much that is.
fn copy_id(chain: &mut Chain, id: &[u8; ID_LEN]) -> u32 {
    // SAFETY: the chain's memory is mapped, and the name does not leave this function.
    let buffers = unsafe { Buffers::new(chain.fill()) };
    buffers.copy_from(id) as u32
}

/// Why a worker could not be built.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("{0}")]
    Ring(#[from] RingError),
    #[error("{0}")]
    Block(#[from] BlockError),
}

impl Actor for Worker {
    fn event(&mut self, cx: &mut Context<'_>, event: Event) {
        match event {
            Event::Ready { .. } => add(&self.counters.kicks, 1),
            Event::Woken => self.take_messages(cx),
            Event::Timer { .. } => self.run_timer(cx),
        }
        // It is polled from now on.
        if self.serves() {
            with_ring!(&mut self.queue, ring => ring.disable_notifications());
        }
    }

    fn turn(&mut self, cx: &mut Context<'_>) -> Turn {
        match &self.state {
            State::Running | State::Stopping(_) | State::Broken => {}
            State::Locking { .. } => return self.try_lock(cx),
            State::Stopped => return Turn::Done,
        }
        let worked = match self.serve(cx.now()) {
            Ok(worked) => worked,
            Err(e) => {
                self.broken(&e);
                return Turn::Worked;
            }
        };
        if let State::Stopping(_) = self.state
            && self.try_stop(cx)
        {
            return Turn::Done;
        }
        if worked { Turn::Worked } else { Turn::Idle }
    }

    fn arm(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.io.channel.park(cx, !self.io.ops.is_empty()) {
            return false;
        }
        if !self.serves() || !self.io.ops.is_empty() || self.io.slots.full() {
            // The ring is not read now, whatever the driver does; something else will wake us.
            return true;
        }
        if self.kick.is_none() {
            // Nobody tells, so it is looked at now and then; who wants more says `poll = "always"`.
            cx.timer(cx.id(), cx.now() + UNTOLD, 0);
        }
        let more = with_ring!(&mut self.queue, ring => ring.enable_notifications());
        if more {
            with_ring!(&mut self.queue, ring => ring.disable_notifications());
        }
        !more
    }
}
