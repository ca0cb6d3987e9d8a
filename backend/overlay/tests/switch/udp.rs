//! Cards whose tunnels are the kernel's UDP sockets, on loopback addresses.

use std::net::{IpAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bluff_net::{Cause, Gso, GsoKind};
use bluff_overlay::udp::{TunnelKind, UdpOptions, UdpUnderlay};
use bluff_packet::checksum::{Verdict, verify};
use bluff_packet::{Mac, Vni};
use bluff_reactor::Poll;
use bluff_testing::{Chance, loopback, times};

use crate::rig::*;

fn vni() -> Vni {
    Vni::new(5001).unwrap()
}

struct Card {
    rig: Rig,
    local: IpAddr,
    underlay: Arc<UdpUnderlay>,
}

/// The port of all cards: their addresses are theirs alone.
const PORT: u16 = 4789;

fn card(local: IpAddr, other: IpAddr, kind: TunnelKind, port: u16) -> Card {
    let rig = Rig::default();
    let underlay = UdpUnderlay::new(UdpOptions {
        local,
        kind,
        port,
        poll: Poll::Never,
        reactors: vec![rig.reactor.handle()],
    })
    .unwrap();
    rig.network
        .set_tunnel(vni(), &[other], underlay.clone())
        .unwrap();
    underlay.set_network(vni(), Some(rig.network.clone()));
    Card {
        rig,
        local,
        underlay,
    }
}

/// Two cards, whose reactors both turn on this thread.
fn pair(kind: TunnelKind) -> (Card, Card) {
    let (a, b) = (loopback().into(), loopback().into());
    (card(a, b, kind, PORT), card(b, a, kind, PORT))
}

fn until<T>(cards: &mut [&mut Card], mut what: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(t) = what() {
            return t;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "nothing came");
        for card in &mut *cards {
            card.rig.reactor.step(Some(Duration::ZERO));
        }
    }
}

#[test]
fn frames_cross_whole() {
    for kind in [TunnelKind::Vxlan, TunnelKind::Geneve] {
        let (mut a, mut b) = pair(kind);
        let mut first = a.rig.station(1);
        let mut second = b.rig.station(2);
        // Where it is has to be known: floods are limited.
        second.send(&plain(mac(1), mac(2), b"here"));
        until(&mut [&mut a, &mut b], || first.got().pop());
        let mut chance = Chance::new(1);
        for round in 0..times(100, 5000) {
            // Of several flows, with runs of one length among them.
            let count = 1 + chance.below(32);
            let run = chance.below(1400) as usize;
            let mut frames: Vec<Vec<u8>> = (0..count)
                .map(|_| {
                    let len = if chance.percent(70) {
                        run
                    } else {
                        chance.below(1400) as usize
                    };
                    let ports = [chance.below(4) as u16, round as u16];
                    udp4(mac(2), mac(1), [10, 0, 0, 1], ports, len)
                })
                .collect();
            let all: Vec<_> = frames.iter().map(Vec::as_slice).collect();
            first.send_all(&all, None);
            let mut got = Vec::new();
            until(&mut [&mut a, &mut b], || {
                got.extend(second.got());
                (got.len() >= frames.len()).then_some(())
            });
            // Flows keep their order, and may overtake each other.
            let flow = |f: &Vec<u8>| f[34..38].to_vec();
            frames.sort_by_key(flow);
            got.sort_by_key(flow);
            assert!(got == frames, "{kind:?} {round}");
        }
        let back = plain(mac(1), mac(2), b"back");
        second.send(&back);
        let got = until(&mut [&mut a, &mut b], || first.got().pop());
        assert_eq!(got, back);
        for card in [&a, &b] {
            assert_eq!(card.underlay.drops().sent.total(), 0);
            assert_eq!(card.underlay.drops().received.total(), 0);
            assert_eq!(card.rig.network.arrived().total(), 0);
        }
    }
}

#[test]
fn what_stands_for_several_is_cut_and_right() {
    let (mut a, mut b) = pair(TunnelKind::Vxlan);
    let mut first = a.rig.station(1);
    let second = b.rig.station(2);
    let payload: Vec<u8> = (0..60_000u32).map(|i| (i * 7 + i / 256) as u8).collect();
    // TCP in IPv4, from a frame of UDP: the same length of headers before, and 12 bytes more.
    let mut frame = udp4(mac(2), mac(1), [10, 0, 0, 1], [5, 6], 60_012);
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
    let (mut got, mut count) = (Vec::new(), 0);
    until(&mut [&mut a, &mut b], || {
        for one in second.got() {
            let packet = bluff_packet::parse(&one[..one.len().min(256)], one.len()).unwrap();
            assert_eq!(verify(&packet, [&one[..]]), Verdict::Good);
            got.extend_from_slice(&one[54..]);
            count += 1;
        }
        (got.len() >= payload.len()).then_some(())
    });
    assert!(got == payload);
    assert_eq!(count, payload.len().div_ceil(1396));
}

