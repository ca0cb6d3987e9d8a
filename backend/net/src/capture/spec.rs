//! Wire types of pcapng (draft-ietf-opsawg-pcapng), as this machine writes them: in little-endian order, which the first block says.

use zerocopy::little_endian::{I64, U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Section header (§4.1).
pub const SECTION: u32 = 0x0a0d_0d0a;
/// Interface description (§4.2).
pub const INTERFACE: u32 = 1;
/// Interface statistics (§4.6).
pub const STATISTICS: u32 = 5;
/// Enhanced packet (§4.3).
pub const PACKET: u32 = 6;

/// Tells the order of bytes (§4.1).
pub const MAGIC: u32 = 0x1a2b_3c4d;

/// The end of options (§3.5).
pub const OPT_END: u16 = 0;
/// The program that wrote the section (§4.1).
pub const SHB_USERAPPL: u16 = 4;
/// An interface's name (§4.2).
pub const IF_NAME: u16 = 2;
/// The unit of its times: a negative power of 10 (§4.2).
pub const IF_TSRESOL: u16 = 9;
/// Which way a packet went (§4.3.1).
pub const EPB_FLAGS: u16 = 2;
/// When the capture began (§4.6).
pub const ISB_STARTTIME: u16 = 2;
/// When it ended.
pub const ISB_ENDTIME: u16 = 3;
/// Packets that there were.
pub const ISB_IFRECV: u16 = 4;
/// Those of them that there was no room for.
pub const ISB_IFDROP: u16 = 5;

/// Flags of a packet (§4.3.1).
pub mod flags {
    /// Received.
    pub const INBOUND: u32 = 1;
    /// Sent.
    pub const OUTBOUND: u32 = 2;
    /// Its checksum is not filled in yet.
    pub const CHECKSUM_NOT_READY: u32 = 1 << 9;
    /// Its checksum is known to be right.
    pub const CHECKSUM_VALID: u32 = 1 << 10;
    /// It is still to be cut.
    pub const SEGMENTATION: u32 = 1 << 11;
}

/// The begin of a block. Its length stands at its end again.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Block {
    pub kind: U32,
    /// Bytes of the whole block: a multiple of 4.
    pub len: U32,
}

/// What follows in a section header.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Section {
    pub magic: U32,
    pub major: U16,
    pub minor: U16,
    /// -1: not told.
    pub len: I64,
}

/// What follows in an interface's description.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Interface {
    pub link_type: U16,
    pub reserved: U16,
    /// Most bytes of a packet; 0: no limit.
    pub snaplen: U32,
}

/// What follows in a packet. Its bytes come next, filled up to a multiple of 4.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Packet {
    pub interface: U32,
    pub time: Time,
    pub captured: U32,
    pub original: U32,
}

/// What follows in an interface's statistics.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Statistics {
    pub interface: U32,
    pub time: Time,
}

/// A time in the interface's unit: its upper half comes first, whatever the order of bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Time {
    pub high: U32,
    pub low: U32,
}

impl Time {
    pub fn new(time: u64) -> Self {
        Self {
            high: ((time >> 32) as u32).into(),
            low: (time as u32).into(),
        }
    }
}

/// The begin of an option. Its value comes next, filled up to a multiple of 4.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Opt {
    pub code: U16,
    /// Bytes of the value.
    pub len: U16,
}

const _: () = assert!(size_of::<Block>() == 8);
const _: () = assert!(size_of::<Section>() == 16);
const _: () = assert!(size_of::<Interface>() == 8);
const _: () = assert!(size_of::<Packet>() == 20);
const _: () = assert!(size_of::<Statistics>() == 12);
const _: () = assert!(size_of::<Opt>() == 4);
