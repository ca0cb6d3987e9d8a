//! A reactor that the test steps, and channels on it.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bluff_reactor::{Actor, Context, Event, Options, Poll, Reactor, Turn, UringUse};

use crate::{BlockError, Cancel, Channel, Completion, Kind, Op, OpenContext, Tag, Volume};

/// How long a channel may be silent before the test fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// A reactor that the test steps.
pub struct Rig {
    reactor: Reactor,
    /// A channel was woken: the test is to look before the reactor sleeps.
    woken: Rc<Cell<bool>>,
}

/// A channel on a rig. It is polled when it wakes the reactor, as a queue would, whatever the test
/// waits for.
pub struct Line(Rc<RefCell<State>>);

struct State {
    /// `None` when the line has gone.
    channel: Option<Box<dyn Channel>>,
    in_flight: usize,
    done: Vec<Completion>,
}

struct Sleeper {
    state: Rc<RefCell<State>>,
    woken: Rc<Cell<bool>>,
}

impl Actor for Sleeper {
    fn event(&mut self, cx: &mut Context<'_>, event: Event) {
        assert_eq!(event, Event::Woken);
        self.state.borrow_mut().poll(cx.now());
        self.woken.set(true);
    }
    fn turn(&mut self, _cx: &mut Context<'_>) -> Turn {
        Turn::Idle
    }
    fn arm(&mut self, _cx: &mut Context<'_>) -> bool {
        !self.woken.get()
    }
}

impl State {
    fn poll(&mut self, now: Instant) -> usize {
        let before = self.done.len();
        if let Some(channel) = &mut self.channel {
            channel.poll(now, &mut self.done);
        }
        let n = self.done.len() - before;
        assert!(n <= self.in_flight, "more completions than operations");
        self.in_flight -= n;
        n
    }
}

impl Rig {
    /// A reactor of its own.
    ///
    /// # Panics
    /// Where the system has no descriptors for it.
    pub fn new(uring: UringUse) -> Self {
        let options = Options {
            uring,
            ..Options::default()
        };
        Self {
            reactor: Reactor::new(&options).expect("a reactor"),
            woken: Rc::default(),
        }
    }

    /// Opens a channel.
    ///
    /// # Panics
    /// Where the volume refuses.
    pub fn open(&mut self, volume: &dyn Volume) -> Line {
        let state = Rc::new(RefCell::new(State {
            channel: None,
            in_flight: 0,
            done: Vec::new(),
        }));
        let sleeper = Sleeper {
            state: state.clone(),
            woken: self.woken.clone(),
        };
        let mut cx = self.reactor.context();
        let id = cx.insert(Poll::Never, |_, _| Box::new(sleeper));
        let context = OpenContext {
            waker: cx.waker(id),
            uring: cx.uring(),
        };
        state.borrow_mut().channel = Some(volume.open(&context).expect("a channel"));
        Line(state)
    }

    /// Lets the reactor run for up to `limit`.
    pub fn step(&mut self, limit: Duration) {
        self.woken.set(false);
        self.reactor.step(Some(limit));
    }

    /// Submits all of `ops`, in as many pieces as the channel wants, and waits for all of them and
    /// whatever else is in flight. Results in the order of completion.
    ///
    /// # Panics
    /// Where a completion is missing, doubled or unknown.
    pub fn run(&mut self, line: &mut Line, ops: &[Op]) -> Vec<Completion> {
        let mut results = Vec::new();
        let mut rest = ops;
        while !rest.is_empty() {
            rest = &rest[line.submit(rest)..];
            line.kick();
            if rest.is_empty() {
                break;
            }
            self.wait(line, 1);
            results.append(&mut line.take());
        }
        self.wait(line, usize::MAX);
        results.append(&mut line.take());
        results
    }

    /// Runs one operation.
    ///
    /// # Errors
    /// What it ended with.
    ///
    /// # Panics
    /// As [`Rig::run`].
    pub fn one(&mut self, line: &mut Line, op: Op) -> Result<(), BlockError> {
        let done = self.run(line, &[op]);
        assert_eq!(done.len(), 1, "one completion");
        assert_eq!(done[0].tag, op.tag, "its own completion");
        done[0].result
    }

    /// An operation without data.
    ///
    /// # Errors
    /// What it ended with.
    ///
    /// # Panics
    /// As [`Rig::run`].
    pub fn plain(
        &mut self,
        line: &mut Line,
        kind: Kind,
        offset: u64,
        len: u64,
    ) -> Result<(), BlockError> {
        self.one(line, Op::without_data(Tag(u64::MAX - 1), kind, offset, len))
    }

    /// Waits until at least `n` operations, or all in flight where there are fewer, are completed,
    /// polling only when there is a reason. They are left in the line ([`Line::take`]).
    ///
    /// # Panics
    /// Where nothing comes for half a minute.
    pub fn wait(&mut self, line: &mut Line, n: usize) {
        let want = n.min(line.in_flight() + line.0.borrow().done.len());
        line.poll(Instant::now());
        let (mut last, mut before) = (Instant::now(), 0);
        loop {
            let count = line.0.borrow().done.len();
            if count >= want {
                return;
            }
            if count > before {
                (last, before) = (Instant::now(), count);
            }
            assert!(
                last.elapsed() < PATIENCE,
                "nothing woke the reactor although {} operations are in flight",
                line.in_flight()
            );
            let now = Instant::now();
            let deadline = line.deadline();
            if deadline.is_some_and(|d| d <= now) {
                line.poll(now);
            } else {
                let nap = deadline.map_or(PATIENCE, |d| d - now);
                self.step(nap.min(PATIENCE));
            }
        }
    }
}

impl Line {
    /// Offers `ops` once; says how many were taken.
    ///
    /// # Panics
    /// Where none were taken although nothing is in flight.
    pub fn submit(&mut self, ops: &[Op]) -> usize {
        let mut state = self.0.borrow_mut();
        let channel = state.channel.as_mut().expect("the line is there");
        let n = channel.submit(ops);
        assert!(n <= ops.len());
        assert!(
            n > 0 || state.in_flight > 0 || ops.is_empty(),
            "never busy without work"
        );
        state.in_flight += n;
        n
    }

    /// Kicks the channel.
    pub fn kick(&mut self) {
        if let Some(channel) = &mut self.0.borrow_mut().channel {
            channel.kick();
        }
    }

    /// Cancels an operation.
    pub fn cancel(&mut self, tag: Tag) -> Cancel {
        match &mut self.0.borrow_mut().channel {
            Some(channel) => channel.cancel(tag),
            None => Cancel::Unknown,
        }
    }

    /// When the channel wants to be polled.
    pub fn deadline(&self) -> Option<Instant> {
        self.0.borrow().channel.as_ref()?.deadline()
    }

    /// Polls once; says how many were completed.
    ///
    /// # Panics
    /// Where more were completed than are in flight.
    pub fn poll(&mut self, now: Instant) -> usize {
        self.0.borrow_mut().poll(now)
    }

    /// Takes what was completed.
    pub fn take(&mut self) -> Vec<Completion> {
        std::mem::take(&mut self.0.borrow_mut().done)
    }

    /// How many operations were accepted and not handed out yet.
    pub fn in_flight(&self) -> usize {
        self.0.borrow().in_flight
    }

    /// Drops the channel with whatever it has in flight.
    pub fn abandon(self) {
        drop(self);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let channel = self.0.borrow_mut().channel.take();
        drop(channel);
    }
}
