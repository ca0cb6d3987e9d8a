//! A queue thread: its lanes, its channel, its reactor.
//!
//! The thread and its epoll wait belong to `vhost-user-backend`. The channel's completions come through
//! the reactor, whose descriptor is registered in that epoll.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use bluff_block::{BlockError, Channel, Completion, Op, OpenContext};
use bluff_reactor::{Actor, ActorId, Context, Event, Options, Poll, Reactor, Turn};
use vhost_user_backend::{VringMutex, VringT};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};

use crate::Device;
use crate::lane::{BATCH, Lane, Taken};

/// Guest memory as the stack holds it.
pub(crate) type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
/// A vring as the stack holds it.
pub(crate) type Vring = VringMutex<Memory>;

/// Why a queue thread, or the oracle, cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The volume does not open.
    #[error("cannot open the volume")]
    Volume(#[source] BlockError),
    /// No reactor.
    #[error("cannot make a reactor")]
    Reactor(#[source] io::Error),
    /// The reactor's descriptor does not go into the thread's epoll.
    #[error("cannot watch the reactor")]
    Watch(#[source] io::Error),
}

/// What the session's thread knows of a queue.
#[derive(Debug)]
pub(crate) struct Gauge {
    /// Chains that were taken and not yet given back; 1 while the worker looks for some.
    in_flight: AtomicUsize,
    /// Somebody waits for 0.
    awaited: AtomicBool,
    lock: Mutex<()>,
    empty: Condvar,
    /// The queue was set up anew since the worker looked last.
    pub(crate) fresh: AtomicBool,
}

impl Default for Gauge {
    fn default() -> Self {
        Self {
            in_flight: AtomicUsize::new(0),
            awaited: AtomicBool::new(false),
            lock: Mutex::new(()),
            empty: Condvar::new(),
            fresh: AtomicBool::new(true),
        }
    }
}

impl Gauge {
    /// The worker's side. Sequentially consistent, as is the other side: either it sees that it is awaited,
    /// or whoever waits sees the count.
    fn set(&self, n: usize) {
        self.in_flight.store(n, Ordering::SeqCst);
        if n == 0 && self.awaited.load(Ordering::SeqCst) {
            drop(self.lock.lock().expect("held for no work"));
            self.empty.notify_all();
        }
    }

    /// Waits until nothing is in flight, for `limit` where there is one. Says whether nothing is.
    pub(crate) fn drained(&self, limit: Option<Duration>) -> bool {
        self.awaited.store(true, Ordering::SeqCst);
        let end = limit.map(|l| Instant::now() + l);
        let mut guard = self.lock.lock().expect("held for no work");
        while self.in_flight.load(Ordering::SeqCst) != 0 {
            guard = match end.map(|e| e.saturating_duration_since(Instant::now())) {
                None => self.empty.wait(guard).expect("held for no work"),
                Some(Duration::ZERO) => break,
                Some(left) => {
                    let waited = self.empty.wait_timeout(guard, left);
                    waited.expect("held for no work").0
                }
            };
        }
        self.awaited.store(false, Ordering::SeqCst);
        self.in_flight.load(Ordering::SeqCst) == 0
    }
}

/// The actor that a channel's waker wakes. It remembers that, for who polls the channel.
#[derive(Default)]
pub(crate) struct Woken(Rc<Cell<bool>>);

impl Actor for Woken {
    fn event(&mut self, _: &mut Context<'_>, _: Event) {
        self.0.set(true);
    }

    fn turn(&mut self, _: &mut Context<'_>) -> Turn {
        Turn::Idle
    }
}

/// Offers `ops` to a channel and removes what it took.
pub(crate) fn submit(channel: &mut dyn Channel, ops: &mut Vec<Op>) -> bool {
    if ops.is_empty() {
        return false;
    }
    let n = channel.submit(ops);
    ops.drain(..n);
    channel.kick();
    n > 0
}

struct Served {
    lane: Lane<GuestMemoryLoadGuard<GuestMemoryMmap>>,
    gauge: Arc<Gauge>,
    /// The ring is not to be looked at until it was set up anew.
    broken: bool,
}

/// What one thread has.
pub(crate) struct Worker {
    // Dropped first: it lets go of what the lanes hold, and of the reactor's io_uring.
    channel: Box<dyn Channel>,
    lanes: Vec<Served>,
    ops: Vec<Op>,
    done: Vec<Completion>,
    mem: Memory,
    device: Arc<Device>,
    /// Ends the taking of chains.
    closing: Arc<AtomicBool>,
    actor: ActorId,
    /// It was woken.
    woken: Rc<Cell<bool>>,
    /// The channel's deadline that the reactor has a timer for.
    timer: Option<Instant>,
    reactor: Reactor,
}

impl Worker {
    /// On the thread that it serves. `gauges` are its queues', the first one being `first`.
    pub(crate) fn new(
        device: Arc<Device>,
        mem: Memory,
        first: u16,
        gauges: &[Arc<Gauge>],
        closing: Arc<AtomicBool>,
    ) -> Result<Self, OpenError> {
        let mut reactor = Reactor::new(&Options::default()).map_err(OpenError::Reactor)?;
        let woken = Rc::new(Cell::new(false));
        let mark = Woken(woken.clone());
        let actor = reactor.context().insert(Poll::Never, |_, _| Box::new(mark));
        let context = OpenContext {
            waker: reactor.context().waker(actor),
            uring: reactor.context().uring(),
        };
        let channel = device.volume().open(&context).map_err(OpenError::Volume)?;
        // The first rest declares sleep: from then on its descriptor tells.
        while !reactor.rest() {}
        let served = |(i, gauge): (usize, &Arc<Gauge>)| Served {
            // Lanes number the thread's queues, as vhost-user-backend does.
            lane: Lane::new(i as u16, device.clone()),
            gauge: gauge.clone(),
            broken: false,
        };
        log::debug!(
            "queues {first} to {} begin",
            usize::from(first) + gauges.len() - 1
        );
        Ok(Self {
            channel,
            lanes: gauges.iter().enumerate().map(served).collect(),
            ops: Vec::new(),
            done: Vec::new(),
            mem,
            device,
            closing,
            actor,
            woken,
            timer: None,
            reactor,
        })
    }

    /// What the thread's epoll has to watch.
    pub(crate) fn fd(&self) -> RawFd {
        self.reactor.fd().as_raw_fd()
    }

    /// Does all that there is to do, and returns when kicks and the reactor's descriptor will tell of
    /// whatever comes. With `poll` that is when no queue runs any more.
    pub(crate) fn serve(&mut self, vrings: &[Vring]) {
        loop {
            let worked = self.turn(vrings);
            if worked {
                continue;
            }
            if self.device.options().poll && self.runs(vrings) {
                std::hint::spin_loop();
                continue;
            }
            if self.arm(vrings) || !self.rest() {
                continue;
            }
            return;
        }
    }

    /// Takes, submits, polls, gives back: once. Says whether anything was done.
    fn turn(&mut self, vrings: &[Vring]) -> bool {
        let mut worked = false;
        // What the channel was too busy for comes first.
        if self.ops.is_empty() {
            for (served, vring) in self.lanes.iter_mut().zip(vrings) {
                worked |= served.take(vring, &self.mem, &self.closing, &mut self.ops);
            }
        }
        worked |= submit(&mut *self.channel, &mut self.ops);
        if self.lanes.iter().any(|s| s.lane.outstanding()) {
            self.channel.poll(Instant::now(), &mut self.done);
            for completion in self.done.drain(..) {
                worked = true;
                let lane = Lane::<GuestMemoryLoadGuard<GuestMemoryMmap>>::of(completion.tag);
                self.lanes[usize::from(lane)].lane.complete(&completion);
            }
        }
        for (served, vring) in self.lanes.iter_mut().zip(vrings) {
            served.publish(vring, &self.mem);
        }
        worked
    }

    fn runs(&self, vrings: &[Vring]) -> bool {
        !self.closing.load(Ordering::Relaxed)
            && vrings.iter().any(|vring| {
                let state = vring.get_ref();
                state.is_enabled() && state.get_queue().ready()
            })
    }

    /// Asks for kicks. Says whether chains have come meanwhile that can be taken.
    fn arm(&mut self, vrings: &[Vring]) -> bool {
        let mut more = false;
        for (served, vring) in self.lanes.iter_mut().zip(vrings) {
            let mut state = vring.get_mut();
            let runs = state.is_enabled() && state.get_queue().ready();
            if runs && !served.broken && !self.closing.load(Ordering::Relaxed) {
                // Without a free slot the next completion is what goes on, not a kick.
                let waits = state.enable_notification().unwrap_or(false);
                more |= waits && served.lane.has_room() && self.ops.is_empty();
            }
        }
        more
    }

    fn rest(&mut self) -> bool {
        let deadline = self.channel.deadline();
        if let Some(at) = deadline.filter(|_| deadline != self.timer) {
            self.reactor.context().timer(self.actor, at, 0);
        }
        self.timer = deadline;
        let rests = self.reactor.rest();
        // What came since the channel was polled has been delivered by now, and makes nothing readable any more.
        !self.woken.take() && rests
    }
}

impl Served {
    fn take(
        &mut self,
        vring: &Vring,
        mem: &Memory,
        closing: &AtomicBool,
        ops: &mut Vec<Op>,
    ) -> bool {
        let mut state = vring.get_mut();
        if !state.is_enabled() || !state.get_queue().ready() {
            return false;
        }
        // Raised before `closing` is looked at: whoever closes waits for what is taken here.
        let before = self.lane.in_flight();
        if before == 0 {
            self.gauge.set(1);
        }
        let queue = state.get_queue_mut();
        let mut taken = Taken::Chains(0);
        if !closing.load(Ordering::SeqCst) {
            let before = mem.memory();
            if self.gauge.fresh.load(Ordering::Relaxed)
                && self.gauge.fresh.swap(false, Ordering::Acquire)
            {
                self.broken = !queue.is_valid(&*before);
            }
            if !self.broken && self.lane.has_room() {
                // Fails where the ring's memory is gone, and then so does what follows.
                let _ = queue.disable_notification(&*before);
                // Memory may have been shared since it was looked at above, and be in a chain already. So the
                // index comes first, and the chains that it covers are read in memory that is looked at after it.
                let ready = match queue.avail_idx(&*before, Ordering::Acquire) {
                    Ok(index) => usize::from(index.0.wrapping_sub(queue.next_avail())),
                    Err(_) => BATCH,
                };
                taken = self.lane.take(queue, &mem.memory(), BATCH.min(ready), ops);
            }
        }
        if taken == Taken::Broken {
            log::error!("the driver broke a ring; it is left alone until it is set up anew");
            self.broken = true;
        }
        let after = self.lane.in_flight();
        if after != before || before == 0 {
            self.gauge.set(after);
        }
        matches!(taken, Taken::Chains(n) if n > 0)
    }

    fn publish(&mut self, vring: &Vring, mem: &Memory) {
        if !self.lane.has_finished() {
            return;
        }
        let mut state = vring.get_mut();
        if self.lane.publish(state.get_queue_mut(), &mem.memory()) {
            // A full counter is a rung bell; and a front end that closed it waits for none.
            let _ = state.signal_used_queue();
        }
        drop(state);
        self.gauge.set(self.lane.in_flight());
    }
}
