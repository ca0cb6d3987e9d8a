//! Lines under every interleaving and every stale value that C11 allows.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p bluff-pci --release --lib explored`

use std::sync::Arc;

use bluff_reactor::Notice;
use loom::sync::atomic::{AtomicU32 as Plain, Ordering::Relaxed, Ordering::SeqCst};
use loom::thread;

use super::{Kind, Line, Notify, REQUEST, reason};
use crate::sync::Ordering;
use crate::sync::modelled::SeedRelaxed;

/// What two signals stand for, and what the host saw of it when it was notified.
#[derive(Default)]
struct Host {
    published: [Plain; 2],
    seen: [Plain; 2],
    heard: Plain,
}

struct Recorder(Arc<Host>);

impl Notify for Recorder {
    fn notify(&self) -> Notice {
        // Nothing here orders anything: that is for the line to do.
        for (published, seen) in self.0.published.iter().zip(&self.0.seen) {
            if published.load(Relaxed) == 1 {
                seen.store(1, Relaxed);
            }
        }
        self.0.heard.fetch_add(1, SeqCst);
        Notice::Given
    }
}

fn rig(kind: Kind) -> (Arc<Line<Recorder>>, Arc<Host>) {
    let host = Arc::new(Host::default());
    let line = Line::new(kind);
    line.connect(Some(Recorder(host.clone())));
    (Arc::new(line), host)
}

fn signal(line: &Arc<Line<Recorder>>, host: &Arc<Host>, i: usize) -> thread::JoinHandle<()> {
    let (line, host) = (line.clone(), host.clone());
    thread::spawn(move || {
        host.published[i].store(1, Relaxed);
        line.request();
    })
}

fn unmasked_while_signalled(signals: usize) {
    loom::model(move || {
        let (line, host) = rig(Kind::Edge);
        line.mask(reason::CLIENT);
        let threads: Vec<_> = (0..signals).map(|i| signal(&line, &host, i)).collect();
        line.unmask(reason::CLIENT);
        threads.into_iter().for_each(|t| t.join().unwrap());
        for seen in &host.seen[..signals] {
            assert_eq!(seen.load(Relaxed), 1, "lost");
        }
        let heard = host.heard.load(SeqCst);
        assert!((1..=signals as u32).contains(&heard));
        assert!(!line.is_requested());
    });
}

#[test]
fn a_signal_is_not_lost_to_an_unmasking() {
    unmasked_while_signalled(1);
}

#[test]
fn nor_are_two() {
    unmasked_while_signalled(2);
}

#[test]
#[should_panic(expected = "lost")]
fn orders_that_are_too_weak_are_found() {
    let _seed = SeedRelaxed::new();
    unmasked_while_signalled(1);
}

/// A signal that looks, and acts on what it has seen: the mistake that the line is made to avoid.
#[test]
#[should_panic(expected = "lost")]
fn a_look_ahead_is_found() {
    loom::model(|| {
        let (line, host) = rig(Kind::Edge);
        line.mask(reason::CLIENT);
        let (l, h) = (line.clone(), host.clone());
        let signal = thread::spawn(move || {
            h.published[0].store(1, Relaxed);
            if l.state.load(Ordering::Acquire) & reason::ALL == 0 {
                l.request();
            } else {
                l.state.fetch_or(REQUEST, Ordering::AcqRel);
            }
        });
        line.unmask(reason::CLIENT);
        signal.join().unwrap();
        assert_eq!(host.seen[0].load(Relaxed), 1, "lost");
    });
}

fn masked_while_signalled(mask: fn(&Line<Recorder>)) {
    loom::model(move || {
        let (line, host) = rig(Kind::Edge);
        let thread = signal(&line, &host, 0);
        mask(&line);
        let heard = host.heard.load(SeqCst);
        thread.join().unwrap();
        assert_eq!(host.heard.load(SeqCst), heard, "late");
        assert_eq!(line.is_requested(), heard == 0, "given or pending");
    });
}

#[test]
fn nothing_is_given_after_a_mask() {
    masked_while_signalled(|line| line.mask(reason::ENTRY));
}

#[test]
#[should_panic(expected = "late")]
fn a_mask_that_does_not_wait_is_found() {
    masked_while_signalled(|line| {
        line.state.fetch_or(reason::ENTRY, Ordering::AcqRel);
    });
}

#[test]
fn another_notifier_takes_over() {
    loom::model(|| {
        let (line, old) = rig(Kind::Edge);
        let new = Arc::new(Host::default());
        let thread = signal(&line, &old, 0);
        line.connect(Some(Recorder(new.clone())));
        let heard = old.heard.load(SeqCst);
        thread.join().unwrap();
        assert_eq!(old.heard.load(SeqCst), heard, "late");
        assert_eq!(heard + new.heard.load(SeqCst), 1, "one of them");
    });
}

/// A level that falls and rises while the host has it unmasked: it is told again, and owes an unmasking.
#[test]
fn a_level_is_told_again() {
    loom::model(|| {
        let (line, host) = rig(Kind::Level);
        line.request();
        assert_eq!(host.heard.load(SeqCst), 1);
        let device = {
            let line = line.clone();
            thread::spawn(move || {
                line.withdraw();
                line.request();
            })
        };
        line.unmask(reason::GIVEN | reason::CLIENT);
        device.join().unwrap();
        assert_eq!(host.heard.load(SeqCst), 2);
        let state = line.state.load(Ordering::Acquire);
        assert_eq!(state, REQUEST | reason::GIVEN);
    });
}

/// What was signalled before the end of a reset is forgotten; what comes after is not.
#[test]
fn a_reset_ends_while_another_masks() {
    loom::model(|| {
        let (line, host) = rig(Kind::Edge);
        line.mask(reason::RESET);
        line.request();
        let reactor = {
            let line = line.clone();
            thread::spawn(move || line.end_reset())
        };
        line.mask(reason::CLIENT);
        line.unmask(reason::CLIENT);
        reactor.join().unwrap();
        assert_eq!(host.heard.load(SeqCst), 0);
        line.request();
        assert_eq!(host.heard.load(SeqCst), 1);
    });
}
