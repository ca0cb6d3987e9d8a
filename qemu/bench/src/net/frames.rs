//! The frames that are sent: as a tenant's station sends them, and as a card's neighbour on the underlay does.

use std::net::Ipv4Addr;

use anyhow::{Context, Result, ensure};
use bluff_packet::build::{ArpFields, Ipv4Fields, Writer};
use bluff_packet::spec::{GENEVE_PORT, VXLAN_PORT, arp_op};
use bluff_packet::{EtherType, IpProto, L2, Mac, Macs, Tags, Vni, checksum};
use bluff_virtio_net::spec::{Header, gso, header_flag};
use zerocopy::IntoBytes;

/// The tenant's network.
pub const VNI: u32 = 5001;
/// The tenant's stations: who sends, and who receives where both are on the card.
pub const STATIONS: [Mac; 2] = [Mac([2, 0, 0, 0, 0, 1]), Mac([2, 0, 0, 0, 0, 2])];
/// Outer addresses: the card's, and its neighbour's.
pub const VTEPS: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2)];
/// The neighbour's address on the link.
pub const NEIGHBOUR: Mac = Mac([2, 0, 0, 0, 1, 2]);

/// Bytes of a frame that are written anew each time that it is sent, with the header before it.
pub const HEAD: usize = 128;
/// Bytes of payload of a TCP segment.
pub const MSS: usize = 1400;
/// Bytes of virtio-net's header.
pub const HEADER: usize = size_of::<Header>();

/// How a frame is wrapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tunnel {
    /// RFC 7348.
    Vxlan,
    /// RFC 8926, without options.
    Geneve,
}

impl Tunnel {
    /// As configurations and tables have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vxlan => "vxlan",
            Self::Geneve => "geneve",
        }
    }

    /// Its UDP port.
    pub fn port(self) -> u16 {
        match self {
            Self::Vxlan => VXLAN_PORT,
            Self::Geneve => GENEVE_PORT,
        }
    }
}

/// The station with number `n` behind the other VTEP.
pub fn remote(n: usize) -> Mac {
    let [high, low] = (n as u16).to_be_bytes();
    Mac([2, 0, 0, 1, high, low])
}

/// UDP from one station to another, `len` bytes with the Ethernet header, without a checksum. `flow` is its source port, from 1024.
pub fn datagram(from: Mac, to: Mac, len: usize, flow: usize) -> Result<Vec<u8>> {
    let mut room = vec![0; len];
    let payload = len.checked_sub(14 + 20 + 8).context("too short")?;
    let mut writer = Writer::new(&mut room);
    writer
        .ethernet(&ethernet(from, to))?
        .ipv4(
            &ip([192, 168, 7, 1], [192, 168, 7, 2], IpProto::UDP),
            8 + payload,
        )?
        .udp(1024 + (flow % 64_000) as u16, 9, payload, 0)?;
    Ok(room)
}

/// A TCP segment of `len` bytes with the Ethernet header that stands for several of [`MSS`] bytes each, and what its header says of it.
pub fn segment(from: Mac, to: Mac, len: usize) -> Result<(Header, Vec<u8>)> {
    const TCP: usize = 20;
    let mut room = vec![0; len];
    let payload = len.checked_sub(14 + 20 + TCP).context("too short")?;
    let (src, dst) = (Ipv4Addr::new(192, 168, 7, 1), Ipv4Addr::new(192, 168, 7, 2));
    let mut writer = Writer::new(&mut room);
    writer
        .ethernet(&ethernet(from, to))?
        .ipv4(&ip(src.octets(), dst.octets(), IpProto::TCP), TCP + payload)?;
    // Ports, sequence and acknowledgement, five words of header, ACK, window; the sum of the pseudo-header, as of who leaves the rest to the device.
    let sum = checksum::Sum::pseudo_v4(src, dst, IpProto::TCP, (TCP + payload) as u16).partial();
    writer
        .bytes(&[
            0x80,
            1,
            0,
            9,
            0,
            0,
            0,
            1,
            0,
            0,
            0,
            1,
            5 << 4,
            0x10,
            0xff,
            0xff,
        ])?
        .bytes(&sum.to_be_bytes())?
        .bytes(&[0, 0])?;
    let header = Header {
        flags: header_flag::NEEDS_CSUM,
        gso_type: gso::TCPV4,
        hdr_len: (14 + 20 + TCP as u16).into(),
        gso_size: (MSS as u16).into(),
        csum_start: 34.into(),
        csum_offset: 16.into(),
        num_buffers: 0.into(),
    };
    Ok((header, room))
}

