//! Shares of the io_uring: whose completions are whose, who is woken, who outlives whom.
//!
//! Unsafe, because entries name memory.
#![allow(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::io::{PipeReader, PipeWriter, Write};
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bluff_reactor::{Actor, Context, Event, Options, Poll, Port, Reactor, Turn, Uring, UringUse};
use io_uring::{opcode, types};

/// Takes its completions when it is woken.
struct Taker {
    port: Rc<Port>,
    taken: Rc<RefCell<Vec<(u32, i32)>>>,
    wakes: Rc<Cell<u32>>,
}

impl Actor for Taker {
    fn event(&mut self, _: &mut Context<'_>, event: Event) {
        assert_eq!(event, Event::Woken);
        self.wakes.set(self.wakes.get() + 1);
        self.port.take(&mut self.taken.borrow_mut());
    }
    fn turn(&mut self, _: &mut Context<'_>) -> Turn {
        Turn::Idle
    }
    fn arm(&mut self, _: &mut Context<'_>) -> bool {
        // The test looks before the reactor sleeps.
        self.taken.borrow().is_empty()
    }
}

struct Share {
    port: Rc<Port>,
    taken: Rc<RefCell<Vec<(u32, i32)>>>,
    wakes: Rc<Cell<u32>>,
    id: bluff_reactor::ActorId,
}

fn share(reactor: &mut Reactor) -> Share {
    let taken = Rc::new(RefCell::new(Vec::new()));
    let wakes = Rc::new(Cell::new(0));
    let (t, w) = (taken.clone(), wakes.clone());
    let mut port = None;
    let id = reactor.context().insert(Poll::Never, |cx, id| {
        let mine = Rc::new(ring(cx).port(cx.waker(id)));
        port = Some(mine.clone());
        Box::new(Taker {
            port: mine,
            taken: t,
            wakes: w,
        })
    });
    Share {
        port: port.unwrap(),
        taken,
        wakes,
        id,
    }
}

fn ring(cx: &Context<'_>) -> Uring {
    cx.uring().expect("asked before")
}

/// A reactor with an io_uring; where the kernel has none there is nothing to test.
fn reactor() -> Option<Reactor> {
    let mut r = Reactor::new(&Options::default()).unwrap();
    if r.context().uring().is_none() {
        eprintln!("not run: the kernel has no io_uring");
        return None;
    }
    Some(r)
}

fn nop(port: &Port, data: u32) {
    // SAFETY: it names nothing.
    unsafe { port.push(opcode::Nop::new().build(), data) }.unwrap();
}

/// A read that ends when something is written to the pipe, into memory that is never freed.
fn pending(port: &Port, data: u32) -> PipeWriter {
    let (reader, writer) = std::io::pipe().unwrap();
    let reader: &PipeReader = Box::leak(Box::new(reader));
    let buffer: &mut [u8; 8] = Box::leak(Box::default());
    let entry = opcode::Read::new(types::Fd(reader.as_raw_fd()), buffer.as_mut_ptr(), 8).build();
    // SAFETY: neither the descriptor nor the buffer goes.
    unsafe { port.push(entry, data) }.unwrap();
    port.submit();
    writer
}

fn until(reactor: &mut Reactor, what: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !what() {
        assert!(Instant::now() < end, "it never came");
        reactor.step(Some(Duration::from_millis(20)));
    }
}

#[test]
fn none_where_it_is_off() {
    let options = Options {
        uring: UringUse::Off,
        ..Options::default()
    };
    let mut r = Reactor::new(&options).unwrap();
    assert!(r.context().uring().is_none());
}

