//! Log pages (Base 2.1 §5.1.12.1).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Log page identifiers that the controller has.
pub mod id {
    /// Supported Log Pages.
    pub const SUPPORTED: u8 = 0x00;
    /// Error Information.
    pub const ERRORS: u8 = 0x01;
    /// SMART / Health Information.
    pub const HEALTH: u8 = 0x02;
    /// Firmware Slot Information.
    pub const FIRMWARE: u8 = 0x03;
    /// Changed Attached Namespace List.
    pub const CHANGED: u8 = 0x04;
    /// Commands Supported and Effects.
    pub const COMMANDS: u8 = 0x05;
    /// Asymmetric Namespace Access.
    pub const ANA: u8 = 0x0c;
    /// Feature Identifiers Supported and Effects.
    pub const FEATURES: u8 = 0x12;
    /// NVMe-MI Commands Supported and Effects.
    pub const MANAGEMENT: u8 = 0x13;
}

/// An entry of the Error Information log (§5.1.12.1.2).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ErrorEntry {
    /// Number of this error; 0: the entry is not valid.
    pub count: U64,
    /// Submission queue, or `0xffff`.
    pub sqid: U16,
    /// Command identifier, or `0xffff`.
    pub cid: U16,
    /// Status (bits 15:1) and phase.
    pub status: U16,
    /// Byte (7:0) and bit (10:8) of the parameter that is wrong, or `0xffff`.
    pub location: U16,
    /// The first LBA that it happened at.
    pub lba: U64,
    /// Namespace.
    pub nsid: U32,
    /// Log page with more of it; 0: none.
    pub vendor_page: u8,
    /// Transport, where it was its fault; 0: it was not.
    pub transport: u8,
    /// Command set of the command.
    pub csi: u8,
    /// Its opcode.
    pub opcode: u8,
    /// Command specific.
    pub specific: U64,
    /// Transport specific.
    pub transport_specific: U16,
    /// Reserved.
    pub reserved: [u8; 21],
    /// 1: `csi` and `opcode` are valid.
    pub version: u8,
}

const _: () = assert!(size_of::<ErrorEntry>() == 64);

/// SMART / Health Information (§5.1.12.1.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Health {
    /// Critical Warning: see [`warning`].
    pub warning: u8,
    /// Composite Temperature in kelvins.
    pub temperature: [u8; 2],
    /// Available Spare in percent.
    pub spare: u8,
    /// Where a warning is given, in percent.
    pub spare_threshold: u8,
    /// Percentage Used.
    pub used: u8,
    /// Endurance Group Critical Warning Summary.
    pub endurance_warning: u8,
    /// Reserved.
    pub reserved7: [u8; 25],
    /// Thousands of 512 bytes read, rounded up.
    pub data_units_read: [u8; 16],
    /// Thousands of 512 bytes written, rounded up.
    pub data_units_written: [u8; 16],
    /// Read commands (Compare and Verify among them).
    pub reads: [u8; 16],
    /// Write commands (Copy among them).
    pub writes: [u8; 16],
    /// Minutes with I/O outstanding.
    pub busy_minutes: [u8; 16],
    /// Power cycles.
    pub power_cycles: [u8; 16],
    /// Hours of power.
    pub power_on_hours: [u8; 16],
    /// Losses of power without a shutdown before.
    pub unsafe_shutdowns: [u8; 16],
    /// Unrecovered data integrity errors.
    pub media_errors: [u8; 16],
    /// Entries of the error log, in all its life.
    pub error_entries: [u8; 16],
    /// Minutes over the warning temperature.
    pub warning_minutes: U32,
    /// Minutes over the critical temperature.
    pub critical_minutes: U32,
    /// Temperature sensors; 0: not there.
    pub sensors: [U16; 8],
    /// Thermal management, then reserved.
    pub reserved216: [u8; 296],
}

const _: () = assert!(size_of::<Health>() == 512);

/// Bits of a critical warning.
pub mod warning {
    /// Available spare has fallen below the threshold.
    pub const SPARE: u8 = 1 << 0;
    /// A temperature is at or past a threshold.
    pub const TEMPERATURE: u8 = 1 << 1;
    /// Reliability is degraded.
    pub const DEGRADED: u8 = 1 << 2;
    /// All media is read-only.
    pub const READ_ONLY: u8 = 1 << 3;
}

/// Firmware Slot Information (§5.1.12.1.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FirmwareSlots {
    /// Active slot (bits 2:0) and the next one.
    pub active: u8,
    /// Reserved.
    pub reserved1: [u8; 7],
    /// Revisions by slot, from slot 1 on.
    pub revisions: [[u8; 8]; 7],
    /// Reserved.
    pub reserved64: [u8; 448],
}

const _: () = assert!(size_of::<FirmwareSlots>() == 512);

/// Header of the Asymmetric Namespace Access log (§5.1.12.1.13).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AnaHeader {
    /// How often it has changed.
    pub changes: U64,
    /// How many groups follow.
    pub groups: U16,
    /// Reserved.
    pub reserved: [u8; 6],
}

const _: () = assert!(size_of::<AnaHeader>() == 16);

/// A group of it; namespace identifiers of 4 bytes follow.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AnaGroup {
    /// ANA Group ID.
    pub group: U32,
    /// How many namespaces follow.
    pub namespaces: U32,
    /// Change count.
    pub changes: U64,
    /// ANA State (bits 3:0).
    pub state: u8,
    /// Reserved.
    pub reserved: [u8; 15],
}

const _: () = assert!(size_of::<AnaGroup>() == 32);

/// Log Specific Parameter of the ANA log: groups only, no namespaces.
pub const ANA_GROUPS_ONLY: u8 = 1;

/// A dword of Supported Log Pages.
pub mod supported {
    /// The page is.
    pub const LSUPP: u32 = 1;
}

/// A dword of Commands Supported and Effects, and of Feature Identifiers Supported and Effects.
pub mod effect {
    /// The command, or feature, is supported.
    pub const SUPPORTED: u32 = 1 << 0;
    /// It can change user data.
    pub const CONTENT: u32 = 1 << 1;
    /// It can change what a namespace can do.
    pub const NAMESPACE: u32 = 1 << 2;
    /// It can change what the controller can do.
    pub const CONTROLLER: u32 = 1 << 4;
    /// Commands: nothing else for any namespace while it runs (Command Submission and Execution 010b).
    pub const ALONE: u32 = 0b010 << 16;
    /// Its scope is a namespace.
    pub const SCOPE_NAMESPACE: u32 = 1 << 20;
    /// Its scope is the controller.
    pub const SCOPE_CONTROLLER: u32 = 1 << 21;
    /// Its scope is the subsystem.
    pub const SCOPE_SUBSYSTEM: u32 = 1 << 25;
}
