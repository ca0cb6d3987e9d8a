//! Turns, arming, wakes, removal, descriptors, timers, messages.

use std::cell::RefCell;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::{Duration, Instant};

use bluff_reactor::{
    Actor, ActorId, Context, Event, Handle, Options, Poll, Reactor, Turn, UringUse, Waker,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// What a scripted actor saw.
#[derive(Debug, Default)]
struct Seen {
    events: Vec<Event>,
    turns: u32,
    arms: u32,
    dropped: u32,
    /// How many of the next turns find work.
    work: u32,
    /// The next arm finds something.
    late: bool,
    /// The next turn is the last.
    done: bool,
}

struct Scripted(Rc<RefCell<Seen>>);

impl Actor for Scripted {
    fn event(&mut self, _: &mut Context<'_>, event: Event) {
        self.0.borrow_mut().events.push(event);
    }
    fn turn(&mut self, _: &mut Context<'_>) -> Turn {
        let mut seen = self.0.borrow_mut();
        seen.turns += 1;
        if seen.done {
            return Turn::Done;
        }
        if seen.work == 0 {
            return Turn::Idle;
        }
        seen.work -= 1;
        Turn::Worked
    }
    fn arm(&mut self, _: &mut Context<'_>) -> bool {
        let mut seen = self.0.borrow_mut();
        seen.arms += 1;
        !std::mem::take(&mut seen.late)
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.0.borrow_mut().dropped += 1;
    }
}

fn reactor() -> Reactor {
    let options = Options {
        uring: UringUse::Off,
        ..Options::default()
    };
    Reactor::new(&options).unwrap()
}

fn add(reactor: &mut Reactor, poll: Poll) -> (ActorId, Rc<RefCell<Seen>>) {
    let seen = Rc::new(RefCell::new(Seen::default()));
    let actor = Scripted(seen.clone());
    let id = reactor.context().insert(poll, |_, _| Box::new(actor));
    (id, seen)
}

const TICK: Duration = Duration::from_millis(1);

fn step(reactor: &mut Reactor, times: u32) {
    for _ in 0..times {
        reactor.step(Some(TICK));
    }
}

fn until(reactor: &mut Reactor, what: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !what() {
        assert!(Instant::now() < end, "it never came");
        reactor.step(Some(TICK));
    }
}

#[test]
fn a_new_actor_has_turns_and_is_then_left_alone() {
    let mut r = reactor();
    let (_, seen) = add(&mut r, Poll::Never);
    step(&mut r, 10);
    {
        let s = seen.borrow();
        assert_eq!((s.turns, s.arms), (1, 1), "one without work");
        assert!(s.events.is_empty());
    }
}

/// What has had work is looked at for a moment; where that never finds any, most sleeps are begun at once.
#[test]
fn a_moment_after_work_that_does_not_pay_is_left_out() {
    const TIMES: u32 = 256;
    let mut r = reactor();
    let (id, seen) = add(&mut r, Poll::Never);
    let mut at_once = 0;
    for i in 0..TIMES {
        let before = {
            let mut s = seen.borrow_mut();
            s.work = 1;
            s.turns
        };
        r.context().wake(id);
        until(&mut r, || seen.borrow().arms == i + 1);
        at_once += u32::from(seen.borrow().turns == before + 2);
    }
    // The moments: after 0, 1, 3, 7, 15, 31, then 63 sleeps at once.
    assert!((TIMES - 10..TIMES).contains(&at_once), "{at_once}");
}

#[test]
fn what_arms_late_stays_active() {
    let mut r = reactor();
    let (_, seen) = add(&mut r, Poll::Never);
    seen.borrow_mut().late = true;
    step(&mut r, 10);
    let s = seen.borrow();
    assert_eq!((s.turns, s.arms), (2, 2));
}

#[test]
fn adaptive_polls_for_its_span_and_always_for_ever() {
    const SPAN: Duration = Duration::from_millis(20);
    // Before the reactor reads its clock for the first time.
    let start = Instant::now();
    let mut r = reactor();
    let (_, adaptive) = add(&mut r, Poll::Adaptive(SPAN));
    until(&mut r, || adaptive.borrow().arms == 1);
    assert!(start.elapsed() >= SPAN);
    assert!(adaptive.borrow().turns > 10);
    let sleeps = |r: &Reactor| r.handle().counters().sleeps.load(Ordering::Relaxed);
    step(&mut r, 3);
    assert!(sleeps(&r) >= 2, "all are armed");
    let (_, always) = add(&mut r, Poll::Always);
    let before = sleeps(&r);
    step(&mut r, 1000);
    assert_eq!(sleeps(&r), before, "a polling actor keeps it awake");
    assert_eq!(always.borrow().arms, 0);
    assert_eq!(adaptive.borrow().arms, 1, "the armed one is left alone");
}

#[test]
fn work_restarts_the_span() {
    const SPAN: Duration = Duration::from_millis(30);
    let mut r = reactor();
    let (_, seen) = add(&mut r, Poll::Adaptive(SPAN));
    let start = Instant::now();
    while start.elapsed() < SPAN * 2 {
        seen.borrow_mut().work = 1;
        r.step(Some(TICK));
    }
    assert_eq!(seen.borrow().arms, 0);
    until(&mut r, || seen.borrow().arms == 1);
}

#[test]
fn a_wake_makes_active_once() {
    let mut r = reactor();
    let (id, seen) = add(&mut r, Poll::Never);
    step(&mut r, 3);
    let turns = seen.borrow().turns;
    let waker = r.context().waker(id);
    waker.wake();
    waker.wake();
    waker.wake();
    step(&mut r, 3);
    assert_eq!(seen.borrow().events, [Event::Woken]);
    assert_eq!(seen.borrow().turns, turns + 1);
    r.context().wake(id);
    step(&mut r, 3);
    assert_eq!(seen.borrow().events.len(), 2);
    assert!(waker.is_same(&r.context().waker(id)));
}

#[test]
fn removal_and_names_that_are_not_used_again() {
    let mut r = reactor();
    let (first, a) = add(&mut r, Poll::Never);
    let waker = r.context().waker(first);
    step(&mut r, 2);
    r.context().remove(first);
    r.context().remove(first);
    step(&mut r, 1);
    assert_eq!(a.borrow().dropped, 1);
    let (second, b) = add(&mut r, Poll::Never);
    assert_ne!(first, second);
    step(&mut r, 2);
    waker.wake();
    let now = Instant::now();
    r.context().timer(first, now, 1);
    r.context().remove(first);
    step(&mut r, 5);
    assert!(
        b.borrow().events.is_empty(),
        "the slot is the same, the actor is not"
    );
    assert_eq!(b.borrow().dropped, 0);
    b.borrow_mut().done = true;
    r.context().wake(second);
    step(&mut r, 2);
    assert_eq!(b.borrow().dropped, 1, "it said that it is done");
    assert_eq!(a.borrow().dropped, 1);
}

#[test]
fn dropping_the_reactor_drops_its_actors() {
    let mut r = reactor();
    let (_, a) = add(&mut r, Poll::Never);
    let (id, b) = add(&mut r, Poll::Always);
    step(&mut r, 2);
    let waker = r.context().waker(id);
    drop(r);
    assert_eq!((a.borrow().dropped, b.borrow().dropped), (1, 1));
    waker.wake();
}

struct Watcher {
    fd: EventFd,
    seen: Rc<RefCell<Seen>>,
}

impl Actor for Watcher {
    fn event(&mut self, cx: &mut Context<'_>, event: Event) {
        self.seen.borrow_mut().events.push(event);
        match event {
            Event::Ready { .. } => drop(self.fd.read()),
            Event::Woken => cx.unregister(self.fd.as_raw_fd()),
            Event::Timer { .. } => {}
        }
    }
    fn turn(&mut self, _: &mut Context<'_>) -> Turn {
        Turn::Idle
    }
}

#[test]
fn descriptors() {
    let mut r = reactor();
    // Another one that is always active: descriptors are looked at all the same.
    for busy in [false, true] {
        if busy {
            add(&mut r, Poll::Always);
        }
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        let outside = fd.try_clone().unwrap();
        let seen = Rc::new(RefCell::new(Seen::default()));
        let inner = seen.clone();
        let id = r.context().insert(Poll::Never, move |cx, _| {
            cx.register(fd.as_raw_fd(), 7, epoll::Events::EPOLLIN)
                .unwrap();
            Box::new(Watcher { fd, seen: inner })
        });
        step(&mut r, 5);
        assert!(seen.borrow().events.is_empty());
        outside.write(1).unwrap();
        until(&mut r, || !seen.borrow().events.is_empty());
        let ready = Event::Ready {
            token: 7,
            events: epoll::Events::EPOLLIN.bits(),
        };
        assert_eq!(seen.borrow().events, [ready]);
        r.context().wake(id);
        step(&mut r, 2);
        outside.write(1).unwrap();
        step(&mut r, 50);
        assert_eq!(
            seen.borrow().events,
            [ready, Event::Woken],
            "not registered"
        );
        r.context().remove(id);
        step(&mut r, 1);
    }
}

#[test]
fn a_removed_actor_is_forgotten_by_epoll() {
    let mut r = reactor();
    let fd = EventFd::new(EFD_NONBLOCK).unwrap();
    let outside = fd.try_clone().unwrap();
    let id = r.context().insert(Poll::Never, |cx, _| {
        cx.register(outside.as_raw_fd(), 1, epoll::Events::EPOLLIN)
            .unwrap();
        Box::new(Scripted(Rc::default()))
    });
    r.context().remove(id);
    step(&mut r, 1);
    fd.write(1).unwrap();
    let before = r.handle().counters().asleep_ns.load(Ordering::Relaxed);
    step(&mut r, 20);
    let slept = r.handle().counters().asleep_ns.load(Ordering::Relaxed) - before;
    assert!(
        slept >= 10_000_000,
        "a ready descriptor of nobody keeps it awake"
    );
}

#[test]
fn timers_come_in_order_and_not_early() {
    let mut r = reactor();
    let (id, seen) = add(&mut r, Poll::Never);
    let start = Instant::now();
    for (token, ms) in [(3, 30), (1, 10), (2, 20), (0, 0)] {
        r.context()
            .timer(id, start + Duration::from_millis(ms), token);
    }
    let end = start + Duration::from_secs(10);
    let mut times = Vec::new();
    while times.len() < 4 && Instant::now() < end {
        // Without a limit: the timer itself ends the sleep.
        r.step(None);
        while times.len() < seen.borrow().events.len() {
            times.push(start.elapsed());
        }
    }
    let expected = [0, 1, 2, 3].map(|token| Event::Timer { token });
    assert_eq!(seen.borrow().events, expected);
    for (time, ms) in times.iter().zip([0, 10, 20, 30]) {
        assert!(*time >= Duration::from_millis(ms));
    }
}

#[test]
fn timers_come_while_others_are_polled() {
    let mut r = reactor();
    let (id, seen) = add(&mut r, Poll::Never);
    let (_, busy) = add(&mut r, Poll::Always);
    busy.borrow_mut().work = u32::MAX;
    let at = Instant::now() + Duration::from_millis(5);
    r.context().timer(id, at, 9);
    until(&mut r, || !seen.borrow().events.is_empty());
    assert!(Instant::now() >= at);
}

#[test]
fn a_step_sleeps_no_longer_than_its_limit() {
    let mut r = reactor();
    let start = Instant::now();
    r.step(Some(Duration::from_millis(15)));
    assert!(start.elapsed() >= Duration::from_millis(14));
    r.step(Some(Duration::ZERO));
    assert!(start.elapsed() < Duration::from_secs(5));
}

fn spawn(name: &str) -> (Handle, std::thread::JoinHandle<()>) {
    let options = Options {
        name: name.into(),
        ..Options::default()
    };
    Handle::spawn(options).unwrap()
}

#[test]
fn messages_run_in_order_on_its_thread() {
    let (handle, thread) = spawn("named");
    let (tx, rx) = mpsc::channel();
    for i in 0..1000 {
        let tx = tx.clone();
        handle.send(move |_| {
            tx.send((i, std::thread::current().name().map(String::from)))
                .unwrap();
        });
    }
    for i in 0..1000 {
        assert_eq!(rx.recv().unwrap(), (i, Some("named".into())));
    }
    handle.stop();
    thread.join().unwrap();
}

#[test]
fn messages_after_the_end_are_dropped() {
    let (handle, thread) = spawn("ends");
    handle.stop();
    thread.join().unwrap();
    let (tx, rx) = mpsc::channel::<()>();
    let keeps = handle.clone();
    handle.send(move |_| {
        let _ = (&keeps, tx.send(()));
    });
    assert!(
        rx.recv().is_err(),
        "whoever waits for an answer learns that none comes"
    );
}

#[test]
fn messages_that_a_reactor_did_not_come_to_are_dropped() {
    let r = reactor();
    let (tx, rx) = mpsc::channel::<()>();
    let handle = r.handle();
    let keeps = handle.clone();
    handle.send(move |_| {
        let _ = (&keeps, tx.send(()));
    });
    drop(r);
    assert!(rx.recv().is_err());
}

#[test]
fn a_cpu_that_is_not_there() {
    let options = Options {
        cpu: Some(1_000_000),
        ..Options::default()
    };
    assert!(Handle::spawn(options).is_err());
}

/// Plays ball with its twin on another reactor: each wake is answered with one.
struct Player {
    twin: Arc<OnceLock<Waker>>,
    left: u32,
    over: mpsc::Sender<()>,
}

impl Actor for Player {
    fn event(&mut self, _: &mut Context<'_>, event: Event) {
        assert_eq!(event, Event::Woken);
        if self.left == 0 {
            let _ = self.over.send(());
            return;
        }
        self.left -= 1;
        self.twin.get().expect("told before the game").wake();
    }
    fn turn(&mut self, _: &mut Context<'_>) -> Turn {
        Turn::Idle
    }
}

/// A wake that is lost between the last look and the sleep stops the game.
#[test]
fn no_wake_is_lost() {
    for poll in [Poll::Never, Poll::Adaptive(Duration::from_micros(5))] {
        let (over, rx) = mpsc::channel();
        let reactors = [spawn("a"), spawn("b")];
        let wakers: [Arc<OnceLock<Waker>>; 2] = Default::default();
        for i in 0..2 {
            let player = Player {
                twin: wakers[1 - i].clone(),
                left: 20_000,
                over: over.clone(),
            };
            let mine = wakers[i].clone();
            let (told, ready) = mpsc::channel();
            reactors[i].0.send(move |cx| {
                let id = cx.insert(poll, move |_, _| Box::new(player));
                let _ = mine.set(cx.waker(id));
                let _ = told.send(());
            });
            ready.recv().unwrap();
        }
        wakers[0].get().unwrap().wake();
        rx.recv_timeout(Duration::from_secs(60))
            .expect("a wake was lost");
        for (handle, thread) in reactors {
            handle.stop();
            thread.join().unwrap();
        }
    }
}

/// Many threads wake one actor at once: whatever was told before a wake is seen after it.
#[test]
fn wakes_of_many_threads() {
    struct Counter {
        told: Arc<AtomicU64>,
        seen: mpsc::Sender<u64>,
    }
    impl Actor for Counter {
        fn event(&mut self, _: &mut Context<'_>, _: Event) {
            let _ = self.seen.send(self.told.load(Ordering::Acquire));
        }
        fn turn(&mut self, _: &mut Context<'_>) -> Turn {
            Turn::Idle
        }
    }
    const EACH: u64 = 5_000;
    let (handle, thread) = spawn("many");
    let told = Arc::new(AtomicU64::new(0));
    let (seen, rx) = mpsc::channel();
    let (tx, waker) = mpsc::channel();
    let counter = Counter {
        told: told.clone(),
        seen,
    };
    handle.send(move |cx| {
        let id = cx.insert(Poll::Never, move |_, _| Box::new(counter));
        let _ = tx.send(cx.waker(id));
    });
    let waker = waker.recv().unwrap();
    std::thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| {
                for _ in 0..EACH {
                    told.fetch_add(1, Ordering::Release);
                    waker.wake();
                }
            });
        }
    });
    while rx
        .recv_timeout(Duration::from_secs(10))
        .expect("a wake was lost")
        < 4 * EACH
    {}
    handle.stop();
    thread.join().unwrap();
}
