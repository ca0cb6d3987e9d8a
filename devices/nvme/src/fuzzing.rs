//! Hostile data pointers, queues and doorbells, in bytes: for cargo-fuzz, and for a smoke test that runs everywhere.
//!
//! The same bytes do the same each time: the reactor is stepped, and the volumes are in memory.

pub(crate) mod host;
pub(crate) mod slow;
