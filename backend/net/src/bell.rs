//! Waking one who sleeps when there is nothing to do: at the cost of a fence and a load while it is awake.
//!
//! ```text
//!   courier: asleep = true    fence    is there anything?          a sender: put it there    fence    asleep? take it back, wake
//! ```
//!
//! # Why nothing is left lying
//! Both write first, then fence, then read what the other one writes. The fences are in one order (C11 §7.17.3, sequentially consistent fences): if the courier's comes first, the sender
//! reads that it sleeps; otherwise the courier reads what was put there. Either may happen as well as both: then it is woken once for nothing. Of several senders
//! one takes the flag back, by a read-modify-write, and wakes; by then the courier, once awake, has everything of theirs ahead of its next look.

#[cfg(all(test, loom))]
mod explored;

use crate::sync::{AtomicBool, Ordering, fence};

/// Rung by many for one who may sleep.
#[derive(Debug, Default)]
pub(crate) struct Bell {
    /// It sleeps, or is about to.
    asleep: AtomicBool,
}

impl Bell {
    /// Something was put where the sleeper looks. Says whether it has to be woken: by this caller, and nobody else.
    #[inline]
    pub(crate) fn ring(&self) -> bool {
        fence(Ordering::SeqCst);
        self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::Relaxed)
    }

    /// Called before sleep; says whether it may begin. `is_empty` looks where things are put.
    pub(crate) fn arm(&self, is_empty: impl FnOnce() -> bool) -> bool {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let empty = is_empty();
        if !empty {
            self.asleep.store(false, Ordering::Relaxed);
        }
        empty
    }
}
