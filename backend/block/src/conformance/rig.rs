//! A reactor that the test steps, and channels on it.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bluff_reactor::{Actor, Context, Event, Options, Poll, Reactor, Turn, UringUse};

use crate::{BlockError, Channel, Completion, Kind, Op, OpenContext, Tag, Volume};

/// How long a channel may be silent before the test fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// A reactor that the test steps.
pub struct Rig {
    reactor: Reactor,
}

/// A channel on a rig, and the flag that its waker sets.
pub struct Line {
    /// The channel, for what the rig does not do.
    pub channel: Box<dyn Channel>,
    woken: Rc<Cell<bool>>,
    in_flight: usize,
    done: Vec<Completion>,
}

struct Sleeper(Rc<Cell<bool>>);

impl Actor for Sleeper {
    fn event(&mut self, _cx: &mut Context<'_>, event: Event) {
        assert_eq!(event, Event::Woken);
        self.0.set(true);
    }
    fn turn(&mut self, _cx: &mut Context<'_>) -> Turn {
        Turn::Idle
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
        }
    }

    /// Opens a channel.
    ///
    /// # Panics
    /// Where the volume refuses.
    pub fn open(&mut self, volume: &dyn Volume) -> Line {
        let woken = Rc::new(Cell::new(false));
        let mut cx = self.reactor.context();
        let flag = woken.clone();
        let id = cx.insert(Poll::Never, |_, _| Box::new(Sleeper(flag)));
        let context = OpenContext {
            waker: cx.waker(id),
            uring: cx.uring(),
        };
        Line {
            channel: volume.open(&context).expect("a channel"),
            woken,
            in_flight: 0,
            done: Vec::new(),
        }
    }

    /// Lets the reactor run for up to `limit`.
    pub fn step(&mut self, limit: Duration) {
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
            line.channel.kick();
            if rest.is_empty() {
                break;
            }
            self.wait(line, 1);
            results.append(&mut line.done);
        }
        self.wait(line, usize::MAX);
        results.append(&mut line.done);
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
        let want = n.min(line.in_flight + line.done.len());
        line.poll(Instant::now());
        let mut last = Instant::now();
        while line.done.len() < want {
            let before = line.done.len();
            let deadline = line.channel.deadline();
            let now = Instant::now();
            let due = deadline.is_some_and(|d| d <= now);
            if due || line.woken.replace(false) {
                line.poll(now);
            } else {
                let nap = deadline.map_or(PATIENCE, |d| d - now);
                self.reactor.step(Some(nap.min(PATIENCE)));
            }
            if line.done.len() > before {
                last = Instant::now();
            }
            assert!(
                last.elapsed() < PATIENCE,
                "nothing woke the reactor although {} operations are in flight",
                line.in_flight
            );
        }
    }
}

impl Line {
    /// Offers `ops` once; says how many were taken.
    ///
    /// # Panics
    /// Where none were taken although nothing is in flight.
    pub fn submit(&mut self, ops: &[Op]) -> usize {
        let n = self.channel.submit(ops);
        assert!(n <= ops.len());
        assert!(
            n > 0 || self.in_flight > 0 || ops.is_empty(),
            "never busy without work"
        );
        self.in_flight += n;
        n
    }

    /// Polls once; says how many were completed.
    ///
    /// # Panics
    /// Where more were completed than are in flight.
    pub fn poll(&mut self, now: Instant) -> usize {
        let before = self.done.len();
        self.channel.poll(now, &mut self.done);
        let n = self.done.len() - before;
        assert!(n <= self.in_flight, "more completions than operations");
        self.in_flight -= n;
        n
    }

    /// Takes what was completed.
    pub fn take(&mut self) -> Vec<Completion> {
        std::mem::take(&mut self.done)
    }

    /// How many operations were accepted and not handed out yet.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Drops the channel with whatever it has in flight.
    pub fn abandon(self) {
        drop(self.channel);
    }
}
