//! The switch between the ports of one card.

mod capture;
mod faults;
mod hostile;
mod kernel;
mod rig;
mod tunnels;
mod udp;
mod wire;

use std::net::Ipv6Addr;
use std::sync::Arc;
use std::time::Duration;

use bluff_net::{Cause, Gso, GsoKind, Port, Receivers};
use bluff_overlay::{Key, Place, PortOptions, PortRates, Rate, Rules};
use bluff_packet::{L3, L4, Mac, parse};

use rig::*;

const ALL: Mac = Mac([0xff; 6]);

#[test]
fn unknown_addresses_are_flooded_and_learnt_ones_are_not() {
    let mut rig = Rig::default();
    // Ports whose addresses are learnt.
    let mut a = rig.join(PortOptions::default());
    let mut b = rig.join(PortOptions::default());
    let c = rig.join(PortOptions::default());
    let ask = plain(mac(2), mac(1), b"ask");
    a.send(&ask);
    assert_eq!((b.got(), c.got()), (vec![ask.clone()], vec![ask]));
    assert!(a.got().is_empty(), "split horizon");
    let answer = plain(mac(1), mac(2), b"answer");
    b.send(&answer);
    assert_eq!((a.got(), c.got()), (vec![answer], vec![]));
    let again = plain(mac(2), mac(1), b"again");
    a.send(&again);
    assert_eq!((b.got(), c.got()), (vec![again], vec![]));
    // To everybody, and to a group.
    for to in [ALL, Mac([1, 0, 0x5e, 0, 0, 1])] {
        let all = plain(to, mac(1), b"all");
        a.send(&all);
        assert_eq!((b.got(), c.got()), (vec![all.clone()], vec![all]));
    }
    // Back to where it came from.
    a.send(&plain(mac(1), mac(1), b"self"));
    assert_eq!(a.port.sent().get(Cause::Nowhere), 1);
    assert!(a.got().is_empty() && b.got().is_empty() && c.got().is_empty());
    assert_eq!(rig.network.fdb().learnt(), 2);
    // What was not seen for long is forgotten.
    assert_eq!(
        rig.network.forget_old(rig.now + Duration::from_secs(302)),
        2
    );
    a.send(&plain(mac(2), mac(1), b"who"));
    assert_eq!(c.got().len(), 1);
}

#[test]
fn many_frames_of_one_batch_go_their_own_ways() {
    let mut rig = Rig::default();
    let mut a = rig.station(1);
    let others: Vec<_> = (2..10).map(|n| rig.station(n)).collect();
    let frames: Vec<_> = (0..100u8)
        .map(|i| plain(mac(2 + i % 8), mac(1), &[i]))
        .collect();
    let all: Vec<_> = frames.iter().map(Vec::as_slice).collect();
    a.send_all(&all, None);
    for (n, other) in others.iter().enumerate() {
        let got: Vec<u8> = other.got().iter().map(|f| f[14]).collect();
        let wanted: Vec<u8> = (0..100).filter(|i| usize::from(i % 8) == n).collect();
        assert_eq!(got, wanted, "in their order");
    }
}

#[test]
fn f08_a_vm_that_sends_from_anothers_mac() {
    let mut rig = Rig::default();
    let mut a = rig.station(1);
    let b = rig.station(2);
    for from in [
        mac(2),
        mac(9),
        Mac([0; 6]),
        Mac([0xff; 6]),
        Mac([3, 0, 0, 0, 0, 1]),
    ] {
        a.send(&plain(ALL, from, b"spoofed"));
        a.send(&arp(from, mac(1), [10, 0, 0, 1]));
    }
    a.send(&arp(mac(1), mac(2), [10, 0, 0, 1]));
    assert!(b.got().is_empty());
    let sent = a.port.sent();
    assert_eq!(
        (sent.get(Cause::Spoofed), sent.get(Cause::Malformed)),
        (7, 4)
    );
    a.send(&arp(mac(1), mac(1), [10, 0, 0, 1]));
    assert_eq!(b.got().len(), 1);
    // An address that somebody has for good is not learnt elsewhere.
    let mut open = rig.join(PortOptions::default());
    open.send(&plain(ALL, mac(2), b"mine"));
    assert_eq!(open.port.sent().get(Cause::Spoofed), 1);
    let place = rig.network.fdb().find(Key::new(mac(2).0, 0)).unwrap().place;
    assert_eq!(place, Place::Port(b.port.number()));
}

