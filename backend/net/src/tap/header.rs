//! The header before each frame: virtio's, with the places of a tunnel behind it (`struct virtio_net_hdr_v1_hash_tunnel`).

use bluff_packet::{Fragment, Frame as Packet, L3, L4};
use zerocopy::byteorder::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Carries;
use crate::{Csum, Gso, GsoKind, HEAD, Offload};

/// Bytes of the header without the places of a tunnel (`virtio_net_hdr_v1`).
pub(super) const HEADER: usize = 12;
/// Bytes of the header with them.
pub(super) const HEADER_TUNNEL: usize = 24;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
/// The outer packet is of IPv4, or of IPv6: so Linux has it, where the text of virtio 1.4 means the inner one.
const GSO_TUNNEL_IPV4: u8 = 0x20;
const GSO_TUNNEL_IPV6: u8 = 0x40;
const GSO_ECN: u8 = 0x80;

/// Bytes of Ethernet's header before an outer packet: the card writes none with tags.
const ETHERNET: usize = 14;

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: U16,
    gso_size: U16,
    csum_start: U16,
    csum_offset: U16,
    num_buffers: U16,
    /// Never used here, and not initialised by kernels of before the middle of 2026.
    hash: [u8; 8],
    /// Where the outer UDP header begins.
    outer_transport: U16,
    /// Where the inner IP header begins.
    inner_network: U16,
}

const _: () = assert!(size_of::<Header>() == HEADER_TUNNEL);
const _: () = assert!(std::mem::offset_of!(Header, outer_transport) == 20);

/// Why a frame of the kernel's cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadHeader {
    /// A kind of segmentation that was not asked for.
    #[error("unknown segmentation {0:#x}")]
    Kind(u8),
    /// Places outside of the frame's head, out of order, or not those of its headers.
    #[error("a place that makes no sense")]
    Place,
}

impl Header {
    /// What is before a frame of `len` bytes whose head is `head`. One that is to be cut is a tunnelled one where the device carries those.
    pub(super) fn new(offload: &Offload, head: &[u8], len: usize, carries: Carries) -> Self {
        let mut header = Self::default();
        if let Csum::Partial { start, offset } = offload.csum {
            header.flags = NEEDS_CSUM;
            header.csum_start.set(start);
            header.csum_offset.set(offset);
        }
        // The kernel takes one that would stay whole for one without segmentation, and stumbles over what is said of it.
        let Some(gso) = offload.gso.filter(|gso| gso.segments(len) > 1) else {
            return header;
        };
        header.gso_type = match gso.kind {
            GsoKind::Tcp4 => GSO_TCPV4,
            GsoKind::Tcp6 => GSO_TCPV6,
            GsoKind::Udp => GSO_UDP_L4,
        };
        if gso.ecn {
            header.gso_type |= GSO_ECN;
        }
        header.gso_size.set(gso.size);
        header.hdr_len.set(gso.headers);
        if carries == Carries::Tunnels {
            let ipv4 = head.get(ETHERNET).is_some_and(|byte| byte >> 4 == 4);
            let (family, ip) = match ipv4 {
                true => (GSO_TUNNEL_IPV4, 20),
                false => (GSO_TUNNEL_IPV6, 40),
            };
            header.gso_type |= family;
            header.outer_transport.set((ETHERNET + ip) as u16);
            header.inner_network.set(gso.network);
        }
        header
    }

