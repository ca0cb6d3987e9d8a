//! Packed rings against the small device.

use std::collections::VecDeque;
use std::sync::Arc;

use bluff_virtio_driver::{Config, DriverQueue, Error, Features, Memory, PackedDriver, Position};
use proptest::prelude::*;

use crate::packed_device::PackedDevice;
use crate::{chain, guest, writable};

const ALL: Features = Features {
    event_idx: true,
    indirect: true,
    in_order: false,
};

fn pair(
    size: u16,
    features: Features,
    start: Position,
) -> (Arc<Memory>, PackedDriver, PackedDevice) {
    let memory = guest(1 << 20);
    let config = Config {
        indirect_entries: 8,
        start,
        ..Config::new(size, features)
    };
    let driver = PackedDriver::new(&memory, &config).expect("driver");
    let device = PackedDevice::new(&memory, driver.layout(), size, start);
    (memory, driver, device)
}

#[derive(Debug, Clone)]
enum Op {
    Add {
        readable: u32,
        writable: u32,
        indirect: bool,
    },
    Publish,
    Use {
        which: usize,
        batch: usize,
        share: u32,
    },
    Pop,
    Listen(Option<u16>),
    Interrupts(Option<u16>),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0..5_u32, 0..4_u32, any::<bool>())
            .prop_filter("empty", |(r, w, _)| r + w > 0)
            .prop_map(|(readable, writable, indirect)| Op::Add { readable, writable, indirect }),
        3 => Just(Op::Publish),
        4 => (any::<usize>(), any::<usize>(), 0..=100_u32)
            .prop_map(|(which, batch, share)| Op::Use { which, batch, share }),
        5 => Just(Op::Pop),
        1 => proptest::option::of(0..8_u16).prop_map(Op::Listen),
        1 => proptest::option::of(1..8_u16).prop_map(Op::Interrupts),
    ]
}

/// Whether an event lies among the positions from `old` up to `new`: with one wrap bit, it comes up again every two laps.
fn passed(size: u16, event: u64, old: u64, new: u64) -> bool {
    let laps = 2 * u64::from(size);
    (old..new).any(|position| position % laps == event % laps)
}

