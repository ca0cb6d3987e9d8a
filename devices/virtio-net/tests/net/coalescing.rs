//! When a driver is notified.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bluff_net::Pair;
use bluff_reactor::Reactor;
use bluff_virtio_driver::DriverQueue;
use bluff_virtio_net::spec::{ACK_ERR, ACK_OK, Header, command, feature};

use crate::control::{CONTROL, ask, set};
use crate::rig::*;

const RX: u16 = 0;
const TX: u16 = 1;
const COALESCE: u64 = CONTROL | feature::NOTF_COAL | feature::VQ_NOTF_COAL;

/// One guest, whose frames come back to it.
struct Loop {
    reactor: Reactor,
    guest: Guest,
    seen: [u64; 2],
}

impl Loop {
    fn new(kind: Kind) -> Self {
        let mut reactor = reactor();
        let port = Arc::new(Pair::loopback());
        let mut guest = Guest::new(&mut reactor, port, kind, ALL | COALESCE, 64);
        guest.offer(0, &[2048; 48]);
        let seen = [RX, TX].map(|queue| guest.listen(&mut reactor, queue));
        Self {
            reactor,
            guest,
            seen,
        }
    }

    fn set(&mut self, which: (u8, u8), packets: u32, usecs: u32) {
        let data = [packets.to_le_bytes(), usecs.to_le_bytes()].concat();
        set(&mut self.reactor, &mut self.guest, which, &data);
    }

    /// Sends a frame and takes it, and what it was sent by. What the driver wishes is what it wished before.
    fn frame(&mut self) {
        let frame = frame(false, false, 100, 1);
        self.guest.send(0, &Header::default(), &frame);
        let guest = &mut self.guest;
        until(&mut self.reactor, || guest.receive(0));
        guest.offer(0, &[2048]);
        until(&mut self.reactor, || (guest.sent(0) == 1).then_some(()));
    }

    /// Whether the driver wants to be told of what comes next.
    fn wish(&mut self, enable: bool) {
        self.wish_of(RX, enable);
        self.wish_of(TX, enable);
    }

    fn wish_of(&mut self, queue: u16, enable: bool) {
        let queue: &mut Box<dyn DriverQueue> = &mut self.guest.queues[usize::from(queue)];
        match enable {
            true => assert!(!queue.enable_interrupts(), "all was taken"),
            false => queue.disable_interrupts(),
        }
    }

    /// How often the driver was notified since this was last asked: of received frames, and of sent ones.
    fn told(&mut self) -> [u64; 2] {
        turns(&mut self.reactor, 3);
        let now = [RX, TX].map(|queue| self.guest.interrupts(queue));
        let told = [now[0] - self.seen[0], now[1] - self.seen[1]];
        self.seen = now;
        told
    }
}

#[test]
fn a_driver_is_told_after_so_many_frames() {
    for kind in Kind::all() {
        let mut l = Loop::new(kind);
        l.frame();
        l.wish(true);
        l.told();
        l.frame();
        assert_eq!(l.told(), [1, 1], "{kind:?}: at first each frame");
        // No time ends it: that is more than an hour away.
        l.set(command::COAL_RX_SET, 3, u32::MAX);
        l.set(command::COAL_TX_SET, 5, u32::MAX);
        l.wish(true);
        l.told();
        let mut told = [Vec::new(), Vec::new()];
        for _ in 0..15 {
            l.frame();
            let [rx, tx] = l.told();
            told[0].push(rx);
            told[1].push(tx);
            // A driver that was told takes what there is, and sleeps again.
            for (queue, told) in [(RX, rx), (TX, tx)] {
                if told > 0 {
                    l.wish_of(queue, true);
                }
            }
        }
        assert_eq!(told[0], [0, 0, 1].repeat(5), "{kind:?}");
        assert_eq!(told[1], [0, 0, 0, 0, 1].repeat(3), "{kind:?}");
        // One of both is 0: nothing is put off.
        l.set(command::COAL_RX_SET, 3, 0);
        l.set(command::COAL_TX_SET, 0, 1000);
        for _ in 0..2 {
            l.wish(true);
            l.frame();
            assert_eq!(l.told(), [1, 1], "{kind:?}");
        }
    }
}

