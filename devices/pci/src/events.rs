//! To whom a function tells what the attachment has to know.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use bluff_reactor::Notice;

use crate::seam::{Interrupt, PciEvent};

pub(crate) type Listener = Arc<dyn Fn(PciEvent) + Send + Sync>;

/// To whom it is told.
#[derive(Clone, Default)]
pub struct Events(Arc<Mutex<Option<Listener>>>);

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

impl Events {
    /// Tells it, on this thread.
    pub fn tell(&self, event: PciEvent) {
        let listener = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Listeners are called without the lock: they may replace themselves.
        let listener = listener.clone();
        if let Some(listener) = listener {
            listener(event);
        }
    }

    pub(crate) fn set(&self, listener: Listener) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(listener);
    }

    /// Tells it where the notifier was given up.
    pub(crate) fn note(&self, interrupt: Interrupt, notice: Option<Notice>) -> Option<Notice> {
        if notice == Some(Notice::Hung) {
            self.tell(PciEvent::NotifierHung(interrupt));
        }
        notice
    }
}
