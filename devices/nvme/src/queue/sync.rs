//! What doorbells and queues are made of: the machine's atomics, or loom's where a test explores their orders.

#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU32, Ordering, fence};

#[cfg(loom)]
pub(crate) use modelled::{AtomicU32, Ordering, fence};

#[cfg(loom)]
pub(crate) mod modelled {
    //! Loom's atomics, with a way to seed a bug: a test that finds nothing proves little as long as nobody
    //! has seen it find something.
    use std::cell::Cell;

    pub(crate) use loom::sync::atomic::Ordering;

    // Loom's threads all run on the thread of their test.
    thread_local!(static WEAK: Cell<bool> = const { Cell::new(false) });

    /// This thread's fences do nothing as long as this is there.
    #[cfg(test)]
    pub(crate) struct NoFences(());

    #[cfg(test)]
    impl NoFences {
        pub(crate) fn seed() -> Self {
            WEAK.set(true);
            Self(())
        }
    }

    #[cfg(test)]
    impl Drop for NoFences {
        fn drop(&mut self) {
            WEAK.set(false);
        }
    }

    pub(crate) fn fence(order: Ordering) {
        if !WEAK.get() {
            loom::sync::atomic::fence(order);
        }
    }

    #[derive(Debug)]
    pub(crate) struct AtomicU32(pub(crate) loom::sync::atomic::AtomicU32);

    impl AtomicU32 {
        pub(crate) fn load(&self, order: Ordering) -> u32 {
            self.0.load(order)
        }

        pub(crate) fn store(&self, value: u32, order: Ordering) {
            self.0.store(value, order);
        }
    }
}
