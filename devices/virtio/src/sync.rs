//! The atomics that rings are made of: the machine's, or loom's where a test explores their orders.

#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

/// Whether `event` lies in the `new - old` indices that end before `new`, all modulo 2^16
/// (virtio 1.3 §2.7.10, `vring_need_event`).
#[inline]
pub(crate) fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
