//! Rows A11 to A14 of the attack list.

use std::sync::Arc;

use bluff_net::{Cause, Pair};
use bluff_reactor::Reactor;
use bluff_virtio::VirtioDevice;
use bluff_virtio_driver::Buffer;
use bluff_virtio_net::spec::{Header, feature, gso, header_flag};

use crate::rig::*;

struct Wire {
    reactor: Reactor,
    a: Guest,
    b: Guest,
}

impl Wire {
    fn new(kind: Kind) -> Self {
        let mut reactor = reactor();
        let (a, b) = Pair::new();
        let a = Guest::new(&mut reactor, Arc::new(a), kind, ALL, 64);
        let b = Guest::new(&mut reactor, Arc::new(b), kind, ALL, 64);
        Self { reactor, a, b }
    }

    /// Sends something that has to be dropped: its buffer comes back, nobody is given anything, and it is counted.
    fn dropped(&mut self, header: &Header, frame: &[u8], cause: Cause) {
        let drops = |w: &Self| w.a.device.counters()[0].sent.drops.get(cause);
        let before = drops(self);
        self.a.send(0, header, frame);
        let a = &mut self.a;
        until(&mut self.reactor, || (a.sent(0) == 1).then_some(()));
        assert_eq!(drops(self), before + 1, "{header:?}");
    }

    /// Ordinary frames pass, and nothing came before them.
    fn lives(&mut self) {
        let one = frame(false, true, 300, 77);
        self.b.offer(0, &[2048]);
        self.a.send(0, &header(false, true, 0), &one);
        let b = &mut self.b;
        let got = until(&mut self.reactor, || b.receive(0));
        assert!(got.bytes == one);
        let a = &mut self.a;
        until(&mut self.reactor, || (a.sent(0) == 1).then_some(()));
        assert!(
            self.a.events.lock().unwrap().is_empty(),
            "no queue is broken"
        );
    }
}

const KINDS: [Kind; 2] = [Kind::SPLIT, Kind::PACKED];

#[test]
fn a11_net_header_over_many_descriptors() {
    for kind in KINDS {
        let mut w = Wire::new(kind);
        let one = frame(false, true, 500, 1);
        for cuts in [
            &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12][..],
            &[4, 8, 11],
            &[11, 13],
            &[6],
            &[1, 12, 13, 14, 200, 201],
            &[],
        ] {
            w.b.offer(0, &[2048]);
            w.a.send_cut(0, &header(false, true, 0), &one, cuts);
            let b = &mut w.b;
            let got = until(&mut w.reactor, || b.receive(0));
            assert!(got.bytes == one, "{cuts:?}");
            let a = &mut w.a;
            until(&mut w.reactor, || (a.sent(0) == 1).then_some(()));
        }
    }
}

#[test]
fn a11_chain_no_longer_than_the_header() {
    for kind in KINDS {
        let mut w = Wire::new(kind);
        let drops = |w: &Wire| w.a.device.counters()[0].sent.drops.get(Cause::Malformed);
        for len in 1..=12 {
            let before = drops(&w);
            w.a.send_chain(0, &[Buffer::readable(BASE + 4096, len)], 0);
            let a = &mut w.a;
            until(&mut w.reactor, || (a.sent(0) == 1).then_some(()));
            assert_eq!(drops(&w), before + 1);
        }
        // With buffers that are to be written, and without any that is to be read.
        w.a.send_chain(0, &[Buffer::writable(BASE + 4096, 2000)], 0);
        let a = &mut w.a;
        until(&mut w.reactor, || (a.sent(0) == 1).then_some(()));
        assert_eq!(drops(&w), 13);
        // Frames without a whole Ethernet header.
        for len in 1..14 {
            w.dropped(&Header::default(), &vec![2; len], Cause::Malformed);
        }
        w.lives();
    }
}

