//! Latency: operations reach the inner volume later, or their completions come later.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bluff_block::{BlockError, Cancel, Channel, Completion, Kind, Op, OpenContext, Tag, Volume};

use crate::OptionError;
use crate::options::{Chance, Options, touches};
use crate::relay::{DEPTH, Relay, hand_on};

/// Where the time is spent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum When {
    /// Before the inner volume gets the operation: nothing has happened while it is held.
    #[default]
    Before,
    /// After it was done: it has happened, and its answer is late.
    After,
}

/// What is delayed, and by how much.
#[derive(Clone, Debug, PartialEq)]
pub struct DelayOptions {
    /// Of reads.
    pub read: Duration,
    /// Of writes.
    pub write: Duration,
    /// Of flushes.
    pub flush: Duration,
    /// Of discards.
    pub discard: Duration,
    /// Of writing zeroes.
    pub write_zeroes: Duration,
    /// Up to so much more, by chance.
    pub jitter: Duration,
    /// Only what touches these bytes; flushes always.
    pub range: Option<Range<u64>>,
    /// The part of these operations that is delayed, from 0 to 1.
    pub rate: f64,
    /// Where the time is spent.
    pub when: When,
    /// Where chance begins.
    pub seed: u64,
}

impl Default for DelayOptions {
    fn default() -> Self {
        Self {
            read: Duration::ZERO,
            write: Duration::ZERO,
            flush: Duration::ZERO,
            discard: Duration::ZERO,
            write_zeroes: Duration::ZERO,
            jitter: Duration::ZERO,
            range: None,
            rate: 1.0,
            when: When::Before,
            seed: 1,
        }
    }
}

const KEYS: [&str; 10] = [
    "read",
    "write",
    "flush",
    "discard",
    "write_zeroes",
    "jitter",
    "range",
    "rate",
    "when",
    "seed",
];

impl DelayOptions {
    /// The same delay for everything.
    pub fn all(delay: Duration) -> Self {
        Self {
            read: delay,
            write: delay,
            flush: delay,
            discard: delay,
            write_zeroes: delay,
            ..Self::default()
        }
    }

    /// Reads options: `read`, `write`, `flush`, `discard`, `write_zeroes`, `jitter` (times such as
    /// `2ms`), `range` (`0-1MiB`), `rate` (0 to 1), `when` (`before`, `after`), `seed`.
    ///
    /// # Errors
    /// [`OptionError`] with the key, and what is allowed.
    pub fn from_options(all: &BTreeMap<String, String>) -> Result<Self, OptionError> {
        let mut o = Options::new(all);
        let d = Self::default();
        let this = Self {
            read: o.duration("read")?.unwrap_or_default(),
            write: o.duration("write")?.unwrap_or_default(),
            flush: o.duration("flush")?.unwrap_or_default(),
            discard: o.duration("discard")?.unwrap_or_default(),
            write_zeroes: o.duration("write_zeroes")?.unwrap_or_default(),
            jitter: o.duration("jitter")?.unwrap_or_default(),
            range: o.range()?,
            rate: o.rate()?.unwrap_or(d.rate),
            when: o
                .take("when", "before or after", |v| match v {
                    "before" => Some(When::Before),
                    "after" => Some(When::After),
                    _ => None,
                })?
                .unwrap_or_default(),
            seed: o.number("seed")?.unwrap_or(d.seed),
        };
        o.finish(&KEYS)?;
        Ok(this)
    }

    fn of(&self, op: &Op, chance: &mut Chance) -> Duration {
        let base = match op.kind {
            Kind::Read => self.read,
            Kind::Write { .. } => self.write,
            Kind::Flush => self.flush,
            Kind::Discard => self.discard,
            Kind::WriteZeroes { .. } => self.write_zeroes,
        };
        let meant = base > Duration::ZERO
            && touches(self.range.as_ref(), op.kind, op.offset, op.len)
            && chance.hits(self.rate);
        if !meant {
            return Duration::ZERO;
        }
        let most = u64::try_from(self.jitter.as_nanos()).unwrap_or(u64::MAX);
        base + Duration::from_nanos(chance.below(most))
    }
}

/// A volume that takes its time.
#[derive(Debug)]
pub struct Delay {
    inner: Arc<dyn Volume>,
    options: Arc<DelayOptions>,
    opened: AtomicU64,
}

impl Delay {
    /// Wraps `inner`.
    pub fn new(inner: Arc<dyn Volume>, options: DelayOptions) -> Self {
        Self {
            inner,
            options: Arc::new(options),
            opened: AtomicU64::new(0),
        }
    }
}

