//! What Identify gives (Base 2.1 §5.1.13; NVM Command Set 1.1 §4.1.5).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Every structure, and every list, has so many bytes.
pub const LEN: usize = 4096;

/// Controller or Namespace Structure: which one is asked for.
pub mod cns {
    /// Namespace (of the NVM command set).
    pub const NAMESPACE: u8 = 0x00;
    /// Controller.
    pub const CONTROLLER: u8 = 0x01;
    /// Active namespaces.
    pub const ACTIVE: u8 = 0x02;
    /// Namespace Identification Descriptors.
    pub const DESCRIPTORS: u8 = 0x03;
    /// Namespace, as the command set has it.
    pub const SET_NAMESPACE: u8 = 0x05;
    /// Controller, as the command set has it.
    pub const SET_CONTROLLER: u8 = 0x06;
    /// Active namespaces of a command set.
    pub const SET_ACTIVE: u8 = 0x07;
    /// Namespace, what all command sets have in common.
    pub const INDEPENDENT: u8 = 0x08;
    /// Allocated namespaces.
    pub const ALLOCATED: u8 = 0x10;
    /// Namespace, attached or not.
    pub const ALLOCATED_NAMESPACE: u8 = 0x11;
    /// Controllers that a namespace is attached to.
    pub const ATTACHED_CONTROLLERS: u8 = 0x12;
    /// Controllers.
    pub const CONTROLLERS: u8 = 0x13;
    /// Allocated namespaces of a command set.
    pub const SET_ALLOCATED: u8 = 0x1a;
    /// Namespace, attached or not, as the command set has it.
    pub const SET_ALLOCATED_NAMESPACE: u8 = 0x1b;
    /// I/O command sets.
    pub const COMMAND_SETS: u8 = 0x1c;
    /// Namespace, attached or not, what all command sets have in common.
    pub const INDEPENDENT_ALLOCATED: u8 = 0x1f;
}

/// Command Set Identifier of the NVM command set.
pub const CSI_NVM: u8 = 0;

/// Types of a Namespace Identification Descriptor.
pub mod descriptor {
    /// EUI64, 8 bytes.
    pub const EUI64: u8 = 1;
    /// NGUID, 16 bytes.
    pub const NGUID: u8 = 2;
    /// UUID, 16 bytes.
    pub const UUID: u8 = 3;
    /// Command Set Identifier, 1 byte.
    pub const CSI: u8 = 4;
}

/// A power state.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PowerState {
    /// Most power; 0: not reported.
    pub mp: U16,
    /// Reserved.
    pub reserved2: u8,
    /// Scale of the power, non-operational.
    pub flags: u8,
    /// Entry latency in microseconds.
    pub enlat: U32,
    /// Exit latency in microseconds.
    pub exlat: U32,
    /// Relative figures; idle and active power.
    pub rest: [u8; 20],
}

const _: () = assert!(size_of::<PowerState>() == 32);