#[test]
fn each_gets_its_own() {
    let Some(mut r) = reactor() else { return };
    let (a, b) = (share(&mut r), share(&mut r));
    for i in 0..100 {
        nop(&a.port, i);
        nop(&b.port, 1000 + i);
    }
    assert!(a.port.unsubmitted());
    assert_eq!((a.port.in_flight(), b.port.in_flight()), (100, 100));
    a.port.submit();
    assert!(!b.port.unsubmitted(), "one call for everybody");
    let done = |s: &Share| s.taken.borrow().len() == 100;
    until(&mut r, || done(&a) && done(&b));
    let mut got = a.taken.borrow().clone();
    got.sort_unstable();
    assert_eq!(got, (0..100).map(|i| (i, 0)).collect::<Vec<_>>());
    assert!(b.taken.borrow().iter().all(|c| (1000..1100).contains(&c.0)));
    assert_eq!((a.port.in_flight(), b.port.in_flight()), (0, 0));
}

/// One who comes for its own finds those of others too, and tells them.
#[test]
fn who_takes_wakes_the_others() {
    let Some(mut r) = reactor() else { return };
    let (a, b) = (share(&mut r), share(&mut r));
    nop(&a.port, 1);
    nop(&b.port, 2);
    a.port.submit();
    let mut out = Vec::new();
    let end = Instant::now() + Duration::from_secs(10);
    while out.is_empty() {
        a.port.take(&mut out);
        assert!(Instant::now() < end);
    }
    assert_eq!(out, [(1, 0)]);
    until(&mut r, || !b.taken.borrow().is_empty());
    assert_eq!(*b.taken.borrow(), [(2, 0)]);
    assert_eq!(
        (a.wakes.get(), b.wakes.get()),
        (0, 1),
        "who came itself is not woken"
    );
}

#[test]
fn a_completion_ends_the_sleep() {
    let Some(mut r) = reactor() else { return };
    let a = share(&mut r);
    let mut writer = pending(&a.port, 5);
    r.step(Some(Duration::from_millis(5)));
    r.step(Some(Duration::from_millis(5)));
    assert!(a.taken.borrow().is_empty());
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        writer.write_all(&[1, 2, 3]).unwrap();
    });
    let start = Instant::now();
    while a.taken.borrow().is_empty() {
        r.step(Some(Duration::from_secs(10)));
        assert!(
            start.elapsed() < Duration::from_secs(5),
            "nothing ended the sleep"
        );
    }
    assert_eq!(*a.taken.borrow(), [(5, 3)]);
    thread.join().unwrap();
}

/// What was pushed and never submitted is told to the kernel before the reactor sleeps.
#[test]
fn nothing_is_left_in_the_queue() {
    let Some(mut r) = reactor() else { return };
    let a = share(&mut r);
    nop(&a.port, 3);
    until(&mut r, || !a.taken.borrow().is_empty());
    assert!(!a.port.unsubmitted());
}

/// Never idle, so that the reactor does not sleep.
struct Busy;