    /// What is left to do on a frame that was read. `packet` is what its headers say.
    ///
    /// # Errors
    /// [`BadHeader`]. The kernel has checked the frame, but not for us.
    pub(super) fn offload(
        &self,
        packet: &Packet,
        head: &[u8],
        len: usize,
    ) -> Result<Offload, BadHeader> {
        let (start, offset) = (self.csum_start.get(), self.csum_offset.get());
        let csum = match self.flags {
            flags if flags & NEEDS_CSUM != 0 => {
                if usize::from(start) + usize::from(offset) + 2 > head.len().min(HEAD) {
                    return Err(BadHeader::Place);
                }
                Csum::Partial { start, offset }
            }
            // Of the outermost checksum, which is nothing that a tunnelled frame has.
            flags if flags & DATA_VALID != 0 => Csum::Valid,
            _ => Csum::Unknown,
        };
        let tunnel = self.gso_type & (GSO_TUNNEL_IPV4 | GSO_TUNNEL_IPV6);
        let plain = self.gso_type & !(GSO_TUNNEL_IPV4 | GSO_TUNNEL_IPV6 | GSO_ECN);
        let kind = match plain {
            0 if self.gso_type == 0 => return Ok(Offload { csum, gso: None }),
            GSO_TCPV4 => GsoKind::Tcp4,
            GSO_TCPV6 => GsoKind::Tcp6,
            GSO_UDP_L4 => GsoKind::Udp,
            _ => return Err(BadHeader::Kind(self.gso_type)),
        };
        let transport = usize::from(start);
        let network = match tunnel {
            0 if packet.l4_offset() == Some(transport) => packet.l3_offset(),
            0 => return Err(BadHeader::Place),
            _ => usize::from(self.inner_network.get()),
        };
        let (headers, place) = match kind {
            GsoKind::Udp => (transport + 8, 6),
            GsoKind::Tcp4 | GsoKind::Tcp6 => {
                let words = head.get(transport + 12).ok_or(BadHeader::Place)? >> 4;
                (transport + 4 * usize::from(words), 16)
            }
        };
        let begun = matches!(csum, Csum::Partial { .. }) && usize::from(offset) == place;
        let order = network < transport && transport + place < headers;
        let inside = headers <= head.len().min(HEAD) && headers < len;
        if !begun || !order || !inside || self.gso_size.get() == 0 {
            return Err(BadHeader::Place);
        }
        if tunnel == 0 && !is_whole(packet, kind, len) {
            return Err(BadHeader::Place);
        }
        let gso = Gso {
            kind,
            ecn: self.gso_type & GSO_ECN != 0,
            size: self.gso_size.get(),
            network: network as u16,
            transport: start,
            headers: headers as u16,
        };
        Ok(Offload {
            csum,
            gso: Some(gso),
        })
    }
}

/// Whether a frame that is in no tunnel is a whole packet of a kind.
fn is_whole(packet: &Packet, kind: GsoKind, len: usize) -> bool {
    let fits = match (kind, &packet.l3, &packet.l4) {
        (GsoKind::Tcp4, L3::Ipv4(_), L4::Tcp(_)) | (GsoKind::Udp, L3::Ipv4(_), L4::Udp(_)) => true,
        (GsoKind::Tcp6, L3::Ipv6(ip), L4::Tcp(_)) | (GsoKind::Udp, L3::Ipv6(ip), L4::Udp(_)) => {
            ip.addresses_are_final()
        }
        _ => false,
    };
    fits && packet.fragment() == Fragment::No && packet.l3_end() == Some(len)
}

/// Whether a checksum that is left to be completed is the one of the frame's own transport header.
pub(super) fn is_own(offload: &Offload, packet: &Packet) -> bool {
    let Csum::Partial { start, offset } = offload.csum else {
        return true;
    };
    let field = match packet.l4 {
        L4::Tcp(_) => 16,
        L4::Udp(_) => 6,
        _ => return false,
    };
    offset == field && packet.l4_offset() == Some(usize::from(start))
}

#[cfg(test)]
mod tests {
    use bluff_packet::parse;
    use proptest::prelude::*;

    use super::*;

    /// Ethernet, IPv4 and TCP, and `before` bytes in front of them.
    fn tcp4(before: &[u8], payload: usize) -> Vec<u8> {
        let mut frame = before.to_vec();
        frame.extend([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, 0x45, 0]);
        frame.extend((payload as u16 + 40).to_be_bytes());
        frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([
            0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0, 0, 0, 0, 0, 0, 0,
        ]);
        frame.resize(frame.len() + payload, 7);
        frame
    }

    fn left(at: u16) -> Offload {
        let gso = Gso {
            kind: GsoKind::Tcp4,
            ecn: false,
            size: 1000,
            network: at + 14,
            transport: at + 34,
            headers: at + 54,
        };
        let csum = Csum::Partial {
            start: at + 34,
            offset: 16,
        };
        Offload {
            csum,
            gso: Some(gso),
        }
    }

    fn read(header: &Header, frame: &[u8]) -> Result<Offload, BadHeader> {
        let head = &frame[..frame.len().min(HEAD)];
        header.offload(&parse(head, frame.len()).unwrap(), head, frame.len())
    }