fn run(size: u16, features: Features, start: Position, ops: &[Op]) {
    let (_memory, mut driver, mut device) = pair(size, features, start);
    let mut token = 0;
    let mut unpublished = Vec::new();
    let mut tokens: VecDeque<(u64, u32)> = VecDeque::new();
    let mut used: VecDeque<(u64, u32, u64)> = VecDeque::new();
    // Descriptors on a line that does not wrap: published, fetched, used, popped.
    let (mut published, mut given_back, mut popped) = (0_u64, 0_u64, 0_u64);
    // Where the device wants to hear of new chains; `None`: of all.
    let mut event: Option<u64> = None;
    let mut interrupt_at: Option<u64> = None;
    let mut driver_wants = true;
    for op in ops {
        match op {
            Op::Add {
                readable,
                writable: writes,
                indirect,
            } => {
                let chain = chain(*readable, *writes, token);
                let needed = if *indirect { 1 } else { chain.len() as u16 };
                match driver.add(&chain, *indirect, token) {
                    Ok(_) => unpublished.push((chain, needed, token)),
                    Err(Error::Full) => assert!(driver.free_descriptors() < needed),
                    Err(Error::BadChain) => assert!(needed > size),
                    Err(other) => panic!("{other}"),
                }
                token += 1;
            }
            Op::Publish => {
                assert_eq!(device.fetch_all(), 0, "nothing shows before publication");
                let old = published;
                published += unpublished
                    .iter()
                    .map(|(_, needed, _)| u64::from(*needed))
                    .sum::<u64>();
                let wanted = old != published
                    && event.is_none_or(|event| passed(size, event, old, published));
                assert_eq!(
                    driver.publish(),
                    wanted,
                    "event {event:?}, {old} to {published}"
                );
                assert_eq!(device.fetch_all(), unpublished.len());
                let new = device.held.len() - unpublished.len();
                for (seen, (chain, needed, token)) in
                    device.held.range(new..).zip(unpublished.drain(..))
                {
                    assert_eq!((&seen.buffers, seen.descriptors), (&chain, needed));
                    tokens.push_back((token, writable(&chain)));
                }
            }
            Op::Use {
                which,
                batch,
                share,
            } => {
                if device.held.is_empty() {
                    continue;
                }
                let old = given_back;
                let interrupt = if features.in_order {
                    let batch = batch % device.held.len() + 1;
                    for i in 0..batch {
                        let descriptors = u64::from(device.held[i].descriptors);
                        given_back += descriptors;
                        let (token, writable) = tokens.pop_front().expect("held");
                        // The last one's length is what the device says; the skipped ones count as full.
                        let written = if i + 1 == batch {
                            writable * share / 100
                        } else {
                            writable
                        };
                        used.push_back((token, written, descriptors));
                    }
                    let written = used.back().expect("just added").1;
                    device.use_batch(batch, written)
                } else {
                    let which = which % device.held.len();
                    let descriptors = u64::from(device.held[which].descriptors);
                    given_back += descriptors;
                    let (token, writable) = tokens.remove(which).expect("held");
                    let written = writable * share / 100;
                    used.push_back((token, written, descriptors));
                    device.use_chain(which, written)
                };
                let wanted =
                    driver_wants && interrupt_at.is_none_or(|at| passed(size, at, old, given_back));
                assert_eq!(
                    interrupt, wanted,
                    "event {interrupt_at:?}, {old} to {given_back}"
                );
            }
            Op::Pop => {
                let expected = used.pop_front();
                let got = driver.pop_used().expect("the device breaks no rule");
                assert_eq!(
                    got.map(|got| (got.token, got.written)),
                    expected.map(|(token, len, _)| (token, len))
                );
                popped += expected.map_or(0, |(_, _, descriptors)| descriptors);
            }
            Op::Listen(ahead) => match ahead {
                Some(ahead) if features.event_idx => {
                    let ahead = ahead % size;
                    device.listen_at(ahead);
                    event = Some(published + u64::from(ahead));
                }
                _ => {
                    device.set_event(0, 0);
                    event = None;
                }
            },
            Op::Interrupts(wait) => match wait {
                Some(wait) => {
                    assert_eq!(driver.enable_interrupts_after(*wait), !used.is_empty());
                    let wait = u64::from(*wait.min(&size));
                    driver_wants = true;
                    interrupt_at = features.event_idx.then_some(popped + wait - 1);
                }
                None => {
                    driver.disable_interrupts();
                    driver_wants = false;
                }
            },
        }
        assert_eq!(
            usize::from(driver.in_flight()),
            unpublished.len() + tokens.len() + used.len()
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    /// Any size, any start, random shapes, batches, completions out of order or in batches, suppression.
    #[test]
    fn random_scripts_agree_with_the_device(
        size in prop_oneof![1..10_u16, Just(64), Just(100)],
        event_idx in any::<bool>(),
        in_order in any::<bool>(),
        index in any::<u16>(),
        wrap in any::<bool>(),
        ops in prop::collection::vec(op(), 1..300),
    ) {
        let features = Features { event_idx, indirect: true, in_order };
        run(size, features, Position { index: index % size, wrap }, &ops);
    }
}

#[test]
fn a_kick_is_wanted_exactly_when_the_event_is_passed() {
    for size in [1_u16, 2, 5, 8] {
        for (index, wrap) in (0..size).flat_map(|index| [(index, true), (index, false)]) {
            for batch in 1..=size {
                // A lap behind the position to a lap ahead: all that an offset and a wrap counter tell apart.
                for ahead in -i32::from(size)..i32::from(size) {
                    let (_memory, mut driver, device) = pair(size, ALL, Position { index, wrap });
                    let at = i32::from(index) + ahead;
                    let lap = at.div_euclid(i32::from(size));
                    let offset = at.rem_euclid(i32::from(size)) as u16;
                    let event_wrap = wrap ^ (lap % 2 != 0);
                    device.set_event(2, offset | u16::from(event_wrap) << 15);
                    for token in 0..batch {
                        driver
                            .add(&chain(1, 0, 0), false, u64::from(token))
                            .expect("room");
                    }
                    let wanted = (0..i32::from(batch)).contains(&ahead);
                    let kick = driver.publish();
                    assert_eq!(
                        kick, wanted,
                        "size {size} at {index},{wrap} batch {batch} event {ahead:+}"
                    );
                }
            }
        }
    }
}

#[test]
fn flags_suppress_kicks() {
    let (_memory, mut driver, device) = pair(4, Features::default(), Position::default());
    for (flags, wanted) in [(0, true), (1, false), (0, true)] {
        device.set_event(flags, 0);
        driver.add(&chain(1, 0, 0), false, 0).expect("room");
        assert_eq!(driver.publish(), wanted);
    }
    assert!(!driver.publish(), "nothing new");
}

#[test]
fn fixed_chains_and_restart() {
    for in_order in [false, true] {
        for indirect in [false, true] {
            let features = Features { in_order, ..ALL };
            let (memory, mut driver, mut device) = pair(7, features, Position::default());
            let shape = chain(2, 1, 3);
            let fixed = [0, 1].map(|token| driver.fix(&shape, indirect, token).expect("room"));
            for _ in 0..50 {
                for fixed in fixed {
                    driver.resubmit(fixed).expect("not in flight");
                    assert!(matches!(driver.resubmit(fixed), Err(Error::InFlight)));
                }
                driver.publish();
                assert_eq!(device.fetch_all(), 2);
                assert!(device.held.iter().all(|held| held.buffers == shape));
                device.use_chain(0, 5);
                device.use_chain(0, 0);
                let used =
                    [(); 2].map(|()| driver.pop_used().expect("no violation").expect("used"));
                assert_eq!(
                    used.map(|used| (used.token, used.written)),
                    [(0, 5), (1, 0)]
                );
            }
            driver.resubmit(fixed[0]).expect("not in flight");
            driver.publish();
            driver.add(&shape, false, 2).expect("room");
            assert_eq!(driver.restart(), 2);
            assert_eq!(driver.positions().packed_base(), 0x8000_8000);
            let mut device = PackedDevice::new(&memory, driver.layout(), 7, Position::default());
            assert_eq!(device.fetch_all(), 0);
            driver.resubmit(fixed[0]).expect("not in flight any more");
            driver.publish();
            assert_eq!(device.fetch_all(), 1);
            device.use_chain(0, 1);
            assert_eq!(
                driver
                    .pop_used()
                    .expect("no violation")
                    .expect("used")
                    .token,
                0
            );
        }
    }
}

#[test]
fn positions_carry_their_wrap_counters() {
    let (_memory, mut driver, mut device) = pair(3, ALL, Position::default());
    assert_eq!(driver.positions().packed_base(), 0x8000_8000);
    for token in 0..2 {
        driver.add(&chain(1, 1, token), false, token).expect("room");
        driver.publish();
        if token == 0 {
            assert_eq!(driver.positions().packed_base(), 0x8000_8002);
            device.fetch_all();
            device.use_chain(0, 0);
            driver.pop_used().expect("no violation").expect("used");
        }
    }
    assert_eq!(
        driver.positions().packed_base(),
        0x8002_0001,
        "available went round, used did not yet"
    );
}
