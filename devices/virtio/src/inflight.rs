//! Requests in flight, recorded in shared memory in the standard vhost-user layout ("Inflight I/O
//! tracking"), so that they can be done again after the death of the process.

use std::sync::Arc;

use bluff_memory::Mapping;

/// One queue's part of an in-flight region.
#[derive(Clone, Debug)]
pub struct InflightQueue {
    /// The region, which all queues share.
    pub region: Arc<Mapping>,
    /// Offset of this queue's part in bytes; a multiple of 64.
    pub offset: u64,
    /// Length of the part in bytes.
    pub len: u64,
}

/// The bytes that a queue's part takes, whichever kind of ring it is: a multiple of 64.
pub fn queue_len(queue_size: u16) -> u64 {
    (32 + 32 * u64::from(queue_size)).next_multiple_of(64)
}
