//! Threads for what blocks.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Barrier, mpsc};
use std::time::{Duration, Instant};

use bluff_reactor::Offload;

#[test]
fn jobs_run_in_order_of_arrival() {
    let pool = Offload::new("one", 1).unwrap();
    let (tx, rx) = mpsc::channel();
    for i in 0..1000 {
        let tx = tx.clone();
        pool.run(move || tx.send(i).unwrap());
    }
    drop(tx);
    assert_eq!(rx.iter().collect::<Vec<_>>(), (0..1000).collect::<Vec<_>>());
}

#[test]
fn as_many_at_once_as_there_are_threads() {
    let pool = Offload::new("three", 3).unwrap();
    let (tx, rx) = mpsc::channel();
    let together = Arc::new(Barrier::new(3));
    for _ in 0..3 {
        let (tx, together) = (tx.clone(), together.clone());
        pool.run(move || {
            together.wait();
            let name = std::thread::current().name().map(String::from);
            tx.send(name).unwrap();
        });
    }
    for _ in 0..3 {
        let name = rx
            .recv_timeout(Duration::from_secs(10))
            .expect("all three run");
        assert!(name.unwrap().starts_with("three-"));
    }
}

/// Counts its drops, run or not.
struct Dropped(Arc<AtomicU32>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn dropping_waits_for_what_has_begun_and_drops_the_rest() {
    let pool = Offload::new("one", 1).unwrap();
    let (begun, has_begun) = mpsc::channel();
    let (go, gate) = mpsc::channel::<()>();
    let ended = Arc::new(AtomicU32::new(0));
    let dropped = Arc::new(AtomicU32::new(0));
    let (e, d) = (ended.clone(), Dropped(dropped.clone()));
    pool.run(move || {
        let _d = d;
        begun.send(()).unwrap();
        gate.recv().unwrap();
        e.fetch_add(1, Ordering::SeqCst);
    });
    has_begun.recv().unwrap();
    for _ in 0..5 {
        let (e, d) = (ended.clone(), Dropped(dropped.clone()));
        pool.run(move || {
            let _d = d;
            e.fetch_add(100, Ordering::SeqCst);
        });
    }
    let thread = std::thread::spawn(move || drop(pool));
    let end = Instant::now() + Duration::from_secs(10);
    while dropped.load(Ordering::SeqCst) < 5 {
        assert!(Instant::now() < end, "the rest is dropped at once");
        std::thread::yield_now();
    }
    assert!(!thread.is_finished(), "it waits for the first");
    go.send(()).unwrap();
    thread.join().unwrap();
    assert_eq!(ended.load(Ordering::SeqCst), 1);
    assert_eq!(dropped.load(Ordering::SeqCst), 6);
}

#[test]
fn detaching_waits_for_nobody() {
    let pool = Offload::new("one", 1).unwrap();
    let (begun, has_begun) = mpsc::channel();
    let (go, gate) = mpsc::channel::<()>();
    let (end, has_ended) = mpsc::channel();
    pool.run(move || {
        begun.send(()).unwrap();
        gate.recv().unwrap();
        end.send(()).unwrap();
    });
    has_begun.recv().unwrap();
    let dropped = Arc::new(AtomicU32::new(0));
    let d = Dropped(dropped.clone());
    pool.run(move || drop(d));
    pool.detach();
    assert_eq!(
        dropped.load(Ordering::SeqCst),
        1,
        "what has not begun is dropped"
    );
    assert!(has_ended.try_recv().is_err(), "the first still waits");
    go.send(()).unwrap();
    has_ended
        .recv_timeout(Duration::from_secs(10))
        .expect("and ends by itself");
}

/// A job whose drop comes back to the pool does not deadlock it.
#[test]
fn jobs_that_use_their_pool() {
    let pool = Arc::new(Offload::new("one", 1).unwrap());
    let (tx, rx) = mpsc::channel();
    let inner = Arc::downgrade(&pool);
    pool.run(move || {
        if let Some(pool) = inner.upgrade() {
            pool.run(move || tx.send(()).unwrap());
            // The last owner must not be the pool's own thread.
            drop(pool);
        }
    });
    rx.recv_timeout(Duration::from_secs(10)).unwrap();
}
