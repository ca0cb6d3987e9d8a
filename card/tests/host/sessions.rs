//! Front ends that die, reset, stop, come back and come again (R4, R25).

use std::io::Read;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;

use bluff_testing::{Chance, times};

use crate::support::checker::{BLOCK, Checker};
use crate::support::daemon::Place;
use crate::support::guest::{Guest, Shape};
use crate::support::{LIMIT, until};

const BLOCKS: u64 = 256;
/// Every request takes hundreds of milliseconds.
const SLOW: &str = r#"[
    { kind = "delay", read = "200ms", write = "200ms", flush = "200ms", write_zeroes = "200ms", jitter = "200ms" },
]"#;
/// Completions come late, and not in order.
const OUT_OF_ORDER: &str = r#"[
    { kind = "delay", read = "100us", write = "200us", flush = "100us", write_zeroes = "100us", jitter = "2ms" },
]"#;

fn place(layers: &str) -> Place {
    Place::with_disk(BLOCKS * BLOCK as u64, layers)
}

#[test]
fn r04_front_end_dies_in_mid_io() {
    let place = place(SLOW);
    let mut daemon = place.start();
    let baseline = daemon.descriptors();
    let mut checker = Checker::new(BLOCKS);
    let shapes = Shape::BOTH.map(|shape| [shape, shape.without_inflight()]);
    for shape in shapes.as_flattened() {
        for _ in 0..times(1, 20) {
            let mut guest = Guest::start(&place.socket("blk0"), *shape);
            guest.fill(&mut checker, 64);
            until("I/O", || (daemon.in_flight("blk0") >= 128).then_some(()));
            drop(guest);
            // The next one is let in when nothing is left of it.
            let mut guest = Guest::start(&place.socket("blk0"), *shape);
            checker.abandon();
            guest.verify(&mut checker);
            guest.fill(&mut checker, 64);
            drop(guest);
            daemon.until_let_go(baseline);
            checker.abandon();
        }
    }
    daemon.assert_alive();
    let mut guest = Guest::start(&place.socket("blk0"), Shape::SPLIT);
    guest.verify(&mut checker);
    drop(guest);
    daemon.until_let_go(baseline);
    daemon.terminate();
}

/// What a host does to its device in mid-I/O.
fn r25_reset_stop_and_come_back(shape: Shape) {
    let place = place(OUT_OF_ORDER);
    let socket = place.socket("blk0");
    let mut daemon = place.start();
    let mut guest = Guest::start(&socket, shape);
    let mut checker = Checker::new(BLOCKS);
    let mut chance = Chance::new(31);
    let mut cut = 0;
    for _ in 0..times(60, 2000) {
        guest.run(&mut checker, chance.below(100), 1 + chance.below(64) as u16);
        guest.fill(&mut checker, 32);
        match chance.below(4) {
            0 => {
                guest.reset(&mut checker);
            }
            1 => guest.stop_and_start(chance.below(2) as u16),
            2 if shape.inflight => guest.hang_up_and_come_back(&socket),
            2 => {
                // What was in flight is lost with the connection; the driver has to begin anew.
                guest.front_end.disconnect();
                guest.reconnect(&socket).unwrap();
                checker.abandon();
                guest.begin_anew();
            }
            _ => {
                drop(guest);
                guest = Guest::start(&socket, shape);
                checker.abandon();
            }
        }
        cut += guest.in_flight();
    }
    assert!(cut > 0);
    guest.run(&mut checker, 200, 32);
    guest.verify(&mut checker);
    assert_eq!(checker.tally.errors, 0);
    assert!(checker.tally.abandoned > 0);
    daemon.assert_alive();
    drop(guest);
    daemon.terminate();
}

#[test]
fn r25_reset_stop_and_come_back_in_mid_io_split() {
    r25_reset_stop_and_come_back(Shape::SPLIT);
    r25_reset_stop_and_come_back(Shape::SPLIT.without_inflight());
}

