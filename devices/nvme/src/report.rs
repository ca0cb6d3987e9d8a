//! What workers tell their controller.

use std::collections::VecDeque;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use crate::health::Counters;
use crate::queue::Side;
use crate::spec::Status;

/// A command that failed, for the error log (Base 2.1 §5.2.12.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CommandError {
    /// Its submission queue.
    pub(crate) sqid: u16,
    /// Its identifier.
    pub(crate) cid: u16,
    /// Its opcode.
    pub(crate) opcode: u8,
    /// What it was answered.
    pub(crate) status: Status,
    /// Its namespace.
    pub(crate) nsid: u32,
    /// The first block that it concerned; 0 where there is none.
    pub(crate) lba: u64,
}

/// Something that happened to a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum QueueEvent {
    /// A doorbell has a value that its queue cannot have. The queue goes on as if it had not been written.
    InvalidDoorbell {
        /// Which queue.
        qid: u16,
        /// Which of its doorbells.
        side: Side,
        /// What was written.
        value: u16,
    },
    /// A queue cannot be used any more: its memory has gone. The controller cannot go on (CSTS.CFS).
    Broken {
        /// What is wrong.
        cause: Arc<str>,
    },
}

/// Errors that the log has not taken up yet. A host can make as many as it likes, so there is room for the last ones only, as in
/// the log itself.
#[derive(Debug, Default)]
pub(crate) struct Errors {
    last: Mutex<VecDeque<CommandError>>,
}

impl Errors {
    /// How many are kept.
    pub(crate) const MOST: usize = 64;

    /// Keeps one.
    #[cold]
    pub(crate) fn push(&self, error: CommandError) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.len() == Self::MOST {
            last.pop_front();
        }
        last.push_back(error);
    }

    /// Takes them out, the oldest first.
    pub(crate) fn take(&self) -> Vec<CommandError> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.drain(..).collect()
    }
}

/// What all workers of a controller share.
pub(crate) struct Shared {
    /// Every write is durable when it is completed (feature 06h, WCE 0).
    pub(crate) write_through: AtomicBool,
    /// Commands that failed.
    pub(crate) errors: Errors,
    /// What the controller counts.
    pub(crate) counters: Arc<Counters>,
    /// Who is told of events, on any reactor.
    pub(crate) tell: Box<dyn Fn(QueueEvent) + Send + Sync>,
}

impl Shared {
    /// With the write cache on.
    pub(crate) fn new(
        counters: Arc<Counters>,
        tell: impl Fn(QueueEvent) + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            counters,
            write_through: AtomicBool::new(false),
            errors: Errors::default(),
            tell: Box::new(tell),
        })
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}
