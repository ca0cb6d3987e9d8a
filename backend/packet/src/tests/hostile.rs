//! Rows F1 to F4 of the attack list, as far as they are about formats.

use super::{TCP, V4_A, V4_B, ethernet, parsed, udp, v4, v6};
use crate::build::Writer;
use crate::flow::FlowKey;
use crate::tunnel::{Geneve, Vxlan};
use crate::{EtherType, IpProto, L3, L4, Malformed, Vni, parse, parse_l2};

fn malformed(bytes: &[u8]) -> Malformed {
    match parsed(bytes) {
        crate::Frame {
            l3: L3::Malformed(cause),
            l4: L4::None,
            ..
        } => cause,
        frame => panic!("{frame:?}"),
    }
}

#[test]
fn f01_inner_frame_of_0_to_13_bytes() {
    let vni = Vni::new(5001).unwrap();
    let mut room = [0; 100];
    for inner in 0..20 {
        Writer::new(&mut room).vxlan(vni).unwrap();
        let vxlan = Vxlan::parse(&room, 8 + inner);
        Writer::new(&mut room)
            .geneve(vni, &[0, 1, 2, 1, 9, 9, 9, 9], false)
            .unwrap();
        let geneve = Geneve::parse(&room, 16 + inner);
        if inner < 14 {
            assert_eq!(vxlan, Err(Malformed::InnerFrame), "{inner}");
            assert_eq!(geneve, Err(Malformed::InnerFrame), "{inner}");
            assert_eq!(parse_l2(&room, inner), Err(Malformed::Ethernet), "{inner}");
        } else {
            assert_eq!(vxlan.unwrap().inner, 8);
            assert_eq!(geneve.unwrap().inner, 16);
        }
    }
    for len in 0..8 {
        assert_eq!(Vxlan::parse(&room, len), Err(Malformed::TunnelHeader));
        assert_eq!(Geneve::parse(&room, len), Err(Malformed::TunnelHeader));
        assert_eq!(Vxlan::parse(&room[..len], 100), Err(Malformed::Truncated));
        assert_eq!(Geneve::parse(&room[..len], 100), Err(Malformed::Truncated));
    }
}

#[test]
fn f01_geneve_option_past_the_end() {
    let mut packet = [0u8; 100];
    packet[..8].copy_from_slice(&[2, 0, 0x65, 0x58, 0, 0, 7, 0]);
    let len = packet.len();
    // Eight bytes of options: the option's own length has to be four.
    for (units, good) in [(0u8, true), (1, true), (2, false), (31, false)] {
        packet[8..12].copy_from_slice(&[0, 1, 2, units]);
        // With no data, the second word is an option too, without data.
        assert_eq!(Geneve::parse(&packet, len).is_ok(), good, "{units}");
    }
    // Past the end of the datagram.
    packet[11] = 1;
    for len in 8..16 {
        assert_eq!(
            Geneve::parse(&packet, len),
            Err(Malformed::GeneveOptions),
            "{len}"
        );
    }
    assert_eq!(Geneve::parse(&packet[..15], len), Err(Malformed::Truncated));
    // The longest there can be, in a datagram that is shorter.
    packet[0] = 63;
    assert_eq!(Geneve::parse(&packet, len), Err(Malformed::GeneveOptions));
    assert_eq!(
        Geneve::parse(&packet, 8 + 252 + 14),
        Err(Malformed::Truncated)
    );
}

