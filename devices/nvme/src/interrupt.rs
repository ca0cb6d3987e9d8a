//! When and how a host is told of completions.
//!
//! ```text
//!   CQ: posted(n) --> coalesced? --> vector
//!   CQ: read -------> a vector that is still pending is withdrawn, unless others have it too
//! ```
//! There is MSI-X, and neither MSI nor a pin.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bluff_pci::Vector;

/// How interrupts are put together (Interrupt Coalescing, Base 2.1 §5.2.26.2.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Coalescing {
    /// Completions for which one interrupt is enough, zero's based as in the feature.
    pub(crate) threshold_z: u8,
    /// How long one may wait for others; zero: not at all.
    pub(crate) time: Duration,
}

impl Coalescing {
    fn is_on(&self) -> bool {
        self.threshold_z > 0 && !self.time.is_zero()
    }
}

/// What a completion queue tells its host by.
#[derive(Clone, Debug)]
pub(crate) enum Signal {
    /// Nothing: the host looks by itself (Create I/O Completion Queue, IEN 0).
    None,
    /// An MSI-X vector.
    Vector(Wire),
}

/// A vector, which several completion queues may have.
#[derive(Clone, Debug)]
pub(crate) struct Wire {
    vector: Vector,
    /// More than one has it, or has had it: what is pending may be another's.
    shared: Arc<AtomicBool>,
}

impl Wire {
    /// Nobody has it yet.
    pub(crate) fn new(vector: Vector) -> Self {
        Self {
            vector,
            shared: Arc::default(),
        }
    }

    /// Says whether several queues have it, before the second one has it.
    pub(crate) fn set_shared(&self, shared: bool) {
        self.shared.store(shared, Ordering::Release);
    }

    fn is_shared(&self) -> bool {
        self.shared.load(Ordering::Acquire)
    }

    fn withdraw(&self) {
        if self.is_shared() {
            return;
        }
        self.vector.withdraw();
        // What was taken back just now may have been that of a queue which has just come. Whoever asked for it was told before that it is shared, and
        // the two changes of the vector are in order. An interrupt too many does no harm.
        if self.is_shared() {
            let _ = self.vector.signal();
        }
    }
}

/// A queue's interrupts.
#[derive(Debug)]
pub(crate) struct Interrupts {
    signal: Signal,
    coalescing: Coalescing,
    /// Completions that the host was not told of.
    untold: u32,
    /// Until when it has to be.
    due: Option<Instant>,
}

impl Interrupts {
    /// None given yet.
    pub(crate) fn new(signal: Signal, coalescing: Coalescing) -> Self {
        Self {
            signal,
            coalescing,
            untold: 0,
            due: None,
        }
    }

    /// Puts them together in another way from now on.
    pub(crate) fn coalesce(&mut self, coalescing: Coalescing) {
        self.coalescing = coalescing;
    }

    /// `n` completions were posted. Says whether the host was told, or until when it is to be by [`Interrupts::due`].
    #[inline]
    pub(crate) fn posted(&mut self, n: u32, now: Instant) -> Told {
        if matches!(self.signal, Signal::None) {
            return Told::Nothing;
        }
        self.untold += n;
        if self.coalescing.is_on() && self.untold <= u32::from(self.coalescing.threshold_z) {
            if self.due.is_some() {
                return Told::Nothing;
            }
            let due = now + self.coalescing.time;
            self.due = Some(due);
            return Told::At(due);
        }
        self.tell();
        Told::Now
    }

    /// Tells the host of what has waited long enough; says whether it did.
    pub(crate) fn due(&mut self, now: Instant) -> bool {
        let due = self.due.is_some_and(|at| now >= at);
        if due {
            self.tell();
        }
        due
    }

    fn tell(&mut self) {
        (self.untold, self.due) = (0, None);
        if let Signal::Vector(wire) = &self.signal {
            // The attachment hears by itself of a notifier that hangs.
            let _ = wire.vector.signal();
        }
    }

    /// Whether something is to be done when the host has read all.
    #[inline]
    pub(crate) fn is_owed(&self) -> bool {
        match &self.signal {
            Signal::None => false,
            Signal::Vector(wire) => wire.vector.is_pending() && !wire.is_shared(),
        }
    }

    /// The host has read all. What was not given is not given any more (PCIe §6.1.4.6).
    pub(crate) fn read(&mut self) {
        if let Signal::Vector(wire) = &self.signal {
            wire.withdraw();
        }
        (self.untold, self.due) = (0, None);
    }
}

/// What became of completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    /// The host was told.
    Now,
    /// It is to be told then.
    At(Instant),
    /// Nothing is to be done.
    Nothing,
}
