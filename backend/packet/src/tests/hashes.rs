//! Flow keys and hashes, and which hash virtio wants of which frame.

use std::collections::BTreeMap;

use bluff_testing::Chance;

use super::{TCP, V4_A, V4_B, V6_A, V6_B, ethernet, parsed, udp, v4, v6};
use crate::flow::{FlowHasher, FlowKey};
use crate::toeplitz::{HashTypes, Report, Rss, Toeplitz};
use crate::{EtherType, Frame, IpProto, L4};

fn key(bytes: &[u8]) -> FlowKey {
    FlowKey::new(&parsed(bytes))
}

/// With these bits of IPv4's fragment field.
fn fragment(mut bytes: Vec<u8>, bits: u16) -> Vec<u8> {
    bytes[20..22].copy_from_slice(&bits.to_be_bytes());
    bytes
}

#[test]
fn a_flow_is_what_its_frames_have_in_common() {
    let tcp = v4(IpProto::TCP, &TCP);
    let mut other_ttl = tcp.clone();
    (other_ttl[15], other_ttl[22]) = (0xff, 1);
    assert_eq!(key(&tcp), key(&other_ttl));
    let mut syn = TCP;
    syn[13] = 2;
    assert_eq!(key(&tcp), key(&v4(IpProto::TCP, &syn)));
    let mut other_port = TCP;
    other_port[1] = 1;
    assert_ne!(key(&tcp), key(&v4(IpProto::TCP, &other_port)));
    // The same ports, another protocol.
    assert_ne!(key(&v4(IpProto::UDP, &udp(1024, 80, &[]))), key(&tcp));
    // All fragments of a packet are one flow, whatever their first bytes say.
    let first = fragment(v4(IpProto::TCP, &TCP), 0x2000);
    let later = fragment(v4(IpProto::TCP, &other_port), 0x0003);
    assert_eq!(key(&first), key(&later));
    assert_ne!(key(&first), key(&tcp));
    // Extension headers do not make another flow.
    let options = [&[6, 0, 1, 4, 0, 0, 0, 0][..], &TCP].concat();
    assert_eq!(
        key(&v6(IpProto::DEST_OPTIONS, &options)),
        key(&v6(IpProto::TCP, &TCP))
    );
    // Beyond IP it is addresses and ethertype.
    let (arp, llc) = (
        ethernet(EtherType::ARP, &[0; 28]),
        ethernet(EtherType(9), &[0; 28]),
    );
    assert_ne!(key(&arp), key(&llc));
    assert_eq!(key(&llc), key(&ethernet(EtherType(9), &[1; 60])));
    // IP at fault is not the flow that its bytes would name.
    let mut fault = tcp.clone();
    fault[17] = 19;
    assert_eq!(key(&fault), key(&ethernet(EtherType::IPV4, &[])));
}

#[test]
fn a_flow_and_its_answers_have_one_key_in_common() {
    let swapped = |bytes: &[u8]| {
        let mut bytes = bytes.to_vec();
        let (a, b) = bytes[..12].split_at_mut(6);
        a.swap_with_slice(b);
        match (bytes[12], bytes[13]) {
            (8, 0) => bytes[26..34].rotate_left(4),
            (0x86, 0xdd) => bytes[22..54].rotate_left(16),
            _ => return bytes,
        }
        bytes
    };
    let swap_ports = |mut bytes: Vec<u8>, at: usize| {
        bytes[at..at + 4].rotate_left(2);
        bytes
    };
    for (bytes, at) in [
        (v4(IpProto::UDP, &udp(7, 8, &[])), 34),
        (v6(IpProto::UDP, &udp(7, 8, &[])), 54),
        (v6(IpProto::TCP, &TCP), 54),
    ] {
        let back = swap_ports(swapped(&bytes), at);
        assert_ne!(key(&bytes), key(&back));
        assert_eq!(key(&bytes).either_way(), key(&back).either_way());
        // Ports go with their addresses.
        let other = swap_ports(bytes.clone(), at);
        assert_ne!(key(&bytes).either_way(), key(&other).either_way());
        assert_eq!(
            key(&bytes).either_way().either_way(),
            key(&bytes).either_way()
        );
    }
    let arp = ethernet(EtherType::ARP, &[0; 28]);
    let back = swapped(&arp);
    assert_ne!(key(&arp), key(&back));
    assert_eq!(key(&arp).either_way(), key(&back).either_way());
    // One address, two ports: the ports decide.
    let mut same = v4(IpProto::UDP, &udp(9, 2, &[]));
    same.copy_within(26..30, 30);
    assert_eq!(
        key(&same).either_way(),
        key(&swap_ports(same.clone(), 34)).either_way()
    );
}

