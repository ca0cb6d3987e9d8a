//! Frames from one driver to another, whole and in order.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bluff_net::{Cause, Pair};
use bluff_testing::{Chance, times};
use bluff_virtio::{DeviceEvent, VirtioDevice};
use bluff_virtio_net::spec::{Header, feature, gso, header_flag};

use crate::rig::*;

/// Two drivers at the ends of a wire.
fn pair(kind: Kind, first: u64, second: u64) -> (bluff_reactor::Reactor, Guest, Guest) {
    let mut reactor = reactor();
    let (a, b) = Pair::new();
    let a = Guest::new(&mut reactor, Arc::new(a), kind, first, 64);
    let b = Guest::new(&mut reactor, Arc::new(b), kind, second, 64);
    (reactor, a, b)
}

#[test]
fn frames_cross_on_every_kind_of_ring() {
    for kind in Kind::all() {
        for mergeable in [false, true] {
            let features = if mergeable {
                ALL
            } else {
                ALL & !feature::MRG_RXBUF
            };
            let (mut reactor, mut a, mut b) = pair(kind, ALL, features);
            let mut chance = Chance::new(u64::from(mergeable));
            for round in 0..times(60, 3000) {
                let seed = round as u8;
                let payload = chance.below(if round % 5 == 0 { 60_000 } else { 1400 }) as usize;
                let (v6, tcp) = (chance.percent(50), chance.percent(50));
                let frame = frame(v6, tcp, payload, seed);
                let size = if payload > 1400 { 1400 } else { 0 };
                let buffers = match mergeable {
                    true => vec![2048; (frame.len() + 12).div_ceil(2048)],
                    false => vec![ROOM as u32],
                };
                b.offer(0, &buffers);
                let cuts: Vec<_> = (0..chance.below(5))
                    .map(|_| chance.below(400) as usize)
                    .collect();
                let mut cuts = cuts;
                cuts.sort_unstable();
                a.send_cut(0, &header(v6, tcp, size), &frame, &cuts);
                let got = until(&mut reactor, || b.receive(0));
                assert!(got.bytes == frame, "{kind:?} {round}");
                assert_eq!(usize::from(got.header.num_buffers.get()), buffers.len());
                let mut wanted = header(v6, tcp, size);
                wanted.num_buffers = got.header.num_buffers;
                assert_eq!(got.header, wanted);
                until(&mut reactor, || (a.sent(0) == 1).then_some(()));
            }
            assert_eq!(b.device.counters()[0].received.drops.total(), 0);
        }
    }
}

/// What is over the budget of a turn is put back, and comes in the next one: in order, once.
#[test]
fn a_burst_over_the_budget_of_a_turn() {
    for kind in Kind::all() {
        let (mut reactor, mut a, mut b) = pair(kind, ALL, ALL);
        b.offer(0, &[ROOM as u32; 20]);
        let frames: Vec<_> = (0..20)
            .map(|i| frame(false, true, if i % 3 == 0 { 100 } else { 60_000 }, i))
            .collect();
        for (i, frame) in frames.iter().enumerate() {
            let size = if i % 3 == 0 { 0 } else { 1400 };
            a.send(0, &header(false, true, size), frame);
        }
        for frame in &frames {
            let got = until(&mut reactor, || b.receive(0));
            assert!(got.bytes == *frame, "{kind:?}");
        }
        let mut sent = 0;
        until(&mut reactor, || {
            sent += a.sent(0);
            (sent == frames.len()).then_some(())
        });
        assert!(b.receive(0).is_none());
        let counters = a.device.counters()[0].sent.frames.load(Ordering::Relaxed);
        assert_eq!(counters, 20);
    }
}

