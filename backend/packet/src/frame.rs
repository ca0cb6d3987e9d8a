//! The full level of parsing: what a frame says of IP, ARP and the transport.

use core::net::Ipv4Addr;

use crate::ipv6::{self, Ipv6};
use crate::l2::{L2, Tags, tags};
use crate::spec::{
    ARP_ETHERNET, ArpPacket, EthernetHeader, IPV4_DF, IPV4_MF, IPV4_OFFSET, IcmpHeader, Ipv4Header,
    TcpHeader, UdpHeader,
};
use crate::window::Window;
use crate::{EtherType, IpProto, Mac, Malformed};

/// What a frame's headers say. All lengths in it agree with each other and with the frame's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Addresses, tags, ethertype.
    pub l2: L2,
    /// What it carries.
    pub l3: L3,
    /// What IP carries.
    pub l4: L4,
}

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L3 {
    /// IPv4.
    Ipv4(Ipv4),
    /// IPv6.
    Ipv6(Ipv6),
    /// ARP for IPv4.
    Arp(Arp),
    /// Something else, which was not looked at.
    Other,
    /// What the ethertype says, but with this fault. No field of it may be relied on; no rule that lets IP or ARP pass may let this pass.
    Malformed(Malformed),
}

/// An IPv4 header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv4 {
    /// Source.
    pub src: Ipv4Addr,
    /// Destination.
    pub dst: Ipv4Addr,
    /// DSCP (6 bits), ECN (2).
    pub tos: u8,
    /// Hops left.
    pub ttl: u8,
    /// Bytes of header and payload; at least `header_len`, and inside of the frame. What the frame has beyond is padding.
    pub total_len: u16,
    /// Bytes of header and options: 20 to 60.
    pub header_len: u8,
    /// Whether DF is set.
    pub dont_fragment: bool,
    /// Whether it is a fragment.
    pub fragment: Fragment,
    /// What follows.
    pub proto: IpProto,
}

/// Whether an IP packet is a fragment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fragment {
    /// It is whole. An IPv6 packet with a fragment header that says so is whole too (RFC 6946).
    #[default]
    No,
    /// The first, with the transport's header, and more to follow.
    First,
    /// A later one, which begins at this byte of the payload. It has no transport header.
    Later(u16),
}

impl Fragment {
    #[inline(always)]
    pub(crate) fn new(offset: u16, more: bool) -> Self {
        match (offset, more) {
            (0, false) => Self::No,
            (0, true) => Self::First,
            (offset, _) => Self::Later(offset),
        }
    }
}

/// An ARP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arp {
    /// One of [`spec::arp_op`](crate::spec::arp_op), or another.
    pub op: u16,
    /// The sender's address on the link; it need not be the frame's source.
    pub sender_mac: Mac,
    /// The sender's IPv4 address.
    pub sender_ip: Ipv4Addr,
    /// The target's address on the link: of no meaning in a request.
    pub target_mac: Mac,
    /// The target's IPv4 address.
    pub target_ip: Ipv4Addr,
}

/// What an IP packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L4 {
    /// The frame has no IP packet.
    None,
    /// A later fragment: its first bytes are in the middle of something.
    Fragment,
    /// TCP.
    Tcp(Tcp),
    /// UDP.
    Udp(Udp),
    /// ICMP in IPv4.
    Icmp(Icmp),
    /// ICMPv6 in IPv6.
    Icmpv6(Icmp),
    /// Another protocol, which the IP header names.
    Other,
    /// A fault in extension headers or in the transport's header. The IP header is good.
    Malformed(Malformed),
}

/// A TCP header.
///
/// Eight bytes, aligned, as all that [`L4`] carries: it is moved in one register. In odd pieces each move would wait for the stores before it, a quarter of the time that a
/// frame takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(align(8))]
pub struct Tcp {
    /// Source port.
    pub src: u16,
    /// Destination port.
    pub dst: u16,
    /// Bytes of header and options: 20 to 60, inside of the packet.
    pub header_len: u8,
    /// Flags: [`spec::tcp`](crate::spec::tcp).
    pub flags: u8,
}

/// A UDP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(align(8))]
pub struct Udp {
    /// Source port.
    pub src: u16,
    /// Destination port.
    pub dst: u16,
    /// Bytes of header and payload: at least 8, and inside of a packet that is whole. In a first fragment it is the length of all of them.
    pub len: u16,
    /// The checksum as it came; 0 says that there is none.
    pub checksum: u16,
}

/// The begin of an ICMP message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(align(8))]
pub struct Icmp {
    /// Type.
    pub kind: u8,
    /// Code.
    pub code: u8,
}