/// Flows that a tenant may choose so that they look alike: one bit apart, and swapped.
fn chosen() -> Vec<FlowKey> {
    let mut frames = Vec::new();
    for bytes in [
        v4(IpProto::UDP, &udp(7, 8, &[])),
        v6(IpProto::UDP, &udp(7, 8, &[])),
    ] {
        let addresses = if bytes.len() > 42 { 22..54 } else { 26..34 };
        let ports = addresses.end..addresses.end + 4;
        for at in addresses.chain(ports) {
            for bit in 0..8 {
                let mut bytes = bytes.clone();
                bytes[at] ^= 1 << bit;
                frames.push(key(&bytes));
            }
        }
        frames.push(key(&bytes));
    }
    frames.push(key(&v4(IpProto::UDP, &udp(8, 7, &[]))));
    frames
}

#[test]
fn flows_spread_over_all_source_ports() {
    let mut chance = Chance::new(4);
    let flows = chosen();
    let mut queues = BTreeMap::<u16, usize>::new();
    let cards = 200;
    for _ in 0..cards {
        let random: [u8; FlowHasher::KEY_LEN] =
            chance.bytes(FlowHasher::KEY_LEN).try_into().unwrap();
        let hasher = FlowHasher::new(&random);
        let mut ports = BTreeMap::<u16, usize>::new();
        for flow in &flows {
            let port = hasher.source_port(flow);
            assert!(port >= 49_152);
            *ports.entry(port).or_default() += 1;
            *queues.entry(port % 16).or_default() += 1;
        }
        // Of 417 flows in 16,384 ports, some 5 meet by chance.
        assert!(
            ports.len() > flows.len() - 40,
            "{} of {}",
            ports.len(),
            flows.len()
        );
    }
    let fair = cards * flows.len() / 16;
    assert!(
        queues.len() == 16 && queues.values().all(|n| n.abs_diff(fair) < fair / 5),
        "{queues:?}"
    );
}

#[test]
fn a_tenant_cannot_choose_two_flows_that_always_meet() {
    let mut chance = Chance::new(5);
    let flows = chosen();
    // Each pair of neighbours, over many keys: they meet as seldom as 1 in 16,384 says.
    let mut met = vec![0; flows.len() - 1];
    for _ in 0..500 {
        let random: [u8; FlowHasher::KEY_LEN] =
            chance.bytes(FlowHasher::KEY_LEN).try_into().unwrap();
        let hasher = FlowHasher::new(&random);
        for (count, pair) in met.iter_mut().zip(flows.windows(2)) {
            *count += usize::from(hasher.source_port(&pair[0]) == hasher.source_port(&pair[1]));
        }
    }
    assert!(met.iter().all(|&count| count <= 3), "{met:?}");
}

#[test]
fn the_key_is_not_shown() {
    let shown = format!(
        "{:?} {:?}",
        FlowHasher::new(&[0x5a; 88]),
        Toeplitz::new(&[0x5a; 40])
    );
    assert_eq!(shown, "FlowHasher { .. } Toeplitz { .. }");
}

struct Card(Toeplitz);

impl Card {
    fn new() -> Self {
        Self(Toeplitz::new(&Chance::new(6).bytes(40)))
    }

    fn hash(&self, bytes: &[u8], enabled: u32) -> Option<Rss> {
        self.0.frame(&parsed(bytes), bytes, HashTypes(enabled))
    }

    fn of(&self, report: Report, input: &[&[u8]]) -> Option<Rss> {
        let value = self.0.hash(&input.concat());
        Some(Rss { value, report })
    }
}

const PORTS: [u8; 4] = [4, 0, 0, 80];

#[test]
fn ipv4_is_hashed_by_the_first_type_that_fits() {
    let card = Card::new();
    let (a, b) = (V4_A.octets(), V4_B.octets());
    let tcp = v4(IpProto::TCP, &TCP);
    let datagram = v4(IpProto::UDP, &udp(1024, 80, &[]));
    let by_tcp = card.of(Report::Tcpv4, &[&a, &b, &PORTS]);
    let by_udp = card.of(Report::Udpv4, &[&a, &b, &PORTS]);
    let by_ip = card.of(Report::Ipv4, &[&a, &b]);
    assert_eq!(card.hash(&tcp, 0x1ff), by_tcp);
    assert_eq!(card.hash(&tcp, 0b010), by_tcp);
    assert_eq!(card.hash(&tcp, 0b101), by_ip);
    assert_eq!(card.hash(&tcp, 0b100), None);
    assert_eq!(card.hash(&datagram, 0x1ff), by_udp);
    assert_eq!(card.hash(&datagram, 0b011), by_ip);
    assert_eq!(card.hash(&datagram, 0x1f8), None);
    // Fragments have no ports, nor has what is cut.
    for bits in [0x2000, 0x2001, 0x0001] {
        assert_eq!(card.hash(&fragment(tcp.clone(), bits), 0x1ff), by_ip);
    }
    assert_eq!(card.hash(&v4(IpProto::TCP, &TCP[..19]), 0x1ff), by_ip);
    assert_eq!(card.hash(&ethernet(EtherType::ARP, &[0; 28]), 0x1ff), None);
}

