//! Our reading of a frame against etherparse's. Where they may differ is written down here, and nowhere else may they.

use etherparse::err::packet::SliceError;
use etherparse::err::{Layer, LenError};
use etherparse::{LinkExtSlice, NetSlice, SlicedPacket, TransportSlice};

use crate::ipv6::Extensions;
use crate::{EtherType, Fragment, Frame, IpProto, L3, L4, Malformed, Tag, parse};

const MACSEC: EtherType = EtherType(0x88e5);
const OLD_QINQ: EtherType = EtherType(0x9100);

/// Panics where we and etherparse disagree in a way that is not documented here.
pub fn compare(bytes: &[u8]) {
    let theirs = SlicedPacket::from_ethernet(bytes);
    let ours = match parse(bytes, bytes.len()) {
        Ok(ours) => ours,
        Err(cause) => {
            // Too short to be switched: etherparse misses bytes as well.
            let Err(SliceError::Len(error)) = &theirs else {
                panic!("{cause}, but etherparse reads {theirs:?}");
            };
            let layer = match cause {
                Malformed::Ethernet => Layer::Ethernet2Header,
                _ => Layer::VlanHeader,
            };
            assert_eq!(error.layer, layer, "{cause}: {error}");
            return;
        }
    };
    // Laxer: what a switch need not look into. etherparse goes on into a third tag, one of 0x9100, and MACsec.
    let ethertype = ours.l2.ethertype;
    if ethertype.is_vlan() || ethertype == MACSEC || ethertype == OLD_QINQ {
        assert_eq!(ours.l3, L3::Other);
        return;
    }
    match theirs {
        Ok(theirs) => both_read(&ours, &theirs),
        Err(error) => they_refuse(&ours, &error),
    }
}

fn both_read(ours: &Frame, theirs: &SlicedPacket<'_>) {
    let mut tags = ours.l2.tags.as_slice().iter();
    for extension in &theirs.link_exts {
        let LinkExtSlice::Vlan(vlan) = extension else {
            panic!("MACsec was sorted out");
        };
        let Tag { tci, .. } = *tags.next().expect("as many tags");
        let [high, low] = [vlan.slice()[0], vlan.slice()[1]];
        assert_eq!(tci, u16::from_be_bytes([high, low]));
    }
    assert_eq!(tags.next(), None);
    match (&ours.l3, &theirs.net) {
        (L3::Other, None) => {}
        (L3::Ipv4(a), Some(NetSlice::Ipv4(b))) => {
            let b = b.header();
            assert_eq!((a.src, a.dst), (b.source_addr(), b.destination_addr()));
            assert_eq!((a.ttl, a.total_len), (b.ttl(), b.total_len()));
            assert_eq!(a.tos, b.dcp().value() << 2 | b.ecn().value());
            assert_eq!(a.proto.0, b.protocol().0);
            assert_eq!(usize::from(a.header_len), b.slice().len());
            assert_eq!(a.dont_fragment, b.dont_fragment());
            assert_eq!(a.fragment != Fragment::No, b.is_fragmenting_payload());
            transport(ours, theirs);
        }
        (L3::Ipv6(a), Some(NetSlice::Ipv6(b))) => {
            let header = b.header();
            assert_eq!(
                (a.src, a.dst),
                (header.source_addr(), header.destination_addr())
            );
            assert_eq!(
                (a.hop_limit, a.payload_len),
                (header.hop_limit(), header.payload_length())
            );
            assert_eq!(a.traffic_class, header.traffic_class());
            assert_eq!(a.flow_label, header.flow_label().value());
            // Stricter: a length of 0 is 0. etherparse takes the rest of the frame instead, in case it is a jumbogram.
            if a.payload_len == 0 {
                return;
            }
            // Laxer: behind a later fragment's header is the middle of something. etherparse goes on reading extension headers there.
            if !matches!(a.fragment, Fragment::Later(_)) && !stricter_extensions(ours) {
                assert_eq!(
                    usize::from(a.headers_len),
                    40 + b.extensions().slice().len()
                );
                assert_eq!(a.proto.0, b.payload().ip_number.0);
                assert_eq!(a.fragment != Fragment::No, b.is_payload_fragmented());
            }
            transport(ours, theirs);
        }
        (L3::Arp(a), Some(NetSlice::Arp(b))) => {
            assert_eq!(a.op, b.operation().0);
            assert_eq!(a.sender_mac.0, b.sender_hw_addr());
            assert_eq!(a.sender_ip.octets(), b.sender_protocol_addr());
            assert_eq!(a.target_mac.0, b.target_hw_addr());
            assert_eq!(a.target_ip.octets(), b.target_protocol_addr());
        }
        // Stricter: ARP is for IPv4 on Ethernet, in 28 bytes.
        (L3::Malformed(Malformed::ArpKind | Malformed::ArpPacket), Some(NetSlice::Arp(b))) => {
            assert!(
                (b.hw_addr_size(), b.proto_addr_size()) != (6, 4)
                    || b.hw_addr_type().0 != 1
                    || b.proto_addr_type() != etherparse::EtherType::IPV4
            );
        }
        // Stricter: no packet is longer than 65,535 bytes, put together.
        (L3::Malformed(Malformed::FragmentPastEnd), Some(NetSlice::Ipv4(b))) => {
            assert!(b.is_payload_fragmented());
        }
        (a, b) => panic!("{a:?}, but etherparse reads {b:?}"),
    }
}

