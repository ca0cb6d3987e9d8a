//! A receive queue: frames come from the network to the driver.
//!
//! It is written to by whoever has a frame for it, on its reactor, without a turn of its own. Its worker sees to the rest: what comes
//! from outside, and frames that wait because the driver had no buffers for them.
//!
//! Unsafe, because frames are written into the guest's memory.
#![allow(unsafe_code)]

mod quick;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use bluff_memory::IoVec;
use bluff_net::{
    BATCH, Backlog, Batch, Cause, Counters, Frame, Lent, Offloads, Receive, Registration,
};
use bluff_reactor::{Actor, Context, Event, Turn, Waker};
use bluff_virtio::{
    Chain, Line, Message, Pop, Queue, QueueChange, Ring, RingError, StoppedQueue, Wiring, with_ring,
};
use zerocopy::IntoBytes;

use self::quick::Chains;
use crate::coalesce::Coalescer;
use crate::header::header;
use crate::policy::Follower;
use crate::settings::Coalescing;
use crate::shared::Shared;
use crate::spec::{HashReport, Header, feature};
use crate::transmit::{State, apply};

/// Descriptors that are looked at in one call. A driver that makes more of them for its buffers waits for our next turn, and not its neighbours for it.
const DESCRIPTORS: usize = 4096;
/// Chains that are kept to be filled again: of what a driver had, as they keep the size that they have grown to.
const FREE: usize = 64;
/// The timer of what the driver was not told of.
pub(crate) const COALESCED: u16 = 1;
/// How long the first frame that waits may stay the first: then the driver does not want it, or can never have room for it.
const STUCK: Duration = Duration::from_secs(1);

/// What a driver has negotiated of received frames.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Bytes before each frame.
    pub(crate) header: usize,
    /// A frame may go into several buffers.
    pub(crate) mergeable: bool,
    /// Entries of the ring.
    size: u16,
}

impl Shape {
    /// Of a ring of `size` entries.
    pub(crate) fn new(features: u64, size: u16) -> Self {
        Self {
            size,
            header: header_len(features),
            mergeable: features & feature::MRG_RXBUF != 0,
        }
    }

    /// Whether each frame comes with its hash.
    fn reports(&self) -> bool {
        self.header == HEADER_MAX
    }
}

/// Bytes of the header before each frame, either way (§5.1.6).
pub(crate) fn header_len(features: u64) -> usize {
    match features & feature::HASH_REPORT {
        0 => size_of::<Header>(),
        _ => size_of::<Header>() + size_of::<HashReport>(),
    }
}

/// The longest header.
const HEADER_MAX: usize = size_of::<Header>() + size_of::<HashReport>();

/// What became of a frame.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Put {
    Done,
    /// There are not enough buffers yet.
    NoRoom,
    /// It does not fit into a buffer, and may not go into several.
    TooLong,
}

/// The ring, and who waits for it.
pub(crate) struct Inward {
    queue: Queue,
    line: Line,
    shape: Shape,
    counters: Arc<Counters>,
    /// Chains that were popped and have not been used, the first one first, with the bytes that they take: 0 of one that cannot be used, which
    /// goes back to the driver in its turn.
    held: VecDeque<(Chain, usize)>,
    free: Vec<Chain>,
    /// For the quick way.
    chains: Chains,
    backlog: Backlog,
    /// Frames are taken.
    open: bool,
    /// Wakes the worker.
    waker: Waker,
    /// Frames and chains that are to be published.
    done: (u32, u32),
    /// What the driver has set.
    follower: Follower,
    /// What the driver was not told of.
    coalescer: Coalescer,
    /// Where frames are changed for this driver.
    scratch: Option<Box<Batch>>,
    /// What was wrong with the ring; the worker says it.
    error: Option<RingError>,
    /// The ring must not be touched any more.
    broken: bool,
    /// Descriptors that may still be looked at in this call.
    budget: usize,
    /// The cable is plugged in.
    link: Arc<AtomicBool>,
    /// Since when the first frame that waits has been the first.
    stuck: Option<Instant>,
}

