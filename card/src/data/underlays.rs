//! What carries tunnels: one underlay for all networks of a VTEP.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Weak};

use anyhow::{Context, Result};
use bluff_net::tap::{Carries, Tap, TapOptions};
use bluff_net::{Drops, Offloads};
use bluff_overlay::Network;
use bluff_overlay::udp::{TunnelKind, UdpOptions, UdpUnderlay};
use bluff_overlay::wire::{WireOptions, WireUnderlay};
use bluff_packet::{Mac, Vni};

use super::Data;
use crate::spec::{Id, Text, Tunnel, TunnelSpec, Underlay, UplinkSpec};

/// What tells the kernel's sockets apart.
type UdpKey = (TunnelKind, IpAddr, u16);

/// What tells tap devices apart: the card's station behind them, and their name, if they are given one.
type TapKey = (UdpKey, Option<String>);

/// All underlays.
#[derive(Default)]
pub(super) struct Underlays {
    udp: Vec<(UdpKey, Weak<UdpUnderlay>)>,
    taps: Vec<(TapKey, Weak<TapWire>)>,
    /// By the function that is the wire: there while a network or the function is.
    wires: BTreeMap<Id, Wire>,
}

/// A wire of the card's own. Networks and the function come and go in any order.
struct Wire {
    underlay: Arc<WireUnderlay>,
    /// What this card is there, once a network says so, and how many networks do.
    station: Option<(TunnelSpec, usize)>,
    /// What the function says.
    link: Option<UplinkSpec>,
}

/// A tap device, and the station behind it.
pub(super) struct TapWire {
    underlay: Arc<WireUnderlay>,
    tap: Tap,
}

/// What carries the tunnel of one network.
#[derive(Clone)]
pub(super) enum Carrier {
    Udp(Arc<UdpUnderlay>),
    Wire(Id, Arc<WireUnderlay>),
    Tap(Arc<TapWire>),
}

impl Carrier {
    pub(super) fn underlay(&self) -> Arc<dyn bluff_overlay::Underlay> {
        match self {
            Self::Udp(udp) => udp.clone(),
            Self::Wire(_, wire) => wire.clone(),
            Self::Tap(tap) => tap.underlay.clone(),
        }
    }

    /// Frames of `vni` go to this network from now on, or to none.
    pub(super) fn set_network(&self, vni: Vni, network: Option<Arc<Network>>) {
        match self {
            Self::Udp(udp) => udp.set_network(vni, network),
            Self::Wire(_, wire) => wire.set_network(vni, network),
            Self::Tap(tap) => tap.underlay.set_network(vni, network),
        }
    }

    /// What it is, as the configuration has it.
    pub(super) fn spec(&self) -> Underlay {
        match self {
            Self::Udp(_) => Underlay::Udp,
            Self::Wire(function, _) => Underlay::Port(function.clone()),
            Self::Tap(tap) => Underlay::Tap(Some(tap.tap.name().to_owned())),
        }
    }
}

pub(super) fn tunnel_kind(tunnel: Tunnel) -> TunnelKind {
    match tunnel {
        Tunnel::Vxlan => TunnelKind::Vxlan,
        Tunnel::Geneve => TunnelKind::Geneve,
    }
}

impl Default for Wire {
    fn default() -> Self {
        Self {
            underlay: WireUnderlay::new(station(None, None)),
            station: None,
            link: None,
        }
    }
}

/// What a card is on a wire. As long as one side is missing it is nobody: the unspecified address is nobody's, and nothing is sent to it.
fn station(tunnel: Option<&TunnelSpec>, link: Option<&UplinkSpec>) -> WireOptions {
    let mac = link
        .and_then(|link| link.mac)
        .map_or(Mac::ZERO, |mac| mac.0);
    let mtu = link.map_or(crate::spec::MTU_UPLINK, |link| link.mtu);
    match tunnel {
        Some(tunnel) => WireOptions {
            local: tunnel.vtep,
            mac,
            gateway: tunnel.gateway,
            kind: tunnel_kind(tunnel.kind),
            port: tunnel.port(),
            mtu,
        },
        None => WireOptions {
            local: Ipv4Addr::UNSPECIFIED.into(),
            mac,
            gateway: None,
            kind: TunnelKind::Vxlan,
            port: TunnelKind::Vxlan.port(),
            mtu,
        },
    }
}

