//! The control queue on its ring, and what follows from its commands.

use std::sync::Arc;

use bluff_net::{Attributes, Lane, NetError, Null, Pair, Port, Receivers, Steering};
use bluff_reactor::{Context, Reactor};
use bluff_virtio::VirtioDevice;
use bluff_virtio_driver::Buffer;
use bluff_virtio_net::spec::{ACK_ERR, ACK_OK, command as spec, feature};

use crate::rig::*;

pub const CONTROL: u64 = feature::CTRL_VQ;

/// Has a command obeyed.
pub fn set(reactor: &mut Reactor, guest: &mut Guest, which: (u8, u8), data: &[u8]) {
    let bytes = [&[which.0, which.1], data].concat();
    assert_eq!(ask(reactor, guest, &bytes, &[2], 1), [ACK_OK], "{which:?}");
}

/// Sends a command in pieces, with so many bytes for the answer; gives what was written.
pub fn ask(
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
    command(guest, &chain);
    let queue = guest.queues.last_mut().unwrap();
    let used = until(reactor, || queue.pop_used().unwrap());
    let mut written = vec![0; used.written as usize];
    guest.memory.read(at + (24 << 10), &mut written).unwrap();
    written
}

/// Makes a command available.
fn command(guest: &mut Guest, chain: &[Buffer]) {
    let queue = guest.queues.last_mut().unwrap();
    queue.add(chain, false, 0).unwrap();
    queue.publish();
}

pub fn pairs(n: u16) -> Vec<u8> {
    let (class, number) = spec::MQ_PAIRS_SET;
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

/// What was set is to be recorded, at once and then not for each command; what was refused or asked is not.
#[test]
fn changes_are_told_to_who_records_them() {
    let mut reactor = reactor();
    let features = ALL | CONTROL | feature::MQ;
    let port = Arc::new(Pair::loopback());
    let mut guest = Guest::with_pairs(&mut reactor, port, Kind::SPLIT, features, 64, 4);
    let told = |guest: &Guest| guest.changes.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(ask(&mut reactor, &mut guest, &pairs(9), &[], 1), [ACK_ERR]);
    assert_eq!(told(&guest), 0);
    let start = std::time::Instant::now();
    set(&mut reactor, &mut guest, spec::MQ_PAIRS_SET, &[2, 0]);
    assert_eq!(told(&guest), 1, "before it is answered");
    for n in 0..200 {
        set(
            &mut reactor,
            &mut guest,
            spec::MQ_PAIRS_SET,
            &[1 + n % 4, 0],
        );
    }
    let spans = start.elapsed().as_millis() / 10 + 2;
    assert!(u128::from(told(&guest)) <= spans);
    // The last of them is told of as well.
    let before = told(&guest);
    set(&mut reactor, &mut guest, spec::MQ_PAIRS_SET, &[3, 0]);
    until(&mut reactor, || (told(&guest) > before).then_some(()));
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

/// A command is answered when every reactor obeys it, and not before; a queue that is stopped meanwhile answers first.
#[test]
fn commands_are_in_force_before_they_are_answered() {
    for (kind, stopped) in [
        (Kind::SPLIT, false),
        (Kind::PACKED, false),
        (Kind::SPLIT, true),
    ] {
        let (mut here, mut other) = (reactor(), reactor());
        let options = bluff_virtio_net::NetOptions {
            pairs: 1,
            mac: MAC,
            speed: None,
            control_queue: true,
            poll: bluff_reactor::Poll::Never,
            // The pair lives on the first, the control queue on the second.
            reactors: vec![other.handle(), here.handle()],
        };
        let device = bluff_virtio_net::Net::new(Arc::new(Null), options);
        let features = CONTROL | feature::CTRL_RX;
        let mut guest = Guest::of(device, kind, features, 64, 1);
        turns(&mut here, 20);
        turns(&mut other, 20);
        let at = BASE + (32 << 20);
        let (class, number) = spec::RX_PROMISC;
        guest.memory.write(at, &[class, number, 0]).unwrap();
        command(
            &mut guest,
            &[Buffer::readable(at, 3), Buffer::writable(at + 8, 1)],
        );
        // Its worker sleeps, and looks now and then where nobody kicks it.
        let start = std::time::Instant::now();
        while start.elapsed() < std::time::Duration::from_millis(20) {
            here.step(Some(std::time::Duration::ZERO));
        }
        assert!(guest.queues[2].pop_used().unwrap().is_none(), "too early");
        if stopped {
            guest.stop(&mut here, 2);
        } else {
            turns(&mut other, 5);
        }
        let queue = &mut guest.queues[2];
        let used = until(&mut here, || queue.pop_used().unwrap());
        let mut answer = [9];
        guest.memory.read(at + 8, &mut answer).unwrap();
        assert_eq!((used.written, answer), (1, [ACK_OK]));
    }
}

/// Another process goes on with what was set.
#[test]
fn settings_outlive_the_device() {
    let mut reactor = reactor();
    let more = feature::MQ | feature::STATUS | feature::GUEST_ANNOUNCE;
    let features = ALL | CONTROL | BY_CONTROL | more;
    let port = Arc::new(Told::default());
    let mut guest = Guest::with_pairs(&mut reactor, port, Kind::SPLIT, features, 64, 4);
    let other = [2, 7, 7, 7, 7, 7];
    set(&mut reactor, &mut guest, spec::MAC_ADDR_SET, &other);
    set(&mut reactor, &mut guest, spec::RX_PROMISC, &[0]);
    set(&mut reactor, &mut guest, spec::MQ_PAIRS_SET, &[3, 0]);
    set(
        &mut reactor,
        &mut guest,
        spec::COAL_VQ_SET,
        &[3, 0, 0, 0, 9, 0, 0, 0, 8, 0, 0, 0],
    );
    let saved = guest.device.save();
    let told = Arc::new(Told::default());
    let mut next = Guest::device(&reactor, told.clone(), 4);
    next.load(&saved).unwrap();
    next.set_features(guest.features);
    let mut again = next.save();
    // It has moved, as far as anybody knows, and asks the driver to say where it is.
    assert_eq!((again[1], saved[1]), (1, 0));
    again[1] = 0;
    assert!(again == saved);
    let mut config = [0; 8];
    next.read_config(0, &mut config);
    assert_eq!(config, [2, 7, 7, 7, 7, 7, 3, 0]);
    // Other features are another driver, which has set nothing.
    let mut next = Guest::device(&reactor, told, 4);
    next.load(&saved).unwrap();
    next.set_features(guest.features & !feature::CTRL_RX);
    next.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 1, 1, 0]);
    // Nothing that could not have been set.
    for bad in [&saved[1..], &saved[..40], &[], &[2, 2], &[1, 0]] {
        let loaded = Guest::device(&reactor, Arc::new(Null), 4).load(bad);
        assert!(matches!(loaded, Err(bluff_virtio::DeviceError::State)));
    }
    // Fewer pairs than are used.
    let loaded = Guest::device(&reactor, Arc::new(Null), 2).load(&saved);
    assert!(loaded.is_err());
}

