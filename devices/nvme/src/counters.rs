//! What a queue counts.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of one submission queue. Only its worker writes them, with plain loads and stores; readers may be a moment late.
#[derive(Debug, Default)]
pub struct QueueCounters {
    /// Read, Compare and Verify commands completed.
    pub reads: AtomicU64,
    /// Write and Copy commands completed.
    pub writes: AtomicU64,
    /// Flush commands completed.
    pub flushes: AtomicU64,
    /// Dataset Management and Write Zeroes commands completed.
    pub discards: AtomicU64,
    /// Bytes read by the host.
    pub bytes_read: AtomicU64,
    /// Bytes written by the host.
    pub bytes_written: AtomicU64,
    /// Commands that failed.
    pub errors: AtomicU64,
    /// Of these, errors of the storage (SMART, Media and Data Integrity Errors).
    pub media_errors: AtomicU64,
    /// Commands in flight.
    pub in_flight: AtomicU64,
}

/// Adds to a counter that the calling thread alone writes.
pub(crate) fn add(cell: &AtomicU64, n: u64) {
    if n > 0 {
        cell.store(
            cell.load(Ordering::Relaxed).wrapping_add(n),
            Ordering::Relaxed,
        );
    }
}

/// What a turn adds to them.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) reads: u64,
    pub(crate) writes: u64,
    pub(crate) flushes: u64,
    pub(crate) discards: u64,
    pub(crate) bytes_read: u64,
    pub(crate) bytes_written: u64,
    pub(crate) errors: u64,
    pub(crate) media_errors: u64,
}

impl Tally {
    /// Adds it, and begins anew.
    pub(crate) fn count(&mut self, c: &QueueCounters, in_flight: u64) {
        add(&c.reads, self.reads);
        add(&c.writes, self.writes);
        add(&c.flushes, self.flushes);
        add(&c.discards, self.discards);
        add(&c.bytes_read, self.bytes_read);
        add(&c.bytes_written, self.bytes_written);
        add(&c.errors, self.errors);
        add(&c.media_errors, self.media_errors);
        c.in_flight.store(in_flight, Ordering::Relaxed);
        *self = Self::default();
    }
}
