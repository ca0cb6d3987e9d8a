//! Outer headers: made once for frames of one network to one VTEP, and filled in for each.

use std::net::IpAddr;

use bluff_packet::build::{Ipv4Fields, Ipv6Fields, Writer};
use bluff_packet::{EtherType, IpProto, L2, Mac, Macs, Tags, Vni};

use super::WireOptions;
use crate::udp::TunnelKind;

const HOPS: u8 = 64;
const ETHERNET: usize = 14;
/// Bytes of UDP's header, and of the tunnel's.
const UDP: usize = 8;
const TUNNEL: usize = 8;
const MAX: usize = ETHERNET + 40 + UDP + TUNNEL;

/// All outer headers of a frame but what differs from frame to frame.
pub(super) struct Outer {
    bytes: [u8; MAX],
    len: usize,
    ipv4: bool,
    /// The sum of an IPv4 header's words, without those that are filled in.
    sum: u32,
}

impl Outer {
    /// `None`: the addresses are of different families.
    pub(super) fn new(options: &WireOptions, vni: Vni, to: IpAddr, mac: Mac) -> Option<Self> {
        let ipv4 = to.is_ipv4();
        let l2 = L2 {
            macs: Macs {
                dst: mac,
                src: options.mac,
            },
            tags: Tags::NONE,
            ethertype: if ipv4 {
                EtherType::IPV4
            } else {
                EtherType::IPV6
            },
        };
        let mut bytes = [0; MAX];
        let mut writer = Writer::new(&mut bytes);
        let ip = writer
            .ethernet(&l2)
            .and_then(|w| match (options.local, to) {
                (IpAddr::V4(src), IpAddr::V4(dst)) => {
                    let fields = Ipv4Fields {
                        src,
                        dst,
                        proto: IpProto::UDP,
                        tos: 0,
                        ttl: HOPS,
                        id: 0,
                        dont_fragment: true,
                    };
                    w.ipv4(&fields, 0).map(Some)
                }
                (IpAddr::V6(src), IpAddr::V6(dst)) => {
                    let fields = Ipv6Fields {
                        src,
                        dst,
                        next: IpProto::UDP,
                        traffic_class: 0,
                        flow_label: 0,
                        hop_limit: HOPS,
                    };
                    w.ipv6(&fields, 0).map(Some)
                }
                _ => Ok(None),
            });
        // Without a checksum: legal for tunnels over both (RFC 7348 §5, RFC 8926 §3.3, RFC 6935 §5); what is inside has its own.
        let udp = ip.ok()??.udp(0, options.port, 0, 0);
        let all = udp.and_then(|w| match options.kind {
            TunnelKind::Vxlan => w.vxlan(vni),
            TunnelKind::Geneve => w.geneve(vni, &[], false),
        });
        let len = all.ok()?.len();
        let mut sum = 0;
        if ipv4 {
            // Length and checksum.
            bytes[16..18].fill(0);
            bytes[24..26].fill(0);
            let words = bytes[ETHERNET..ETHERNET + 20].as_chunks::<2>().0;
            sum = words
                .iter()
                .map(|w| u32::from(u16::from_be_bytes(*w)))
                .sum();
        }
        Some(Self {
            bytes,
            len,
            ipv4,
            sum,
        })
    }

    /// Bytes of all headers.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Bytes of those from IP on.
    pub(super) fn ip_len(&self) -> usize {
        self.len - ETHERNET
    }

    /// Writes the headers of a frame of `inner` bytes. `marks`: its congestion marks; `id`: the number of an IPv4 packet.
    ///
    /// # Panics
    /// Where `to` is not as long as the headers.
    #[inline]
    pub(super) fn write(&self, to: &mut [u8], inner: usize, source: u16, marks: u8, id: u16) {
        to.copy_from_slice(&self.bytes[..self.len]);
        let datagram = (UDP + TUNNEL + inner) as u16;
        let udp = self.len - UDP - TUNNEL;
        if self.ipv4 {
            let total = datagram.wrapping_add(20);
            to[15] = marks;
            to[16..18].copy_from_slice(&total.to_be_bytes());
            to[18..20].copy_from_slice(&id.to_be_bytes());
            let sum = self.sum + u32::from(marks) + u32::from(total) + u32::from(id);
            // At most 13 words of 16 bits: two folds leave no carry (RFC 1071).
            let sum = (sum & 0xffff) + (sum >> 16);
            let sum = (sum & 0xffff) + (sum >> 16);
            to[24..26].copy_from_slice(&(!(sum as u16)).to_be_bytes());
        } else {
            // The traffic class lies across two bytes.
            to[15] = marks << 4;
            to[18..20].copy_from_slice(&datagram.to_be_bytes());
        }
        to[udp..udp + 2].copy_from_slice(&source.to_be_bytes());
        to[udp + 4..udp + 6].copy_from_slice(&datagram.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use bluff_packet::checksum::ipv4_header_is_good;
    use bluff_packet::{L3, L4, parse};
    use proptest::prelude::*;

    use super::*;

    fn outer(v6: bool, kind: TunnelKind) -> Outer {
        let at = |n: u8| -> IpAddr {
            match v6 {
                false => [10, 255, 254, n].into(),
                true => [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, n].into(),
            }
        };
        let options = WireOptions {
            local: at(1),
            mac: Mac([2, 0, 0, 0, 0, 1]),
            gateway: None,
            kind,
            port: kind.port(),
            mtu: 9000,
        };
        let mac = Mac([2, 0, 0, 0, 0, 2]);
        let vni = Vni::new(5001).unwrap();
        let other: IpAddr = if v6 {
            [1, 2, 3, 4].into()
        } else {
            [1; 16].into()
        };
        assert!(Outer::new(&options, vni, other, mac).is_none());
        Outer::new(&options, vni, at(2), mac).unwrap()
    }

    proptest! {
        #[test]
        fn what_is_filled_in_is_what_is_read(
            (v6, geneve) in any::<(bool, bool)>(),
            (source, marks, id) in (any::<u16>(), 0u8..4, any::<u16>()),
            inner in prop_oneof![14usize..1500, 14usize..65_450],
        ) {
            let kind = if geneve { TunnelKind::Geneve } else { TunnelKind::Vxlan };
            let outer = outer(v6, kind);
            let mut frame = vec![0; outer.len() + inner];
            outer.write(&mut frame[..outer.len()], inner, source, marks, id);
            let packet = parse(&frame[..outer.len()], frame.len()).unwrap();
            prop_assert_eq!(packet.l3_end(), Some(frame.len()));
            match packet.l3 {
                L3::Ipv4(ip) => {
                    prop_assert!(!v6 && ip.tos == marks && ip.dont_fragment);
                    prop_assert_eq!(ipv4_header_is_good(&packet, &frame), Some(true));
                    prop_assert_eq!(&frame[18..20], &id.to_be_bytes());
                }
                L3::Ipv6(ip) => prop_assert!(v6 && ip.traffic_class == marks),
                other => panic!("{other:?}"),
            }
            let L4::Udp(udp) = packet.l4 else { panic!("{packet:?}") };
            prop_assert_eq!((udp.src, udp.dst), (source, kind.port()));
            prop_assert_eq!(usize::from(udp.len), 16 + inner);
        }
    }
}
