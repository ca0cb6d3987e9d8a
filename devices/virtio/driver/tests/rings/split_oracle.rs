//! Split rings against rust-vmm's `virtio-queue`, an implementation that shares no line with ours.

use std::collections::VecDeque;
use std::os::fd::AsFd;

use bluff_virtio_driver::{
    Buffer, Config, DriverQueue, Error, Features, Memory, Position, SplitDriver,
};
use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use crate::{chain, guest, writable};

/// The same memory, as rust-vmm maps it.
fn mapped(memory: &Memory) -> GuestMemoryMmap {
    let ranges: Vec<_> = memory
        .regions()
        .iter()
        .map(|region| {
            let config = region.config();
            let file = region.as_fd().try_clone_to_owned().expect("dup");
            let offset = FileOffset::new(file.into(), config.file_offset);
            (
                GuestAddress(config.guest_addr),
                config.size as usize,
                Some(offset),
            )
        })
        .collect();
    GuestMemoryMmap::from_ranges_with_files(ranges).expect("map")
}

#[derive(Debug, Clone)]
enum Op {
    Add {
        readable: u32,
        writable: u32,
        indirect: bool,
    },
    Publish,
    /// The device uses one of the chains that it holds.
    Use {
        which: usize,
        share: u32,
    },
    Pop,
    DeviceNotifications(bool),
    DriverInterrupts(Option<u16>),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0..5_u32, 0..5_u32, any::<bool>())
            .prop_filter("empty", |(r, w, _)| r + w > 0)
            .prop_map(|(readable, writable, indirect)| Op::Add { readable, writable, indirect }),
        3 => Just(Op::Publish),
        4 => (any::<usize>(), 0..=100_u32).prop_map(|(which, share)| Op::Use { which, share }),
        4 => Just(Op::Pop),
        1 => any::<bool>().prop_map(Op::DeviceNotifications),
        1 => proptest::option::of(1..6_u16).prop_map(Op::DriverInterrupts),
    ]
}

/// What is known of a chain between its publication and its use.
struct Held {
    head: u16,
    token: u64,
    writable: u32,
}

/// Whether a 16-bit event lies among the positions from `old` up to `new`: an event that nobody renewed comes up again
/// after each lap of the index.
fn passed(event: u64, old: u64, new: u64) -> bool {
    (old..new).any(|position| position as u16 == event as u16)
}

