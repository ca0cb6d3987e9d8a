//! What hostile tenants and networks send, by the rows of the list of attacks.

use std::collections::BTreeSet;

use bluff_net::Cause;
use bluff_overlay::udp::TunnelKind;
use bluff_overlay::{Key, PortOptions, Rules};
use bluff_packet::{L3, L4, Mac, checksum, parse};

use crate::rig::*;
use crate::wire::{Card, carry, pair};

const ALL: Mac = Mac([0xff; 6]);

/// Two cards whose stations have found each other.
fn joined(kind: TunnelKind, v6: bool) -> (Card, Card, Station, Station) {
    let (mut a, mut b) = pair(kind, v6);
    let mut one = a.rig.join(PortOptions::default());
    let mut two = b.rig.join(PortOptions::default());
    let now = a.rig.now;
    for _ in 0..2 {
        one.send(&plain(ALL, mac(1), b"here"));
        two.send(&plain(ALL, mac(2), b"there"));
        carry(&mut a, &mut b, now);
    }
    one.got();
    two.got();
    (a, b, one, two)
}

/// The traffic class of an outer packet, and its source port.
fn outer(bytes: &[u8]) -> (u8, u16) {
    let packet = parse(&bytes[..bytes.len().min(256)], bytes.len()).unwrap();
    let class = match packet.l3 {
        L3::Ipv4(ip) => ip.tos,
        L3::Ipv6(ip) => ip.traffic_class,
        other => panic!("{other:?}"),
    };
    match packet.l4 {
        L4::Udp(udp) => (class, udp.src),
        other => panic!("{other:?}"),
    }
}

/// CVE-2024-35973: an ethertype behind a tag that says more than the frame has. Nothing is read that is not there: the outer header is as for a frame of no known kind, or the frame is dropped.
#[test]
fn f02_tags_with_odd_ethertypes_on_encapsulation() {
    let types = [
        0x0800u16, 0x86dd, 0x0806, 0, 1, 0x05ff, 0x8100, 0x88a8, 0x9100, 0xd300, 0xffff,
    ];
    for kind in [TunnelKind::Vxlan, TunnelKind::Geneve] {
        for v6 in [false, true] {
            let (mut a, mut b, mut one, two) = joined(kind, v6);
            let now = a.rig.now;
            for ethertype in types {
                for tags in 1..=3 {
                    for rest in [0, 1, 2, 3, 19, 20, 39, 40, 46] {
                        let mut frame = [mac(2).0, mac(1).0].concat();
                        for tag in 0..tags {
                            // VLAN 0: the address is known.
                            frame.extend(if tag == 0 {
                                [0x81, 0, 0, 0]
                            } else {
                                [0x88, 0xa8, 0, 9]
                            });
                        }
                        frame.extend(ethertype.to_be_bytes());
                        // All ones: what is read of it in error shows.
                        frame.extend(vec![0xff; rest]);
                        one.send(&frame);
                        let carried = carry(&mut a, &mut b, now);
                        let what = format!("{kind:?} {v6} {ethertype:04x} {tags} {rest}");
                        match &carried[..] {
                            [] => assert!(two.got().is_empty(), "{what}"),
                            [bytes] => {
                                assert_eq!(outer(bytes).0, 0, "{what}");
                                assert_eq!(two.got(), [frame], "{what}");
                            }
                            more => panic!("{what}: {}", more.len()),
                        }
                    }
                }
            }
            // A tag without anything behind it is no frame.
            let before = one.port.sent().get(Cause::Malformed);
            one.send(&[&mac(2).0[..], &mac(1).0, &[0x81, 0, 0, 0]].concat());
            one.send(&[&mac(2).0[..], &mac(1).0, &[0x81, 0, 0]].concat());
            assert_eq!(one.port.sent().get(Cause::Malformed), before + 2);
            assert!(carry(&mut a, &mut b, now).is_empty());
        }
    }
}

