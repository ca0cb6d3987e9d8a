//! The loop.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use crate::handle::Shared;
use crate::{
    Actor, ActorId, Context, Counters, Event, Handle, Options, Poll, Turn, Uring, UringUse,
};

/// How often the descriptors of armed actors are looked at while others are polled.
const LOOK_EVERY: Duration = Duration::from_micros(50);
/// How often entries are offered to a kernel that was too busy for them.
const RETRY_EVERY: Duration = Duration::from_millis(1);
/// How many turns of actors without work before the clock is read again.
const CLOCK_EVERY: usize = 64;

/// Descriptors that are the reactor's own, in the place of an actor.
const OWN: ActorId = ActorId {
    index: 0xff_ffff,
    generation: 0,
};
const BELL: u16 = 0;
const TIMER: u16 = 1;
const URING: u16 = 2;

/// How long an actor that is not polled is looked at all the same after it had work.
///
/// Going to sleep and being woken costs more of the CPU than looking on for a moment, and the peer pays for a
/// notification as well. So there is a moment, of the length of two wake-ups (ours and that of a peer that
/// sleeps too); and where nothing comes in it, it is left out ever more often, so that an actor with rare
/// work costs no more than its sleeps.
#[derive(Default)]
struct Linger {
    /// It has had work since it was last armed.
    earned: bool,
    /// Moments in a row in which nothing came.
    missed: u8,
    /// Sleeps that will be begun at once.
    skip: u8,
}

impl Linger {
    const SPAN: Duration = Duration::from_micros(50);
    /// At most 63 sleeps in a row are begun at once.
    const MOST: u8 = 6;

    /// There was work; `again`: after a turn without.
    fn worked(&mut self, again: bool) {
        self.earned = true;
        if again {
            self.missed = 0;
        }
    }

    /// Whether an actor is to sleep that has had nothing to do for `idle`; `first`: since this turn.
    fn over(&mut self, first: bool, idle: Duration) -> bool {
        if !self.earned {
            return true;
        }
        if first && self.skip > 0 {
            self.skip -= 1;
        } else if idle < Self::SPAN {
            return false;
        } else {
            self.missed = (self.missed + 1).min(Self::MOST);
            self.skip = (1 << self.missed) - 1;
        }
        self.earned = false;
        true
    }
}

enum State {
    /// In the active list. `None`: it had work in its last turn.
    Active(Option<Instant>),
    Armed,
}

struct Slot {
    generation: u32,
    actor: Option<Box<dyn Actor>>,
    poll: Poll,
    linger: Linger,
    state: State,
    /// What it has registered with epoll.
    fds: Vec<RawFd>,
    live: bool,
}

pub(crate) struct Inner {
    pub(crate) shared: Arc<Shared>,
    pub(crate) now: Instant,
    pub(crate) uring: Option<Uring>,
    pub(crate) woken: Vec<ActorId>,
    pub(crate) removed: Vec<ActorId>,
    epoll: OwnedFd,
    timer: TimerFd,
    timers: BinaryHeap<Reverse<(Instant, ActorId, u16)>>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    active: Vec<u32>,
}

/// A reactor on the calling thread. [`Handle::spawn`] gives it a thread; tests step it themselves.
pub struct Reactor {
    inner: Inner,
    looked: Instant,
    events: Vec<epoll::Event>,
    spins: usize,
    stopped: bool,
}

impl Reactor {
    /// A reactor with nothing on it.
    ///
    /// # Errors
    /// Where its descriptors cannot be had.
    pub fn new(options: &Options) -> io::Result<Self> {
        let raw = epoll::create(true)?;
        // SAFETY: a new descriptor that nobody else has.
        #[allow(unsafe_code)]
        let epoll = unsafe { OwnedFd::from_raw_fd(raw) };
        let shared = Shared::new()?;
        let timer = TimerFd::new().map_err(io::Error::from)?;
        let uring = match options.uring {
            UringUse::Auto => Uring::new()
                .inspect_err(|e| log::info!("no io_uring here ({e}); files are served by threads"))
                .ok(),
            UringUse::Off => None,
        };
        let now = Instant::now();
        let mut inner = Inner {
            shared,
            now,
            uring,
            woken: Vec::new(),
            removed: Vec::new(),
            epoll,
            timer,
            timers: BinaryHeap::new(),
            slots: Vec::new(),
            free: Vec::new(),
            active: Vec::new(),
        };
        let (bell, timer) = (inner.shared.bell.as_raw_fd(), inner.timer.as_raw_fd());
        inner.watch(OWN, bell, BELL, epoll::Events::EPOLLIN)?;
        inner.watch(OWN, timer, TIMER, epoll::Events::EPOLLIN)?;
        if let Some(fd) = inner.uring.as_ref().map(Uring::fd) {
            inner.watch(OWN, fd, URING, epoll::Events::EPOLLIN)?;
        }
        Ok(Self {
            inner,
            looked: now,
            events: vec![epoll::Event { events: 0, data: 0 }; 64],
            spins: 0,
            stopped: false,
        })
    }

