//! Headers into room that is given, one after another.

use core::net::{Ipv4Addr, Ipv6Addr};

use zerocopy::{Immutable, IntoBytes};

use crate::spec::{
    ARP_ETHERNET, ArpPacket, EthernetHeader, GENEVE_C, GENEVE_MAX_OPTIONS, GENEVE_O, GeneveHeader,
    IPV4_DF, Ipv4Header, Ipv6Header, UdpHeader, VXLAN_I, VlanTag, VxlanHeader, arp_op,
};
use crate::tunnel::Options;
use crate::{BuildError, EtherType, IpProto, L2, Mac, Macs, Tags, Vni, checksum};

/// Writes headers from the outside in. After an error nothing more is to be relied on in the room.
#[derive(Debug)]
pub struct Writer<'a> {
    room: &'a mut [u8],
    at: usize,
}

/// What an IPv4 header is built from; it has no options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv4Fields {
    /// Source.
    pub src: Ipv4Addr,
    /// Destination.
    pub dst: Ipv4Addr,
    /// What follows.
    pub proto: IpProto,
    /// DSCP (6 bits), ECN (2).
    pub tos: u8,
    /// Hops left.
    pub ttl: u8,
    /// Identification. With DF it has no meaning (RFC 6864 §4.1).
    pub id: u16,
    /// Sets DF.
    pub dont_fragment: bool,
}

/// What an IPv6 header is built from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv6Fields {
    /// Source.
    pub src: Ipv6Addr,
    /// Destination.
    pub dst: Ipv6Addr,
    /// What follows.
    pub next: IpProto,
    /// DSCP (6 bits), ECN (2).
    pub traffic_class: u8,
    /// 20 bits; what is above is left out.
    pub flow_label: u32,
    /// Hops left.
    pub hop_limit: u8,
}

/// What an ARP packet for IPv4 is built from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArpFields {
    /// Who sends it.
    pub sender_mac: Mac,
    /// The sender's IPv4 address.
    pub sender_ip: Ipv4Addr,
    /// Whom it is for, or asks for.
    pub target_ip: Ipv4Addr,
}

impl<'a> Writer<'a> {
    /// Begins at the begin of `room`.
    pub fn new(room: &'a mut [u8]) -> Self {
        Self { room, at: 0 }
    }