impl Inward {
    /// Pops another chain into `held`; `false` where there is none, or this call has looked at enough.
    fn pop(&mut self) -> Result<bool, RingError> {
        if self.budget == 0 {
            return Ok(false);
        }
        let mut chain = self.free.pop().unwrap_or_default();
        let room = match with_ring!(&mut self.queue, ring => ring.pop(&mut chain))? {
            Pop::Empty => {
                self.free.push(chain);
                return Ok(false);
            }
            Pop::Chain => IoVec::total(chain.writable()) as usize,
            Pop::Bad(_) => 0,
        };
        self.budget = self.budget.saturating_sub(1 + chain.walked() as usize);
        // One that has no room for a header has none for a frame.
        let room = if room < self.shape.header { 0 } else { room };
        self.held.push_back((chain, room));
        self.return_useless();
        Ok(true)
    }

    /// Gives back what cannot be used, as far as it is its turn.
    fn return_useless(&mut self) {
        while let Some((_, 0)) = self.held.front() {
            let (chain, _) = self.held.pop_front().expect("it was there");
            self.complete(chain, 0);
        }
    }

    fn complete(&mut self, chain: Chain, written: usize) {
        with_ring!(&mut self.queue, ring => ring.complete(&chain, written as u32));
        self.done.1 += 1;
        if self.free.len() < FREE {
            self.free.push(chain);
        }
    }

    /// Writes a frame that the driver takes as it is.
    fn put(&mut self, batch: &Batch, i: usize) -> Result<Put, RingError> {
        let frame = &batch.frames()[i];
        let total = self.shape.header + frame.len();
        // `looked`: how many of the chains that are held were counted. `buffers`: how many of them can be used.
        let (mut room, mut looked, mut buffers) = (0, 0, 0u16);
        while room < total && (buffers == 0 || self.shape.mergeable) {
            if looked == self.held.len() {
                if !self.pop()? {
                    return Ok(Put::NoRoom);
                }
                // One that cannot be used is gone again, or is the last one now.
                continue;
            }
            let here = self.held[looked].1;
            (room, looked) = (room + here, looked + 1);
            buffers += u16::from(here > 0);
        }
        if room < total {
            return Ok(Put::TooLong);
        }
        let mut bytes = [0; HEADER_MAX];
        let mut first = header(&frame.offload, self.takes().contains(Offloads::CSUM));
        first.num_buffers.set(buffers);
        bytes[..size_of::<Header>()].copy_from_slice(first.as_bytes());
        if self.shape.reports() {
            let report = self.report(frame);
            bytes[size_of::<Header>()..].copy_from_slice(report.as_bytes());
        }
        let before = &bytes[..self.shape.header];
        let mut done = 0;
        for _ in 0..looked {
            let (mut chain, room) = self.held.pop_front().expect("so many");
            let written = match room {
                0 => 0,
                // SAFETY: the chain's buffers belong to the ring's epoch, which the ring keeps; nothing borrows guest memory.
                _ => unsafe { batch.write_to(i, before, done, chain.fill()) },
            };
            done += written;
            self.complete(chain, written);
        }
        self.return_useless();
        self.counters.received.passed(1, frame.len() as u64);
        self.done.0 += 1;
        Ok(Put::Done)
    }

    /// Writes frames as long as nothing is out of the ordinary; says how many.
    #[inline]
    fn quick(&mut self, batch: &Batch, which: &[u8]) -> Result<usize, RingError> {
        if !self.backlog.is_empty() || !self.held.is_empty() || self.shape.reports() {
            return Ok(0);
        }
        let (shape, takes) = (self.shape, self.takes());
        let (budget, chains) = (&mut self.budget, &mut self.chains);
        let written = with_ring!(&mut self.queue, ring => chains.fill(&mut **ring, shape, takes, budget, batch, which))?;
        if written.frames > 0 {
            let received = &self.counters.received;
            received.passed(written.frames as u64, written.bytes);
            let n = written.frames as u32;
            (self.done.0, self.done.1) = (self.done.0 + n, self.done.1 + n);
        }
        Ok(written.frames)
    }

    /// What the driver takes of a frame undone.
    #[inline]
    fn takes(&self) -> Offloads {
        self.follower.policy().takes
    }

    /// The hash of a frame, as it is given to the driver (§5.1.6.4.4).
    fn report(&self, frame: &Frame) -> HashReport {
        let hash = self.follower.policy().report.as_ref();
        let rss = hash.and_then(|hash| hash.of(frame));
        rss.map_or_else(HashReport::default, |rss| HashReport {
            value: rss.value.into(),
            report: (rss.report as u16).into(),
            ..HashReport::default()
        })
    }

