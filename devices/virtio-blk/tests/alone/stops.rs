//! A volume that never answers: a queue stops, resets and lets memory go within its bound all the same,
//! and what is completed later writes nothing.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use crate::alone;
use crate::rig::raw::{Attack, D, KINDS, Raw, SEAM, TURNS, WRITE, d};
use crate::rig::stall::{self, FILL};
use crate::rig::{RESET, inflight, ram, wait};
use bluff_memory::GuestMemory;
use bluff_reactor::Poll;
use bluff_virtio::{Notifier, QueueChange, Stop, StoppedQueue, VirtioDevice, features};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// What anything may take.
const BOUND: Duration = Duration::from_secs(2);
const LEAVE: Stop = Stop {
    leave: true,
    answer: true,
    ..RESET
};
const ANSWER: Stop = Stop {
    leave: false,
    answer: true,
    ..RESET
};
const N: usize = 5;

/// `N` requests that the volume holds: ids, and where their statuses will be.
fn in_flight(a: &mut Attack, kind: u32) -> Vec<(u16, u64, [D; 3])> {
    let requests = (0..N).map(|i| {
        let (c, status) = a.request(kind, 8 * i as u64, 1024);
        (a.raw.chain(&c), status, c)
    });
    let requests: Vec<_> = requests.collect();
    a.turns(TURNS);
    assert_eq!(a.back(), None, "the volume never answers");
    requests
}

fn stop(a: &mut Attack, stop: Stop) -> StoppedQueue {
    let start = Instant::now();
    let stopped = a.stop(stop).expect("it ran");
    assert!(start.elapsed() < BOUND, "{:?}", start.elapsed());
    stopped
}

#[test]
fn left_in_flight_and_done_again_at_the_next_start() {
    let _alone = alone();
    for packed in KINDS {
        for limit in [0, 2] {
            let (volume, desk) = stall::desk(false);
            desk.limit.store(limit, Ordering::SeqCst);
            let (_region, record) = inflight(16);
            let set = record.clone();
            let mut a = Attack::with(packed, 16, volume, |s| {
                s.inflight = Some(set);
            });
            let requests = in_flight(&mut a, 0);
            let before = a.snapshot();
            let stopped = stop(&mut a, LEAVE);
            assert_eq!(stopped.in_flight, N as u16);
            assert_eq!(desk.held.load(Ordering::SeqCst), 0, "all were taken back");
            desk.limit.store(0, Ordering::SeqCst);
            desk.release();
            a.turns(TURNS);
            let nothing = a.snapshot();
            assert!(before == nothing, "a late completion wrote something");
            // The next life does them again.
            let call = EventFd::new(EFD_NONBLOCK).unwrap();
            let mut setup = a.setup();
            setup.inflight = Some(record);
            setup.position = stopped.position;
            setup.call = Some(Notifier::new(call.try_clone().unwrap()).unwrap());
            a.start(setup);
            let mut back: Vec<u16> = (0..N).map(|_| a.back().expect("done again").0).collect();
            back.sort_unstable();
            let mut ids: Vec<u16> = requests.iter().map(|r| r.0).collect();
            ids.sort_unstable();
            assert_eq!(back, ids, "each once");
            assert_eq!(a.back(), None);
            for (_, status, c) in &requests {
                assert_eq!(a.status(*status), 0);
                assert_eq!(a.memory.read_u8(c[1].addr).unwrap(), FILL);
            }
            assert!(call.read().is_ok(), "the driver is told");
            a.queue_lives();
        }
    }
}

