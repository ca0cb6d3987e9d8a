//! Cards whose tunnels go over an Ethernet of their own.

use std::cell::RefCell;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use bluff_net::{
    Cause, Csum, Gso, GsoKind, Lane, Offload, Offloads, Port, Receivers, Registration, Steering,
};
use bluff_overlay::udp::TunnelKind;
use bluff_overlay::wire::{WireOptions, WireUnderlay};
use bluff_packet::checksum::{Verdict, verify};
use bluff_packet::{L3, L4, Mac, Vni, parse};

use crate::rig::*;

pub fn vni() -> Vni {
    Vni::new(5001).unwrap()
}

pub fn link(n: u8) -> Mac {
    Mac([6, 0, 0, 0, 0, n])
}

pub struct Card {
    pub rig: Rig,
    pub underlay: Arc<WireUnderlay>,
    /// What the card sends on its link.
    pub out: Receiver<Vec<u8>>,
    /// Where the link's frames go in.
    pub lane: Box<dyn Lane>,
    _registration: Registration,
}

pub fn card(n: u8, local: IpAddr, others: &[IpAddr], kind: TunnelKind, mtu: u16) -> Card {
    let mut rig = Rig::default();
    let underlay = WireUnderlay::new(WireOptions {
        local,
        mac: link(n),
        gateway: None,
        kind,
        port: kind.port(),
        mtu,
    });
    rig.network
        .set_tunnel(vni(), others, underlay.clone())
        .unwrap();
    underlay.set_network(vni(), Some(rig.network.clone()));
    let (sender, out) = channel();
    let keeper = Rc::new(RefCell::new(Keeper(sender)));
    let registration = Registration::new(&mut rig.reactor.context(), keeper);
    underlay.set_receivers(Arc::new(Receivers {
        queues: vec![Some(registration.outlet().clone())],
        steering: Steering::Spread(1),
    }));
    let lane = Port::open(&*underlay, &mut rig.reactor.context(), 0).unwrap();
    Card {
        rig,
        underlay,
        out,
        lane,
        _registration: registration,
    }
}

pub fn addresses(v6: bool) -> [IpAddr; 2] {
    match v6 {
        false => [[10, 0, 0, 1].into(), [10, 0, 0, 2].into()],
        true => ["fd00::1".parse().unwrap(), "fd00::2".parse().unwrap()],
    }
}

pub fn pair(kind: TunnelKind, v6: bool) -> (Card, Card) {
    let [a, b] = addresses(v6);
    (card(1, a, &[b], kind, 1600), card(2, b, &[a], kind, 1600))
}

/// Carries frames from each card to the other until there are none; gives all that were carried.
pub fn carry(a: &mut Card, b: &mut Card, now: Instant) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    loop {
        let there: Vec<_> = a.out.try_iter().collect();
        let back: Vec<_> = b.out.try_iter().collect();
        if there.is_empty() && back.is_empty() {
            return all;
        }
        for frame in &there {
            send(&mut *b.lane, now, &[frame], None);
        }
        for frame in &back {
            send(&mut *a.lane, now, &[frame], None);
        }
        all.extend(there);
        all.extend(back);
    }
}

