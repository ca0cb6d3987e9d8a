//! What a queue counts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bluff_virtio::LineCounters;

/// Counters of one queue. Only its worker writes them, with plain loads and stores; readers may be a
/// moment late.
#[derive(Debug, Default)]
pub struct QueueCounters {
    /// Reads completed.
    pub reads: AtomicU64,
    /// Writes completed.
    pub writes: AtomicU64,
    /// Flushes completed.
    pub flushes: AtomicU64,
    /// Discards and zeroes completed.
    pub discards: AtomicU64,
    /// Bytes read.
    pub bytes_read: AtomicU64,
    /// Bytes written.
    pub bytes_written: AtomicU64,
    /// Requests that failed, bad chains among them.
    pub errors: AtomicU64,
    /// Requests in flight.
    pub in_flight: AtomicU64,
    /// Notifications.
    pub line: Arc<LineCounters>,
}

/// Adds to a counter that the calling thread alone writes.
pub(crate) fn add(cell: &AtomicU64, n: u64) {
    cell.store(
        cell.load(Ordering::Relaxed).wrapping_add(n),
        Ordering::Relaxed,
    );
}