impl Frame {
    /// Where IP, ARP or whatever else begins.
    #[inline]
    pub const fn l3_offset(&self) -> usize {
        self.l2.header_len()
    }

    /// Where what IP carries begins; `None` without a good IP header. With extension headers at fault, it is where the fault is.
    #[inline]
    pub fn l4_offset(&self) -> Option<usize> {
        let headers = match &self.l3 {
            L3::Ipv4(ip) => usize::from(ip.header_len),
            L3::Ipv6(ip) => usize::from(ip.headers_len),
            _ => return None,
        };
        Some(self.l3_offset() + headers)
    }

    /// Where the IP packet ends; at most the frame's length, and what comes after is padding. `None` without a good IP header.
    #[inline]
    pub fn l3_end(&self) -> Option<usize> {
        let len = match &self.l3 {
            L3::Ipv4(ip) => usize::from(ip.total_len),
            L3::Ipv6(ip) => ip.total_len(),
            _ => return None,
        };
        Some(self.l3_offset() + len)
    }

    /// What IP carries, also where it is malformed or in a later fragment.
    #[inline]
    pub fn proto(&self) -> Option<IpProto> {
        match &self.l3 {
            L3::Ipv4(ip) => Some(ip.proto),
            L3::Ipv6(ip) => Some(ip.proto),
            _ => None,
        }
    }

    /// Whether the IP packet is a fragment.
    #[inline]
    pub fn fragment(&self) -> Fragment {
        match &self.l3 {
            L3::Ipv4(ip) => ip.fragment,
            L3::Ipv6(ip) => ip.fragment,
            _ => Fragment::No,
        }
    }
}

/// Reads all that a frame's headers say.
///
/// `head` is the frame's first bytes, 256 if there are so many; `len` the whole frame's length in bytes.
/// Checksums are not looked at: see [`checksum`](crate::checksum).
///
/// # Errors
/// Those of [`parse_l2`](crate::parse_l2): without a destination, a frame cannot be switched. What is wrong further in is told by [`L3::Malformed`] and [`L4::Malformed`].
#[inline]
pub fn parse(head: &[u8], len: usize) -> Result<Frame, Malformed> {
    let mut frame = None;
    parse_into(head, len, &mut frame).copied()
}

/// As [`parse`], with the result put where it is to stay: each field is written once. A copy of a result that has just been written, in other pieces than it was
/// written in, waits for the writes, and costs more than all the rest.
///
/// # Errors
/// Those of [`parse`]; then `to` is empty.
#[inline]
pub fn parse_into<'a>(
    head: &[u8],
    len: usize,
    to: &'a mut Option<Frame>,
) -> Result<&'a Frame, Malformed> {
    let window = Window::new(head, len);
    *to = None;
    let header: &EthernetHeader = window.get(0, Malformed::Ethernet)?;
    let mut l2 = L2 {
        macs: header.macs,
        tags: Tags::NONE,
        ethertype: EtherType(header.ethertype.get()),
    };
    if l2.ethertype.is_vlan() {
        (l2.tags, l2.ethertype) = tags(&window, l2.ethertype)?;
    }
    let frame = to.insert(Frame {
        l2,
        l3: L3::Other,
        l4: L4::None,
    });
    match frame.l2.ethertype {
        EtherType::IPV4 => ipv4(&window, frame),
        EtherType::IPV6 => ipv6::parse(&window, frame),
        EtherType::ARP => frame.l3 = arp(&window, frame.l3_offset()),
        _ => {}
    }
    Ok(frame)
}

/// The header with its lengths: its own, and that of the packet.
#[inline(always)]
fn ipv4_header<'a>(window: &Window<'a>, at: usize) -> Result<(&'a Ipv4Header, u8, u16), Malformed> {
    let header: &Ipv4Header = window.get(at, Malformed::IpHeader)?;
    if header.version_ihl >> 4 != 4 {
        return Err(Malformed::IpVersion);
    }
    let header_len = (header.version_ihl & 0xf) * 4;
    let total_len = header.total_len.get();
    // RFC 791 §3.1. `at` lies in the frame, so nothing overflows.
    if usize::from(header_len) < Ipv4Header::LEN || at + usize::from(header_len) > window.end() {
        return Err(Malformed::IpHeaderLength);
    }
    if total_len < u16::from(header_len) {
        return Err(Malformed::IpLengthBelowHeader);
    }
    if at + usize::from(total_len) > window.end() {
        return Err(Malformed::IpLengthPastEnd);
    }
    // The whole packet has 65,535 bytes at most, its header among them (RFC 791 §3.1).
    let offset = (header.fragment.get() & IPV4_OFFSET) * 8;
    if offset.checked_add(total_len).is_none() {
        return Err(Malformed::FragmentPastEnd);
    }
    Ok((header, header_len, total_len))
}