/// A completion that waits for its turn is one that the driver has not seen: it is done again with those before it.
#[test]
fn left_in_flight_in_order_and_done_again_in_order() {
    let _alone = alone();
    for packed in KINDS {
        let (volume, desk) = stall::desk(false);
        let (_region, record) = inflight(16);
        let set = record.clone();
        let mut a = Attack::with(packed, 16, volume, |s| {
            s.features |= features::IN_ORDER;
            s.inflight = Some(set);
        });
        let requests = in_flight(&mut a, 0);
        // The third is done as well as the first, and is not given back before the second.
        desk.through.lock().unwrap().extend([0, 2 * 4096]);
        assert_eq!(a.back(), Some((requests[0].0, 1025)));
        wait(|| {
            a.turns(1);
            (a.status(requests[2].1) == 0).then_some(())
        });
        assert_eq!(a.back(), None);
        let stopped = stop(&mut a, LEAVE);
        assert_eq!(stopped.in_flight, N as u16 - 1);
        assert_eq!(a.raw.used(), None, "nothing is given back out of order");
        assert_eq!(desk.held.load(Ordering::SeqCst), 0);
        desk.release();
        let mut setup = a.setup();
        setup.features |= features::IN_ORDER;
        setup.inflight = Some(record);
        setup.position = stopped.position;
        a.start(setup);
        // The volume answers the last one first.
        for (id, status, c) in &requests[1..] {
            assert_eq!(a.back(), Some((*id, 1025)), "in order, each once");
            assert_eq!(a.status(*status), 0);
            assert_eq!(a.memory.read_u8(c[1].addr).unwrap(), FILL);
        }
        assert_eq!(a.back(), None);
        assert_eq!(desk.accepted.load(Ordering::SeqCst), N + N - 1);
        a.queue_lives();
    }
}

/// A channel that cannot cancel: nobody is told that a queue has stopped while something may still write.
#[test]
fn what_cannot_be_cancelled_is_waited_for() {
    let _alone = alone();
    for packed in KINDS {
        for how in [LEAVE, ANSWER, RESET] {
            let (volume, desk) = stall::desk(false);
            desk.stubborn.store(true, Ordering::SeqCst);
            let (_region, record) = inflight(16);
            let mut a = Attack::with(packed, 16, volume, |s| {
                s.inflight = Some(record);
            });
            let requests = in_flight(&mut a, 0);
            let before = a.snapshot();
            let stopped = a.begin_stop(how);
            wait(|| {
                a.turns(1);
                (desk.refused.load(Ordering::SeqCst) == N).then_some(())
            });
            a.turns(TURNS);
            assert!(stopped.try_recv().is_err(), "they still have buffers");
            assert!(before == a.snapshot());
            desk.release();
            let stopped = wait(|| {
                a.turns(1);
                stopped.try_recv().ok()
            });
            // They were done, so there is nothing to do again; after a reset nobody wants to hear of it.
            let (status, answers) = if how.answer { (0, N) } else { (0xff, 0) };
            let back = std::iter::from_fn(|| a.raw.used()).count();
            assert_eq!(back, answers);
            for (_, at, _) in &requests {
                assert_eq!(a.status(*at), status);
            }
            if how.answer {
                assert_eq!(stopped.expect("it ran").in_flight, 0);
            }
        }
    }
}

/// As above, of memory: it stays mapped.
#[test]
fn memory_that_something_may_still_write_to_stays_mapped() {
    let _alone = alone();
    for packed in KINDS {
        let (volume, desk) = stall::desk(false);
        desk.stubborn.store(true, Ordering::SeqCst);
        let mut a = Attack::with(packed, 16, volume, |_| {});
        let (mut c, status) = a.request(0, 0, 1024);
        c[1] = d(SEAM, 1024, WRITE);
        a.raw.chain(&c);
        a.turns(TURNS);
        let memory = half(&a);
        let old = Arc::downgrade(&std::mem::replace(&mut a.epoch, memory.clone()));
        let changed = a.begin_memory(memory, Duration::from_millis(50));
        wait(|| {
            a.turns(1);
            (desk.refused.load(Ordering::SeqCst) == 1).then_some(())
        });
        a.turns(TURNS);
        assert!(changed.try_recv().is_err() && old.upgrade().is_some());
        desk.release();
        wait(|| {
            a.turns(1);
            changed.try_recv().ok()
        });
        assert!(old.upgrade().is_none());
        assert!(a.back().is_some());
        assert_eq!(a.status(status), 0, "it was done");
    }
}

