//! Faults: errors, silence, torn writes, completions out of order.
//!
//! Unsafe, because a torn write is an operation with fewer buffers than the host's.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bluff_block::{
    BlockError, Buffers, Cancel, Channel, Completion, Kind, Op, OpenContext, Tag, Volume,
};
use bluff_memory::IoVec;
use bluff_reactor::Waker;

use crate::OptionError;
use crate::options::{Chance, Options, touches};
use crate::relay::{DEPTH, Relay, hand_on};

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The operation fails without reaching the inner volume.
    Error(BlockError),
    /// It is never answered, unless it is cancelled or [`FaultHandle::resume`] lets it go on.
    Stall,
    /// Of a write only some of the first blocks reach the inner volume, and then it fails. What is
    /// no write with data is let through.
    Torn,
    /// Its completion is held until so many are, or none is on its way any more; then they come in
    /// any order.
    Reorder(usize),
}

/// Which kinds of operation are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kinds {
    /// Reads.
    pub read: bool,
    /// Writes.
    pub write: bool,
    /// Flushes.
    pub flush: bool,
    /// Discards.
    pub discard: bool,
    /// Writing zeroes.
    pub write_zeroes: bool,
}

impl Kinds {
    /// All of them.
    pub const ALL: Self = Self {
        read: true,
        write: true,
        flush: true,
        discard: true,
        write_zeroes: true,
    };

    /// None of them.
    pub const NONE: Self = Self {
        read: false,
        write: false,
        flush: false,
        discard: false,
        write_zeroes: false,
    };

    fn has(self, kind: Kind) -> bool {
        match kind {
            Kind::Read => self.read,
            Kind::Write { .. } => self.write,
            Kind::Flush => self.flush,
            Kind::Discard => self.discard,
            Kind::WriteZeroes { .. } => self.write_zeroes,
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let mut this = Self::NONE;
        for name in text.split(',') {
            match name {
                "read" => this.read = true,
                "write" => this.write = true,
                "flush" => this.flush = true,
                "discard" => this.discard = true,
                "write_zeroes" => this.write_zeroes = true,
                "all" => this = Self::ALL,
                _ => return None,
            }
        }
        Some(this)
    }
}

/// What goes wrong, and where.
#[derive(Clone, Debug, PartialEq)]
pub struct FaultOptions {
    /// What happens.
    pub action: Action,
    /// To which kinds of operation.
    pub kinds: Kinds,
    /// Only what touches these bytes; flushes always.
    pub range: Option<Range<u64>>,
    /// To which part of these operations, from 0 to 1.
    pub rate: f64,
    /// How many operations that it would happen to are let through first.
    pub skip: u64,
    /// How often it happens, on all channels together; `None`: without end.
    pub count: Option<u64>,
    /// Where chance begins.
    pub seed: u64,
}

const KEYS: [&str; 9] = [
    "action", "error", "window", "kinds", "range", "rate", "skip", "count", "seed",
];

impl FaultOptions {
    /// `action`, to every operation.
    pub fn all(action: Action) -> Self {
        Self {
            action,
            kinds: Kinds::ALL,
            range: None,
            rate: 1.0,
            skip: 0,
            count: None,
            seed: 1,
        }
    }

    /// Reads options: `action` (`error`, `stall`, `torn`, `reorder`), `error` (`io`, `nospace`,
    /// `readonly`, `unsupported`, `unavailable`), `window` (of a reorder, 8), `kinds`
    /// (`read,write,flush,discard,write_zeroes` or `all`), `range` (`0-1MiB`), `rate` (0 to 1), `skip`,
    /// `count`, `seed`.
    ///
    /// # Errors
    /// [`OptionError`] with the key, and what is allowed.
    pub fn from_options(all: &BTreeMap<String, String>) -> Result<Self, OptionError> {
        let mut o = Options::new(all);
        let error = o.take(
            "error",
            "io, nospace, readonly, unsupported or unavailable",
            |v| {
                Some(match v {
                    "io" => BlockError::Io,
                    "nospace" => BlockError::NoSpace,
                    "readonly" => BlockError::ReadOnly,
                    "unsupported" => BlockError::Unsupported,
                    "unavailable" => BlockError::Unavailable,
                    _ => return None,
                })
            },
        )?;
        let window = o.number("window")?;
        let action = o.take("action", "error, stall, torn or reorder", |v| {
            Some(match v {
                "error" => Action::Error(error.unwrap_or(BlockError::Io)),
                "stall" => Action::Stall,
                "torn" => Action::Torn,
                "reorder" => Action::Reorder(window.unwrap_or(8) as usize),
                _ => return None,
            })
        })?;
        let action = action.ok_or(OptionError::Missing("action"))?;
        let kinds = o.take(
            "kinds",
            "all, or some of read,write,flush,discard,write_zeroes",
            Kinds::parse,
        )?;
        let d = Self::all(action);
        let this = Self {
            action,
            kinds: kinds.unwrap_or(d.kinds),
            range: o.range()?,
            rate: o.rate()?.unwrap_or(d.rate),
            skip: o.number("skip")?.unwrap_or(d.skip),
            count: o.number("count")?,
            seed: o.number("seed")?.unwrap_or(d.seed),
        };
        o.finish(&KEYS)?;
        Ok(this)
    }
}

/// A fault that is in force, with what it has counted on all channels.
#[derive(Clone, Debug)]
struct Rule {
    options: Arc<FaultOptions>,
    /// Operations that it would have happened to.
    met: Arc<AtomicU64>,
}

impl Rule {
    fn new(options: FaultOptions) -> Self {
        Self {
            options: Arc::new(options),
            met: Arc::default(),
        }
    }