#[inline(always)]
fn ipv4(window: &Window<'_>, frame: &mut Frame) {
    let at = frame.l3_offset();
    let (header, header_len, total_len) = match ipv4_header(window, at) {
        Ok(header) => header,
        Err(cause) => return frame.l3 = L3::Malformed(cause),
    };
    let bits = header.fragment.get();
    let fragment = Fragment::new((bits & IPV4_OFFSET) * 8, bits & IPV4_MF != 0);
    let proto = IpProto(header.proto);
    frame.l3 = L3::Ipv4(Ipv4 {
        src: Ipv4Addr::from(header.src),
        dst: Ipv4Addr::from(header.dst),
        tos: header.tos,
        ttl: header.ttl,
        total_len,
        header_len,
        dont_fragment: bits & IPV4_DF != 0,
        fragment,
        proto,
    });
    let window = window.until(at + usize::from(total_len));
    let at = at + usize::from(header_len);
    match proto {
        _ if matches!(fragment, Fragment::Later(_)) => frame.l4 = L4::Fragment,
        IpProto::ICMP => frame.l4 = icmp(&window, at).map_or_else(L4::Malformed, L4::Icmp),
        proto => transport(&window, at, proto, fragment, &mut frame.l4),
    }
}

#[inline]
fn arp(window: &Window<'_>, at: usize) -> L3 {
    let arp: &ArpPacket = match window.get(at, Malformed::ArpPacket) {
        Ok(arp) => arp,
        Err(cause) => return L3::Malformed(cause),
    };
    let kind = (arp.hardware.get(), EtherType(arp.protocol.get()));
    let lens = (arp.hardware_len, arp.protocol_len);
    if kind != (ARP_ETHERNET, EtherType::IPV4) || lens != (6, 4) {
        return L3::Malformed(Malformed::ArpKind);
    }
    L3::Arp(Arp {
        op: arp.op.get(),
        sender_mac: arp.sender_mac,
        sender_ip: Ipv4Addr::from(arp.sender_ip),
        target_mac: arp.target_mac,
        target_ip: Ipv4Addr::from(arp.target_ip),
    })
}

/// What both versions of IP carry in the same way. `window` ends with the packet.
#[inline(always)]
pub(crate) fn transport(
    window: &Window<'_>,
    at: usize,
    proto: IpProto,
    fragment: Fragment,
    to: &mut L4,
) {
    match proto {
        IpProto::TCP => match tcp(window, at) {
            Ok(tcp) => *to = L4::Tcp(tcp),
            Err(cause) => *to = L4::Malformed(cause),
        },
        IpProto::UDP => match udp(window, at, fragment) {
            Ok(udp) => *to = L4::Udp(udp),
            Err(cause) => *to = L4::Malformed(cause),
        },
        _ => *to = L4::Other,
    }
}

#[inline(always)]
fn tcp(window: &Window<'_>, at: usize) -> Result<Tcp, Malformed> {
    let tcp: &TcpHeader = window.get(at, Malformed::TransportHeader)?;
    let header_len = (tcp.offset >> 4) * 4;
    // Of a first fragment too: one that does not hold the whole header hides it from filters (RFC 1858 §3, RFC 7112 §5).
    if usize::from(header_len) < TcpHeader::LEN || usize::from(header_len) > window.end() - at {
        return Err(Malformed::TcpHeaderLength);
    }
    Ok(Tcp {
        src: tcp.src.get(),
        dst: tcp.dst.get(),
        header_len,
        flags: tcp.flags,
    })
}

#[inline(always)]
fn udp(window: &Window<'_>, at: usize, fragment: Fragment) -> Result<Udp, Malformed> {
    let udp: &UdpHeader = window.get(at, Malformed::TransportHeader)?;
    let len = udp.len.get();
    // The first of several fragments has the length of all. Bytes after the datagram are legal (RFC 768 does not forbid them).
    let past = fragment == Fragment::No && usize::from(len) > window.end() - at;
    if usize::from(len) < UdpHeader::LEN || past {
        return Err(Malformed::UdpLength);
    }
    Ok(Udp {
        src: udp.src.get(),
        dst: udp.dst.get(),
        len,
        checksum: udp.checksum.get(),
    })
}

#[inline(always)]
pub(crate) fn icmp(window: &Window<'_>, at: usize) -> Result<Icmp, Malformed> {
    let icmp: &IcmpHeader = window.get(at, Malformed::TransportHeader)?;
    Ok(Icmp {
        kind: icmp.kind,
        code: icmp.code,
    })
}