    #[test]
    fn what_is_left_to_do_crosses() {
        let frame = tcp4(&[], 5000);
        let header = Header::new(&left(0), &frame, frame.len(), Carries::Frames);
        assert_eq!(
            header.as_bytes()[..10],
            [1, 1, 54, 0, 0xe8, 3, 34, 0, 16, 0]
        );
        assert_eq!(header.as_bytes()[10..], [0; 14]);
        assert_eq!(read(&header, &frame), Ok(left(0)));
        // One that stays whole is one without segmentation.
        let frame = tcp4(&[], 1000);
        let header = Header::new(&left(0), &frame, frame.len(), Carries::Frames);
        let csum = left(0).csum;
        assert_eq!(read(&header, &frame), Ok(Offload { csum, gso: None }));
    }

    #[test]
    fn a_tunnel_is_told_by_the_outer_family() {
        for (ip, version, bit, transport) in [(20, 0x45, 0x20, 34), (40, 0x60, 0x40, 54)] {
            let mut outer = vec![0; 14 + ip + 16];
            outer[12..14].copy_from_slice(&if ip == 20 { [8, 0] } else { [0x86, 0xdd] });
            outer[14] = version;
            let at = outer.len() as u16;
            let frame = tcp4(&outer, 5000);
            let header = Header::new(&left(at), &frame, frame.len(), Carries::Tunnels);
            assert_eq!(header.gso_type, 1 | bit);
            assert_eq!(header.outer_transport.get(), transport);
            assert_eq!(header.inner_network.get(), at + 14);
            // What it reads is what it wrote; of the outer packet it asks nothing.
            let packet = parse(&tcp4(&[], 10), 64).unwrap();
            let read = header.offload(&packet, &frame[..HEAD], frame.len());
            assert_eq!(read, Ok(left(at)));
        }
    }

    /// The kernel is not believed either.
    #[test]
    fn headers_that_make_no_sense() {
        let frame = tcp4(&[], 5000);
        let good = Header::new(&left(0), &frame, frame.len(), Carries::Frames);
        type Change = fn(&mut Header);
        let cases: [(Change, BadHeader); 9] = [
            (|h| h.gso_type = 3, BadHeader::Kind(3)),
            (|h| h.gso_type = 0x80, BadHeader::Kind(0x80)),
            (|h| h.gso_type = 4, BadHeader::Place),
            (|h| h.gso_type = 5, BadHeader::Place),
            (|h| h.flags = 0, BadHeader::Place),
            (|h| h.gso_size.set(0), BadHeader::Place),
            (|h| h.csum_start.set(30), BadHeader::Place),
            (|h| h.csum_start.set(0xffff), BadHeader::Place),
            (|h| h.csum_offset.set(6), BadHeader::Place),
        ];
        for (i, (change, wanted)) in cases.into_iter().enumerate() {
            let mut header = good;
            change(&mut header);
            assert_eq!(read(&header, &frame), Err(wanted), "{i}");
        }
    }

    proptest! {
        /// Whatever stands there, places that are handed on lie in the head, in their order.
        #[test]
        fn places_are_in_the_head(
            bytes in any::<[u8; HEADER_TUNNEL]>(),
            (flags, gso_type) in (0u8..4, prop::sample::select(vec![0u8, 1, 4, 5, 0x21, 0x44, 0x25, 0xa1])),
            (start, network) in (0u16..120, 0u16..120),
            payload in 0usize..400,
        ) {
            let mut header = Header::read_from_bytes(&bytes).unwrap();
            (header.flags, header.gso_type) = (flags, gso_type);
            header.csum_start.set(start);
            header.inner_network.set(network);
            if payload % 2 == 0 {
                header.csum_offset.set(if gso_type & 5 == 5 { 6 } else { 16 });
            }
            let frame = tcp4(&[], payload);
            if let Ok(offload) = read(&header, &frame) {
                let head = frame.len().min(HEAD);
                if let Csum::Partial { start, offset } = offload.csum {
                    prop_assert!(usize::from(start) + usize::from(offset) + 2 <= head);
                }
                if let Some(gso) = offload.gso {
                    prop_assert!(gso.size > 0 && gso.network < gso.transport && gso.transport < gso.headers);
                    let headers = usize::from(gso.headers);
                    prop_assert!(headers <= head && headers < frame.len());
                }
            }
        }
    }
}
