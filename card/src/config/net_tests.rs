//! Networks and the functions that are in them.

use std::collections::BTreeMap;

use super::tests::{mistakes, parse};
use crate::spec::{DeviceSpec, Id, Text, Tunnel, Underlay};

const NET: &str = r#"
[network.blue]
vni = 5001
tunnel = "vxlan"
vtep = "10.0.0.1"
vteps = ["10.0.0.2", "10.0.0.3"]
underlay = "auto"
fdb = [{ mac = "02:00:00:00:00:02", vtep = "10.0.0.2" }]

[network.here]

[function.net0]
kind = "virtio-net"
attach = "vhost-user"
network = "blue"
mac = "02:00:00:00:00:01"
queues = 2
allowed = ["192.168.7.2/32"]
limit = { tx = "5Gbit/s", rx = "5Gbit/s", tx_pps = 1000000 }
vlan = 7

[function.net1]
kind = "virtio-net"
attach = "vhost-user"
network = "here"

[function.up0]
kind = "uplink"
mac = "02:00:00:00:00:f0"
attach = "vhost-user"
mtu = 1600
"#;

fn id(text: &str) -> Id {
    text.parse().unwrap()
}

#[test]
fn networks_and_their_functions() {
    let config = parse(NET).unwrap();
    let blue = &config.networks[&id("blue")];
    assert_eq!((blue.vni, blue.mtu), (Some(5001), 1450));
    let tunnel = blue.tunnel.as_ref().unwrap();
    assert_eq!(
        (tunnel.kind, &tunnel.underlay, tunnel.port()),
        (Tunnel::Vxlan, &Underlay::Auto, 4789)
    );
    assert_eq!((tunnel.vteps.len(), tunnel.fdb.len()), (2, 1));
    let here = &config.networks[&id("here")];
    assert_eq!((here.vni, here.mtu, &here.tunnel), (None, 1500, &None));
    let net0 = &config.functions[&id("net0")];
    let (network, port) = net0.port().unwrap();
    assert_eq!((network, net0.queues, net0.rings()), (&id("blue"), 2, 5));
    assert_eq!(port.mac, Some(Text("02:00:00:00:00:01".parse().unwrap())));
    assert_eq!(
        (port.limit.tx, port.limit.tx_pps, port.limit.rx_pps),
        (Some(5_000_000_000), Some(1_000_000), None)
    );
    assert_eq!((port.vlan, port.unplugged), (Some(7), false));
    let net1 = &config.functions[&id("net1")];
    let (network, port) = net1.port().unwrap();
    assert_eq!((network, net1.queues, port.mac), (&id("here"), 1, None));
    assert!(!port.control_queue);
    let text = NET.replace("queues = 2", "queues = 127\ncontrol_queue = true");
    let config = parse(&text).unwrap();
    let net0 = &config.functions[&id("net0")];
    assert!(net0.port().unwrap().1.control_queue && net0.queues_mistake().is_none());
    assert!(matches!(net1.device, DeviceSpec::VirtioNet { .. }));
}