impl Actor for Busy {
    fn event(&mut self, _: &mut Context<'_>, _: Event) {}
    fn turn(&mut self, _: &mut Context<'_>) -> Turn {
        Turn::Worked
    }
}

/// The same while the reactor is kept awake by others: nobody submits for somebody else.
#[test]
fn nothing_is_left_in_the_queue_of_a_reactor_that_never_sleeps() {
    let Some(mut r) = reactor() else { return };
    let a = share(&mut r);
    r.context().insert(Poll::Always, |_, _| Box::new(Busy));
    nop(&a.port, 3);
    until(&mut r, || !a.taken.borrow().is_empty());
    assert!(!a.port.unsubmitted());
}

/// The same in somebody else's loop.
#[test]
fn nothing_is_left_in_the_queue_at_rest() {
    let Some(mut r) = reactor() else { return };
    let a = share(&mut r);
    nop(&a.port, 3);
    let end = Instant::now() + Duration::from_secs(10);
    while !r.rest() && a.taken.borrow().is_empty() {
        assert!(Instant::now() < end);
    }
    assert!(!a.port.unsubmitted());
    while a.taken.borrow().is_empty() {
        r.rest();
        assert!(Instant::now() < end, "it never came");
    }
    assert_eq!(*a.taken.borrow(), [(3, 0)]);
}

#[test]
fn full_is_said_and_nothing_is_lost() {
    let Some(mut r) = reactor() else { return };
    let a = share(&mut r);
    let mut pushed = 0;
    loop {
        // SAFETY: it names nothing.
        match unsafe { a.port.push(opcode::Nop::new().build(), pushed) } {
            Ok(()) => pushed += 1,
            Err(e) => {
                assert_eq!(e, bluff_reactor::Full);
                break;
            }
        }
        assert!(pushed < 1 << 20, "it is never full");
    }
    a.port.submit();
    until(&mut r, || a.taken.borrow().len() == pushed as usize);
    nop(&a.port, 9);
    a.port.submit();
    until(&mut r, || a.taken.borrow().len() == pushed as usize + 1);
}

#[test]
fn an_heir_gets_what_comes_after() {
    let Some(mut r) = reactor() else { return };
    let a = share(&mut r);
    let mut writer = pending(&a.port, 7);
    nop(&a.port, 8);
    a.port.submit();
    let end = Instant::now() + Duration::from_secs(10);
    while a.port.in_flight() == 2 {
        // Reaps, without handing anything to the actor.
        share(&mut r).port.take(&mut Vec::new());
        assert!(Instant::now() < end);
    }
    let Share { port, id, .. } = a;
    r.context().remove(id);
    r.step(Some(Duration::ZERO));
    let port = Rc::into_inner(port).expect("the actor has gone");
    let got = Rc::new(RefCell::new(Vec::new()));
    let heir = got.clone();
    port.leave(move |data, result| heir.borrow_mut().push((data, result)));
    assert_eq!(*got.borrow(), [(8, 0)], "what had come already");
    assert_eq!(Rc::strong_count(&got), 2, "one is outstanding");
    writer.write_all(&[1]).unwrap();
    until(&mut r, || got.borrow().len() == 2);
    assert_eq!(got.borrow()[1], (7, 1));
    assert_eq!(Rc::strong_count(&got), 1, "the heir goes with the last one");
    // The share is used again, and nothing of the old one comes.
    let b = share(&mut r);
    nop(&b.port, 1);
    b.port.submit();
    until(&mut r, || !b.taken.borrow().is_empty());
    assert_eq!(*b.taken.borrow(), [(1, 0)]);
}

#[test]
fn an_heir_of_nothing_goes_at_once() {
    let Some(mut r) = reactor() else { return };
    let a = share(&mut r);
    r.context().remove(a.id);
    r.step(Some(Duration::ZERO));
    let token = Rc::new(());
    let held = token.clone();
    Rc::into_inner(a.port)
        .unwrap()
        .leave(move |_, _| drop(held.clone()));
    assert_eq!(Rc::strong_count(&token), 1);
}

/// A share that goes with entries in flight is not given to the next one before they are over.
#[test]
fn a_share_in_flight_is_not_reused() {
    let Some(mut r) = reactor() else { return };
    let a = share(&mut r);
    let mut writer = pending(&a.port, 7);
    r.context().remove(a.id);
    drop(a);
    r.step(Some(Duration::ZERO));
    let b = share(&mut r);
    writer.write_all(&[1]).unwrap();
    nop(&b.port, 1);
    b.port.submit();
    until(&mut r, || !b.taken.borrow().is_empty());
    for _ in 0..10 {
        r.step(Some(Duration::from_millis(1)));
    }
    assert_eq!(*b.taken.borrow(), [(1, 0)], "not the other's");
}

#[test]
fn wait_blocks_for_a_completion() {
    let Some(mut r) = reactor() else { return };
    let a = share(&mut r);
    nop(&a.port, 4);
    a.port.wait().unwrap();
    let mut out = Vec::new();
    a.port.take(&mut out);
    assert_eq!(out, [(4, 0)]);
}