/// Plugged in again, a function may be somewhere else: its driver is asked, until it has said that it heard.
#[test]
fn a_driver_is_asked_to_announce_itself() {
    let mut reactor = reactor();
    let asked = CONTROL | feature::STATUS | feature::GUEST_ANNOUNCE;
    let (port, far) = Pair::new();
    let mut guest = Guest::new(&mut reactor, Arc::new(port), Kind::SPLIT, ALL | asked, 64);
    let status = |guest: &Guest| {
        let mut status = [0; 2];
        guest.device.read_config(6, &mut status);
        u16::from_le_bytes(status)
    };
    let cable = guest.device.cable();
    let mut events = 0;
    let mut more = |guest: &Guest| {
        let now = guest.events.lock().unwrap().len();
        now - std::mem::replace(&mut events, now)
    };
    cable.set_link(true);
    assert_eq!((status(&guest), more(&guest)), (1, 0), "it was up");
    cable.set_link(false);
    assert_eq!((status(&guest), more(&guest)), (0, 1));
    cable.set_link(true);
    assert_eq!((status(&guest), more(&guest)), (3, 1));
    set(&mut reactor, &mut guest, spec::ANNOUNCE_ACK, &[]);
    assert_eq!(status(&guest), 1);
    more(&guest);
    cable.moved();
    assert_eq!((status(&guest), more(&guest)), (3, 1));
    guest.device.reset();
    assert_eq!(status(&guest), 1);
    // One that cannot be asked is announced.
    let mut listener = Guest::new(&mut reactor, Arc::new(far), Kind::SPLIT, ALL, 64);
    listener.offer(0, &[2048]);
    cable.moved();
    let got = until(&mut reactor, || listener.receive(0)).bytes;
    assert_eq!(
        (got.len(), &got[..12]),
        (
            60,
            &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1][..]
        )
    );
    assert_eq!(status(&guest), 1);
}

/// Who has the control queue is not known when features are offered: it is said of the function.
#[test]
fn what_is_offered_to_those_who_keep_the_control_queue() {
    let reactor = reactor();
    let device = |control_queue| {
        let options = bluff_virtio_net::NetOptions {
            pairs: 2,
            mac: MAC,
            speed: None,
            control_queue,
            poll: bluff_reactor::Poll::Never,
            reactors: vec![reactor.handle()],
        };
        bluff_virtio_net::Net::new(Arc::new(Null), options).features()
    };
    assert_eq!(device(true) & !device(false), BY_CONTROL);
    assert_eq!(device(false) & BY_CONTROL, 0);
    let both = CONTROL | feature::MQ | feature::GUEST_ANNOUNCE;
    assert_eq!(device(false) & both, both);
}