/// A driver that takes no offload is given frames that need none.
#[test]
fn what_a_driver_does_not_take_is_done_for_it() {
    for kind in [Kind::SPLIT, Kind::PACKED] {
        for (v6, tcp) in [(false, true), (true, true), (false, false), (true, false)] {
            let plain = feature::MAC | feature::MRG_RXBUF;
            for takes in [plain, plain | feature::GUEST_CSUM] {
                let (mut reactor, mut a, mut b) = pair(kind, ALL, takes);
                b.offer(0, &[2048; 40]);
                let frame = frame(v6, tcp, 20_000, 3);
                a.send(0, &header(v6, tcp, 1000), &frame);
                let headers = if v6 { 54 } else { 34 } + if tcp { 20 } else { 8 };
                let mut payload = Vec::new();
                for _ in 0..20 {
                    let got = until(&mut reactor, || b.receive(0));
                    assert_eq!(got.header.gso_type, gso::NONE);
                    match takes == plain {
                        true => {
                            assert_eq!(got.header.flags, 0);
                            assert!(is_good(&got.bytes));
                        }
                        false => assert_eq!(got.header.flags, header_flag::NEEDS_CSUM),
                    }
                    assert_eq!(got.bytes.len(), headers + 1000);
                    payload.extend_from_slice(&got.bytes[headers..]);
                }
                assert!(payload == frame[headers..]);
                turns(&mut reactor, 20);
                assert!(b.receive(0).is_none());
            }
        }
    }
}

/// Frames wait for buffers, in their order; what is too much is dropped and counted.
#[test]
fn receive_never_waits_and_its_backlog_is_bounded() {
    for kind in [Kind::SPLIT, Kind::PACKED] {
        let (mut reactor, mut a, mut b) = pair(kind, ALL, ALL);
        let count = 1000usize;
        for i in 0..count {
            a.send(
                0,
                &header(false, false, 0),
                &frame(false, false, 1000, i as u8),
            );
            until(&mut reactor, || (a.sent(0) == 1).then_some(()));
        }
        let dropped = b.device.counters()[0].received.drops.get(Cause::NoBuffers) as usize;
        assert!((count / 2..count - 100).contains(&dropped), "{dropped}");
        // The oldest ones wait.
        for i in 0..count - dropped {
            b.offer(0, &[600, 600]);
            let got = until(&mut reactor, || b.receive(0));
            assert!(got.bytes == frame(false, false, 1000, i as u8), "{i}");
        }
        turns(&mut reactor, 20);
        assert!(b.receive(0).is_none());
        // And then it goes on as before.
        b.offer(0, &[2048]);
        a.send(0, &header(false, true, 0), &frame(false, true, 10, 9));
        let got = until(&mut reactor, || b.receive(0));
        assert!(got.bytes == frame(false, true, 10, 9));
    }
}

/// A stop puts buffers back that were looked at and not used; another life goes on where it was.
#[test]
fn stops_and_starts_lose_no_buffer() {
    for kind in Kind::all() {
        let (mut reactor, mut a, mut b) = pair(kind, ALL, ALL);
        // Not enough for the frame: both are held for it.
        b.offer(0, &[500, 500]);
        let long = frame(false, false, 1400, 1);
        a.send(0, &header(false, false, 0), &long);
        until(&mut reactor, || (a.sent(0) == 1).then_some(()));
        turns(&mut reactor, 20);
        let stopped = b.stop(&mut reactor, 0);
        assert_eq!(stopped.in_flight, 0);
        let mut setup = b.setup(0);
        setup.position = stopped.position;
        b.device.start_queue(setup).unwrap();
        turns(&mut reactor, 20);
        // What waited is gone with the stop, as on a cable that was pulled out; the buffers are not.
        let drops = &b.device.counters()[0].received.drops;
        assert_eq!(drops.get(Cause::LinkDown), 1);
        let short = frame(false, false, 100, 2);
        for _ in 0..2 {
            a.send(0, &header(false, false, 0), &short);
            let got = until(&mut reactor, || b.receive(0));
            assert!(got.bytes == short);
        }
        // So it is with other memory.
        b.offer(0, &[500, 500]);
        a.send(0, &header(false, false, 0), &long);
        turns(&mut reactor, 20);
        let changed = b.change_memory(epoch(&b.memory));
        for _ in 0..2 {
            until(&mut reactor, || changed.try_recv().ok());
        }
        b.offer(0, &[600]);
        let got = until(&mut reactor, || b.receive(0));
        assert!(got.bytes == long && got.header.num_buffers.get() == 3);
    }
}