/// What is no tunnel, or not ours, is dropped and counted by its cause.
#[test]
fn f01_datagrams_of_any_bytes() {
    for kind in [TunnelKind::Vxlan, TunnelKind::Geneve] {
        let (mut a, b) = pair(kind);
        let station = a.rig.station(1);
        let to = (a.local, a.underlay.port());
        let stranger = UdpSocket::bind((loopback(), 0)).unwrap();
        let known = UdpSocket::bind((b.local, 0)).unwrap();
        let frame = plain(Mac([0xff; 6]), mac(9), b"frame");
        let header: [u8; 8] = match kind {
            TunnelKind::Vxlan => [8, 0, 0, 0, 0, 0x13, 0x89, 0],
            TunnelKind::Geneve => [0, 0, 0x65, 0x58, 0, 0x13, 0x89, 0],
        };
        let whole = [&header[..], &frame].concat();
        let sent = std::cell::Cell::new(0u64);
        let send = |socket: &UdpSocket, bytes: &[u8]| {
            socket.send_to(bytes, to).unwrap();
            sent.set(sent.get() + 1);
        };
        for len in 0..header.len() + 14 {
            send(&known, &whole[..len]);
        }
        let mut flags = whole.clone();
        flags[if kind == TunnelKind::Vxlan { 0 } else { 2 }] = 0x40;
        send(&known, &flags);
        // Options that end past the datagram (CVE-2024-26857).
        if kind == TunnelKind::Geneve {
            let mut options = whole.clone();
            options[0] = 0x3f;
            send(&known, &options);
        }
        let bad = sent.get();
        let mut other = whole.clone();
        other[5] = 1;
        send(&known, &other);
        let unknown_vni = 1;
        send(&stranger, &whole);
        let drops = |a: &Card| {
            let of = &a.underlay.drops().received;
            (of.get(Cause::BadTunnel), of.get(Cause::Stranger))
        };
        let underlay = a.underlay.clone();
        until(&mut [&mut a], || {
            let of = &underlay.drops().received;
            (of.total() == bad + unknown_vni).then_some(())
        });
        assert_eq!(drops(&a), (bad, unknown_vni));
        let network = a.rig.network.clone();
        until(&mut [&mut a], || {
            (network.arrived().get(Cause::Stranger) == 1).then_some(())
        });
        assert!(station.got().is_empty());
        known.send_to(&whole, to).unwrap();
        let got = until(&mut [&mut a], || station.got().pop());
        assert_eq!(got, frame);
    }
}

/// A datagram that the path does not take is refused, and others are not lost for it.
#[test]
fn what_does_not_fit_the_path_is_counted() {
    let (mut a, mut b) = pair(TunnelKind::Vxlan);
    let mut first = a.rig.station(1);
    let second = b.rig.station(2);
    // An IP packet of more than 65,535 bytes would be needed.
    let long = plain(mac(2), mac(1), &[7; 100]);
    let other = "10.9.9.9".parse().unwrap();
    a.rig
        .network
        .set_tunnel(
            vni(),
            &["fd00::1".parse().unwrap(), b.local, other],
            a.underlay.clone(),
        )
        .unwrap();
    first.send(&plain(Mac([0xff; 6]), mac(1), b"to all"));
    let got = until(&mut [&mut a, &mut b], || second.got().pop());
    assert_eq!(got[14..], *b"to all");
    let sent = &a.underlay.drops().sent;
    assert_eq!(sent.get(Cause::Nowhere), 1, "a VTEP of the other family");
    first.send(&long);
    let got = until(&mut [&mut a, &mut b], || second.got().pop());
    assert_eq!(got, long);
}

#[test]
fn an_underlay_that_is_dropped_gives_its_port_back() {
    let (a, b) = pair(TunnelKind::Vxlan);
    let local = a.local;
    let mut rig = a.rig;
    let station = rig.station(1);
    drop((a.underlay, b));
    // The network still names it, and a port has its sockets; it listens no more.
    drop(station);
    rig.network
        .set_tunnel(vni(), &[], Arc::new(Nothing))
        .unwrap();
    let start = Instant::now();
    while UdpSocket::bind((local, PORT)).is_err() {
        assert!(start.elapsed() < Duration::from_secs(20));
        rig.reactor.step(Some(Duration::ZERO));
    }
}

/// Leads nowhere.
#[derive(Debug)]
struct Nothing;

impl bluff_overlay::Underlay for Nothing {
    fn open(
        &self,
        _: &mut bluff_reactor::Context<'_>,
    ) -> Result<Box<dyn bluff_overlay::Uplink>, bluff_net::NetError> {
        Err(bluff_net::NetError::Gone)
    }
}