#[test]
fn a11_frames_longer_than_any() {
    for kind in KINDS {
        let mut w = Wire::new(kind);
        let at = BASE + (1 << 20);
        for pieces in [2, 40] {
            let chain: Vec<_> = (0..pieces).map(|_| Buffer::readable(at, 1 << 20)).collect();
            w.a.send_chain(0, &chain, 0);
            let a = &mut w.a;
            until(&mut w.reactor, || (a.sent(0) == 1).then_some(()));
        }
        assert_eq!(w.a.device.counters()[0].sent.drops.get(Cause::TooLong), 2);
        w.lives();
    }
}

#[test]
fn a12_receive_buffers_shorter_than_the_header() {
    for kind in KINDS {
        let mut w = Wire::new(kind);
        // They are given back with nothing written, and the frame goes where it fits.
        w.b.offer(0, &[1, 11, 4, 11]);
        w.b.offer_chain(0, &[1, 2, 3, 4]);
        let one = frame(false, true, 300, 5);
        w.b.offer(0, &[12, 400]);
        w.a.send(0, &header(false, true, 0), &one);
        let mut empty = 0;
        let (b, reactor) = (&mut w.b, &mut w.reactor);
        let first = until(reactor, || {
            let bytes = b.used(0)?;
            empty += usize::from(bytes.is_empty());
            (!bytes.is_empty()).then_some(bytes)
        });
        assert_eq!(empty, 5);
        // A header alone, and then the frame.
        assert_eq!(first.len(), 12);
        assert_eq!(w.b.used(0).unwrap(), one);
        let a = &mut w.a;
        until(&mut w.reactor, || (a.sent(0) == 1).then_some(()));
        w.lives();
    }
}

/// They lie between good ones, of a frame that needs several: everything goes back in the order in which it came.
#[test]
fn a12_useless_buffers_between_good_ones() {
    for kind in Kind::all() {
        let mut w = Wire::new(kind);
        let one = frame(false, false, 1400, 1);
        w.b.offer(0, &[500, 4, 500, 11]);
        w.a.send(0, &header(false, false, 0), &one);
        let a = &mut w.a;
        until(&mut w.reactor, || (a.sent(0) == 1).then_some(()));
        // Not enough: whatever comes from outside now, nothing is lost.
        let changed = w.b.change_memory(epoch(&w.b.memory));
        for _ in 0..2 {
            until(&mut w.reactor, || changed.try_recv().ok());
        }
        let stopped = w.b.stop(&mut w.reactor, 0);
        assert_eq!(stopped.in_flight, 0, "{kind:?}");
        let mut setup = w.b.setup(0);
        setup.position = stopped.position;
        w.b.device.start_queue(setup).unwrap();
        turns(&mut w.reactor, 20);
        w.b.offer(0, &[600, 3, 100]);
        w.a.send(0, &header(false, false, 0), &one);
        let (b, reactor) = (&mut w.b, &mut w.reactor);
        let mut lens = Vec::new();
        let mut bytes = Vec::new();
        while lens.len() < 5 {
            let part = until(reactor, || b.used(0));
            lens.push(part.len());
            bytes.extend(part);
        }
        assert_eq!(lens, [500, 0, 500, 0, 454], "{kind:?}");
        assert!(bytes[12..] == one);
        let a = &mut w.a;
        until(&mut w.reactor, || (a.sent(0) == 1).then_some(()));
        // The next one comes to the last of them.
        let small = frame(false, false, 1, 2);
        w.a.send(0, &header(false, false, 0), &small);
        let (b, reactor) = (&mut w.b, &mut w.reactor);
        assert_eq!(until(reactor, || b.used(0)), []);
        assert!(until(reactor, || b.used(0))[12..] == small);
    }
}

