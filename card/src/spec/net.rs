//! Networks, and the ports that functions have in them.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use bluff_overlay::Prefix;
use bluff_packet::Mac;
use serde::{Deserialize, Serialize};

/// The highest VNI: it has 24 bits (RFC 7348 §5, RFC 8926 §3.4).
pub const VNI_MAX: u32 = 0xff_ffff;
/// Bytes of a network's longest IP packet. Less than IPv6 needs (RFC 8200 §5) is no network; more than jumbo frames no tunnel carries.
pub const MTU: std::ops::RangeInclusive<u16> = 1280..=9216;
/// The MTU of a network without a tunnel, where it does not say.
pub const MTU_LOCAL: u16 = 1500;
/// That of a network with one: what is left of 1500 over any underlay.
pub const MTU_TUNNEL: u16 = 1450;
/// Most VTEPs of a network: a flooded frame is sent to each.
pub const VTEPS_MAX: usize = 1024;
/// Most static addresses of a network, and prefixes of a port: a specification has to fit into one message.
pub const LIST_MAX: usize = 512;
/// Most pairs of queues of a network function.
pub const PAIRS_MAX: u16 = bluff_virtio_net::PAIRS_MAX;

words! {
    /// How frames are wrapped for other cards.
    Tunnel {
        /// RFC 7348.
        Vxlan = "vxlan",
        /// RFC 8926.
        Geneve = "geneve",
    }
}

words! {
    /// What carries tunnels.
    Underlay {
        /// What this card can do best.
        Auto = "auto",
        /// The kernel's UDP sockets.
        Udp = "udp",
    }
}

/// Most pairs of a function whose control queue comes to the card: vhost-user can name 256 queues (`SET_VRING_KICK`), and the control queue is the last.
pub const PAIRS_CONTROLLED_MAX: u16 = 127;

/// A value that is written as text, as people write it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Text<T>(pub T);

impl<T: fmt::Display> Serialize for Text<T> {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&self.0)
    }
}

impl<'de, T: FromStr<Err: fmt::Display>> Deserialize<'de> for Text<T> {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        text.parse().map(Self).map_err(serde::de::Error::custom)
    }
}

impl<T: fmt::Display> fmt::Display for Text<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<T: fmt::Display> fmt::Debug for Text<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An address that is behind a VTEP for good.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdbSpec {
    /// The address.
    pub mac: Text<Mac>,
    /// Where it is: one of the network's VTEPs.
    pub vtep: IpAddr,
    /// Its VLAN, if frames for it have a tag.
    #[serde(default)]
    pub vlan: Option<u16>,
}

/// How a network reaches other cards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelSpec {
    /// How frames are wrapped.
    pub kind: Tunnel,
    /// This card's address.
    pub vtep: IpAddr,
    /// The other cards'.
    pub vteps: Vec<IpAddr>,
    /// What carries it.
    pub underlay: Underlay,
    /// The UDP port of all VTEPs; left out: the one that is registered for the tunnel.
    #[serde(default)]
    pub port: Option<u16>,
    /// Addresses that are not learnt.
    #[serde(default)]
    pub fdb: Vec<FdbSpec>,
}

impl TunnelSpec {
    /// The UDP port of all VTEPs.
    pub fn port(&self) -> u16 {
        self.port.unwrap_or(match self.kind {
            Tunnel::Vxlan => bluff_overlay::udp::TunnelKind::Vxlan.port(),
            Tunnel::Geneve => bluff_overlay::udp::TunnelKind::Geneve.port(),
        })
    }
}

/// A network: a tenant's Ethernet segment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSpec {
    /// Its number (VNI), the same on all cards; there where it has a tunnel.
    #[serde(default)]
    pub vni: Option<u32>,
    /// Bytes of its longest IP packet.
    pub mtu: u16,
    /// How it reaches other cards; left out: it does not.
    #[serde(default)]
    pub tunnel: Option<TunnelSpec>,
}

impl NetworkSpec {
    /// Whether frames of two networks, as they come from other cards, could not be told apart.
    pub fn is_same_segment(&self, other: &Self) -> bool {
        let place = |n: &Self| {
            let tunnel = n.tunnel.as_ref()?;
            Some((tunnel.kind, tunnel.vtep, tunnel.port(), n.vni))
        };
        self.tunnel.is_some() && place(self) == place(other)
    }
}

/// How much a port may carry; what is left out is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LimitSpec {
    /// Bits that it may send in a second.
    pub tx: Option<u64>,
    /// Bits that it may receive in a second.
    pub rx: Option<u64>,
    /// Frames that it may send in a second.
    pub tx_pps: Option<u64>,
    /// Frames that it may receive in a second.
    pub rx_pps: Option<u64>,
}

/// A function's port of its network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortSpec {
    /// The function's address; left out: one made of the card's identity and the function's ID.
    #[serde(default)]
    pub mac: Option<Text<Mac>>,
    /// The IP addresses that it may use; left out: any.
    #[serde(default)]
    pub allowed: Option<Vec<Text<Prefix>>>,
    /// How much it may carry.
    #[serde(default)]
    pub limit: LimitSpec,
    /// The VLAN that it is in; left out: tags pass.
    #[serde(default)]
    pub vlan: Option<u16>,
    /// Its front end hands the control queue over: what only a control queue sets is offered.
    #[serde(default)]
    pub control_queue: bool,
    /// An operator has pulled the cable out. It is no part of the configuration.
    #[serde(default)]
    pub unplugged: bool,
}

impl PortSpec {
    /// Whether two ports of one network would have the same address.
    pub fn is_same_station(&self, other: &Self) -> bool {
        self.mac.is_some() && (self.mac, self.vlan) == (other.mac, other.vlan)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_text_in_messages() {
        let port = PortSpec {
            mac: Some(Text("02:00:00:00:00:01".parse().unwrap())),
            allowed: Some(vec![Text("192.168.7.2/32".parse().unwrap())]),
            ..PortSpec::default()
        };
        let text = serde_json::to_string(&port).unwrap();
        assert!(text.contains(r#""mac":"02:00:00:00:00:01","allowed":["192.168.7.2/32"]"#));
        assert_eq!(serde_json::from_str::<PortSpec>(&text).unwrap(), port);
        assert!(serde_json::from_str::<PortSpec>(r#"{"mac":"02:00"}"#).is_err());
        assert_eq!(
            serde_json::from_str::<PortSpec>("{}").unwrap(),
            PortSpec::default()
        );
    }
}