#[test]
fn r25_reset_stop_and_come_back_in_mid_io_packed() {
    r25_reset_stop_and_come_back(Shape::PACKED);
    r25_reset_stop_and_come_back(Shape::PACKED.without_inflight());
}

/// Connects, and is gone: also where a process that is being started still has the descriptor.
fn come_and_go(socket: &Path) {
    let stream = UnixStream::connect(socket).unwrap();
    stream.shutdown(Shutdown::Both).unwrap();
}

#[test]
fn front_ends_come_and_go() {
    let place = place(OUT_OF_ORDER);
    let socket = place.socket("blk0");
    let daemon = place.start();
    let baseline = daemon.descriptors();
    let mut checker = Checker::new(BLOCKS);
    let mut chance = Chance::new(5);
    for round in 0..times(50, 500) {
        let shape = Shape::BOTH[round % 2];
        match chance.below(5) {
            0 => come_and_go(&socket),
            1 => drop(Guest::connect(&socket, shape).unwrap()),
            _ => {
                let mut guest = Guest::start(&socket, shape);
                checker.abandon();
                guest.run(&mut checker, chance.below(200), 32);
                if chance.below(2) == 0 {
                    guest.settle(&mut checker);
                }
            }
        }
    }
    daemon.until_let_go(baseline);
    let mut guest = Guest::start(&socket, Shape::SPLIT);
    checker.abandon();
    guest.verify(&mut checker);
    drop(guest);
    daemon.until_let_go(baseline);
    daemon.terminate();
}

#[test]
fn a_front_end_that_gave_up_waiting_bars_nobody() {
    let place = place(SLOW);
    let socket = place.socket("blk0");
    let daemon = place.start();
    let mut checker = Checker::new(BLOCKS);
    let mut guest = Guest::start(&socket, Shape::SPLIT);
    guest.fill(&mut checker, 32);
    until("I/O", || (daemon.in_flight("blk0") > 0).then_some(()));
    // Its requests take a while to end; who comes meanwhile waits, or gives up.
    drop(guest);
    for _ in 0..3 {
        come_and_go(&socket);
    }
    let mut guest = Guest::start(&socket, Shape::SPLIT);
    checker.abandon();
    guest.verify(&mut checker);
    drop(guest);
    daemon.terminate();
}

#[test]
fn a_second_front_end_is_turned_away_and_the_first_goes_on() {
    let place = place(OUT_OF_ORDER);
    let daemon = place.start();
    let mut guest = Guest::start(&place.socket("blk0"), Shape::SPLIT);
    let mut checker = Checker::new(BLOCKS);
    let connected = daemon.descriptors();
    for _ in 0..times(20, 500) {
        guest.run(&mut checker, 20, 32);
        let mut second = UnixStream::connect(place.socket("blk0")).unwrap();
        second.set_read_timeout(Some(LIMIT)).unwrap();
        let said = second.read(&mut [0]);
        let is_over = match &said {
            Ok(read) => *read == 0,
            Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
        };
        assert!(is_over, "{said:?}");
    }
    guest.verify(&mut checker);
    // The last of the first one's messages may have been in work when they were counted.
    until("the end of the others", || {
        (daemon.descriptors() <= connected).then_some(())
    });
    drop(guest);
    daemon.terminate();
}

#[test]
fn events_are_replaced_in_mid_io() {
    for shape in Shape::BOTH {
        let place = place(OUT_OF_ORDER);
        let daemon = place.start();
        let mut guest = Guest::start(&place.socket("blk0"), shape);
        let mut checker = Checker::new(BLOCKS);
        guest.run(&mut checker, 50, 32);
        let running = daemon.descriptors();
        for round in 0..times(100, 5000) {
            // Depth 1 sleeps between any two requests: each needs its notification and its interrupt.
            guest.run(&mut checker, 5, [1, 32][round % 2]);
            guest.front_end.replace_events((round % 2) as u16).unwrap();
        }
        guest.verify(&mut checker);
        until("the end of the old events", || {
            (daemon.descriptors() == running).then_some(())
        });
        drop(guest);
        daemon.terminate();
    }
}
