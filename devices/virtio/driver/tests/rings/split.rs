//! Split rings against the ideal device.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bluff_virtio_driver::{
    Buffer, Config, DriverQueue, Error, Features, IdealConfig, IdealDevice, Memory, Position,
    SplitDriver,
};

use crate::{BASE, chain, guest};

const GUEST_LEN: u64 = 1 << 20;

fn pair(size: u16, features: Features, start: u16) -> (Arc<Memory>, SplitDriver, IdealDevice) {
    let memory = guest(GUEST_LEN);
    let start_at = Position {
        index: start,
        wrap: true,
    };
    let config = Config {
        indirect_entries: 4,
        start: start_at,
        ..Config::new(size, features)
    };
    let driver = SplitDriver::new(&memory, &config).expect("driver");
    let layout = driver.layout();
    let config = IdealConfig {
        guest: (BASE, GUEST_LEN),
        layout,
        size,
        event_idx: features.event_idx,
        start,
    };
    let device = IdealDevice::new(&memory, &config).expect("device");
    (memory, driver, device)
}

/// A request of a 16-byte header and a status byte.
fn request(memory: &Memory) -> [Buffer; 2] {
    let addr = memory.alloc(32, 16).expect("room");
    [Buffer::readable(addr, 16), Buffer::writable(addr + 16, 1)]
}

#[test]
fn a_full_ring_goes_round_the_16_bit_index() {
    for indirect in [false, true] {
        for size in [2_u16, 8] {
            let (memory, mut driver, mut device) = pair(
                size,
                Features {
                    indirect: true,
                    ..Features::default()
                },
                65530,
            );
            let chain = request(&memory);
            let fits = if indirect { size } else { size / 2 };
            let mut token = 0;
            for _ in 0..20 {
                let first = token;
                for _ in 0..fits {
                    driver.add(&chain, indirect, token).expect("room");
                    token += 1;
                }
                assert!(matches!(driver.add(&chain, indirect, 0), Err(Error::Full)));
                assert_eq!(driver.free_descriptors(), 0);
                assert_eq!(device.poll(), 0, "nothing is published yet");
                driver.publish();
                assert_eq!(device.poll(), fits);
                for expected in first..token {
                    let used = driver.pop_used().expect("no violation").expect("used");
                    assert_eq!((used.token, used.written), (expected, 1));
                }
                assert!(driver.pop_used().expect("no violation").is_none());
                assert_eq!((driver.in_flight(), driver.free_descriptors()), (0, size));
            }
            let index = 65530_u16.wrapping_add(token as u16);
            assert_eq!(driver.positions().avail.index, index);
            assert_eq!(driver.positions().used.index, index);
            assert_eq!(driver.positions().split_base(), u32::from(index));
        }
    }
}

#[test]
fn chains_that_no_driver_may_make_are_refused() {
    let (memory, mut driver, _) = pair(4, Features::default(), 0);
    let [header, status] = request(&memory);
    assert!(matches!(driver.add(&[], false, 0), Err(Error::BadChain)));
    assert!(matches!(
        driver.add(&[status, header], false, 0),
        Err(Error::BadChain)
    ));
    assert!(matches!(
        driver.add(&[header; 5], false, 0),
        Err(Error::BadChain)
    ));
    assert!(matches!(
        driver.add(&[header], true, 0),
        Err(Error::NoIndirect)
    ));
    let huge = Buffer::readable(0, u32::MAX);
    assert!(matches!(
        driver.add(&[huge, huge], false, 0),
        Err(Error::BadChain)
    ));
    assert_eq!((driver.in_flight(), driver.free_descriptors()), (0, 4));
    assert!(!driver.publish(), "nothing to publish, nothing to kick");
    for size in [0, 32769] {
        assert!(matches!(
            SplitDriver::new(&memory, &Config::new(size, Features::default())),
            Err(Error::BadGeometry)
        ));
    }
}

#[test]
fn a_fixed_chain_is_sent_again_and_again() {
    for in_order in [false, true] {
        for indirect in [false, true] {
            let features = Features {
                indirect: true,
                in_order,
                ..Features::default()
            };
            let (memory, mut driver, mut device) = pair(8, features, 65533);
            let fixed: Vec<_> = (0..3)
                .map(|token| {
                    driver
                        .fix(&request(&memory), indirect, token)
                        .expect("room")
                })
                .collect();
            for round in 0..20_u64 {
                for (i, fixed) in fixed.iter().enumerate() {
                    driver.resubmit(*fixed).expect("not in flight");
                    assert!(
                        matches!(driver.resubmit(*fixed), Err(Error::InFlight)),
                        "chain {i}"
                    );
                }
                // One of the other kind in between.
                driver
                    .add(&request(&memory), false, 100 + round)
                    .expect("room");
                driver.publish();
                assert_eq!(device.poll(), 4);
                let tokens: Vec<_> =
                    std::iter::from_fn(|| driver.pop_used().expect("no violation"))
                        .map(|used| used.token)
                        .collect();
                assert_eq!(tokens, [0, 1, 2, 100 + round]);
            }
        }
    }
}

#[test]
fn a_kick_is_wanted_exactly_when_the_event_is_passed() {
    for start in [0_u16, 5, 65529, 65535] {
        for batch in 1..=8_u16 {
            for ahead in -10..=10_i32 {
                let features = Features {
                    event_idx: true,
                    ..Features::default()
                };
                let (memory, mut driver, _) = pair(8, features, start);
                let event = start.wrapping_add_signed(ahead as i16);
                memory
                    .write_u16(driver.layout().device + 4 + 8 * 8, event)
                    .expect("avail_event");
                for token in 0..batch {
                    driver
                        .add(&chain(1, 0, 0), false, u64::from(token))
                        .expect("room");
                }
                let wanted = (0..i32::from(batch)).contains(&ahead);
                assert_eq!(
                    driver.publish(),
                    wanted,
                    "start {start} batch {batch} event {ahead:+}"
                );
            }
        }
    }
}

