//! The worker of one queue: `batch` is chains in, operations out, completions back; `control` what comes from outside.

mod batch;
mod control;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::time::Instant;

use bluff_block::{BlockError, ChannelHandle, InUse, Volume};
use bluff_reactor::{Actor, Context, Event, Turn};
use bluff_virtio::inflight::InflightQueue;
use bluff_virtio::{
    Limits, Line, Message, Position, Queue, QueueSetup, Ring, RingError, Wiring, with_ring,
};

use crate::config::SEG_MAX;
use crate::counters::QueueCounters;
use crate::request::Mode;
use crate::spec::ID_LEN;
use batch::{Io, Take};
use control::{Revocation, State};

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

/// One queue's worker.
pub(crate) struct Worker {
    line: Line,
    shared: Arc<Shared>,
    counters: Arc<QueueCounters>,
    mailbox: Receiver<Message>,
    state: State,
    enabled: bool,
    io: Io,
    queue: Queue,
    revocations: Vec<Revocation>,
    /// A timer has come, so some of those (or a stop) may have waited long enough.
    overdue: bool,
    /// Where requests in flight are recorded.
    record: Option<InflightQueue>,
    /// Another process may have worked on the ring before.
    resumed: bool,
    /// The volume's lock, once it is ours.
    lock: Option<InUse>,
}

impl Worker {
    /// Builds the worker on its reactor.
    ///
    /// # Errors
    /// Where the ring or the channel cannot be had; the wiring comes back.
    pub(crate) fn new(
        cx: &mut Context<'_>,
        setup: QueueSetup,
        wiring: Wiring,
        shared: Arc<Shared>,
        counters: Arc<QueueCounters>,
    ) -> Result<Self, (StartError, Wiring)> {
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
            Err(e) => return Err((e, wiring)),
        };
        let geometry = shared.volume.geometry();
        let mode = Mode {
            features: setup.features,
            writeback: true,
            volatile: geometry.volatile_cache,
        };
        let Wiring { line, mailbox } = wiring;
        Ok(Self {
            line,
            shared,
            counters,
            mailbox,
            state: State::Locking {
                since: cx.now(),
                next: cx.now(),
                told: false,
            },
            enabled: setup.enabled,
            io: Io::new(channel, geometry, mode),
            queue,
            revocations: Vec::new(),
            overdue: false,
            resumed: setup.inflight.is_some() || setup.position != Position::START,
            record: setup.inflight,
            lock: None,
        })
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
                self.line.notify();
            }
            if !self.revocations.is_empty() {
                self.check_revocations();
            }
        }
        batch.map(|_| worked)
    }
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
            Event::Ready { .. } => self.line.kicked(),
            Event::Woken => self.take_messages(cx),
            Event::Timer { .. } => self.overdue = true,
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
        let mut worked = match self.serve(cx.now()) {
            Ok(worked) => worked,
            Err(e) => {
                self.broken(&e);
                return Turn::Worked;
            }
        };
        if std::mem::take(&mut self.overdue) {
            // Only now: a thread that was away finds deadlines and completions together.
            self.end_overdue(cx.now());
            worked = true;
        }
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
        self.line.doze(cx);
        let more = with_ring!(&mut self.queue, ring => ring.enable_notifications());
        if more {
            with_ring!(&mut self.queue, ring => ring.disable_notifications());
        }
        !more
    }
}
