//! Rows A11 to A16 of the attack list.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bluff_net::{Cause, Pair};
use bluff_packet::toeplitz::HashTypes;
use bluff_reactor::Reactor;
use bluff_testing::times;
use bluff_virtio::VirtioDevice;
use bluff_virtio_driver::Buffer;
use bluff_virtio_net::spec::{ACK_ERR, ACK_OK, Header, command, feature, gso, header_flag};

use crate::control::{CONTROL, ask};
use crate::rig::*;
use crate::steering::rss;

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

/// The header that stands before a frame is as long as what was negotiated says, both ways, and no shorter one is written over its end.
#[test]
fn a13_hash_report_header_larger_than_the_mergeable_header() {
    const LONG: u64 = ALL | CONTROL | feature::HASH_REPORT;
    for kind in KINDS {
        for mergeable in [true, false] {
            let features = match mergeable {
                true => LONG,
                false => LONG & !feature::MRG_RXBUF,
            };
            let mut reactor = reactor();
            let (a, b) = Pair::new();
            let a = Guest::new(&mut reactor, Arc::new(a), kind, features, 64);
            let b = Guest::new(&mut reactor, Arc::new(b), kind, features, 64);
            let mut w = Wire { reactor, a, b };
            // A chain that has the shorter header and no more than the longer one has no frame.
            let drops = |w: &Wire| w.a.device.counters()[0].sent.drops.get(Cause::Malformed);
            for len in 1..=20 {
                let before = drops(&w);
                w.a.send_chain(0, &[Buffer::readable(BASE + 4096, len)], 0);
                let a = &mut w.a;
                until(&mut w.reactor, || (a.sent(0) == 1).then_some(()));
                assert_eq!(drops(&w), before + 1, "{len}");
            }
            // The longer header in any pieces; what is in its end is not looked at, and is no part of the frame.
            let one = frame(false, true, 300, 1);
            for cuts in [
                &[][..],
                &[12],
                &[12, 20],
                &[19],
                &[20],
                &[1, 11, 13, 19, 21],
            ] {
                w.b.offer(0, &[2048]);
                w.a.send_cut(0, &header(false, true, 0), &one, cuts);
                let b = &mut w.b;
                let got = until(&mut w.reactor, || b.receive(0));
                assert!(got.bytes == one && got.report == Some((0, 0)), "{cuts:?}");
                let a = &mut w.a;
                until(&mut w.reactor, || (a.sent(0) == 1).then_some(()));
            }
            // Buffers that would hold the shorter one alone are given back, and nothing is written into them.
            for len in 12..20 {
                w.b.offer(0, &[len, 2048]);
                w.a.send(0, &header(false, true, 0), &one);
                let b = &mut w.b;
                assert_eq!(until(&mut w.reactor, || b.used(0)), [], "{len}");
                let got = until(&mut w.reactor, || b.receive(0));
                assert!(got.bytes == one);
                let a = &mut w.a;
                until(&mut w.reactor, || (a.sent(0) == 1).then_some(()));
            }
            // One that holds it and nothing else begins a frame that goes on in the next.
            if mergeable {
                w.b.offer(0, &[20, 400]);
                w.a.send(0, &header(false, true, 0), &one);
                let b = &mut w.b;
                let got = until(&mut w.reactor, || b.receive(0));
                assert!(got.bytes == one && got.header.num_buffers.get() == 2);
                let a = &mut w.a;
                until(&mut w.reactor, || (a.sent(0) == 1).then_some(()));
            }
            w.lives();
        }
    }
}

