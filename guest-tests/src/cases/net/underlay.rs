//! What is between cards: network namespaces and a cable; on a machine that allows none, addresses of its loopback, and less is shown.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

use anyhow::Result;
use bluff_qemu::namespace::{Cable, Entrance};

use crate::card::Tunnel;

/// The network's number.
pub(super) const VNI: u32 = 5001;

/// Kinds of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    Ipv4,
    Ipv6,
}

/// Card 0 is at one end, all others are at the other.
pub(super) enum Underlay {
    Cable(Box<Cable>),
    /// With a port that nobody else has.
    Loopback(u16),
}

impl Underlay {
    pub(super) fn new() -> Result<Self> {
        let addresses: [&[&str]; 2] = [
            &["10.0.0.1/24", "fd00::1/64"],
            &["10.0.0.2/24", "10.0.0.3/24", "fd00::2/64", "fd00::3/64"],
        ];
        match Cable::new(addresses) {
            Ok(cable) => Ok(Self::Cable(Box::new(cable))),
            Err(error) => {
                eprintln!("no network namespaces here, so IPv4 and the loopback alone: {error:#}");
                let socket = UdpSocket::bind((Ipv4Addr::new(127, 0, 0, 2), 0))?;
                Ok(Self::Loopback(socket.local_addr()?.port()))
            }
        }
    }

    /// Where a card is to be.
    pub(super) fn place(&self, card: u8) -> Option<Entrance> {
        match self {
            Self::Cable(cable) => Some(cable.ends[usize::from(card.min(1))].entrance()),
            Self::Loopback(_) => None,
        }
    }

    /// Whether it has such addresses.
    pub(super) fn has(&self, family: Family) -> bool {
        matches!(self, Self::Cable(_)) || family == Family::Ipv4
    }

    /// A card's address.
    pub(super) fn vtep(&self, family: Family, card: u8) -> IpAddr {
        match (self, family) {
            (Self::Cable(_), Family::Ipv4) => Ipv4Addr::new(10, 0, 0, card + 1).into(),
            (Self::Cable(_), Family::Ipv6) => {
                Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, u16::from(card) + 1).into()
            }
            (Self::Loopback(_), _) => Ipv4Addr::new(127, 0, 0, card + 2).into(),
        }
    }

    /// A card's way to the others of so many.
    pub(super) fn tunnel(&self, kind: &'static str, family: Family, card: u8, cards: u8) -> Tunnel {
        let others = (0..cards).filter(|other| *other != card);
        Tunnel {
            kind,
            vni: VNI,
            vtep: self.vtep(family, card),
            vteps: others.map(|other| self.vtep(family, other)).collect(),
            port: match self {
                Self::Cable(_) => None,
                Self::Loopback(port) => Some(*port),
            },
        }
    }
}
