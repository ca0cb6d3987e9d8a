//! The legacy interrupt (PCIe §6.1.2): a level, which the attachment's descriptor stands for.

use std::sync::Arc;

use bluff_reactor::{Notice, Notifier};

use crate::events::Events;
use crate::line::{Kind, Line};
use crate::seam::Interrupt;

/// INTx of a function, for its device; clones are the same interrupt.
///
/// It is given once when it is asserted, and again each time that the host unmasks it while it is still asserted. It
/// is not given while the host has disabled INTx, or MSI-X is on (PCIe §6.1.4); the status register says all
/// the same that it is asserted.
#[derive(Clone, Debug)]
pub struct Intx {
    pub(crate) line: Arc<Line<Notifier>>,
    pub(crate) events: Events,
}

impl Intx {
    pub(crate) fn new(events: Events) -> Self {
        Self {
            line: Arc::new(Line::new(Kind::Level)),
            events,
        }
    }

    /// Asserts it, on any thread. `None`: it was not given now, and will be when nothing masks it.
    pub fn assert(&self) -> Option<Notice> {
        self.note(self.line.request())
    }

    /// Deasserts it, on any thread.
    pub fn deassert(&self) {
        self.line.withdraw();
    }

    /// Whether it is asserted (Interrupt Status, PCIe §7.5.1.1.4).
    pub fn is_asserted(&self) -> bool {
        self.line.is_requested()
    }

    pub(crate) fn note(&self, notice: Option<Notice>) -> Option<Notice> {
        self.events.note(Interrupt::Intx, notice)
    }
}