#[test]
fn ipv6_without_extension_headers_has_no_use_for_their_types() {
    let card = Card::new();
    let (a, b) = (V6_A.octets(), V6_B.octets());
    let tcp = v6(IpProto::TCP, &TCP);
    assert_eq!(
        card.hash(&tcp, 0x1ff),
        card.of(Report::Tcpv6, &[&a, &b, &PORTS])
    );
    assert_eq!(card.hash(&tcp, 1 << 3), card.of(Report::Ipv6, &[&a, &b]));
    assert_eq!(card.hash(&tcp, 0x1c0), None);
    let datagram = v6(IpProto::UDP, &udp(1024, 80, &[]));
    assert_eq!(
        card.hash(&datagram, 1 << 5),
        card.of(Report::Udpv6, &[&a, &b, &PORTS])
    );
    assert_eq!(card.hash(&datagram, 1 << 4), None);
}

/// Destination options with a home address, after Pad1 and PadN, and a routing header of type 2; then `transport`.
fn mobile(next: u8, transport: &[u8]) -> (Vec<u8>, [u8; 16], [u8; 16]) {
    let (home, route) = ([0xaa; 16], [0xbb; 16]);
    let mut chain = vec![43, 2, 0, 1, 1, 0, 0xc9, 16];
    chain.extend(home);
    chain.extend([next, 2, 2, 1, 0, 0, 0, 0]);
    chain.extend(route);
    chain.extend(transport);
    (v6(IpProto::DEST_OPTIONS, &chain), home, route)
}

#[test]
fn ipv6_with_extension_headers_is_hashed_by_home_address_and_route() {
    let card = Card::new();
    let (a, b) = (V6_A.octets(), V6_B.octets());
    let (tcp, home, route) = mobile(6, &TCP);
    assert!(matches!(parsed(&tcp), Frame { l4: L4::Tcp(_), .. }));
    assert_eq!(
        card.hash(&tcp, 0x1ff),
        card.of(Report::Tcpv6Ex, &[&home, &route, &PORTS])
    );
    assert_eq!(
        card.hash(&tcp, 1 << 6),
        card.of(Report::Ipv6Ex, &[&home, &route])
    );
    // No type for extension headers that fits: as if they were not there.
    assert_eq!(
        card.hash(&tcp, 0x3f | 1 << 8),
        card.of(Report::Tcpv6, &[&a, &b, &PORTS])
    );
    assert_eq!(card.hash(&tcp, 1 << 3), card.of(Report::Ipv6, &[&a, &b]));
    assert_eq!(card.hash(&tcp, 0b111), None);
    let (datagram, ..) = mobile(17, &udp(1024, 80, &[]));
    assert_eq!(
        card.hash(&datagram, 0x1ff),
        card.of(Report::Udpv6Ex, &[&home, &route, &PORTS])
    );

    // Extension headers without either: the addresses of the header, but by the types for extension headers.
    let options = [&[6, 0, 1, 4, 0, 0, 0, 0][..], &TCP].concat();
    let plain = v6(IpProto::DEST_OPTIONS, &options);
    assert_eq!(
        card.hash(&plain, 0x1ff),
        card.of(Report::Tcpv6Ex, &[&a, &b, &PORTS])
    );
    // An option that is too short to be a home address, and one that overruns its header.
    for option in [[0xc9, 15], [0xc9, 17], [1, 250]] {
        let (mut bytes, ..) = mobile(6, &TCP);
        bytes[54 + 6..54 + 8].copy_from_slice(&option);
        assert_eq!(
            card.hash(&bytes, 0x1ff),
            card.of(Report::Tcpv6Ex, &[&a, &route, &PORTS])
        );
    }
    // A home address that its header is too short for: what follows is no address.
    let short = [&[6, 0, 0xc9, 16, 0, 0, 0, 0][..], &TCP].concat();
    assert_eq!(
        card.hash(&v6(IpProto::DEST_OPTIONS, &short), 0x1ff),
        card.of(Report::Tcpv6Ex, &[&a, &b, &PORTS])
    );
    // Another type of routing header.
    let (mut bytes, ..) = mobile(6, &TCP);
    bytes[54 + 24 + 2] = 0;
    assert_eq!(
        card.hash(&bytes, 0x1ff),
        card.of(Report::Tcpv6Ex, &[&home, &b, &PORTS])
    );
}
