//! A device that is dropped while its queues run: its workers go too, and let go of everything.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::alone;
use crate::rig::{BASE, Kind, Rig, epoch, inflight, ram, stall, wait};
use bluff_block::Volume;
use bluff_reactor::Poll;
use bluff_virtio::VirtioDevice;
use bluff_virtio_blk::{Blk, BlkOptions};
use bluff_virtio_driver::{Blk as Driver, BlkConfig, Memory, Request, Status};

fn blk(volume: &Arc<dyn Volume>, rig: &Rig) -> Blk {
    Blk::new(
        volume.clone(),
        BlkOptions {
            queues: 1,
            serial: "dropped".into(),
            config_wce: true,
            poll: Poll::Never,
            reactors: vec![rig.reactor.clone()],
        },
    )
}

#[test]
fn the_workers_of_a_dropped_device_let_go() {
    let _alone = alone();
    for kind in [Kind::SPLIT, Kind::PACKED] {
        for recorded in [false, true] {
            let rig = Rig::new(ram("size=1MiB"), 1, Poll::Never);
            let (volume, desk) = stall::desk(false);
            let mut device = blk(&volume, &rig);
            let memory = Memory::flat(BASE, 8 << 20).unwrap();
            let epoch = epoch(&memory);
            let queue = kind.driver(&memory, 64);
            let mut setup = rig.setup(0, kind, &*queue, &epoch);
            let (_region, record) = inflight(64);
            setup.inflight = recorded.then(|| record.clone());
            let again = setup.features;
            device.set_features(setup.features);
            device.start_queue(setup).unwrap();
            let config = BlkConfig {
                depth: 8,
                capacity: 1 << 11,
                ..BlkConfig::default()
            };
            let mut driver = Driver::new(&memory, queue, config).unwrap();
            for _ in 0..4 {
                driver.submit(Request::In { sector: 0 }).unwrap();
            }
            if driver.publish() {
                rig.kick();
            }
            wait(|| (desk.held.load(Ordering::SeqCst) == 4).then_some(()));
            let start = Instant::now();
            drop(device);
            assert!(start.elapsed() < Duration::from_secs(1), "it does not wait");
            wait(|| (Arc::strong_count(&volume) == 1).then_some(()));
            wait(|| (Arc::strong_count(&epoch) == 1).then_some(()));
            assert_eq!(desk.held.load(Ordering::SeqCst), 0);
            assert!(driver.poll().unwrap().is_none(), "nothing was answered");
            if !recorded || kind.packed {
                continue;
            }
            // Whoever comes next does what was recorded.
            desk.release();
            let mut device = blk(&volume, &rig);
            let mut setup = rig.setup(0, kind, &**driver.queue(), &epoch);
            setup.features = again;
            setup.inflight = Some(record);
            setup.position.avail = 4;
            device.set_features(again);
            device.start_queue(setup).unwrap();
            for _ in 0..4 {
                assert_eq!(wait(|| driver.poll().unwrap()).status, Status::Ok);
            }
        }
    }
}
