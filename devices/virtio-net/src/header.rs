//! The header of each frame: what a driver says is checked, and what a driver is told.

use bluff_net::{Csum, Gso, GsoKind, Offload};
use bluff_packet::{Fragment, Frame as Packet, L3, L4};
use zerocopy::FromZeros;

use crate::spec::{Header, feature, gso, header_flag};

/// Why a frame that a driver sent is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadHeader {
    /// It asks for something that was not negotiated.
    #[error("an offload that was not negotiated")]
    NotNegotiated,
    /// The place of its checksum is not in the frame's headers.
    #[error("a checksum outside of the frame's headers")]
    Checksum,
    /// It is to be cut, and is not what it says, or has nothing to be cut.
    #[error("a segmentation that does not fit the frame")]
    Segmentation,
}

/// What a driver leaves to be done on a frame of `len` bytes, of which `head` were copied and read to be `packet`
/// (virtio 1.3 §5.1.6.2.1).
///
/// Nothing that the driver says of lengths is relied on: headers are measured here.
///
/// # Errors
/// Why the frame cannot be served.
#[inline]
pub fn offload(
    header: &Header,
    features: u64,
    packet: &Packet,
    head: usize,
    len: usize,
) -> Result<Offload, BadHeader> {
    let mut offload = Offload::default();
    // What else there is in the flags is not for a driver to say, and is ignored.
    if header.flags & header_flag::NEEDS_CSUM != 0 {
        if features & feature::CSUM == 0 {
            return Err(BadHeader::NotNegotiated);
        }
        let (start, offset) = (header.csum_start.get(), header.csum_offset.get());
        if !may_complete(usize::from(start), usize::from(offset), packet, head) {
            return Err(BadHeader::Checksum);
        }
        offload.csum = Csum::Partial { start, offset };
    }
    if header.gso_type != gso::NONE {
        offload.gso = Some(cut(header, features, packet, head, len)?);
    }
    Ok(offload)
}

/// Whether a checksum may be completed there. It is written after the frame was checked, and its sender can make it any value: so it may not lie where
/// anything was checked, but in the field of the transport's header, or behind that header, where a guest has a tunnel of its own.
fn may_complete(start: usize, offset: usize, packet: &Packet, head: usize) -> bool {
    let Some(transport) = packet.l4_offset() else {
        return false;
    };
    let own = |field: usize| (start, offset) == (transport, field);
    let behind = |len: u8| start >= transport + usize::from(len);
    let allowed = match &packet.l4 {
        L4::Tcp(tcp) => own(16) || behind(tcp.header_len),
        L4::Udp(_) => own(6) || behind(8),
        // GRE, IP in IP: nothing of it was looked at.
        L4::Other => start >= transport,
        L4::None | L4::Fragment | L4::Icmp(_) | L4::Icmpv6(_) | L4::Malformed(_) => false,
    };
    allowed && start + offset + 2 <= head
}

/// The least bytes of payload of a segment of TCP: no path is so narrow, and each costs as much as a frame.
const TCP_MIN: u16 = 48;
/// The most datagrams that a frame stands for, as Linux has it.
const UDP_MOST: usize = 128;

/// How a frame is to be cut.
fn cut(
    header: &Header,
    features: u64,
    packet: &Packet,
    head: usize,
    len: usize,
) -> Result<Gso, BadHeader> {
    let ecn = header.gso_type & gso::ECN != 0;
    let (kind, needed) = match header.gso_type & !gso::ECN {
        gso::TCPV4 => (GsoKind::Tcp4, feature::HOST_TSO4),
        gso::TCPV6 => (GsoKind::Tcp6, feature::HOST_TSO6),
        gso::UDP_L4 if !ecn => (GsoKind::Udp, feature::HOST_USO),
        _ => return Err(BadHeader::NotNegotiated),
    };
    let needed = needed | if ecn { feature::HOST_ECN } else { 0 };
    if features & needed != needed {
        return Err(BadHeader::NotNegotiated);
    }
    let bad = BadHeader::Segmentation;
    let transport = packet.l4_offset().ok_or(bad)?;
    let (headers, offset) = match (kind, &packet.l3, &packet.l4) {
        (GsoKind::Tcp4, L3::Ipv4(_), L4::Tcp(tcp)) => (transport + usize::from(tcp.header_len), 16),
        (GsoKind::Tcp6, L3::Ipv6(ip), L4::Tcp(tcp)) if ip.addresses_are_final() => {
            (transport + usize::from(tcp.header_len), 16)
        }
        (GsoKind::Udp, L3::Ipv4(_), L4::Udp(_)) => (transport + 8, 6),
        (GsoKind::Udp, L3::Ipv6(ip), L4::Udp(_)) if ip.addresses_are_final() => (transport + 8, 6),
        _ => return Err(bad),
    };
    // The checksum has to be that of the headers that were found (§5.1.6.2: a driver sets both, or neither).
    let start = usize::from(header.csum_start.get());
    let place = usize::from(header.csum_offset.get());
    let begun = header.flags & header_flag::NEEDS_CSUM != 0;
    let whole = packet.fragment() == Fragment::No && packet.l3_end() == Some(len);
    if !begun || !whole || (start, place) != (transport, offset) {
        return Err(bad);
    }
    if header.gso_size.get() == 0 || headers > head || headers >= len {
        return Err(bad);
    }
    let gso = Gso {
        kind,
        ecn,
        size: header.gso_size.get(),
        network: packet.l3_offset() as u16,
        transport: transport as u16,
        headers: headers as u16,
    };
    let many = match kind {
        GsoKind::Udp => gso.segments(len) > UDP_MOST,
        GsoKind::Tcp4 | GsoKind::Tcp6 => gso.size < TCP_MIN,
    };
    if many { Err(bad) } else { Ok(gso) }
}

/// What stands before a received frame (§5.1.6.4.1). `csum`: GUEST_CSUM was negotiated.
#[inline]
pub fn header(offload: &Offload, csum: bool) -> Header {
    let mut header = Header::new_zeroed();
    header.num_buffers.set(1);
    match offload.csum {
        Csum::Partial { start, offset } => {
            header.flags = header_flag::NEEDS_CSUM;
            header.csum_start.set(start);
            header.csum_offset.set(offset);
        }
        Csum::Valid if csum => header.flags = header_flag::DATA_VALID,
        Csum::Valid | Csum::Unknown => {}
    }
    if let Some(cut) = offload.gso {
        let kind = match cut.kind {
            GsoKind::Tcp4 => gso::TCPV4,
            GsoKind::Tcp6 => gso::TCPV6,
            GsoKind::Udp => gso::UDP_L4,
        };
        header.gso_type = kind | if cut.ecn { gso::ECN } else { 0 };
        header.gso_size.set(cut.size);
        header.hdr_len.set(cut.headers);
    }
    header
}
