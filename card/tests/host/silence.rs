//! A volume that never answers must not hold up its host (what the fifth scene of the demonstration shows; B15).
//!
//! ```text
//!   0 MiB          2 MiB            3 MiB         4 MiB
//!   | never answers | answers late   | answers     |
//! ```

use std::time::{Duration, Instant};

use bluff_virtio_driver::Request;

use crate::support::checker::{BLOCK, Checker};
use crate::support::daemon::{Daemon, Place, function};
use crate::support::guest::{DATA, Guest, SECTORS, Shape};
use crate::support::until;

/// Blocks of a MiB.
const MIB: u64 = (1 << 20) / BLOCK as u64;
/// What a host may be held up for. Front ends wait longer, but not much.
const BOUND: Duration = Duration::from_secs(2);
/// What never answers, and what answers when nobody waits for it any more: a flush as late as all the others.
const LAYERS: &str = r#"[
    { kind = "delay", read = "1500ms", write = "1500ms", write_zeroes = "1500ms", flush = "1700ms", range = "2MiB-3MiB" },
    { kind = "fault", action = "stall", kinds = "read,write,write_zeroes", range = "0-2MiB" },
]"#;
/// Requests of each queue that get no answer, or a late one.
const DEPTH: u64 = 32;

struct Scene {
    place: Place,
    daemon: Daemon,
    guest: Guest,
    checker: Checker,
    baseline: usize,
}

impl Scene {
    fn new(shape: Shape) -> Self {
        Self::with(shape, "")
    }

    /// With more lines about the function.
    fn with(shape: Shape, more: &str) -> Self {
        let place = Place::new(&format!(
            "[card]\npoll_us = 20\n[volume.disk0]\nuri = \"file:$DIR/disk0.raw\"\nlayers = {LAYERS}\n{}{more}\n",
            function("blk0", "disk0")
        ));
        place.make_file("disk0.raw", 4 * MIB * BLOCK as u64);
        let daemon = place.start();
        let baseline = daemon.descriptors();
        let guest = Guest::start(&place.socket("blk0"), shape);
        Self {
            place,
            daemon,
            guest,
            checker: Checker::new(4 * MIB),
            baseline,
        }
    }

    /// Sends requests that get no answer, reads and writes, to both queues, with some that get a late one.
    fn silence(&mut self) {
        for i in 0..DEPTH {
            for queue in 0..2 {
                let block = if i % 2 == 0 { i } else { 2 * MIB + i };
                let sector = (block + 100 * u64::from(queue)) * SECTORS;
                let request = match i % 4 < 2 {
                    true => Request::In { sector },
                    false => Request::Out { sector },
                };
                self.guest.submit(&mut self.checker, queue, request);
            }
        }
        self.guest.publish();
        let all = self.guest.in_flight() as u32;
        let daemon = &self.daemon;
        until("I/O", || (daemon.in_flight("blk0") >= all).then_some(()));
    }

    /// Everything that got no answer would come before this flush does; nothing of it may reach memory.
    fn nothing_comes_late(&mut self, before: &[u8]) {
        self.guest.flush(&mut self.checker);
        assert!(
            self.guest.data() == before,
            "a late completion wrote to the guest's memory"
        );
    }

    /// The function works, and lets go of everything in the end.
    fn finish(mut self) {
        self.daemon.assert_alive();
        for block in 3 * MIB..4 * MIB {
            let queue = (block % 2) as u16;
            let sector = block * SECTORS;
            let request = match block % 4 < 2 {
                true => Request::In { sector },
                false => Request::Out { sector },
            };
            if self.guest.blks[usize::from(queue)].in_flight() == 64 {
                self.guest.publish();
                self.guest.take_some(&mut self.checker);
            }
            self.guest.submit(&mut self.checker, queue, request);
        }
        self.guest.publish();
        self.guest.settle(&mut self.checker);
        drop(self.guest);
        self.daemon.until_let_go(self.baseline);
        self.daemon.terminate();
    }
}

/// Does something that a host waits for.
fn in_time(what: &str, act: impl FnOnce()) {
    let start = Instant::now();
    act();
    let took = start.elapsed();
    println!("{what}: {took:?}");
    assert!(took < BOUND, "{what} takes {took:?}");
}

fn reset(shape: Shape) {
    let mut scene = Scene::new(shape);
    scene.silence();
    in_time("RESET_DEVICE", || scene.guest.front_end.reset().unwrap());
    let before = scene.guest.data();
    scene.checker.abandon();
    scene.guest.begin_anew();
    scene.nothing_comes_late(&before);
    scene.finish();
}

#[test]
fn silence_holds_up_no_reset() {
    reset(Shape::SPLIT);
    reset(Shape::PACKED.without_inflight());
}