#[test]
fn a_kick_is_wanted_as_the_flag_says() {
    let (memory, mut driver, mut device) = pair(4, Features::default(), 0);
    driver.add(&request(&memory), false, 0).expect("room");
    assert!(driver.publish());
    device.disarm();
    driver.add(&request(&memory), false, 1).expect("room");
    assert!(!driver.publish());
    assert!(device.arm(), "two chains are there already");
}

#[test]
fn an_interrupt_comes_exactly_when_the_driver_asked_for_it() {
    for start in [0_u16, 65531] {
        for batch in 1..=8_u16 {
            for wait in 1..=8_u16 {
                let features = Features {
                    event_idx: true,
                    ..Features::default()
                };
                let (memory, mut driver, mut device) = pair(16, features, start);
                assert!(!driver.enable_interrupts_after(wait), "nothing is used");
                for token in 0..batch {
                    driver
                        .add(&request(&memory), false, u64::from(token))
                        .expect("room");
                }
                driver.publish();
                device.poll();
                assert_eq!(
                    device.wants_interrupt(),
                    wait <= batch,
                    "start {start} batch {batch} wait {wait}"
                );
                assert_eq!(
                    driver.enable_interrupts_after(wait),
                    wait <= batch,
                    "the look behind the fence"
                );
                driver.disable_interrupts();
                while driver.pop_used().expect("no violation").is_some() {}
                driver.disable_interrupts();
                driver.add(&request(&memory), false, 0).expect("room");
                driver.publish();
                device.poll();
                assert!(!device.wants_interrupt());
            }
        }
    }
    let (memory, mut driver, mut device) = pair(16, Features::default(), 0);
    for wanted in [true, false, true] {
        match wanted {
            true => assert!(!driver.enable_interrupts()),
            false => driver.disable_interrupts(),
        }
        driver.add(&request(&memory), false, 0).expect("room");
        driver.publish();
        device.poll();
        assert_eq!(device.wants_interrupt(), wanted);
        assert!(driver.enable_interrupts(), "used already");
        driver.pop_used().expect("no violation").expect("used");
    }
}

#[test]
fn a_restart_forgets_what_was_in_flight_and_keeps_fixed_chains() {
    for in_order in [false, true] {
        let features = Features {
            in_order,
            ..Features::default()
        };
        let (memory, mut driver, mut device) = pair(8, features, 0);
        let fixed = driver.fix(&request(&memory), false, 7).expect("room");
        driver.resubmit(fixed).expect("not in flight");
        driver.add(&request(&memory), false, 8).expect("room");
        driver.publish();
        driver.add(&request(&memory), false, 9).expect("room");
        device.poll();
        driver.pop_used().expect("no violation").expect("used");
        assert_eq!(driver.restart(), 2);
        assert_eq!(driver.positions().avail.index, 0);
        assert!(driver.pop_used().expect("no violation").is_none());

        let layout = driver.layout();
        let config = IdealConfig {
            guest: (BASE, GUEST_LEN),
            layout,
            size: 8,
            event_idx: false,
            start: 0,
        };
        let mut device = IdealDevice::new(&memory, &config).expect("device");
        driver.resubmit(fixed).expect("not in flight any more");
        driver.add(&request(&memory), false, 10).expect("room");
        driver.publish();
        assert_eq!(device.poll(), 2);
        assert_eq!(
            driver
                .pop_used()
                .expect("no violation")
                .expect("used")
                .token,
            7
        );
        assert_eq!(
            driver
                .pop_used()
                .expect("no violation")
                .expect("used")
                .token,
            10
        );
    }
}

/// Two threads that sleep whenever they may. A wake-up that is lost leaves both asleep, and the time-out tells.
#[test]
fn two_threads_that_sleep_never_miss_each_other() {
    use std::sync::mpsc::{RecvTimeoutError, channel};
    use std::time::Duration;
    const REQUESTS: u64 = 30_000;
    const LOST: Duration = Duration::from_secs(30);
    for event_idx in [false, true] {
        let features = Features {
            event_idx,
            ..Features::default()
        };
        let (memory, mut driver, mut device) = pair(8, features, 65000);
        let (kick, kicked) = channel::<()>();
        let (call, called) = channel::<()>();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let done = &done;
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    device.disarm();
                    while device.poll() != 0 {}
                    if device.wants_interrupt() {
                        let _ = call.send(());
                    }
                    if !device.arm() {
                        match kicked.recv_timeout(LOST) {
                            Ok(()) => {}
                            Err(RecvTimeoutError::Disconnected) => return,
                            Err(RecvTimeoutError::Timeout) => panic!("a kick was lost"),
                        }
                    }
                }
            });
            let chain = request(&memory);
            let (mut sent, mut back) = (0, 0);
            while back < REQUESTS {
                while sent < REQUESTS && driver.add(&chain, false, sent).is_ok() {
                    sent += 1;
                }
                if driver.publish() {
                    let _ = kick.send(());
                }
                driver.disable_interrupts();
                while let Some(used) = driver.pop_used().expect("no violation") {
                    assert_eq!(used.token, back);
                    back += 1;
                }
                let may_sleep = sent == REQUESTS || driver.free_descriptors() < 2;
                if back < REQUESTS && may_sleep && !driver.enable_interrupts() {
                    called.recv_timeout(LOST).expect("no interrupt was lost");
                }
            }
            done.store(true, Ordering::Relaxed);
            drop(kick);
        });
    }
}
