//! Fault list R1, as far as one process can show it: the device is gone from one turn to the next, under
//! load, and the next one goes on from the ring and the in-flight region.

use std::collections::HashMap;

use crate::rig::{BASE, Kind, Rig, epoch, inflight, ram, stall, wait};
use bluff_reactor::Poll;
use bluff_testing::{Chance, times};
use bluff_virtio_driver::{Blk, BlkConfig, DriverQueue, Memory, Request, Status};

const DEPTH: u16 = 32;
const LEN: usize = 4096;

/// Each request completes once, with the data that was last acknowledged.
#[test]
fn r01_devices_that_vanish_under_load() {
    for kind in [
        Kind::SPLIT,
        Kind::PACKED,
        Kind {
            in_order: true,
            ..Kind::PACKED
        },
        Kind {
            in_order: true,
            ..Kind::SPLIT
        },
    ] {
        let memory = Memory::flat(BASE, 16 << 20).unwrap();
        let volume = ram("size=1MiB");
        let queue = kind.driver(&memory, 128);
        let (_region, record) = inflight(128);
        let layout_of = |rig: &Rig, queue: &dyn DriverQueue| {
            let mut setup = rig.setup(0, kind, queue, &epoch(&memory));
            setup.inflight = Some(record.clone());
            setup
        };
        let mut rig = Rig::new(volume.clone(), 1, Poll::Always);
        let setup = layout_of(&rig, &*queue);
        rig.start(setup);
        let config = BlkConfig {
            depth: DEPTH,
            request_len: LEN as u32,
            segments: 2,
            capacity: (1 << 20) / 512,
            indirect: false,
            ..BlkConfig::default()
        };
        // Chains of four: a ring of 128 takes 32 of them.
        let mut blk = Blk::new(&memory, queue, config).unwrap();
        // What each block holds, as far as was acknowledged; blocks in flight are left alone.
        let mut disk: HashMap<u64, u8> = HashMap::new();
        let mut flying: HashMap<u64, Option<u8>> = HashMap::new();
        let (mut chance, mut completed) = (Chance::new(7), 0u64);
        for life in 0..times(12, 300) {
            let end = completed + 20 + life % 7 * 13;
            while completed < end {
                while let Some(slot) = blk.next_slot() {
                    let block = chance.below(256);
                    if flying.contains_key(&block) {
                        break;
                    }
                    let fill = chance.word() as u8;
                    let write = chance.percent(50);
                    let sector = block * 8;
                    let bytes = if write { fill } else { 0xee };
                    memory.write(blk.data_addr(slot), &[bytes; LEN]).unwrap();
                    let request = match write {
                        true => Request::Out { sector },
                        false => Request::In { sector },
                    };
                    blk.submit(request).unwrap();
                    flying.insert(block, write.then_some(fill));
                }
                blk.publish();
                while let Some(done) = blk.poll().expect("no request completes twice") {
                    assert_eq!(done.status, Status::Ok);
                    completed += 1;
                    let (Request::In { sector } | Request::Out { sector }) = done.request else {
                        unreachable!("nothing else was asked for")
                    };
                    let block = sector / 8;
                    let was = flying.remove(&block).expect("in flight");
                    if let Some(fill) = was {
                        disk.insert(block, fill);
                        continue;
                    }
                    let mut got = [0; LEN];
                    memory.read(blk.data_addr(done.slot), &mut got).unwrap();
                    let want = disk.get(&block).copied().unwrap_or(0);
                    assert_eq!(got, [want; LEN], "an acknowledged write was lost");
                }
            }
            // Gone, whatever it was doing.
            drop(rig);
            rig = Rig::new(volume.clone(), 1, Poll::Always);
            let setup = layout_of(&rig, &**blk.queue());
            rig.start(setup);
            // Whoever waits for an interrupt of the one before gets one.
            wait(|| rig.call.read().ok());
        }
        wait(|| {
            while blk.poll().expect("no request completes twice").is_some() {}
            (blk.in_flight() == 0).then_some(())
        });
    }
}

/// Everything is in flight when the device vanishes, again and again; the last life answers in an order of
/// its own.
#[test]
fn r01_devices_that_vanish_before_the_volume_answers() {
    for kind in [Kind::SPLIT, Kind::PACKED] {
        let memory = Memory::flat(BASE, 16 << 20).unwrap();
        let queue = kind.driver(&memory, 128);
        let (_region, record) = inflight(128);
        let config = BlkConfig {
            depth: DEPTH,
            request_len: LEN as u32,
            segments: 2,
            capacity: (1 << 20) / 512,
            ..BlkConfig::default()
        };
        let mut blk = Blk::new(&memory, queue, config).unwrap();
        for life in 0..times(10, 200) {
            let (volume, desk) = stall::desk(false);
            let mut rig = Rig::new(volume, 1, Poll::Always);
            let mut setup = rig.setup(0, kind, &**blk.queue(), &epoch(&memory));
            setup.inflight = Some(record.clone());
            rig.start(setup);
            for _ in 0..3 {
                if blk.next_slot().is_some() {
                    blk.submit(Request::In {
                        sector: life % 64 * 8,
                    })
                    .unwrap();
                }
            }
            blk.publish();
            let all = usize::from(blk.in_flight());
            wait(|| (desk.accepted.load(std::sync::atomic::Ordering::SeqCst) == all).then_some(()));
            assert!(blk.poll().unwrap().is_none());
            if life % 4 == 3 {
                desk.release();
                let mut n = 0;
                while n < all {
                    let done = wait(|| blk.poll().expect("no request completes twice"));
                    assert_eq!(done.status, Status::Ok);
                    n += 1;
                }
                assert_eq!(blk.in_flight(), 0);
            }
        }
    }
}