#[test]
fn frames_cross_after_the_cards_have_found_each_other() {
    for kind in [TunnelKind::Vxlan, TunnelKind::Geneve] {
        for v6 in [false, true] {
            let (mut a, mut b) = pair(kind, v6);
            let mut first = a.rig.station(1);
            let mut second = b.rig.station(2);
            let now = a.rig.now;
            // The first has to be asked for; it is dropped, and counted.
            let frame = udp4(mac(2), mac(1), [10, 9, 0, 1], [5, 6], 1000);
            first.send(&frame);
            assert_eq!(a.underlay.drops().sent.get(Cause::Nowhere), 1);
            assert_eq!(
                carry(&mut a, &mut b, now).len(),
                2,
                "a question and its answer"
            );
            first.send(&frame);
            let carried = carry(&mut a, &mut b, now);
            assert_eq!(second.got(), std::slice::from_ref(&frame));
            // What was on the link.
            let [outer] = &carried[..] else {
                panic!("one frame")
            };
            let packet = parse(outer, outer.len()).unwrap();
            assert_eq!((packet.l2.src(), packet.l2.dst()), (link(1), link(2)));
            let L4::Udp(udp) = packet.l4 else {
                panic!("{packet:?}")
            };
            assert_eq!(udp.dst, kind.port());
            assert!(udp.src >= 49_152);
            match packet.l3 {
                L3::Ipv4(ip) => assert!(ip.dont_fragment && !v6),
                L3::Ipv6(_) => assert!(v6),
                other => panic!("{other:?}"),
            }
            assert_eq!(outer.len(), frame.len() + if v6 { 70 } else { 50 });
            assert!(outer.ends_with(&frame));
            // And back: the other card has to ask too, as nothing is believed that was not asked for.
            let answer = plain(mac(1), mac(2), b"answer");
            second.send(&answer);
            carry(&mut a, &mut b, now);
            second.send(&answer);
            carry(&mut a, &mut b, now);
            assert_eq!(first.got(), [answer]);
            // One flow has one source port, another one (as good as always) another.
            let port_of = |ports: [u16; 2], a: &mut Card, b: &mut Card, first: &mut Station| {
                first.send(&udp4(mac(2), mac(1), [10, 9, 0, 1], ports, 10));
                let carried = carry(a, b, now);
                let L4::Udp(udp) = parse(&carried[0], carried[0].len()).unwrap().l4 else {
                    panic!("a datagram")
                };
                udp.src
            };
            let one = port_of([5, 6], &mut a, &mut b, &mut first);
            assert_eq!(one, port_of([5, 6], &mut a, &mut b, &mut first));
            assert_ne!(one, port_of([5, 7], &mut a, &mut b, &mut first));
        }
    }
}

/// Frames that stand for several are cut before they are wrapped, and their checksums are right.
#[test]
fn segments_are_wrapped_one_by_one() {
    let (mut a, mut b) = pair(TunnelKind::Vxlan, false);
    let mut first = a.rig.station(1);
    let second = b.rig.station(2);
    let now = a.rig.now;
    first.send(&plain(mac(2), mac(1), b"find"));
    carry(&mut a, &mut b, now);
    let payload: Vec<u8> = (0..30_000u32).map(|i| (i * 7 + i / 256) as u8).collect();
    let mut frame = udp4(mac(2), mac(1), [10, 9, 0, 1], [5, 6], 30_012);
    frame[23] = 6;
    frame[38..54].copy_from_slice(&[0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x18, 1, 0, 0, 0, 0, 0]);
    frame[54..].copy_from_slice(&payload);
    let gso = Gso {
        kind: GsoKind::Tcp4,
        ecn: false,
        size: 1396,
        network: 14,
        transport: 34,
        headers: 54,
    };
    first.send_all(&[&frame], Some(gso));
    carry(&mut a, &mut b, now);
    let mut got = Vec::new();
    for one in second.got() {
        let packet = parse(&one[..one.len().min(256)], one.len()).unwrap();
        assert_eq!(verify(&packet, [&one[..]]), Verdict::Good);
        got.extend_from_slice(&one[54..]);
    }
    assert!(got == payload);
}

/// What is flooded goes to each card and to each port, and every head is as it was before.
#[test]
fn floods_reach_ports_and_cards() {
    let [own, other] = addresses(false);
    let third: IpAddr = [10, 0, 0, 3].into();
    let mut a = card(1, own, &[other, third], TunnelKind::Vxlan, 1600);
    let mut b = card(2, other, &[own], TunnelKind::Vxlan, 1600);
    let mut first = a.rig.station(1);
    let near = a.rig.station(3);
    let far = b.rig.station(2);
    let now = a.rig.now;
    let all = plain(Mac([0xff; 6]), mac(1), &[7; 300]);
    first.send(&all);
    carry(&mut a, &mut b, now);
    near.got();
    first.send_all(&[&all, &all], None);
    carry(&mut a, &mut b, now);
    assert_eq!(near.got(), [all.clone(), all.clone()]);
    assert_eq!(far.got(), [all.clone(), all]);
    // Nobody has the third's address.
    assert_eq!(a.underlay.drops().sent.get(Cause::Nowhere), 4);
}

