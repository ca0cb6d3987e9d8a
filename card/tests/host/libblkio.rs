//! libblkio as the front end of `bluffd`: a virtio-blk driver that no one here wrote.

use bluff_front_end::libblkio::{Queues, exercise};
use bluff_testing::times;

use crate::support::daemon::Place;

const DISK: u64 = 8 << 20;

/// Both of the function's queues, twice: a front end goes, and another one comes.
fn drive(card: &str) {
    let place = Place::with_disk_and_card(DISK, "[]", card);
    let mut daemon = place.start();
    let baseline = daemon.descriptors();
    for (waiting, polling) in [(2, 0), (1, 1)] {
        let queues = Queues { waiting, polling };
        let content = exercise(&place.socket("blk0"), DISK, queues, times(20, 1000));
        // What was flushed is in the file.
        let disk = std::fs::read(place.path("disk0.raw")).unwrap();
        assert_eq!(disk.len() as u64, DISK);
        assert!(disk[..content.len()] == content);
        daemon.until_let_go(baseline);
    }
    daemon.assert_alive();
    daemon.terminate();
}

#[test]
fn libblkio_does_its_io() {
    drive("");
}

#[test]
fn libblkio_does_its_io_with_a_daemon_that_never_polls() {
    drive("poll = \"never\"");
}

#[test]
fn libblkio_does_its_io_with_a_data_half_of_its_own() {
    drive("data = \"process\"");
}
