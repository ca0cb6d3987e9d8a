//! A shadow doorbell between a host that rings only where it is asked to, and a queue that is about to sleep, under every
//! interleaving and every stale value that C11 allows.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p bluff-nvme --release --lib explored`

use std::sync::Arc;

use loom::sync::atomic::{AtomicBool, AtomicU32 as Plain, Ordering, fence};
use loom::thread;

use super::doorbells::Pair;
use super::sync::AtomicU32;
use super::sync::modelled::NoFences;

struct Page {
    value: AtomicU32,
    event: AtomicU32,
    /// The register was written: the queue is woken.
    rung: AtomicBool,
}

/// What a driver does: the shadow, a fence, the event index (Base 2.1 §B.5).
fn offer(page: &Page, old: u16, new: u16) {
    page.value.store(u32::from(new), Ordering::Release);
    fence(Ordering::SeqCst);
    let event = page.event.load(Ordering::Relaxed) as u16;
    if new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old) {
        page.rung.store(true, Ordering::SeqCst);
    }
}

/// A queue that has seen `seen`, of a host that offers `offers` meanwhile.
fn sleeps_while_offered(event: u16, seen: u16, offers: &'static [(u16, u16)]) {
    loom::model(move || {
        let page = Arc::new(Page {
            value: AtomicU32(Plain::new(u32::from(seen))),
            event: AtomicU32(Plain::new(u32::from(event))),
            rung: AtomicBool::new(false),
        });
        let host = {
            let page = page.clone();
            thread::spawn(move || {
                for &(old, new) in offers {
                    offer(&page, old, new);
                }
            })
        };
        let pair = Pair {
            value: &raw const page.value,
            event: &raw const page.event,
        };
        let moved = pair.ask(seen, seen);
        host.join().unwrap();
        assert!(
            moved || page.rung.load(Ordering::SeqCst),
            "it sleeps for ever"
        );
    });
}

#[test]
fn a_queue_that_sleeps_is_woken() {
    sleeps_while_offered(1, 3, &[(3, 4)]);
    sleeps_while_offered(1, 3, &[(3, 4), (4, 5)]);
    // Where the queue begins again.
    sleeps_while_offered(5, 7, &[(7, 0), (0, 1)]);
}

#[test]
#[should_panic(expected = "it sleeps for ever")]
fn a_missing_fence_is_found() {
    let _bug = NoFences::seed();
    sleeps_while_offered(1, 3, &[(3, 4)]);
}