#[test]
fn what_is_not_for_the_card_goes_nowhere() {
    let (mut a, mut b) = pair(TunnelKind::Vxlan, false);
    let mut first = a.rig.station(1);
    let second = b.rig.station(2);
    let now = a.rig.now;
    first.send(&plain(mac(2), mac(1), b"find"));
    carry(&mut a, &mut b, now);
    first.send(&plain(mac(2), mac(1), b"tunnelled"));
    let outer = a.out.try_recv().unwrap();
    let bad = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut frame = outer.clone();
        change(&mut frame);
        let ip = 14..34;
        bluff_packet::checksum::fill_ipv4_header(&mut frame[ip]);
        frame
    };
    let cases: [(Vec<u8>, Cause); 9] = [
        (bad(&|f| f[5] = 9), Cause::Filtered),
        (bad(&|f| f[33] = 9), Cause::Filtered),
        (bad(&|f| f[37] = 1), Cause::Filtered),
        (bad(&|f| f[23] = 6), Cause::Malformed),
        (bad(&|f| f[20] = 0x20), Cause::BadTunnel),
        (bad(&|f| f[42] = 0), Cause::BadTunnel),
        (bad(&|f| f.push(0)), Cause::BadTunnel),
        (bad(&|f| f[17] = 10), Cause::Malformed),
        (bad(&|f| f[47] ^= 1), Cause::Stranger),
    ];
    for (i, (frame, cause)) in cases.iter().enumerate() {
        let before = b.underlay.drops().received.get(*cause);
        send(&mut *b.lane, now, &[frame], None);
        let after = b.underlay.drops().received.get(*cause);
        assert_eq!(after, before + 1, "{i}");
        assert!(second.got().is_empty(), "{i}");
    }
    // From another address: known to the underlay, and not to the network.
    send(&mut *b.lane, now, &[&bad(&|f| f[29] = 9)], None);
    assert_eq!(b.rig.network.arrived().get(Cause::Stranger), 1);
    send(&mut *b.lane, now, &[&outer], None);
    assert_eq!(second.got().len(), 1);
}

/// Nobody takes a VTEP's place by saying so.
#[test]
fn answers_that_were_not_asked_for() {
    let (mut a, mut b) = pair(TunnelKind::Vxlan, false);
    let mut first = a.rig.station(1);
    let now = a.rig.now;
    let gratuitous = {
        let mut frame = arp(link(9), link(9), [10, 0, 0, 2]);
        frame[21] = 2;
        frame
    };
    send(&mut *a.lane, now, &[&gratuitous], None);
    let frame = plain(mac(2), mac(1), b"x");
    first.send(&frame);
    assert_eq!(a.underlay.drops().sent.get(Cause::Nowhere), 1);
    carry(&mut a, &mut b, now);
    first.send(&frame);
    let outer = a.out.try_recv().unwrap();
    assert_eq!(outer[..6], link(2).0);
    // It is asked again now and then; who does not answer for long is not used any more.
    first.now = now + Duration::from_secs(31);
    first.send(&frame);
    let out: Vec<_> = a.out.try_iter().collect();
    assert_eq!(out.len(), 2, "a question, and the frame");
    first.now = now + Duration::from_secs(121);
    first.send(&frame);
    let out: Vec<_> = a.out.try_iter().collect();
    assert!(out.iter().all(|f| f[12..14] == [8, 6]), "only questions");
}

/// A frame that would be too long on the link.
#[test]
fn the_link_has_an_mtu() {
    let [own, other] = addresses(false);
    let mut a = card(1, own, &[other], TunnelKind::Vxlan, 1000);
    let mut b = card(2, other, &[own], TunnelKind::Vxlan, 1000);
    let mut first = a.rig.station(1);
    let second = b.rig.station(2);
    let now = a.rig.now;
    first.send(&plain(mac(2), mac(1), b"find"));
    carry(&mut a, &mut b, now);
    // 20 of IPv4, 8 of UDP, 8 of VXLAN, 14 of Ethernet.
    for (len, fits) in [(1000 - 36 - 14, true), (1000 - 36 - 13, false)] {
        first.send(&plain(mac(2), mac(1), &vec![1; len]));
        carry(&mut a, &mut b, now);
        assert_eq!(second.got().len(), usize::from(fits));
        let dropped = a.underlay.drops().sent.get(Cause::TooLong);
        assert_eq!(dropped, u64::from(!fits));
    }
}

