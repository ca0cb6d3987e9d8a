//! A host that harms itself, and the neighbour that must not notice.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bluff_testing::times;
use bluff_virtio_driver::{DriverQueue, Request};
use vmm_sys_util::eventfd::EventFd;

use crate::support::checker::{BLOCK, Checker};
use crate::support::daemon::{Daemon, Place, function};
use crate::support::guest::{DATA, Guest, RINGS, SECTORS, Shape};
use crate::support::{LIMIT, until};

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
            until("I/O", || {
                // What has come back already, on a slow machine, goes again.
                for blk in &mut guest.blks {
                    while let Some(done) = blk.poll().unwrap() {
                        blk.submit(done.request).unwrap();
                    }
                }
                guest.publish();
                (daemon.in_flight("blk0") > 0).then_some(())
            });
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

/// Fills an event descriptor and has writes to it wait, as whoever shares the open file can at any time.
#[allow(unsafe_code)]
fn block(event: &EventFd) {
    until("a full counter", || {
        let _ = event.read();
        event.write(u64::MAX - 1).ok()
    });
    // SAFETY: no memory is involved.
    let rc = unsafe { libc::fcntl(event.as_raw_fd(), libc::F_SETFL, 0) };
    assert_eq!(rc, 0);
}

fn hung(daemon: &Daemon) -> u64 {
    let queues = daemon.queues("blk0");
    queues.iter().map(|q| q.hung).sum()
}

/// A front end makes its call descriptor block: nobody waits, and its own queue goes on without interrupts.
fn blocks_its_call_descriptor(card: &str, shape: Shape) {
    let place = Place::new(&format!(
        "[card]\n{card}\n[volume.disk0]\nuri = \"file:$DIR/disk0.raw\"\n\
         [volume.disk1]\nuri = \"file:$DIR/disk1.raw\"\n{}{}",
        function("blk0", "disk0"),
        function("blk1", "disk1"),
    ));
    for name in ["disk0.raw", "disk1.raw"] {
        place.make_file(name, BLOCKS * BLOCK as u64);
    }
    let mut daemon = place.start();
    beside_a_neighbour(&place, |goes_on| {
        let mut guest = Guest::start(&place.socket("blk0"), shape);
        let mut checker = Checker::new(BLOCKS);
        guest.run(&mut checker, 50, 8);
        guest.settle(&mut checker);
        for round in 1..=3 {
            block(&guest.front_end.events(0).call);
            // The queue goes on. That its descriptor hangs shows when it is to be notified again, at the latest.
            until("the count", || {
                guest.blks[0].queue().enable_interrupts();
                guest.submit(&mut checker, 0, Request::In { sector: 0 });
                guest.publish();
                until("I/O", || (guest.take(&mut checker) > 0).then_some(()));
                (hung(&daemon) == round).then_some(())
            });
            goes_on();
            guest.front_end.replace_events(0).unwrap();
            // It sleeps between requests, so it is notified.
            guest.run(&mut checker, 50, 1);
            guest.settle(&mut checker);
        }
        guest.verify(&mut checker);
    });
    let log = daemon.log();
    assert!(
        log.contains("its call or error descriptor blocks and is given up"),
        "{log}"
    );
    daemon.assert_alive();
    daemon.terminate();
}

#[test]
fn a_call_descriptor_that_blocks_harms_only_its_owner() {
    blocks_its_call_descriptor("", Shape::SPLIT);
    blocks_its_call_descriptor("data = \"process\"", Shape::PACKED);
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
