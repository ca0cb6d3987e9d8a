//! The Toeplitz hash of receive-side scaling, over the fields that virtio names (virtio 1.3 §5.1.6.4.3).

use core::fmt;

use crate::frame::{Fragment, Frame, L3, L4};
use crate::ipv6::Ipv6;

/// Bytes that a hash covers at most: two IPv6 addresses and two ports.
const INPUT: usize = 36;

/// Which hashes are enabled, or supported (`VIRTIO_NET_HASH_TYPE_*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HashTypes(pub u32);

impl HashTypes {
    /// Addresses of IPv4.
    pub const IPV4: Self = Self(1 << 0);
    /// Addresses and ports of TCP over IPv4.
    pub const TCPV4: Self = Self(1 << 1);
    /// Addresses and ports of UDP over IPv4.
    pub const UDPV4: Self = Self(1 << 2);
    /// Addresses of IPv6.
    pub const IPV6: Self = Self(1 << 3);
    /// Addresses and ports of TCP over IPv6.
    pub const TCPV6: Self = Self(1 << 4);
    /// Addresses and ports of UDP over IPv6.
    pub const UDPV6: Self = Self(1 << 5);
    /// Addresses of IPv6 with extension headers: the home address, and the one in a routing header of type 2, where they are.
    pub const IP_EX: Self = Self(1 << 6);
    /// The same, with ports of TCP.
    pub const TCP_EX: Self = Self(1 << 7);
    /// The same, with ports of UDP.
    pub const UDP_EX: Self = Self(1 << 8);
    /// All that are implemented.
    pub const ALL: Self = Self(0x1ff);

    #[inline(always)]
    const fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

/// How a hash was computed, as a device reports it (`VIRTIO_NET_HASH_REPORT_*`, virtio 1.3 §5.1.6.4.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Report {
    /// Addresses of IPv4.
    Ipv4 = 1,
    /// TCP over IPv4.
    Tcpv4 = 2,
    /// UDP over IPv4.
    Udpv4 = 3,
    /// Addresses of IPv6.
    Ipv6 = 4,
    /// TCP over IPv6.
    Tcpv6 = 5,
    /// UDP over IPv6.
    Udpv6 = 6,
    /// Addresses of IPv6 with extension headers.
    Ipv6Ex = 7,
    /// TCP over IPv6 with extension headers.
    Tcpv6Ex = 8,
    /// UDP over IPv6 with extension headers.
    Udpv6Ex = 9,
}

/// The hash of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rss {
    /// The value.
    pub value: u32,
    /// What it covers.
    pub report: Report,
}

/// A key, laid out for looking up four bits at a time: 4.5 KiB. Made when the key is set, and not on the data path.
#[derive(Clone)]
pub struct Toeplitz {
    /// For each half byte of the input, the higher one first, what each of its values adds.
    table: [[u32; 16]; INPUT * 2],
}

impl Toeplitz {
    /// A key of 40 bytes is what the hash over IPv6 with ports wants (36 bytes of input, and 32 bits). Bytes that are missing count as
    /// zero, those beyond are not used.
    pub fn new(key: &[u8]) -> Self {
        let bit = |at: usize| {
            let byte = key.get(at / 8).copied().unwrap_or(0);
            u32::from(byte >> (7 - at % 8) & 1)
        };
        let mut table = [[0; 16]; INPUT * 2];
        for (half, row) in table.iter_mut().enumerate() {
            for nibble_bit in 0..4 {
                // The 32 bits of the key that begin with this bit of the input.
                let at = half * 4 + nibble_bit;
                let window = (at..at + 32).fold(0, |word, at| word << 1 | bit(at));
                for (value, sum) in row.iter_mut().enumerate() {
                    if value >> (3 - nibble_bit) & 1 == 1 {
                        *sum ^= window;
                    }
                }
            }
        }
        Self { table }
    }

    /// The hash of these bytes: 36 at most, what is beyond is left out.
    #[inline]
    pub fn hash(&self, input: &[u8]) -> u32 {
        let (rows, _) = self.table.as_chunks::<2>();
        rows.iter().zip(input).fold(0, |sum, ([high, low], byte)| {
            sum ^ high[usize::from(byte >> 4)] ^ low[usize::from(byte & 0xf)]
        })
    }

