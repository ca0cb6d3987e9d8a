//! Wire types, as they lie in frames: big-endian, unaligned. Bit fields are taken apart by those who parse.
//!
//! Ethernet (IEEE 802.3 §3.2), VLAN tags (IEEE 802.1Q §9.6), ARP (RFC 826), IPv4 (RFC 791), IPv6 and its extension headers
//! (RFC 8200, AH: RFC 4302), TCP (RFC 9293), UDP (RFC 768), ICMP (RFC 792), ICMPv6 (RFC 4443), neighbour discovery (RFC 4861),
//! VXLAN (RFC 7348), Geneve (RFC 8926).

use zerocopy::big_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::{Mac, Macs};

macro_rules! wire {
    ($($(#[$doc:meta])* $name:ident, $len:literal { $($(#[$fdoc:meta])* $field:ident: $ty:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub struct $name { $($(#[$fdoc])* pub $field: $ty,)* }
        const _: () = assert!(size_of::<$name>() == $len);
        impl $name {
            /// Bytes on the wire.
            pub const LEN: usize = $len;
        }
    )*};
}

wire! {
    /// Ethernet II header.
    EthernetHeader, 14 {
        /// Destination and source.
        macs: Macs,
        /// What follows; below 0x0600 it is a length (IEEE 802.3 §3.2.6).
        ethertype: U16,
    }

    /// What follows a TPID (0x8100 for 802.1Q, 0x88a8 for the outer tag of 802.1ad), which stands in the place of the ethertype.
    VlanTag, 4 {
        /// Priority (3 bits), drop eligible (1), VLAN (12).
        tci: U16,
        /// What follows.
        ethertype: U16,
    }

    /// ARP for IPv4 on Ethernet.
    ArpPacket, 28 {
        /// 1 for Ethernet.
        hardware: U16,
        /// 0x0800 for IPv4.
        protocol: U16,
        /// 6.
        hardware_len: u8,
        /// 4.
        protocol_len: u8,
        /// 1 asks, 2 answers.
        op: U16,
        /// The sender's address on the link.
        sender_mac: Mac,
        /// The sender's IPv4 address.
        sender_ip: [u8; 4],
        /// The target's address on the link, if known.
        target_mac: Mac,
        /// The target's IPv4 address.
        target_ip: [u8; 4],
    }

    /// IPv4 header; options follow.
    Ipv4Header, 20 {
        /// Version (4 bits), header length in words of four bytes (4).
        version_ihl: u8,
        /// DSCP (6 bits), ECN (2).
        tos: u8,
        /// Bytes of header and payload.
        total_len: U16,
        /// Identification of fragments.
        id: U16,
        /// Reserved, don't fragment, more fragments; offset in units of eight bytes (13 bits).
        fragment: U16,
        /// Hops left.
        ttl: u8,
        /// What follows.
        proto: u8,
        /// Checksum of header and options.
        checksum: U16,
        /// Source.
        src: [u8; 4],
        /// Destination.
        dst: [u8; 4],
    }

    /// IPv6 header.
    Ipv6Header, 40 {
        /// Version (4 bits), traffic class (8), flow label (20).
        version_class_flow: U32,
        /// Bytes after this header.
        payload_len: U16,
        /// What follows.
        next: u8,
        /// Hops left.
        hop_limit: u8,
        /// Source.
        src: [u8; 16],
        /// Destination.
        dst: [u8; 16],
    }

    /// How hop-by-hop options, routing headers and destination options begin; also AH, which counts its length differently.
    Ipv6Extension, 8 {
        /// What follows.
        next: u8,
        /// Units of eight bytes after the first eight; for AH, of four bytes after the first eight.
        len: u8,
        /// In a routing header, its type.
        routing_type: u8,
        /// In a routing header, segments left.
        segments_left: u8,
        /// Depends on the kind.
        data: [u8; 4],
    }

    /// IPv6 fragment header.
    Ipv6Fragment, 8 {
        /// What follows in the first fragment.
        next: u8,
        /// Ignored.
        reserved: u8,
        /// Offset in units of eight bytes (13 bits), reserved (2), more fragments (1).
        fragment: U16,
        /// Identification.
        id: U32,
    }

    /// TCP header; options follow.
    TcpHeader, 20 {
        /// Source port.
        src: U16,
        /// Destination port.
        dst: U16,
        /// Sequence number.
        seq: U32,
        /// Acknowledgement.
        ack: U32,
        /// Header length in words of four bytes (4 bits), reserved (4).
        offset: u8,
        /// CWR, ECE, URG, ACK, PSH, RST, SYN, FIN.
        flags: u8,
        /// Window.
        window: U16,
        /// Checksum, with the pseudo header.
        checksum: U16,
        /// Urgent pointer.
        urgent: U16,
    }

    /// UDP header.
    UdpHeader, 8 {
        /// Source port.
        src: U16,
        /// Destination port.
        dst: U16,
        /// Bytes of header and payload.
        len: U16,
        /// Checksum, with the pseudo header; 0 means none.
        checksum: U16,
    }

    /// ICMPv4 and ICMPv6 header; every message that is defined has these eight bytes.
    IcmpHeader, 8 {
        /// Type.
        kind: u8,
        /// Code.
        code: u8,
        /// Checksum; for ICMPv6 with the pseudo header.
        checksum: U16,
        /// Depends on the type; the MTU is in it, for "fragmentation needed" in its lower half.
        rest: U32,
    }

    /// Neighbour solicitation or advertisement; options follow.
    NdpNeighbour, 24 {
        /// The ICMPv6 header; flags of an advertisement are in `rest`.
        icmp: IcmpHeader,
        /// Whose address is asked for, or told.
        target: [u8; 16],
    }

    /// Source or target link-layer address on Ethernet, as an option of neighbour discovery.
    NdpLinkLayer, 8 {
        /// 1 for the source's, 2 for the target's.
        kind: u8,
        /// In units of eight bytes: 1.
        len: u8,
        /// The address.
        mac: Mac,
    }

    /// VXLAN header.
    VxlanHeader, 8 {
        /// 0x08 says that there is a VNI.
        flags: u8,
        /// Zero; ignored.
        reserved: [u8; 3],
        /// VNI (24 bits), reserved (8).
        vni: U32,
    }

    /// Geneve header; options follow.
    GeneveHeader, 8 {
        /// Version (2 bits), length of the options in units of four bytes (6).
        version_len: u8,
        /// Control packet, critical options present, reserved (6 bits).
        flags: u8,
        /// Ethertype of what is inside; 0x6558 for Ethernet.
        protocol: U16,
        /// VNI (24 bits), reserved (8).
        vni: U32,
    }

    /// Header of a Geneve option; its data follow.
    GeneveOption, 4 {
        /// Who defines the type.
        class: U16,
        /// The highest bit says that the option is critical.
        kind: u8,
        /// Reserved (3 bits), length of the data in units of four bytes (5).
        len: u8,
    }
}

/// `hardware` of ARP on Ethernet.
pub const ARP_ETHERNET: u16 = 1;
/// IPv4: don't fragment.
pub const IPV4_DF: u16 = 0x4000;
/// IPv4: more fragments.
pub const IPV4_MF: u16 = 0x2000;
/// IPv4: the offset, in units of eight bytes.
pub const IPV4_OFFSET: u16 = 0x1fff;
/// IPv6 fragment header: more fragments.
pub const IPV6_MF: u16 = 1;
/// IPv6 fragment header: the offset, in bytes.
pub const IPV6_OFFSET: u16 = 0xfff8;
/// VXLAN: the VNI is valid (RFC 7348 §5).
pub const VXLAN_I: u8 = 0x08;
/// Geneve: a control packet, whose inside is not a tenant's (RFC 8926 §3.4).
pub const GENEVE_O: u8 = 0x80;
/// Geneve: there is a critical option (RFC 8926 §3.4).
pub const GENEVE_C: u8 = 0x40;
/// Geneve: the option's type is critical (RFC 8926 §3.5).
pub const GENEVE_CRITICAL: u8 = 0x80;
/// UDP port of VXLAN (RFC 7348 §5).
pub const VXLAN_PORT: u16 = 4789;
/// UDP port of Geneve (RFC 8926 §3.3).
pub const GENEVE_PORT: u16 = 6081;
/// Options of a Geneve header, in bytes at most.
pub const GENEVE_MAX_OPTIONS: usize = 63 * 4;

/// `TcpHeader::flags`.
pub mod tcp {
    /// No more data.
    pub const FIN: u8 = 0x01;
    /// Begins a connection.
    pub const SYN: u8 = 0x02;
    /// Ends it at once.
    pub const RST: u8 = 0x04;
    /// To be given to the reader at once.
    pub const PSH: u8 = 0x08;
    /// The acknowledgement is valid.
    pub const ACK: u8 = 0x10;
    /// The urgent pointer is valid.
    pub const URG: u8 = 0x20;
    /// Congestion was seen (RFC 3168).
    pub const ECE: u8 = 0x40;
    /// The window was reduced (RFC 3168).
    pub const CWR: u8 = 0x80;
}

/// `ArpPacket::op`.
pub mod arp_op {
    /// Who has it?
    pub const REQUEST: u16 = 1;
    /// I have.
    pub const REPLY: u16 = 2;
}

/// `IcmpHeader::kind` of ICMPv4.
pub mod icmp4 {
    /// Destination unreachable.
    pub const UNREACHABLE: u8 = 3;
    /// Code of `UNREACHABLE`: fragmentation needed, but DF is set (RFC 1191 §4).
    pub const CODE_FRAGMENTATION_NEEDED: u8 = 4;
}

/// `IcmpHeader::kind` of ICMPv6.
pub mod icmp6 {
    /// Packet too big (RFC 4443 §3.2).
    pub const PACKET_TOO_BIG: u8 = 2;
    /// The first type that is not an error (RFC 4443 §2.1).
    pub const FIRST_INFORMATIONAL: u8 = 128;
    /// Router solicitation.
    pub const ROUTER_SOLICITATION: u8 = 133;
    /// Router advertisement.
    pub const ROUTER_ADVERTISEMENT: u8 = 134;
    /// Neighbour solicitation.
    pub const NEIGHBOUR_SOLICITATION: u8 = 135;
    /// Neighbour advertisement.
    pub const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
    /// Redirect.
    pub const REDIRECT: u8 = 137;
    /// Option: the source's link-layer address.
    pub const OPTION_SOURCE: u8 = 1;
    /// Option: the target's link-layer address.
    pub const OPTION_TARGET: u8 = 2;
}
