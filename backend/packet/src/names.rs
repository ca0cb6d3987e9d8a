//! Addresses and numbers that frames carry, each a type of its own. None is an `enum`: any value can come.

use core::fmt;
use core::str::FromStr;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::Malformed;

/// An address on an Ethernet segment.
#[derive(
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(transparent)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// All stations.
    pub const BROADCAST: Self = Self([0xff; 6]);
    /// No address.
    pub const ZERO: Self = Self([0; 6]);

    /// Whether it is a group's: multicast or broadcast. No frame may come *from* such an address (IEEE 802.3 §3.2.4).
    #[inline]
    pub const fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// Whether it is everybody's.
    #[inline]
    pub fn is_broadcast(self) -> bool {
        self == Self::BROADCAST
    }

    /// The six bytes as a number: the first is the highest.
    #[inline]
    pub const fn bits(self) -> u64 {
        let [a, b, c, d, e, f] = self.0;
        u64::from_be_bytes([0, 0, a, b, c, d, e, f])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(to, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, to)
    }
}

/// What is not six bytes in hexadecimal with colons between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a MAC address is six bytes in hexadecimal, like 02:00:00:00:00:01")]
pub struct BadMac;

impl FromStr for Mac {
    type Err = BadMac;

    fn from_str(text: &str) -> Result<Self, BadMac> {
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let part = parts.next().ok_or(BadMac)?;
            // `from_str_radix` takes a sign too.
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(BadMac);
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| BadMac)?;
        }
        match parts.next() {
            None => Ok(Self(mac)),
            Some(_) => Err(BadMac),
        }
    }
}

/// What a frame carries (IEEE 802 numbers).
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EtherType(pub u16);

impl EtherType {
    /// IPv4.
    pub const IPV4: Self = Self(0x0800);
    /// ARP.
    pub const ARP: Self = Self(0x0806);
    /// Reverse ARP, by which VMs are announced after a migration (RFC 903).
    pub const RARP: Self = Self(0x8035);
    /// An Ethernet frame, inside of Geneve or GRE.
    pub const ETHERNET: Self = Self(0x6558);
    /// A customer's VLAN tag (802.1Q).
    pub const VLAN: Self = Self(0x8100);
    /// A service VLAN tag (802.1ad).
    pub const QINQ: Self = Self(0x88a8);
    /// IPv6.
    pub const IPV6: Self = Self(0x86dd);
    /// MPLS.
    pub const MPLS: Self = Self(0x8847);

    /// Whether it is the TPID of a tag that we know.
    #[inline]
    pub fn is_vlan(self) -> bool {
        self == Self::VLAN || self == Self::QINQ
    }

    /// Whether it is a length, so that the frame is one of 802.3 and LLC (IEEE 802.3 §3.2.6).
    #[inline]
    pub fn is_length(self) -> bool {
        self.0 < 0x0600
    }
}

impl fmt::Debug for EtherType {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "EtherType({:#06x})", self.0)
    }
}

impl fmt::Display for EtherType {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{:#06x}", self.0)
    }
}

/// What an IP packet carries (IANA protocol numbers).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IpProto(pub u8);

impl IpProto {
    /// IPv6 hop-by-hop options. In IPv4 the number says nothing.
    pub const HOP_BY_HOP: Self = Self(0);
    /// ICMP of IPv4.
    pub const ICMP: Self = Self(1);
    /// TCP.
    pub const TCP: Self = Self(6);
    /// UDP.
    pub const UDP: Self = Self(17);
    /// IPv6 routing header.
    pub const ROUTING: Self = Self(43);
    /// IPv6 fragment header.
    pub const FRAGMENT: Self = Self(44);
    /// Encapsulating security payload.
    pub const ESP: Self = Self(50);
    /// Authentication header.
    pub const AH: Self = Self(51);
    /// ICMPv6.
    pub const ICMPV6: Self = Self(58);
    /// IPv6: nothing follows.
    pub const NONE: Self = Self(59);
    /// IPv6 destination options.
    pub const DEST_OPTIONS: Self = Self(60);
}

impl fmt::Display for IpProto {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{}", self.0)
    }
}

/// The number of a tenant's network: 24 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vni(u32);

impl Vni {
    /// The largest one.
    pub const MAX: Self = Self(0xff_ffff);

    /// `None` for a number of more than 24 bits.
    #[inline]
    pub const fn new(vni: u32) -> Option<Self> {
        if vni <= Self::MAX.0 {
            Some(Self(vni))
        } else {
            None
        }
    }

    /// Of a header's last word: 24 bits, then eight that are ignored.
    #[inline]
    pub(crate) const fn of_word(word: u32) -> Self {
        Self(word >> 8)
    }

    #[inline]
    pub(crate) const fn word(self) -> u32 {
        self.0 << 8
    }

    /// The number.
    #[inline]
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{}", self.0)
    }
}

impl TryFrom<u32> for Vni {
    type Error = Malformed;

    fn try_from(vni: u32) -> Result<Self, Malformed> {
        Self::new(vni).ok_or(Malformed::Vni)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_address_is_read_and_written() {
        let text = "02:00:5e:10:00:ff";
        let mac: Mac = text.parse().unwrap();
        assert_eq!(mac, Mac([2, 0, 0x5e, 0x10, 0, 0xff]));
        assert_eq!(mac.to_string(), text);
        assert_eq!(mac.bits(), 0x0200_5e10_00ff);
        assert!("FF:ff:Ff:fF:ff:ff".parse::<Mac>().unwrap().is_broadcast());
        for bad in [
            "",
            "02",
            "02:00:5e:10:00",
            "02:00:5e:10:00:ff:00",
            "02:00:5e:10:00:fg",
            "+2:00:5e:10:00:ff",
            "2:00:5e:10:00:ff",
            "02-00-5e-10-00-ff",
            "02:00:5e:10:00:ff ",
            "02:00:5e:10:00:f\u{e9}",
        ] {
            assert_eq!(bad.parse::<Mac>(), Err(BadMac), "{bad}");
        }
    }

    #[test]
    fn groups_are_told_from_stations() {
        assert!(Mac::BROADCAST.is_multicast() && Mac::BROADCAST.is_broadcast());
        let group = Mac([0x33, 0x33, 0, 0, 0, 1]);
        assert!(group.is_multicast() && !group.is_broadcast());
        assert!(!Mac([2, 1, 1, 1, 1, 1]).is_multicast());
    }

    #[test]
    fn a_vni_has_24_bits() {
        assert_eq!(Vni::new(0xff_ffff), Some(Vni::MAX));
        assert_eq!(Vni::new(0x100_0000), None);
        assert_eq!(Vni::try_from(1 << 24), Err(Malformed::Vni));
        assert_eq!(Vni::of_word(0x1234_56aa).get(), 0x12_3456);
        assert_eq!(Vni::new(5001).unwrap().word(), 5001 << 8);
    }
}