impl Wire {
    fn set_options(&self) {
        let tunnel = self.station.as_ref().map(|(tunnel, _)| tunnel);
        self.underlay
            .set_options(station(tunnel, self.link.as_ref()));
    }
}

impl Underlays {
    /// Gives a network's wire back.
    pub(super) fn let_go(&mut self, carrier: &Carrier) {
        let Carrier::Wire(id, _) = carrier else {
            return;
        };
        if let Some(wire) = self.wires.get_mut(id) {
            wire.station.take_if(|(_, networks)| {
                *networks -= 1;
                *networks == 0
            });
            if wire.station.is_none() {
                wire.set_options();
            }
        }
        self.forget_unused(id);
    }

    /// The function of a wire is there: what it carries.
    pub(super) fn plug_in(&mut self, id: &Id, link: &UplinkSpec) -> Arc<WireUnderlay> {
        let wire = self.wires.entry(id.clone()).or_default();
        wire.link = Some(link.clone());
        wire.set_options();
        wire.underlay.clone()
    }

    /// The function has gone. Networks wait for it, or for another one.
    pub(super) fn unplug(&mut self, id: &Id) {
        if let Some(wire) = self.wires.get_mut(id) {
            wire.link = None;
        }
        self.forget_unused(id);
    }

    fn forget_unused(&mut self, id: &Id) {
        let unused = |wire: &Wire| wire.station.is_none() && wire.link.is_none();
        if self.wires.get(id).is_some_and(unused) {
            self.wires.remove(id);
        }
    }

    fn wire(&mut self, id: &Id, tunnel: &TunnelSpec) -> Carrier {
        let wire = self.wires.entry(id.clone()).or_default();
        match &mut wire.station {
            // Control sees to it that all say the same.
            Some((_, networks)) => *networks += 1,
            None => {
                wire.station = Some((tunnel.clone(), 1));
                wire.set_options();
            }
        }
        Carrier::Wire(id.clone(), wire.underlay.clone())
    }
}

impl Data {
    /// What carries a tunnel: made, or shared with other networks. A wire is to be given back by [`Underlays::let_go`].
    pub(super) fn carrier(
        &mut self,
        network: &Id,
        tunnel: &TunnelSpec,
        mtu: u16,
    ) -> Result<Carrier> {
        match &tunnel.underlay {
            Underlay::Udp => self.udp(tunnel),
            Underlay::Port(id) => Ok(self.underlays.wire(id, tunnel)),
            Underlay::Tap(name) => self.tap(tunnel, name.as_deref(), mtu),
            Underlay::Auto => {
                // The others need a device that the operator has to name.
                let carrier = self.udp(tunnel)?;
                log::info!(
                    "network {network}: underlay auto is {}, which needs no device and no privileges",
                    carrier.spec()
                );
                Ok(carrier)
            }
        }
    }

    /// The kernel's sockets: every reactor takes what comes, and each network finds its own by VNI.
    fn udp(&mut self, tunnel: &TunnelSpec) -> Result<Carrier> {
        let key = (tunnel_kind(tunnel.kind), tunnel.vtep, tunnel.port());
        let all = &mut self.underlays.udp;
        all.retain(|(_, underlay)| underlay.strong_count() > 0);
        let found = all.iter().find(|(k, _)| *k == key);
        if let Some(underlay) = found.and_then(|(_, underlay)| underlay.upgrade()) {
            return Ok(Carrier::Udp(underlay));
        }
        let (kind, local, port) = key;
        let options = UdpOptions {
            local,
            kind,
            port,
            poll: self.poll(None),
            reactors: self.reactors.iter().map(|r| r.handle.clone()).collect(),
        };
        let made =
            UdpUnderlay::new(options).with_context(|| format!("VTEP {local} port {port}"))?;
        let weak = Arc::downgrade(&made);
        self.underlays.udp.push((key, weak));
        Ok(Carrier::Udp(made))
    }
}