#[test]
fn a_driver_is_told_after_a_time() {
    for kind in [Kind::SPLIT, Kind::PACKED] {
        for (which, queue) in [(command::COAL_RX_SET, 0), (command::COAL_TX_SET, 1)] {
            let mut l = Loop::new(kind);
            l.frame();
            l.set(which, 1000, 20_000);
            for _ in 0..3 {
                l.told();
                l.wish(true);
                let before = Instant::now();
                l.frame();
                l.frame();
                let (seen, index) = (l.seen[queue], queue as u16);
                let (guest, reactor) = (&l.guest, &mut l.reactor);
                until(reactor, || (guest.interrupts(index) > seen).then_some(()));
                assert!(before.elapsed() >= Duration::from_millis(20), "too early");
                assert_eq!(l.told()[queue], 1, "both at once");
            }
        }
    }
}

#[test]
fn other_limits_count_at_once() {
    for kind in Kind::all() {
        let mut l = Loop::new(kind);
        l.frame();
        l.set(command::COAL_RX_SET, 30, u32::MAX);
        l.set(command::COAL_TX_SET, 30, u32::MAX);
        l.wish(true);
        l.told();
        l.frame();
        l.frame();
        assert_eq!(l.told(), [0, 0]);
        l.set(command::COAL_RX_SET, 2, u32::MAX);
        assert_eq!(l.told(), [1, 0], "{kind:?}");
        l.set(command::COAL_TX_SET, 0, 0);
        assert_eq!(l.told(), [0, 1], "{kind:?}");
        // A queue that stops leaves nothing untold.
        l.wish(true);
        l.frame();
        assert_eq!(l.told(), [0, 1]);
        l.guest.stop(&mut l.reactor, RX);
        assert_eq!(l.told(), [1, 0], "{kind:?}");
    }
}

/// What the driver wishes when it is time is what counts.
#[test]
fn suppression_goes_before() {
    for kind in Kind::all() {
        let mut l = Loop::new(kind);
        l.frame();
        l.set(command::COAL_RX_SET, 3, u32::MAX);
        l.set(command::COAL_TX_SET, 3, u32::MAX);
        l.wish(false);
        l.told();
        for _ in 0..6 {
            l.frame();
        }
        assert_eq!(l.told(), [0, 0], "{kind:?}");
        // It wanted to be told of the first, and does not any more. By position alone that cannot be said of what has been used.
        if kind.packed || !kind.event_idx {
            l.wish(true);
            l.frame();
            l.wish(false);
            l.frame();
            l.frame();
            assert_eq!(l.told(), [0, 0], "{kind:?}");
        }
        // And it counts anew from there.
        l.wish(true);
        for wanted in [0, 0, 1] {
            l.frame();
            assert_eq!(l.told(), [wanted; 2], "{kind:?}");
        }
    }
}

#[test]
fn each_queue_has_limits_of_its_own() {
    let mut l = Loop::new(Kind::SPLIT);
    l.frame();
    l.wish(true);
    let one = |queue: u16, packets: u32| {
        let mut data = queue.to_le_bytes().to_vec();
        data.extend([0; 2]);
        data.extend(packets.to_le_bytes());
        data.extend(u32::MAX.to_le_bytes());
        data
    };
    set(
        &mut l.reactor,
        &mut l.guest,
        command::COAL_VQ_SET,
        &one(TX, 2),
    );
    l.told();
    let mut told = [0; 2];
    for _ in 0..4 {
        l.wish_of(RX, true);
        l.frame();
        let [rx, tx] = l.told();
        told = [told[0] + rx, told[1] + tx];
        if tx > 0 {
            l.wish_of(TX, true);
        }
    }
    assert_eq!(told, [4, 2]);
    let get = |l: &mut Loop, queue: u16| {
        let (class, number) = command::COAL_VQ_GET;
        let bytes = [&[class, number], &queue.to_le_bytes()[..], &[0; 2]].concat();
        ask(&mut l.reactor, &mut l.guest, &bytes, &[2], 9)
    };
    let answer = [&[ACK_OK][..], &[2, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]].concat();
    assert_eq!(get(&mut l, TX), answer);
    for queue in [2, 3, 0xffff] {
        assert_eq!(get(&mut l, queue), [ACK_ERR], "no such queue");
    }
    // One that is stopped has none, and begins with those of all.
    let at = l.guest.stop(&mut l.reactor, TX);
    assert_eq!(get(&mut l, TX), [ACK_ERR]);
    l.set(command::COAL_TX_SET, 7, 9);
    let mut setup = l.guest.setup(TX);
    setup.position = at.position;
    bluff_virtio::VirtioDevice::start_queue(&mut l.guest.device, setup).unwrap();
    let answer = [&[ACK_OK][..], &[7, 0, 0, 0, 9, 0, 0, 0]].concat();
    assert_eq!(get(&mut l, TX), answer);
}
