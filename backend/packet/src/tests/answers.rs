//! "Too big", and what is never answered.

use super::{A, TCP, V4_A, V6_A, V6_B, ethernet, parsed, udp, v4, v6};
use crate::checksum::{self, Verdict};
use crate::icmp::{MAX_V4, MAX_V6, fragmentation_needed, may_answer, packet_too_big};
use crate::{BuildError, EtherType, Fragment, IpProto, L3, L4, Mac, NoAnswer, Tag, Tags, parse};

const ROUTER: Mac = Mac([2, 0, 0, 0, 0, 0xfe]);
const ROUTER_V4: core::net::Ipv4Addr = core::net::Ipv4Addr::new(192, 168, 7, 254);

/// Puts tags into an untagged frame.
fn tagged(bytes: &[u8]) -> (Vec<u8>, Tags) {
    let tags = [0x88, 0xa8, 0, 9, 0x81, 0, 0xe0, 7];
    let bytes = [&bytes[..12], &tags[..], &bytes[12..]].concat();
    (bytes, Tags::two(Tag::service(9), Tag::customer(0xe007)))
}

#[test]
fn fragmentation_needed_goes_back_to_the_sender() {
    let mut tcp = TCP.to_vec();
    tcp.resize(3000, 0xaa);
    let (bytes, tags) = tagged(&v4(IpProto::TCP, &tcp));
    let mut room = [0; 1500];
    // All of it, what virtio-net has of it, and less than its headers.
    for (at_hand, quoted) in [(bytes.len(), 548), (256, 234), (62, 40)] {
        let head = &bytes[..at_hand];
        let frame = parse(head, bytes.len()).unwrap();
        let len = fragmentation_needed(&mut room, &frame, head, ROUTER, ROUTER_V4, 1400).unwrap();
        let answer = parse(&room[..len], len).unwrap();
        assert_eq!(
            (answer.l2.dst(), answer.l2.src(), answer.l2.tags),
            (A, ROUTER, tags)
        );
        let L3::Ipv4(ip) = answer.l3 else {
            panic!("{answer:?}");
        };
        assert_eq!(
            (ip.src, ip.dst, ip.fragment),
            (ROUTER_V4, V4_A, Fragment::No)
        );
        assert!(usize::from(ip.total_len) <= MAX_V4);
        assert_eq!(usize::from(ip.total_len), 28 + quoted);
        assert_eq!(checksum::ipv4_header_is_good(&answer, &room), Some(true));
        assert_eq!(checksum::verify(&answer, [&room[..len]]), Verdict::Good);
        let icmp = &room[answer.l4_offset().unwrap()..len];
        assert_eq!(icmp[..2], [3, 4]);
        assert_eq!(icmp[4..8], [0, 0, 0x05, 0x78]);
        assert_eq!(icmp[8..], bytes[22..22 + quoted]);
    }
}

#[test]
fn packet_too_big_goes_back_to_the_sender() {
    let mut tcp = TCP.to_vec();
    tcp.resize(3000, 0xaa);
    let (bytes, tags) = tagged(&v6(IpProto::TCP, &tcp));
    let mut room = [0; 1500];
    for (at_hand, quoted) in [(bytes.len(), 1232), (256, 234), (82, 60)] {
        let head = &bytes[..at_hand];
        let frame = parse(head, bytes.len()).unwrap();
        let len = packet_too_big(&mut room, &frame, head, ROUTER, V6_B, 1400).unwrap();
        let answer = parse(&room[..len], len).unwrap();
        assert_eq!(
            (answer.l2.dst(), answer.l2.src(), answer.l2.tags),
            (A, ROUTER, tags)
        );
        assert!(matches!(answer.l3, L3::Ipv6(ip) if (ip.src, ip.dst) == (V6_B, V6_A)));
        assert!(len - answer.l3_offset() <= MAX_V6);
        assert_eq!(checksum::verify(&answer, [&room[..len]]), Verdict::Good);
        let icmp = &room[answer.l4_offset().unwrap()..len];
        assert_eq!(icmp[..2], [2, 0]);
        assert_eq!(icmp[4..8], [0, 0, 0x05, 0x78]);
        assert_eq!(icmp[8..], bytes[22..22 + quoted]);
    }
}

#[test]
fn padding_is_not_quoted() {
    let mut bytes = v4(IpProto::UDP, &udp(1, 2, &[3]));
    bytes.resize(60, 0xee);
    let mut room = [0; 200];
    let len =
        fragmentation_needed(&mut room, &parsed(&bytes), &bytes, ROUTER, ROUTER_V4, 68).unwrap();
    assert_eq!(len, 14 + 28 + 29);
}

