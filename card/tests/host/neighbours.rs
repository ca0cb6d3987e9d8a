//! A host that harms itself, and the neighbour that must not notice.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bluff_virtio_driver::Request;

use crate::support::checker::{BLOCK, Checker};
use crate::support::daemon::{Place, function};
use crate::support::guest::{DATA, Guest, RINGS, SECTORS, Shape};
use crate::support::{LIMIT, times, until};

const BLOCKS: u64 = 256;

/// Two functions: one on RAM, where the daemon itself touches the guest's memory, and one on a file, both on the one
/// reactor that there is.
fn place(layers: &str) -> Place {
    let place = Place::new(&format!(
        "[volume.disk0]\nuri = \"ram:?size=1MiB\"\nlayers = {layers}\n\
         [volume.disk1]\nuri = \"file:$DIR/disk1.raw\"\n{}{}",
        function("blk0", "disk0"),
        function("blk1", "disk1"),
    ));
    place.make_file("disk1.raw", BLOCKS * BLOCK as u64);
    place
}

/// Runs `act` while a neighbour on `blk1` has verified I/O, which has to go on all the time: `act` can wait for that.
fn beside_a_neighbour(place: &Place, act: impl FnOnce(&dyn Fn())) {
    let (over, done) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|s| {
        let neighbour = s.spawn(|| {
            let mut guest = Guest::start(&place.socket("blk1"), Shape::SPLIT);
            let mut checker = Checker::new(BLOCKS);
            while !over.load(Ordering::Acquire) {
                guest.run(&mut checker, 10, 8);
                done.fetch_add(10, Ordering::Relaxed);
            }
            guest.verify(&mut checker);
            assert_eq!(checker.tally.errors, 0);
        });
        let goes_on = || {
            let before = done.load(Ordering::Relaxed);
            until("I/O of the neighbour", || {
                let gone = neighbour.is_finished() || done.load(Ordering::Relaxed) > before + 50;
                gone.then_some(())
            });
            assert!(!neighbour.is_finished(), "the neighbour failed");
        };
        // Also where this fails the neighbour has to end.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            goes_on();
            act(&goes_on);
            goes_on();
        }));
        over.store(true, Ordering::Release);
        if let Err(cause) = result {
            std::panic::resume_unwind(cause);
        }
    });
}

/// A front end cuts off a region that the daemon is using. Its connection ends; that is all.
fn shrinks(region: usize, shape: Shape) {
    let slow = r#"[{ kind = "delay", read = "30ms", write = "30ms", jitter = "30ms" }]"#;
    let place = place(slow);
    let mut daemon = place.start();
    beside_a_neighbour(&place, |goes_on| {
        let with_neighbour = daemon.descriptors();
        for _ in 0..times(3, 100) {
            let mut guest = Guest::start(&place.socket("blk0"), shape);
            // Not verified: what is written may come from memory that is no more.
            for block in 0..32 {
                for blk in &mut guest.blks {
                    let sector = block * SECTORS;
                    let request = match block % 2 == 0 {
                        true => Request::In { sector },
                        false => Request::Out { sector },
                    };
                    blk.submit(request).unwrap();
                }
            }
            guest.publish();
            until("I/O", || (daemon.in_flight("blk0") > 0).then_some(()));
            let file = guest.memory.regions()[region].as_fd();
            let file = File::from(file.try_clone_to_owned().unwrap());
            // From here on this side may not touch it either.
            file.set_len(0).unwrap();
            goes_on();
            let mut stream = guest.front_end.stream();
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            let said = stream.read(&mut [0]);
            assert!(matches!(said, Ok(0)), "the connection should end: {said:?}");
            drop((file, guest));
            until("the end of the front end's descriptors", || {
                (daemon.descriptors() <= with_neighbour).then_some(())
            });
        }
        // The function is free, and works.
        let mut guest = Guest::start(&place.socket("blk0"), shape);
        let mut checker = Checker::new(BLOCKS / 2);
        for block in 0..checker.blocks() {
            let sector = block * SECTORS;
            guest.submit(&mut checker, 0, Request::Out { sector });
            guest.publish();
            if block % 64 == 63 {
                guest.settle(&mut checker);
            }
        }
        guest.run(&mut checker, 200, 32);
        guest.verify(&mut checker);
    });
    daemon.assert_alive();
    daemon.terminate();
}

#[test]
fn data_memory_that_shrinks_harms_only_its_owner() {
    shrinks(DATA, Shape::SPLIT);
    shrinks(DATA, Shape::PACKED.without_inflight());
}

#[test]
fn ring_memory_that_shrinks_harms_only_its_owner() {
    shrinks(RINGS, Shape::SPLIT.without_inflight());
    shrinks(RINGS, Shape::PACKED);
}

#[test]
fn a_neighbour_does_not_wait_for_a_silent_volume() {
    let place = place(r#"[{ kind = "fault", action = "stall" }]"#);
    let mut daemon = place.start();
    beside_a_neighbour(&place, |goes_on| {
        for shape in Shape::BOTH {
            let mut guest = Guest::start(&place.socket("blk0"), shape);
            let mut checker = Checker::new(BLOCKS);
            guest.fill(&mut checker, 128);
            until("I/O", || (daemon.in_flight("blk0") >= 256).then_some(()));
            goes_on();
            guest.reset(&mut checker);
            goes_on();
            guest.fill(&mut checker, 128);
            until("I/O", || (daemon.in_flight("blk0") >= 256).then_some(()));
        }
    });
    daemon.assert_alive();
    daemon.terminate();
}