/// Stricter: extension headers that are bounded in number, and fragments.
fn stricter_extensions(ours: &Frame) -> bool {
    let L4::Malformed(cause) = ours.l4 else {
        return false;
    };
    matches!(
        cause,
        Malformed::ExtensionChain | Malformed::SecondFragmentHeader | Malformed::FragmentPastEnd
    )
}

fn transport(ours: &Frame, theirs: &SlicedPacket<'_>) {
    if ours.fragment() != Fragment::No {
        // Stricter and laxer: we read the first fragment's transport, and etherparse none.
        assert!(theirs.transport.is_none() || stricter_extensions(ours));
        return;
    }
    match (&ours.l4, &theirs.transport) {
        (L4::Tcp(a), Some(TransportSlice::Tcp(b))) => {
            assert_eq!((a.src, a.dst), (b.source_port(), b.destination_port()));
            assert_eq!(usize::from(a.header_len), b.header_slice().len());
            assert_eq!(a.flags, b.header_slice()[13]);
        }
        (L4::Udp(a), Some(TransportSlice::Udp(b))) => {
            assert_eq!((a.src, a.dst), (b.source_port(), b.destination_port()));
            assert_eq!((a.len, a.checksum), (b.length(), b.checksum()));
        }
        (L4::Icmp(a), Some(TransportSlice::Icmpv4(b))) => {
            assert_eq!((a.kind, a.code), (b.type_u8(), b.code_u8()));
        }
        (L4::Icmpv6(a), Some(TransportSlice::Icmpv6(b))) => {
            assert_eq!((a.kind, a.code), (b.type_u8(), b.code_u8()));
        }
        (L4::Other, None) => {}
        // Laxer: ICMP of the other version, and IGMP, are protocols like any other.
        (
            L4::Other,
            Some(TransportSlice::Icmpv4(_) | TransportSlice::Icmpv6(_) | TransportSlice::Igmp(_)),
        ) => {}
        // Laxer: etherparse follows AH in IPv4, and we only name it.
        (L4::Other, Some(_)) if is_ah_in_ipv4(ours) => {}
        // Stricter: a UDP length of 0 is below 8. etherparse takes the rest of the packet.
        (L4::Malformed(Malformed::UdpLength), Some(TransportSlice::Udp(b))) => {
            assert_eq!(b.length(), 0);
        }
        (L4::Malformed(_), _) if stricter_extensions(ours) => {}
        (a, b) => panic!("{a:?}, but etherparse reads {b:?}"),
    }
}

fn is_ah_in_ipv4(ours: &Frame) -> bool {
    matches!(&ours.l3, L3::Ipv4(ip) if ip.proto == IpProto::AH)
}

fn they_refuse(ours: &Frame, error: &SliceError) {
    let refused = match (&ours.l3, &ours.l4) {
        (L3::Malformed(_), _) | (_, L4::Malformed(_)) => true,
        // Laxer: in IPv4, AH is a protocol like any other.
        (L3::Ipv4(_), _) if is_ah_in_ipv4(ours) => true,
        // Laxer: what is behind a later fragment's header.
        (L3::Ipv6(ip), L4::Fragment) => ip.extensions.has(Extensions::FRAGMENT),
        // Laxer: of an ICMP message we read the first eight bytes; etherparse knows how long timestamps are.
        (_, L4::Icmp(_)) => is_len(error, |layer| {
            matches!(layer, Layer::Icmpv4Timestamp | Layer::Icmpv4TimestampReply)
        }),
        // Laxer: of other protocols we read nothing; etherparse reads IGMP, and ICMP of the other version.
        (_, L4::Other) => is_len(error, |layer| {
            matches!(
                layer,
                Layer::Igmp
                    | Layer::Icmpv4
                    | Layer::Icmpv6
                    | Layer::Icmpv4Timestamp
                    | Layer::Icmpv4TimestampReply
            )
        }),
        _ => false,
    };
    // A length of 0 in IPv6 is the rest of the frame to etherparse, so what it then refuses is something else.
    let jumbo = matches!(&ours.l3, L3::Ipv6(ip) if ip.payload_len == 0);
    assert!(
        refused || jumbo,
        "{ours:?}, but etherparse refuses: {error}"
    );
}

fn is_len(error: &SliceError, layers: impl Fn(Layer) -> bool) -> bool {
    matches!(error, SliceError::Len(LenError { layer, .. }) if layers(*layer))
}
