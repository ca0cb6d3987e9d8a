//! What is built is read again, and extension headers, neighbour discovery and the rest of what parsing tells.

use core::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::{A, B, TCP, V4_A, V4_B, V6_A, ethernet, parsed, udp, v4, v6};
use crate::build::{ArpFields, Ipv4Fields, Ipv6Fields, Writer};
use crate::checksum::{self, Verdict};
use crate::ipv6::Extensions;
use crate::ndp::{self, Ndp};
use crate::spec::arp_op;
use crate::tunnel::{Geneve, Vxlan};
use crate::{
    Arp, BuildError, EtherType, Fragment, IpProto, L2, L3, L4, Mac, Macs, Malformed, Tag, Tags,
    Tcp, Vni, parse,
};

#[test]
fn all_that_ipv4_and_tcp_tell() {
    let mut bytes = v4(IpProto::TCP, &TCP);
    bytes[15] = 0xb9;
    let frame = parsed(&bytes);
    let L3::Ipv4(ip) = frame.l3 else {
        panic!("{frame:?}");
    };
    assert_eq!((ip.src, ip.dst, ip.tos, ip.ttl), (V4_A, V4_B, 0xb9, 64));
    assert_eq!(
        (ip.total_len, ip.header_len, ip.proto),
        (40, 20, IpProto::TCP)
    );
    assert!(ip.dont_fragment && ip.fragment == Fragment::No);
    let tcp = Tcp {
        src: 1024,
        dst: 80,
        header_len: 20,
        flags: 0x10,
    };
    assert_eq!(frame.l4, L4::Tcp(tcp));
    assert_eq!(
        (frame.l3_offset(), frame.l4_offset(), frame.l3_end()),
        (14, Some(34), Some(54))
    );
    // The sum was of another TOS.
    assert_eq!(checksum::ipv4_header_is_good(&frame, &bytes), Some(false));
    checksum::fill_ipv4_header(&mut bytes[14..34]);
    assert_eq!(checksum::ipv4_header_is_good(&frame, &bytes), Some(true));
    assert_eq!(checksum::ipv4_header_is_good(&frame, &bytes[..33]), None);
}

#[test]
fn options_move_what_follows() {
    let mut bytes = v4(IpProto::ICMP, &[1, 1, 1, 1, 8, 0, 0, 0, 0, 1, 0, 1]);
    bytes[14] = 0x46;
    let frame = parsed(&bytes);
    assert!(
        matches!(frame.l4, L4::Icmp(icmp) if icmp.kind == 8),
        "{frame:?}"
    );
    assert_eq!(frame.l4_offset(), Some(38));
}

#[test]
fn a_frame_is_longer_than_what_is_at_hand() {
    let mut bytes = v4(IpProto::TCP, &TCP);
    bytes[16..18].copy_from_slice(&65_535u16.to_be_bytes());
    let frame = parse(&bytes, 14 + 65_535).unwrap();
    assert!(matches!(frame.l4, L4::Tcp(_)));
    assert_eq!(frame.l3_end(), Some(65_549));
    // A head that ends early is not the frame's fault.
    for at_hand in 34..54 {
        let frame = parse(&bytes[..at_hand], 14 + 65_535).unwrap();
        assert_eq!(frame.l4, L4::Malformed(Malformed::Truncated), "{at_hand}");
    }
    for at_hand in 14..34 {
        let frame = parse(&bytes[..at_hand], 14 + 65_535).unwrap();
        assert_eq!(frame.l3, L3::Malformed(Malformed::Truncated), "{at_hand}");
    }
    // Nor is a length that nobody can have.
    assert!(parse(&bytes, usize::MAX).is_ok());
}