/// A thread that was away finds a deadline and completions at once: what is done by then is done.
#[test]
fn a_deadline_that_is_seen_late() {
    let _alone = alone();
    let bound = Duration::from_millis(100);
    for packed in KINDS {
        for stopped in [true, false] {
            // Again, where even this took too long.
            let (mut a, status, back) = wait(|| {
                let (volume, desk) = stall::desk(false);
                // It sleeps, and a deadline wakes it.
                let mut a = Attack::polled(packed, 16, volume, Poll::Never);
                let (mut c, status) = a.request(0, 8, 1024);
                c[1] = d(SEAM, 1024, WRITE);
                a.raw.chain(&c);
                a.rest();
                assert_eq!(desk.held.load(Ordering::SeqCst), 1);
                let start = Instant::now();
                let done: Box<dyn Fn() -> bool> = match stopped {
                    true => {
                        let done = a.begin_stop(Stop { bound, ..ANSWER });
                        Box::new(move || done.try_recv().is_ok())
                    }
                    false => {
                        let done = a.begin_memory(half(&a), bound);
                        Box::new(move || done.try_recv().is_ok())
                    }
                };
                a.rest();
                if start.elapsed() > bound {
                    return None;
                }
                assert!(!done());
                // Nobody is woken by it.
                desk.through.lock().unwrap().push(4096);
                std::thread::sleep(2 * bound);
                wait(|| {
                    a.turns(1);
                    done().then_some(())
                });
                let back = a.raw.used();
                Some((a, status, back))
            });
            assert_eq!(back.map(|b| b.1), Some(1025));
            assert_eq!(a.status(status), 0, "it was done");
            if !stopped {
                a.stop(RESET);
            }
        }
    }
}

/// A life that is stopped before it has done again what the one before left: it does it, or answers.
#[test]
fn what_an_earlier_life_left_is_not_lost_by_a_stop() {
    let _alone = alone();
    for packed in KINDS {
        // Stopped at once, before it has the volume; and when it has, but has not looked at the ring.
        for turns in [0, 1] {
            let (volume, desk) = stall::desk(false);
            let (_region, record) = inflight(16);
            let set = record.clone();
            let mut a = Attack::with(packed, 16, volume, |s| {
                s.inflight = Some(set);
            });
            let requests = in_flight(&mut a, 0);
            assert_eq!(stop(&mut a, LEAVE).in_flight, N as u16);
            desk.release();
            let mut setup = a.setup();
            setup.inflight = Some(record);
            a.device.start_queue(setup).unwrap();
            a.turns(turns);
            assert_eq!(a.raw.used(), None);
            assert_eq!(stop(&mut a, ANSWER).in_flight, 0);
            let mut back: Vec<u16> = std::iter::from_fn(|| a.raw.used()).map(|u| u.0).collect();
            back.sort_unstable();
            let mut ids: Vec<u16> = requests.iter().map(|r| r.0).collect();
            ids.sort_unstable();
            assert_eq!(back, ids, "each once");
            for (_, status, _) in &requests {
                assert_eq!(a.status(*status), u8::from(turns == 0));
            }
        }
    }
}

#[test]
fn answered_with_an_error() {
    let _alone = alone();
    for packed in KINDS {
        // With a record and without, taken by the volume or still waiting for it; and where `leave` is
        // asked for but nothing would remember.
        for (limit, recorded, how) in [
            (0, false, ANSWER),
            (2, false, ANSWER),
            (0, true, ANSWER),
            (0, false, LEAVE),
        ] {
            for kind in [0, 1] {
                let (volume, desk) = stall::desk(false);
                desk.limit.store(limit, Ordering::SeqCst);
                let (_region, record) = inflight(16);
                let mut a = Attack::with(packed, 16, volume, |s| {
                    s.inflight = recorded.then_some(record);
                });
                let requests = in_flight(&mut a, kind);
                let before = a.snapshot();
                let stopped = stop(&mut a, how);
                assert_eq!(stopped.in_flight, 0);
                let mut back = Vec::new();
                while let Some((id, written)) = a.raw.used() {
                    assert!(written <= 1);
                    back.push(id);
                }
                back.sort_unstable();
                let mut ids: Vec<u16> = requests.iter().map(|r| r.0).collect();
                ids.sort_unstable();
                assert_eq!(back, ids, "each once");
                for (_, status, _) in &requests {
                    assert_eq!(a.status(*status), 1, "an error status");
                }
                desk.release();
                a.turns(TURNS);
                let statuses: Vec<_> = requests.iter().map(|r| (r.1, 1)).collect();
                a.unchanged(&before, &statuses);
            }
        }
    }
}