/// TCP in IPv4, of so many bytes behind its header.
fn tcp4(payload: usize) -> Vec<u8> {
    let mut frame = udp4(mac(2), mac(1), [10, 9, 0, 1], [5, 6], payload + 12);
    frame[23] = 6;
    frame[38..54].copy_from_slice(&[0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x18, 1, 0, 0, 0, 0, 0]);
    bluff_packet::checksum::fill_ipv4_header(&mut frame[14..34]);
    frame
}

/// How such a frame is cut that begins at `at`.
fn tso4(at: u16) -> Gso {
    Gso {
        kind: GsoKind::Tcp4,
        ecn: false,
        size: 1000,
        network: at + 14,
        transport: at + 34,
        headers: at + 54,
    }
}

/// Whoever is plugged in cuts behind the tunnel's headers: frames go there whole, as far as an outer packet takes them.
#[test]
fn what_the_wire_completes_is_left_to_it() {
    let (mut a, mut b) = pair(TunnelKind::Vxlan, false);
    let mut first = a.rig.station(1);
    let now = a.rig.now;
    first.send(&plain(mac(2), mac(1), b"find"));
    carry(&mut a, &mut b, now);
    let mut lens = |a: &Card, completes, payload| {
        a.underlay.set_completes(completes);
        first.send_all(&[&tcp4(payload)], Some(tso4(0)));
        let lens = a.out.try_iter().map(|f| f.len() - 50 - 54);
        lens.collect::<Vec<_>>()
    };
    let tcp = Offloads::CSUM | Offloads::TSO4;
    assert_eq!(lens(&a, tcp, 60_000), [60_000]);
    assert_eq!(lens(&a, Offloads::CSUM, 3_500), [1000, 1000, 1000, 500]);
    assert_eq!(
        lens(&a, Offloads::CSUM | Offloads::TSO6, 1_500),
        [1000, 500]
    );
    // Of more than one outer packet takes: two, cut where segments begin.
    assert_eq!(lens(&a, tcp, 65_450), [33_000, 32_450]);
    // Segments that the link does not take are dropped, whoever cuts them.
    a.underlay.set_completes(tcp);
    let long = Gso {
        size: 1600,
        ..tso4(0)
    };
    first.send_all(&[&tcp4(5000)], Some(long));
    assert_eq!(a.out.try_iter().count(), 0);
}

/// What whoever is on the wire leaves undone on inner frames: nothing is written later over what was checked.
#[test]
fn f02_offloads_of_hostile_outer_frames() {
    let (mut a, mut b) = pair(TunnelKind::Vxlan, false);
    let mut first = a.rig.station(1);
    let second = b.rig.station(2);
    let now = a.rig.now;
    first.send(&plain(mac(2), mac(1), b"find"));
    carry(&mut a, &mut b, now);
    first.send(&tcp4(1350));
    let outer = a.out.try_recv().unwrap();
    let inner = &outer[50..];
    let partial = |start, offset| Csum::Partial { start, offset };
    let gso = |change: &dyn Fn(&mut Gso)| {
        let mut gso = tso4(50);
        change(&mut gso);
        Offload {
            csum: partial(84, 16),
            gso: Some(gso),
        }
    };
    let csum = |csum| Offload { csum, gso: None };
    // As it is, and of the outer datagram alone.
    for sound in [
        csum(partial(84, 16)),
        csum(partial(34, 6)),
        csum(Csum::Valid),
        gso(&|_| {}),
    ] {
        send_left(&mut *b.lane, now, &outer, sound);
        assert_eq!(second.got(), [inner.to_vec()], "{sound:?}");
    }
    // Over the inner addresses: they are changed before they are looked at.
    send_left(&mut *b.lane, now, &outer, csum(partial(50, 0)));
    let got = second.got();
    assert!(
        got.iter()
            .all(|f| f[..6] != mac(2).0 && f[6..] == inner[6..])
    );
    let bad = [
        csum(partial(84, 250)),
        csum(partial(u16::MAX, u16::MAX)),
        gso(&|g| g.kind = GsoKind::Tcp6),
        gso(&|g| g.kind = GsoKind::Udp),
        gso(&|g| g.size = 0),
        gso(&|g| g.network -= 1),
        gso(&|g| g.network = 14),
        gso(&|g| g.transport = 34),
        gso(&|g| g.headers += 4),
        gso(&|g| g.headers = u16::MAX),
        Offload {
            csum: partial(34, 6),
            ..gso(&|_| {})
        },
        Offload {
            csum: partial(84, 6),
            ..gso(&|_| {})
        },
        Offload {
            csum: Csum::Unknown,
            ..gso(&|_| {})
        },
    ];
    for bad in bad {
        let before = b.underlay.drops().received.get(Cause::BadTunnel);
        send_left(&mut *b.lane, now, &outer, bad);
        assert!(second.got().is_empty(), "{bad:?}");
        let after = b.underlay.drops().received.get(Cause::BadTunnel);
        assert_eq!(after, before + 1, "{bad:?}");
    }
}