/// Identify Controller (§5.1.13.2.1).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IdentifyController {
    /// PCI vendor.
    pub vid: U16,
    /// PCI subsystem vendor.
    pub ssvid: U16,
    /// Serial number, ASCII, padded with spaces.
    pub sn: [u8; 20],
    /// Model number.
    pub mn: [u8; 40],
    /// Firmware revision.
    pub fr: [u8; 8],
    /// Recommended arbitration burst, a power of two.
    pub rab: u8,
    /// OUI of the vendor.
    pub ieee: [u8; 3],
    /// Multi-path and sharing capabilities.
    pub cmic: u8,
    /// Most bytes of a command: a power of two, in the smallest pages; 0: no limit.
    pub mdts: u8,
    /// Controller identifier.
    pub cntlid: U16,
    /// As VS.
    pub ver: U32,
    /// RTD3 resume latency.
    pub rtd3r: U32,
    /// RTD3 entry latency.
    pub rtd3e: U32,
    /// Optional asynchronous events.
    pub oaes: U32,
    /// Controller attributes.
    pub ctratt: U32,
    /// Read recovery levels.
    pub rrls: U16,
    /// Boot partition capabilities.
    pub bpcap: u8,
    /// Reserved.
    pub reserved103: u8,
    /// NVM subsystem shutdown latency.
    pub nssl: U32,
    /// Reserved.
    pub reserved108: [u8; 2],
    /// Power loss signalling.
    pub plsi: u8,
    /// Controller type: 1 for I/O.
    pub cntrltype: u8,
    /// FRU globally unique identifier.
    pub fguid: [u8; 16],
    /// Command retry delays.
    pub crdt: [U16; 3],
    /// Controller reachability.
    pub crcap: u8,
    /// Reserved.
    pub reserved135: [u8; 118],
    /// NVM subsystem report.
    pub nvmsr: u8,
    /// VPD write cycles.
    pub vwci: u8,
    /// Management endpoint.
    pub mec: u8,
    /// Optional admin commands.
    pub oacs: U16,
    /// Abort commands at the same time. Zero's based.
    pub acl: u8,
    /// Asynchronous event requests at the same time. Zero's based.
    pub aerl: u8,
    /// Firmware updates.
    pub frmw: u8,
    /// Log page attributes.
    pub lpa: u8,
    /// Entries of the error log. Zero's based.
    pub elpe: u8,
    /// Power states. Zero's based.
    pub npss: u8,
    /// Vendor specific admin commands.
    pub avscc: u8,
    /// Autonomous power state transitions.
    pub apsta: u8,
    /// Warning temperature in kelvins.
    pub wctemp: U16,
    /// Critical temperature in kelvins.
    pub cctemp: U16,
    /// Time for firmware activation.
    pub mtfa: U16,
    /// Host memory buffer, preferred.
    pub hmpre: U32,
    /// Host memory buffer, least.
    pub hmmin: U32,
    /// Capacity in bytes.
    pub tnvmcap: [u8; 16],
    /// Capacity that is not allocated.
    pub unvmcap: [u8; 16],
    /// Replay protected memory block.
    pub rpmbs: U32,
    /// Device self-test time.
    pub edstt: U16,
    /// Device self-test options.
    pub dsto: u8,
    /// Firmware update granularity.
    pub fwug: u8,
    /// Keep alive granularity.
    pub kas: U16,
    /// Host controlled thermal management.
    pub hctma: U16,
    /// Least thermal management temperature.
    pub mntmt: U16,
    /// Most thermal management temperature.
    pub mxtmt: U16,
    /// Sanitize capabilities.
    pub sanicap: U32,
    /// Host memory buffer, least descriptor.
    pub hmminds: U32,
    /// Host memory buffer, most descriptors.
    pub hmmaxd: U16,
    /// NVM sets.
    pub nsetidmax: U16,
    /// Endurance groups.
    pub endgidmax: U16,
    /// Seconds that an ANA transition takes at most.
    pub anatt: u8,
    /// ANA states that are reported.
    pub anacap: u8,
    /// Largest ANA group identifier.
    pub anagrpmax: U32,
    /// ANA groups.
    pub nanagrpid: U32,
    /// Persistent event log size.
    pub pels: U32,
    /// Domain.
    pub domainid: U16,
    /// Key per I/O.
    pub kpioc: u8,
    /// Reserved.
    pub reserved359: u8,
    /// Time for firmware activation without reset.
    pub mptfawr: U16,
    /// Reserved.
    pub reserved362: [u8; 6],
    /// Most endurance group capacity.
    pub megcap: [u8; 16],
    /// Temperature threshold hysteresis.
    pub tmpthha: u8,
    /// Reserved.
    pub reserved385: u8,
    /// Command quiesce time.
    pub cqt: U16,
    /// Reserved.
    pub reserved388: [u8; 124],
    /// Submission queue entries: required and most, powers of two.
    pub sqes: u8,
    /// Completion queue entries: required and most, powers of two.
    pub cqes: u8,
    /// Commands at the same time, 0: not said.
    pub maxcmd: U16,
    /// Largest valid NSID.
    pub nn: U32,
    /// Optional I/O commands.
    pub oncs: U16,
    /// Fused operations.
    pub fuses: U16,
    /// Format NVM attributes.
    pub fna: u8,
    /// Volatile write cache.
    pub vwc: u8,
    /// Atomic write unit. Zero's based.
    pub awun: U16,
    /// Atomic write unit over a power failure. Zero's based.
    pub awupf: U16,
    /// Vendor specific I/O commands.
    pub icsvscc: u8,
    /// Namespace write protection.
    pub nwpc: u8,
    /// Atomic compare and write unit.
    pub acwu: U16,
    /// Copy descriptor formats.
    pub ocfs: U16,
    /// SGL support.
    pub sgls: U32,
    /// Most namespaces that there can be.
    pub mnan: U32,
    /// Domain namespace attachments.
    pub maxdna: [u8; 16],
    /// Most namespaces attached to an I/O controller.
    pub maxcna: U32,
    /// Optimal queue depth.
    pub oaqd: U32,
    /// Later fields, not reported.
    pub reserved568: [u8; 200],
    /// NQN of the subsystem, ended by NUL.
    pub subnqn: [u8; 256],
    /// Reserved.
    pub reserved1024: [u8; 768],
    /// Of fabrics.
    pub fabrics: [u8; 256],
    /// Power states.
    pub psd: [PowerState; 32],
    /// Vendor specific.
    pub vendor: [u8; 1024],
}