    /// Bytes written.
    pub fn len(&self) -> usize {
        self.at
    }

    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.at == 0
    }

    /// What was written.
    pub fn written(&mut self) -> &mut [u8] {
        &mut self.room[..self.at]
    }

    /// Appends these bytes.
    ///
    /// # Errors
    /// [`BuildError::NoRoom`], as every other method.
    #[inline]
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<&mut Self, BuildError> {
        let to = self
            .room
            .get_mut(self.at..)
            .and_then(|room| room.get_mut(..bytes.len()))
            .ok_or(BuildError::NoRoom)?;
        to.copy_from_slice(bytes);
        self.at += bytes.len();
        Ok(self)
    }

    /// Appends a wire type.
    ///
    /// # Errors
    /// [`BuildError::NoRoom`].
    #[inline]
    pub fn put(&mut self, header: &(impl IntoBytes + Immutable)) -> Result<&mut Self, BuildError> {
        self.bytes(header.as_bytes())
    }

    /// An Ethernet header with its tags.
    ///
    /// # Errors
    /// [`BuildError::NoRoom`].
    #[inline]
    pub fn ethernet(&mut self, l2: &L2) -> Result<&mut Self, BuildError> {
        let tags = l2.tags.as_slice();
        self.put(&EthernetHeader {
            macs: l2.macs,
            ethertype: tags.first().map_or(l2.ethertype, |tag| tag.tpid).0.into(),
        })?;
        for (index, tag) in tags.iter().enumerate() {
            self.put(&VlanTag {
                tci: tag.tci.into(),
                ethertype: tags
                    .get(index + 1)
                    .map_or(l2.ethertype, |tag| tag.tpid)
                    .0
                    .into(),
            })?;
        }
        Ok(self)
    }

    /// An IPv4 header with its checksum, for a payload of `payload_len` bytes.
    ///
    /// # Errors
    /// [`BuildError::NoRoom`], [`BuildError::TooLong`].
    #[inline]
    pub fn ipv4(
        &mut self,
        fields: &Ipv4Fields,
        payload_len: usize,
    ) -> Result<&mut Self, BuildError> {
        let mut header = Ipv4Header {
            version_ihl: 0x45,
            tos: fields.tos,
            total_len: length(Ipv4Header::LEN, payload_len)?.into(),
            id: fields.id.into(),
            fragment: if fields.dont_fragment { IPV4_DF } else { 0 }.into(),
            ttl: fields.ttl,
            proto: fields.proto.0,
            checksum: 0.into(),
            src: fields.src.octets(),
            dst: fields.dst.octets(),
        };
        header.checksum = checksum::of(header.as_bytes()).into();
        self.put(&header)
    }

    /// An IPv6 header, for `payload_len` bytes after it.
    ///
    /// # Errors
    /// [`BuildError::NoRoom`], [`BuildError::TooLong`].
    #[inline]
    pub fn ipv6(
        &mut self,
        fields: &Ipv6Fields,
        payload_len: usize,
    ) -> Result<&mut Self, BuildError> {
        let word = 6 << 28 | u32::from(fields.traffic_class) << 20 | fields.flow_label & 0xf_ffff;
        self.put(&Ipv6Header {
            version_class_flow: word.into(),
            payload_len: length(0, payload_len)?.into(),
            next: fields.next.0,
            hop_limit: fields.hop_limit,
            src: fields.src.octets(),
            dst: fields.dst.octets(),
        })
    }

    /// A UDP header for `payload_len` bytes. `checksum` 0 means none: legal over IPv4 (RFC 768), over IPv6 for tunnels whose ends are told
    /// to take it (RFC 6935, RFC 6936). [`checksum::fill`] puts one in when the frame is whole.
    ///
    /// # Errors
    /// [`BuildError::NoRoom`], [`BuildError::TooLong`].
    #[inline]
    pub fn udp(
        &mut self,
        src: u16,
        dst: u16,
        payload_len: usize,
        checksum: u16,
    ) -> Result<&mut Self, BuildError> {
        self.put(&UdpHeader {
            src: src.into(),
            dst: dst.into(),
            len: length(UdpHeader::LEN, payload_len)?.into(),
            checksum: checksum.into(),
        })
    }

    /// A VXLAN header (RFC 7348 §5).
    ///
    /// # Errors
    /// [`BuildError::NoRoom`].
    #[inline]
    pub fn vxlan(&mut self, vni: Vni) -> Result<&mut Self, BuildError> {
        self.put(&VxlanHeader {
            flags: VXLAN_I,
            reserved: [0; 3],
            vni: vni.word().into(),
        })
    }

    /// A Geneve header for an Ethernet frame, with these options (RFC 8926 §3.4). The C bit is set where one of them is critical; `control` sets the O bit.
    ///
    /// # Errors
    /// [`BuildError::NoRoom`], [`BuildError::Options`].
    #[inline]
    pub fn geneve(
        &mut self,
        vni: Vni,
        options: &[u8],
        control: bool,
    ) -> Result<&mut Self, BuildError> {
        if options.len() > GENEVE_MAX_OPTIONS {
            return Err(BuildError::Options);
        }
        let mut flags = if control { GENEVE_O } else { 0 };
        for option in Options::new(options) {
            if option.map_err(|_| BuildError::Options)?.is_critical() {
                flags |= GENEVE_C;
            }
        }
        self.put(&GeneveHeader {
            // Options that add up are a multiple of four bytes.
            version_len: (options.len() / 4) as u8,
            flags,
            protocol: EtherType::ETHERNET.0.into(),
            vni: vni.word().into(),
        })?
        .bytes(options)
    }

    /// A whole frame that asks everybody who has `target_ip` (RFC 826).
    ///
    /// # Errors
    /// [`BuildError::NoRoom`].
    pub fn arp_request(&mut self, tags: Tags, arp: &ArpFields) -> Result<&mut Self, BuildError> {
        self.arp(Mac::BROADCAST, Mac::ZERO, tags, arp, arp_op::REQUEST)
    }

    /// A whole frame that tells the station at `target_mac` who has `sender_ip`.
    ///
    /// # Errors
    /// [`BuildError::NoRoom`].
    pub fn arp_reply(
        &mut self,
        target_mac: Mac,
        tags: Tags,
        arp: &ArpFields,
    ) -> Result<&mut Self, BuildError> {
        self.arp(target_mac, target_mac, tags, arp, arp_op::REPLY)
    }

    fn arp(
        &mut self,
        dst: Mac,
        target_mac: Mac,
        tags: Tags,
        arp: &ArpFields,
        op: u16,
    ) -> Result<&mut Self, BuildError> {
        self.ethernet(&L2 {
            macs: Macs {
                dst,
                src: arp.sender_mac,
            },
            tags,
            ethertype: EtherType::ARP,
        })?
        .put(&ArpPacket {
            hardware: ARP_ETHERNET.into(),
            protocol: EtherType::IPV4.0.into(),
            hardware_len: 6,
            protocol_len: 4,
            op: op.into(),
            sender_mac: arp.sender_mac,
            sender_ip: arp.sender_ip.octets(),
            target_mac,
            target_ip: arp.target_ip.octets(),
        })
    }
}

#[inline(always)]
fn length(header: usize, payload: usize) -> Result<u16, BuildError> {
    payload
        .checked_add(header)
        .and_then(|len| u16::try_from(len).ok())
        .ok_or(BuildError::TooLong)
}
