//! IPv6 and its extension headers (RFC 8200 §4).

use core::net::Ipv6Addr;

use crate::frame::{Fragment, Frame, L3, L4, icmp, transport};
use crate::spec::{IPV6_MF, IPV6_OFFSET, Ipv6Extension, Ipv6Fragment, Ipv6Header};
use crate::window::Window;
use crate::{IpProto, Malformed};

/// Extension headers that are followed. A packet that keeps RFC 8200 §4.1 has seven at most.
pub const MAX_EXTENSIONS: usize = 8;

/// An IPv6 header and its extension headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv6 {
    /// Source.
    pub src: Ipv6Addr,
    /// Destination of this hop; see [`Extensions::ROUTED`].
    pub dst: Ipv6Addr,
    /// DSCP (6 bits), ECN (2).
    pub traffic_class: u8,
    /// Flow label: 20 bits.
    pub flow_label: u32,
    /// Hops left.
    pub hop_limit: u8,
    /// Bytes after the first 40, inside of the frame. What the frame has beyond is padding.
    pub payload_len: u16,
    /// Bytes of the header and all extension headers; with a fault among them, those before it.
    pub headers_len: u16,
    /// Which extension headers there are.
    pub extensions: Extensions,
    /// Whether it is a fragment.
    pub fragment: Fragment,
    /// What follows the extension headers; with a fault among them, the one at fault. In a later fragment, what its fragment header names.
    pub proto: IpProto,
    /// Where the frame has a home address (RFC 6275 §6.3), in bytes from its beginning; 0 if nowhere.
    pub(crate) home: u16,
    /// The same, of the address in a routing header of type 2 (RFC 6275 §6.4).
    pub(crate) route: u16,
}

impl Ipv6 {
    /// Bytes of header and payload.
    #[inline]
    pub const fn total_len(&self) -> usize {
        Ipv6Header::LEN + self.payload_len as usize
    }

    /// Whether source and destination of the pseudo header are those of the IPv6 header: no home address (RFC 6275 §6.3), no segments left (RFC 8200 §8.1).
    #[inline]
    pub const fn addresses_are_final(&self) -> bool {
        self.home == 0 && !self.extensions.has(Extensions::ROUTED)
    }
}

/// A set of extension headers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extensions(u8);

impl Extensions {
    /// None.
    pub const NONE: Self = Self(0);
    /// Hop-by-hop options.
    pub const HOP_BY_HOP: Self = Self(1);
    /// A routing header.
    pub const ROUTING: Self = Self(2);
    /// A fragment header.
    pub const FRAGMENT: Self = Self(4);
    /// Destination options.
    pub const DEST_OPTIONS: Self = Self(8);
    /// An authentication header.
    pub const AH: Self = Self(16);
    /// A routing header with segments left: the packet's destination is not yet its last.
    pub const ROUTED: Self = Self(32);

    /// Whether all of `others` are among these.
    #[inline]
    pub const fn has(self, others: Self) -> bool {
        self.0 & others.0 == others.0
    }

    /// Whether there is none.
    #[inline]
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }

    fn add(&mut self, others: Self) {
        self.0 |= others.0;
    }
}

/// The header, and the length after it.
#[inline(always)]
fn header<'a>(window: &Window<'a>, at: usize) -> Result<(&'a Ipv6Header, u16), Malformed> {
    let header: &Ipv6Header = window.get(at, Malformed::IpHeader)?;
    if header.version_class_flow.get() >> 28 != 6 {
        return Err(Malformed::IpVersion);
    }
    // A length of 0 is that: jumbograms (RFC 2675) do not pass an Ethernet of 64 KiB frames.
    let payload_len = header.payload_len.get();
    if at + Ipv6Header::LEN + usize::from(payload_len) > window.end() {
        return Err(Malformed::IpLengthPastEnd);
    }
    Ok((header, payload_len))
}

#[inline(always)]
pub(crate) fn parse(window: &Window<'_>, frame: &mut Frame) {
    let start = frame.l3_offset();
    let (header, payload_len) = match header(window, start) {
        Ok(header) => header,
        Err(cause) => return frame.l3 = L3::Malformed(cause),
    };
    let window = window.until(start + Ipv6Header::LEN + usize::from(payload_len));
    let mut chain = Chain::new(IpProto(header.next));
    let fault = if is_extension(chain.proto) {
        walk(&window, start, &mut chain).err()
    } else {
        None
    };
    let word = header.version_class_flow.get();
    frame.l3 = L3::Ipv6(Ipv6 {
        src: Ipv6Addr::from(header.src),
        dst: Ipv6Addr::from(header.dst),
        traffic_class: (word >> 20) as u8,
        flow_label: word & 0xf_ffff,
        hop_limit: header.hop_limit,
        payload_len,
        headers_len: chain.len,
        extensions: chain.extensions,
        fragment: chain.fragment,
        proto: chain.proto,
        home: chain.home,
        route: chain.route,
    });
    let at = start + usize::from(chain.len);
    match (fault, chain.proto) {
        (Some(cause), _) => frame.l4 = L4::Malformed(cause),
        _ if matches!(chain.fragment, Fragment::Later(_)) => frame.l4 = L4::Fragment,
        (None, IpProto::ICMPV6) => {
            frame.l4 = icmp(&window, at).map_or_else(L4::Malformed, L4::Icmpv6);
        }
        (None, proto) => transport(&window, at, proto, chain.fragment, &mut frame.l4),
    }
}

