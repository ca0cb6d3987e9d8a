//! Formats of virtio-net (virtio 1.3 §5.1).

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The device ID (§5.1.1).
pub const DEVICE_ID: u32 = 1;

/// Feature bits (§5.1.3).
pub mod feature {
    /// The device takes frames whose checksum has to be completed.
    pub const CSUM: u64 = 1 << 0;
    /// The driver takes such frames, and frames whose checksum is known to be right.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// The control queue changes what the driver takes.
    pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    /// Configuration space has an MTU.
    pub const MTU: u64 = 1 << 3;
    /// Configuration space has a MAC address.
    pub const MAC: u64 = 1 << 5;
    /// The driver takes TCP segments over IPv4 that stand for several.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// As above, over IPv6.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// As above, with congestion notification.
    pub const GUEST_ECN: u64 = 1 << 9;
    /// The device takes TCP segments over IPv4 that stand for several.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// As above, over IPv6.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// As above, with congestion notification.
    pub const HOST_ECN: u64 = 1 << 13;
    /// A frame may go into several receive buffers.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// Configuration space has a status.
    pub const STATUS: u64 = 1 << 16;
    /// There is a control queue.
    pub const CTRL_VQ: u64 = 1 << 17;
    /// The control queue sets what is received.
    pub const CTRL_RX: u64 = 1 << 18;
    /// The control queue sets which VLANs are received.
    pub const CTRL_VLAN: u64 = 1 << 19;
    /// The control queue sets more of what is received.
    pub const CTRL_RX_EXTRA: u64 = 1 << 20;
    /// The device can ask the driver to announce itself.
    pub const GUEST_ANNOUNCE: u64 = 1 << 21;
    /// Several pairs of queues, steered by the device.
    pub const MQ: u64 = 1 << 22;
    /// The control queue sets the MAC address.
    pub const CTRL_MAC_ADDR: u64 = 1 << 23;
    /// Notifications are coalesced, by queue.
    pub const VQ_NOTF_COAL: u64 = 1 << 52;
    /// Notifications are coalesced.
    pub const NOTF_COAL: u64 = 1 << 53;
    /// The driver takes UDP datagrams over IPv4 that stand for several.
    pub const GUEST_USO4: u64 = 1 << 54;
    /// As above, over IPv6.
    pub const GUEST_USO6: u64 = 1 << 55;
    /// The device takes UDP datagrams that stand for several.
    pub const HOST_USO: u64 = 1 << 56;
    /// Each received frame comes with its hash.
    pub const HASH_REPORT: u64 = 1 << 57;
    /// The driver gives the exact length of headers.
    pub const GUEST_HDRLEN: u64 = 1 << 59;
    /// Receive side scaling: the driver sets hash and table.
    pub const RSS: u64 = 1 << 60;
    /// Configuration space has speed and duplex.
    pub const SPEED_DUPLEX: u64 = 1 << 63;
}

/// Configuration space (§5.1.4).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Config {
    /// The device's address (MAC).
    pub mac: [u8; 6],
    /// [`LINK_UP`], [`ANNOUNCE`] (STATUS).
    pub status: U16,
    /// Pairs of queues, 1 to 0x8000 (MQ, RSS).
    pub max_virtqueue_pairs: U16,
    /// Bytes of an IP packet, at least 68 (MTU).
    pub mtu: U16,
    /// Mbit/s; all ones: unknown (SPEED_DUPLEX).
    pub speed: U32,
    /// 0 half, 1 full, 0xff unknown (SPEED_DUPLEX).
    pub duplex: u8,
    /// Bytes of the longest hash key, at least 40 (RSS, HASH_REPORT).
    pub rss_max_key_size: u8,
    /// Entries of the longest table, at least 128 (RSS).
    pub rss_max_indirection_table_length: U16,
    /// [`HashTypes`](bluff_packet::toeplitz::HashTypes) that the device computes (RSS, HASH_REPORT).
    pub supported_hash_types: U32,
}

const _: () = assert!(size_of::<Config>() == 24);