impl Volume for Delay {
    hand_on!(inner);

    fn open(&self, context: &OpenContext) -> Result<Box<dyn Channel>, BlockError> {
        let number = self.opened.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(DelayChannel {
            relay: Relay::new(self.inner.open(context)?),
            chance: Chance::new(self.options.seed.wrapping_add(number)),
            options: self.options.clone(),
            fresh: Vec::with_capacity(DEPTH),
            due: BinaryHeap::with_capacity(DEPTH),
            serial: 0,
            now: None,
            ended: Vec::with_capacity(DEPTH),
        }))
    }
}

/// What the layer knows of an operation.
struct Held {
    delay: Duration,
    /// Set at the first poll after its submit.
    due: Option<Instant>,
    /// Tells it from earlier ones in its slot.
    serial: u64,
    /// How the inner volume ended it.
    result: Option<Result<(), BlockError>>,
}

struct DelayChannel {
    relay: Relay<Held>,
    options: Arc<DelayOptions>,
    chance: Chance,
    /// Submitted since the last poll, so without a time.
    fresh: Vec<(u32, u64)>,
    /// What ends when; entries of cancelled operations stay until their time.
    due: BinaryHeap<Reverse<(Instant, u32, u64)>>,
    serial: u64,
    now: Option<Instant>,
    ended: Vec<(u32, Result<(), BlockError>)>,
}

impl DelayChannel {
    /// Whether it is still the operation with this serial number.
    fn is(&self, id: u32, serial: u64) -> bool {
        self.relay
            .peek(id)
            .is_some_and(|s| s.extra.serial == serial)
    }

    fn time_is_up(&mut self, id: u32) {
        let result = self.relay.get(id).extra.result;
        match (self.options.when, result) {
            (When::Before, _) => self.relay.pass(id),
            (When::After, Some(result)) => self.relay.finish(id, result),
            // The inner volume takes longer than the delay.
            (When::After, None) => {}
        }
    }

    fn start_timers(&mut self, now: Instant) {
        let mut fresh = std::mem::take(&mut self.fresh);
        for (id, serial) in fresh.drain(..) {
            if self.is(id, serial) {
                let held = &mut self.relay.get(id).extra;
                let at = now + held.delay;
                held.due = Some(at);
                self.due.push(Reverse((at, id, serial)));
            }
        }
        self.fresh = fresh;
    }
}

impl Channel for DelayChannel {
    fn submit(&mut self, ops: &[Op]) -> usize {
        let n = ops.len().min(self.relay.room());
        for op in &ops[..n] {
            let delay = self.options.of(op, &mut self.chance);
            self.serial += 1;
            let held = Held {
                delay,
                due: None,
                serial: self.serial,
                result: None,
            };
            let id = self.relay.hold(op, held);
            if delay > Duration::ZERO {
                self.fresh.push((id, self.serial));
            }
            if delay == Duration::ZERO || self.options.when == When::After {
                self.relay.pass(id);
            }
        }
        self.relay.push();
        n
    }

    fn kick(&mut self) {
        self.relay.inner.kick();
    }

    fn poll(&mut self, now: Instant, done: &mut Vec<Completion>) {
        self.now = Some(now);
        self.start_timers(now);
        while let Some(&Reverse((at, id, serial))) = self.due.peek()
            && at <= now
        {
            self.due.pop();
            if self.is(id, serial) {
                self.time_is_up(id);
            }
        }
        let mut ended = std::mem::take(&mut self.ended);
        self.relay.pump(now, &mut ended);
        for (id, result) in ended.drain(..) {
            let slot = self.relay.get(id);
            let held = &mut slot.extra;
            let waits = self.options.when == When::After
                && !slot.cancelled
                && held.due.is_some_and(|due| due > now);
            if waits {
                held.result = Some(result);
            } else {
                self.relay.finish(id, result);
            }
        }
        self.ended = ended;
        done.append(&mut self.relay.done);
    }

    fn cancel(&mut self, tag: Tag) -> Cancel {
        let id = match self.relay.cancel(tag) {
            Ok(answer) => return answer,
            Err(held) => held,
        };
        let result = self.relay.get(id).extra.result;
        self.relay
            .finish(id, result.unwrap_or(Err(BlockError::Cancelled)));
        Cancel::Soon
    }

    fn deadline(&self) -> Option<Instant> {
        if !self.fresh.is_empty() && self.now.is_some() {
            // Its time has not even begun.
            return self.now;
        }
        let due = self.due.peek().map(|d| d.0.0);
        match (due, self.relay.inner.deadline()) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }
}