/// A frame for which the ring can never have room does not stay for ever.
#[test]
fn a12_a_ring_that_is_too_short_for_a_frame() {
    for kind in KINDS {
        let mut reactor = reactor();
        let (a, b) = Pair::new();
        let a = Guest::new(&mut reactor, Arc::new(a), kind, ALL, 64);
        let b = Guest::new(&mut reactor, Arc::new(b), kind, ALL, 4);
        let mut w = Wire { reactor, a, b };
        w.b.offer(0, &[1500; 4]);
        w.a.send(
            0,
            &header(false, true, 1400),
            &frame(false, true, 20_000, 1),
        );
        let short = frame(false, true, 100, 2);
        w.a.send(0, &header(false, true, 0), &short);
        let (b, reactor) = (&mut w.b, &mut w.reactor);
        let got = until(reactor, || b.receive(0));
        assert!(got.bytes == short);
        let drops = &b.device.counters()[0].received.drops;
        assert_eq!(drops.get(Cause::NoBuffers), 1);
    }
}

/// Chains that take long to look at hold up their own queue alone: a call looks at a bounded number of descriptors.
#[test]
fn a01_receive_chains_without_end() {
    for kind in KINDS {
        let mut w = Wire::new(kind);
        // 60 descriptors each, of which one has room; a table has so many.
        for _ in 0..50 {
            w.b.offer_chain(0, &[&[12][..], &[1; 59]].concat());
        }
        w.b.queues[0].publish();
        w.a.send(0, &header(false, true, 1400), &frame(false, true, 3000, 1));
        let (b, reactor) = (&mut w.b, &mut w.reactor);
        let got = until(reactor, || b.receive(0));
        assert!(got.bytes == frame(false, true, 3000, 1));
    }
}

#[test]
fn a14_csum_start_past_the_packet() {
    for kind in KINDS {
        let mut w = Wire::new(kind);
        let one = frame(false, true, 100, 1);
        for (start, offset) in [
            (one.len() as u16 - 1, 0),
            (one.len() as u16, 0),
            (0xffff, 0xffff),
            (0, 0xffff),
            (34, one.len() as u16),
            (0x8000, 0x8000),
        ] {
            let mut bad = header(false, true, 0);
            bad.csum_start.set(start);
            bad.csum_offset.set(offset);
            w.dropped(&bad, &one, Cause::Malformed);
        }
        w.lives();
    }
}

/// A checksum is written after the frame was checked, with a value that its sender chooses: never where something was checked.
#[test]
fn a14_csum_over_headers_that_were_checked() {
    for kind in KINDS {
        let mut w = Wire::new(kind);
        for (v6, tcp) in [(false, true), (true, true), (false, false), (true, false)] {
            let one = frame(v6, tcp, 300, 1);
            let good = header(v6, tcp, 0);
            let (at, field) = (good.csum_start.get(), good.csum_offset.get());
            let end = at + if tcp { 20 } else { 8 };
            for start in 0..end {
                for place in [0, 6, 12, 26, 28, at, at + 2, at + 4, at + field, end - 2] {
                    let Some(offset) = place.checked_sub(start) else {
                        continue;
                    };
                    if (start, offset) == (at, field) {
                        continue;
                    }
                    let mut bad = good;
                    bad.csum_start.set(start);
                    bad.csum_offset.set(offset);
                    w.dropped(&bad, &one, Cause::Malformed);
                }
            }
            // Behind the header: a tunnel of the guest's own.
            let mut own = good;
            own.csum_start.set(end + 30);
            own.csum_offset.set(16);
            w.b.offer(0, &[2048]);
            w.a.send(0, &own, &one);
            let (a, b, reactor) = (&mut w.a, &mut w.b, &mut w.reactor);
            let got = until(reactor, || b.receive(0));
            assert_eq!(got.header.csum_start.get(), end + 30);
            until(reactor, || (a.sent(0) == 1).then_some(()));
        }
        // What has no transport: ARP, and a frame of which nothing is known.
        for ethertype in [[8, 6], [0x88, 0xcc]] {
            let mut other = frame(false, false, 300, 1);
            other[12..14].copy_from_slice(&ethertype);
            let mut bad = Header {
                flags: header_flag::NEEDS_CSUM,
                ..Header::default()
            };
            bad.csum_start.set(40);
            w.dropped(&bad, &other, Cause::Malformed);
        }
        w.lives();
    }
}

