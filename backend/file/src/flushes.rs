//! One `fdatasync` of a volume at a time.
//!
//! ```text
//!   flush A: ticket 1 --> sync 1 in the kernel ------------> ended: 1   A is done
//!   flush B:    ticket 2, waits ---------+
//!   flush C:       ticket 2, waits ------+--> sync 2 ------> ended: 2   B and C are done
//! ```
//! Linux tells of a lost write once for each open file (`errseq_t`), and all channels of a volume share
//! one. Of two syncs at the same time one would get the error and the other a zero, which would be
//! acknowledged. So a flush belongs to the first sync that *begins* after it: whatever it is to cover was written
//! before, and what that sync says (or one before it: [`crate::storage::Storage::flush_failed`]) is its own
//! verdict. That many flushes have one sync is also less work for the disk.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use bluff_reactor::Waker;

#[derive(Debug, Default)]
struct Inner {
    /// The number of the sync that began last.
    begun: u64,
    /// The number of the one that ended last.
    ended: u64,
    running: bool,
    waiting: Vec<Waker>,
}

/// The syncs of a volume.
#[derive(Debug, Default)]
pub(crate) struct Flushes {
    /// Counts the ends.
    ends: AtomicUsize,
    inner: Mutex<Inner>,
}

/// Where a flush stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Its sync has ended.
    Ended,
    /// The caller is to sync now, and to tell with [`Flushes::end`].
    Sync,
    /// Somebody else syncs: the waker is used when that has ended.
    Wait,
}

impl Flushes {
    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner
            .lock()
            .expect("nothing panics while it holds the flushes")
    }

    /// For a flush that comes now: the number of the first sync that begins later.
    pub(crate) fn ticket(&self) -> u64 {
        self.inner().begun + 1
    }

    /// What the owner of `ticket` is to do.
    pub(crate) fn advance(&self, ticket: u64, waker: &Waker) -> Progress {
        let mut inner = self.inner();
        if inner.ended >= ticket {
            Progress::Ended
        } else if inner.running {
            if !inner.waiting.iter().any(|w| w.is_same(waker)) {
                inner.waiting.push(waker.clone());
            }
            Progress::Wait
        } else {
            inner.running = true;
            inner.begun += 1;
            Progress::Sync
        }
    }

    /// The sync is over. `told`: it said whether it failed, and that was remembered before. Otherwise
    /// (interrupted, never begun) it covers nothing, and somebody who waits begins another.
    pub(crate) fn end(&self, told: bool) {
        let waiting = {
            let mut inner = self.inner();
            assert!(inner.running, "an end for each sync");
            inner.running = false;
            if told {
                inner.ended = inner.begun;
            }
            self.ends.fetch_add(1, Ordering::Release);
            std::mem::take(&mut inner.waiting)
        };
        for waker in waiting {
            waker.wake();
        }
    }

    /// The number of the sync that ended last.
    pub(crate) fn ended(&self) -> u64 {
        self.inner().ended
    }

    /// Changes whenever a sync has ended.
    #[inline]
    pub(crate) fn ends(&self) -> usize {
        self.ends.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use bluff_reactor::{Actor, Context, Event, Options, Poll, Reactor, Turn, UringUse};

    use super::*;

    struct Nobody;

    impl Actor for Nobody {
        fn event(&mut self, _: &mut Context<'_>, _: Event) {}
        fn turn(&mut self, _: &mut Context<'_>) -> Turn {
            Turn::Idle
        }
        fn arm(&mut self, _: &mut Context<'_>) -> bool {
            true
        }
    }

    #[test]
    fn a_sync_covers_only_who_came_before_it() {
        let options = Options {
            uring: UringUse::Off,
            ..Options::default()
        };
        let mut reactor = Reactor::new(&options).unwrap();
        let mut cx = reactor.context();
        let id = cx.insert(Poll::Never, |_, _| Box::new(Nobody));
        let waker = cx.waker(id);
        let flushes = Flushes::default();
        let (a, b) = (flushes.ticket(), flushes.ticket());
        assert_eq!(a, b, "both came before any sync");
        assert_eq!(flushes.advance(a, &waker), Progress::Sync);
        assert_eq!(flushes.advance(b, &waker), Progress::Wait);
        let late = flushes.ticket();
        let before = flushes.ends();
        flushes.end(true);
        assert_ne!(flushes.ends(), before);
        assert_eq!(flushes.advance(a, &waker), Progress::Ended);
        assert_eq!(flushes.advance(b, &waker), Progress::Ended);
        assert_eq!(flushes.advance(late, &waker), Progress::Sync);
        // It told nothing: another is needed.
        flushes.end(false);
        assert_eq!(flushes.advance(late, &waker), Progress::Sync);
        flushes.end(true);
        assert_eq!(flushes.advance(late, &waker), Progress::Ended);
        assert!(flushes.ticket() > late);
    }
}
