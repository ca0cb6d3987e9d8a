//! A transmit queue: frames go from the driver to the port.
//!
//! A frame is served within the turn that finds it, so nothing is ever in flight between turns: a stop, or another memory, waits for
//! nothing.
//!
//! Unsafe, because frames are lent out of the guest's memory.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::time::Instant;

use bluff_net::{BATCH, Batch, Cause, Counters, Frame, Lane, MAX_FRAME};
use bluff_reactor::{Actor, Context, Event, Turn, Waker};
use bluff_virtio::{
    Chain, Line, Message, Pop, Queue, QueueChange, Ring, RingError, Wiring, with_ring,
};
use zerocopy::FromBytes;

use crate::coalesce::Coalescer;
use crate::header::offload;
use crate::policy::Follower;
use crate::receive::{COALESCED, header_len, limits};
use crate::shared::Shared;
use crate::spec::{Header, gso, header_flag};

/// Bytes after which a turn takes no more frames.
const BYTES: usize = 256 << 10;
/// What a segment counts.
const SEGMENT: usize = 64;
/// Descriptors after which a turn looks for no more: a chain of as many as a ring has is a turn of its own.
const DESCRIPTORS: u32 = 1024;

/// What a transmit queue has beside its ring.
pub(crate) struct Outward {
    pub(crate) lane: Box<dyn Lane>,
    pub(crate) features: u64,
    /// Bytes of the header before each frame.
    pub(crate) header: usize,
    pub(crate) counters: Arc<Counters>,
    /// The cable is plugged in.
    pub(crate) link: Arc<AtomicBool>,
    batch: Batch,
    chains: Vec<Chain>,
    pair: u16,
    shared: Arc<Shared>,
    follower: Follower,
    /// What the driver was not told of.
    coalescer: Coalescer,
}

impl Outward {
    /// Of a ring of `size` entries.
    pub(crate) fn new(
        lane: Box<dyn Lane>,
        features: u64,
        pair: u16,
        size: u16,
        shared: Arc<Shared>,
        waker: Waker,
    ) -> Self {
        let queue = 2 * pair + 1;
        let follower = shared.board.follow(queue, waker);
        Self {
            coalescer: Coalescer::new(limits(&follower, queue), size),
            follower,
            pair,
            lane,
            features,
            header: header_len(features),
            counters: shared.counters(pair),
            link: shared.link.clone(),
            batch: Batch::default(),
            chains: (0..BATCH).map(|_| Chain::default()).collect(),
            shared,
        }
    }

    /// Sends what is there, as far as the budget goes; says whether there was anything, and whether the driver is to be told.
    /// `open`: the frames are sent, and not only taken off the ring.
    #[inline(always)]
    fn batch<R: Ring>(
        &mut self,
        ring: &mut R,
        now: Instant,
        open: bool,
    ) -> Result<(bool, bool), RingError> {
        // All are found first, and then read: their first lines come from the driver's core at the same time.
        let (mut count, mut bad, mut walked) = (0, 0u32, 0);
        while count < BATCH && walked < DESCRIPTORS {
            let chain = &mut self.chains[count];
            match ring.pop(chain)? {
                Pop::Empty => break,
                Pop::Chain => chain.prefetch_readable(),
                Pop::Bad(e) => {
                    log::debug!("bad chain: {e}");
                    bad |= 1 << count;
                }
            }
            walked += chain.walked();
            count += 1;
        }
        if count == 0 {
            return Ok((false, false));
        }
        self.batch.clear();
        let mut bytes = 0;
        for at in 0..count {
            if bytes >= BYTES {
                // These have their turn when the others have had theirs.
                for chain in self.chains[at..count].iter().rev() {
                    ring.put_back(chain);
                }
                count = at;
                break;
            }
            let cause = if bad & 1 << at != 0 {
                Cause::Malformed
            } else if !open {
                Cause::LinkDown
            } else {
                match self.take(at) {
                    Ok(cost) => {
                        bytes += cost;
                        continue;
                    }
                    Err(cause) => cause,
                }
            };
            self.counters.sent.drops.add(cause, 1);
        }
        // They are read when all have been copied: what reads a copy at once, in other pieces, waits for it.
        let mut i = 0;
        while i < self.batch.frames().len() {
            match self.check(i) {
                Ok(()) => i += 1,
                Err(cause) => {
                    self.batch.remove(i);
                    self.counters.sent.drops.add(cause, 1);
                }
            }
        }
        if !self.batch.frames().is_empty() {
            let lens = self.batch.frames().iter().map(|f| f.len() as u64);
            let frames = self.batch.frames().len() as u64;
            self.counters.sent.passed(frames, lens.sum());
            self.lane.send(now, self.batch.lent());
            if let Some(flows) = self.shared.learning() {
                // The port has computed them.
                for frame in self.batch.frames() {
                    flows.learn(frame.hash, self.pair);
                }
            }
            self.batch.clear();
        }
        // Nothing uses what they lent any more.
        for chain in &self.chains[..count] {
            ring.complete(chain, 0);
        }
        if !self.coalescer.is_on() && !self.coalescer.is_pending() {
            return Ok((true, ring.publish()));
        }
        ring.publish_quietly();
        let due = self.coalescer.count(count as u32, count as u32, || now);
        Ok((true, due && self.wants(ring)))
    }