#[test]
fn a14_gso_header_longer_than_a_segment() {
    for kind in KINDS {
        let mut w = Wire::new(kind);
        for (v6, tcp) in [(false, true), (true, true), (false, false)] {
            let one = frame(v6, tcp, 3000, 1);
            let bad = |change: &dyn Fn(&mut Header)| {
                let mut header = header(v6, tcp, 1000);
                change(&mut header);
                header
            };
            let at = usize::from(header(v6, tcp, 0).csum_start.get());
            for header in [
                bad(&|h| h.gso_size.set(0)),
                // More segments than anybody would want.
                bad(&|h| h.gso_size.set(if tcp { 47 } else { 23 })),
                bad(&|h| h.flags = 0),
                bad(&|h| h.csum_start.set(at as u16 + 1)),
                bad(&|h| h.csum_offset.set(2)),
                bad(&|h| h.gso_type = 2),
                bad(&|h| h.gso_type = 3),
                bad(&|h| h.gso_type = if v6 { gso::TCPV4 } else { gso::TCPV6 }),
                bad(&|h| h.gso_type = 0x7f),
                bad(&|h| h.gso_type = gso::UDP_L4 | gso::ECN),
            ] {
                w.dropped(&header, &one, Cause::Malformed);
            }
            // No payload behind the headers; lengths that lie.
            let headers = at + if tcp { 20 } else { 8 };
            w.dropped(&header(v6, tcp, 1000), &one[..headers], Cause::Malformed);
            w.dropped(
                &header(v6, tcp, 1000),
                &one[..one.len() - 1],
                Cause::Malformed,
            );
            if tcp {
                for offset in [0x40, 0xf0] {
                    let mut other = one[..headers + 30].to_vec();
                    other[at + 12] = offset;
                    w.dropped(&header(v6, tcp, 100), &other, Cause::Malformed);
                }
            }
            // What the driver says of the length of its headers is a hint, and not followed.
            for hdr_len in [0, 1, 0xffff] {
                let hint = bad(&|h| h.hdr_len.set(hdr_len));
                w.b.offer(0, &[4096]);
                w.a.send(0, &hint, &one);
                let (a, b, reactor) = (&mut w.a, &mut w.b, &mut w.reactor);
                let got = until(reactor, || b.receive(0));
                assert!(got.bytes == one && usize::from(got.header.hdr_len.get()) == headers);
                until(reactor, || (a.sent(0) == 1).then_some(()));
            }
        }
        w.lives();
    }
}

/// What was not negotiated is not done.
#[test]
fn a14_offloads_that_were_not_negotiated() {
    let mut reactor = reactor();
    let (a, b) = Pair::new();
    let plain = feature::MAC | feature::MRG_RXBUF;
    let a = Guest::new(&mut reactor, Arc::new(a), Kind::SPLIT, plain, 64);
    let b = Guest::new(&mut reactor, Arc::new(b), Kind::SPLIT, ALL, 64);
    let mut w = Wire { reactor, a, b };
    let one = frame(false, true, 3000, 1);
    w.dropped(&header(false, true, 0), &one, Cause::Malformed);
    w.dropped(&header(false, true, 1000), &one, Cause::Malformed);
    let valid = Header {
        flags: header_flag::DATA_VALID,
        ..Header::default()
    };
    w.b.offer(0, &[4096]);
    w.a.send(0, &valid, &one);
    let b = &mut w.b;
    let got = until(&mut w.reactor, || b.receive(0));
    assert!(
        got.bytes == one && got.header.flags == 0,
        "nobody believes it"
    );
}