#[test]
fn f08_a_vm_that_sends_from_anothers_ip() {
    let mut rig = Rig::default();
    let allowed = ["10.0.0.1", "192.168.4.0/23", "2001:db8::1/128", "fd00::/8"];
    let mut a = rig.join(options(Rules {
        mac: Some(mac(1)),
        allowed: Some(allowed.iter().map(|p| p.parse().unwrap()).collect()),
        vlan: None,
    }));
    let b = rig.station(2);
    let v6 = |text: &str| text.parse::<Ipv6Addr>().unwrap().octets();
    let own = v6("fe80::ff:fe00:1");
    let v4 = |src| udp4(mac(2), mac(1), src, [5, 6], 10);
    let neighbour = |src, target, link| ip6(mac(2), mac(1), src, Some((target, link)));
    let one = v6("2001:db8::1");
    let good = [
        v4([10, 0, 0, 1]),
        v4([192, 168, 4, 0]),
        v4([192, 168, 5, 255]),
        // A station that asks for an address, and one that looks whether it is free.
        udp4(ALL, mac(1), [0; 4], [68, 67], 300),
        arp(mac(1), mac(1), [0; 4]),
        arp(mac(1), mac(1), [10, 0, 0, 1]),
        rarp(mac(1), mac(1)),
        ip6(mac(2), mac(1), one, None),
        ip6(mac(2), mac(1), v6("fd12::9"), None),
        ip6(mac(2), mac(1), own, None),
        neighbour(one, one, mac(1)),
        neighbour(own, own, mac(1)),
    ];
    for frame in &good {
        a.send(frame);
        assert_eq!(b.got(), std::slice::from_ref(frame));
    }
    let mut short = v4([10, 0, 0, 1]);
    short[17] = 10;
    let mut with_address = rarp(mac(1), mac(1));
    with_address[28] = 10;
    let bad = [
        rarp(mac(1), mac(2)),
        with_address,
        v4([10, 0, 0, 2]),
        v4([192, 168, 6, 0]),
        v4([0; 4]),
        udp4(ALL, mac(1), [0; 4], [67, 68], 300),
        arp(mac(1), mac(1), [10, 0, 0, 2]),
        ip6(mac(2), mac(1), v6("2001:db8::2"), None),
        ip6(mac(2), mac(1), v6("fe80::1"), None),
        ip6(mac(2), mac(1), [0; 16], None),
        // Somebody else's address, or one's own at somebody else's link.
        neighbour(one, v6("2001:db8::2"), mac(1)),
        neighbour(one, one, mac(2)),
        plain(mac(2), mac(1), b"not IP"),
    ];
    for (i, frame) in bad.iter().enumerate() {
        a.send(frame);
        assert_eq!(b.got(), Vec::<Vec<u8>>::new(), "{i}");
        assert_eq!(a.port.sent().get(Cause::Spoofed), i as u64 + 1);
    }
    a.send(&short);
    assert_eq!(a.port.sent().get(Cause::Malformed), 1);
    assert!(b.got().is_empty());
}