/// The name of a tap device that is given none: the kernel counts.
const TAP_NAME: &str = "bluff%d";

/// The card's address on a link that no function is: the same after each start, and as much its own there as its VTEP.
fn mac_of(vtep: IpAddr) -> Mac {
    let [a, b, c, d] = match vtep {
        IpAddr::V4(v4) => v4.octets(),
        IpAddr::V6(v6) => {
            let [.., a, b, c, d] = v6.octets();
            [a, b, c, d]
        }
    };
    Mac([2, 0x62, a, b, c, d])
}

impl Data {
    /// A tap device, which all networks of a station share.
    fn tap(&mut self, tunnel: &TunnelSpec, name: Option<&str>, mtu: u16) -> Result<Carrier> {
        let station = (tunnel_kind(tunnel.kind), tunnel.vtep, tunnel.port());
        let key = (station, name.map(str::to_owned));
        let wanted = tunnel.wire_mtu(mtu);
        let all = &mut self.underlays.taps;
        all.retain(|(_, tap)| tap.strong_count() > 0);
        let found = all.iter().find(|(k, _)| *k == key);
        if let Some(found) = found.and_then(|(_, tap)| tap.upgrade()) {
            let mtu = found.tap.raise_mtu(wanted)?;
            found.underlay.set_options(options(tunnel, mtu));
            return Ok(Carrier::Tap(found));
        }
        let made = Tap::open(TapOptions {
            name: name.unwrap_or(TAP_NAME).to_owned(),
            carries: Carries::Tunnels,
            reactors: self.reactors.iter().map(|r| r.handle.clone()).collect(),
            poll: self.poll(None),
        });
        let shown = || format!("tap device {}", name.unwrap_or("of any name"));
        let mut tap = made.with_context(shown)?;
        let mtu = tap.raise_mtu(wanted).with_context(shown)?;
        let underlay = WireUnderlay::new(options(tunnel, mtu));
        underlay.set_completes(tap.completes());
        let port: Arc<dyn bluff_net::Port> = underlay.clone();
        tap.plug_in(&port);
        let cut = match tap.completes().contains(Offloads::TSO4) {
            true => "by the kernel, or behind it",
            false => "by the card: this kernel has no tunnels for taps",
        };
        log::info!("tap device {}: large frames are cut {cut}", tap.name());
        let made = Arc::new(TapWire { underlay, tap });
        self.underlays.taps.push((key, Arc::downgrade(&made)));
        Ok(Carrier::Tap(made))
    }
}

/// What a card is behind a tap.
fn options(tunnel: &TunnelSpec, mtu: u16) -> WireOptions {
    let link = UplinkSpec {
        mac: Some(Text(mac_of(tunnel.vtep))),
        mtu,
    };
    station(Some(tunnel), Some(&link))
}

/// Where a network function is plugged in.
pub(super) enum Plug {
    /// A port of a network.
    Network(Id, Arc<bluff_overlay::NetworkPort>),
    /// A wire of tunnels.
    Wire(Arc<WireUnderlay>),
}

impl Plug {
    /// As what is plugged in sees it.
    pub(super) fn port(&self) -> Arc<dyn bluff_net::Port> {
        match self {
            Self::Network(_, port) => port.clone(),
            Self::Wire(wire) => wire.clone(),
        }
    }

    /// Its number in a network, where it is in that.
    pub(super) fn number_in(&self, network: &Id) -> Option<u16> {
        match self {
            Self::Network(id, port) if id == network => Some(port.number()),
            Self::Network(..) | Self::Wire(_) => None,
        }
    }

    /// What the driver sent, or was to receive, and was dropped behind the device.
    pub(super) fn drops(&self) -> (&Drops, &Drops) {
        match self {
            Self::Network(_, port) => (port.sent(), port.received()),
            // What the wire sends the underlay receives.
            Self::Wire(wire) => (&wire.drops().received, &wire.drops().sent),
        }
    }
}