#[test]
fn f02_vlan_with_an_odd_ethertype() {
    // Nothing behind the tag; a length instead of an ethertype; a tag that never ends; a type that nobody knows.
    assert_eq!(
        parse_l2(&ethernet(EtherType::VLAN, &[]), 14),
        Err(Malformed::VlanTag)
    );
    assert_eq!(
        parse_l2(&ethernet(EtherType::QINQ, &[0, 7, 8]), 17),
        Err(Malformed::VlanTag)
    );
    for inner in [0x0000, 0x0003, 0x05ff, 0x0600, 0x9100, 0x88e5, 0xffff] {
        let [high, low] = u16::to_be_bytes(inner);
        let frame = ethernet(EtherType::VLAN, &[0, 7, high, low, 0x45]);
        let frame = parsed(&frame);
        assert_eq!(
            (frame.l2.ethertype.0, frame.l3, frame.l4),
            (inner, L3::Other, L4::None)
        );
        assert_eq!(frame.l2.ethertype.is_length(), inner < 0x600);
    }
    // IP is promised and is not there.
    for (ethertype, cause) in [
        (EtherType::IPV4, Malformed::IpHeader),
        (EtherType::IPV6, Malformed::IpHeader),
        (EtherType::ARP, Malformed::ArpPacket),
    ] {
        let [high, low] = ethertype.0.to_be_bytes();
        for payload in 0..20 {
            let mut tagged = vec![0, 7, high, low];
            tagged.extend(
                &[
                    0x45, 0, 0, 20, 0, 0, 0, 0, 64, 6, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2,
                ][..payload],
            );
            assert_eq!(malformed(&ethernet(EtherType::VLAN, &tagged)), cause);
        }
    }
    // Many tags cost no more than two.
    let many: Vec<u8> = [0, 7, 0x81, 0].repeat(60);
    let frame = parsed(&ethernet(EtherType::VLAN, &many));
    assert_eq!((frame.l2.ethertype, frame.l3), (EtherType::VLAN, L3::Other));
    assert_eq!(frame.l3_offset(), 22);
}

#[test]
fn f03_protocol_0_is_a_protocol() {
    // CVE-2023-1668: 0 was a wildcard. In IPv4 it is a number without meaning.
    let zero = parsed(&v4(IpProto(0), &TCP));
    assert_eq!((zero.proto(), zero.l4), (Some(IpProto(0)), L4::Other));
    let tcp = parsed(&v4(IpProto::TCP, &TCP));
    let other = parsed(&v4(IpProto(253), &TCP));
    let none = parsed(&v4(IpProto(0), &[]));
    let keys = [zero, tcp, other].map(|frame| FlowKey::new(&frame));
    assert!(keys[0] != keys[1] && keys[0] != keys[2] && keys[1] != keys[2]);
    assert_eq!(FlowKey::new(&none), keys[0]);
    // Port 0 is a port, and not the same as no port.
    let port_0 = parsed(&v4(IpProto::UDP, &udp(0, 0, &[])));
    let mut fragment = v4(IpProto::UDP, &udp(0, 0, &[]));
    fragment[20] = 0x20;
    assert_ne!(FlowKey::new(&port_0), FlowKey::new(&parsed(&fragment)));
}

#[test]
fn f03_padding_belongs_to_nothing() {
    // CVE-2020-35498: more than 255 bytes of it, and the packet was not parsed.
    for bytes in [
        v4(IpProto::TCP, &TCP),
        v4(IpProto::UDP, &udp(9, 9, &[1])),
        v6(IpProto::TCP, &TCP),
    ] {
        let plain = parsed(&bytes);
        for padding in [1, 18, 255, 256, 257, 1400, 60_000] {
            let mut padded = bytes.clone();
            padded.resize(bytes.len() + padding, 0x45);
            let frame = parsed(&padded);
            assert_eq!(frame, plain, "{padding}");
            assert_eq!(frame.l3_end(), Some(bytes.len()));
            assert_eq!(FlowKey::new(&frame), FlowKey::new(&plain));
        }
    }
    // A header is not completed by padding.
    let mut short = v4(IpProto::TCP, &TCP[..12]);
    short.extend(&TCP[12..]);
    assert_eq!(parsed(&short).l4, L4::Malformed(Malformed::TransportHeader));
}

#[test]
fn f03_mpls_is_not_looked_into() {
    for labels in [0, 1, 3, 100] {
        let mut stack = [0, 0, 0x10, 0x40].repeat(labels);
        stack.extend(&v4(IpProto::TCP, &TCP)[14..]);
        let frame = parsed(&ethernet(EtherType::MPLS, &stack));
        assert_eq!(
            (frame.l3, frame.l4, frame.proto()),
            (L3::Other, L4::None, None)
        );
        assert_eq!(
            FlowKey::new(&frame),
            FlowKey::new(&parsed(&ethernet(EtherType::MPLS, &[])))
        );
    }
}

