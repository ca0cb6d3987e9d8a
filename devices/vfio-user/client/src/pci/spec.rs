//! Registers of configuration space (PCI Express Base 6.0, §7.5 and §7.7).

/// Vendor ID.
pub const VENDOR: u16 = 0x00;
/// Device ID.
pub const DEVICE: u16 = 0x02;
/// Command.
pub const COMMAND: u16 = 0x04;
/// Command: the BARs are decoded.
pub const MEMORY_SPACE: u16 = 1 << 1;
/// Command: it may use memory.
pub const BUS_MASTER: u16 = 1 << 2;
/// Command: no INTx.
pub const INTERRUPT_DISABLE: u16 = 1 << 10;
/// Status.
pub const STATUS: u16 = 0x06;
/// Status: INTx is asserted.
pub const INTERRUPT_STATUS: u16 = 1 << 3;
/// Status: there are capabilities.
pub const CAPABILITIES_LIST: u16 = 1 << 4;
/// Revision, and the class above it.
pub const REVISION: u16 = 0x08;
/// Header type.
pub const HEADER_TYPE: u16 = 0x0e;
/// The first BAR.
pub const BAR0: u16 = 0x10;
/// BAR: of I/O space.
pub const BAR_IO: u32 = 1;
/// BAR: the bits of its type.
pub const BAR_TYPE: u32 = 3 << 1;
/// BAR: the type that takes two registers.
pub const BAR_TYPE_64: u32 = 2 << 1;
/// BAR: prefetchable.
pub const BAR_PREFETCHABLE: u32 = 1 << 3;
/// Subsystem vendor ID.
pub const SUBSYSTEM_VENDOR: u16 = 0x2c;
/// Subsystem ID.
pub const SUBSYSTEM: u16 = 0x2e;
/// Pointer to the first capability.
pub const CAPABILITIES: u16 = 0x34;

/// Capability ID of power management.
pub const CAP_POWER: u8 = 0x01;
/// Capability ID of PCI Express.
pub const CAP_EXPRESS: u8 = 0x10;
/// Capability ID of MSI-X.
pub const CAP_MSIX: u8 = 0x11;

/// Power management: control and status.
pub const POWER_CONTROL: u16 = 0x04;
/// The bits of the power state.
pub const POWER_STATE: u16 = 3;

/// PCI Express: device capabilities.
pub const EXPRESS_DEVICE_CAPABILITIES: u16 = 0x04;
/// It has a function level reset.
pub const FLR_CAPABLE: u32 = 1 << 28;
/// PCI Express: device control.
pub const EXPRESS_DEVICE_CONTROL: u16 = 0x08;
/// Begins a function level reset.
pub const INITIATE_FLR: u16 = 1 << 15;
/// PCI Express: device status.
pub const EXPRESS_DEVICE_STATUS: u16 = 0x0a;
/// Requests of the function are under way.
pub const TRANSACTIONS_PENDING: u16 = 1 << 5;

/// MSI-X: message control.
pub const MSIX_CONTROL: u16 = 0x02;
/// Message control: vectors less one.
pub const MSIX_SIZE: u16 = 0x7ff;
/// Message control: all vectors are masked.
pub const MSIX_MASK: u16 = 1 << 14;
/// Message control: MSI-X is used.
pub const MSIX_ENABLE: u16 = 1 << 15;
/// MSI-X: place of the table.
pub const MSIX_TABLE: u16 = 0x04;
/// MSI-X: place of the pending bits.
pub const MSIX_PBA: u16 = 0x08;
/// In both: which BAR; the rest is the offset.
pub const MSIX_BIR: u32 = 7;
/// Bytes of an entry: address (8), data (4), control (4).
pub const MSIX_ENTRY: u64 = 16;
/// Entry's control: masked.
pub const MSIX_ENTRY_MASKED: u32 = 1;
