//! Registers as they lie in configuration space, and their bits. All are little-endian (PCIe §7.1).

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of configuration space: 256 as in PCI, and the extended ones (PCIe §7.2).
pub const CONFIG_SIZE: usize = 4096;
/// Where capabilities begin: the first byte after the header.
pub const CAPABILITIES: usize = 0x40;
/// Where extended capabilities begin (PCIe §7.6.2), and those of PCI end.
pub const EXTENDED: usize = 0x100;
/// How many BARs a type 0 header has.
pub const BARS: usize = 6;
/// The least that a memory BAR asks for, in bytes (PCIe §7.5.1.2.1).
pub const MIN_BAR: u64 = 128;
/// The most vectors that MSI-X has (PCIe §7.7.2.2).
pub const MAX_VECTORS: u16 = 2048;
/// Bytes of an entry of the MSI-X table (PCIe §7.7.2).
pub const ENTRY: u64 = 16;

macro_rules! wire {
    ($(#[$doc:meta])* $name:ident, $len:literal { $($(#[$fdoc:meta])* $field:ident: $ty:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub struct $name {
            $($(#[$fdoc])* pub $field: $ty,)*
        }
        const _: () = assert!(size_of::<$name>() == $len);

        impl Default for $name {
            fn default() -> Self {
                Self::new_zeroed()
            }
        }
    };
}

wire!(
    /// The type 0 header (PCIe §7.5.1.1, §7.5.1.2).
    Header, 64 {
        /// Vendor ID.
        vendor: U16,
        /// Device ID.
        device: U16,
        /// See [`command`].
        command: U16,
        /// See [`status`].
        status: U16,
        /// Revision ID.
        revision: u8,
        /// Class code: programming interface, sub-class, base class.
        class: [u8; 3],
        /// Writable for the sake of old software; it does nothing (§7.5.1.1.7).
        cache_line: u8,
        /// Hardwired to zero (§7.5.1.1.8).
        latency: u8,
        /// Zero: an endpoint, alone in its device.
        header_type: u8,
        /// Built-in self test: none.
        bist: u8,
        /// Base address registers.
        bars: [U32; BARS],
        /// CardBus CIS: none.
        cardbus: U32,
        /// Subsystem vendor ID.
        subsystem_vendor: U16,
        /// Subsystem ID.
        subsystem: U16,
        /// Expansion ROM base address: none.
        rom: U32,
        /// Offset of the first capability.
        capabilities: u8,
        /// Reserved.
        reserved: [u8; 7],
        /// For software to note which interrupt it is routed to (§7.5.1.1.12).
        interrupt_line: u8,
        /// 1: INTA; 0: none (§7.5.1.1.13).
        interrupt_pin: u8,
        /// Hardwired to zero.
        min_gnt: u8,
        /// Hardwired to zero.
        max_lat: u8,
    }
);

wire!(
    /// Power management (PCIe §7.5.2).
    PowerManagement, 8 {
        /// [`capability::POWER_MANAGEMENT`].
        id: u8,
        /// Offset of the next capability.
        next: u8,
        /// What is supported.
        capabilities: U16,
        /// See [`power`].
        control: U16,
        /// Reserved.
        reserved: u8,
        /// Data register: none.
        data: u8,
    }
);

wire!(
    /// PCI Express, version 2 (PCIe §7.5.3).
    Express, 60 {
        /// [`capability::EXPRESS`].
        id: u8,
        /// Offset of the next capability.
        next: u8,
        /// Version, and type of device.
        capabilities: U16,
        /// Device Capabilities.
        device_capabilities: U32,
        /// Device Control: see [`device_control`].
        device_control: U16,
        /// Device Status: see [`device_status`].
        device_status: U16,
        /// Link Capabilities.
        link_capabilities: U32,
        /// Link Control.
        link_control: U16,
        /// Link Status.
        link_status: U16,
        /// Of slots and root ports: zero in an endpoint.
        ports: [U32; 4],
        /// Device Capabilities 2.
        device_capabilities_2: U32,
        /// Device Control 2.
        device_control_2: U16,
        /// Device Status 2.
        device_status_2: U16,
        /// Link Capabilities 2.
        link_capabilities_2: U32,
        /// Link Control 2.
        link_control_2: U16,
        /// Link Status 2.
        link_status_2: U16,
        /// Of slots: zero in an endpoint.
        slot_2: [U32; 2],
    }
);

wire!(
    /// MSI-X (PCIe §7.7.2).
    MsixCapability, 12 {
        /// [`capability::MSIX`].
        id: u8,
        /// Offset of the next capability.
        next: u8,
        /// See [`msix_control`].
        control: U16,
        /// Offset of the table, with the number of its BAR in the low three bits.
        table: U32,
        /// Offset of the pending bits, with the number of their BAR in the low three bits.
        pending: U32,
    }
);

/// Capability IDs.
pub mod capability {
    /// Power management.
    pub const POWER_MANAGEMENT: u8 = 0x01;
    /// Vendor specific; virtio uses it.
    pub const VENDOR: u8 = 0x09;
    /// PCI Express.
    pub const EXPRESS: u8 = 0x10;
    /// MSI-X.
    pub const MSIX: u8 = 0x11;
    /// Extended: device serial number (PCIe §7.9.3).
    pub const SERIAL_NUMBER: u16 = 0x0003;
}

/// Bits of the command register (PCIe §7.5.1.1.3).
pub mod command {
    /// Memory BARs answer.
    pub const MEMORY: u16 = 1 << 1;
    /// The function may issue requests to memory, MSI-X messages among them.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// Parity Error Response.
    pub const PARITY: u16 = 1 << 6;
    /// SERR# Enable.
    pub const SERR: u16 = 1 << 8;
    /// INTx is not asserted.
    pub const INTX_DISABLE: u16 = 1 << 10;
}

/// Bits of the status register (PCIe §7.5.1.1.4).
pub mod status {
    /// The function wants INTx to be asserted, whether that is disabled or not.
    pub const INTERRUPT: u16 = 1 << 3;
    /// There are capabilities.
    pub const CAPABILITIES: u16 = 1 << 4;
    /// Errors, which are cleared by writing ones: master data parity, signalled and received aborts, system
    /// error, parity error.
    pub const ERRORS: u16 = 0xf900;
}

/// Bits of a memory BAR (PCIe §7.5.1.2.1).
pub mod bar {
    /// 64 bits: the next register is its upper half.
    pub const MEMORY_64: u32 = 0b10 << 1;
    /// Reads have no side effects.
    pub const PREFETCHABLE: u32 = 1 << 3;
    /// The bits that are not address.
    pub const FLAGS: u32 = 0xf;
}

/// Bits of power management's control register (PCIe §7.5.2.2).
pub mod power {
    /// Power state: 0 is D0, 3 is D3hot.
    pub const STATE: u16 = 0b11;
    /// D3hot in [`STATE`].
    pub const D3_HOT: u16 = 0b11;
    /// The way from D3hot to D0 is no reset.
    pub const NO_SOFT_RESET: u16 = 1 << 3;
    /// Version 3 in the capabilities register.
    pub const VERSION: u16 = 3;
}

/// Bits of the PCI Express capability that are fixed.
pub mod express {
    /// Version 2, an endpoint.
    pub const ENDPOINT_2: u16 = 2;
    /// Device Capabilities: payloads of 256 bytes.
    pub const PAYLOAD_256: u32 = 1;
    /// Device Capabilities: tags of eight bits.
    pub const EXTENDED_TAG: u32 = 1 << 5;
    /// Device Capabilities: role-based error reporting, which is required.
    pub const ROLE_BASED_ERRORS: u32 = 1 << 15;
    /// Device Capabilities: function level reset.
    pub const FUNCTION_LEVEL_RESET: u32 = 1 << 28;
    /// Device Capabilities 2, Device Control 2: the completion time-out can be disabled.
    pub const TIMEOUT_DISABLE: u16 = 1 << 4;
    /// Link Capabilities: required to be 1 (ASPM Optionality Compliance).
    pub const ASPM_OPTIONALITY: u32 = 1 << 22;
    /// Link Control: ASPM, read completion boundary, common clock, extended synch.
    pub const LINK_CONTROL: u16 = 0b1100_1011;
    /// Link Status: the slot's clock is used.
    pub const SLOT_CLOCK: u16 = 1 << 12;
    /// Link Control 2: target speed, and autonomous changes of it.
    pub const LINK_CONTROL_2: u16 = 0x2f;
}

/// Bits of Device Control (PCIe §7.5.3.4).
pub mod device_control {
    /// What software may set: error reporting, relaxed ordering, payload, tags, snooping, read requests.
    pub const WRITABLE: u16 = 0x79ff;
    /// Relaxed ordering and no-snoop allowed, read requests of 512 bytes.
    pub const DEFAULT: u16 = 1 << 4 | 1 << 11 | 0b010 << 12;
    /// Max_Payload_Size.
    pub const PAYLOAD: u16 = 0b111 << 5;
    /// Initiate Function Level Reset; reads as zero.
    pub const FUNCTION_LEVEL_RESET: u16 = 1 << 15;
}

/// Bits of Device Status (PCIe §7.5.3.5).
pub mod device_status {
    /// An error that is no matter: here a read of what does not answer (§6.2.3.2.4.1).
    pub const CORRECTABLE: u16 = 1;
    /// An error: here a write to what does not answer.
    pub const NON_FATAL: u16 = 1 << 1;
    /// What does not answer was accessed.
    pub const UNSUPPORTED: u16 = 1 << 3;
    /// All errors, which are cleared by writing ones.
    pub const ERRORS: u16 = 0xf;
    /// Requests of the function are not completed yet.
    pub const TRANSACTIONS_PENDING: u16 = 1 << 5;
}

/// Bits of MSI-X's Message Control (PCIe §7.7.2.2).
pub mod msix_control {
    /// All vectors are masked.
    pub const MASKED: u16 = 1 << 14;
    /// MSI-X is on, and INTx off.
    pub const ENABLE: u16 = 1 << 15;
}