#[test]
fn a15_a_table_names_a_queue_that_does_not_exist() {
    for kind in KINDS {
        let mut reactor = reactor();
        let features = ALL | CONTROL | feature::MQ | feature::RSS;
        let port = Arc::new(Pair::loopback());
        let mut guest = Guest::with_pairs(&mut reactor, port, kind, features, 64, 4);
        let config = |table: &[u16], unclassified| {
            let data = rss(HashTypes::ALL, &[7; 40], table, unclassified);
            let (class, number) = command::MQ_RSS_CONFIG;
            [&[class, number], &data[..]].concat()
        };
        for (table, unclassified, answer) in [
            (&[0, 1, 2, 3][..], 3, ACK_OK),
            (&[0, 1, 2, 4], 0, ACK_ERR),
            (&[0x8000, 1], 0, ACK_ERR),
            (&[0xffff], 0, ACK_ERR),
            (&[0], 4, ACK_ERR),
            (&[0], 0xffff, ACK_ERR),
        ] {
            let bytes = config(table, unclassified);
            let got = ask(&mut reactor, &mut guest, &bytes, &[], 1);
            assert_eq!(got, [answer], "{table:?}");
        }
        // One that exists, and is stopped: its frames go nowhere.
        let bytes = config(&[2], 2);
        assert_eq!(ask(&mut reactor, &mut guest, &bytes, &[], 1), [ACK_OK]);
        guest.stop(&mut reactor, 4);
        for queue in 0..4 {
            guest.offer(queue, &[2048]);
        }
        guest.send(0, &header(false, true, 0), &frame(false, true, 100, 1));
        until(&mut reactor, || (guest.sent(0) == 1).then_some(()));
        turns(&mut reactor, 20);
        assert!((0..4).all(|queue| guest.used(queue).is_none()));
    }
}

/// Ends the other thread of a test.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A command is what it was when it was read, once: another thread changes it all the time.
#[test]
fn a16_command_changed_between_two_reads() {
    let at = BASE + (40 << 20);
    for kind in KINDS {
        let mut reactor = reactor();
        let features = ALL | CONTROL | feature::MQ | feature::CTRL_RX;
        let port = Arc::new(Pair::loopback());
        let mut guest = Guest::with_pairs(&mut reactor, port, kind, features, 64, 4);
        // A good command and a bad one, which differ in one byte: pairs, or the number of addresses.
        let (class, number) = command::MQ_PAIRS_SET;
        let pairs = vec![class, number, 2, 0];
        let (class, number) = command::MAC_TABLE_SET;
        let mut table = vec![class, number];
        table.extend([1, 0, 0, 0, 2, 9, 9, 9, 9, 9, 0, 0, 0, 0]);
        for (bytes, place, good, bad) in [(pairs, 2, 2, 200), (table, 2, 1, 255)] {
            guest.memory.write(at, &bytes).unwrap();
            let stop = AtomicBool::new(false);
            let memory = guest.memory.clone();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        for byte in [bad, good] {
                            memory.write(at + place, &[byte]).unwrap();
                        }
                    }
                });
                // Also where an assertion fails.
                let _end = StopOnDrop(&stop);
                for _ in 0..times(300, 20_000) {
                    let len = bytes.len() as u32;
                    let chain = [Buffer::readable(at, len), Buffer::writable(at + 100, 1)];
                    let queue = guest.queues.last_mut().unwrap();
                    queue.add(&chain, false, 0).unwrap();
                    queue.publish();
                    until(&mut reactor, || queue.pop_used().unwrap());
                    let mut answer = [9];
                    guest.memory.read(at + 100, &mut answer).unwrap();
                    assert!(answer == [ACK_OK] || answer == [ACK_ERR]);
                }
            });
            assert!(
                guest.events.lock().unwrap().is_empty(),
                "no queue is broken"
            );
        }
    }
}

/// The answer lies in the command itself: it is read before it is written over.
#[test]
fn a16_an_answer_over_its_command() {
    for kind in KINDS {
        let mut reactor = reactor();
        let features = ALL | CONTROL | feature::MQ | feature::VQ_NOTF_COAL;
        let port = Arc::new(Pair::loopback());
        let mut guest = Guest::with_pairs(&mut reactor, port, kind, features, 64, 4);
        let at = BASE + (40 << 20);
        let (class, number) = command::COAL_VQ_SET;
        let set = [class, number, 1, 0, 0, 0, 9, 0, 0, 0, 8, 0, 0, 0];
        let (class, number) = command::COAL_VQ_GET;
        let get = [class, number, 1, 0, 0, 0];
        for (bytes, wanted) in [
            (&set[..], &[ACK_OK][..]),
            (&get, &[0, 9, 0, 0, 0, 8, 0, 0, 0]),
        ] {
            guest.memory.write(at, bytes).unwrap();
            let len = bytes.len() as u32;
            let chain = [Buffer::readable(at, len), Buffer::writable(at, 9)];
            let queue = guest.queues.last_mut().unwrap();
            queue.add(&chain, false, 0).unwrap();
            queue.publish();
            let used = until(&mut reactor, || queue.pop_used().unwrap());
            let mut answer = vec![0; used.written as usize];
            guest.memory.read(at, &mut answer).unwrap();
            assert_eq!(answer, wanted);
        }
    }
}