#[test]
fn a_reset_writes_nothing_and_forgets() {
    let _alone = alone();
    for packed in KINDS {
        for recorded in [false, true] {
            let (volume, desk) = stall::desk(false);
            let (_region, record) = inflight(16);
            let set = recorded.then(|| record.clone());
            let mut a = Attack::with(packed, 16, volume, |s| {
                s.inflight = set;
            });
            in_flight(&mut a, 0);
            let before = a.snapshot();
            stop(&mut a, RESET);
            desk.release();
            a.turns(TURNS);
            assert!(before == a.snapshot(), "after a reset nothing is written");
            // The driver begins afresh, with a ring of zeroes; the record goes on with it.
            a.raw = Raw::new(&a.memory, packed, 16);
            let mut setup = a.setup();
            setup.inflight = recorded.then_some(record);
            a.start(setup);
            a.queue_lives();
            assert_eq!(a.back(), None, "what was dropped does not come back");
        }
    }
}

/// A ring that cannot be started because its record lies works again after a reset.
#[test]
fn a_reset_forgets_a_record_that_lies() {
    let _alone = alone();
    for packed in KINDS {
        let (region, record) = inflight(16);
        let set = record.clone();
        let mut a = Attack::with(packed, 16, ram("size=1MiB"), |s| {
            s.inflight = Some(set);
        });
        a.queue_lives();
        a.stop(RESET);
        use std::os::unix::fs::FileExt;
        region.write_all_at(&[1, 0, 77, 0], 8).unwrap();
        a.raw = Raw::new(&a.memory, packed, 16);
        let mut setup = a.setup();
        setup.inflight = Some(record.clone());
        a.start(setup);
        assert!(a.broken());
        assert_eq!(a.stop(RESET), None);
        a.events.lock().unwrap().clear();
        let mut setup = a.setup();
        setup.inflight = Some(record);
        a.start(setup);
        a.queue_lives();
    }
}

impl Attack {
    /// Changes the epoch; says how long it took until the one before was out of use.
    fn set_memory(&mut self, memory: Arc<GuestMemory>, bound: Duration) -> Duration {
        let done = self.begin_memory(memory, bound);
        let start = Instant::now();
        wait(|| {
            self.turns(1);
            done.try_recv().ok()
        });
        start.elapsed()
    }

    /// Turns until nothing is left to do but to sleep.
    fn rest(&mut self) {
        wait(|| self.reactor.rest().then_some(()));
    }

    fn begin_memory(&mut self, memory: Arc<GuestMemory>, bound: Duration) -> Receiver<()> {
        let (tx, rx) = channel();
        let done = Box::new(move || tx.send(()).unwrap());
        let change = QueueChange::Memory {
            memory,
            bound,
            done,
        };
        self.device.change_queue(0, change);
        rx
    }
}

/// The guest's memory without its second region.
fn half(a: &Attack) -> Arc<GuestMemory> {
    let first = a.epoch.regions().next().unwrap().clone();
    GuestMemory::new(vec![first]).unwrap()
}

#[test]
fn memory_that_goes_is_let_go_within_the_bound() {
    let _alone = alone();
    for packed in KINDS {
        for limit in [0, 1] {
            let (volume, desk) = stall::desk(false);
            desk.limit.store(limit, Ordering::SeqCst);
            let mut a = Attack::with(packed, 32, volume, |_| {});
            // One that reads into the region that goes, and one that has only its status there.
            let (mut c, gone) = a.request(0, 0, 1024);
            c[1] = d(SEAM, 1024, WRITE);
            let first = a.raw.chain(&c);
            let (mut c, _) = a.request(0, 0, 1024);
            c[2] = d(SEAM + 4096, 1, WRITE);
            let second = a.raw.chain(&c);
            let stays = in_flight(&mut a, 0);
            let memory = half(&a);
            let old = Arc::downgrade(&std::mem::replace(&mut a.epoch, memory.clone()));
            let took = a.set_memory(memory, Duration::from_millis(100));
            assert!(
                took < BOUND && took >= Duration::from_millis(90),
                "{took:?}"
            );
            assert!(old.upgrade().is_none(), "unmapped when it is said");
            let mut back = [a.back().unwrap().0, a.back().unwrap().0];
            back.sort_unstable();
            assert_eq!(back, [first.min(second), first.max(second)]);
            assert_eq!(a.status(gone), 1);
            assert_eq!(a.back(), None, "the others go on");
            desk.limit.store(0, Ordering::SeqCst);
            let before = a.snapshot();
            desk.release();
            for _ in 0..N {
                assert!(a.back().is_some());
            }
            let mut offered: Vec<_> = stays.iter().map(|r| (r.1, 1)).collect();
            offered.extend(stays.iter().map(|r| (r.2[1].addr, 1024)));
            a.unchanged(&before, &offered);
        }
    }
}

