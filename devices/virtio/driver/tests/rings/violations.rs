//! Devices that break the rules: each is named, none makes the driver panic or move.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bluff_testing::Chance;
use bluff_virtio_driver::{
    Config, DriverQueue, Features, Memory, PackedDriver, SplitDriver, Violation,
};

use crate::{StopOnDrop, chain, guest, violation};

fn split(in_order: bool) -> (Arc<Memory>, SplitDriver) {
    let memory = guest(1 << 20);
    let features = Features {
        in_order,
        ..Features::default()
    };
    let driver = SplitDriver::new(&memory, &Config::new(8, features)).expect("driver");
    (memory, driver)
}

fn packed(in_order: bool) -> (Arc<Memory>, PackedDriver) {
    let memory = guest(1 << 20);
    let features = Features {
        in_order,
        ..Features::default()
    };
    let driver = PackedDriver::new(&memory, &Config::new(8, features)).expect("driver");
    (memory, driver)
}

/// Writes a used entry and the used index of a split ring.
fn give_split(memory: &Memory, driver: &SplitDriver, place: u64, id: u32, len: u32, index: u16) {
    let device = driver.layout().device;
    memory
        .write_u32(device + 4 + place * 8, id)
        .expect("inside");
    memory
        .write_u32(device + 8 + place * 8, len)
        .expect("inside");
    memory.write_u16(device + 2, index).expect("inside");
}

fn give_packed(memory: &Memory, driver: &PackedDriver, place: u64, id: u16, len: u32, flags: u16) {
    let at = driver.layout().descriptors + place * 16;
    memory.write_u32(at + 8, len).expect("inside");
    memory.write_u16(at + 12, id).expect("inside");
    memory.write_u16(at + 14, flags).expect("inside");
}

#[test]
fn split_used_index_past_what_is_in_flight() {
    let (memory, mut driver) = split(false);
    let head = driver.add(&chain(1, 1, 0), false, 1).expect("room");
    give_split(&memory, &driver, 0, u32::from(head), 0, 1);
    let early = violation(driver.pop_used());
    assert_eq!(
        early,
        Violation::UsedIndex {
            from: 0,
            to: 1,
            in_flight: 0
        },
        "not published yet"
    );
    driver.publish();
    give_split(&memory, &driver, 0, u32::from(head), 0, 2);
    let jump = Violation::UsedIndex {
        from: 0,
        to: 2,
        in_flight: 1,
    };
    assert_eq!(violation(driver.pop_used()), jump);
    assert_eq!(
        violation(driver.pop_used()),
        jump,
        "asking again changes nothing"
    );
    give_split(&memory, &driver, 0, u32::from(head), 0, 1);
    assert_eq!(driver.pop_used().expect("healed").expect("used").token, 1);
    give_split(&memory, &driver, 0, u32::from(head), 0, 0);
    assert_eq!(
        violation(driver.pop_used()),
        Violation::UsedIndex {
            from: 1,
            to: 0,
            in_flight: 0
        },
        "backwards"
    );
}

#[test]
fn split_used_ids_that_are_not_in_flight() {
    let (memory, mut driver) = split(false);
    let first = driver.add(&chain(1, 1, 0), false, 1).expect("room");
    let second = driver.add(&chain(1, 1, 1), false, 2).expect("room");
    driver.publish();
    let hidden = driver.add(&chain(1, 0, 2), false, 3).expect("room");
    // Out of the table, in the middle of a chain, free, 16 bits right but 32 wrong, added but not published.
    for id in [
        8,
        u32::from(first) + 1,
        7,
        0x1_0000 + u32::from(first),
        u32::MAX,
        u32::from(hidden),
    ] {
        give_split(&memory, &driver, 0, id, 0, 1);
        assert_eq!(violation(driver.pop_used()), Violation::UsedId { id });
    }
    give_split(&memory, &driver, 0, u32::from(second), 0, 1);
    assert_eq!(driver.pop_used().expect("right").expect("used").token, 2);
    give_split(&memory, &driver, 1, u32::from(second), 0, 2);
    assert_eq!(
        violation(driver.pop_used()),
        Violation::UsedId {
            id: u32::from(second)
        },
        "used twice"
    );
}

#[test]
fn split_used_length_over_the_writable_bytes() {
    let (memory, mut driver) = split(false);
    let id = driver.add(&chain(2, 1, 0), false, 1).expect("room");
    driver.publish();
    // The writable one is the third: 16 + 2 bytes.
    give_split(&memory, &driver, 0, u32::from(id), 19, 1);
    assert_eq!(
        violation(driver.pop_used()),
        Violation::UsedLength {
            id,
            written: 19,
            writable: 18
        }
    );
    give_split(&memory, &driver, 0, u32::from(id), 18, 1);
    assert_eq!(driver.pop_used().expect("right").expect("used").written, 18);
}

#[test]
fn split_in_order_batches_and_what_is_none() {
    let (memory, mut driver) = split(true);
    let heads: Vec<_> = (0..4)
        .map(|token| driver.add(&chain(1, 1, token), false, token).expect("room"))
        .collect();
    driver.publish();
    // One entry at the place of the batch's first chain, which names its third; the index moves by three.
    give_split(&memory, &driver, 0, u32::from(heads[2]), 5, 3);
    let used: Vec<_> = std::iter::from_fn(|| driver.pop_used().expect("a batch")).collect();
    let seen: Vec<_> = used.iter().map(|used| (used.token, used.written)).collect();
    assert_eq!(
        seen,
        [(0, 17), (1, 17), (2, 5)],
        "skipped ones count as written completely"
    );
    // The index covers one more chain, so an entry for a later one is out of order.
    let fifth = driver.add(&chain(1, 0, 4), false, 4).expect("room");
    driver.publish();
    give_split(&memory, &driver, 3, u32::from(fifth), 0, 4);
    assert_eq!(
        violation(driver.pop_used()),
        Violation::OutOfOrder {
            id: fifth,
            batch: 2,
            used: 1
        }
    );
    give_split(&memory, &driver, 3, u32::from(heads[3]), 0, 5);
    assert_eq!(driver.pop_used().expect("in order").expect("used").token, 3);
    give_split(&memory, &driver, 4, u32::from(fifth), 0, 5);
    assert_eq!(driver.pop_used().expect("in order").expect("used").token, 4);
}

