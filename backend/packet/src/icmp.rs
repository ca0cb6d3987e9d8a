//! "Too big": what a router tells the sender of a packet that does not fit the next hop, so that nothing vanishes silently.
//!
//! Whoever calls bounds how often that is done (RFC 1812 §4.3.2.8, RFC 4443 §2.4 f).

use core::net::{Ipv4Addr, Ipv6Addr};

use crate::build::{Ipv4Fields, Ipv6Fields, Writer};
use crate::checksum::Sum;
use crate::frame::{Fragment, Frame, L3, L4};
use crate::spec::{IcmpHeader, Ipv4Header, Ipv6Header, icmp4, icmp6};
use crate::{EtherType, IpProto, L2, Mac, Macs, NoAnswer};

/// Bytes that an ICMPv4 error has at most, with its IPv4 header (RFC 1812 §4.3.2.3).
pub const MAX_V4: usize = 576;
/// Bytes that an ICMPv6 error has at most, with its IPv6 header: the smallest MTU (RFC 4443 §2.4 c).
pub const MAX_V6: usize = 1280;

const HOPS: u8 = 64;
/// Network control: a router's own (RFC 1812 §4.3.2.5 asks for precedence 6 or 7).
const TOS: u8 = 0xc0;

/// Whether a frame may be answered with an ICMP error about its size (RFC 1122 §3.2.2, RFC 4443 §2.4 e).
///
/// RFC 4443 would allow "packet too big" to the sender of a multicast; it is refused here, as one frame may be
/// flooded to many tunnels, and each would answer.
///
/// # Errors
/// Why not.
pub fn may_answer(frame: &Frame) -> Result<(), NoAnswer> {
    if frame.l2.dst().is_multicast() || frame.l2.src().is_multicast() {
        return Err(NoAnswer::Multicast);
    }
    if matches!(frame.fragment(), Fragment::Later(_)) {
        return Err(NoAnswer::Fragment);
    }
    match &frame.l3 {
        L3::Ipv4(ip) => {
            if ip.dst.is_multicast() || ip.dst.is_broadcast() {
                return Err(NoAnswer::Multicast);
            }
            // 0/8 is nobody's, 127/8 is no address on a link, 224/3 is multicast, reserved and broadcast.
            let first = ip.src.octets()[0];
            if first == 0 || first == 127 || first >= 224 {
                return Err(NoAnswer::Source);
            }
        }
        L3::Ipv6(ip) => {
            if ip.dst.is_multicast() {
                return Err(NoAnswer::Multicast);
            }
            if ip.src.is_multicast() || ip.src.is_unspecified() || ip.src.is_loopback() {
                return Err(NoAnswer::Source);
            }
        }
        _ => return Err(NoAnswer::NotIp),
    }
    match &frame.l4 {
        // It may be an ICMP error behind what could not be read.
        L4::Malformed(_) => Err(NoAnswer::NotIp),
        // Echo, router discovery (RFC 1256), timestamp, information, address mask, extended echo (RFC 8335): the rest are errors, or not known.
        L4::Icmp(icmp) if !matches!(icmp.kind, 0 | 8..=10 | 13..=18 | 42 | 43) => {
            Err(NoAnswer::IcmpError)
        }
        L4::Icmpv6(icmp)
            if icmp.kind < icmp6::FIRST_INFORMATIONAL || icmp.kind == icmp6::REDIRECT =>
        {
            Err(NoAnswer::IcmpError)
        }
        _ => Ok(()),
    }
}

