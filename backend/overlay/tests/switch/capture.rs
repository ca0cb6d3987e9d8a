//! What is captured at ports and tunnels.

use std::net::IpAddr;
use std::sync::Arc;

use bluff_net::capture::{Attached, Capture, CaptureOptions};
use bluff_overlay::udp::TunnelKind;
use bluff_overlay::{Outer, Rules};
use bluff_packet::tunnel::{Geneve, Vxlan};
use bluff_packet::{L3, L4, parse};

use crate::rig::*;
use crate::wire::{addresses, carry, pair, vni};

fn capture() -> Arc<Capture> {
    Capture::new(CaptureOptions {
        snaplen: 1 << 18,
        only: None,
        count: u64::MAX,
        room: 1 << 20,
    })
}

/// Whether each was sent, and its bytes.
fn packets(attached: &Attached) -> Vec<(bool, Vec<u8>)> {
    let mut blocks = Vec::new();
    attached.capture().take(&mut blocks);
    let (mut at, mut packets) = (0, Vec::new());
    let word = |at: usize| u32::from_le_bytes(blocks[at..at + 4].try_into().unwrap());
    while at < blocks.len() {
        let captured = word(at + 20) as usize;
        let flags = word(at + 28 + captured.next_multiple_of(4) + 4);
        packets.push((flags & 3 == 2, blocks[at + 28..at + 28 + captured].to_vec()));
        at += word(at + 4) as usize;
    }
    packets
}

/// A port in a VLAN sees its frames without the tag, what is dropped among them, and nothing of others.
#[test]
fn ports_show_what_functions_send_and_are_given() {
    let mut rig = Rig::default();
    let mut a = rig.join(options(Rules {
        mac: Some(mac(1)),
        vlan: Some(7),
        ..Rules::default()
    }));
    let mut trunk = rig.station(2);
    let seen = [a.port.capture(capture()), trunk.port.capture(capture())];
    let out = plain(mac(2), mac(1), b"out");
    let spoofed = plain(mac(2), mac(9), b"spoofed");
    let back = plain(mac(1), mac(2), b"back");
    a.send(&out);
    a.send(&spoofed);
    trunk.send(&tagged(7, &back));
    // Not for it.
    trunk.send(&tagged(8, &back));
    let both = |sent: &[(bool, &[u8])]| -> Vec<_> {
        sent.iter()
            .map(|(way, bytes)| (*way, bytes.to_vec()))
            .collect()
    };
    let wanted = both(&[(true, &out), (true, &spoofed), (false, &back)]);
    assert_eq!(packets(&seen[0]), wanted);
    let (seven, eight) = (tagged(7, &back), tagged(8, &back));
    let wanted = both(&[(false, &tagged(7, &out)), (true, &seven), (true, &eight)]);
    assert_eq!(packets(&seen[1]), wanted);
    // "Too big" is told to who sent it, by nobody's port.
    a.send(&udp4(mac(2), mac(1), [10, 0, 0, 1], [5, 6], 2000));
    assert_eq!(packets(&seen[0]).len(), 2);
    drop(seen);
    a.send(&out);
}

#[test]
fn tunnels_show_frames_behind_their_outer_headers() {
    for kind in [TunnelKind::Vxlan, TunnelKind::Geneve] {
        for v6 in [false, true] {
            let (mut a, mut b) = pair(kind, v6);
            let mut one = a.rig.station(1);
            let mut two = b.rig.station(2);
            let now = a.rig.now;
            for _ in 0..2 {
                one.send(&plain(mac(2), mac(1), b"find"));
                carry(&mut a, &mut b, now);
                two.send(&plain(mac(1), mac(2), b"find"));
                carry(&mut a, &mut b, now);
            }
            let outer = Outer {
                local: addresses(v6)[0],
                kind,
                port: kind.port(),
            };
            let seen = a.rig.network.capture(outer, capture());
            let there = udp4(mac(2), mac(1), [10, 9, 0, 1], [5, 6], 1000);
            one.send(&there);
            let on_link = carry(&mut a, &mut b, now);
            let back = plain(mac(1), mac(2), b"back");
            two.send(&back);
            carry(&mut a, &mut b, now);
            let [(true, sent), (false, received)] = &packets(&seen)[..] else {
                panic!("one each way")
            };
            // As it was on the link, but for a number that tells packets apart and the checksum over it.
            let mut real = on_link[0][14..].to_vec();
            let mut shown = sent.clone();
            if !v6 {
                for bytes in [&mut real, &mut shown] {
                    bytes[4..6].fill(0);
                    bytes[10..12].fill(0);
                }
            }
            assert_eq!(shown, real);
            // What came, with a source port of 0.
            let framed = [
                &[0; 12][..],
                if v6 { &[0x86, 0xdd] } else { &[8, 0] },
                received,
            ]
            .concat();
            let packet = parse(&framed, framed.len()).unwrap();
            let L4::Udp(udp) = packet.l4 else {
                panic!("{packet:?}")
            };
            assert_eq!((udp.src, udp.dst), (0, kind.port()));
            let ends: [IpAddr; 2] = match packet.l3 {
                L3::Ipv4(ip) => [ip.src.into(), ip.dst.into()],
                L3::Ipv6(ip) => [ip.src.into(), ip.dst.into()],
                other => panic!("{other:?}"),
            };
            let [here, there] = addresses(v6);
            assert_eq!(ends, [there, here]);
            let inside = &framed[packet.l4_offset().unwrap() + 8..];
            let (found, at) = match kind {
                TunnelKind::Vxlan => {
                    let t = Vxlan::parse(inside, inside.len()).unwrap();
                    (t.vni, t.inner)
                }
                TunnelKind::Geneve => {
                    let t = Geneve::parse(inside, inside.len()).unwrap();
                    (t.vni, t.inner)
                }
            };
            assert_eq!((found, &inside[at..]), (vni(), &back[..]));
        }
    }
}