#[test]
fn vlans() {
    let mut rig = Rig::default();
    let access = |mac, vlan| {
        options(Rules {
            mac: Some(mac),
            vlan: Some(vlan),
            ..Rules::default()
        })
    };
    let mut a = rig.join(access(mac(1), 7));
    let b = rig.join(access(mac(2), 7));
    let c = rig.join(access(mac(3), 8));
    let mut trunk = rig.station(4);
    // Within a VLAN without tags, on a trunk with it, to no other.
    let frame = plain(ALL, mac(1), b"seven");
    a.send(&frame);
    assert_eq!((b.got(), c.got()), (vec![frame.clone()], vec![]));
    assert_eq!(trunk.got(), [tagged(7, &frame)]);
    let frame = plain(mac(2), mac(1), b"two");
    a.send(&frame);
    assert_eq!((b.got(), trunk.got()), (vec![frame], vec![]));
    // An address of another VLAN is not known in this one.
    a.send(&plain(mac(3), mac(1), b"three"));
    assert!(c.got().is_empty());
    b.got();
    trunk.got();
    // From the trunk, by tag; without one to none of them.
    let frame = plain(mac(3), mac(4), b"eight");
    trunk.send(&tagged(8, &frame));
    assert_eq!((c.got(), b.got()), (vec![frame.clone()], vec![]));
    trunk.send(&frame);
    assert!(c.got().is_empty() && b.got().is_empty());
    // A port in a VLAN has no tags of its own, not even the right one.
    for vlan in [7, 8, 0] {
        a.send(&tagged(vlan, &plain(ALL, mac(1), b"hop")));
    }
    assert_eq!(a.port.sent().get(Cause::Vlan), 3);
    assert!(b.got().is_empty() && c.got().is_empty() && trunk.got().is_empty());
}

#[test]
fn what_is_too_long_is_answered() {
    let mut rig = Rig::default();
    let mut a = rig.station(1);
    let b = rig.station(2);
    // 1,450 bytes of IP fit, and one more does not.
    let frame = |payload| udp4(mac(2), mac(1), [10, 0, 0, 1], [5, 6], payload);
    a.send(&frame(1450 - 28));
    assert_eq!(b.got().len(), 1);
    a.send(&frame(1450 - 27));
    assert_eq!((b.got().len(), a.port.sent().get(Cause::TooLong)), (0, 1));
    let [answer] = &a.got()[..] else {
        panic!("one answer")
    };
    let packet = parse(answer, answer.len()).unwrap();
    let (L3::Ipv4(ip), L4::Icmp(icmp)) = (packet.l3, packet.l4) else {
        panic!("{packet:?}")
    };
    assert_eq!((icmp.kind, icmp.code), (3, 4));
    assert_eq!(
        (ip.src.octets(), ip.dst.octets()),
        ([10, 0, 0, 99], [10, 0, 0, 1])
    );
    assert_eq!(answer[14 + 20 + 6..14 + 20 + 8], 1450u16.to_be_bytes());
    assert_eq!((packet.l2.src(), packet.l2.dst()), (mac(2), mac(1)));
    // Who allows fragments gets none, and is not told; it is counted.
    let mut free = frame(2000);
    free[20] = 0;
    a.send(&free);
    assert_eq!((a.got().len(), a.port.sent().get(Cause::TooLong)), (0, 2));
    // IPv6 is always told.
    let mut six = ip6(mac(2), mac(1), [0xfd; 16], None);
    six.truncate(14 + 40);
    six[18..20].copy_from_slice(&1500u16.to_be_bytes());
    six.extend([0x12, 0x34, 0, 53, 5, 0xdc, 0, 0]);
    six.extend(vec![1; 1492]);
    a.send(&six);
    let [answer] = &a.got()[..] else {
        panic!("one answer")
    };
    let packet = parse(answer, answer.len()).unwrap();
    assert!(matches!(packet.l4, L4::Icmpv6(icmp) if (icmp.kind, icmp.code) == (2, 0)));
    // What is cut into segments that fit may be longer.
    let mut long = frame(20_000);
    long[23] = 6;
    long[46] = 0x50;
    let gso = |size| Gso {
        kind: GsoKind::Tcp4,
        ecn: false,
        size,
        network: 14,
        transport: 34,
        headers: 54,
    };
    a.send_all(&[&long], Some(gso(1410)));
    assert_eq!(b.got(), [long.clone()]);
    a.send_all(&[&long], Some(gso(1411)));
    assert!(b.got().is_empty());
    // Answers have a rate.
    a.got();
    for _ in 0..1000 {
        a.send(&frame(2000));
    }
    assert!((10..30).contains(&a.got().len()));
}

