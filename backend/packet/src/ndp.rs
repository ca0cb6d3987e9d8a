//! Neighbour solicitations and advertisements (RFC 4861 §4.3, §4.4), as far as anti-spoofing needs them: who says to be where.

use core::net::Ipv6Addr;

use crate::frame::{Fragment, Frame, L3, L4};
use crate::ipv6::Extensions;
use crate::spec::{NdpLinkLayer, NdpNeighbour, icmp6};
use crate::window::Window;
use crate::{Mac, Malformed};

/// A neighbour message that keeps the rules of RFC 4861 §7.1.1 or §7.1.2, but for its checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ndp {
    /// Whether it tells (an advertisement) or asks.
    pub advertisement: bool,
    /// Whose address is told, or asked for. In a solicitation from `::`, the sender wants this address for itself (RFC 4862 §5.4).
    pub target: Ipv6Addr,
    /// The link-layer address that it binds: in an advertisement to `target`, in a solicitation to the packet's source.
    pub link_layer: Option<Mac>,
}

/// The neighbour message in a frame; `None` if it has none. `head` is what the frame was parsed from.
///
/// # Errors
/// What must not be believed, and so not be forwarded by a port with anti-spoofing: [`Malformed::NdpOrigin`], [`Malformed::NdpLength`],
/// [`Malformed::NdpTwoAddresses`], and [`Malformed::Truncated`] where the options are not all at hand.
pub fn parse(frame: &Frame, head: &[u8]) -> Result<Option<Ndp>, Malformed> {
    let (L3::Ipv6(ip), L4::Icmpv6(icmp)) = (&frame.l3, &frame.l4) else {
        return Ok(None);
    };
    let (advertisement, wanted) = match icmp.kind {
        icmp6::NEIGHBOUR_SOLICITATION => (false, icmp6::OPTION_SOURCE),
        icmp6::NEIGHBOUR_ADVERTISEMENT => (true, icmp6::OPTION_TARGET),
        _ => return Ok(None),
    };
    // RFC 6980 §5: not even in a packet that is whole, but has a fragment header.
    let fragmented = ip.fragment != Fragment::No || ip.extensions.has(Extensions::FRAGMENT);
    if ip.hop_limit != 255 || icmp.code != 0 || fragmented {
        return Err(Malformed::NdpOrigin);
    }
    let (Some(at), Some(end)) = (frame.l4_offset(), frame.l3_end()) else {
        return Ok(None);
    };
    let window = Window::new(head, end);
    let message: &NdpNeighbour = window.get(at, Malformed::NdpLength)?;
    let mut link_layer = None;
    let mut at = at + NdpNeighbour::LEN;
    while at < end {
        let &[kind, units] = window.get::<[u8; 2]>(at, Malformed::NdpLength)?;
        let len = usize::from(units) * 8;
        if len == 0 || len > end - at {
            return Err(Malformed::NdpLength);
        }
        if kind == wanted {
            let option: &NdpLinkLayer = window.get(at, Malformed::NdpLength)?;
            if len != NdpLinkLayer::LEN {
                return Err(Malformed::NdpLength);
            }
            // Receivers differ in which one they take.
            if link_layer.is_some_and(|mac| mac != option.mac) {
                return Err(Malformed::NdpTwoAddresses);
            }
            link_layer = Some(option.mac);
        }
        at += len;
    }
    Ok(Some(Ndp {
        advertisement,
        target: Ipv6Addr::from(message.target),
        link_layer,
    }))
}
