//! libblkio as the front end: a virtio-blk driver that no one here wrote.

use bluff_front_end::libblkio::{Queues, exercise};
use bluff_reference::{DeviceOptions, Endpoint, Server, open_volume};

fn drive(poll: bool, queues: Queues) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let volume = open_volume("ram:?size=64MiB").unwrap();
    let options = DeviceOptions {
        num_queues: queues.waiting + queues.polling,
        poll,
        ..DeviceOptions::default()
    };
    let mut server = Server::new(volume, options, Endpoint::Path(path.clone())).unwrap();
    let stop = server.stop();
    let thread = std::thread::spawn(move || server.run());
    exercise(&path, 64 << 20, queues, 20);
    stop.stop();
    thread.join().unwrap().unwrap();
    assert!(!path.exists());
}

const WAITING: Queues = Queues {
    waiting: 2,
    polling: 0,
};

#[test]
fn write_read_flush_discard() {
    drive(false, WAITING);
}

#[test]
fn the_same_polled() {
    drive(true, WAITING);
}

#[test]
fn a_driver_that_polls() {
    let queues = Queues {
        waiting: 1,
        polling: 1,
    };
    drive(false, queues);
}
