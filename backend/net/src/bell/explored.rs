//! A courier and its senders under every interleaving and every stale value that C11 allows.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p bluff-net --release --lib explored`

use std::sync::Arc;

use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

use super::Bell;
use crate::sync::modelled::SeedNoFence;

/// What a courier and its senders share: each has a mailbox, whose only word is how much was put in, as the ring's is.
struct Street {
    bell: Bell,
    mailboxes: [AtomicUsize; 2],
    /// How often the courier was woken: the reactor's waker, which wakes at once or the next time that it would sleep.
    woken: AtomicUsize,
}

impl Street {
    fn put(&self, i: usize) {
        let n = self.mailboxes[i].load(Ordering::Relaxed);
        // As the ring publishes.
        self.mailboxes[i].store(n + 1, Ordering::Release);
        if self.bell.ring() {
            self.woken.fetch_add(1, Ordering::AcqRel);
        }
    }

    fn waiting(&self) -> usize {
        self.mailboxes
            .iter()
            .map(|m| m.load(Ordering::Acquire))
            .sum()
    }
}

fn street() -> Arc<Street> {
    Arc::new(Street {
        bell: Bell::default(),
        mailboxes: Default::default(),
        woken: AtomicUsize::new(0),
    })
}

/// Senders put frames in while the courier looks, finds nothing more and goes to sleep: it has seen all of them, or is woken.
fn asleep_while_sent_to(senders: usize, each: usize) {
    loom::model(move || {
        let street = street();
        let threads: Vec<_> = (0..senders)
            .map(|i| {
                let street = street.clone();
                thread::spawn(move || (0..each).for_each(|_| street.put(i)))
            })
            .collect();
        // A turn takes what is there; then it may sleep if nothing has come since.
        let taken = street.waiting();
        let mut seen = taken;
        let sleeps = street.bell.arm(|| {
            seen = street.waiting();
            seen == taken
        });
        threads.into_iter().for_each(|t| t.join().unwrap());
        let woken = street.woken.load(Ordering::Acquire);
        let all = senders * each;
        assert!(!sleeps || seen == all || woken > 0, "left lying");
        assert!(woken <= 1, "once for each sleep");
    });
}

#[test]
fn nothing_is_left_lying_by_one_sender() {
    asleep_while_sent_to(1, 1);
    asleep_while_sent_to(1, 2);
}

#[test]
fn nor_by_two() {
    asleep_while_sent_to(2, 1);
}

#[test]
#[should_panic(expected = "left lying")]
fn a_missing_fence_is_found() {
    let _seed = SeedNoFence::new();
    asleep_while_sent_to(1, 1);
}
