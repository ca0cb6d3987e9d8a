//! What the courier's bell is made of: the machine's atomics, or loom's where a test explores their orders.

#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicBool, Ordering, fence};

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, Ordering};
#[cfg(loom)]
pub(crate) use modelled::fence;

#[cfg(loom)]
pub(crate) mod modelled {
    //! Loom's fence, with a way to seed a bug: a test that finds nothing proves little as long as nobody has seen it find something.
    use std::cell::Cell;

    use loom::sync::atomic::Ordering;

    // Loom's threads all run on the thread of their test.
    thread_local!(static LEFT_OUT: Cell<bool> = const { Cell::new(false) });

    /// This thread's fences do nothing as long as this is there.
    #[cfg(test)]
    pub(crate) struct SeedNoFence(());

    #[cfg(test)]
    impl SeedNoFence {
        pub(crate) fn new() -> Self {
            LEFT_OUT.set(true);
            Self(())
        }
    }

    #[cfg(test)]
    impl Drop for SeedNoFence {
        fn drop(&mut self) {
            LEFT_OUT.set(false);
        }
    }

    pub(crate) fn fence(order: Ordering) {
        if !LEFT_OUT.get() {
            loom::sync::atomic::fence(order);
        }
    }
}
