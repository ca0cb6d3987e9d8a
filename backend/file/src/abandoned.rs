//! Writes that were given up while the kernel still had them. Nobody can say when, or whether, they
//! reach the medium; until the kernel lets go, whatever touches their range waits, on every channel
//! of the volume, so that an old write never lands over a newer one.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use bluff_reactor::Waker;

#[derive(Debug, Default)]
struct Inner {
    ranges: Vec<(u64, u64, u64)>,
    next: u64,
    waiting: Vec<Waker>,
}

/// The ranges of a volume that must not be touched.
#[derive(Debug, Default)]
pub(crate) struct Abandoned {
    /// How many ranges there are. Zero is the usual case and costs one load.
    count: AtomicUsize,
    /// Counts the releases.
    releases: AtomicUsize,
    inner: Mutex<Inner>,
}

/// Names one abandoned range.
#[derive(Debug)]
pub(crate) struct Ticket(u64);

impl Abandoned {
    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner
            .lock()
            .expect("nothing panics while it holds the ranges")
    }

    /// Adds a range. It counts for everything that is told of the end of the operation.
    pub(crate) fn add(&self, offset: u64, len: u64) -> Ticket {
        let mut inner = self.inner();
        inner.next += 1;
        let id = inner.next;
        inner.ranges.push((id, offset, offset + len));
        self.count.store(inner.ranges.len(), Ordering::Release);
        Ticket(id)
    }

    /// The kernel has let go.
    pub(crate) fn release(&self, ticket: Ticket) {
        let waiting = {
            let mut inner = self.inner();
            inner.ranges.retain(|r| r.0 != ticket.0);
            self.count.store(inner.ranges.len(), Ordering::Release);
            self.releases.fetch_add(1, Ordering::Release);
            std::mem::take(&mut inner.waiting)
        };
        for waker in waiting {
            waker.wake();
        }
    }

    /// Changes whenever something was released.
    pub(crate) fn releases(&self) -> usize {
        self.releases.load(Ordering::Acquire)
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    /// Whether the range is free. Where it is not, `waker` is used at the next release.
    pub(crate) fn is_free(&self, offset: u64, len: u64, waker: &Waker) -> bool {
        if self.is_empty() {
            return true;
        }
        let mut inner = self.inner();
        let held = inner
            .ranges
            .iter()
            .any(|r| r.1 < offset + len && offset < r.2);
        if held && !inner.waiting.iter().any(|w| w.is_same(waker)) {
            inner.waiting.push(waker.clone());
        }
        !held
    }
}
