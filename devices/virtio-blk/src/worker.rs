//! The worker of one queue: `batch` is chains in, operations out, completions back; `control` what comes from outside.

mod batch;
mod control;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use bluff_block::{BlockError, ChannelHandle, InUse, Volume};
use bluff_reactor::{Actor, Context, Event, Turn};
use bluff_virtio::inflight::InflightQueue;
use bluff_virtio::{
    DeviceEvent, Limits, Notice, Notifier, Position, Queue, QueueSetup, Ring, RingError, with_ring,
};
use vmm_sys_util::eventfd::EventFd;

use crate::config::SEG_MAX;
use crate::counters::{QueueCounters, add};
use crate::request::Mode;
use crate::spec::ID_LEN;
use batch::{Io, Take};
pub(crate) use control::{Message, drops};
use control::{Revocation, State};

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
            io: Io::new(channel, geometry, mode),
            queue,
            call: setup.call,
            error,
            revocations: Vec::new(),
            overdue: false,
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