/// Hop-by-hop options, destination options, a routing header of type 0 with nothing left, AH of 12 bytes, then TCP.
fn chain() -> Vec<u8> {
    let mut chain = vec![60, 0, 1, 4, 0, 0, 0, 0];
    chain.extend([43, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    chain.extend([51, 0, 0, 0, 0, 0, 0, 0]);
    chain.extend([6, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2]);
    chain.extend(TCP);
    chain
}

#[test]
fn extension_headers_are_followed() {
    let frame = parsed(&v6(IpProto::HOP_BY_HOP, &chain()));
    let L3::Ipv6(ip) = frame.l3 else {
        panic!("{frame:?}");
    };
    assert_eq!(
        (ip.traffic_class, ip.flow_label, ip.hop_limit),
        (0xb8, 0xfabcd, 255)
    );
    assert_eq!((ip.headers_len, ip.payload_len), (84, 64));
    assert_eq!((ip.proto, ip.fragment), (IpProto::TCP, Fragment::No));
    for present in [
        Extensions::HOP_BY_HOP,
        Extensions::DEST_OPTIONS,
        Extensions::ROUTING,
        Extensions::AH,
    ] {
        assert!(ip.extensions.has(present));
    }
    assert!(!ip.extensions.has(Extensions::FRAGMENT) && !ip.extensions.has(Extensions::ROUTED));
    assert!(matches!(frame.l4, L4::Tcp(tcp) if tcp.dst == 80));
    assert_eq!(frame.l4_offset(), Some(14 + 84));
}

#[test]
fn a_fault_in_the_chain_leaves_the_addresses() {
    let l4 = |first, chain: &[u8]| {
        let frame = parsed(&v6(first, chain));
        assert!(
            matches!(frame.l3, L3::Ipv6(ip) if ip.src == V6_A),
            "{frame:?}"
        );
        frame.l4
    };
    let whole = chain();
    for len in 0..whole.len() {
        let cause = if len < 44 {
            Malformed::ExtensionPastEnd
        } else {
            Malformed::TransportHeader
        };
        assert_eq!(
            l4(IpProto::HOP_BY_HOP, &whole[..len]),
            L4::Malformed(cause),
            "{len}"
        );
        // In a frame that is long enough, it is only the head that ends.
        let bytes = v6(IpProto::HOP_BY_HOP, &whole);
        let frame = parse(&bytes[..54 + len], bytes.len()).unwrap();
        assert_eq!(frame.l4, L4::Malformed(Malformed::Truncated), "{len}");
    }
    let mut late = whole.clone();
    late[8] = 0;
    assert_eq!(
        l4(IpProto::HOP_BY_HOP, &late),
        L4::Malformed(Malformed::HopByHopNotFirst)
    );
    let mut ah = whole.clone();
    ah[33] = 0;
    assert_eq!(
        l4(IpProto::HOP_BY_HOP, &ah),
        L4::Malformed(Malformed::ExtensionLength)
    );
    let endless = [60, 0, 1, 4, 0, 0, 0, 0].repeat(9);
    assert_eq!(
        l4(IpProto::DEST_OPTIONS, &endless),
        L4::Malformed(Malformed::ExtensionChain)
    );
    let mut bound = [60, 0, 1, 4, 0, 0, 0, 0].repeat(8);
    bound[56] = 59;
    assert_eq!(l4(IpProto::DEST_OPTIONS, &bound), L4::Other);
}

#[test]
fn fragments_of_ipv6() {
    let fragment = |bits: u16, next: u8, rest: &[u8]| {
        let mut payload = vec![next, 0];
        payload.extend(bits.to_be_bytes());
        payload.extend([0, 0, 0, 7]);
        payload.extend(rest);
        parsed(&v6(IpProto::FRAGMENT, &payload))
    };
    let first = fragment(1, 6, &TCP);
    assert_eq!(first.fragment(), Fragment::First);
    assert!(matches!(first.l4, L4::Tcp(_)));
    let later = fragment(0x10, 60, &[44; 8]);
    assert_eq!(
        (later.fragment(), later.l4),
        (Fragment::Later(16), L4::Fragment)
    );
    assert_eq!(later.proto(), Some(IpProto::DEST_OPTIONS));
    // Whole, though it has the header (RFC 6946).
    let atomic = fragment(0, 6, &TCP);
    assert_eq!(atomic.fragment(), Fragment::No);
    assert!(matches!(atomic.l4, L4::Tcp(_)));
    let twice = fragment(1, 44, &[6, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(twice.l4, L4::Malformed(Malformed::SecondFragmentHeader));
    let far = fragment(0xfff8, 6, &TCP);
    assert_eq!(far.l4, L4::Malformed(Malformed::FragmentPastEnd));
    // RFC 7112: the first one has all headers.
    assert_eq!(
        fragment(1, 60, &[6]).l4,
        L4::Malformed(Malformed::ExtensionPastEnd)
    );
}

#[test]
fn the_first_fragment_of_a_datagram_has_the_length_of_all() {
    let mut bytes = v4(IpProto::UDP, &udp(1, 2, &[3; 8]));
    bytes[38..40].copy_from_slice(&3000u16.to_be_bytes());
    assert_eq!(parsed(&bytes).l4, L4::Malformed(Malformed::UdpLength));
    bytes[20] = 0x20;
    let frame = parsed(&bytes);
    assert!(
        matches!(frame.l4, L4::Udp(udp) if udp.len == 3000),
        "{frame:?}"
    );
    assert_eq!(checksum::verify(&frame, [&bytes[..]]), Verdict::Unknown);
}

#[test]
fn the_other_versions_icmp_is_any_protocol() {
    let echo = [8, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(parsed(&v4(IpProto::ICMPV6, &echo)).l4, L4::Other);
    assert_eq!(parsed(&v6(IpProto::ICMP, &echo)).l4, L4::Other);
    assert!(matches!(parsed(&v4(IpProto::ICMP, &echo)).l4, L4::Icmp(_)));
    assert!(matches!(
        parsed(&v6(IpProto::ICMPV6, &echo)).l4,
        L4::Icmpv6(_)
    ));
    assert_eq!(parsed(&v4(IpProto::AH, &chain())).l4, L4::Other);
    assert_eq!(parsed(&v6(IpProto::NONE, &[])).l4, L4::Other);
}

#[test]
fn arp_is_for_ipv4_on_ethernet() {
    let mut room = [0; 60];
    let fields = ArpFields {
        sender_mac: A,
        sender_ip: V4_A,
        target_ip: V4_B,
    };
    let tags = Tags::one(Tag::customer(7));
    let mut writer = Writer::new(&mut room);
    let len = writer.arp_request(tags, &fields).unwrap().len();
    let frame = parse(&room, len).unwrap();
    assert_eq!(
        (frame.l2.dst(), frame.l2.src(), frame.l2.tags),
        (Mac::BROADCAST, A, tags)
    );
    let wanted = Arp {
        op: arp_op::REQUEST,
        sender_mac: A,
        sender_ip: V4_A,
        target_mac: Mac::ZERO,
        target_ip: V4_B,
    };
    assert_eq!(frame.l3, L3::Arp(wanted));
    assert_eq!(
        parse(&room, len - 1).unwrap().l3,
        L3::Malformed(Malformed::ArpPacket)
    );

    let len = Writer::new(&mut room)
        .arp_reply(B, Tags::NONE, &fields)
        .unwrap()
        .len();
    let frame = parse(&room, len).unwrap();
    assert_eq!(frame.l2.dst(), B);
    let wanted = Arp {
        op: arp_op::REPLY,
        target_mac: B,
        ..wanted
    };
    assert_eq!(frame.l3, L3::Arp(wanted));
    // Hardware, protocol, and both lengths.
    for at in [15, 17, 18, 19] {
        let mut bad = room;
        bad[at] ^= 1;
        assert_eq!(
            parse(&bad, len).unwrap().l3,
            L3::Malformed(Malformed::ArpKind),
            "{at}"
        );
    }
}

fn neighbour(kind: u8, options: &[u8]) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    message.extend(V6_A.octets());
    message.extend(options);
    v6(IpProto::ICMPV6, &message)
}

#[test]
fn neighbours_say_who_they_are() {
    let ask = |bytes: &[u8]| ndp::parse(&parsed(bytes), bytes);
    let source = [1, 1, 2, 0, 0, 0, 0, 1];
    let target = [2, 1, 2, 0, 0, 0, 0, 2];
    let wanted = Ndp {
        advertisement: false,
        target: V6_A,
        link_layer: Some(A),
    };
    assert_eq!(ask(&neighbour(135, &source)), Ok(Some(wanted)));
    // The target's option says nothing in a solicitation; the nonce of RFC 3971 is passed over.
    let nonce = [14, 1, 1, 2, 3, 4, 5, 6];
    let unbound = Ndp {
        link_layer: None,
        ..wanted
    };
    assert_eq!(
        ask(&neighbour(135, &[target, nonce].concat())),
        Ok(Some(unbound))
    );
    assert_eq!(
        ask(&neighbour(135, &[nonce, source, source].concat())),
        Ok(Some(wanted))
    );
    let told = Ndp {
        advertisement: true,
        target: V6_A,
        link_layer: Some(B),
    };
    assert_eq!(ask(&neighbour(136, &target)), Ok(Some(told)));
    assert_eq!(ask(&neighbour(134, &target)), Ok(None));
    assert_eq!(ask(&v4(IpProto::TCP, &TCP)), Ok(None));

    let two = [target, [2, 1, 2, 0, 0, 0, 0, 3]].concat();
    assert_eq!(ask(&neighbour(136, &two)), Err(Malformed::NdpTwoAddresses));
    for bad in [
        &[2, 0, 0, 0, 0, 0, 0, 0][..],
        &[2],
        &[2, 2, 0, 0, 0, 0, 0, 0],
        &[2, 1, 0, 0, 0, 0, 0],
        &[2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ] {
        assert_eq!(
            ask(&neighbour(136, bad)),
            Err(Malformed::NdpLength),
            "{bad:?}"
        );
    }
    let bytes = neighbour(136, &target);
    assert_eq!(
        ndp::parse(&parsed(&bytes), &bytes[..80]),
        Err(Malformed::Truncated)
    );
    let mut routed = bytes.clone();
    routed[21] = 254;
    assert_eq!(ask(&routed), Err(Malformed::NdpOrigin));
    let mut code = bytes;
    code[55] = 1;
    assert_eq!(ask(&code), Err(Malformed::NdpOrigin));
    // In a fragment header, though it is whole (RFC 6980 §5).
    let atomic = [&[58, 0, 0, 0, 0, 0, 0, 7], &neighbour(136, &target)[54..]].concat();
    assert_eq!(
        ask(&v6(IpProto::FRAGMENT, &atomic)),
        Err(Malformed::NdpOrigin)
    );
}

#[test]
fn a_checksum_is_verified_where_it_can_be() {
    let bytes = v4(IpProto::UDP, &udp(1, 2, &[3]));
    assert_eq!(
        checksum::verify(&parsed(&bytes), [&bytes[..]]),
        Verdict::None
    );
    for mut bytes in [
        v4(IpProto::UDP, &udp(1, 2, &[3])),
        v6(IpProto::UDP, &udp(1, 2, &[3])),
        v4(IpProto::TCP, &TCP),
        v6(IpProto::HOP_BY_HOP, &chain()),
        v4(IpProto::ICMP, &[8, 0, 0, 0, 1, 2, 3, 4, 5]),
        neighbour(136, &[]),
    ] {
        let frame = parsed(&bytes);
        assert!(checksum::fill(&frame, &mut bytes));
        let frame = parsed(&bytes);
        let len = bytes.len();
        // Padding is not covered.
        bytes.extend([9; 40]);
        assert_eq!(checksum::verify(&frame, [&bytes[..]]), Verdict::Good);
        assert_eq!(checksum::verify(&frame, bytes.chunks(1)), Verdict::Good);
        assert_eq!(checksum::verify(&frame, [&bytes[..len - 1]]), Verdict::Bad);
        assert!(!checksum::fill(&frame, &mut bytes[..len - 1]));
        bytes[len - 1] ^= 1;
        assert_eq!(checksum::verify(&frame, [&bytes[..]]), Verdict::Bad);
    }
    // A routing header with a segment left: the pseudo header has the last destination, which is not the packet's.
    let mut routed = v6(IpProto::HOP_BY_HOP, &chain());
    routed[54 + 24 + 3] = 1;
    assert_eq!(
        checksum::verify(&parsed(&routed), [&routed[..]]),
        Verdict::Unknown
    );
    let mut fragment = v4(IpProto::TCP, &TCP);
    fragment[20] = 0x20;
    assert_eq!(
        checksum::verify(&parsed(&fragment), [&fragment[..]]),
        Verdict::Unknown
    );
}

#[test]
fn a_checksum_that_was_worked_out_by_hand() {
    // 192.168.7.1 > 192.168.7.2, protocol 17, length 8; ports 1 and 2, length 8:
    // c0a8 + 0701 + c0a8 + 0702 + 0011 + 0008 + 0001 + 0002 + 0008 = 1 8f77, folded 8f78, complement 7087.
    let mut bytes = v4(IpProto::UDP, &udp(1, 2, &[]));
    let frame = parsed(&bytes);
    assert!(checksum::fill(&frame, &mut bytes));
    assert_eq!(bytes[40..42], [0x70, 0x87]);
}

#[test]
fn what_does_not_fit_is_not_built() {
    let fields = Ipv4Fields {
        src: V4_A,
        dst: V4_B,
        proto: IpProto::UDP,
        tos: 0,
        ttl: 1,
        id: 0,
        dont_fragment: false,
    };
    let mut room = [0; 400];
    let mut writer = Writer::new(&mut room);
    assert!(writer.ipv4(&fields, 65_515).is_ok());
    assert_eq!(
        writer.ipv4(&fields, 65_516).err(),
        Some(BuildError::TooLong)
    );
    assert_eq!(
        writer.ipv4(&fields, usize::MAX).err(),
        Some(BuildError::TooLong)
    );
    assert_eq!(writer.udp(1, 2, 65_528, 0).err(), Some(BuildError::TooLong));
    let vni = Vni::new(1).unwrap();
    assert_eq!(
        writer.geneve(vni, &[0; 256], false).err(),
        Some(BuildError::Options)
    );
    assert_eq!(
        writer.geneve(vni, &[0, 0, 0, 1], false).err(),
        Some(BuildError::Options)
    );
    assert_eq!(
        writer.geneve(vni, &[0; 5], false).err(),
        Some(BuildError::Options)
    );
    assert!(writer.geneve(vni, &[0; 252], false).is_ok());
    for room in 0..20 {
        let mut room = vec![0; room];
        assert_eq!(
            Writer::new(&mut room).ipv4(&fields, 0).err(),
            Some(BuildError::NoRoom)
        );
    }
}

fn tags() -> impl Strategy<Value = Tags> {
    let tag = |(service, tci): (bool, u16)| {
        if service {
            Tag::service(tci)
        } else {
            Tag::customer(tci)
        }
    };
    prop_oneof![
        Just(Tags::NONE),
        any::<(bool, u16)>().prop_map(move |a| Tags::one(tag(a))),
        any::<[(bool, u16); 2]>().prop_map(move |[a, b]| Tags::two(tag(a), tag(b))),
    ]
}

proptest! {
    #[test]
    fn what_is_built_is_read_again(
        macs in any::<[[u8; 6]; 2]>(),
        tags in tags(),
        addresses in any::<[u128; 2]>(),
        six in any::<bool>(),
        [tos, ttl] in any::<[u8; 2]>(),
        (id, df, label) in any::<(u16, bool, u32)>(),
        ports in any::<[u16; 2]>(),
        (vni, options, control) in (0u32..1 << 24, 0usize..10, any::<bool>()),
        geneve in any::<bool>(),
        inner in prop::collection::vec(any::<u8>(), 14..400),
    ) {
        let vni = Vni::new(vni).unwrap();
        let options = [0x01, 0x02, 0x03, 0x01, 4, 5, 6, 7].repeat(options);
        let header = if geneve { 8 + options.len() } else { 8 };
        let udp_len = 8 + header + inner.len();
        let l2 = L2 {
            macs: Macs {
                dst: Mac(macs[0]),
                src: Mac(macs[1]),
            },
            tags,
            ethertype: if six { EtherType::IPV6 } else { EtherType::IPV4 },
        };
        let v4 = Ipv4Fields {
            src: Ipv4Addr::from_bits(addresses[0] as u32),
            dst: Ipv4Addr::from_bits(addresses[1] as u32),
            proto: IpProto::UDP, tos, ttl, id, dont_fragment: df,
        };
        let v6 = Ipv6Fields {
            src: Ipv6Addr::from_bits(addresses[0]),
            dst: Ipv6Addr::from_bits(addresses[1]),
            next: IpProto::UDP, traffic_class: tos, flow_label: label & 0xf_ffff, hop_limit: ttl,
        };
        let mut room = [0; 700];
        let mut writer = Writer::new(&mut room);
        writer.ethernet(&l2).unwrap();
        if six { writer.ipv6(&v6, udp_len).unwrap(); } else { writer.ipv4(&v4, udp_len).unwrap(); }
        writer.udp(ports[0], ports[1], udp_len - 8, 0).unwrap();
        if geneve { writer.geneve(vni, &options, control).unwrap(); } else { writer.vxlan(vni).unwrap(); }
        let len = writer.bytes(&inner).unwrap().len();

        let frame = parse(&room[..256.min(len)], len).unwrap();
        prop_assert_eq!(frame.l2, l2);
        match frame.l3 {
            L3::Ipv4(ip) => {
                prop_assert_eq!((ip.src, ip.dst, ip.tos, ip.ttl), (v4.src, v4.dst, tos, ttl));
                prop_assert_eq!((ip.dont_fragment, ip.proto), (df, IpProto::UDP));
                prop_assert_eq!(checksum::ipv4_header_is_good(&frame, &room), Some(true));
            }
            L3::Ipv6(ip) => {
                prop_assert_eq!((ip.src, ip.dst, ip.traffic_class, ip.hop_limit), (v6.src, v6.dst, tos, ttl));
                prop_assert_eq!(ip.flow_label, v6.flow_label);
            }
            other => panic!("{other:?}"),
        }
        prop_assert_eq!(frame.l3_end(), Some(len));
        let L4::Udp(udp) = frame.l4 else { panic!("{frame:?}") };
        prop_assert_eq!([udp.src, udp.dst], ports);
        prop_assert_eq!(usize::from(udp.len), udp_len);
        let payload = &room[frame.l4_offset().unwrap() + 8..len];
        let found = if geneve {
            let tunnel = Geneve::parse(payload, payload.len()).unwrap();
            prop_assert_eq!((tunnel.vni, tunnel.control), (vni, control));
            tunnel.inner
        } else {
            let tunnel = Vxlan::parse(payload, payload.len()).unwrap();
            prop_assert_eq!(tunnel.vni, vni);
            tunnel.inner
        };
        prop_assert_eq!(&payload[found..], &inner[..]);
    }
}

#[test]
fn llc_and_unknown_ethertypes_are_other() {
    for ethertype in [0, 0x26, 0x8035, 0x88cc, 0xffff] {
        let frame = parsed(&ethernet(EtherType(ethertype), &[0x45; 60]));
        assert_eq!(
            (frame.l3, frame.l4_offset(), frame.l3_end()),
            (L3::Other, None, None)
        );
    }
}
