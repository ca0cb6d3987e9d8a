//! The control queue on its ring, and what follows from its commands.

use std::sync::Arc;

use bluff_net::{Attributes, Lane, NetError, Null, Pair, Port, Receivers, Steering};
use bluff_reactor::{Context, Reactor};
use bluff_virtio::VirtioDevice;
use bluff_virtio_driver::Buffer;
use bluff_virtio_net::spec::{ACK_ERR, ACK_OK, command, feature};

use crate::rig::*;

const CONTROL: u64 = feature::CTRL_VQ;

/// Sends a command in pieces, with so many bytes for the answer; gives what was written.
fn ask(
    reactor: &mut Reactor,
    guest: &mut Guest,
    bytes: &[u8],
    cuts: &[usize],
    answer: u32,
) -> Vec<u8> {
    let at = BASE + (32 << 20);
    guest.memory.write(at, bytes).unwrap();
    guest.memory.write(at + (24 << 10), &[0xee; 16]).unwrap();
    let mut chain = Vec::new();
    let mut from = 0;
    for to in cuts.iter().copied().chain([bytes.len()]) {
        if to > from {
            chain.push(Buffer::readable(at + from as u64, (to - from) as u32));
        }
        from = to;
    }
    if answer > 0 {
        chain.push(Buffer::writable(at + (24 << 10), answer));
    }
    let queue = guest.queues.last_mut().unwrap();
    queue.add(&chain, false, 0).unwrap();
    queue.publish();
    let queue = guest.queues.last_mut().unwrap();
    let used = until(reactor, || queue.pop_used().unwrap());
    let mut written = vec![0; used.written as usize];
    guest.memory.read(at + (24 << 10), &mut written).unwrap();
    written
}

fn pairs(n: u16) -> Vec<u8> {
    let (class, number) = command::MQ_PAIRS_SET;
    let [a, b] = n.to_le_bytes();
    vec![class, number, a, b]
}

#[test]
fn commands_in_any_pieces() {
    for kind in Kind::all() {
        let mut reactor = reactor();
        let port = Arc::new(Pair::loopback());
        let features = ALL | CONTROL | feature::MQ;
        let mut guest = Guest::with_pairs(&mut reactor, port, kind, features, 64, 4);
        for cuts in [&[][..], &[2], &[1, 2, 3]] {
            let answer = ask(&mut reactor, &mut guest, &pairs(2), cuts, 1);
            assert_eq!(answer, [ACK_OK], "{kind:?}");
        }
        assert_eq!(ask(&mut reactor, &mut guest, &pairs(5), &[], 1), [ACK_ERR]);
        assert_eq!(ask(&mut reactor, &mut guest, &[9, 9], &[], 8), [ACK_ERR]);
        assert_eq!(ask(&mut reactor, &mut guest, &[4], &[], 1), [ACK_ERR]);
        // As long as may be, and longer.
        for len in [16 << 10, (16 << 10) + 1] {
            assert_eq!(
                ask(&mut reactor, &mut guest, &vec![0; len], &[], 1),
                [ACK_ERR]
            );
        }
        // Without a place for the answer; it is obeyed all the same, and nothing is written.
        assert_eq!(ask(&mut reactor, &mut guest, &pairs(3), &[], 0), []);
        assert!(guest.events.lock().unwrap().is_empty());
    }
}

/// A port that keeps what it is told of receivers.
#[derive(Debug, Default)]
struct Told(std::sync::Mutex<Option<Arc<Receivers>>>);

impl Port for Told {
    fn attributes(&self) -> Attributes {
        Null.attributes()
    }

    fn open(&self, cx: &mut Context<'_>, queue: u16) -> Result<Box<dyn Lane>, NetError> {
        Null.open(cx, queue)
    }

    fn set_receivers(&self, receivers: Arc<Receivers>) {
        *self.0.lock().unwrap() = Some(receivers);
    }
}

/// Frames are spread over the pairs that the driver uses, and over no other.
#[test]
fn pairs_that_are_used() {
    let mut reactor = reactor();
    let port = Arc::new(Told::default());
    let features = ALL | CONTROL | feature::MQ;
    let mut guest = Guest::with_pairs(&mut reactor, port.clone(), Kind::SPLIT, features, 64, 4);
    let spread = |port: &Told| match &port.0.lock().unwrap().as_ref().unwrap().steering {
        Steering::Spread(n) | Steering::Learned(_, n) => *n,
        Steering::Table(table) => panic!("{table:?}"),
    };
    assert_eq!(spread(&port), 1, "at first");
    for used in [4, 2, 3] {
        assert_eq!(
            ask(&mut reactor, &mut guest, &pairs(used), &[], 1),
            [ACK_OK]
        );
        assert_eq!(spread(&port), used);
    }
    assert_eq!(ask(&mut reactor, &mut guest, &pairs(9), &[], 1), [ACK_ERR]);
    // One that is used and has stopped: those before it.
    guest.stop(&mut reactor, 2);
    assert_eq!(spread(&port), 1);
    guest.device.set_features(features);
    assert_eq!(spread(&port), 1);
    // Where another one serves the control queue, it starts those that are used.
    guest.device.set_features(ALL | feature::MQ);
    guest.start(2);
    turns(&mut reactor, 20);
    assert_eq!(spread(&port), 4);
}

/// The control queue is where the negotiated pairs end (virtio 1.3 §5.1.2).
#[test]
fn its_place_follows_from_what_was_negotiated() {
    let mut reactor = reactor();
    let options = |reactor: &Reactor| bluff_virtio_net::NetOptions {
        pairs: 4,
        mac: MAC,
        speed: None,
        control_queue: true,
        poll: bluff_reactor::Poll::Never,
        reactors: vec![reactor.handle()],
    };
    for (features, places) in [
        (CONTROL | feature::MQ, 9),
        (CONTROL, 3),
        (0, 2),
        (feature::MQ, 8),
    ] {
        let mut guest = Guest::new(
            &mut reactor,
            Arc::new(Pair::loopback()),
            Kind::SPLIT,
            ALL,
            64,
        );
        let mut device = bluff_virtio_net::Net::new(Arc::new(Pair::loopback()), options(&reactor));
        guest.features = ALL | features | bluff_virtio::features::VERSION_1;
        device.set_features(guest.features);
        for index in 0..9 {
            let mut setup = guest.setup(0);
            setup.index = index;
            let started = device.start_queue(setup);
            assert_eq!(started.is_ok(), index < places, "{index} of {places}");
        }
    }
}