/// Writes ICMPv4 "fragmentation needed and DF set" (RFC 1191 §4) to the sender of `frame`, into `room`, with the frame's VLAN tags. Gives its length in bytes.
///
/// It comes from the station `mac` with the address `from`, quotes what `head` has of the packet, up to 576 bytes in all, and tells `mtu`: bytes
/// of an IPv4 packet that the next hop takes. Whether DF is set is for the caller to look at.
///
/// # Errors
/// Those of [`may_answer`], and [`NoAnswer::Build`].
pub fn fragmentation_needed(
    room: &mut [u8],
    frame: &Frame,
    head: &[u8],
    mac: Mac,
    from: Ipv4Addr,
    mtu: u16,
) -> Result<usize, NoAnswer> {
    may_answer(frame)?;
    let L3::Ipv4(ip) = &frame.l3 else {
        return Err(NoAnswer::NotIp);
    };
    let quote = quote(frame, head, MAX_V4 - Ipv4Header::LEN - IcmpHeader::LEN);
    let fields = Ipv4Fields {
        src: from,
        dst: ip.src,
        proto: IpProto::ICMP,
        tos: TOS,
        ttl: HOPS,
        id: 0,
        // Every link takes 576 bytes, and an ID of 0 wants DF (RFC 6864 §4.1).
        dont_fragment: true,
    };
    let mut writer = Writer::new(room);
    writer
        .ethernet(&back(frame, mac, EtherType::IPV4))?
        .ipv4(&fields, IcmpHeader::LEN + quote.len())?;
    let kind = (icmp4::UNREACHABLE, icmp4::CODE_FRAGMENTATION_NEEDED);
    message(&mut writer, kind, u32::from(mtu), Sum::new(), quote)
}

/// Writes ICMPv6 "packet too big" (RFC 4443 §3.2) to the sender of `frame`; all else as in [`fragmentation_needed`], with up to 1,280 bytes in all.
///
/// # Errors
/// Those of [`may_answer`], and [`NoAnswer::Build`].
pub fn packet_too_big(
    room: &mut [u8],
    frame: &Frame,
    head: &[u8],
    mac: Mac,
    from: Ipv6Addr,
    mtu: u32,
) -> Result<usize, NoAnswer> {
    may_answer(frame)?;
    let L3::Ipv6(ip) = &frame.l3 else {
        return Err(NoAnswer::NotIp);
    };
    let quote = quote(frame, head, MAX_V6 - Ipv6Header::LEN - IcmpHeader::LEN);
    let len = IcmpHeader::LEN + quote.len();
    let fields = Ipv6Fields {
        src: from,
        dst: ip.src,
        next: IpProto::ICMPV6,
        traffic_class: TOS,
        flow_label: 0,
        hop_limit: HOPS,
    };
    let mut writer = Writer::new(room);
    writer
        .ethernet(&back(frame, mac, EtherType::IPV6))?
        .ipv6(&fields, len)?;
    // The quote is bounded, so the length is what it was.
    let pseudo = Sum::pseudo_v6(from, ip.src, IpProto::ICMPV6, len as u32);
    message(&mut writer, (icmp6::PACKET_TOO_BIG, 0), mtu, pseudo, quote)
}

fn back(frame: &Frame, mac: Mac, ethertype: EtherType) -> L2 {
    L2 {
        macs: Macs {
            dst: frame.l2.src(),
            src: mac,
        },
        tags: frame.l2.tags,
        ethertype,
    }
}

/// The packet's first bytes, without padding.
fn quote<'a>(frame: &Frame, head: &'a [u8], most: usize) -> &'a [u8] {
    let start = frame.l3_offset();
    let end = frame
        .l3_end()
        .unwrap_or(start)
        .min(head.len())
        .min(start + most);
    head.get(start..end).unwrap_or_default()
}

fn message(
    writer: &mut Writer<'_>,
    (kind, code): (u8, u8),
    rest: u32,
    pseudo: Sum,
    quote: &[u8],
) -> Result<usize, NoAnswer> {
    let mut header = IcmpHeader {
        kind,
        code,
        checksum: 0.into(),
        rest: rest.into(),
    };
    let mut sum = pseudo;
    sum.add(zerocopy::IntoBytes::as_bytes(&header));
    sum.add(quote);
    header.checksum = sum.finish().into();
    Ok(writer.put(&header)?.bytes(quote)?.len())
}
