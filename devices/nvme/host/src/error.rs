//! What can go wrong, and what a controller did that it must not.

use std::time::Duration;

use bluff_virtio_driver::MemoryError;

use crate::{BarError, Status};

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A register or a doorbell.
    #[error("access to the controller's BAR")]
    Bar(#[from] BarError),
    /// The host's own memory.
    #[error("host memory")]
    Memory(#[from] MemoryError),
    /// The controller broke a rule.
    #[error("the controller breaks a rule: {0}")]
    Violation(#[from] Violation),
    /// A command ended with an error.
    #[error("opcode {opcode:#04x} ended with {status}")]
    Failed {
        /// Of the command.
        opcode: u8,
        /// How it ended.
        status: Status,
    },
    /// Nothing came of it in time.
    #[error("{what} takes more than {limit:?}")]
    Late {
        /// What was waited for.
        what: &'static str,
        /// How long.
        limit: Duration,
    },
    /// CSTS.CFS.
    #[error("the controller is in a fatal state")]
    Fatal,
    /// The submission queue, or its command identifiers.
    #[error("the submission queue is full")]
    Full,
    /// It has not what the host needs.
    #[error("the controller cannot {0}")]
    Lacks(&'static str),
    /// What the host was asked for makes no sense.
    #[error("{0}")]
    Request(&'static str),
}

impl Error {
    /// How a command ended, where that is the error.
    pub fn status(&self) -> Option<Status> {
        match self {
            Self::Failed { status, .. } => Some(*status),
            _ => None,
        }
    }
}

/// What a controller must not do, seen from what the host knows in private memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A completion for a submission queue that does not post here.
    #[error("a completion of SQ {sq} in CQ {cq}")]
    ForeignQueue {
        /// What it says.
        sq: u16,
        /// Where it was found.
        cq: u16,
    },
    /// A completion of a command that is not in flight.
    #[error("a completion of command {cid:#06x} of SQ {sq}, which is not in flight")]
    Stray {
        /// Its submission queue.
        sq: u16,
        /// Its command identifier.
        cid: u16,
    },
    /// An SQ head that cannot be: past what was submitted, or back.
    #[error(
        "SQ {sq} is said to be fetched up to {head}, with entries {known} to {tail} not known to be"
    )]
    Head {
        /// The submission queue.
        sq: u16,
        /// What the completion says.
        head: u16,
        /// What was known.
        known: u16,
        /// What was submitted.
        tail: u16,
    },
}
