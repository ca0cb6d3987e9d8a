//! Messages as they lie on the wire ("Protocol Specification"), in the machine's own byte order. Names of flags are those of
//! `<linux/vfio.h>`.

use zerocopy::native_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a header ("Header").
pub const HEADER: usize = 16;
/// Bytes of data in a message unless something else is agreed on ("max_data_xfer_size").
pub const DEFAULT_TRANSFER: u64 = 1 << 20;
/// Descriptors that QEMU sends and takes in a message.
pub const QEMU_FDS: usize = 16;

/// Commands ("Commands").
pub mod command {
    /// The first message of each side.
    pub const VERSION: u16 = 1;
    /// Memory that the device may use.
    pub const DMA_MAP: u16 = 2;
    /// Memory that it may use no longer.
    pub const DMA_UNMAP: u16 = 3;
    /// How many regions and interrupt types there are.
    pub const DEVICE_GET_INFO: u16 = 4;
    /// Size, flags and file of a region.
    pub const DEVICE_GET_REGION_INFO: u16 = 5;
    /// Descriptors that stand for writes to a region.
    pub const DEVICE_GET_REGION_IO_FDS: u16 = 6;
    /// Count and flags of an interrupt type.
    pub const DEVICE_GET_IRQ_INFO: u16 = 7;
    /// Where interrupts go to, whether they are masked, a trigger.
    pub const DEVICE_SET_IRQS: u16 = 8;
    /// Reads a region.
    pub const REGION_READ: u16 = 9;
    /// Writes a region.
    pub const REGION_WRITE: u16 = 10;
    /// The server reads memory.
    pub const DMA_READ: u16 = 11;
    /// The server writes memory.
    pub const DMA_WRITE: u16 = 12;
    /// Resets the device.
    pub const DEVICE_RESET: u16 = 13;
    /// Several writes in one message.
    pub const REGION_WRITE_MULTI: u16 = 15;
    /// Features, those of migration among them.
    pub const DEVICE_FEATURE: u16 = 16;
    /// How many numbers are counted apart by [`Client::sent_of`](crate::Client::sent_of).
    pub(crate) const COUNTED: usize = 32;
}

/// Flags of a header ("Header").
pub mod flag {
    /// The bits of the message's type.
    pub const TYPE: u32 = 0xf;
    /// Type: a command.
    pub const COMMAND: u32 = 0x0;
    /// Type: a reply.
    pub const REPLY: u32 = 0x1;
    /// No reply is needed.
    pub const NO_REPLY: u32 = 0x10;
    /// The command failed.
    pub const ERROR: u32 = 0x20;
}

/// Flags of `DMA_MAP`.
pub mod dma {
    /// The device may read.
    pub const READABLE: u32 = 0x1;
    /// The device may write.
    pub const WRITABLE: u32 = 0x2;
    /// `VFIO_DMA_UNMAP_FLAG_ALL` of an unmap.
    pub const UNMAP_ALL: u32 = 0x2;
}

/// Flags of a device.
pub mod device {
    /// It can be reset.
    pub const RESET: u32 = 0x1;
    /// It is a PCI device.
    pub const PCI: u32 = 0x2;
}

/// Flags of a region, and indices of PCI's.
pub mod region {
    /// The client may read.
    pub const READ: u32 = 0x1;
    /// The client may write.
    pub const WRITE: u32 = 0x2;
    /// The client may map.
    pub const MMAP: u32 = 0x4;
    /// A list of capabilities follows.
    pub const CAPS: u32 = 0x8;
    /// Capability: which areas can be mapped.
    pub const CAP_SPARSE: u16 = 1;
    /// The first BAR.
    pub const BAR0: u32 = 0;
    /// Configuration space.
    pub const CONFIG: u32 = 7;
}

/// Interrupt types of PCI, their flags, and those of `DEVICE_SET_IRQS`.
pub mod irq {
    /// INTx.
    pub const INTX: u32 = 0;
    /// MSI-X.
    pub const MSIX: u32 = 2;

    /// Info: signalled by event descriptors.
    pub const EVENTFD: u32 = 0x1;
    /// Info: can be masked.
    pub const MASKABLE: u32 = 0x2;
    /// Info: masks itself when it is triggered.
    pub const AUTOMASKED: u32 = 0x4;
    /// Info: is set up as a whole.
    pub const NORESIZE: u32 = 0x8;

    /// Set: no data.
    pub const DATA_NONE: u32 = 0x1;
    /// Set: one byte for each.
    pub const DATA_BOOL: u32 = 0x2;
    /// Set: one descriptor for each.
    pub const DATA_EVENTFD: u32 = 0x4;
    /// Set: mask.
    pub const MASK: u32 = 0x8;
    /// Set: unmask.
    pub const UNMASK: u32 = 0x10;
    /// Set: trigger.
    pub const TRIGGER: u32 = 0x20;
}

/// errno values that a client answers with.
pub mod errno {
    /// Invalid.
    pub const EINVAL: u32 = 22;
    /// No such memory.
    pub const EFAULT: u32 = 14;
    /// Not supported.
    pub const ENOTSUP: u32 = 95;
}

