//! The split ring against `virtio-queue`: of well-formed scripts both see the same chains, with the same
//! buffers, in the same order.

use std::os::fd::AsFd;

use bluff_memory::{GuestMemory, IoVec, Region, RegionSpec, Space};
use bluff_testing::times;
use bluff_virtio_driver as driver;
use driver::{Buffer, DriverQueue, SplitDriver};
use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use crate::{Chain, Limits, Pop, Position, QueueSetup, Ring, RingAddresses, features, split};

const BASE: u64 = 0x10_0000;
const LEN: u64 = 1 << 20;
/// Buffers of scripts lie here.
const DATA: u64 = BASE + (512 << 10);

/// One step of the driver, or of both devices.
#[derive(Clone, Debug)]
enum Step {
    /// A chain: readable and writable lengths with offsets, as a table or not.
    Add(Vec<(u64, u32)>, Vec<(u64, u32)>, bool),
    /// What was added becomes visible.
    Publish,
    /// Both devices take what is there, and complete all of it.
    Serve,
}

fn buffers(most: usize) -> impl Strategy<Value = Vec<(u64, u32)>> {
    prop::collection::vec((0..200_000u64, 1..70_000u32), 0..most)
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let add = (buffers(5), buffers(5), any::<bool>())
        .prop_filter("not empty", |(r, w, _)| r.len() + w.len() > 0)
        .prop_map(|(r, w, indirect)| Step::Add(r, w, indirect));
    let step = prop_oneof![4 => add, 2 => Just(Step::Publish), 1 => Just(Step::Serve)];
    prop::collection::vec(step, 1..80)
}

/// What a device sees of a chain: its head, and each buffer by its first byte's place, length and direction.
type Seen = (u16, Vec<(u64, u32)>, Vec<(u64, u32)>);

struct Pair {
    driver: SplitDriver,
    ours: split::Ring,
    theirs: Queue,
    stock: GuestMemoryMmap,
    host: u64,
}

fn pair(size: u16, start: u16) -> Pair {
    let memory = driver::Memory::flat(BASE, LEN).unwrap();
    let file = || memory.regions()[0].as_fd().try_clone_to_owned().unwrap();
    let spec = RegionSpec {
        guest: BASE,
        len: LEN,
        user: BASE,
        offset: 0,
        file: file(),
    };
    let epoch = GuestMemory::new(vec![Region::new(spec, &GuestMemory::empty()).unwrap()]).unwrap();
    let shared = FileOffset::new(file().into(), 0);
    let stock =
        GuestMemoryMmap::from_ranges_with_files([(GuestAddress(BASE), LEN as usize, Some(shared))])
            .unwrap();
    let config = driver::Config {
        indirect_entries: 16,
        start: driver::Position {
            index: start,
            wrap: true,
        },
        ..driver::Config::new(
            size,
            driver::Features {
                event_idx: false,
                indirect: true,
                in_order: false,
            },
        )
    };
    let driver = SplitDriver::new(&memory, &config).unwrap();
    let layout = driver.layout();
    let host = epoch.contiguous(Space::Guest, BASE, LEN, 1).unwrap() as u64;
    let setup = QueueSetup {
        index: 0,
        size,
        features: features::VERSION_1 | features::INDIRECT_DESC,
        addresses: RingAddresses {
            space: Space::Guest,
            desc: layout.descriptors,
            driver: layout.driver,
            device: layout.device,
        },
        position: Position {
            avail: start,
            used: start,
            ..Position::START
        },
        memory: epoch,
        kick: None,
        call: None,
        error: None,
        inflight: None,
        log: None,
        enabled: true,
    };
    let ours = split::Ring::new(&setup, Limits { indirect: 256 }).unwrap();
    let mut theirs = Queue::new(32768).unwrap();
    theirs.set_size(size);
    let half = |a: u64| (Some(a as u32), Some((a >> 32) as u32));
    let (low, high) = half(layout.descriptors);
    theirs.set_desc_table_address(low, high);
    let (low, high) = half(layout.driver);
    theirs.set_avail_ring_address(low, high);
    let (low, high) = half(layout.device);
    theirs.set_used_ring_address(low, high);
    theirs.set_next_avail(start);
    theirs.set_next_used(start);
    theirs.set_ready(true);
    assert!(theirs.is_valid(&stock));
    Pair {
        driver,
        ours,
        theirs,
        stock,
        host,
    }
}

impl Pair {
    fn ours(&mut self) -> Vec<Seen> {
        let mut seen = Vec::new();
        let mut chain = Chain::default();
        let mut taken = Vec::new();
        while self.ours.pop(&mut chain).unwrap() == Pop::Chain {
            let list = |v: &[IoVec]| {
                v.iter()
                    .map(|v| (v.ptr() as u64 - self.host + BASE, v.len() as u32))
                    .collect()
            };
            seen.push((chain.id(), list(chain.readable()), list(chain.writable())));
            taken.push(std::mem::take(&mut chain));
        }
        for chain in &taken {
            self.ours.complete(chain, 0);
        }
        self.ours.publish();
        seen
    }

    fn theirs(&mut self) -> Vec<Seen> {
        let mut seen = Vec::new();
        while let Some(chain) = self.theirs.pop_descriptor_chain(&self.stock) {
            let head = chain.head_index();
            let (mut readable, mut writable) = (Vec::new(), Vec::new());
            for d in chain {
                let to = if d.is_write_only() {
                    &mut writable
                } else {
                    &mut readable
                };
                to.push((d.addr().0, d.len()));
            }
            seen.push((head, readable, writable));
        }
        seen
    }
}

fn cases() -> ProptestConfig {
    ProptestConfig {
        cases: times(500, 20_000),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn agrees_with_the_stock_queue(
        order in 0u32..9,
        start in prop_oneof![Just(0u16), Just(0xfff0), any::<u16>()],
        steps in steps(),
    ) {
        let mut p = pair(1 << order, start);
        let mut total = 0;
        let mut token = 0;
        for step in steps {
            match step {
                Step::Add(readable, writable, indirect) => {
                    let mut chain: Vec<Buffer> =
                        readable.iter().map(|(at, len)| Buffer::readable(DATA + at, *len)).collect();
                    chain.extend(writable.iter().map(|(at, len)| Buffer::writable(DATA + at, *len)));
                    // Full rings, and chains that are too long for them, are the driver's to refuse.
                    if p.driver.add(&chain, indirect, token).is_ok() {
                        token += 1;
                    }
                }
                Step::Publish => {
                    p.driver.publish();
                }
                Step::Serve => {
                    // Theirs first: it writes nothing.
                    let theirs = p.theirs();
                    let ours = p.ours();
                    prop_assert_eq!(&ours, &theirs);
                    total += ours.len();
                    while p.driver.pop_used().unwrap().is_some() {}
                }
            }
        }
        p.driver.publish();
        let theirs = p.theirs();
        let ours = p.ours();
        prop_assert_eq!(&ours, &theirs);
        total += ours.len();
        prop_assert_eq!(total as u64, token);
    }
}