const _: () = assert!(size_of::<IdentifyController>() == 4096);

/// An LBA format (NVM 1.1 §4.1.5.1).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LbaFormat {
    /// Metadata bytes.
    pub ms: U16,
    /// log2 of the data bytes; 0: no such format.
    pub lbads: u8,
    /// Relative performance: 0 is best.
    pub rp: u8,
}

const _: () = assert!(size_of::<LbaFormat>() == 4);

/// Identify Namespace (NVM 1.1 §4.1.5.1).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IdentifyNamespace {
    /// Size in logical blocks.
    pub nsze: U64,
    /// Capacity in logical blocks.
    pub ncap: U64,
    /// Use in logical blocks.
    pub nuse: U64,
    /// Features.
    pub nsfeat: u8,
    /// LBA formats. Zero's based.
    pub nlbaf: u8,
    /// The LBA format that it has.
    pub flbas: u8,
    /// Metadata capabilities.
    pub mc: u8,
    /// Protection capabilities.
    pub dpc: u8,
    /// Protection.
    pub dps: u8,
    /// Sharing.
    pub nmic: u8,
    /// Reservation capabilities.
    pub rescap: u8,
    /// Format progress.
    pub fpi: u8,
    /// What deallocated blocks read as.
    pub dlfeat: u8,
    /// Atomic write unit. Zero's based.
    pub nawun: U16,
    /// Atomic write unit over a power failure. Zero's based.
    pub nawupf: U16,
    /// Atomic compare and write unit.
    pub nacwu: U16,
    /// Atomic boundary size.
    pub nabsn: U16,
    /// Atomic boundary offset.
    pub nabo: U16,
    /// Atomic boundary size over a power failure.
    pub nabspf: U16,
    /// Optimal I/O boundary in logical blocks.
    pub noiob: U16,
    /// Capacity in bytes.
    pub nvmcap: [u8; 16],
    /// Preferred write granularity in logical blocks. Zero's based.
    pub npwg_z: U16,
    /// Preferred write alignment. Zero's based.
    pub npwa_z: U16,
    /// Preferred deallocate granularity. Zero's based.
    pub npdg_z: U16,
    /// Preferred deallocate alignment. Zero's based.
    pub npda_z: U16,
    /// Optimal write size. Zero's based.
    pub nows_z: U16,
    /// Copy: most blocks of a range.
    pub mssrl: U16,
    /// Copy: most blocks.
    pub mcl: U32,
    /// Copy: most ranges. Zero's based.
    pub msrc_z: u8,
    /// Key per I/O.
    pub kpios: u8,
    /// Unique formats.
    pub nulbaf: u8,
    /// Reserved.
    pub reserved83: u8,
    /// Key per I/O granularity.
    pub kpiodaag: U32,
    /// Reserved.
    pub reserved88: [u8; 4],
    /// ANA group.
    pub anagrpid: U32,
    /// Reserved.
    pub reserved96: [u8; 3],
    /// Attributes: bit 0, write protected.
    pub nsattr: u8,
    /// NVM set.
    pub nvmsetid: U16,
    /// Endurance group.
    pub endgid: U16,
    /// Globally unique identifier, big endian.
    pub nguid: [u8; 16],
    /// Extended unique identifier, big endian.
    pub eui64: [u8; 8],
    /// LBA formats.
    pub lbaf: [LbaFormat; 64],
    /// Vendor specific.
    pub vendor: [u8; 3712],
}