fn stop(shape: Shape) {
    let mut scene = Scene::new(shape);
    scene.silence();
    scene.guest.may_fail = true;
    let mut bases = Vec::new();
    // The second one has no second of its own: a host waits for all of them, one after another.
    in_time("GET_VRING_BASE of two queues", || {
        bases.extend((0..2).map(|q| scene.guest.front_end.stop(q).unwrap()));
    });
    // It was answered with errors, all of it: the queues stand still, and nothing of them is in flight.
    scene.guest.take(&mut scene.checker);
    assert_eq!(scene.guest.in_flight(), 0);
    assert_eq!(scene.checker.tally.errors, 2 * DEPTH);
    let before = scene.guest.data();
    for (queue, base) in (0..).zip(bases) {
        scene.guest.start_queue(queue, base).unwrap();
    }
    scene.guest.may_fail = false;
    scene.nothing_comes_late(&before);
    scene.finish();
}

#[test]
fn silence_holds_up_no_stop() {
    stop(Shape::SPLIT.without_inflight());
    stop(Shape::PACKED);
}

/// How long a stop waits for answers is what the function says: less than the second that it has unless
/// told, or so much that late answers count.
#[test]
fn a_stop_waits_as_long_as_the_function_says() {
    for (first, millis, answered) in [(0, 50, false), (2 * MIB, 10_000, true)] {
        let mut scene = Scene::with(Shape::SPLIT, &format!("stop_timeout_ms = {millis}"));
        for i in 0..DEPTH {
            let sector = (first + i) * SECTORS;
            scene
                .guest
                .submit(&mut scene.checker, 0, Request::In { sector });
        }
        scene.guest.publish();
        let daemon = &scene.daemon;
        until("I/O", || {
            (daemon.in_flight("blk0") == DEPTH as u32).then_some(())
        });
        let start = Instant::now();
        scene.guest.front_end.stop(0).unwrap();
        let took = start.elapsed();
        println!("GET_VRING_BASE with {millis} ms: {took:?}");
        scene.guest.may_fail = !answered;
        scene.guest.take(&mut scene.checker);
        assert_eq!(scene.guest.in_flight(), 0);
        let errors = if answered { 0 } else { DEPTH };
        assert_eq!(scene.checker.tally.errors, errors);
        assert!(answered || took < Duration::from_secs(1), "{took:?}");
    }
}

fn memory_table(shape: Shape) {
    let mut scene = Scene::new(shape);
    scene.silence();
    scene.guest.may_fail = true;
    in_time("SET_MEM_TABLE without memory in use", || {
        scene.guest.front_end.share_regions(|i| i != DATA).unwrap();
    });
    let before = scene.guest.data();
    scene.guest.settle(&mut scene.checker);
    assert_eq!(scene.checker.tally.errors, 2 * DEPTH);
    scene.guest.may_fail = false;
    scene.nothing_comes_late(&before);
    scene.guest.front_end.share_memory().unwrap();
    scene.finish();
}

#[test]
fn silence_holds_up_no_memory_table() {
    memory_table(Shape::SPLIT);
    memory_table(Shape::PACKED.without_inflight());
}

/// The front end goes away, and the next one is let in.
fn disconnect(shape: Shape) {
    let mut scene = Scene::new(shape);
    scene.silence();
    let mut next = None;
    let socket = scene.place.socket("blk0");
    in_time("the end of a connection", || {
        scene.guest.front_end.disconnect();
        next = Some(Guest::start(&socket, shape));
    });
    scene.checker.abandon();
    let before = scene.guest.data();
    let old = std::mem::replace(&mut scene.guest, next.unwrap());
    scene.guest.flush(&mut scene.checker);
    assert!(
        old.data() == before,
        "a late completion wrote to the guest's memory"
    );
    drop(old);
    scene.finish();
}

#[test]
fn b15_disconnect_with_io_that_never_completes() {
    disconnect(Shape::SPLIT);
    disconnect(Shape::PACKED.without_inflight());
}

/// What never completed stays recorded, and is taken up by whoever the front end connects to next.
#[test]
fn silence_outlives_the_connection_where_requests_are_recorded() {
    for shape in Shape::BOTH {
        let mut scene = Scene::new(shape);
        scene.silence();
        let socket = scene.place.socket("blk0");
        let all = scene.guest.in_flight();
        in_time("the end of a connection and another", || {
            scene.guest.hang_up_and_come_back(&socket);
        });
        let daemon = &scene.daemon;
        until("I/O", || {
            (daemon.in_flight("blk0") as usize == all).then_some(())
        });
        scene.guest.take(&mut scene.checker);
        assert_eq!(scene.guest.in_flight(), all, "nothing was answered");
        scene.guest.reset(&mut scene.checker);
        scene.finish();
    }
}

#[test]
fn silence_holds_up_no_end_of_the_daemon() {
    for shape in [Shape::SPLIT, Shape::PACKED.without_inflight()] {
        let mut scene = Scene::new(shape);
        scene.silence();
        let all = scene.guest.in_flight();
        let daemon = scene.daemon;
        let start = Instant::now();
        daemon.terminate();
        assert!(start.elapsed() < 2 * BOUND, "{:?}", start.elapsed());
        scene.guest.may_fail = true;
        scene.guest.take(&mut scene.checker);
        // It stays recorded for the next daemon; without a record the guest is told.
        let left = if shape.inflight { all } else { 0 };
        assert_eq!(scene.guest.in_flight(), left);
        assert_eq!(scene.checker.tally.errors, (all - left) as u64);
    }
}
