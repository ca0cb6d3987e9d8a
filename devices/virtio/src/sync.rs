//! The atomics that rings are made of: the machine's, or loom's where a test explores their orders.

#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

#[cfg(loom)]
pub(crate) use modelled::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

/// Whether `event` lies in the `new - old` indices that end before `new`, all modulo 2^16
/// (virtio 1.3 §2.7.10, `vring_need_event`).
#[inline]
pub(crate) fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(loom)]
pub(crate) mod modelled {
    //! Loom's atomics, with a way to seed a bug: a test that finds nothing proves little as long as nobody
    //! has seen it find something.
    use std::cell::Cell;

    pub(crate) use loom::sync::atomic::Ordering;

    /// What is to be wrong.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) enum Bug {
        /// Stores that should release are relaxed.
        Release,
        /// Loads that should acquire are relaxed.
        Acquire,
        /// Fences are left out.
        Fence,
    }

    // Loom's threads all run on the thread of their test.
    thread_local!(static BUG: Cell<Option<Bug>> = const { Cell::new(None) });

    /// From now on this thread's rings have `bug`.
    #[cfg(test)]
    pub(crate) fn seed(bug: Bug) {
        BUG.set(Some(bug));
    }

    fn weakened(order: Ordering) -> Ordering {
        match (BUG.get(), order) {
            (Some(Bug::Release), Ordering::Release) | (Some(Bug::Acquire), Ordering::Acquire) => {
                Ordering::Relaxed
            }
            _ => order,
        }
    }

    pub(crate) fn fence(order: Ordering) {
        if BUG.get() != Some(Bug::Fence) {
            loom::sync::atomic::fence(order);
        }
    }

    macro_rules! atomic {
        ($($name:ident, $type:ty;)*) => {
            $(
                #[derive(Debug)]
                pub(crate) struct $name(pub(crate) loom::sync::atomic::$name);

                impl $name {
                    pub(crate) fn load(&self, order: Ordering) -> $type {
                        self.0.load(weakened(order))
                    }

                    // Not every width is written by the device.
                    #[allow(dead_code)]
                    pub(crate) fn store(&self, value: $type, order: Ordering) {
                        self.0.store(value, weakened(order));
                    }
                }
            )*
        };
    }

    atomic! {
        AtomicU16, u16;
        AtomicU32, u32;
        AtomicU64, u64;
    }
}
