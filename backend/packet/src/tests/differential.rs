//! Random bytes, packets that etherparse builds, and those with bytes changed and cut: read by both, used in every way.

use bluff_testing::times;
use etherparse::PacketBuilder;
use proptest::prelude::*;

use super::{TCP, V6_A};
use crate::fuzzing::{compare, packet_parse, packet_tunnel};
use crate::{IpProto, L3, L4, parse};

/// What etherparse builds, by a few numbers.
#[derive(Clone, Debug)]
struct Recipe {
    macs: [[u8; 6]; 2],
    vlans: u8,
    six: bool,
    addresses: [[u8; 16]; 2],
    ttl: u8,
    transport: u8,
    ports: [u16; 2],
    payload: Vec<u8>,
}

fn recipe() -> impl Strategy<Value = Recipe> {
    let payload = prop::collection::vec(any::<u8>(), 0..64);
    (
        any::<[[u8; 6]; 2]>(),
        0..3u8,
        any::<bool>(),
        any::<[[u8; 16]; 2]>(),
        any::<u8>(),
        0..4u8,
        any::<[u16; 2]>(),
        payload,
    )
        .prop_map(
            |(macs, vlans, six, addresses, ttl, transport, ports, payload)| Recipe {
                macs,
                vlans,
                six,
                addresses,
                ttl,
                transport,
                ports,
                payload,
            },
        )
}

impl Recipe {
    fn build(&self) -> Vec<u8> {
        let vlan = |id| etherparse::VlanId::try_new(id).unwrap();
        let first4 = |bytes: &[u8; 16]| *bytes.first_chunk::<4>().unwrap();
        let link = PacketBuilder::ethernet2(self.macs[0], self.macs[1]);
        let (a, b) = (self.addresses[0], self.addresses[1]);
        let (a4, b4) = (first4(&a), first4(&b));
        let ip = match (self.vlans, self.six) {
            (0, true) => link.ipv6(a, b, self.ttl),
            (0, false) => link.ipv4(a4, b4, self.ttl),
            (1, true) => link.single_vlan(vlan(7)).ipv6(a, b, self.ttl),
            (1, false) => link.single_vlan(vlan(7)).ipv4(a4, b4, self.ttl),
            (_, true) => link.double_vlan(vlan(9), vlan(7)).ipv6(a, b, self.ttl),
            (_, false) => link.double_vlan(vlan(9), vlan(7)).ipv4(a4, b4, self.ttl),
        };
        let mut bytes = Vec::new();
        let [src, dst] = self.ports;
        match (self.transport, self.six) {
            (0, _) => ip
                .tcp(src, dst, 1, 2)
                .ack(3)
                .write(&mut bytes, &self.payload),
            (1, _) => ip.udp(src, dst).write(&mut bytes, &self.payload),
            (2, false) => ip
                .icmpv4_echo_request(1, 2)
                .write(&mut bytes, &self.payload),
            (2, true) => ip
                .icmpv6_echo_request(1, 2)
                .write(&mut bytes, &self.payload),
            _ => ip.write(&mut bytes, etherparse::IpNumber(253), &self.payload),
        }
        .unwrap();
        bytes
    }
}

fn cases() -> ProptestConfig {
    ProptestConfig::with_cases(times(1000, 100_000))
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn any_bytes_are_read_by_both(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        packet_parse(&bytes);
        packet_tunnel(&bytes);
    }

    #[test]
    fn packets_of_etherparse_are_good(recipe in recipe()) {
        use crate::checksum::{Verdict, ipv4_header_is_good, verify};
        let bytes = recipe.build();
        compare(&bytes);
        let frame = parse(&bytes, bytes.len()).unwrap();
        prop_assert_eq!(usize::from(recipe.vlans), frame.l2.tags.as_slice().len());
        let good = match frame.l3 {
            L3::Ipv4(_) => !recipe.six && ipv4_header_is_good(&frame, &bytes) == Some(true),
            L3::Ipv6(_) => recipe.six,
            _ => false,
        };
        prop_assert!(good, "{frame:?}");
        let verdict = verify(&frame, [&bytes[..]]);
        let known = match (recipe.transport, &frame.l4) {
            (0, L4::Tcp(tcp)) => [tcp.src, tcp.dst] == recipe.ports,
            (1, L4::Udp(udp)) => [udp.src, udp.dst] == recipe.ports,
            (2, L4::Icmp(_) | L4::Icmpv6(_)) => true,
            (3, L4::Other) => return Ok(()),
            _ => false,
        };
        prop_assert!(known && verdict == Verdict::Good, "{frame:?} {verdict:?}");
    }

    #[test]
    fn changed_packets_are_read_by_both(
        recipe in recipe(),
        at_hand in any::<u8>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        len in 0usize..200,
    ) {
        let mut bytes = recipe.build();
        // Mostly in the headers.
        let headers = bytes.len().min(90);
        for (at, byte) in changes {
            bytes[at.index(headers)] = byte;
        }
        bytes.truncate(len);
        compare(&bytes);
        packet_parse(&[&[at_hand], &bytes[..]].concat());
    }

    #[test]
    fn chains_of_extension_headers_are_read_by_both(
        first in prop::sample::select(vec![0u8, 43, 44, 51, 60]),
        chain in prop::collection::vec((prop::sample::select(vec![0u8, 6, 17, 43, 44, 51, 58, 59, 60, 135]), 0..3u8, any::<[u8; 6]>()), 0..10),
        len in 0usize..400,
        at_hand in any::<u8>(),
        lie in prop::option::weighted(0.1, any::<u16>()),
    ) {
        let mut payload = Vec::new();
        let mut kind = first;
        for (next, units, data) in chain {
            // AH counts in words of four bytes.
            payload.extend([next, if kind == 51 { units * 2 + 2 } else { units }]);
            payload.extend(data);
            let more = if kind == 44 { 0 } else if kind == 51 { units * 8 + 8 } else { units * 8 };
            payload.extend(vec![1; usize::from(more)]);
            kind = next;
        }
        payload.extend(TCP);
        let mut bytes = super::v6(IpProto(first), &payload);
        bytes[22..38].copy_from_slice(&V6_A.octets());
        if let Some(lie) = lie {
            bytes[18..20].copy_from_slice(&lie.to_be_bytes());
        }
        bytes.truncate(len);
        compare(&bytes);
        packet_parse(&[&[at_hand], &bytes[..]].concat());
    }

    #[test]
    fn tunnels_of_changed_packets(
        recipe in recipe(),
        geneve in any::<bool>(),
        mut header in any::<[u8; 8]>(),
        options in 0..3u8,
        at_hand in any::<u8>(),
    ) {
        if geneve {
            header[0] = options;
            header[2..4].copy_from_slice(&[0x65, 0x58]);
        }
        let options = if geneve { vec![0; usize::from(options) * 4] } else { Vec::new() };
        packet_tunnel(&[&[at_hand], &header[..], &options, &recipe.build()].concat());
    }
}
