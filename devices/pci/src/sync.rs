//! What interrupt lines are made of: the machine's atomics and locks, or loom's where a test explores their orders.

#[cfg(not(loom))]
pub(crate) use std::sync::Mutex;
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU32, Ordering};

#[cfg(loom)]
pub(crate) use loom::sync::Mutex;
#[cfg(loom)]
pub(crate) use modelled::{AtomicU32, Ordering};

#[cfg(loom)]
pub(crate) mod modelled {
    //! Loom's atomics, with a way to seed a bug: a test that finds nothing proves little as long as nobody
    //! has seen it find something.
    use std::cell::Cell;

    pub(crate) use loom::sync::atomic::Ordering;

    // Loom's threads all run on the thread of their test.
    thread_local!(static RELAXED: Cell<bool> = const { Cell::new(false) });

    /// This thread's lines order nothing as long as this is there.
    #[cfg(test)]
    pub(crate) struct SeedRelaxed(());

    #[cfg(test)]
    impl SeedRelaxed {
        pub(crate) fn new() -> Self {
            RELAXED.set(true);
            Self(())
        }
    }

    #[cfg(test)]
    impl Drop for SeedRelaxed {
        fn drop(&mut self) {
            RELAXED.set(false);
        }
    }

    fn weakened(order: Ordering) -> Ordering {
        match RELAXED.get() {
            true => Ordering::Relaxed,
            false => order,
        }
    }

    #[derive(Debug)]
    pub(crate) struct AtomicU32(loom::sync::atomic::AtomicU32);

    impl AtomicU32 {
        pub(crate) fn new(value: u32) -> Self {
            Self(loom::sync::atomic::AtomicU32::new(value))
        }

        pub(crate) fn load(&self, order: Ordering) -> u32 {
            self.0.load(weakened(order))
        }

        pub(crate) fn fetch_or(&self, bits: u32, order: Ordering) -> u32 {
            self.0.fetch_or(bits, weakened(order))
        }

        pub(crate) fn fetch_and(&self, bits: u32, order: Ordering) -> u32 {
            self.0.fetch_and(bits, weakened(order))
        }

        pub(crate) fn fetch_update(
            &self,
            set: Ordering,
            fetch: Ordering,
            to: impl FnMut(u32) -> Option<u32>,
        ) -> Result<u32, u32> {
            self.0.fetch_update(weakened(set), weakened(fetch), to)
        }
    }
}