    /// Takes over what the driver has set since the last look.
    #[inline]
    fn refresh(&mut self) -> Result<(), RingError> {
        let before = self.takes();
        if !self.follower.refresh() {
            return Ok(());
        }
        self.coalescer
            .set(limits(&self.follower, self.line.index()));
        if self.takes() == before || self.backlog.is_empty() {
            return Ok(());
        }
        // Those that wait were made for what it took before.
        self.budget = DESCRIPTORS;
        let mut waiting = std::mem::take(&mut self.backlog);
        let mut result = Ok(());
        waiting.drain(|batch, i| {
            if result.is_ok() {
                result = self.offer(&batch, i);
            }
            true
        });
        result
    }

    /// Takes a frame: to the ring, or behind those that wait. `false`: it has to wait, and there is no room.
    fn offer(&mut self, batch: &Batch, i: usize) -> Result<(), RingError> {
        let frame = &batch.frames()[i];
        let needs = frame.offload.needs(is_ipv4(frame));
        if self.takes().contains(needs) {
            return self.queue_up(batch, i);
        }
        let mut scratch = self.scratch.take().unwrap_or_default();
        let complete = !self.takes().contains(Offloads::CSUM);
        let mut result = Ok(());
        let mut each = |mut batch: Lent<'_>| {
            for i in 0..batch.frames().len() {
                if complete {
                    batch.complete_checksum(i);
                }
                if result.is_ok() {
                    result = self.queue_up(&batch, i);
                }
            }
        };
        match frame.offload.gso {
            Some(_) => batch.segment(i, &mut scratch, each),
            None => {
                scratch.clear();
                scratch.push(frame.head());
                if let Some(copy) = scratch.frames_mut().last_mut() {
                    (copy.offload, copy.hash) = (frame.offload, frame.hash);
                }
                // SAFETY: lent as long as `batch`, and cleared below.
                unsafe { scratch.lend(batch.tail(i)) };
                each(scratch.lent());
            }
        }
        scratch.clear();
        self.scratch = Some(scratch);
        result
    }

    /// Those frames that the driver has not filtered out.
    #[inline]
    fn wanted<'a>(&self, batch: &Batch, which: &'a [u8], room: &'a mut [u8; BATCH]) -> &'a [u8] {
        let settings = &self.follower.policy().settings;
        if settings.mode.promisc {
            return which;
        }
        let wants = |i: &&u8| settings.wants_frame(batch.frames()[usize::from(**i)].head());
        let mut n = 0;
        for (place, i) in room.iter_mut().zip(which.iter().filter(wants)) {
            (*place, n) = (*i, n + 1);
        }
        if n < which.len() {
            let filtered = (which.len() - n) as u64;
            self.counters.received.drops.add(Cause::Filtered, filtered);
        }
        &room[..n]
    }

    fn queue_up(&mut self, batch: &Batch, i: usize) -> Result<(), RingError> {
        if self.backlog.is_empty() {
            match self.put(batch, i)? {
                Put::Done => return Ok(()),
                Put::TooLong => {
                    self.counters.received.drops.add(Cause::TooLong, 1);
                    return Ok(());
                }
                Put::NoRoom => self.waker.wake(),
            }
        }
        if !self.backlog.push(batch, i) {
            self.counters.received.drops.add(Cause::NoBuffers, 1);
        }
        Ok(())
    }

    /// Writes frames that waited, as far as there are buffers.
    fn flush(&mut self) -> Result<bool, RingError> {
        if self.backlog.is_empty() || self.broken {
            return Ok(false);
        }
        self.budget = DESCRIPTORS;
        let mut backlog = std::mem::take(&mut self.backlog);
        let (mut worked, mut result) = (false, Ok(()));
        backlog.drain(|batch, i| match self.put(&batch, i) {
            Ok(Put::NoRoom) => false,
            Ok(Put::Done) => {
                (worked, self.stuck) = (true, None);
                true
            }
            Ok(Put::TooLong) => {
                self.counters.received.drops.add(Cause::TooLong, 1);
                true
            }
            Err(e) => {
                result = Err(e);
                false
            }
        });
        self.backlog = backlog;
        self.publish();
        result.map(|()| worked)
    }

    fn publish(&mut self) {
        let (frames, chains) = std::mem::take(&mut self.done);
        if self.broken || chains == 0 {
            return;
        }
        if !self.coalescer.is_on() && !self.coalescer.is_pending() {
            if with_ring!(&mut self.queue, ring => ring.publish()) {
                self.line.notify();
            }
            return;
        }
        with_ring!(&mut self.queue, ring => ring.publish_quietly());
        if self.coalescer.count(frames, chains, Instant::now) {
            self.tell();
        } else if self.coalescer.wants_timer() {
            // Its worker sets one.
            self.waker.wake();
        }
    }

    /// Tells the driver of what was used, where it wants to be told.
    fn tell(&mut self) {
        self.coalescer.told();
        if !self.broken && with_ring!(&mut self.queue, ring => ring.wants_notification()) {
            self.line.notify();
        }
    }

    /// Tells the driver of what it was not told of yet, where it is time.
    fn tell_due(&mut self, cx: &mut Context<'_>) {
        if self.coalescer.is_due(cx.now()) {
            self.tell();
        } else if let Some(at) = self.coalescer.timer(cx.now()) {
            cx.timer(cx.id(), at, COALESCED);
        }
    }

    /// The first frame that waits has had its time: it is dropped, and the next one is tried.
    fn give_up_stuck(&mut self, now: Instant) {
        if self.stuck.is_none_or(|since| now < since + STUCK) {
            return;
        }
        self.stuck = None;
        let mut first = true;
        self.backlog.drain(|_, _| std::mem::take(&mut first));
        self.counters.received.drops.add(Cause::NoBuffers, 1);
    }

    /// Puts chains back that were not used: nothing is in flight.
    fn let_go(&mut self) {
        while let Some((chain, _)) = self.held.pop_back() {
            with_ring!(&mut self.queue, ring => ring.put_back(&chain));
            self.free.push(chain);
        }
        self.publish();
        if self.coalescer.is_pending() {
            self.tell();
        }
    }

    fn position(&self) -> StoppedQueue {
        with_ring!(&self.queue, ring => ring.position())
    }

    /// The ring is broken: the worker says so.
    fn fail(&mut self, e: RingError) {
        (self.open, self.broken) = (false, true);
        self.error.get_or_insert(e);
        self.waker.wake();
    }
}

