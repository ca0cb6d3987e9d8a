//! Features (Base 2.1 §5.1.25; NVM Command Set 1.1 §4.1.3).

use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Feature identifiers that the controller has.
pub mod id {
    /// Arbitration.
    pub const ARBITRATION: u8 = 0x01;
    /// Power Management.
    pub const POWER: u8 = 0x02;
    /// Temperature Threshold.
    pub const TEMPERATURE: u8 = 0x04;
    /// Error Recovery.
    pub const ERROR_RECOVERY: u8 = 0x05;
    /// Volatile Write Cache.
    pub const WRITE_CACHE: u8 = 0x06;
    /// Number of Queues.
    pub const QUEUES: u8 = 0x07;
    /// Interrupt Coalescing.
    pub const COALESCING: u8 = 0x08;
    /// Interrupt Vector Configuration.
    pub const VECTOR: u8 = 0x09;
    /// Write Atomicity Normal.
    pub const WRITE_ATOMICITY: u8 = 0x0a;
    /// Asynchronous Event Configuration.
    pub const ASYNC_EVENTS: u8 = 0x0b;
    /// Timestamp.
    pub const TIMESTAMP: u8 = 0x0e;
    /// Host Behavior Support.
    pub const HOST_BEHAVIOR: u8 = 0x16;
    /// I/O Command Set Profile.
    pub const COMMAND_SET_PROFILE: u8 = 0x19;
    /// Host Identifier.
    pub const HOST_ID: u8 = 0x81;
}

/// Which value Get Features asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Select {
    /// The one that holds.
    Current,
    /// The one after power on.
    Default,
    /// The one that was saved; the default where none can be.
    Saved,
    /// No value: what can be done with it.
    Capabilities,
}

impl Select {
    /// From the field; `None` for a reserved value.
    pub fn parse(value: u8) -> Option<Self> {
        Some(match value {
            0 => Self::Current,
            1 => Self::Default,
            2 => Self::Saved,
            3 => Self::Capabilities,
            _ => return None,
        })
    }
}

/// Dword 0 of a completion with [`Select::Capabilities`].
pub mod capability {
    /// Values differ by namespace.
    pub const NAMESPACE: u32 = 1 << 1;
    /// It can be set.
    pub const CHANGEABLE: u32 = 1 << 2;
}

/// Bits of the Asynchronous Event Configuration (§5.1.25.1.5); those from 8 on stand in OAES of Identify
/// Controller, too.
pub mod event {
    /// SMART / Health critical warnings: a bit for each.
    pub const HEALTH: u32 = 0xff;
    /// Attached Namespace Attribute Notices.
    pub const NAMESPACE: u32 = 1 << 8;
    /// Asymmetric Namespace Access Change Notices.
    pub const ANA: u32 = 1 << 11;
}

/// Timestamp (§5.1.25.1.7).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Timestamp {
    /// Milliseconds, 48 bits.
    pub milliseconds: [u8; 6],
    /// Bit 0: the clock may have stopped. Bits 3:1: origin; 0: a reset cleared it, 1: a host set it.
    pub attributes: u8,
    /// Reserved.
    pub reserved: u8,
}

const _: () = assert!(size_of::<Timestamp>() == 8);

/// Host Behavior Support (§5.1.25.1.14).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HostBehavior {
    /// Advanced Command Retry Enable.
    pub retry: u8,
    /// Extended Telemetry Data Area 4 Supported.
    pub telemetry: u8,
    /// LBA Format Extension Enable.
    pub formats: u8,
    /// Host Dispersed Namespace Support.
    pub dispersed: u8,
    /// Copy Descriptor Formats Enable.
    pub copy_formats: U16,
    /// Reserved.
    pub reserved: [u8; 506],
}

const _: () = assert!(size_of::<HostBehavior>() == 512);
