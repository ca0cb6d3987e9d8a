//! Networks, and the functions that are in them.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::net::IpAddr;
use std::str::FromStr;

use bluff_packet::Mac;
use toml::Spanned;
use toml::de::DeValue;

use super::read::Section;
use super::{Config, Names, Placed, Reader};
use crate::spec::{
    DeviceSpec, FdbSpec, Id, LIST_MAX, LimitSpec, MTU, MTU_LOCAL, MTU_TUNNEL, MTU_UPLINK,
    NetworkSpec, PortSpec, Text, Tunnel, TunnelSpec, Underlay, UplinkSpec, VNI_MAX, VTEPS_MAX,
    mac_mistake,
};
use crate::units::parse_bit_rate;

/// What only a network with a tunnel has.
const OF_TUNNELS: [&str; 6] = ["vtep", "vteps", "underlay", "gateway", "port", "fdb"];
const VTEP: &str = "an IP address, such as \"10.0.0.1\"";

impl Reader<'_> {
    /// `[network.ID]`.
    pub(super) fn network(
        &mut self,
        section: &mut Section<'_>,
        names: &Names,
    ) -> Option<NetworkSpec> {
        let vni = section.integer("vni", 0..=VNI_MAX, self.sink);
        let has_tunnel = section.has("tunnel");
        let kind = section.word("tunnel", Tunnel::WORDS, self.sink);
        let mtu = section.integer("mtu", MTU, self.sink);
        let mtu = mtu.unwrap_or(if has_tunnel { MTU_TUNNEL } else { MTU_LOCAL });
        if has_tunnel && !section.has("vni") {
            let complaint = format!("missing; allowed: a whole number from 0 to {VNI_MAX}");
            self.sink
                .add(section.span(), &section.key("vni"), complaint);
        }
        let tunnel = match has_tunnel {
            true => Some(self.tunnel(kind, section, names)?),
            false => {
                for name in OF_TUNNELS.into_iter().filter(|name| section.has(name)) {
                    let complaint = "only a network with a `tunnel` has that";
                    self.sink
                        .add(section.place(name), &section.key(name), complaint);
                }
                section.known(&OF_TUNNELS);
                None
            }
        };
        Some(NetworkSpec { vni, mtu, tunnel })
    }

    fn tunnel(
        &mut self,
        kind: Option<Tunnel>,
        section: &mut Section<'_>,
        names: &Names,
    ) -> Option<TunnelSpec> {
        let vtep = section.required_text("vtep", VTEP, self.sink);
        let key = section.key("vtep");
        let vtep = vtep.and_then(|text| Some((self.read(&text, &key, VTEP)?, text.span())));
        let vteps = section.array("vteps", self.sink).unwrap_or_default();
        let underlay = self.underlay(section, names);
        let gateway_key = section.key("gateway");
        let gateway = section.text("gateway", self.sink);
        let gateway =
            gateway.and_then(|text| Some((self.read(&text, &gateway_key, VTEP)?, text.span())));
        let port = section.integer("port", 1..=u16::MAX, self.sink);
        let fdb = section.array("fdb", self.sink).unwrap_or_default();
        let (vtep, span) = vtep?;
        let mut tunnel = TunnelSpec {
            kind: kind?,
            vtep,
            vteps: Vec::new(),
            underlay,
            gateway: gateway.as_ref().map(|(address, _)| *address),
            port,
            fdb: Vec::new(),
        };
        if let (Some(complaint), Some((_, span))) = (tunnel.gateway_mistake(), gateway) {
            self.sink.add(span, &section.key("gateway"), complaint);
        }
        if let Some(complaint) = tunnel.local_mistake() {
            self.sink.add(span, &key, complaint);
        }
        let key = section.key("vteps");
        self.bounded(vteps, VTEPS_MAX, &key);
        for item in vteps {
            let Some(vtep) = self.text_item(item, &key, VTEP) else {
                continue;
            };
            match tunnel.vtep_mistake(vtep, &tunnel.vteps) {
                Some(complaint) => self.sink.add(item.span(), &key, complaint),
                None => tunnel.vteps.push(vtep),
            }
        }
        let key = section.key("fdb");
        self.bounded(fdb, LIST_MAX, &key);
        for item in fdb {
            let Some(entry) = self.fdb_entry(item, &key) else {
                continue;
            };
            tunnel.fdb.push(entry);
            let complaints: Vec<_> = tunnel.fdb_mistakes(tunnel.fdb.len() - 1).collect();
            for complaint in complaints {
                self.sink.add(item.span(), &key, complaint);
            }
        }
        Some(tunnel)
    }

    fn underlay(&mut self, section: &mut Section<'_>, names: &Names) -> Underlay {
        let Some(text) = section.text("underlay", self.sink) else {
            return Underlay::Auto;
        };
        let key = section.key("underlay");
        let read = self.parsed::<Underlay>(&text, &key);
        if let Some(Underlay::Port(id)) = &read {
            let name = Spanned::new(text.span(), id.to_string());
            self.reference(&key, "function", &name, &names.functions);
        }
        read.unwrap_or(Underlay::Auto)
    }

    /// The keys of a function of kind `uplink`.
    pub(super) fn uplink(&mut self, section: &mut Section<'_>) -> DeviceSpec {
        let mac = self.mac(section);
        let mtu = section.integer("mtu", MTU, self.sink);
        DeviceSpec::Uplink(UplinkSpec {
            mac: mac.map(Text),
            mtu: mtu.unwrap_or(MTU_UPLINK),
        })
    }

    fn mac(&mut self, section: &mut Section<'_>) -> Option<Mac> {
        let text = section.text("mac", self.sink)?;
        let key = section.key("mac");
        let mac = self.parsed(&text, &key)?;
        if let Some(complaint) = mac_mistake(mac) {
            self.sink.add(text.span(), &key, complaint);
        }
        Some(mac)
    }

    /// Tunnels go over uplinks that are there, and long enough for them.
    pub(super) fn uplinks_fit(&mut self, config: &Config, places: &[Placed<Id>]) {
        for Placed { value, key, span } in places {
            let network = config.networks.get(value);
            let Some((network, tunnel)) = network.and_then(|n| Some((n, n.tunnel.as_ref()?)))
            else {
                continue;
            };
            let Some(id) = tunnel.uplink() else { continue };
            let complaint = match config.functions.get(id).map(|f| &f.device) {
                Some(DeviceSpec::Uplink(uplink)) => {
                    let wanted = tunnel.wire_mtu(network.mtu);
                    (uplink.mtu < wanted).then(|| {
                        format!(
                            "a network with an MTU of {} needs {wanted} on the wire, and {id} has {}",
                            network.mtu, uplink.mtu
                        )
                    })
                }
                Some(other) => Some(format!(
                    "function `{id}` is of kind {}; a tunnel goes over one of kind uplink",
                    other.kind()
                )),
                // It was told already.
                None => None,
            };
            if let Some(complaint) = complaint {
                self.sink.add(span.clone(), key, complaint);
            }
        }
    }

    /// `{ mac = "02:00:00:00:00:02", vtep = "10.0.0.2" }`.
    fn fdb_entry(&mut self, item: &Spanned<DeValue<'_>>, key: &str) -> Option<FdbSpec> {
        let Some(table) = item.get_ref().as_table() else {
            let complaint = "an address is a table, such as { mac = \"02:00:00:00:00:02\", vtep = \"10.0.0.2\" }";
            self.sink.add(item.span(), key, complaint);
            return None;
        };
        let mut section = Section::new(key.to_owned(), item.span(), table);
        let mac = section.required_text("mac", "the address of a station", self.sink);
        let mac = mac.and_then(|text| self.parsed(&text, &section.key("mac")));
        let vtep = section.required_text("vtep", "one of the network's `vteps`", self.sink);
        let vtep = vtep.and_then(|text| self.read(&text, &section.key("vtep"), VTEP));
        let vlan = section.integer("vlan", 1..=4094, self.sink);
        section.finish(self.sink);
        Some(FdbSpec {
            mac: Text(mac?),
            vtep: vtep?,
            vlan,
        })
    }

    /// The keys of a function of kind `virtio-net`.
    pub(super) fn virtio_net(
        &mut self,
        id: &Id,
        section: &mut Section<'_>,
        names: &mut Names,
    ) -> Option<DeviceSpec> {
        let (span, key) = (section.place("mac"), section.key("mac"));
        let mac = self.mac(section);
        let allowed = section.array("allowed", self.sink).map(|items| {
            let key = section.key("allowed");
            self.bounded(items, LIST_MAX, &key);
            let items = items.iter();
            let read = items.filter_map(|item| {
                let text = item.get_ref().as_str();
                if text.is_none() {
                    let complaint = "a prefix is text, such as \"192.0.2.0/24\"";
                    self.sink.add(item.span(), &key, complaint);
                }
                let text = Spanned::new(item.span(), text?.to_owned());
                self.parsed(&text, &key).map(Text)
            });
            read.collect()
        });
        let limit = section.section("limit", self.sink);
        let limit = limit.map_or_else(LimitSpec::default, |limit| self.limit(limit));
        let vlan = section.integer("vlan", 1..=4094, self.sink);
        let network = section.required_text("network", "the ID of a network", self.sink)?;
        let network_key = section.key("network");
        let network = self.reference(&network_key, "network", &network, &names.networks)?;
        let port = PortSpec {
            mac: mac.map(Text),
            allowed,
            limit,
            vlan,
            unplugged: false,
        };
        names.ports.push(Placed {
            value: (id.clone(), network.clone(), port.clone()),
            key,
            span,
        });
        let port = Box::new(port);
        Some(DeviceSpec::VirtioNet { network, port })
    }

    /// `{ tx = "5Gbit/s", rx = "5Gbit/s", tx_pps = 1000000, rx_pps = 1000000 }`.
    fn limit(&mut self, mut section: Section<'_>) -> LimitSpec {
        let mut bits = |name| {
            let text = section.text(name, self.sink)?;
            let rate = parse_bit_rate(text.get_ref());
            if let Err(complaint) = &rate {
                self.sink.add(text.span(), &section.key(name), complaint);
            }
            rate.ok()
        };
        let (tx, rx) = (bits("tx"), bits("rx"));
        let mut frames = |name| section.integer(name, 1..=u64::from(u32::MAX), self.sink);
        let (tx_pps, rx_pps) = (frames("tx_pps"), frames("rx_pps"));
        section.finish(self.sink);
        LimitSpec {
            tx,
            rx,
            tx_pps,
            rx_pps,
        }
    }

    fn bounded(&mut self, items: &[Spanned<DeValue<'_>>], most: usize, key: &str) {
        if let Some(first) = items.get(most) {
            let complaint = format!("there may be at most {most}");
            self.sink.add(first.span(), key, complaint);
        }
    }

    /// What text says, or a mistake that tells what is wanted.
    fn read<T: FromStr>(&mut self, text: &Spanned<String>, key: &str, wanted: &str) -> Option<T> {
        let read = text.get_ref().parse().ok();
        if read.is_none() {
            let complaint = format!("{:?} is not {wanted}", text.get_ref());
            self.sink.add(text.span(), key, complaint);
        }
        read
    }

    /// What text says, or the mistake that its type tells.
    fn parsed<T: FromStr<Err: Display>>(&mut self, text: &Spanned<String>, key: &str) -> Option<T> {
        let read = T::from_str(text.get_ref());
        if let Err(complaint) = &read {
            self.sink.add(text.span(), key, complaint.to_string());
        }
        read.ok()
    }

    fn text_item(
        &mut self,
        item: &Spanned<DeValue<'_>>,
        key: &str,
        wanted: &str,
    ) -> Option<IpAddr> {
        let Some(text) = item.get_ref().as_str() else {
            self.sink
                .add(item.span(), key, format!("{wanted}, is wanted"));
            return None;
        };
        let text = Spanned::new(item.span(), text.to_owned());
        self.read(&text, key, wanted)
    }

    /// A frame that comes from another card has to be one network's, and a wire has one station of this card.
    pub(super) fn no_segment_twice(
        &mut self,
        networks: &BTreeMap<Id, NetworkSpec>,
        places: &[Placed<Id>],
    ) {
        for (index, place) in places.iter().enumerate() {
            let Some(network) = networks.get(&place.value) else {
                continue;
            };
            let mut mistakes = places[..index].iter().filter_map(|other| {
                let spec = networks.get(&other.value)?;
                network.mistake_beside(&other.value, spec)
            });
            if let Some(complaint) = mistakes.next() {
                self.sink.add(place.span.clone(), &place.key, complaint);
            }
        }
    }

    /// Two stations with one address take each other's frames.
    pub(super) fn no_station_twice(&mut self, ports: &[Placed<(Id, Id, PortSpec)>]) {
        for (index, place) in ports.iter().enumerate() {
            let (_, network, port) = &place.value;
            let same = ports[..index].iter().find(|other| {
                let (_, other_network, other) = &other.value;
                other_network == network && other.is_same_station(port)
            });
            if let Some(Placed { value, .. }) = same {
                let complaint = format!("function `{}` has the same address", value.0);
                self.sink.add(place.span.clone(), &place.key, complaint);
            }
        }
    }
}