    /// Whether the driver wants to be told of what it was not told of yet, now that it is time.
    fn wants<R: Ring>(&mut self, ring: &mut R) -> bool {
        self.coalescer.told();
        ring.wants_notification()
    }

    /// Adds the frame of a chain to the batch; says how much of a turn's bytes it counts for.
    ///
    /// # Errors
    /// Why it cannot be sent.
    #[inline(always)]
    fn take(&mut self, at: usize) -> Result<usize, Cause> {
        let (chain, before) = (&mut self.chains[at], self.header);
        let frame = self
            .batch
            .push_with(before, |room| chain.read_front(room))
            // Not longer than a header: nothing was added.
            .ok_or(Cause::Malformed)?;
        let mut len = frame.len();
        let header = header_of(frame, before);
        let rest = chain.readable();
        if !rest.is_empty() {
            len = rest
                .iter()
                .fold(len, |n, piece| n.saturating_add(piece.len()));
            if len > MAX_FRAME {
                self.batch.pop();
                return Err(Cause::TooLong);
            }
            // SAFETY: the chain keeps its buffers, in the ring's epoch, until it is completed; the batch is cleared before that.
            unsafe { self.batch.lend(rest) };
        }
        // Whoever has to cut it pays for each segment.
        let segments = match header.gso_type {
            gso::NONE => 0,
            _ => len / usize::from(header.gso_size.get()).max(1),
        };
        Ok(len + SEGMENT * segments)
    }

    /// Reads a frame, and checks what is to be done on it.
    #[inline(always)]
    fn check(&mut self, i: usize) -> Result<(), Cause> {
        let frame = &mut self.batch.frames_mut()[i];
        let header = header_of(frame, self.header);
        let packet = frame.parse().map_err(|_| Cause::Malformed)?;
        if header.flags & header_flag::NEEDS_CSUM != 0 || header.gso_type != gso::NONE {
            let packet = *packet;
            let (head, len) = (frame.head().len(), frame.len());
            frame.offload = offload(&header, self.features, &packet, head, len)
                .map_err(|_| Cause::Malformed)?;
        }
        Ok(())
    }
}

/// The header that a driver has put before a frame, of `n` bytes with what follows it.
#[inline(always)]
fn header_of(frame: &Frame, n: usize) -> Header {
    let (header, _) = Header::read_from_prefix(frame.before(n)).expect("a whole header");
    header
}

/// The worker of a transmit queue.
pub(crate) struct Transmit {
    line: Line,
    mailbox: Receiver<Message>,
    queue: Queue,
    state: State,
    enabled: bool,
    out: Outward,
}

/// What a queue is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// It serves its ring.
    Running,
    /// The port takes nothing before then.
    Waiting(Instant),
    /// The ring makes no sense; it waits to be stopped.
    Broken,
    /// It is at its end.
    Stopped,
}

impl Transmit {
    pub(crate) fn new(wiring: Wiring, queue: Queue, enabled: bool, out: Outward) -> Self {
        let Wiring { line, mailbox } = wiring;
        Self {
            line,
            mailbox,
            queue,
            state: State::Running,
            enabled,
            out,
        }
    }

    fn take_messages(&mut self, cx: &mut Context<'_>) {
        while let Ok(message) = self.mailbox.try_recv() {
            match message {
                Message::Change(QueueChange::Enable(on)) => self.enabled = on,
                Message::Change(change) => {
                    if let Err(e) = apply(cx, &mut self.line, &mut self.queue, change) {
                        self.broken(&e);
                    }
                }
                Message::Stop(_, done) => {
                    if self.state != State::Broken && self.out.coalescer.is_pending() {
                        self.tell();
                    }
                    self.state = State::Stopped;
                    self.line.hang_up(cx);
                    done(Some(with_ring!(&self.queue, ring => ring.position())));
                }
            }
        }
    }