    /// The hash of a frame, by the first of the enabled types that fits it; `None` if none does. `head` is what the frame was parsed from.
    ///
    /// Fragments, the first one too, are hashed by addresses alone, so that all of a packet go to one queue: a
    /// later one has no ports. A transport header at fault counts as none.
    #[inline]
    pub fn frame(&self, frame: &Frame, head: &[u8], enabled: HashTypes) -> Option<Rss> {
        let transport = match &frame.l4 {
            _ if frame.fragment() != Fragment::No => Transport::Other,
            L4::Tcp(tcp) => Transport::Tcp(tcp.src, tcp.dst),
            L4::Udp(udp) => Transport::Udp(udp.src, udp.dst),
            _ => Transport::Other,
        };
        let mut input = [0; INPUT];
        match &frame.l3 {
            L3::Ipv4(ip) => {
                let chosen = choose(
                    transport,
                    enabled,
                    [HashTypes::TCPV4, HashTypes::UDPV4, HashTypes::IPV4],
                    [Report::Tcpv4, Report::Udpv4, Report::Ipv4],
                )?;
                input[..4].copy_from_slice(&ip.src.octets());
                input[4..8].copy_from_slice(&ip.dst.octets());
                Some(self.finish(&mut input, 8, chosen))
            }
            L3::Ipv6(ip) => self.ipv6(ip, transport, head, enabled),
            _ => None,
        }
    }

    #[inline]
    fn ipv6(
        &self,
        ip: &Ipv6,
        transport: Transport,
        head: &[u8],
        enabled: HashTypes,
    ) -> Option<Rss> {
        let extended = if ip.extensions.is_none() {
            None
        } else {
            choose(
                transport,
                enabled,
                [HashTypes::TCP_EX, HashTypes::UDP_EX, HashTypes::IP_EX],
                [Report::Tcpv6Ex, Report::Udpv6Ex, Report::Ipv6Ex],
            )
        };
        let mut input = [0; INPUT];
        input[..16].copy_from_slice(&ip.src.octets());
        input[16..32].copy_from_slice(&ip.dst.octets());
        let chosen = if let Some(chosen) = extended {
            for (at, to) in [(ip.home, 0), (ip.route, 16)] {
                let at = usize::from(at);
                if at != 0
                    && let Some(address) = head.get(at..at + 16)
                {
                    input[to..to + 16].copy_from_slice(address);
                }
            }
            chosen
        } else {
            // With extension headers too: they are skipped where no type for them is enabled.
            choose(
                transport,
                enabled,
                [HashTypes::TCPV6, HashTypes::UDPV6, HashTypes::IPV6],
                [Report::Tcpv6, Report::Udpv6, Report::Ipv6],
            )?
        };
        Some(self.finish(&mut input, 32, chosen))
    }

    #[inline(always)]
    fn finish(&self, input: &mut [u8; INPUT], addresses: usize, chosen: Chosen) -> Rss {
        let len = match chosen.ports {
            Some((src, dst)) => {
                input[addresses..addresses + 2].copy_from_slice(&src.to_be_bytes());
                input[addresses + 2..addresses + 4].copy_from_slice(&dst.to_be_bytes());
                addresses + 4
            }
            None => addresses,
        };
        Rss {
            value: self.hash(&input[..len]),
            report: chosen.report,
        }
    }
}

impl fmt::Debug for Toeplitz {
    /// Without the key.
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.debug_struct("Toeplitz").finish_non_exhaustive()
    }
}

#[derive(Clone, Copy)]
enum Transport {
    Tcp(u16, u16),
    Udp(u16, u16),
    Other,
}

#[derive(Clone, Copy)]
struct Chosen {
    report: Report,
    ports: Option<(u16, u16)>,
}

/// The transport's type where it is enabled, else that of IP.
#[inline(always)]
fn choose(
    transport: Transport,
    enabled: HashTypes,
    [tcp, udp, ip]: [HashTypes; 3],
    [tcp_report, udp_report, ip_report]: [Report; 3],
) -> Option<Chosen> {
    let (report, ports) = match transport {
        Transport::Tcp(src, dst) if enabled.has(tcp) => (tcp_report, Some((src, dst))),
        Transport::Udp(src, dst) if enabled.has(udp) => (udp_report, Some((src, dst))),
        _ if enabled.has(ip) => (ip_report, None),
        _ => return None,
    };
    Some(Chosen { report, ports })
}