macro_rules! wire {
    ($(#[$doc:meta])* $name:ident, $len:literal { $($(#[$fdoc:meta])* $field:ident: $ty:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub struct $name {
            $($(#[$fdoc])* pub $field: $ty,)*
        }
        const _: () = assert!(size_of::<$name>() == $len);
    };
}

wire!(
    /// "Header".
    Header, 16 {
        /// Chosen by whoever asks, echoed by whoever answers.
        id: U16,
        /// One of [`command`].
        command: U16,
        /// Bytes of the message with this header.
        size: U32,
        /// Bits of [`flag`].
        flags: U32,
        /// In a reply with [`flag::ERROR`]: an errno, which may be zero.
        error: U32,
    }
);
wire!(
    /// The head of `VERSION`; JSON and its NUL follow.
    Version, 4 {
        /// Must be the same on both sides.
        major: U16,
        /// The reply's is not above the request's.
        minor: U16,
    }
);
wire!(
    /// `DMA_MAP`.
    Map, 32 {
        /// Bytes of this structure.
        argsz: U32,
        /// Bits of [`dma`].
        flags: U32,
        /// Offset in the file.
        offset: U64,
        /// First address.
        address: U64,
        /// Bytes.
        size: U64,
    }
);
wire!(
    /// `DMA_UNMAP`, and its reply.
    Unmap, 24 {
        /// Bytes that the reply may have.
        argsz: U32,
        /// Bits of [`dma`].
        flags: U32,
        /// First address.
        address: U64,
        /// Bytes.
        size: U64,
    }
);
wire!(
    /// `DEVICE_GET_INFO` and `DEVICE_GET_IRQ_INFO`, and their replies.
    Info, 16 {
        /// Bytes that the reply may have, or has.
        argsz: U32,
        /// Bits of [`device`] or [`irq`].
        flags: U32,
        /// Regions; or the index of the interrupt type.
        first: U32,
        /// Interrupt types; or interrupts of the type.
        second: U32,
    }
);
wire!(
    /// `DEVICE_GET_REGION_INFO`, and the head of its reply.
    Region, 32 {
        /// Bytes that the reply may have, or would need.
        argsz: U32,
        /// Bits of [`region`].
        flags: U32,
        /// Which region.
        index: U32,
        /// Where the capabilities begin, from here.
        cap_offset: U32,
        /// Bytes.
        size: U64,
        /// Where it begins in the file.
        offset: U64,
    }
);
wire!(
    /// "VFIO cap header format", and two words of "VFIO region info cap sparse mmap".
    Capability, 16 {
        /// Which.
        id: U16,
        /// Its version.
        version: U16,
        /// Where the next one begins, from the region info; zero: none.
        next: U32,
        /// Of the sparse one: how many areas follow.
        areas: U32,
        /// Nothing.
        reserved: U32,
    }
);
wire!(
    /// An area of the sparse capability.
    SparseArea, 16 {
        /// From the region's beginning.
        offset: U64,
        /// Bytes.
        size: U64,
    }
);
wire!(
    /// `DEVICE_GET_REGION_IO_FDS`, and the head of its reply.
    IoFds, 16 {
        /// Bytes that the reply may have, or would need.
        argsz: U32,
        /// Zero.
        flags: U32,
        /// Which region.
        index: U32,
        /// In the reply: entries.
        count: U32,
    }
);
wire!(
    /// "Sub-Region IO FD info format (ioeventfd)".
    SubRegion, 40 {
        /// From the region's beginning.
        offset: U64,
        /// Bytes of an access; zero: any.
        size: U64,
        /// Index of the descriptor.
        fd_index: U32,
        /// Zero: an ioeventfd.
        kind: U32,
        /// 1: only writes of `datamatch`.
        flags: U32,
        /// Nothing.
        padding: U32,
        /// The value.
        datamatch: U64,
    }
);
wire!(
    /// The same with memory for the value (libvfio-user, `vfio_user_sub_region_ioeventfd_t`).
    StoredSubRegion, 48 {
        /// From the region's beginning.
        offset: U64,
        /// Bytes of an access; zero: any.
        size: U64,
        /// Index of the descriptor.
        fd_index: U32,
        /// Two: an ioeventfd with memory.
        kind: U32,
        /// 1: only writes of `datamatch`.
        flags: U32,
        /// Index of the memory.
        memory_index: U32,
        /// Where in it.
        memory_offset: U64,
        /// The value.
        datamatch: U64,
    }
);
wire!(
    /// The head of `DEVICE_SET_IRQS`.
    SetIrqs, 20 {
        /// Bytes of this structure and its data.
        argsz: U32,
        /// Bits of [`irq`].
        flags: U32,
        /// Which type.
        index: U32,
        /// The first interrupt.
        start: U32,
        /// How many.
        count: U32,
    }
);
wire!(
    /// The head of `REGION_READ` and `REGION_WRITE`, and of their replies.
    Access, 16 {
        /// From the region's beginning.
        offset: U64,
        /// Which region.
        region: U32,
        /// Bytes.
        count: U32,
    }
);
wire!(
    /// "Single Device Write Format".
    MultiWrite, 24 {
        /// Where to.
        access: Access,
        /// As many bytes as the access says.
        data: [u8; 8],
    }
);
wire!(
    /// The head of `DMA_READ` and `DMA_WRITE`, and of their replies.
    DmaAccess, 16 {
        /// First address.
        address: U64,
        /// Bytes.
        count: U64,
    }
);