/// A frame in a tunnel from the neighbour to the card, whose address on the link is `card`. `flow` chooses the outer source port.
pub fn wrapped(tunnel: Tunnel, card: Mac, inner: &[u8], flow: usize) -> Result<Vec<u8>> {
    let vni = Vni::new(VNI).context("a VNI")?;
    let mut room = vec![0; 50 + inner.len()];
    let [to, from] = VTEPS;
    let mut writer = Writer::new(&mut room);
    writer
        .ethernet(&ethernet(NEIGHBOUR, card))?
        .ipv4(
            &ip(from.octets(), to.octets(), IpProto::UDP),
            16 + inner.len(),
        )?
        .udp(
            49_152 + (flow % 16_384) as u16,
            tunnel.port(),
            8 + inner.len(),
            0,
        )?;
    match tunnel {
        Tunnel::Vxlan => writer.vxlan(vni)?,
        Tunnel::Geneve => writer.geneve(vni, &[], false)?,
    }
    .bytes(inner)?;
    Ok(room)
}

/// What is in a tunnel from the card to the neighbour.
pub fn unwrapped(tunnel: Tunnel, outer: &[u8]) -> Result<&[u8]> {
    let at = |from: usize, len: usize| outer.get(from..from + len).context("too short");
    ensure!(
        at(12, 2)? == [8, 0] && at(23, 1)? == [17],
        "not UDP over IPv4"
    );
    let [from, to] = VTEPS;
    ensure!(
        at(26, 4)? == from.octets() && at(30, 4)? == to.octets(),
        "of others"
    );
    ensure!(
        at(36, 2)? == tunnel.port().to_be_bytes(),
        "not of the tunnel"
    );
    ensure!(at(46, 3)? == &VNI.to_be_bytes()[1..], "of another network");
    at(50, outer.len() - 50)
}

/// The answer to a question for the neighbour's address on the link.
pub fn arp_answer(frame: &[u8]) -> Option<Vec<u8>> {
    let asks = frame.get(12..14)? == [8, 6] && frame.get(20..22)? == arp_op::REQUEST.to_be_bytes();
    if !asks || frame.get(38..42)? != VTEPS[1].octets() {
        return None;
    }
    let asking = Mac(frame.get(22..28)?.try_into().ok()?);
    let fields = ArpFields {
        sender_mac: NEIGHBOUR,
        sender_ip: VTEPS[1],
        target_ip: VTEPS[0],
    };
    let mut room = [0; 60];
    let written = Writer::new(&mut room)
        .arp_reply(asking, Tags::NONE, &fields)
        .is_ok();
    written.then(|| room.to_vec())
}

/// A frame behind a header, in words: what is written when it is sent.
#[derive(Clone, Debug)]
pub struct Image(pub [u64; HEAD / 8]);

impl Image {
    /// The begin of a frame.
    pub fn new(header: Header, frame: &[u8]) -> Self {
        let mut bytes = [header.as_bytes(), frame].concat();
        bytes.resize(HEAD, 0);
        let word = |i: usize| u64::from_le_bytes(bytes[8 * i..][..8].try_into().expect("eight"));
        Self(std::array::from_fn(word))
    }
}

fn ethernet(src: Mac, dst: Mac) -> L2 {
    L2 {
        macs: Macs { dst, src },
        tags: Tags::NONE,
        ethertype: EtherType::IPV4,
    }
}

fn ip(src: [u8; 4], dst: [u8; 4], proto: IpProto) -> Ipv4Fields {
    Ipv4Fields {
        src: src.into(),
        dst: dst.into(),
        proto,
        tos: 0,
        ttl: 64,
        id: 0,
        dont_fragment: true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrapped_is_a_frame_in_a_tunnel() {
        let inner = datagram(remote(7), STATIONS[0], 64, 7).unwrap();
        for tunnel in [Tunnel::Vxlan, Tunnel::Geneve] {
            let mut outer = wrapped(tunnel, Mac([2, 0, 0, 0, 1, 1]), &inner, 7).unwrap();
            assert_eq!(outer.len(), 114);
            let parsed = bluff_packet::parse(&outer, outer.len()).unwrap();
            assert_eq!(checksum::ipv4_header_is_good(&parsed, &outer), Some(true));
            // The other direction has the addresses the other way round.
            assert!(unwrapped(tunnel, &outer).is_err());
            for i in 0..4 {
                outer.swap(26 + i, 30 + i);
            }
            assert_eq!(unwrapped(tunnel, &outer).unwrap(), inner);
        }
    }

    #[test]
    fn who_asks_for_the_neighbour_is_answered() {
        let asking = Mac([2, 0, 0, 0, 1, 1]);
        let mut room = [0; 60];
        let mut ask = |target_ip| {
            let fields = ArpFields {
                sender_mac: asking,
                sender_ip: VTEPS[0],
                target_ip,
            };
            Writer::new(&mut room)
                .arp_request(Tags::NONE, &fields)
                .unwrap();
            arp_answer(&room)
        };
        assert_eq!(ask(VTEPS[0]), None);
        let answer = ask(VTEPS[1]).unwrap();
        assert_eq!(answer[..6], asking.0);
        assert_eq!(answer[22..28], NEIGHBOUR.0);
        assert_eq!(arp_answer(&answer), None);
    }
}
