//! Which flow a frame belongs to, and a keyed hash of that: the entropy of a tunnel's source port.

use crate::frame::{Fragment, Frame, L3, L4};

/// What is the same for all frames of a flow. Padding, tags, TTL and TOS do not belong to it.
///
/// | frame | key |
/// |---|---|
/// | whole TCP or UDP over IP | addresses, protocol, ports |
/// | fragments, also the first; other protocols; a transport at fault | addresses, protocol |
/// | anything else, IP at fault among it | both MAC addresses, ethertype |
///
/// Keys of different rows are never equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// What kind of key, and the protocol or the ethertype.
    kind: u32,
    ports: u32,
    addresses: [u32; 8],
}

const MACS: u32 = 1 << 16;
const IPV4: u32 = 2 << 16;
const IPV6: u32 = 3 << 16;
/// Ports are part of the key: port 0 is a port.
const PORTS: u32 = 8 << 16;

impl FlowKey {
    /// The flow of a frame.
    #[inline]
    pub fn new(frame: &Frame) -> Self {
        let mut key = match &frame.l3 {
            L3::Ipv4(ip) => Self {
                kind: IPV4 | u32::from(ip.proto.0),
                ports: 0,
                addresses: [ip.src.to_bits(), ip.dst.to_bits(), 0, 0, 0, 0, 0, 0],
            },
            L3::Ipv6(ip) => {
                let [a, b, c, d] = words(ip.src.to_bits());
                let [e, f, g, h] = words(ip.dst.to_bits());
                Self {
                    kind: IPV6 | u32::from(ip.proto.0),
                    ports: 0,
                    addresses: [a, b, c, d, e, f, g, h],
                }
            }
            _ => return Self::of_link(frame),
        };
        if frame.fragment() == Fragment::No {
            let ports = match &frame.l4 {
                L4::Tcp(tcp) => Some((tcp.src, tcp.dst)),
                L4::Udp(udp) => Some((udp.src, udp.dst)),
                _ => None,
            };
            if let Some((src, dst)) = ports {
                key.kind |= PORTS;
                key.ports = u32::from(src) << 16 | u32::from(dst);
            }
        }
        key
    }

    /// The key that the flow has in common with the flow of the answers: its two ends in an order of their own.
    #[inline]
    pub fn either_way(mut self) -> Self {
        let [a, b, c, d, e, f, g, h] = self.addresses;
        let (src, dst, swapped) = match self.kind & IPV6 {
            IPV4 => (u128::from(a), u128::from(b), [b, a, c, d, e, f, g, h]),
            MACS => (
                wide([0, 0, a, b]),
                wide([0, 0, c, d]),
                [c, d, a, b, e, f, g, h],
            ),
            _ => (
                wide([a, b, c, d]),
                wide([e, f, g, h]),
                [e, f, g, h, a, b, c, d],
            ),
        };
        let ports = self.ports.rotate_left(16);
        if (dst, ports) < (src, self.ports) {
            (self.addresses, self.ports) = (swapped, ports);
        }
        self
    }

    fn of_link(frame: &Frame) -> Self {
        let (src, dst) = (frame.l2.src().bits(), frame.l2.dst().bits());
        Self {
            kind: MACS | u32::from(frame.l2.ethertype.0),
            ports: 0,
            addresses: [
                (src >> 32) as u32,
                src as u32,
                (dst >> 32) as u32,
                dst as u32,
                0,
                0,
                0,
                0,
            ],
        }
    }
}

#[inline(always)]
fn wide([a, b, c, d]: [u32; 4]) -> u128 {
    u128::from(a) << 96 | u128::from(b) << 64 | u128::from(c) << 32 | u128::from(d)
}

#[inline(always)]
fn words(bits: u128) -> [u32; 4] {
    [
        (bits >> 96) as u32,
        (bits >> 64) as u32,
        (bits >> 32) as u32,
        bits as u32,
    ]
}

/// Hashes flows with a key of the card's own.
///
/// The hash is Multilinear-HM (Lemire and Kaser, "Strongly universal string hashing is fast", 2013): the upper half of
/// `m0 + (m1 + x1)(m2 + x2) + (m3 + x3)(m4 + x4) + ...` in 64 bits, over words of 32. For a key drawn at random it is strongly
/// universal: whatever two flows a tenant chooses, they meet in one value with a chance of 2^-32, so it cannot aim flows at one queue of
/// the underlay, or at another tenant's. It is no MAC: who saw many hashes could compute the key. A tenant sees none, as
/// outer headers never reach it.
#[derive(Clone, Copy)]
pub struct FlowHasher {
    start: u64,
    key: [u64; 10],
}

impl FlowHasher {
    /// Bytes of a key.
    pub const KEY_LEN: usize = 88;

    /// The lowest source port (the dynamic ports of RFC 6335 §6, as RFC 7348 §5 recommends).
    pub const FIRST_PORT: u16 = 49_152;

    /// Takes a key: random bytes that no tenant knows. One for all tunnels of a card.
    pub fn new(key: &[u8; Self::KEY_LEN]) -> Self {
        let mut words = [0; 11];
        for (word, bytes) in words.iter_mut().zip(key.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        let [start, key @ ..] = words;
        Self { start, key }
    }

    /// The hash of a flow.
    #[inline]
    pub fn hash(&self, flow: &FlowKey) -> u32 {
        let m = &self.key;
        let pair = |i: usize, x: u32, y: u32| {
            m[i].wrapping_add(u64::from(x))
                .wrapping_mul(m[i + 1].wrapping_add(u64::from(y)))
        };
        let [a, b, c, d, e, f, g, h] = flow.addresses;
        let mut sum = self
            .start
            .wrapping_add(pair(0, flow.kind, flow.ports))
            .wrapping_add(pair(2, a, b));
        // Keys of IPv4 end here. It stays universal, as they differ from all others in the first word.
        if flow.kind & IPV6 != IPV4 {
            sum = sum
                .wrapping_add(pair(4, c, d))
                .wrapping_add(pair(6, e, f))
                .wrapping_add(pair(8, g, h));
        }
        (sum >> 32) as u32
    }

    /// The source port of the tunnel's datagram for this flow: 49,152 to 65,535.
    #[inline]
    pub fn source_port(&self, flow: &FlowKey) -> u16 {
        Self::FIRST_PORT | (self.hash(flow) >> 18) as u16
    }
}

impl core::fmt::Debug for FlowHasher {
    /// Without the key.
    fn fmt(&self, to: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        to.debug_struct("FlowHasher").finish_non_exhaustive()
    }
}
