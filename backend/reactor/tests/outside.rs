//! A reactor in somebody else's loop: its descriptor tells when it has something to do.

use std::cell::RefCell;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bluff_reactor::{Actor, Context, Event, Options, Poll, Reactor, Turn};

struct Listener(Rc<RefCell<Vec<Event>>>);

impl Actor for Listener {
    fn event(&mut self, _: &mut Context<'_>, event: Event) {
        self.0.borrow_mut().push(event);
    }

    fn turn(&mut self, _: &mut Context<'_>) -> Turn {
        Turn::Idle
    }
}

/// Whether `fd` is readable within `ms` milliseconds.
fn readable(fd: RawFd, ms: i32) -> bool {
    let epoll = epoll::create(true).unwrap();
    let event = epoll::Event::new(epoll::Events::EPOLLIN, 0);
    epoll::ctl(epoll, epoll::ControlOptions::EPOLL_CTL_ADD, fd, event).unwrap();
    let mut ready = [epoll::Event { events: 0, data: 0 }];
    let n = epoll::wait(epoll, ms, &mut ready).unwrap();
    epoll::close(epoll).unwrap();
    n == 1
}

#[test]
fn wakes_and_timers_make_the_descriptor_readable() {
    let mut reactor = Reactor::new(&Options::default()).unwrap();
    let seen = Rc::new(RefCell::new(Vec::new()));
    let actor = Listener(seen.clone());
    let id = reactor
        .context()
        .insert(Poll::Never, |_, _| Box::new(actor));
    let waker = reactor.context().waker(id);
    while !reactor.rest() {}
    assert!(!readable(reactor.fd().as_raw_fd(), 0));

    for _ in 0..100 {
        let waker = waker.clone();
        let thread = std::thread::spawn(move || waker.wake());
        assert!(readable(reactor.fd().as_raw_fd(), 10_000));
        thread.join().unwrap();
        while !reactor.rest() {}
        assert_eq!(seen.borrow_mut().pop(), Some(Event::Woken));
        assert!(!readable(reactor.fd().as_raw_fd(), 0));
    }

    let at = Instant::now() + Duration::from_millis(5);
    reactor.context().timer(id, at, 7);
    while !reactor.rest() {}
    assert!(readable(reactor.fd().as_raw_fd(), 10_000));
    while !reactor.rest() {}
    assert_eq!(seen.borrow_mut().pop(), Some(Event::Timer { token: 7 }));
    assert!(Instant::now() >= at);
    assert!(!readable(reactor.fd().as_raw_fd(), 0));
}

#[test]
fn a_wake_before_the_rest_is_not_lost() {
    let mut reactor = Reactor::new(&Options::default()).unwrap();
    let seen = Rc::new(RefCell::new(Vec::new()));
    let actor = Listener(seen.clone());
    let id = reactor
        .context()
        .insert(Poll::Never, |_, _| Box::new(actor));
    reactor.context().waker(id).wake();
    while !reactor.rest() {}
    assert_eq!(*seen.borrow(), [Event::Woken]);
}
