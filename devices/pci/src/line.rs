//! One interrupt: who asked for it, who masks it, and where it goes.
//!
//! ```text
//!   a reactor: signal                       the session: mask, unmask, another notifier
//!      state |= REQUEST                        state |= reason    state &= !reason
//!      masked? it stays pending                                   REQUEST and unmasked?
//!      else deliver <-----------------------------------------------'
//!        lock; take REQUEST if nothing masks; write the eventfd; unlock
//! ```
//!
//! # Why nothing is lost
//! Requests and masks are bits of one word, and every change of it is a read-modify-write, so they have one order that all threads agree on (C11
//! §5.1.2.4, the modification order of an object). Either a signal comes before the unmasking in that order: then who
//! unmasks sees the request, and delivers; or after it: then who signals sees no mask, and delivers. Both may try: who comes first takes the
//! request away, by a read-modify-write too, and one interrupt stands for both, as with hardware.
//! Whoever takes a request has read the word that the signal wrote, or a later one of its release sequence, with acquire; so what was
//! published before the signal (a completion) is visible before the eventfd is written, whichever thread writes it.
//!
//! # Why nothing comes late
//! The request is taken, and the eventfd written, under the lock. Who masks takes the lock after it has set its bit. So
//! a mask that has returned has no write after it: a delivery that was before it has ended, and a later one finds the bit.
//!
//! Of a masked interrupt a signal costs one read-modify-write; of another one two more and a lock that nobody
//! else wants unless masks change. It is held for one write of an eventfd, which is bounded ([`bluff_reactor::Notifier`]).

#[cfg(all(test, loom))]
mod explored;

use std::sync::PoisonError;

use bluff_reactor::{Notice, Notifier};

use crate::sync::{AtomicU32, Mutex, Ordering};

/// Why an interrupt is not given: bits of the word.
pub(crate) mod reason {
    /// MSI-X: the entry's own mask bit.
    pub const ENTRY: u32 = 1;
    /// MSI-X: off, or all are masked. INTx: disabled, or MSI-X is on.
    pub const CONTROL: u32 = 1 << 1;
    /// Not in D0; for MSI-X, not bus master.
    pub const BUS: u32 = 1 << 2;
    /// In a reset.
    pub const RESET: u32 = 1 << 3;
    /// The attachment masks it.
    pub const CLIENT: u32 = 1 << 4;
    /// There is no notifier.
    pub const UNCONNECTED: u32 = 1 << 5;
    /// INTx: it was given, and is not unmasked yet.
    pub const GIVEN: u32 = 1 << 6;
    /// Any of them.
    pub const ALL: u32 = (1 << 7) - 1;
}

/// MSI-X: pending. INTx: asserted.
const REQUEST: u32 = 1 << 31;

/// What becomes of the request when it is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It is over.
    Edge,
    /// It goes on until it is withdrawn; and is given again when the host has unmasked it.
    Level,
}

/// What a notifier does; a test has others.
pub(crate) trait Notify {
    fn notify(&self) -> Notice;
}

impl Notify for Notifier {
    fn notify(&self) -> Notice {
        Self::notify(self)
    }
}

#[derive(Debug)]
pub(crate) struct Line<N> {
    state: AtomicU32,
    kind: Kind,
    notifier: Mutex<Option<N>>,
}

impl<N: Notify> Line<N> {
    pub(crate) fn new(kind: Kind) -> Self {
        Self {
            state: AtomicU32::new(reason::UNCONNECTED),
            kind,
            notifier: Mutex::new(None),
        }
    }

    /// Asks for the interrupt. `None`: it is masked.
    pub(crate) fn request(&self) -> Option<Notice> {
        let before = self.state.fetch_or(REQUEST, Ordering::AcqRel);
        match before & reason::ALL {
            0 => self.deliver(),
            _ => None,
        }
    }

    /// Withdraws the request.
    pub(crate) fn withdraw(&self) {
        self.state.fetch_and(!REQUEST, Ordering::AcqRel);
    }

    /// Whether it is asked for, and, if an edge, was not given.
    pub(crate) fn is_requested(&self) -> bool {
        self.state.load(Ordering::Acquire) & REQUEST != 0
    }

    /// From now on `why` masks it.
    pub(crate) fn mask(&self, why: u32) {
        let _notifier = self.lock();
        self.state.fetch_or(why, Ordering::AcqRel);
    }

    /// From now on `why` does not mask it.
    pub(crate) fn unmask(&self, why: u32) -> Option<Notice> {
        let before = self.state.fetch_and(!why, Ordering::AcqRel);
        self.deliver_if(before & !why)
    }

    /// Masks or unmasks.
    pub(crate) fn set(&self, why: u32, masked: bool) -> Option<Notice> {
        if masked {
            self.mask(why);
            return None;
        }
        self.unmask(why)
    }

    /// Ends a reset: what was asked for until now is forgotten.
    pub(crate) fn end_reset(&self) {
        let gone = REQUEST | reason::RESET | reason::GIVEN;
        self.state.fetch_and(!gone, Ordering::AcqRel);
    }

    /// Where it goes.
    pub(crate) fn connect(&self, notifier: Option<N>) -> Option<Notice> {
        let connected = notifier.is_some();
        let mut place = self.lock();
        let old = std::mem::replace(&mut *place, notifier);
        let state = if connected {
            let gone = reason::UNCONNECTED | reason::GIVEN;
            self.state.fetch_and(!gone, Ordering::AcqRel) & !gone
        } else {
            self.state.fetch_or(reason::UNCONNECTED, Ordering::AcqRel) | reason::UNCONNECTED
        };
        drop(place);
        drop(old);
        self.deliver_if(state)
    }

    /// Gives it once, whether it is asked for or not; `None` where it is masked.
    pub(crate) fn trigger(&self) -> Option<Notice> {
        match self.kind {
            Kind::Edge => self.request(),
            Kind::Level => {
                let notifier = self.lock();
                let given = |s: u32| (s & reason::ALL == 0).then_some(s | reason::GIVEN);
                self.change(given)
                    .then(|| notifier.as_ref().map(Notify::notify))?
            }
        }
    }

    fn deliver_if(&self, state: u32) -> Option<Notice> {
        match (state & reason::ALL, state & REQUEST) {
            (0, REQUEST) => self.deliver(),
            _ => None,
        }
    }

    fn deliver(&self) -> Option<Notice> {
        let notifier = self.lock();
        let taken = self.change(|s| {
            let due = s & REQUEST != 0 && s & reason::ALL == 0;
            due.then_some(match self.kind {
                Kind::Edge => s & !REQUEST,
                Kind::Level => s | reason::GIVEN,
            })
        });
        // Connected: that bit changes under the lock.
        taken.then(|| notifier.as_ref().map(Notify::notify))?
    }

    fn change(&self, to: impl FnMut(u32) -> Option<u32>) -> bool {
        self.state
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, to)
            .is_ok()
    }

    #[cfg(not(loom))]
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<N>> {
        // Nothing panics while it is held.
        self.notifier.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(loom)]
    fn lock(&self) -> loom::sync::MutexGuard<'_, Option<N>> {
        self.notifier.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
