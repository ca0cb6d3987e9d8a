//! Queues: their entries in host memory, their doorbells. The admin queues are made of the same.
//!
//! ```text
//!   host: entry, then tail doorbell --> SubmissionQueue::look, fetch --> a copy of the command
//!   CompletionQueue::reserve (before a fetch) ... post: entry, phase tag last --> host: head doorbell
//! ```
//!
//! What is queue memory lies in an epoch that the queue holds; where that changes, pointers are resolved again, or the queue is broken.

mod cq;
mod doorbells;
mod entries;
#[cfg(all(test, loom))]
mod explored;
mod sq;
mod sync;

pub(crate) use cq::{CompletionQueue, completion};
pub(crate) use doorbells::{Doorbells, OFFSET, Shadow, Side};
pub(crate) use sq::SubmissionQueue;

/// Why a queue cannot be made, or not be used any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QueueError {
    /// Its memory is not, or not any more, the host's.
    #[error("queue {qid}: {source}")]
    Memory {
        /// Its identifier.
        qid: u16,
        /// What is missing.
        source: bluff_memory::MemoryError,
    },
    /// There is no doorbell of that number.
    #[error("queue {0} has no doorbell")]
    Doorbell(u16),
    /// What another process has written down of it cannot be.
    #[error("queue {0}: what is recorded of it cannot be")]
    Position(u16),
}

/// A doorbell with a value that the queue cannot have (Base 2.1 §5.1.2.1, error event "Invalid Doorbell Write Value"). Said once
/// for each such value in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct InvalidValue(pub(crate) u16);