/// CVE-2023-1668 (protocol 0), CVE-2020-35498 (padding), and MPLS stacks: how one frame goes changes nothing for another. There is no cache of flows; what frames leave behind is where
/// their source is, and what they are told apart by is what they say and nothing behind it.
#[test]
fn f03_nothing_of_one_frame_is_left_for_another() {
    let (mut a, mut b, mut one, two) = joined(TunnelKind::Vxlan, false);
    let now = a.rig.now;
    let mut send = |frame: &[u8]| {
        one.send(frame);
        let carried = carry(&mut a, &mut b, now);
        assert_eq!(carried.len(), 1);
        assert_eq!(two.got(), [frame]);
        outer(&carried[0]).1
    };
    let good = udp4(mac(2), mac(1), [10, 0, 0, 1], [5, 6], 30);
    let port = send(&good);
    // Padding belongs to no flow, whatever it looks like.
    for len in [1, 17, 46, 300] {
        let padded = [&good[..], &vec![0xa5; len]].concat();
        assert_eq!(send(&padded), port, "{len}");
    }
    // Protocol 0, and others without ports: what follows the header is not read as ports.
    for proto in [0, 4, 41, 59, 132, 255] {
        let mut odd = good.clone();
        odd[23] = proto;
        checksum::fill_ipv4_header(&mut odd[14..34]);
        let first = send(&odd);
        odd[34..38].copy_from_slice(&[0xde, 0xad, 0xbe, 0xef]);
        assert_eq!(send(&odd), first, "{proto}");
        assert_eq!(send(&good), port, "{proto}");
    }
    // Stacks of labels: as deep as one likes, with IP beneath or nothing. They go by their addresses.
    let mut ports = BTreeSet::new();
    for depth in [0, 1, 2, 3, 16, 64, 300] {
        let mut stack = [&mac(2).0[..], &mac(1).0, &[0x88, 0x47]].concat();
        stack.extend(vec![[0, 1, 0, 64]; depth].concat());
        stack.extend([0, 1, 1, 64]);
        stack.extend(&good[14..]);
        ports.insert(send(&stack));
        assert_eq!(send(&good), port, "{depth}");
    }
    assert_eq!(ports.len(), 1);
    let fdb = a.rig.network.fdb();
    assert_eq!(fdb.learnt(), 2, "the two stations, and nobody else");
    assert!(fdb.find(Key::new(mac(2).0, 0)).is_some());
}

/// CVE-2016-10377: lengths that wrap when headers are taken off. A port with addresses of its own sends nothing whose addresses cannot be told.
#[test]
fn f04_lengths_of_ip_that_underflow_pass_no_rule() {
    let allowed = |all: &[&str]| Some(all.iter().map(|p| p.parse().unwrap()).collect());
    let mut rig = Rig::default();
    let mut a = rig.join(options(Rules {
        mac: Some(mac(1)),
        allowed: allowed(&["10.0.0.1/32", "fd00::1/128"]),
        vlan: None,
    }));
    let b = rig.station(2);
    let own = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    let four = udp4(mac(2), mac(1), [10, 0, 0, 1], [5, 6], 30);
    let six = ip6(mac(2), mac(1), own, None);
    let mut bad = Vec::new();
    // A whole that is shorter than its header, than the least header, or longer than the frame.
    for total in [0u16, 1, 4, 19, 59, 1500, 0x7fff, 0x8000, 0xfffe, 0xffff] {
        let mut frame = four.clone();
        frame[16..18].copy_from_slice(&total.to_be_bytes());
        checksum::fill_ipv4_header(&mut frame[14..34]);
        // 59 is inside of it, unless the header takes all 60 that it can.
        if total == 59 {
            frame[14] = 0x4f;
        }
        bad.push(frame);
    }
    // A header shorter than the least one, longer than the whole, of another version.
    for first in [0x40u8, 0x41, 0x44, 0x4f, 0x05, 0x65, 0xf5] {
        let mut frame = four.clone();
        frame[14] = first;
        if first == 0x4f {
            frame[16..18].copy_from_slice(&40u16.to_be_bytes());
        }
        bad.push(frame);
    }
    // IPv6: a payload that is longer than the frame, another version.
    for payload in [six.len() as u16 - 53, 0x7fff, 0x8000, 0xffff] {
        let mut frame = six.clone();
        frame[18..20].copy_from_slice(&payload.to_be_bytes());
        bad.push(frame);
    }
    for first in [0x40, 0x50, 0xf0] {
        let mut frame = six.clone();
        frame[14] = first;
        bad.push(frame);
    }
    // Cut in the middle of a header.
    bad.extend((15..34).map(|len| four[..len].to_vec()));
    bad.extend((15..54).map(|len| six[..len].to_vec()));
    for (i, frame) in bad.iter().enumerate() {
        a.send(frame);
        assert!(b.got().is_empty(), "{i}: {frame:02x?}");
        let sent = a.port.sent();
        assert_eq!(sent.get(Cause::Malformed), i as u64 + 1, "{i}");
    }
    // The same frames, as they should be.
    for frame in [&four, &six] {
        a.send(frame);
        assert_eq!(b.got(), std::slice::from_ref(frame));
    }
    // With another's address no length helps.
    for total in 20..=four.len() as u16 - 14 {
        let mut frame = udp4(mac(2), mac(1), [10, 0, 0, 9], [5, 6], 30);
        frame[16..18].copy_from_slice(&total.to_be_bytes());
        a.send(&frame);
        assert!(b.got().is_empty(), "{total}");
    }
}
