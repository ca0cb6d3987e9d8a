//! SIGTERM: requests under way end, their completions are published and their guest is notified; then the daemon
//! exits with 0. With a record of what is in flight and without.

use bluff_virtio_driver::Request;

use crate::support::checker::{BLOCK, Checker};
use crate::support::daemon::Place;
use crate::support::guest::{Guest, SECTORS, Shape};
use crate::support::until;

/// Longer than a signal takes to arrive, and shorter than the second that requests have.
const LAYERS: &str = r#"[{ kind = "delay", read = "400ms", write = "400ms", flush = "400ms" }]"#;
const BLOCKS: u64 = 256;
const DEPTH: u64 = 32;

fn end(shape: Shape, card: &str) {
    let place = Place::with_disk_and_card(BLOCKS * BLOCK as u64, LAYERS, card);
    let daemon = place.start();
    let socket = place.socket("blk0");
    let mut checker = Checker::new(BLOCKS);
    let mut guest = Guest::start(&socket, shape);
    for i in 0..DEPTH {
        for queue in 0..2 {
            let sector = (2 * i + u64::from(queue)) * SECTORS;
            let request = match i % 2 {
                0 => Request::Out { sector },
                _ => Request::In { sector },
            };
            guest.submit(&mut checker, queue, request);
        }
    }
    guest.publish();
    let all = 2 * DEPTH as u32;
    until("I/O", || (daemon.in_flight("blk0") == all).then_some(()));
    let ends = std::thread::spawn(move || daemon.terminate());
    // It sleeps until it is notified, and nothing may fail.
    guest.settle(&mut checker);
    ends.join().unwrap();
    drop(guest);
    // What was acknowledged is there.
    let daemon = place.start();
    let mut guest = Guest::start(&socket, shape);
    guest.verify(&mut checker);
    drop(guest);
    daemon.terminate();
}

#[test]
fn sigterm_answers_what_is_under_way() {
    for card in ["", "data = \"process\""] {
        for shape in Shape::BOTH {
            end(shape, card);
            end(shape.without_inflight(), card);
        }
    }
}
