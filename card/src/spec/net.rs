//! Networks, and the ports that functions have in them.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use bluff_overlay::Prefix;
use bluff_packet::Mac;
use serde::{Deserialize, Serialize};

use super::Id;

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

/// What carries tunnels. It is written as text, also in messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Underlay {
    /// What this card can do best.
    Auto,
    /// The kernel's UDP sockets.
    Udp,
    /// A function of this card, of kind `uplink`: whoever has it as a device is the wire.
    Port(Id),
    /// A tap device of this name; left out: of one that the kernel gives.
    Tap(Option<String>),
}

/// Text that is no underlay.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadUnderlay {
    /// Its first word is none.
    #[error("unknown word `{0}`; allowed: `auto`, `udp`, `tap`, `tap:NAME` and `port:FUNCTION`")]
    Word(String),
    /// What follows `port:` is no ID.
    #[error("`port:` is followed by the ID of a function of kind `uplink`")]
    Port,
    /// What follows `tap:` is no name of a device.
    #[error(
        "`tap:` is followed by the name of a device: at most {DEVICE_NAME_MAX} of A-Z, a-z, 0-9, `.`, `_` and `-`, the first one no `.` or `-`"
    )]
    Tap,
}

/// The most bytes of a network device's name (`IFNAMSIZ`, with a closing zero).
pub const DEVICE_NAME_MAX: usize = bluff_net::tap::NAME_MAX;

/// Whether the kernel, and scripts, take it for the name of a network device.
fn is_device_name(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let sound = (1..=DEVICE_NAME_MAX).contains(&name.len()) && name.bytes().all(fits);
    sound && !name.starts_with(['.', '-'])
}

impl FromStr for Underlay {
    type Err = BadUnderlay;

    fn from_str(text: &str) -> Result<Self, BadUnderlay> {
        match text.split_once(':') {
            None if text == "auto" => Ok(Self::Auto),
            None if text == "udp" => Ok(Self::Udp),
            None if text == "tap" => Ok(Self::Tap(None)),
            Some(("tap", name)) if is_device_name(name) => Ok(Self::Tap(Some(name.to_owned()))),
            Some(("tap", _)) => Err(BadUnderlay::Tap),
            Some(("port", id)) => id.parse().map(Self::Port).map_err(|_| BadUnderlay::Port),
            _ => Err(BadUnderlay::Word(text.to_owned())),
        }
    }
}

impl fmt::Display for Underlay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Udp => f.write_str("udp"),
            Self::Port(id) => write!(f, "port:{id}"),
            Self::Tap(None) => f.write_str("tap"),
            Self::Tap(Some(name)) => write!(f, "tap:{name}"),
        }
    }
}

impl Serialize for Underlay {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Underlay {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        text.parse().map_err(serde::de::Error::custom)
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
    /// Who leads to the other VTEPs, where the card has the wire itself; left out: they are all on it.
    #[serde(default)]
    pub gateway: Option<IpAddr>,
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

/// Bytes of the longest packet of an uplink's wire, where it does not say: what a network of 1500 needs over IPv6, with a tag.
pub const MTU_UPLINK: u16 = 1600;
/// Bytes that a tunnel adds to a tenant's packet: the tenant's Ethernet header with a tag, the tunnel's, UDP, and IPv4 or IPv6.
const fn overhead(ipv4: bool) -> u16 {
    14 + 4 + 8 + 8 + if ipv4 { 20 } else { 40 }
}

impl TunnelSpec {
    /// Bytes of the longest packet that the wire has to carry for a network of this MTU.
    pub fn wire_mtu(&self, mtu: u16) -> u16 {
        mtu.saturating_add(overhead(self.vtep.is_ipv4()))
    }

    /// Whether both can go over one wire: a card is one station there.
    pub fn is_same_station(&self, other: &Self) -> bool {
        let station = |t: &Self| (t.kind, t.vtep, t.port(), t.gateway);
        station(self) == station(other)
    }

    /// The uplink that it goes over.
    pub fn uplink(&self) -> Option<&Id> {
        match &self.underlay {
            Underlay::Port(id) => Some(id),
            Underlay::Auto | Underlay::Udp | Underlay::Tap(_) => None,
        }
    }

    /// Whether the card is a station of its own on the way, which has to find the others.
    pub fn has_wire(&self) -> bool {
        match self.underlay {
            Underlay::Port(_) | Underlay::Tap(_) => true,
            Underlay::Auto | Underlay::Udp => false,
        }
    }
}

impl NetworkSpec {
    /// What is wrong with it beside another one, if anything is.
    pub fn mistake_beside(&self, name: &Id, other: &Self) -> Option<String> {
        if other.is_same_segment(self) {
            return Some(format!("network {name} has the same VNI at the same VTEP"));
        }
        let (mine, its) = (self.tunnel.as_ref()?, other.tunnel.as_ref()?);
        // Taps without a name are as many as there are stations.
        let is_one = mine.has_wire() && mine.underlay != Underlay::Tap(None);
        let differs = is_one && its.underlay == mine.underlay && !mine.is_same_station(its);
        differs.then(|| {
            let wire = &mine.underlay;
            format!("network {name} goes over {wire} too, with another tunnel, vtep, port or gateway; a wire has one")
        })
    }

    /// Whether frames of two networks, as they come from other cards, could not be told apart.
    pub fn is_same_segment(&self, other: &Self) -> bool {
        let place = |n: &Self| {
            let tunnel = n.tunnel.as_ref()?;
            Some((tunnel.kind, tunnel.vtep, tunnel.port(), n.vni))
        };
        self.tunnel.is_some() && place(self) == place(other)
    }
}

/// A function that carries tunnels: whoever has it as a device is the wire between this card and others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UplinkSpec {
    /// This card's address on the wire; left out: one made of the card's identity and the function's ID.
    #[serde(default)]
    pub mac: Option<Text<Mac>>,
    /// Bytes of the longest packet on the wire.
    pub mtu: u16,
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