/// Status: the link is up.
pub const LINK_UP: u16 = 1;
/// Status: the driver is asked to announce itself.
pub const ANNOUNCE: u16 = 2;

/// What stands before each frame (§5.1.6). With HASH_REPORT a [`HashReport`] follows.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct Header {
    /// [`header_flag`]s.
    pub flags: u8,
    /// [`gso`].
    pub gso_type: u8,
    /// Bytes of headers to be copied to each segment; a hint.
    pub hdr_len: U16,
    /// Bytes of payload of each segment.
    pub gso_size: U16,
    /// Where the checksum begins.
    pub csum_start: U16,
    /// Where it is stored, from there.
    pub csum_offset: U16,
    /// Received frames: how many buffers they took. Sent ones: 0.
    pub num_buffers: U16,
}

const _: () = assert!(size_of::<Header>() == 12);

/// The hash of a received frame (§5.1.6.4.4).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct HashReport {
    /// Its value.
    pub value: U32,
    /// What it was computed of.
    pub report: U16,
    /// Zero.
    pub padding: U16,
}

const _: () = assert!(size_of::<HashReport>() == 8);

/// Flags of a [`Header`].
pub mod header_flag {
    /// The checksum has to be completed.
    pub const NEEDS_CSUM: u8 = 1;
    /// The checksum is right.
    pub const DATA_VALID: u8 = 2;
}

/// How a frame is to be cut.
pub mod gso {
    /// It is not.
    pub const NONE: u8 = 0;
    /// TCP over IPv4.
    pub const TCPV4: u8 = 1;
    /// TCP over IPv6.
    pub const TCPV6: u8 = 4;
    /// UDP.
    pub const UDP_L4: u8 = 5;
    /// A bit of its own: congestion notification.
    pub const ECN: u8 = 0x80;
}

/// Classes and commands of the control queue (§5.1.6.5), as `(class, command)`.
pub mod command {
    /// Everything is received.
    pub const RX_PROMISC: (u8, u8) = (0, 0);
    /// All multicasts are received.
    pub const RX_ALLMULTI: (u8, u8) = (0, 1);
    /// All unicasts are received.
    pub const RX_ALLUNI: (u8, u8) = (0, 2);
    /// No multicast is received.
    pub const RX_NOMULTI: (u8, u8) = (0, 3);
    /// No unicast is received.
    pub const RX_NOUNI: (u8, u8) = (0, 4);
    /// No broadcast is received.
    pub const RX_NOBCAST: (u8, u8) = (0, 5);
    /// Addresses that are received beside the device's own.
    pub const MAC_TABLE_SET: (u8, u8) = (1, 0);
    /// The device's address.
    pub const MAC_ADDR_SET: (u8, u8) = (1, 1);
    /// A VLAN is received.
    pub const VLAN_ADD: (u8, u8) = (2, 0);
    /// A VLAN is not received any more.
    pub const VLAN_DEL: (u8, u8) = (2, 1);
    /// The driver has announced itself.
    pub const ANNOUNCE_ACK: (u8, u8) = (3, 0);
    /// How many pairs of queues are used.
    pub const MQ_PAIRS_SET: (u8, u8) = (4, 0);
    /// Hash and table of RSS.
    pub const MQ_RSS_CONFIG: (u8, u8) = (4, 1);
    /// The hash that is reported.
    pub const MQ_HASH_CONFIG: (u8, u8) = (4, 2);
    /// What the driver takes.
    pub const GUEST_OFFLOADS_SET: (u8, u8) = (5, 0);
    /// Coalescing of all transmit queues.
    pub const COAL_TX_SET: (u8, u8) = (6, 0);
    /// Coalescing of all receive queues.
    pub const COAL_RX_SET: (u8, u8) = (6, 1);
    /// Coalescing of one queue.
    pub const COAL_VQ_SET: (u8, u8) = (6, 2);
    /// Asks for that.
    pub const COAL_VQ_GET: (u8, u8) = (6, 3);
}

/// The command was obeyed.
pub const ACK_OK: u8 = 0;
/// It was refused.
pub const ACK_ERR: u8 = 1;
