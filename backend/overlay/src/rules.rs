//! What a port may send: nobody takes a neighbour's address.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use bluff_net::Cause;
use bluff_packet::{Arp, EtherType, Frame as Packet, L3, L4, Mac, ndp};

/// Addresses that begin alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    address: IpAddr,
    len: u8,
}

/// Why text is no prefix.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no address with a prefix length, as 192.0.2.0/24 or 2001:db8::/32")]
pub struct BadPrefix(String);

impl FromStr for Prefix {
    type Err = BadPrefix;

    /// An address, and the length that may be left out.
    fn from_str(text: &str) -> Result<Self, BadPrefix> {
        let bad = || BadPrefix(text.into());
        let (address, len) = match text.split_once('/') {
            Some((address, len)) => (address, Some(len)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| bad())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let len = match len {
            Some(len) => len.parse().ok().filter(|l| *l <= most).ok_or_else(bad)?,
            None => most,
        };
        Ok(Self { address, len })
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.len)
    }
}

impl Prefix {
    fn has_v4(&self, address: Ipv4Addr) -> bool {
        let IpAddr::V4(own) = self.address else {
            return false;
        };
        let mask = u32::MAX.checked_shl(32 - u32::from(self.len)).unwrap_or(0);
        (own.to_bits() ^ address.to_bits()) & mask == 0
    }

    fn has_v6(&self, address: Ipv6Addr) -> bool {
        let IpAddr::V6(own) = self.address else {
            return false;
        };
        let mask = u128::MAX
            .checked_shl(128 - u32::from(self.len))
            .unwrap_or(0);
        (own.to_bits() ^ address.to_bits()) & mask == 0
    }
}

/// What a port may send.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Its address on the link. `None`: any, and what it uses is learnt.
    pub mac: Option<Mac>,
    /// Its IP addresses. `None`: any; frames that are neither IP nor ARP pass too.
    pub allowed: Option<Vec<Prefix>>,
    /// The VLAN that it is in: its frames have no tag, and get this one. `None`: tags pass.
    pub vlan: Option<u16>,
}

impl Rules {
    /// Whether a frame may be sent, whose first bytes are `head`.
    ///
    /// # Errors
    /// Why not.
    #[inline]
    pub fn check(&self, packet: &Packet, head: &[u8]) -> Result<(), Cause> {
        let source = packet.l2.src();
        if source.is_multicast() {
            return Err(Cause::Malformed);
        }
        if self.mac.is_some_and(|mac| mac != source) {
            return Err(Cause::Spoofed);
        }
        if self.vlan.is_some() && !packet.l2.tags.as_slice().is_empty() {
            return Err(Cause::Vlan);
        }
        if self.mac.is_none() && self.allowed.is_none() {
            return Ok(());
        }
        self.check_addresses(packet, head)
    }

    fn check_addresses(&self, packet: &Packet, head: &[u8]) -> Result<(), Cause> {
        let spoofed = |good: bool| if good { Ok(()) } else { Err(Cause::Spoofed) };
        match &packet.l3 {
            // It says that it is IP or ARP, and a receiver may read it otherwise than we do.
            L3::Malformed(_) => Err(Cause::Malformed),
            L3::Arp(arp) => spoofed(self.may_arp(arp)),
            L3::Ipv4(ip) => {
                // A station that has no address yet asks for one (RFC 2131 §4.1).
                let asks = ip.src.is_unspecified()
                    && matches!(&packet.l4, L4::Udp(udp) if (udp.src, udp.dst) == (68, 67));
                spoofed(asks || self.has_v4(ip.src))
            }
            L3::Ipv6(ip) => {
                // Before it has an address it may only look whether it is free, and report groups (RFC 4862 §5.4, RFC 3810 §5.2.13).
                let asks = ip.src.is_unspecified() && matches!(packet.l4, L4::Icmpv6(_));
                spoofed(asks || self.has_v6(ip.src))?;
                let Some(message) = ndp::parse(packet, head).map_err(|_| Cause::Malformed)? else {
                    return Ok(());
                };
                let link = message.link_layer;
                spoofed(self.mac.is_none() || link.is_none() || link == self.mac)?;
                spoofed(!message.advertisement || self.has_v6(message.target))
            }
            // Neither IP nor ARP.
            L3::Other => spoofed(self.allowed.is_none() || self.is_announcement(packet, head)),
        }
    }

    /// A VMM, or the card, tells the network where a station is now: a request of RARP that has no IP address in it (RFC 903). It says nothing
    /// but the station's own address.
    fn is_announcement(&self, packet: &Packet, head: &[u8]) -> bool {
        let Some(Mac(mac)) = self.mac else {
            return false;
        };
        let at = packet.l3_offset();
        let body = head.get(at..at + 28);
        let says = |body: &[u8]| {
            body[..8] == [0, 1, 8, 0, 6, 4, 0, 3]
                && (&body[8..14], &body[18..24]) == (&mac[..], &mac[..])
                && (&body[14..18], &body[24..28]) == (&[0; 4][..], &[0; 4][..])
        };
        packet.l2.ethertype == EtherType::RARP && body.is_some_and(says)
    }

    fn may_arp(&self, arp: &Arp) -> bool {
        // A probe asks whether an address is free, and has no sender (RFC 5227 §2.1.1).
        let sender = arp.sender_ip.is_unspecified() || self.has_v4(arp.sender_ip);
        sender && self.mac.is_none_or(|mac| mac == arp.sender_mac)
    }

    fn has_v4(&self, address: Ipv4Addr) -> bool {
        let all = self.allowed.as_ref();
        all.is_none_or(|all| all.iter().any(|p| p.has_v4(address)))
    }

    fn has_v6(&self, address: Ipv6Addr) -> bool {
        let Some(all) = &self.allowed else {
            return true;
        };
        // Its own address on the link, made of its MAC address, is always its own.
        let own = self.mac.is_some_and(|mac| link_local(mac) == address);
        own || all.iter().any(|p| p.has_v6(address))
    }
}

/// The link-local address that follows from a MAC address (RFC 4291 §2.5.6 and appendix A).
fn link_local(mac: Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.0;
    let pair = |x: u8, y: u8| u16::from_be_bytes([x, y]);
    Ipv6Addr::new(
        0xfe80,
        0,
        0,
        0,
        pair(a ^ 2, b),
        pair(c, 0xff),
        pair(0xfe, d),
        pair(e, f),
    )
}