#[test]
fn an_answer_needs_room_and_its_own_version() {
    let bytes = v4(IpProto::TCP, &TCP);
    let frame = parsed(&bytes);
    for len in 0..14 + 28 + 40 {
        let mut room = vec![0; len];
        let answer = fragmentation_needed(&mut room, &frame, &bytes, ROUTER, ROUTER_V4, 1400);
        assert_eq!(answer, Err(NoAnswer::Build(BuildError::NoRoom)), "{len}");
    }
    let mut room = [0; 200];
    let answer = packet_too_big(&mut room, &frame, &bytes, ROUTER, V6_B, 1400);
    assert_eq!(answer, Err(NoAnswer::NotIp));
    let bytes = v6(IpProto::TCP, &TCP);
    let answer = fragmentation_needed(&mut room, &parsed(&bytes), &bytes, ROUTER, ROUTER_V4, 1400);
    assert_eq!(answer, Err(NoAnswer::NotIp));
}

/// The frame with some bytes changed.
fn with(bytes: &[u8], at: usize, new: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at..at + new.len()].copy_from_slice(new);
    bytes
}

#[test]
fn what_is_never_answered() {
    let four = v4(IpProto::TCP, &TCP);
    let six = v6(IpProto::TCP, &TCP);
    for good in [&four, &six] {
        assert_eq!(may_answer(&parsed(good)), Ok(()));
    }
    // Groups, on the link and in IP.
    for (bytes, at, new) in [
        (&four, 0, &[0xff; 6][..]),
        (&four, 0, &[0x01, 0, 0x5e, 0, 0, 1]),
        (&four, 6, &[0x03]),
        (&four, 30, &[224, 0, 0, 1]),
        (&four, 30, &[255, 255, 255, 255]),
        (&six, 0, &[0x33, 0x33]),
        (&six, 38, &[0xff, 2]),
    ] {
        assert_eq!(
            may_answer(&parsed(&with(bytes, at, new))),
            Err(NoAnswer::Multicast),
            "{new:?}"
        );
    }
    // Sources that are not one station.
    for source in [
        [0, 0, 0, 0],
        [127, 0, 0, 1],
        [224, 0, 0, 1],
        [240, 0, 0, 1],
        [255; 4],
    ] {
        assert_eq!(
            may_answer(&parsed(&with(&four, 26, &source))),
            Err(NoAnswer::Source)
        );
    }
    for source in [[0u8; 16], V6_A.octets().map(|byte| byte | 0xff), {
        let mut one = [0; 16];
        one[15] = 1;
        one
    }] {
        assert_eq!(
            may_answer(&parsed(&with(&six, 22, &source))),
            Err(NoAnswer::Source)
        );
    }
    // Fragments: the first may be answered, no other.
    assert_eq!(may_answer(&parsed(&with(&four, 20, &[0x20, 0]))), Ok(()));
    assert_eq!(
        may_answer(&parsed(&with(&four, 20, &[0, 1]))),
        Err(NoAnswer::Fragment)
    );
    // What is no IP, or not good.
    for bytes in [
        ethernet(EtherType::ARP, &[0; 28]),
        with(&four, 16, &[0, 3]),
        with(&four, 46, &[0x10]),
    ] {
        assert_eq!(may_answer(&parsed(&bytes)), Err(NoAnswer::NotIp));
    }
}

#[test]
fn icmp_errors_are_never_answered() {
    for kind in 0..=255u8 {
        let echo = [kind, 0, 0, 0, 0, 0, 0, 0];
        let four = parsed(&v4(IpProto::ICMP, &echo));
        assert!(matches!(four.l4, L4::Icmp(_)));
        // RFC 1122 §3.2.2 lists what is an error and what asks; what is in neither list may be an error.
        let asks = [0, 8, 9, 10, 13, 14, 15, 16, 17, 18, 42, 43].contains(&kind);
        let wanted = if asks {
            Ok(())
        } else {
            Err(NoAnswer::IcmpError)
        };
        assert_eq!(may_answer(&four), wanted, "{kind}");
        let six = parsed(&v6(IpProto::ICMPV6, &echo));
        let wanted = if kind >= 128 && kind != 137 {
            Ok(())
        } else {
            Err(NoAnswer::IcmpError)
        };
        assert_eq!(may_answer(&six), wanted, "{kind}");
    }
}