#[cfg(test)]
mod tests {
    use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    /// Of Microsoft's "Verifying the RSS Hash Calculation".
    pub(crate) const KEY: [u8; 40] = [
        0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f,
        0xb0, 0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30,
        0xf2, 0x0c, 0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
    ];

    fn input(src: IpAddr, dst: IpAddr, ports: Option<(u16, u16)>) -> Vec<u8> {
        let mut input = Vec::new();
        for address in [src, dst] {
            match address {
                IpAddr::V4(v4) => input.extend(v4.octets()),
                IpAddr::V6(v6) => input.extend(v6.octets()),
            }
        }
        if let Some((src, dst)) = ports {
            input.extend(src.to_be_bytes());
            input.extend(dst.to_be_bytes());
        }
        input
    }

    #[test]
    fn the_published_vectors() {
        let vectors: [(&str, u16, &str, u16, u32, u32); 8] = [
            (
                "161.142.100.80",
                1766,
                "66.9.149.187",
                2794,
                0x323e_8fc2,
                0x51cc_c178,
            ),
            (
                "65.69.140.83",
                4739,
                "199.92.111.2",
                14230,
                0xd718_262a,
                0xc626_b0ea,
            ),
            (
                "12.22.207.184",
                38024,
                "24.19.198.95",
                12898,
                0xd2d0_a5de,
                0x5c2b_394a,
            ),
            (
                "209.142.163.6",
                2217,
                "38.27.205.30",
                48228,
                0x8298_9176,
                0xafc7_327f,
            ),
            (
                "202.188.127.2",
                1303,
                "153.39.163.191",
                44251,
                0x5d18_09c5,
                0x10e8_28a2,
            ),
            (
                "3ffe:2501:200:3::1",
                1766,
                "3ffe:2501:200:1fff::7",
                2794,
                0x2cc1_8cd5,
                0x4020_7d3d,
            ),
            (
                "ff02::1",
                4739,
                "3ffe:501:8::260:97ff:fe40:efab",
                14230,
                0x0f0c_461c,
                0xdde5_1bbf,
            ),
            (
                "fe80::200:f8ff:fe21:67cf",
                38024,
                "3ffe:1900:4545:3:200:f8ff:fe21:67cf",
                44251,
                0x4b61_e985,
                0x02d1_feef,
            ),
        ];
        let hash = Toeplitz::new(&KEY);
        for (dst, dst_port, src, src_port, addresses, ports) in vectors {
            let (src_ip, dst_ip) = (src.parse().unwrap(), dst.parse().unwrap());
            assert_eq!(
                hash.hash(&input(src_ip, dst_ip, None)),
                addresses,
                "{src} > {dst}"
            );
            let with_ports = input(src_ip, dst_ip, Some((src_port, dst_port)));
            assert_eq!(
                hash.hash(&with_ports),
                ports,
                "{src}:{src_port} > {dst}:{dst_port}"
            );
        }
    }

    #[test]
    fn nothing_is_read_past_a_short_key_or_a_long_input() {
        let short = Toeplitz::new(&[]);
        assert_eq!(short.hash(&[0xff; 100]), 0);
        let hash = Toeplitz::new(&KEY);
        assert_eq!(hash.hash(&[0xff; 100]), hash.hash(&[0xff; 36]));
        let any = input(Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into(), None);
        assert_ne!(hash.hash(&any), 0);
    }

    proptest! {
        #[test]
        fn the_table_is_the_definition(
            key in prop::collection::vec(any::<u8>(), 40),
            input in prop::collection::vec(any::<u8>(), 0..=36),
        ) {
            // Bit by bit: the key's window moves on by one, and counts where the input has a one.
            let mut window = u64::from_be_bytes(*key.first_chunk().unwrap());
            let mut wanted = 0u32;
            for (index, byte) in input.iter().enumerate() {
                for bit in (0..8).rev() {
                    if byte >> bit & 1 == 1 {
                        wanted ^= (window >> 32) as u32;
                    }
                    window <<= 1;
                }
                window |= u64::from(key.get(index + 8).copied().unwrap_or(0));
            }
            prop_assert_eq!(Toeplitz::new(&key).hash(&input), wanted);
        }
    }
}