/// A disabled transmit queue takes frames and drops them; a disabled receive queue gets none.
#[test]
fn disabled_queues() {
    let (mut reactor, mut a, mut b) = pair(Kind::SPLIT, ALL, ALL);
    let enable = |guest: &mut Guest, queue, on| {
        guest
            .device
            .change_queue(queue, bluff_virtio::QueueChange::Enable(on));
    };
    let send = |reactor: &mut bluff_reactor::Reactor, a: &mut Guest, seed| {
        a.send(0, &header(false, false, 0), &frame(false, false, 100, seed));
        until(reactor, || (a.sent(0) == 1).then_some(()));
        turns(reactor, 20);
    };
    b.offer(0, &[2048; 4]);
    enable(&mut a, 1, false);
    turns(&mut reactor, 20);
    send(&mut reactor, &mut a, 1);
    assert_eq!(a.device.counters()[0].sent.drops.get(Cause::LinkDown), 1);
    enable(&mut a, 1, true);
    enable(&mut b, 0, false);
    turns(&mut reactor, 20);
    send(&mut reactor, &mut a, 2);
    enable(&mut b, 0, true);
    // Pulled out at either end.
    for (seed, end) in [(3, 0), (4, 1)] {
        for up in [false, true] {
            let device = if end == 0 {
                &mut a.device
            } else {
                &mut b.device
            };
            device.set_link(up);
            let mut status = [0; 2];
            device.read_config(6, &mut status);
            assert_eq!(status, [u8::from(up), 0]);
            if !up {
                send(&mut reactor, &mut a, seed);
            }
        }
    }
    turns(&mut reactor, 20);
    send(&mut reactor, &mut a, 5);
    // The first and only one that came.
    assert!(until(&mut reactor, || b.receive(0)).bytes == frame(false, false, 100, 5));
    assert!(b.receive(0).is_none());
    let news = a.events.lock().unwrap();
    assert_eq!(
        news[..],
        [DeviceEvent::ConfigChanged, DeviceEvent::ConfigChanged]
    );
}

/// A chain that does not fit into the one buffer that is there, where frames may not go into several.
#[test]
fn frames_that_are_longer_than_a_buffer() {
    let (mut reactor, mut a, mut b) = pair(Kind::SPLIT, ALL, ALL & !feature::MRG_RXBUF);
    b.offer_chain(0, &[100, 200]);
    b.offer(0, &[]);
    a.send(0, &header(false, false, 0), &frame(false, false, 1000, 1));
    until(&mut reactor, || (a.sent(0) == 1).then_some(()));
    let drops = &b.device.counters()[0].received.drops;
    assert_eq!(drops.get(Cause::TooLong), 1);
    let short = frame(false, false, 200, 2);
    a.send(0, &Header::default(), &short);
    let got = until(&mut reactor, || b.receive(0));
    assert!(got.bytes == short && got.header.flags == 0);
}

/// Whoever moves a driver's VM asks for it, and a front end may ask as often as it likes.
#[test]
fn a_station_is_announced_and_not_too_often() {
    let (mut reactor, a, mut b) = pair(Kind::SPLIT, ALL, ALL);
    b.offer(0, &[2048; 4]);
    let cable = a.device.cable();
    for _ in 0..1000 {
        cable.announce(MAC);
    }
    let got = until(&mut reactor, || b.receive(0)).bytes;
    assert_eq!(got.len(), 60);
    assert_eq!(
        got[..14],
        [[0xff; 6], MAC]
            .concat()
            .into_iter()
            .chain([0x80, 0x35])
            .collect::<Vec<_>>()[..]
    );
    assert_eq!((&got[22..28], &got[32..38]), (&MAC[..], &MAC[..]));
    turns(&mut reactor, 20);
    let mut more = 0;
    while b.receive(0).is_some() {
        more += 1;
    }
    assert!(more < 3, "{more} of 1000 that came at once");
    cable.set_link(false);
    assert_eq!(cable.mtu(), 65_535);
}