fn run(size: u16, event_idx: bool, start: u16, ops: &[Op]) {
    let memory = guest(1 << 20);
    let features = Features {
        event_idx,
        indirect: true,
        in_order: false,
    };
    let position = Position {
        index: start,
        wrap: true,
    };
    let config = Config {
        indirect_entries: 10,
        start: position,
        ..Config::new(size, features)
    };
    let mut driver = SplitDriver::new(&memory, &config).expect("driver");

    let guest = mapped(&memory);
    let mut oracle = Queue::new(size).expect("queue");
    oracle.set_event_idx(event_idx);
    let layout = driver.layout();
    oracle
        .try_set_desc_table_address(GuestAddress(layout.descriptors))
        .expect("aligned");
    oracle
        .try_set_avail_ring_address(GuestAddress(layout.driver))
        .expect("aligned");
    oracle
        .try_set_used_ring_address(GuestAddress(layout.device))
        .expect("aligned");
    oracle.set_next_avail(start);
    oracle.set_next_used(start);
    oracle.set_ready(true);

    let mut token = 0;
    let mut unpublished = VecDeque::new();
    let mut held: Vec<Held> = Vec::new();
    let mut used: VecDeque<(u64, u32)> = VecDeque::new();
    // Positions on a line that does not wrap.
    let (mut published, mut fetched, mut given_back, mut popped) = (0_u64, 0_u64, 0_u64, 0_u64);
    let (mut device_listens, mut device_event) = (true, 0_u64);
    let mut driver_event = 0_u64;
    let mut told = 0;

    for op in ops {
        match op {
            Op::Add {
                readable,
                writable: writes,
                indirect,
            } => {
                let chain = chain(*readable, *writes, token);
                match driver.add(&chain, *indirect, token) {
                    Ok(head) => unpublished.push_back((head, chain, token)),
                    Err(Error::Full) => {
                        let needed = if *indirect { 1 } else { chain.len() };
                        assert!(usize::from(driver.free_descriptors()) < needed);
                    }
                    Err(Error::BadChain) => assert!(!indirect && chain.len() > usize::from(size)),
                    Err(other) => panic!("{other}"),
                }
                token += 1;
            }
            Op::Publish => {
                let (old, new) = (published, published + unpublished.len() as u64);
                let kick = driver.publish();
                published = new;
                let wanted = if event_idx {
                    passed(device_event, old, new)
                } else {
                    device_listens
                };
                assert_eq!(
                    kick,
                    wanted && old != new,
                    "event {device_event}, {old} to {new}"
                );
                // The oracle sees exactly what was added, in order.
                for (head, chain, token) in unpublished.drain(..) {
                    let popped = oracle.pop_descriptor_chain(&guest).expect("published");
                    assert_eq!(popped.head_index(), head);
                    let seen: Vec<_> = popped
                        .map(|descriptor| Buffer {
                            addr: descriptor.addr().0,
                            len: descriptor.len(),
                            device_writable: descriptor.is_write_only(),
                        })
                        .collect();
                    assert_eq!(seen, chain);
                    fetched += 1;
                    held.push(Held {
                        head,
                        token,
                        writable: writable(&chain),
                    });
                }
                assert!(oracle.pop_descriptor_chain(&guest).is_none());
            }
            Op::Use { which, share } => {
                if held.is_empty() {
                    continue;
                }
                let chain = held.swap_remove(which % held.len());
                let written = chain.writable * share / 100;
                oracle
                    .add_used(&guest, chain.head, written)
                    .expect("a valid head");
                used.push_back((chain.token, written));
                given_back += 1;
                let interrupt = oracle.needs_notification(&guest).expect("readable");
                // Without EVENT_IDX this oracle does not look at the driver's flag.
                if event_idx {
                    let expected = passed(driver_event, told, given_back);
                    assert_eq!(
                        interrupt, expected,
                        "event {driver_event}, {told} to {given_back}"
                    );
                }
                told = given_back;
            }
            Op::Pop => {
                let expected = used.pop_front();
                let got = driver.pop_used().expect("the oracle breaks no rule");
                assert_eq!(got.map(|got| (got.token, got.written)), expected);
                popped += u64::from(expected.is_some());
            }
            Op::DeviceNotifications(enable) => {
                device_listens = *enable;
                if *enable {
                    let pending = oracle.enable_notification(&guest).expect("writable");
                    assert_eq!(pending, published != fetched);
                    device_event = fetched;
                } else {
                    oracle.disable_notification(&guest).expect("writable");
                }
            }
            Op::DriverInterrupts(wait) => match wait {
                Some(wait) => {
                    let wait = if event_idx {
                        u64::from(*wait).min(u64::from(size))
                    } else {
                        1
                    };
                    driver_event = popped + wait - 1;
                    assert_eq!(
                        driver.enable_interrupts_after(wait as u16),
                        given_back - popped >= wait
                    );
                }
                None => {
                    // The nearest to never that 16 bits can say.
                    driver_event = popped.wrapping_sub(1);
                    driver.disable_interrupts();
                }
            },
        }
        let in_flight = unpublished.len() + held.len() + used.len();
        assert_eq!(usize::from(driver.in_flight()), in_flight);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Random shapes, batches, completions out of order and suppression: the oracle and the driver agree on everything.
    #[test]
    fn random_scripts_agree_with_the_oracle(
        size in prop_oneof![Just(1_u16), Just(2), Just(4), Just(16), Just(64)],
        event_idx in any::<bool>(),
        start in prop_oneof![Just(0_u16), 65500..=65535_u16],
        ops in prop::collection::vec(op(), 1..300),
    ) {
        run(size, event_idx, start, &ops);
    }
}

#[test]
fn the_oracle_sees_the_ring_through_the_whole_index() {
    // 70,000 chains: every index once, and the wrap.
    let round = [
        Op::Add {
            readable: 1,
            writable: 1,
            indirect: false,
        },
        Op::Publish,
        Op::Use {
            which: 0,
            share: 100,
        },
        Op::Pop,
    ];
    let ops: Vec<_> = std::iter::repeat_n(round, 70_000).flatten().collect();
    run(2, true, 0, &ops);
}