/// Whether a frame that is to be cut is of IPv4.
fn is_ipv4(frame: &Frame) -> bool {
    let network = frame.offload.gso.map(|gso| usize::from(gso.network));
    network.is_some_and(|at| frame.head()[at] >> 4 == 4)
}

impl Receive for Inward {
    fn receive(&mut self, batch: &Batch, which: &[u8]) {
        if !self.open || self.broken || !self.link.load(Ordering::Relaxed) {
            let drops = &self.counters.received.drops;
            return drops.add(Cause::LinkDown, which.len() as u64);
        }
        self.budget = DESCRIPTORS;
        if let Err(e) = self.refresh() {
            return self.fail(e);
        }
        let mut wanted = [0; BATCH];
        let which = self.wanted(batch, which, &mut wanted);
        let quick = match self.quick(batch, which) {
            Ok(quick) => quick,
            Err(e) => return self.fail(e),
        };
        for i in &which[quick..] {
            if let Err(e) = self.offer(batch, usize::from(*i)) {
                return self.fail(e);
            }
        }
        self.publish();
    }
}

/// When a queue's driver is to be told.
pub(crate) fn limits(follower: &Follower, queue: u16) -> Coalescing {
    let all = &follower.policy().settings.coalescing;
    all.get(usize::from(queue)).copied().unwrap_or_default()
}

/// The worker of a receive queue.
pub(crate) struct Receiving {
    pair: u16,
    inward: Rc<RefCell<Inward>>,
    mailbox: Receiver<Message>,
    shared: Arc<Shared>,
    registration: Option<Registration>,
    state: State,
    enabled: bool,
}