    fn broken(&mut self, e: &RingError) {
        self.state = State::Broken;
        self.line.broken(e);
    }

    fn tell(&mut self) {
        let out = &mut self.out;
        if with_ring!(&mut self.queue, ring => out.wants(&mut **ring)) {
            self.line.notify();
        }
    }

    /// Tells the driver of what it was not told of yet, where it is time.
    #[inline]
    fn tell_due(&mut self, cx: &mut Context<'_>) {
        if self.out.follower.refresh() {
            let limits = limits(&self.out.follower, 2 * self.out.pair + 1);
            self.out.coalescer.set(limits);
        }
        if !self.out.coalescer.is_pending() {
            return;
        }
        if self.out.coalescer.is_due(cx.now()) {
            self.tell();
        } else if let Some(at) = self.out.coalescer.timer(cx.now()) {
            cx.timer(cx.id(), at, COALESCED);
        }
    }
}

/// What is the same for every queue of this device, where nothing is in flight.
pub(crate) fn apply(
    cx: &mut Context<'_>,
    line: &mut Line,
    queue: &mut Queue,
    change: QueueChange,
) -> Result<(), RingError> {
    match change {
        QueueChange::Memory { memory, done, .. } => {
            let result = with_ring!(queue, ring => ring.set_memory(memory));
            // Also of a ring that is broken now: it is not used any more.
            done();
            result?;
        }
        QueueChange::Kick(kick) => line.set_kick(cx, kick),
        QueueChange::Call(call) => line.set_call(call),
        QueueChange::Error(error) => line.set_error(error),
        QueueChange::Log { log, done } => {
            with_ring!(queue, ring => ring.set_log(log));
            done();
        }
        QueueChange::Enable(_) => unreachable!("for the worker"),
    }
    Ok(())
}

impl Actor for Transmit {
    fn event(&mut self, cx: &mut Context<'_>, event: Event) {
        match event {
            Event::Ready { .. } => self.line.kicked(),
            Event::Woken => {
                self.take_messages(cx);
                // What was waited for may not hold any more.
                if let State::Waiting(_) = self.state {
                    self.state = State::Running;
                }
            }
            Event::Timer { token: COALESCED } => self.out.coalescer.timer_came(),
            Event::Timer { .. } => {}
        }
        if self.state == State::Running {
            with_ring!(&mut self.queue, ring => ring.disable_notifications());
        }
    }

    fn turn(&mut self, cx: &mut Context<'_>) -> Turn {
        let now = cx.now();
        match self.state {
            State::Stopped => return Turn::Done,
            State::Broken => return Turn::Idle,
            State::Waiting(_) | State::Running => self.tell_due(cx),
        }
        match self.state {
            State::Stopped | State::Broken => return Turn::Idle,
            State::Waiting(until) if now < until => return Turn::Idle,
            State::Waiting(_) | State::Running => self.state = State::Running,
        }
        if self.enabled
            && let Err(at) = self.out.lane.ready(now)
        {
            cx.timer(cx.id(), at, 0);
            self.state = State::Waiting(at);
            return Turn::Idle;
        }
        // What comes while it is disabled is taken and dropped, as a cable that is not plugged in would.
        let out = &mut self.out;
        let open = self.enabled && out.link.load(Ordering::Relaxed);
        match with_ring!(&mut self.queue, ring => out.batch(&mut **ring, now, open)) {
            Ok((worked, notify)) => {
                if notify {
                    self.line.notify();
                }
                if self.out.coalescer.wants_timer() {
                    self.tell_due(cx);
                }
                if worked { Turn::Worked } else { Turn::Idle }
            }
            Err(e) => {
                self.broken(&e);
                Turn::Worked
            }
        }
    }

    fn arm(&mut self, cx: &mut Context<'_>) -> bool {
        if self.state != State::Running {
            // A timer or a message wakes it.
            return true;
        }
        self.line.doze(cx);
        let more = with_ring!(&mut self.queue, ring => ring.enable_notifications());
        if more {
            with_ring!(&mut self.queue, ring => ring.disable_notifications());
        }
        !more
    }
}