    /// A handle for other threads.
    pub fn handle(&self) -> Handle {
        Handle::new(self.inner.shared.clone())
    }

    /// The reactor as a message sees it.
    pub fn context(&mut self) -> Context<'_> {
        Context {
            inner: &mut self.inner,
            current: None,
        }
    }

    /// Runs until [`Handle::stop`].
    pub fn run(&mut self) {
        while !self.stopped {
            self.step(None);
        }
    }

    /// Once round the loop. Where every actor is armed it sleeps, until something comes or, where
    /// `limit` is given, for that long at most.
    pub fn step(&mut self, limit: Option<Duration>) {
        Counters::add(&self.inner.shared.counters.turns, 1);
        if self.inner.shared.is_pending() {
            self.take_inbox();
        }
        let turns = self.inner.active.len();
        let worked = self.turns();
        self.settle();
        // Turns with work take longer than those without, most of all where they call the kernel.
        self.spins += if worked { CLOCK_EVERY / 4 } else { turns };
        if !worked {
            // Where another thread shares the core (a driver that we wait for, perhaps) it goes faster.
            std::hint::spin_loop();
        }
        if self.inner.active.is_empty() {
            self.sleep(limit);
        } else if self.spins >= CLOCK_EVERY {
            self.spins = 0;
            self.inner.now = Instant::now();
            self.run_timers();
            if self.inner.now - self.looked >= LOOK_EVERY {
                // What the kernel did not take when it was submitted (EAGAIN for want of memory) is offered again
                // here, as no sleep may come in which it would be.
                if let Some(uring) = &self.inner.uring {
                    uring.flush();
                }
                self.look(0);
            }
            if !worked && self.inner.uring.as_ref().is_some_and(Uring::is_busy) {
                // The kernel may need this very CPU to finish what it has: its worker threads are bound
                // where we are, and would wait for the end of our time slice.
                std::thread::yield_now();
            }
        }
    }

    /// A descriptor that becomes readable when this reactor has something to do, for a loop that
    /// waits elsewhere. It is to be trusted after [`Reactor::rest`] said `true`.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.inner.epoll.as_fd()
    }

    /// Does what there is to do, without sleeping, in place of [`Reactor::run`]. `true`: nothing is
    /// left, and whatever comes from now on makes [`Reactor::fd`] readable until this is called
    /// again. `false`: there is more, or an actor wants to be polled; call it again.
    pub fn rest(&mut self) -> bool {
        self.inner.shared.rise();
        self.look(0);
        self.run_timers();
        if self.inner.shared.is_pending() {
            self.take_inbox();
        }
        self.turns();
        self.settle();
        // As in `sleep`: entries that the kernel did not take would make nothing readable.
        let told = self.inner.uring.as_ref().is_none_or(Uring::flush);
        let active = self.stopped || !self.inner.active.is_empty() || !told;
        if active || !self.inner.shared.try_sleep() {
            return false;
        }
        if let Some(Reverse((at, _, _))) = self.inner.timers.peek() {
            // A span of zero would disarm it.
            let span = at.saturating_duration_since(Instant::now());
            let span = span.max(Duration::from_nanos(1));
            if self.inner.timer.reset(span, None).is_err() {
                self.inner.shared.rise();
                return false;
            }
        }
        true
    }

    fn take_inbox(&mut self) {
        let inbox = self.inner.shared.take();
        self.stopped |= inbox.stop;
        self.inner.now = Instant::now();
        for message in inbox.messages {
            message(&mut self.context());
        }
        self.inner.woken.extend(inbox.woken);
        self.settle();
    }

    /// Calls every active actor once; says whether any had work.
    fn turns(&mut self) -> bool {
        let mut worked = false;
        let mut i = 0;
        while i < self.inner.active.len() {
            let index = self.inner.active[i];
            let slot = &mut self.inner.slots[index as usize];
            let id = ActorId {
                index,
                generation: slot.generation,
            };
            let Some(mut actor) = slot.actor.take() else {
                self.inner.active.swap_remove(i);
                continue;
            };
            let turn = actor.turn(&mut Context {
                inner: &mut self.inner,
                current: Some(id),
            });
            let now = self.inner.now;
            let slot = &mut self.inner.slots[index as usize];
            let mut stays = true;
            match turn {
                Turn::Worked => {
                    worked = true;
                    slot.linger
                        .worked(matches!(slot.state, State::Active(Some(_))));
                    slot.state = State::Active(None);
                }
                Turn::Idle => {
                    let (since, first) = match slot.state {
                        State::Active(Some(since)) => (since, false),
                        _ => (now, true),
                    };
                    slot.state = State::Active(Some(since));
                    let idle = now.saturating_duration_since(since);
                    let over = match slot.poll {
                        Poll::Always => false,
                        Poll::Never => slot.linger.over(first, idle),
                        Poll::Adaptive(span) => idle >= span,
                    };
                    if over {
                        let mut cx = Context {
                            inner: &mut self.inner,
                            current: Some(id),
                        };
                        stays = !actor.arm(&mut cx);
                        let state = if stays {
                            State::Active(None)
                        } else {
                            State::Armed
                        };
                        self.inner.slots[index as usize].state = state;
                    }
                }
                Turn::Done => self.inner.removed.push(id),
            }
            self.inner.slots[index as usize].actor = Some(actor);
            if stays {
                i += 1;
            } else {
                self.inner.active.swap_remove(i);
            }
        }
        worked
    }

    /// Delivers wakes and drops what was removed.
    fn settle(&mut self) {
        while let Some(id) = self.inner.removed.pop() {
            self.inner.drop_actor(id);
        }
        while let Some(id) = self.inner.woken.pop() {
            self.deliver(id, Event::Woken);
        }
    }

    fn deliver(&mut self, id: ActorId, event: Event) {
        let Some(slot) = self.inner.slots.get_mut(id.index as usize) else {
            return;
        };
        if slot.generation != id.generation || !slot.live {
            return;
        }
        let Some(mut actor) = slot.actor.take() else {
            return;
        };
        if matches!(slot.state, State::Armed) {
            self.inner.active.push(id.index);
        }
        slot.state = State::Active(None);
        actor.event(
            &mut Context {
                inner: &mut self.inner,
                current: Some(id),
            },
            event,
        );
        self.inner.slots[id.index as usize].actor = Some(actor);
    }

    fn run_timers(&mut self) {
        while let Some(&Reverse((at, id, token))) = self.inner.timers.peek() {
            if at > self.inner.now {
                break;
            }
            self.inner.timers.pop();
            self.deliver(id, Event::Timer { token });
        }
    }

    fn sleep(&mut self, limit: Option<Duration>) {
        if self.stopped || !self.inner.shared.try_sleep() {
            return;
        }
        let start = Instant::now();
        let next = self
            .inner
            .timers
            .peek()
            .map(|t| t.0.0.saturating_duration_since(start));
        let mut span = match (next, limit) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        if self.inner.uring.as_ref().is_some_and(|u| !u.flush()) {
            // The kernel took no entries; nothing would wake us when it could.
            span = Some(span.map_or(RETRY_EVERY, |s| s.min(RETRY_EVERY)));
        }
        let wait = match span {
            Some(Duration::ZERO) => 0,
            // The timer descriptor has nanoseconds, epoll's own time-out milliseconds.
            Some(span) => self.inner.timer.reset(span, None).map_or(1, |()| -1),
            None => -1,
        };
        self.inner.shared.counters.slept_from(start);
        self.look(wait);
        self.inner.shared.awake();
        let now = Instant::now();
        self.inner.now = now;
        self.inner.shared.counters.slept_to(start, now);
        self.run_timers();
        self.settle();
    }

    /// Waits in epoll for `timeout` milliseconds (-1: for ever) and delivers what is ready.
    fn look(&mut self, timeout: i32) {
        let mut events = std::mem::take(&mut self.events);
        // An interrupted wait is an empty one.
        let n = epoll::wait(self.inner.epoll.as_raw_fd(), timeout, &mut events).unwrap_or(0);
        let now = Instant::now();
        (self.looked, self.inner.now) = (now, now);
        for event in &events[..n] {
            let (id, token) = unpack(event.data);
            match (id == OWN, token) {
                (false, _) => self.deliver(
                    id,
                    Event::Ready {
                        token,
                        events: event.events,
                    },
                ),
                (true, BELL) => {
                    let _ = self.inner.shared.bell.read();
                }
                (true, TIMER) => {
                    let _ = self.inner.timer.wait();
                }
                (true, _) => {
                    if let Some(uring) = &self.inner.uring {
                        uring.reap();
                    }
                }
            }
        }
        self.events = events;
        self.settle();
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        self.inner.shared.close();
    }
}