const _: () = assert!(size_of::<IdentifyNamespace>() == 4096);

/// I/O command set specific Identify Namespace of the NVM command set (NVM 1.1 §4.1.5.3).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NvmNamespace {
    /// Storage tag mask.
    pub lbstm: U64,
    /// Protection information capabilities.
    pub pic: u8,
    /// Protection information format attributes.
    pub pifa: u8,
    /// Reserved.
    pub reserved10: [u8; 2],
    /// Extended LBA formats.
    pub elbaf: [U32; 64],
    /// Preferred deallocate granularity, large. Zero's based.
    pub npdgl: U32,
    /// Preferred read granularity.
    pub nprg: U32,
    /// Preferred read alignment.
    pub npra: U32,
    /// Optimal read size.
    pub nors: U32,
    /// Preferred deallocate alignment, large.
    pub npdal: U32,
    /// LBA format placement shard size.
    pub lbapss: U32,
    /// Tracked LBA allocation granularity.
    pub tlbaag: U32,
    /// Reserved.
    pub reserved296: [u8; 3800],
}

const _: () = assert!(size_of::<NvmNamespace>() == 4096);

/// I/O command set specific Identify Controller of the NVM command set (NVM 1.1 §4.1.5.4).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NvmController {
    /// Verify: most bytes, a power of two in the smallest pages; 0: no limit.
    pub vsl: u8,
    /// Write Zeroes: most bytes.
    pub wzsl: u8,
    /// Write Uncorrectable: most bytes.
    pub wusl: u8,
    /// Dataset Management: most ranges; 0: not said.
    pub dmrl: u8,
    /// Dataset Management: most blocks of a range.
    pub dmrsl: U32,
    /// Dataset Management: most blocks.
    pub dmsl: U64,
    /// Key per I/O.
    pub kpiocap: u8,
    /// Write Zeroes with deallocate: most bytes.
    pub wzdsl: u8,
    /// Admin optional command support.
    pub aocs: U16,
    /// Version of the command set.
    pub ver: U32,
    /// LBA migration queue format.
    pub lbamqf: u8,
    /// Reserved.
    pub reserved25: [u8; 4071],
}

const _: () = assert!(size_of::<NvmController>() == 4096);

/// I/O command set independent Identify Namespace (§5.1.13.2.8).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IndependentNamespace {
    /// Features common to all command sets.
    pub nsfeat: u8,
    /// Sharing.
    pub nmic: u8,
    /// Reservation capabilities.
    pub rescap: u8,
    /// Format progress.
    pub fpi: u8,
    /// ANA group.
    pub anagrpid: U32,
    /// Attributes: bit 0, write protected.
    pub nsattr: u8,
    /// Reserved.
    pub reserved9: u8,
    /// NVM set.
    pub nvmsetid: U16,
    /// Endurance group.
    pub endgid: U16,
    /// Status: bit 0, ready.
    pub nstat: u8,
    /// Key per I/O.
    pub kpios: u8,
    /// Most key tags.
    pub maxkt: U16,
    /// Reserved.
    pub reserved18: [u8; 2],
    /// Reachability group.
    pub rgrpid: U32,
    /// Reserved.
    pub reserved24: [u8; 4072],
}

const _: () = assert!(size_of::<IndependentNamespace>() == 4096);

/// Header of a Namespace Identification Descriptor (§5.1.13.2.3).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DescriptorHeader {
    /// Type: see [`descriptor`].
    pub kind: u8,
    /// How many bytes follow the header.
    pub len: u8,
    /// Reserved.
    pub reserved: U16,
}

const _: () = assert!(size_of::<DescriptorHeader>() == 4);

/// A structure of which all is zero: what is not reported, and what an inactive namespace gives.
pub fn zeroed<T: FromZeros>() -> T {
    T::new_zeroed()
}