/// A second change before the first has ended: both end, and nothing is unmapped before its time.
#[test]
fn memory_changes_twice() {
    let _alone = alone();
    for packed in KINDS {
        let (volume, desk) = stall::desk(false);
        let mut a = Attack::with(packed, 16, volume, |_| {});
        let (mut c, status) = a.request(0, 0, 1024);
        c[1] = d(SEAM, 1024, WRITE);
        a.raw.chain(&c);
        a.turns(TURNS);
        let (one, two) = (half(&a), half(&a));
        let old = Arc::downgrade(&std::mem::replace(&mut a.epoch, two.clone()));
        let long = Duration::from_secs(60);
        let first = a.begin_memory(one, long);
        a.turns(TURNS);
        let second = a.begin_memory(two, Duration::from_millis(50));
        a.turns(TURNS);
        assert!(first.try_recv().is_err() && second.try_recv().is_err());
        assert!(old.upgrade().is_some(), "still being read into");
        let start = Instant::now();
        wait(|| {
            a.turns(1);
            second.try_recv().ok()
        });
        assert!(start.elapsed() < BOUND);
        first.try_recv().expect("nothing uses the first one either");
        assert!(old.upgrade().is_none());
        assert_eq!(a.status(status), 1);
        assert_eq!(desk.held.load(Ordering::SeqCst), 0);
    }
}

/// The ring itself is in the memory that goes: the queue is broken, and still ends in order.
#[test]
fn the_ring_goes_with_its_memory() {
    let _alone = alone();
    for packed in KINDS {
        let (volume, desk) = stall::desk(false);
        let mut a = Attack::with(packed, 16, volume, |_| {});
        in_flight(&mut a, 0);
        let before = a.snapshot();
        let took = a.set_memory(GuestMemory::empty(), Duration::from_millis(100));
        assert!(took < BOUND);
        assert!(a.broken());
        desk.release();
        a.turns(TURNS);
        stop(&mut a, RESET);
        assert!(before == a.snapshot());
    }
}

/// A stop while memory is being let go: both are told.
#[test]
fn a_stop_during_a_memory_change() {
    let _alone = alone();
    for packed in KINDS {
        for how in [LEAVE, ANSWER, RESET] {
            let volume = stall::volume(false);
            let (_region, record) = inflight(16);
            let mut a = Attack::with(packed, 16, volume, |s| {
                s.inflight = Some(record);
            });
            let (mut c, _) = a.request(0, 0, 1024);
            c[1] = d(SEAM, 1024, WRITE);
            a.raw.chain(&c);
            a.turns(TURNS);
            let memory = half(&a);
            a.epoch = memory.clone();
            let changed = a.begin_memory(memory, Duration::from_secs(60));
            a.turns(TURNS);
            stop(&mut a, how);
            changed.try_recv().expect("the memory is free now");
        }
    }
}

/// A queue that never got the volume's attention, a disabled one, and one that is stopped at once.
#[test]
fn stops_that_have_nothing_to_wait_for() {
    let _alone = alone();
    for packed in KINDS {
        let mut a = Attack::with(packed, 16, stall::volume(false), |s| {
            s.enabled = false;
        });
        let (c, _) = a.request(0, 0, 1024);
        a.raw.chain(&c);
        a.turns(TURNS);
        let before = a.snapshot();
        let start = Instant::now();
        assert_eq!(stop(&mut a, ANSWER).in_flight, 0);
        assert!(before == a.snapshot());
        let setup = a.setup();
        a.device.start_queue(setup).unwrap();
        assert_eq!(stop(&mut a, LEAVE).in_flight, 0);
        assert!(start.elapsed() < BOUND);
        assert_eq!(a.stop(LEAVE), None, "not twice");
    }
}
