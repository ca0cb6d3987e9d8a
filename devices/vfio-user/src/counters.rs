//! How many messages there were.

use std::sync::atomic::{AtomicU64, Ordering};

use zerocopy::FromBytes;

use crate::spec::{RawHeader, command};

/// Commands, and one more for those that nobody knows.
const KINDS: usize = command::MIG_DATA_WRITE as usize + 2;

/// The messages of a function, with all its clients, by command. One thread counts; any may read, and reads what was true a moment ago.
#[derive(Debug, Default)]
pub struct Counters {
    received: [AtomicU64; KINDS],
    sent: [AtomicU64; KINDS],
}

/// The messages of one command: the command itself one way, its replies the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Messages {
    /// The specification's name of the command; `OTHER` for what it does not have.
    pub command: &'static str,
    /// How many came from clients.
    pub received: u64,
    /// How many were sent to them.
    pub sent: u64,
}

/// The names, by number.
const NAMES: [&str; KINDS] = [
    "",
    "VERSION",
    "DMA_MAP",
    "DMA_UNMAP",
    "DEVICE_GET_INFO",
    "DEVICE_GET_REGION_INFO",
    "DEVICE_GET_REGION_IO_FDS",
    "DEVICE_GET_IRQ_INFO",
    "DEVICE_SET_IRQS",
    "REGION_READ",
    "REGION_WRITE",
    "DMA_READ",
    "DMA_WRITE",
    "DEVICE_RESET",
    "DIRTY_PAGES",
    "REGION_WRITE_MULTI",
    "DEVICE_FEATURE",
    "MIG_DATA_READ",
    "MIG_DATA_WRITE",
    "OTHER",
];

fn kind(command: u16) -> usize {
    match usize::from(command) {
        0 => KINDS - 1,
        n => n.min(KINDS - 1),
    }
}

/// Of one writer.
fn count(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

impl Counters {
    pub(crate) fn received(&self, command: u16) {
        count(&self.received[kind(command)]);
    }

    pub(crate) fn sent(&self, message: &[u8]) {
        let (header, _) = RawHeader::ref_from_prefix(message).expect("a header");
        count(&self.sent[kind(header.command.get())]);
    }

    /// All commands, those without any message too.
    pub fn all(&self) -> impl Iterator<Item = Messages> {
        (1..KINDS).map(|i| Messages {
            command: NAMES[i],
            received: self.received[i].load(Ordering::Relaxed),
            sent: self.sent[i].load(Ordering::Relaxed),
        })
    }

    /// All messages, in both directions.
    pub fn total(&self) -> u64 {
        self.all().map(|m| m.received + m.sent).sum()
    }
}
