//! Networks, and what network functions count.

use std::collections::BTreeMap;

use super::Table;
use crate::control::NetworkEntry;
use crate::message::{AddressEntry, AddressPlace};
use crate::spec::{Id, PortSpec};
use crate::stats::NetStatistics;
use crate::units::{show_bit_rate, show_size};

fn joined(items: impl Iterator<Item = String>) -> String {
    let items: Vec<String> = items.collect();
    match items.is_empty() {
        true => "-".to_owned(),
        false => items.join(","),
    }
}

/// All networks, one a line.
pub fn networks(networks: &[NetworkEntry]) -> String {
    let mut table = Table::new([
        "NETWORK",
        "STATE",
        "VNI",
        "TUNNEL",
        "VTEP",
        "MTU",
        "FUNCTIONS",
    ]);
    let or_none = |found: Option<String>| found.unwrap_or_else(|| "-".to_owned());
    for network in networks {
        let tunnel = network.spec.tunnel.as_ref();
        table.row([
            network.id.to_string(),
            network.state.clone(),
            or_none(network.spec.vni.map(|vni| vni.to_string())),
            or_none(tunnel.map(|tunnel| tunnel.kind.to_string())),
            or_none(tunnel.map(|tunnel| tunnel.vtep.to_string())),
            network.spec.mtu.to_string(),
            joined(network.functions.iter().map(Id::to_string)),
        ]);
    }
    table.to_string()
}

/// One network.
pub fn network(network: &NetworkEntry) -> String {
    let mut table = Table::plain();
    table.row(["network", network.id.as_str()]);
    table.row(["state", &network.state]);
    if let Some(reason) = &network.reason {
        table.row(["reason", reason]);
    }
    table.row(["mtu", &network.spec.mtu.to_string()]);
    if let Some(vni) = network.spec.vni {
        table.row(["vni", &vni.to_string()]);
    }
    match &network.spec.tunnel {
        None => table.row(["tunnel", "none: local only"]),
        Some(tunnel) => {
            table.row(["tunnel", tunnel.kind.word()]);
            let port = tunnel.port();
            table.row(["vtep", &format!("{}, port {port}", tunnel.vtep)]);
            let vteps = joined(tunnel.vteps.iter().map(ToString::to_string));
            table.row(["vteps", &vteps]);
            if let Some(gateway) = tunnel.gateway {
                table.row(["gateway", &gateway.to_string()]);
            }
            let chosen = network.info.as_ref();
            let chosen = chosen.and_then(|info| info.underlay.as_ref());
            let underlay = match chosen {
                Some(chosen) if *chosen != tunnel.underlay => {
                    format!("{chosen} ({})", tunnel.underlay)
                }
                _ => tunnel.underlay.to_string(),
            };
            table.row(["underlay", &underlay]);
        }
    }
    let functions = joined(network.functions.iter().map(Id::to_string));
    table.row(["functions", &functions]);
    table.to_string()
}

/// The addresses of a network, one a line.
pub fn addresses(addresses: &[AddressEntry]) -> String {
    let mut table = Table::new(["MAC", "VLAN", "AT", "KNOWN"]);
    for address in addresses {
        table.row([
            address.mac.to_string(),
            match address.vlan {
                0 => "-".to_owned(),
                vlan => vlan.to_string(),
            },
            match &address.place {
                AddressPlace::Function(id) => format!("function {id}"),
                AddressPlace::Vtep(vtep) => format!("vtep {vtep}"),
            },
            match address.fixed {
                true => "static".to_owned(),
                false => "learnt".to_owned(),
            },
        ]);
    }
    table.to_string()
}

/// What a port is, as lines of a function's table.
pub(super) fn port(table: &mut Table, port: &PortSpec) {
    if let Some(mac) = port.mac {
        table.row(["mac", &mac.to_string()]);
    }
    let link = if port.unplugged { "down" } else { "up" };
    table.row(["link", link]);
    if let Some(vlan) = port.vlan {
        table.row(["vlan", &vlan.to_string()]);
    }
    if let Some(allowed) = &port.allowed {
        let allowed = joined(allowed.iter().map(ToString::to_string));
        table.row(["allowed", &allowed]);
    }
    let limit = &port.limit;
    let bits = |rate: Option<u64>| rate.map(show_bit_rate);
    let frames = |rate: Option<u64>| rate.map(|rate| format!("{rate} frames/s"));
    for (name, parts) in [
        ("sends at most", [bits(limit.tx), frames(limit.tx_pps)]),
        ("receives at most", [bits(limit.rx), frames(limit.rx_pps)]),
    ] {
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        if !parts.is_empty() {
            table.row([name, &parts.join(", ")]);
        }
    }
}

/// What a function has counted.
pub(super) fn counters(net: &NetStatistics) -> String {
    let mut table = Table::new([
        "PAIR",
        "SENT",
        "BYTES SENT",
        "RECEIVED",
        "BYTES RECEIVED",
        "KICKS",
        "INTERRUPTS",
    ]);
    for pair in &net.pairs {
        table.row([
            pair.pair.to_string(),
            pair.sent.to_string(),
            show_size(pair.sent_bytes),
            pair.received.to_string(),
            show_size(pair.received_bytes),
            pair.kicks.to_string(),
            pair.interrupts.to_string(),
        ]);
    }
    let mut text = format!("\n{table}");
    if net.drops() > 0 {
        let mut table = Table::new(["DROPPED", "SENT", "RECEIVED"]);
        let causes: BTreeMap<&String, ()> = net
            .sent_drops
            .keys()
            .chain(net.received_drops.keys())
            .map(|cause| (cause, ()))
            .collect();
        for cause in causes.into_keys() {
            let of = |drops: &BTreeMap<String, u64>| drops.get(cause).copied().unwrap_or(0);
            table.row([
                cause.clone(),
                of(&net.sent_drops).to_string(),
                of(&net.received_drops).to_string(),
            ]);
        }
        text.push_str(&format!("\n{table}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::PairStatistics;

    #[test]
    fn drops_stand_by_cause() {
        let drops = |of: &[(&str, u64)]| {
            let of = of.iter().map(|(cause, n)| ((*cause).to_owned(), *n));
            of.collect::<BTreeMap<_, _>>()
        };
        let net = NetStatistics {
            pairs: vec![PairStatistics {
                sent: 3,
                sent_bytes: 512,
                ..PairStatistics::default()
            }],
            sent_drops: drops(&[("spoofed", 2)]),
            received_drops: drops(&[("no-buffers", 7)]),
        };
        let text = counters(&net);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[4], "DROPPED     SENT  RECEIVED");
        assert_eq!(lines[5], "no-buffers  0     7");
        assert_eq!(lines[6], "spoofed     2     0");
        assert_eq!(counters(&NetStatistics::default()).lines().count(), 2);
    }
}