    fn strikes(&self, op: &Op, chance: &mut Chance) -> bool {
        let o = &*self.options;
        if !o.kinds.has(op.kind)
            || !touches(o.range.as_ref(), op.kind, op.offset, op.len)
            || !chance.hits(o.rate)
        {
            return false;
        }
        let met = self.met.fetch_add(1, Ordering::Relaxed);
        met >= o.skip && o.count.is_none_or(|n| met - o.skip < n)
    }
}

#[derive(Default)]
struct Shared {
    /// Counts the changes of `inner`.
    version: AtomicU64,
    inner: Mutex<Control>,
    struck: AtomicU64,
}

#[derive(Default)]
struct Control {
    rules: Vec<Rule>,
    /// Counts the calls of `resume`.
    resumed: u64,
    wakers: Vec<Waker>,
}

/// Switches faults while the volume is in use, from any thread.
#[derive(Clone)]
pub struct FaultHandle(Arc<Shared>);

impl fmt::Debug for FaultHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FaultHandle")
    }
}

impl FaultHandle {
    fn change(&self, f: impl FnOnce(&mut Control)) {
        let wakers = {
            let mut control = self.0.inner.lock().expect("nothing panics in here");
            f(&mut control);
            self.0.version.fetch_add(1, Ordering::Release);
            control.wakers.clone()
        };
        for waker in wakers {
            waker.wake();
        }
    }

    /// Puts `faults` in force in place of those before, for what is submitted from now on. The first
    /// that strikes an operation is what happens to it.
    pub fn set(&self, faults: Vec<FaultOptions>) {
        self.change(|c| c.rules = faults.into_iter().map(Rule::new).collect());
    }

    /// No fault from now on. What is stalled stays so.
    pub fn clear(&self) {
        self.set(Vec::new());
    }

    /// Lets everything that is stalled go on to the inner volume.
    pub fn resume(&self) {
        self.change(|c| c.resumed += 1);
    }

    /// How many operations a fault has struck so far.
    pub fn struck(&self) -> u64 {
        self.0.struck.load(Ordering::Relaxed)
    }
}

/// A volume on which things go wrong.
pub struct Fault {
    inner: Arc<dyn Volume>,
    shared: Arc<Shared>,
    seed: u64,
    opened: AtomicU64,
}

impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fault").field("inner", &self.inner).finish()
    }
}

impl Fault {
    /// Wraps `inner`, with `faults` in force; the first that strikes an operation is what happens to
    /// it.
    pub fn new(inner: Arc<dyn Volume>, faults: Vec<FaultOptions>) -> Self {
        let seed = faults.first().map_or(1, |f| f.seed);
        let shared = Arc::new(Shared::default());
        FaultHandle(shared.clone()).set(faults);
        Self {
            inner,
            shared,
            seed,
            opened: AtomicU64::new(0),
        }
    }

    /// Wraps `inner` so that it never answers anything. Cancelling completes at once.
    pub fn silent(inner: Arc<dyn Volume>) -> Self {
        Self::new(inner, vec![FaultOptions::all(Action::Stall)])
    }

    /// Switches its faults.
    pub fn handle(&self) -> FaultHandle {
        FaultHandle(self.shared.clone())
    }
}

impl Volume for Fault {
    hand_on!(inner);

    fn open(&self, context: &OpenContext) -> Result<Box<dyn Channel>, BlockError> {
        let inner = self.inner.open(context)?;
        let number = self.opened.fetch_add(1, Ordering::Relaxed);
        let mut channel = FaultChannel {
            relay: Relay::new(inner),
            shared: self.shared.clone(),
            waker: context.waker.clone(),
            version: 0,
            resumed: 0,
            rules: Vec::new(),
            chance: Chance::new(self.seed.wrapping_add(number)),
            block: u64::from(self.inner.geometry().block_size),
            held: Vec::with_capacity(DEPTH),
            ended: Vec::with_capacity(DEPTH),
        };
        let mut control = self.shared.inner.lock().expect("nothing panics in here");
        control.wakers.push(context.waker.clone());
        channel.resumed = control.resumed;
        drop(control);
        channel.refresh();
        Ok(Box::new(channel))
    }
}

/// What the layer knows of an operation.
struct Struck {
    action: Option<Action>,
    /// The buffers of a torn write, where the inner channel has it.
    torn: Vec<IoVec>,
}