#[test]
fn floods_have_a_rate() {
    let flood = Rate {
        per_second: 100,
        burst: 10,
    };
    let mut rig = Rig::with(Some(flood));
    let mut a = rig.station(1);
    let b = rig.station(2);
    for _ in 0..50 {
        a.send(&plain(ALL, mac(1), b"storm"));
    }
    assert_eq!((b.got().len(), a.port.sent().get(Cause::Storm)), (10, 40));
    for _ in 0..50 {
        a.send(&plain(mac(2), mac(1), b"known"));
    }
    assert_eq!(b.got().len(), 50);
    a.now += Duration::from_millis(50);
    a.send(&plain(mac(9), mac(1), b"unknown"));
    assert_eq!(b.got().len(), 1);
}

#[test]
fn ports_have_rates() {
    let mut rig = Rig::default();
    let slow = PortRates {
        bits: None,
        frames: Some(Rate {
            per_second: 1000,
            burst: 10,
        }),
    };
    let rules = |n| Rules {
        mac: Some(mac(n)),
        ..Rules::default()
    };
    let mut a = rig.join(PortOptions {
        rules: rules(1),
        transmit: slow,
        ..PortOptions::default()
    });
    let b = rig.join(PortOptions {
        rules: rules(2),
        receive: slow,
        ..PortOptions::default()
    });
    let mut c = rig.station(3);
    // A sender is told to wait: nothing of what it sends is lost.
    let now = a.now;
    assert_eq!(a.lane.ready(now), Ok(()));
    let frame = plain(mac(3), mac(1), b"out");
    a.send_all(&[&frame[..]; 32], None);
    assert_eq!(c.got().len(), 32);
    let at = a.lane.ready(now).unwrap_err();
    assert!(at > now + Duration::from_millis(21) && at < now + Duration::from_millis(24));
    assert_eq!(a.lane.ready(at), Ok(()));
    // What is too much for a receiver is dropped there.
    let frame = plain(mac(2), mac(3), b"in");
    c.send_all(&[&frame[..]; 32], None);
    assert_eq!(
        (b.got().len(), b.port.received().get(Cause::Limited)),
        (10, 22)
    );
    assert_eq!(c.port.sent().total(), 0);
}

#[test]
fn ports_come_and_go() {
    let mut rig = Rig::default();
    let mut a = rig.station(1);
    let b = rig.station(2);
    let frame = plain(mac(2), mac(1), b"x");
    // Pulled out at either end.
    b.port.set_link(false);
    a.send(&frame);
    assert_eq!(b.port.received().get(Cause::LinkDown), 1);
    assert!(!b.port.attributes().link);
    b.port.set_link(true);
    a.port.set_link(false);
    a.send(&frame);
    assert_eq!(a.port.sent().get(Cause::LinkDown), 1);
    a.port.set_link(true);
    a.send(&frame);
    assert_eq!(b.got().len(), 1);
    // Nobody serves its queues.
    b.port.set_receivers(Arc::new(Receivers::none()));
    a.send(&frame);
    assert_eq!(b.port.received().get(Cause::LinkDown), 2);
    // It leaves; another one comes in its place, and is not taken for it.
    let number = b.port.number();
    drop(b);
    assert_eq!(rig.network.fdb().find(Key::new(mac(2).0, 0)), None);
    let c = rig.station(3);
    assert_eq!(c.port.number(), number);
    a.send(&plain(mac(3), mac(1), b"y"));
    assert_eq!(c.got().len(), 1);
}

/// Two networks of one card, and the same addresses in both.
#[test]
fn f07_networks_do_not_mix() {
    let (mut blue, mut red) = (Rig::default(), Rig::default());
    let (mut a, b) = (blue.station(1), blue.station(2));
    let (c, mut d) = (red.station(1), red.station(2));
    for to in [ALL, mac(2), mac(9)] {
        a.send(&plain(to, mac(1), b"blue"));
        assert_eq!((b.got().len(), c.got().len(), d.got().len()), (1, 0, 0));
    }
    d.send(&plain(mac(1), mac(2), b"red"));
    assert_eq!((c.got().len(), a.got().len()), (1, 0));
}
