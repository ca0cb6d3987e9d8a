//! Memory that comes, goes and shrinks while requests use it (B9).

use bluff_testing::times;

use crate::support::checker::{BLOCK, Checker};
use crate::support::daemon::Place;
use crate::support::guest::{DATA, Guest, SPARE, Shape};
use crate::support::until;

const BLOCKS: u64 = 256;

#[test]
fn b09_memory_that_no_request_uses_comes_and_goes_in_mid_io() {
    let fast = r#"[{ kind = "delay", read = "100us", write = "100us", jitter = "1ms" }]"#;
    for shape in Shape::BOTH {
        let place = Place::with_disk(BLOCKS * BLOCK as u64, fast);
        let daemon = place.start();
        let mut guest = Guest::start(&place.socket("blk0"), shape);
        let mut checker = Checker::new(BLOCKS);
        // At most: a copy of the front end's socket may still be there.
        let connected = daemon.descriptors();
        for round in 0..times(100, 5000) {
            guest.run(&mut checker, 10, 32);
            match round % 4 {
                0 => guest.front_end.remove_region(SPARE).unwrap(),
                1 => guest.front_end.add_region(SPARE).unwrap(),
                2 => guest.front_end.share_regions(|i| i != SPARE).unwrap(),
                _ => guest.front_end.share_memory().unwrap(),
            }
        }
        guest.verify(&mut checker);
        assert_eq!(checker.tally.errors, 0);
        until("the end of what was shared before", || {
            (daemon.descriptors() <= connected).then_some(())
        });
        drop(guest);
        daemon.terminate();
    }
}

/// Takes the memory away that requests of 300 ms are using: it is given up when they are done, and not touched after.
fn revoked(shape: Shape, by_table: bool) {
    let slow = r#"[{ kind = "delay", read = "150ms", write = "150ms", write_zeroes = "150ms", flush = "400ms", jitter = "150ms" }]"#;
    let place = Place::with_disk(BLOCKS * BLOCK as u64, slow);
    let mut daemon = place.start();
    let mut guest = Guest::start(&place.socket("blk0"), shape);
    let mut checker = Checker::new(BLOCKS);
    for _ in 0..times(1, 20) {
        guest.fill(&mut checker, 64);
        until("I/O", || (daemon.in_flight("blk0") >= 128).then_some(()));
        match by_table {
            true => guest.front_end.share_regions(|i| i != DATA).unwrap(),
            false => guest.front_end.remove_region(DATA).unwrap(),
        }
        let before = guest.data();
        // What used it is done, without errors: there was time enough.
        guest.take(&mut checker);
        guest.settle(&mut checker);
        // A flush takes longer than all that was in flight, and needs none of the data.
        guest.flush(&mut checker);
        assert!(
            guest.data() == before,
            "memory that was given up was written to"
        );
        match by_table {
            true => guest.front_end.share_memory().unwrap(),
            false => guest.front_end.add_region(DATA).unwrap(),
        }
    }
    guest.verify(&mut checker);
    assert_eq!(checker.tally.errors, 0);
    daemon.assert_alive();
    drop(guest);
    daemon.terminate();
}

#[test]
fn b09_set_mem_table_without_memory_in_use() {
    revoked(Shape::SPLIT, true);
    revoked(Shape::PACKED, true);
}

#[test]
fn b09_rem_mem_reg_of_memory_in_use() {
    revoked(Shape::SPLIT, false);
    revoked(Shape::PACKED, false);
}