#[test]
fn a_wire_becomes_another_station() {
    let (mut a, mut b) = pair(TunnelKind::Vxlan, false);
    let mut first = a.rig.station(1);
    let second = b.rig.station(2);
    let now = a.rig.now;
    let options = |n| WireOptions {
        local: [10, 0, 0, n].into(),
        mac: link(7),
        gateway: None,
        kind: TunnelKind::Vxlan,
        port: 4790,
        mtu: 1600,
    };
    for card in [(&a, 1), (&b, 2)] {
        card.0.underlay.set_options(options(card.1));
    }
    b.underlay.set_options(WireOptions {
        mac: link(8),
        ..options(2)
    });
    let frame = plain(mac(2), mac(1), b"through the other port");
    first.send(&frame);
    carry(&mut a, &mut b, now);
    first.send(&frame);
    let outer = carry(&mut a, &mut b, now).pop().unwrap();
    assert_eq!(
        (&outer[..6], &outer[36..38]),
        (&link(8).0[..], &[0x12, 0xb6][..])
    );
    assert_eq!(second.got(), [frame]);
    // Nobody's address: nothing of the old one is used.
    b.underlay.set_options(options(9));
    send(&mut *b.lane, now, &[&outer], None);
    assert!(second.got().is_empty());
}

/// The tenant's marks of congestion go out, those of the underlay come in; its priorities and hops stay its own (RFC 6040).
#[test]
fn congestion_marks_cross_the_tunnel() {
    for v6 in [false, true] {
        let (mut a, mut b) = pair(TunnelKind::Vxlan, v6);
        let mut first = a.rig.station(1);
        let second = b.rig.station(2);
        let now = a.rig.now;
        first.send(&plain(mac(2), mac(1), b"find"));
        carry(&mut a, &mut b, now);
        for (inner, outer, wanted) in [
            (0, 0, Some(0)),
            (0, 3, None),
            (1, 3, Some(3)),
            (2, 2, Some(2)),
            (2, 1, Some(1)),
            (2, 3, Some(3)),
            (3, 0, Some(3)),
        ] {
            let with = |mark: u8| {
                let mut frame = udp4(mac(2), mac(1), [10, 9, 0, 1], [5, 6], 100);
                (frame[15], frame[22]) = (0xb8 | mark, 9);
                bluff_packet::checksum::fill_ipv4_header(&mut frame[14..34]);
                frame
            };
            first.send(&with(inner));
            let mut wrapped = a.out.try_recv().unwrap();
            let packet = parse(&wrapped, wrapped.len()).unwrap();
            let (class, hops) = match packet.l3 {
                L3::Ipv4(ip) => (ip.tos, ip.ttl),
                L3::Ipv6(ip) => (ip.traffic_class, ip.hop_limit),
                other => panic!("{other:?}"),
            };
            assert_eq!((class, hops), (inner, 64), "the mark, and nothing else");
            match v6 {
                true => wrapped[15] ^= (inner ^ outer) << 4,
                false => wrapped[15] ^= inner ^ outer,
            }
            let drops = b.underlay.drops().received.get(Cause::Congested);
            send(&mut *b.lane, now, &[&wrapped], None);
            assert_eq!(second.got(), Vec::from_iter(wanted.map(with)));
            let dropped = b.underlay.drops().received.get(Cause::Congested) - drops;
            assert_eq!(dropped, u64::from(wanted.is_none()));
        }
    }
}