impl Receiving {
    pub(crate) fn new(
        cx: &mut Context<'_>,
        wiring: Wiring,
        queue: Queue,
        enabled: bool,
        shape: Shape,
        shared: Arc<Shared>,
    ) -> Self {
        let Wiring { line, mailbox } = wiring;
        let pair = line.index() / 2;
        let waker = cx.waker(cx.id());
        let follower = shared.board.follow(line.index(), waker.clone());
        let inward = Rc::new(RefCell::new(Inward {
            queue,
            line,
            shape,
            counters: shared.counters(pair),
            held: VecDeque::new(),
            free: Vec::new(),
            chains: Chains::default(),
            backlog: Backlog::default(),
            open: enabled,
            waker,
            done: (0, 0),
            coalescer: Coalescer::new(limits(&follower, 2 * pair), shape.size),
            follower,
            scratch: None,
            error: None,
            broken: false,
            budget: 0,
            link: shared.link.clone(),
            stuck: None,
        }));
        let registration = Registration::new(cx, inward.clone());
        let this = Self {
            pair,
            inward,
            mailbox,
            shared,
            registration: Some(registration),
            state: State::Running,
            enabled,
        };
        with_ring!(&mut this.inward.borrow_mut().queue, ring => ring.disable_notifications());
        this.tell_port();
        this
    }

    /// Frames come here, or do not.
    fn tell_port(&self) {
        let outlet = self.registration.as_ref().map(|r| r.outlet().clone());
        let open = self.enabled && self.state == State::Running;
        self.shared.set_outlet(self.pair, outlet.filter(|_| open));
    }

    fn take_messages(&mut self, cx: &mut Context<'_>) {
        while let Ok(message) = self.mailbox.try_recv() {
            match message {
                Message::Change(QueueChange::Enable(on)) => {
                    self.enabled = on;
                    self.inward.borrow_mut().open = on && self.state == State::Running;
                    self.tell_port();
                }
                Message::Change(change) => {
                    let inward = &mut *self.inward.borrow_mut();
                    inward.let_go();
                    if let Err(e) = apply(cx, &mut inward.line, &mut inward.queue, change) {
                        inward.fail(e);
                    }
                }
                Message::Stop(stop, done) => {
                    self.state = State::Stopped;
                    self.tell_port();
                    self.registration = None;
                    let inward = &mut *self.inward.borrow_mut();
                    inward.open = false;
                    // After a reset nothing is written any more, not even what was to be given back.
                    inward.broken |= !stop.answer;
                    inward.let_go();
                    let waited = inward.backlog.clear();
                    inward.counters.received.drops.add(Cause::LinkDown, waited);
                    inward.line.hang_up(cx);
                    done(Some(inward.position()));
                }
            }
        }
    }
}

impl Actor for Receiving {
    fn event(&mut self, cx: &mut Context<'_>, event: Event) {
        match event {
            Event::Ready { .. } => self.inward.borrow().line.kicked(),
            Event::Woken => self.take_messages(cx),
            Event::Timer { token: COALESCED } => self.inward.borrow_mut().coalescer.timer_came(),
            Event::Timer { .. } => self.inward.borrow_mut().give_up_stuck(cx.now()),
        }
        let inward = &mut *self.inward.borrow_mut();
        if self.state == State::Running && !inward.broken {
            with_ring!(&mut inward.queue, ring => ring.disable_notifications());
        }
    }

    fn turn(&mut self, cx: &mut Context<'_>) -> Turn {
        if self.state == State::Stopped {
            return Turn::Done;
        }
        let mut inward = self.inward.borrow_mut();
        let mut worked = false;
        if !inward.broken {
            let refreshed = inward.refresh();
            let flushed = match (refreshed, inward.open) {
                (Ok(()), true) => inward.flush(),
                (refreshed, _) => refreshed.map(|()| false),
            };
            match flushed {
                Ok(some) => worked = some,
                Err(e) => inward.fail(e),
            }
            inward.publish();
            inward.tell_due(cx);
        }
        if let Some(e) = inward.error.take() {
            inward.line.broken(&e);
            drop(inward);
            self.state = State::Broken;
            self.tell_port();
            return Turn::Worked;
        }
        if worked { Turn::Worked } else { Turn::Idle }
    }

    fn arm(&mut self, cx: &mut Context<'_>) -> bool {
        let inward = &mut *self.inward.borrow_mut();
        if !inward.open || inward.broken || inward.backlog.is_empty() {
            // Buffers that come are found by the frame that needs them.
            inward.stuck = None;
            return true;
        }
        if inward.stuck.is_none() {
            inward.stuck = Some(cx.now());
            cx.timer(cx.id(), cx.now() + STUCK, 0);
        }
        inward.line.doze(cx);
        let more = with_ring!(&mut inward.queue, ring => ring.enable_notifications());
        if more {
            with_ring!(&mut inward.queue, ring => ring.disable_notifications());
        }
        !more
    }
}