#[test]
fn each_mistake_has_its_place() {
    let local = "[network.here]";
    let second = "network = \"here\"";
    let cases: BTreeMap<(&str, &str), &str> = [
        (("5001", "16777216"), "3:7: network.blue.vni: a whole number from 0 to 16777215"),
        (("vni = 5001\n", ""), "network.blue.vni: missing; allowed: a whole number from 0"),
        (("\"vxlan\"", "\"gre\""), "4:10: network.blue.tunnel: unknown word `gre`; allowed: `vxlan` and `geneve`"),
        (("tunnel = \"vxlan\"\n", ""), "network.blue.vtep: only a network with a `tunnel` has that"),
        (("\"auto\"", "\"best\""), "7:12: network.blue.underlay: unknown word `best`; allowed: `auto`, `udp`, `tap`, `tap:NAME` and `port:FUNCTION`"),
        (("\"auto\"", "\"port:\""), "network.blue.underlay: `port:` is followed by the ID of a function"),
        (("\"auto\"", "\"port:up1\""), "network.blue.underlay: no function `up1`; there are `net0`, `net1` and `up0`"),
        (("\"auto\"", "\"port:net1\""), "network.blue.underlay: function `net1` is of kind virtio-net; a tunnel goes over one of kind uplink"),
        (("\"auto\"", "\"tap:\""), "network.blue.underlay: `tap:` is followed by the name of a device: at most 15 of"),
        (("\"auto\"", "\"tap:a/b\""), "network.blue.underlay: `tap:` is followed by the name of a device"),
        (("\"auto\"", "\"tap:bluff%d\""), "network.blue.underlay: `tap:` is followed by the name of a device"),
        (("\"auto\"", "\"auto\"\ngateway = \"10.0.0.254\""), "8:11: network.blue.gateway: the kernel knows the way"),
        (("\"auto\"", "\"port:up0\"\ngateway = \"10.0.0.1\""), "network.blue.gateway: 10.0.0.1 is this card's own address"),
        (("\"auto\"", "\"port:up0\"\nmtu = 9000"), "network.blue.underlay: a network with an MTU of 9000 needs 9054 on the wire, and up0 has 1600"),
        (("attach = \"vhost-user\"\nmtu = 1600", "attach = \"vhost-user\"\nnetwork = \"here\""), "function.up0.network: unknown key"),
        (("02:00:00:00:00:f0", "ff:ff:ff:ff:ff:ff"), "function.up0.mac: a group's address is no station's"),
        (("vtep = \"10.0.0.1\"\n", ""), "network.blue.vtep: missing; allowed: an IP address"),
        (("\"10.0.0.1\"", "\"card1\""), "5:8: network.blue.vtep: \"card1\" is not an IP address"),
        (("\"10.0.0.1\"", "\"0.0.0.0\""), "0.0.0.0 is not the address of one machine"),
        (("\"10.0.0.3\"", "\"10.0.0.1\""), "6:22: network.blue.vteps: 10.0.0.1 is this card's own address"),
        (("\"10.0.0.3\"", "\"fd00::3\""), "fd00::3 and 10.0.0.1, this card's address, are of different families"),
        (("\"10.0.0.3\"", "\"10.0.0.2\""), "10.0.0.2 stands there twice"),
        (("\"10.0.0.3\"", "3"), "network.blue.vteps: an IP address, such as \"10.0.0.1\", is wanted"),
        (("vtep = \"10.0.0.2\" }", "vtep = \"10.0.0.9\" }"), "network.blue.fdb: 10.0.0.9 is none of the network's `vteps`"),
        (("mac = \"02:00:00:00:00:02\", ", ""), "network.blue.fdb.mac: missing"),
        (("00:00:02\"", "00:02\""), "network.blue.fdb.mac: a MAC address is six bytes"),
        ((local, "[network.here]\nmtu = 100"), "network.here.mtu: a whole number from 1280 to 9216"),
        ((local, "[network.here]\nmtus = 1500"), "network.here.mtus: unknown key; allowed: `vni`, `tunnel`, `mtu`"),
        (("network = \"blue\"", "network = \"red\""), "function.net0.network: no network `red`; there are `blue` and `here`"),
        (("mac = \"02:00:00:00:00:01\"", "mac = \"03:00:00:00:00:01\""), "function.net0.mac: a group's address is no station's"),
        (("192.168.7.2/32", "192.168.7.2/33"), "function.net0.allowed: \"192.168.7.2/33\" is no address with a prefix length"),
        (("tx = \"5Gbit/s\"", "tx = \"5G\""), "function.net0.limit.tx: \"5G\" is no rate"),
        (("tx_pps = 1000000", "tx_pps = 0"), "function.net0.limit.tx_pps: a whole number from 1 to"),
        (("tx_pps", "txpps"), "function.net0.limit.txpps: unknown key; allowed: `tx`, `rx`, `tx_pps` and `rx_pps`"),
        (("vlan = 7", "vlan = 4095"), "function.net0.vlan: a whole number from 1 to 4094"),
        (("queues = 2", "queues = 129"), "function.net0.queues: a whole number from 1 to 128"),
        (("queues = 2", "queues = 128\ncontrol_queue = true"), "function.net0.queues: with `control_queue` at most 127"),
        (("queues = 2", "control_queue = 1"), "function.net0.control_queue: `true` or `false` is wanted"),
        (("attach = \"vhost-user\"", "attach = \"vfio-user\""), "a function of kind virtio-net attaches by vhost-user"),
        ((second, "network = \"here\"\nvolume = \"disk0\""), "function.net1.volume: unknown key"),
        ((second, "network = \"blue\"\nvlan = 7\nmac = \"02:00:00:00:00:01\""), "function.net1.mac: function `net0` has the same address"),
    ]
    .into();
    for ((from, to), expected) in cases {
        assert!(NET.contains(from), "{from}");
        let found = mistakes(&NET.replacen(from, to, 1));
        let there = found.iter().any(|line| line.contains(expected));
        assert!(there, "{to}: {found:?}");
    }
}