#[test]
fn split_in_order_takes_descriptors_in_ring_order() {
    let (memory, mut driver) = split(true);
    let table = driver.layout().descriptors;
    let mut expected = 0;
    for round in 0..20_u16 {
        let head = driver.add(&chain(2, 1, 0), false, 0).expect("room");
        assert_eq!(head, expected);
        driver.publish();
        for at in [head, (head + 1) % 8] {
            let next = memory
                .read_u16(table + u64::from(at) * 16 + 14)
                .expect("inside");
            assert_eq!(
                next,
                (at + 1) % 8,
                "each descriptor leads to the next, the last one to 0"
            );
        }
        give_split(
            &memory,
            &driver,
            u64::from(round % 8),
            u32::from(head),
            0,
            round + 1,
        );
        driver.pop_used().expect("in order").expect("used");
        expected = (expected + 3) % 8;
    }
}

#[test]
fn packed_flags_of_no_lap() {
    let (memory, mut driver) = packed(false);
    let id = driver.add(&chain(1, 0, 0), false, 1).expect("room");
    driver.publish();
    for flags in [0x0000, 0x8000, 0x8001] {
        give_packed(&memory, &driver, 0, id, 0, flags);
        assert_eq!(
            violation(driver.pop_used()),
            Violation::UsedFlags { index: 0, flags }
        );
    }
    give_packed(&memory, &driver, 0, id, 0, 0x0080);
    assert!(driver.pop_used().expect("still available").is_none());
    give_packed(&memory, &driver, 0, id, 0, 0x8080);
    assert_eq!(driver.pop_used().expect("used").expect("used").token, 1);
    give_packed(&memory, &driver, 1, id, 0, 0x8080);
    assert_eq!(
        violation(driver.pop_used()),
        Violation::UsedId { id: u32::from(id) },
        "nothing is in flight"
    );
}

#[test]
fn packed_used_ids_and_lengths() {
    for in_order in [false, true] {
        let (memory, mut driver) = packed(in_order);
        let id = driver.add(&chain(1, 1, 0), false, 1).expect("room");
        driver.publish();
        let hidden = driver.add(&chain(1, 0, 0), false, 2).expect("room");
        for bad in [8, u16::MAX, hidden, id + 3] {
            give_packed(&memory, &driver, 0, bad, 0, 0x8080);
            assert_eq!(
                violation(driver.pop_used()),
                Violation::UsedId { id: u32::from(bad) }
            );
        }
        give_packed(&memory, &driver, 0, id, 18, 0x8082);
        assert_eq!(
            violation(driver.pop_used()),
            Violation::UsedLength {
                id,
                written: 18,
                writable: 17
            }
        );
        give_packed(&memory, &driver, 0, id, 18, 0x8080);
        let used = driver.pop_used().expect("no violation").expect("used");
        assert_eq!(
            used.written, 0,
            "the length is reserved when WRITE is not set"
        );
        give_packed(&memory, &driver, 2, id, 0, 0x8080);
        assert_eq!(
            violation(driver.pop_used()),
            Violation::UsedId { id: u32::from(id) },
            "used twice"
        );
    }
}

/// Garbage in every ring, from another thread, all the time: typed errors or tokens that are in flight, never a panic.
#[test]
fn a_thread_that_writes_garbage_never_makes_the_driver_panic() {
    use std::sync::atomic::{AtomicBool, Ordering};
    fn survive(memory: &Arc<Memory>, mut driver: impl DriverQueue, span: u64, area: u64) {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let stopper = StopOnDrop(&stop);
            scope.spawn(|| {
                let mut chance = Chance::new(1);
                while !stop.load(Ordering::Relaxed) {
                    let any = chance.word() as u16;
                    // Small values are the plausible ones.
                    let value = if chance.percent(50) {
                        any & 0x80ff
                    } else {
                        any
                    };
                    memory
                        .write_u16(area + chance.below(span / 2) * 2, value)
                        .expect("inside");
                }
            });
            let (mut errors, mut popped) = (0_u64, 0_u64);
            let mut in_flight = std::collections::HashSet::new();
            let deadline = Instant::now() + Duration::from_secs(30);
            for token in 0.. {
                if token >= 100_000 && errors > 0 {
                    break;
                }
                assert!(
                    Instant::now() < deadline,
                    "garbage is noticed; {popped} looked right"
                );
                if driver.add(&chain(1, 1, 0), false, token).is_ok() {
                    in_flight.insert(token);
                }
                driver.publish();
                match driver.pop_used() {
                    Ok(Some(used)) => {
                        assert!(in_flight.remove(&used.token), "a token comes back once");
                        popped += 1;
                    }
                    Ok(None) => {}
                    Err(_) => errors += 1,
                }
                assert_eq!(usize::from(driver.in_flight()), in_flight.len());
            }
            drop(stopper);
        });
    }
    for in_order in [false, true] {
        let (memory, driver) = split(in_order);
        let device = driver.layout().device;
        survive(&memory, driver, 4 + 8 * 8, device);
        let (memory, driver) = packed(in_order);
        let descriptors = driver.layout().descriptors;
        survive(&memory, driver, 8 * 16, descriptors);
    }
}