#[test]
fn f04_ip_length_underflow() {
    // CVE-2016-10377: a total length below the header's gave a payload of nearly 2^16 bytes, which passed the rule.
    let whole = v4(IpProto::TCP, &TCP);
    for total in 0..20u16 {
        let mut bytes = whole.clone();
        bytes[16..18].copy_from_slice(&total.to_be_bytes());
        assert_eq!(malformed(&bytes), Malformed::IpLengthBelowHeader);
        let frame = parsed(&bytes);
        assert_eq!(
            (frame.l4_offset(), frame.l3_end(), frame.proto()),
            (None, None, None)
        );
    }
    // With options, it is their end that counts.
    let mut options = whole.clone();
    options[14] = 0x4a;
    options[16..18].copy_from_slice(&39u16.to_be_bytes());
    assert_eq!(malformed(&options), Malformed::IpLengthBelowHeader);
    options[16..18].copy_from_slice(&40u16.to_be_bytes());
    assert_eq!(
        parsed(&options).l4,
        L4::Malformed(Malformed::TransportHeader)
    );
    // Between the header and the transport's: there are no ports, though their bytes are there.
    for total in 20..40u16 {
        let mut bytes = whole.clone();
        bytes[16..18].copy_from_slice(&total.to_be_bytes());
        let frame = parsed(&bytes);
        assert_eq!(
            frame.l4,
            L4::Malformed(Malformed::TransportHeader),
            "{total}"
        );
    }
    // Past the frame.
    let mut long = whole.clone();
    long[16..18].copy_from_slice(&41u16.to_be_bytes());
    assert_eq!(malformed(&long), Malformed::IpLengthPastEnd);
    assert!(matches!(parse(&long, 55).unwrap().l3, L3::Ipv4(ip) if ip.total_len == 41));
}

#[test]
fn f04_other_lengths_that_do_not_agree() {
    let whole = v4(IpProto::TCP, &TCP);
    for ihl in 0..5 {
        let mut bytes = whole.clone();
        bytes[14] = 0x40 | ihl;
        assert_eq!(malformed(&bytes), Malformed::IpHeaderLength);
    }
    let mut bytes = whole.clone();
    bytes[14] = 0x4f;
    assert_eq!(malformed(&bytes), Malformed::IpHeaderLength);
    bytes[14] = 0x65;
    assert_eq!(malformed(&bytes), Malformed::IpVersion);
    for offset in [0x00, 0x10, 0x40, 0x60, 0xf0] {
        let mut bytes = whole.clone();
        bytes[14 + 20 + 12] = offset;
        assert_eq!(parsed(&bytes).l4, L4::Malformed(Malformed::TcpHeaderLength));
    }
    for len in [0u16, 7, 10, 0xffff] {
        let mut bytes = v4(IpProto::UDP, &udp(1, 2, &[3]));
        bytes[38..40].copy_from_slice(&len.to_be_bytes());
        assert_eq!(
            parsed(&bytes).l4,
            L4::Malformed(Malformed::UdpLength),
            "{len}"
        );
    }
    let mut six = v6(IpProto::TCP, &TCP);
    six[19] = 21;
    assert_eq!(malformed(&six), Malformed::IpLengthPastEnd);
    six[19] = 19;
    assert_eq!(parsed(&six).l4, L4::Malformed(Malformed::TransportHeader));
    six[14] = 0x45;
    assert_eq!(malformed(&six), Malformed::IpVersion);
}

#[test]
fn f04_fragments_hide_no_header() {
    let bytes = |bits: u16, payload: &[u8]| {
        let mut bytes = v4(IpProto::TCP, payload);
        bytes[20..22].copy_from_slice(&bits.to_be_bytes());
        bytes
    };
    // A first fragment that ends in the TCP header (RFC 1858 §3), and a later one that looks like a header.
    assert_eq!(
        parsed(&bytes(0x2000, &TCP[..8])).l4,
        L4::Malformed(Malformed::TransportHeader)
    );
    assert!(matches!(parsed(&bytes(0x2000, &TCP)).l4, L4::Tcp(_)));
    assert_eq!(parsed(&bytes(0x2001, &TCP)).l4, L4::Fragment);
    assert_eq!(parsed(&bytes(0x0001, &TCP)).l4, L4::Fragment);
    // Past 65,535 bytes in all ("ping of death").
    assert!(
        matches!(parsed(&bytes(0x1ffa, &TCP)).l3, L3::Ipv4(ip) if (ip.src, ip.dst) == (V4_A, V4_B))
    );
    assert_eq!(malformed(&bytes(0x1fff, &TCP)), Malformed::FragmentPastEnd);
}
