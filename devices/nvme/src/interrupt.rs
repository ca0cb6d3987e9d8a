//! When and how a host is told of completions.
//!
//! ```text
//!   CQ: posted(n) --> coalesced? --> vector, or pin
//!   CQ: read -------> a vector that is still pending is withdrawn; the pin falls
//! ```

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bluff_pci::{Intx, Vector};

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

/// The pin of a controller, which stands for all its completion queues (PCIe transport 1.1 §3.5.1.1).
pub(crate) struct Pin {
    intx: Intx,
    state: Mutex<PinState>,
}

#[derive(Default)]
struct PinState {
    /// Completion queues with entries that the host has not read.
    raised: u32,
    /// INTMS bit 0.
    masked: bool,
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pin").finish_non_exhaustive()
    }
}

impl Pin {
    /// The pin, not asserted.
    pub(crate) fn new(intx: Intx) -> Arc<Self> {
        Arc::new(Self {
            intx,
            state: Mutex::default(),
        })
    }

    /// Masks it (INTMS), or no longer (INTMC).
    pub(crate) fn mask(&self, masked: bool) {
        self.change(|s| s.masked = masked);
    }

    fn change(&self, how: impl FnOnce(&mut PinState)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        how(&mut state);
        // Under the lock, so that the last one to change it has the last word.
        if state.raised > 0 && !state.masked {
            let _ = self.intx.assert();
        } else {
            self.intx.deassert();
        }
    }
}

/// What a completion queue tells its host by.
#[derive(Clone, Debug)]
pub(crate) enum Signal {
    /// Nothing: the host looks by itself (Create I/O Completion Queue, IEN 0).
    None,
    /// An MSI-X vector.
    Vector(Vector),
    /// The pin.
    Pin(Arc<Pin>),
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
    /// The pin is raised for this queue.
    raised: bool,
}

impl Interrupts {
    /// None given yet.
    pub(crate) fn new(signal: Signal, coalescing: Coalescing) -> Self {
        Self {
            signal,
            coalescing,
            untold: 0,
            due: None,
            raised: false,
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
        match &self.signal {
            Signal::None => {}
            // The attachment hears by itself of a notifier that hangs.
            Signal::Vector(vector) => {
                let _ = vector.signal();
            }
            Signal::Pin(pin) => {
                if !self.raised {
                    pin.change(|s| s.raised += 1);
                }
                self.raised = true;
            }
        }
    }

    /// Whether something is to be done when the host has read all.
    #[inline]
    pub(crate) fn is_owed(&self) -> bool {
        match &self.signal {
            Signal::None => false,
            Signal::Vector(vector) => vector.is_pending(),
            Signal::Pin(_) => self.raised,
        }
    }

    /// Whether it has to be heard of at once when the host reads on: a level stays until we take it away.
    pub(crate) fn is_level(&self) -> bool {
        self.raised
    }

    /// The host has read all. What was not given is not given any more (PCIe §6.1.4.6).
    pub(crate) fn read(&mut self) {
        match &self.signal {
            Signal::None => {}
            Signal::Vector(vector) => vector.withdraw(),
            Signal::Pin(pin) => {
                if std::mem::take(&mut self.raised) {
                    pin.change(|s| s.raised -= 1);
                }
            }
        }
        (self.untold, self.due) = (0, None);
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        if self.raised {
            self.read();
        }
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