/// The extension headers that were passed.
struct Chain {
    /// What comes next.
    proto: IpProto,
    /// Bytes so far, from the begin of the IPv6 header.
    len: u16,
    extensions: Extensions,
    fragment: Fragment,
    home: u16,
    route: u16,
}

impl Chain {
    #[inline(always)]
    fn new(proto: IpProto) -> Self {
        Self {
            proto,
            len: Ipv6Header::LEN as u16,
            extensions: Extensions::NONE,
            fragment: Fragment::No,
            home: 0,
            route: 0,
        }
    }
}

#[inline(always)]
fn is_extension(proto: IpProto) -> bool {
    matches!(
        proto,
        IpProto::HOP_BY_HOP
            | IpProto::ROUTING
            | IpProto::FRAGMENT
            | IpProto::DEST_OPTIONS
            | IpProto::AH
    )
}

/// Follows the chain from `chain.proto` on. What was passed is in `chain`, also where it ends with a fault.
#[cold]
fn walk(window: &Window<'_>, start: usize, chain: &mut Chain) -> Result<(), Malformed> {
    for index in 0..=MAX_EXTENSIONS {
        if !is_extension(chain.proto) || matches!(chain.fragment, Fragment::Later(_)) {
            return Ok(());
        }
        if index == MAX_EXTENSIONS {
            break;
        }
        if chain.proto == IpProto::HOP_BY_HOP && index > 0 {
            return Err(Malformed::HopByHopNotFirst);
        }
        let at = start + usize::from(chain.len);
        let (next, len) = if chain.proto == IpProto::FRAGMENT {
            fragment(window, at, chain)?
        } else {
            extension(window, at, chain)?
        };
        // At most 8 headers of 2,048 bytes.
        chain.len += len;
        chain.proto = next;
    }
    Err(Malformed::ExtensionChain)
}

fn fragment(
    window: &Window<'_>,
    at: usize,
    chain: &mut Chain,
) -> Result<(IpProto, u16), Malformed> {
    let header: &Ipv6Fragment = window.get(at, Malformed::ExtensionPastEnd)?;
    if chain.extensions.has(Extensions::FRAGMENT) {
        return Err(Malformed::SecondFragmentHeader);
    }
    let bits = header.fragment.get();
    let offset = bits & IPV6_OFFSET;
    // What follows this header; the whole payload has 65,535 bytes at most (RFC 8200 §4.5).
    let len = window.end() - at - Ipv6Fragment::LEN;
    if usize::from(offset) + len > usize::from(u16::MAX) {
        return Err(Malformed::FragmentPastEnd);
    }
    chain.extensions.add(Extensions::FRAGMENT);
    chain.fragment = Fragment::new(offset, bits & IPV6_MF != 0);
    Ok((IpProto(header.next), Ipv6Fragment::LEN as u16))
}

fn extension(
    window: &Window<'_>,
    at: usize,
    chain: &mut Chain,
) -> Result<(IpProto, u16), Malformed> {
    let header: &Ipv6Extension = window.get(at, Malformed::ExtensionPastEnd)?;
    let words = u16::from(header.len);
    let len = match chain.proto {
        // In words of four bytes, less two, and 12 bytes are fixed (RFC 4302 §2.2).
        IpProto::AH if words == 0 => return Err(Malformed::ExtensionLength),
        IpProto::AH => (words + 2) * 4,
        _ => (words + 1) * 8,
    };
    if usize::from(len) > window.end() - at {
        return Err(Malformed::ExtensionPastEnd);
    }
    let kind = match chain.proto {
        IpProto::HOP_BY_HOP => Extensions::HOP_BY_HOP,
        IpProto::AH => Extensions::AH,
        IpProto::DEST_OPTIONS => {
            if chain.home == 0 {
                chain.home = home_address(window, at, usize::from(len));
            }
            Extensions::DEST_OPTIONS
        }
        _ => {
            if header.segments_left > 0 {
                chain.extensions.add(Extensions::ROUTED);
            }
            // RFC 6275 §6.4.1: always 24 bytes; the address begins at the eighth.
            if header.routing_type == 2 && len == 24 && chain.route == 0 {
                chain.route = u16::try_from(at + 8).unwrap_or(0);
            }
            Extensions::ROUTING
        }
    };
    chain.extensions.add(kind);
    Ok((IpProto(header.next), len))
}

/// Where the header of `len` bytes at `at` has a home address option; 0 if it has none, or lies past what is at hand. Options that do
/// not add up are for the receiver to refuse (RFC 8200 §4.2).
fn home_address(window: &Window<'_>, at: usize, len: usize) -> u16 {
    const PAD1: u8 = 0;
    const HOME_ADDRESS: u8 = 0xc9;
    let Ok(bytes) = window.bytes(at, len, Malformed::ExtensionPastEnd) else {
        return 0;
    };
    let mut option = 2;
    while let Some(&kind) = bytes.get(option) {
        if kind == PAD1 {
            option += 1;
            continue;
        }
        let Some(&data) = bytes.get(option + 1) else {
            break;
        };
        if kind == HOME_ADDRESS && data == 16 && option + 18 <= len {
            return u16::try_from(at + option + 2).unwrap_or(0);
        }
        option += 2 + usize::from(data);
    }
    0
}