struct FaultChannel {
    relay: Relay<Struck>,
    shared: Arc<Shared>,
    waker: Waker,
    version: u64,
    resumed: u64,
    rules: Vec<Rule>,
    chance: Chance,
    block: u64,
    /// Completions that are held to come out of order.
    held: Vec<(u32, Result<(), BlockError>, usize)>,
    ended: Vec<(u32, Result<(), BlockError>)>,
}

impl FaultChannel {
    #[cold]
    fn refresh(&mut self) {
        let resume = {
            let control = self.shared.inner.lock().expect("nothing panics in here");
            self.version = self.shared.version.load(Ordering::Acquire);
            self.rules.clone_from(&control.rules);
            std::mem::replace(&mut self.resumed, control.resumed) != control.resumed
        };
        if resume {
            for id in self.relay.all(|s| s.extra.action == Some(Action::Stall)) {
                self.relay.get(id).extra.action = None;
                self.relay.pass(id);
            }
        }
    }

    fn accept(&mut self, op: &Op) {
        let (rules, chance) = (&self.rules, &mut self.chance);
        let action = rules
            .iter()
            .find(|r| r.strikes(op, chance))
            .map(|r| r.options.action);
        if action.is_some() {
            self.shared.struck.fetch_add(1, Ordering::Relaxed);
        }
        let extra = Struck {
            action,
            torn: Vec::new(),
        };
        let id = self.relay.hold(op, extra);
        match action {
            Some(Action::Error(e)) => self.relay.finish(id, Err(e)),
            Some(Action::Stall) => {}
            Some(Action::Torn) if matches!(op.kind, Kind::Write { .. }) => self.tear(id),
            _ => self.relay.pass(id),
        }
    }

    /// Passes on a part of a write.
    fn tear(&mut self, id: u32) {
        let op = self.relay.get(id).op;
        let len = self.chance.below(op.len / self.block) * self.block;
        if len == 0 {
            return self.relay.finish(id, Err(BlockError::Io));
        }
        let mut left = len as usize;
        let mut torn = Vec::new();
        for piece in op.buffers.as_slice() {
            let mut piece = *piece;
            piece.truncate(left);
            left -= piece.len();
            if !piece.is_empty() {
                torn.push(piece);
            }
        }
        let slot = self.relay.get(id);
        slot.extra.torn = torn;
        // SAFETY: the slot keeps the list unchanged until the inner channel has completed the
        // operation or is gone (the relay drops it first); the memory is that of `op`.
        let buffers = unsafe { Buffers::new(&slot.extra.torn) };
        slot.instead = Some(Op { len, buffers, ..op });
        self.relay.pass(id);
    }

    /// Lets held completions go, in any order, where there are enough of them or no more will come.
    fn shuffle(&mut self) {
        let window = self.held.iter().map(|h| h.2).max().unwrap_or(0);
        if self.held.len() < window && self.relay.inside() > 0 {
            return;
        }
        while !self.held.is_empty() {
            let i = self.chance.below(self.held.len() as u64) as usize;
            let (id, result, _) = self.held.swap_remove(i);
            self.relay.finish(id, result);
        }
    }
}

impl Channel for FaultChannel {
    fn submit(&mut self, ops: &[Op]) -> usize {
        if self.shared.version.load(Ordering::Acquire) != self.version {
            self.refresh();
        }
        let n = ops.len().min(self.relay.room());
        for op in &ops[..n] {
            self.accept(op);
        }
        self.relay.push();
        n
    }

    fn kick(&mut self) {
        self.relay.inner.kick();
    }

    fn poll(&mut self, now: Instant, done: &mut Vec<Completion>) {
        if self.shared.version.load(Ordering::Acquire) != self.version {
            self.refresh();
        }
        let mut ended = std::mem::take(&mut self.ended);
        self.relay.pump(now, &mut ended);
        for (id, result) in ended.drain(..) {
            let slot = self.relay.get(id);
            let torn = slot.instead.is_some();
            match (slot.extra.action, slot.cancelled) {
                (Some(Action::Reorder(window)), false) => self.held.push((id, result, window)),
                _ if torn => self.relay.finish(id, result.and(Err(BlockError::Io))),
                _ => self.relay.finish(id, result),
            }
        }
        self.ended = ended;
        self.shuffle();
        done.append(&mut self.relay.done);
    }

    fn cancel(&mut self, tag: Tag) -> Cancel {
        let id = match self.relay.cancel(tag) {
            Ok(answer) => return answer,
            Err(held) => held,
        };
        let held = self.held.iter().position(|h| h.0 == id);
        let result = held.map(|i| self.held.swap_remove(i).1);
        self.relay
            .finish(id, result.unwrap_or(Err(BlockError::Cancelled)));
        Cancel::Soon
    }

    fn deadline(&self) -> Option<Instant> {
        self.relay.inner.deadline()
    }
}

impl Drop for FaultChannel {
    fn drop(&mut self) {
        let mut control = self.shared.inner.lock().expect("nothing panics in here");
        if let Some(i) = control.wakers.iter().position(|w| w.is_same(&self.waker)) {
            control.wakers.swap_remove(i);
        }
    }
}