impl Inner {
    pub(crate) fn reserve(&mut self, poll: Poll) -> ActorId {
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                assert!(
                    self.slots.len() < OWN.index as usize,
                    "fewer than 2^24 actors"
                );
                self.slots.push(Slot {
                    generation: 0,
                    actor: None,
                    poll,
                    linger: Linger::default(),
                    state: State::Armed,
                    fds: Vec::new(),
                    live: false,
                });
                (self.slots.len() - 1) as u32
            }
        };
        let slot = &mut self.slots[index as usize];
        slot.poll = poll;
        slot.linger = Linger::default();
        slot.live = true;
        ActorId {
            index,
            generation: slot.generation,
        }
    }

    pub(crate) fn fill(&mut self, id: ActorId, actor: Box<dyn Actor>) {
        let slot = &mut self.slots[id.index as usize];
        slot.actor = Some(actor);
        slot.state = State::Active(None);
        self.active.push(id.index);
    }

    fn drop_actor(&mut self, id: ActorId) {
        let Some(slot) = self.slots.get_mut(id.index as usize) else {
            return;
        };
        if slot.generation != id.generation || !slot.live {
            return;
        }
        slot.live = false;
        // 24 bits of it travel with epoll's events; a stale one would have to survive them all.
        slot.generation = (slot.generation + 1) & 0xff_ffff;
        let fds = std::mem::take(&mut slot.fds);
        let actor = slot.actor.take();
        self.active.retain(|&i| i != id.index);
        for fd in fds {
            self.forget(fd);
        }
        drop(actor);
        self.free.push(id.index);
    }

    pub(crate) fn register(
        &mut self,
        id: ActorId,
        fd: RawFd,
        token: u16,
        events: epoll::Events,
    ) -> io::Result<()> {
        self.watch(id, fd, token, events)?;
        self.slots[id.index as usize].fds.push(fd);
        Ok(())
    }

    fn watch(
        &mut self,
        id: ActorId,
        fd: RawFd,
        token: u16,
        events: epoll::Events,
    ) -> io::Result<()> {
        let event = epoll::Event::new(events, pack(id, token));
        epoll::ctl(
            self.epoll.as_raw_fd(),
            epoll::ControlOptions::EPOLL_CTL_ADD,
            fd,
            event,
        )
    }

    pub(crate) fn unregister(&mut self, id: ActorId, fd: RawFd) {
        let fds = &mut self.slots[id.index as usize].fds;
        if let Some(i) = fds.iter().position(|&f| f == fd) {
            fds.swap_remove(i);
            self.forget(fd);
        }
    }

    fn forget(&mut self, fd: RawFd) {
        let none = epoll::Event::new(epoll::Events::empty(), 0);
        // Fails where the descriptor was closed already, and then epoll has forgotten it.
        let del = epoll::ControlOptions::EPOLL_CTL_DEL;
        let _ = epoll::ctl(self.epoll.as_raw_fd(), del, fd, none);
    }

    pub(crate) fn set_timer(&mut self, at: Instant, actor: ActorId, token: u16) {
        self.timers.push(Reverse((at, actor, token)));
    }
}

fn pack(id: ActorId, token: u16) -> u64 {
    u64::from(id.index) << 40 | u64::from(id.generation) << 16 | u64::from(token)
}

fn unpack(data: u64) -> (ActorId, u16) {
    let id = ActorId {
        index: (data >> 40) as u32,
        generation: (data >> 16) as u32 & 0xff_ffff,
    };
    (id, data as u16)
}