#[test]
fn the_same_address_may_be_in_another_network_or_vlan() {
    let with = |text: &str| NET.replace("network = \"here\"", text);
    let mac = "mac = \"02:00:00:00:00:01\"";
    for sound in [
        format!("network = \"here\"\n{mac}"),
        format!("network = \"blue\"\n{mac}"),
        format!("network = \"blue\"\nvlan = 8\n{mac}"),
    ] {
        assert!(parse(&with(&sound)).is_ok(), "{sound}");
    }
}

#[test]
fn tunnels_over_a_wire_of_the_card() {
    let red = "[network.red]\nvni = 7\ntunnel = \"vxlan\"\nvtep = \"10.0.0.1\"\nunderlay = \"port:up0\"\n";
    let with = |more: &str| {
        let text = NET.replace("\"auto\"", "\"port:up0\"");
        format!("{text}\n{red}{more}")
    };
    let config = parse(&with("")).unwrap();
    let up0 = id("up0");
    for network in ["blue", "red"] {
        let tunnel = config.networks[&id(network)].tunnel.as_ref().unwrap();
        assert_eq!(tunnel.uplink(), Some(&up0));
    }
    let DeviceSpec::Uplink(uplink) = &config.functions[&up0].device else {
        panic!("an uplink");
    };
    assert_eq!(uplink.mtu, 1600);
    assert_eq!(uplink.mac, Some(Text("02:00:00:00:00:f0".parse().unwrap())));
    // The card is one station there.
    for more in ["port = 4790", "gateway = \"10.0.0.254\""] {
        let found = mistakes(&with(more));
        assert_eq!(found.len(), 1, "{found:?}");
        let wanted =
            "network blue goes over port:up0 too, with another tunnel, vtep, port or gateway";
        assert!(found[0].contains(wanted), "{found:?}");
    }
}

#[test]
fn frames_of_one_vni_belong_to_one_network() {
    let other = |kind: &str, vtep: &str, port: &str| {
        let at = format!("tunnel = \"{kind}\"\nvni = 5001\nvtep = \"{vtep}\"\n{port}");
        NET.replace("[network.here]", &format!("[network.here]\n{at}"))
    };
    let found = mistakes(&other("vxlan", "10.0.0.1", ""));
    assert_eq!(found.len(), 1, "{found:?}");
    let wanted = "network.here.vni: network blue has the same VNI at the same VTEP";
    assert!(found[0].contains(wanted), "{found:?}");
    for (kind, vtep, port) in [
        ("geneve", "10.0.0.1", ""),
        ("vxlan", "10.0.0.4", ""),
        ("vxlan", "10.0.0.1", "port = 4790\n"),
    ] {
        assert!(parse(&other(kind, vtep, port)).is_ok(), "{kind} {vtep}");
    }
}

#[test]
fn underlays_are_text() {
    for text in ["auto", "udp", "tap", "tap:blue-0.1", "port:up0"] {
        assert_eq!(text.parse::<Underlay>().unwrap().to_string(), text);
        let message = serde_json::to_string(&text.parse::<Underlay>().unwrap()).unwrap();
        assert_eq!(message, format!("\"{text}\""));
        assert!(serde_json::from_str::<Underlay>(&message).is_ok());
    }
    for bad in [
        "",
        "tap:",
        "tap:1234567890123456",
        "tap:..",
        "port:",
        "port:A",
        "udp:x",
        "auto:",
    ] {
        assert!(bad.parse::<Underlay>().is_err(), "{bad}");
    }
}
