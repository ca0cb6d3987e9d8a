//! Messages as they lie on the wire (vfio-user, "Protocol Specification"): "all data is in the endianness of
//! the host system", so the machine's own. Names of flags and indices are those of `<linux/vfio.h>`.

use zerocopy::native_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The protocol's major version.
pub const MAJOR: u16 = 0;
/// The highest minor version that is spoken here; QEMU 11.1 takes no other.
pub const MINOR: u16 = 0;

/// Commands (vfio-user, "Commands").
pub mod command {
    /// `VFIO_USER_VERSION`.
    pub const VERSION: u16 = 1;
    /// `VFIO_USER_DMA_MAP`.
    pub const DMA_MAP: u16 = 2;
    /// `VFIO_USER_DMA_UNMAP`.
    pub const DMA_UNMAP: u16 = 3;
    /// `VFIO_USER_DEVICE_GET_INFO`.
    pub const DEVICE_GET_INFO: u16 = 4;
    /// `VFIO_USER_DEVICE_GET_REGION_INFO`.
    pub const DEVICE_GET_REGION_INFO: u16 = 5;
    /// `VFIO_USER_DEVICE_GET_REGION_IO_FDS`.
    pub const DEVICE_GET_REGION_IO_FDS: u16 = 6;
    /// `VFIO_USER_DEVICE_GET_IRQ_INFO`.
    pub const DEVICE_GET_IRQ_INFO: u16 = 7;
    /// `VFIO_USER_DEVICE_SET_IRQS`.
    pub const DEVICE_SET_IRQS: u16 = 8;
    /// `VFIO_USER_REGION_READ`.
    pub const REGION_READ: u16 = 9;
    /// `VFIO_USER_REGION_WRITE`.
    pub const REGION_WRITE: u16 = 10;
    /// `VFIO_USER_DMA_READ`, from the server.
    pub const DMA_READ: u16 = 11;
    /// `VFIO_USER_DMA_WRITE`, from the server.
    pub const DMA_WRITE: u16 = 12;
    /// `VFIO_USER_DEVICE_RESET`.
    pub const DEVICE_RESET: u16 = 13;
    /// `VFIO_USER_DIRTY_PAGES`, of older editions.
    pub const DIRTY_PAGES: u16 = 14;
    /// `VFIO_USER_REGION_WRITE_MULTI`.
    pub const REGION_WRITE_MULTI: u16 = 15;
    /// `VFIO_USER_DEVICE_FEATURE`.
    pub const DEVICE_FEATURE: u16 = 16;
    /// `VFIO_USER_MIG_DATA_READ`.
    pub const MIG_DATA_READ: u16 = 17;
    /// `VFIO_USER_MIG_DATA_WRITE`.
    pub const MIG_DATA_WRITE: u16 = 18;
}

/// Flags of a header (vfio-user, "Header").
pub mod flag {
    /// The bits that hold the message's type.
    pub const TYPE: u32 = 0xf;
    /// Type: a command.
    pub const COMMAND: u32 = 0;
    /// Type: a reply.
    pub const REPLY: u32 = 1;
    /// No reply is wanted.
    pub const NO_REPLY: u32 = 1 << 4;
    /// In a reply: the command failed, and the error field may say why.
    pub const ERROR: u32 = 1 << 5;
}

/// Flags of `DMA_MAP`.
pub mod dma_map {
    /// The device may read the memory.
    pub const READ: u32 = 1;
    /// The device may write the memory.
    pub const WRITE: u32 = 1 << 1;
}

/// Flags of `DMA_UNMAP`. The specification has none; these are of `<linux/vfio.h>`, and clients use them.
pub mod dma_unmap {
    /// `VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP`.
    pub const GET_DIRTY_BITMAP: u32 = 1;
    /// `VFIO_DMA_UNMAP_FLAG_ALL`: everything; address and size are zero.
    pub const ALL: u32 = 1 << 1;
}

/// Flags of `DEVICE_GET_INFO`.
pub mod device {
    /// The device can be reset.
    pub const RESET: u32 = 1;
    /// It is a PCI device.
    pub const PCI: u32 = 1 << 1;
}

/// Flags and capabilities of `DEVICE_GET_REGION_INFO`.
pub mod region {
    /// The client may read.
    pub const READ: u32 = 1;
    /// The client may write.
    pub const WRITE: u32 = 1 << 1;
    /// The client may map, all of it or the areas that a capability names.
    pub const MMAP: u32 = 1 << 2;
    /// Capabilities follow.
    pub const CAPS: u32 = 1 << 3;
    /// `VFIO_REGION_INFO_CAP_SPARSE_MMAP`.
    pub const CAP_SPARSE_MMAP: u16 = 1;
    /// `VFIO_PCI_CONFIG_REGION_INDEX`: configuration space; before it stand six BARs and the ROM.
    pub const PCI_CONFIG: u32 = 7;
    /// `VFIO_PCI_NUM_REGIONS`.
    pub const PCI_COUNT: u32 = 9;
}

/// Flags and types of `DEVICE_GET_IRQ_INFO` and `DEVICE_SET_IRQS`.
pub mod irq {
    /// Info: signalled by event descriptors.
    pub const EVENTFD: u32 = 1;
    /// Info: can be masked and unmasked.
    pub const MASKABLE: u32 = 1 << 1;
    /// Info: masks itself when it is triggered.
    pub const AUTOMASKED: u32 = 1 << 2;
    /// Info: is set up as a whole.
    pub const NORESIZE: u32 = 1 << 3;

    /// Set: for all of the range.
    pub const DATA_NONE: u32 = 1;
    /// Set: for those whose byte is not zero.
    pub const DATA_BOOL: u32 = 1 << 1;
    /// Set: descriptors come along.
    pub const DATA_EVENTFD: u32 = 1 << 2;
    /// Set: mask.
    pub const ACTION_MASK: u32 = 1 << 3;
    /// Set: unmask.
    pub const ACTION_UNMASK: u32 = 1 << 4;
    /// Set: trigger.
    pub const ACTION_TRIGGER: u32 = 1 << 5;

    /// `VFIO_PCI_INTX_IRQ_INDEX`.
    pub const INTX: u32 = 0;
    /// `VFIO_PCI_MSI_IRQ_INDEX`.
    pub const MSI: u32 = 1;
    /// `VFIO_PCI_MSIX_IRQ_INDEX`.
    pub const MSIX: u32 = 2;
    /// `VFIO_PCI_ERR_IRQ_INDEX`.
    pub const ERR: u32 = 3;
    /// `VFIO_PCI_REQ_IRQ_INDEX`.
    pub const REQ: u32 = 4;
    /// `VFIO_PCI_NUM_IRQS`.
    pub const PCI_COUNT: u32 = 5;
}

/// `VFIO_USER_IO_FD_TYPE_IOEVENTFD`.
pub const IO_FD_TYPE_IOEVENTFD: u32 = 0;
/// `VFIO_USER_IO_FD_TYPE_IOEVENTFD_SHADOW` of libvfio-user: the value is stored in memory before the event is signalled.
pub const IO_FD_TYPE_IOEVENTFD_SHADOW: u32 = 2;
/// `KVM_IOEVENTFD_FLAG_DATAMATCH`.
pub const IOEVENTFD_DATAMATCH: u32 = 1;

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
    RawHeader, 16 {
        /// Chosen by the sender of the command.
        id: U16,
        /// One of [`command`].
        command: U16,
        /// Bytes of the message, this header among them.
        size: U32,
        /// Bits of [`flag`].
        flags: U32,
        /// In a reply that failed: an errno, or zero.
        error: U32,
    }
);
wire!(
    /// The head of `VERSION`; JSON and a NUL may follow.
    RawVersion, 4 {
        /// Major version.
        major: U16,
        /// Minor version.
        minor: U16,
    }
);
wire!(
    /// `DMA_MAP`.
    RawDmaMap, 32 {
        /// Bytes of this structure.
        argsz: U32,
        /// Bits of [`dma_map`].
        flags: U32,
        /// Offset in the file.
        offset: U64,
        /// Address on the device's side.
        address: U64,
        /// Bytes.
        size: U64,
    }
);
wire!(
    /// `DMA_UNMAP`, and its reply.
    RawDmaUnmap, 24 {
        /// Bytes that the reply may have.
        argsz: U32,
        /// Bits of [`dma_unmap`].
        flags: U32,
        /// Address on the device's side.
        address: U64,
        /// Bytes.
        size: U64,
    }
);
wire!(
    /// `DEVICE_GET_INFO`, and its reply.
    RawDeviceInfo, 16 {
        /// Bytes that the reply may have; in the reply: has.
        argsz: U32,
        /// Bits of [`device`].
        flags: U32,
        /// How many regions there are.
        num_regions: U32,
        /// How many types of interrupts there are.
        num_irqs: U32,
    }
);
wire!(
    /// `DEVICE_GET_REGION_INFO`, and the head of its reply.
    RawRegionInfo, 32 {
        /// Bytes that the reply may have; in the reply: would need.
        argsz: U32,
        /// Bits of [`region`].
        flags: U32,
        /// Which region.
        index: U32,
        /// Where capabilities begin, from the start of this structure.
        cap_offset: U32,
        /// Bytes of the region.
        size: U64,
        /// Where the region begins in the file.
        offset: U64,
    }
);
wire!(
    /// "VFIO cap header format", and the head of "VFIO region info cap sparse mmap".
    RawSparse, 16 {
        /// [`region::CAP_SPARSE_MMAP`].
        id: U16,
        /// 1.
        version: U16,
        /// Where the next capability begins; zero for none.
        next: U32,
        /// How many areas follow.
        areas: U32,
        /// Not used.
        reserved: U32,
    }
);
wire!(
    /// An area that can be mapped.
    RawArea, 16 {
        /// Offset in the region.
        offset: U64,
        /// Bytes.
        size: U64,
    }
);
wire!(
    /// `DEVICE_GET_REGION_IO_FDS`, and the head of its reply.
    RawIoFds, 16 {
        /// Bytes that the reply may have; in the reply: would need.
        argsz: U32,
        /// Zero.
        flags: U32,
        /// Which region.
        index: U32,
        /// How many sub-regions follow in the reply.
        count: U32,
    }
);
wire!(
    /// "Sub-Region IO FD info format (ioeventfd)".
    RawIoEventFd, 40 {
        /// Offset in the region.
        offset: U64,
        /// Bytes; zero for any.
        size: U64,
        /// Which of the descriptors.
        fd_index: U32,
        /// [`IO_FD_TYPE_IOEVENTFD`].
        kind: U32,
        /// [`IOEVENTFD_DATAMATCH`].
        flags: U32,
        /// Not used.
        padding: U32,
        /// Only writes of this value signal.
        datamatch: U64,
    }
);
wire!(
    /// A sub-region whose values are stored (libvfio-user, `vfio_user_sub_region_ioeventfd_t`): not in QEMU's specification, which has no other
    /// way that keeps a value and that a kernel has.
    RawStoredIoEventFd, 48 {
        /// Offset in the region.
        offset: U64,
        /// Bytes; zero for any.
        size: U64,
        /// Which of the descriptors is signalled.
        fd_index: U32,
        /// [`IO_FD_TYPE_IOEVENTFD_SHADOW`].
        kind: U32,
        /// [`IOEVENTFD_DATAMATCH`].
        flags: U32,
        /// Which of the descriptors is the memory that values are stored to.
        memory_index: U32,
        /// Where in it.
        memory_offset: U64,
        /// Only writes of this value signal.
        datamatch: U64,
    }
);
wire!(
    /// `DEVICE_GET_IRQ_INFO`, and its reply.
    RawIrqInfo, 16 {
        /// Bytes that the reply may have; in the reply: has.
        argsz: U32,
        /// Bits of [`irq`].
        flags: U32,
        /// Which type of interrupts.
        index: U32,
        /// How many there are of it.
        count: U32,
    }
);
wire!(
    /// The head of `DEVICE_SET_IRQS`.
    RawIrqSet, 20 {
        /// Bytes of this structure and what follows.
        argsz: U32,
        /// Bits of [`irq`].
        flags: U32,
        /// Which type of interrupts.
        index: U32,
        /// The first one.
        start: U32,
        /// How many.
        count: U32,
    }
);
wire!(
    /// The head of `REGION_READ` and `REGION_WRITE`, and of their replies.
    RawRegionAccess, 16 {
        /// Offset in the region.
        offset: U64,
        /// Which region.
        region: U32,
        /// Bytes.
        count: U32,
    }
);
wire!(
    /// "Single Device Write Format" of `REGION_WRITE_MULTI`.
    RawWrite, 24 {
        /// Where to.
        access: RawRegionAccess,
        /// What; as many bytes as the access says.
        data: [u8; 8],
    }
);
wire!(
    /// The head of `DMA_READ` and `DMA_WRITE`, and of their replies.
    RawDmaAccess, 16 {
        /// Address on the device's side.
        address: U64,
        /// Bytes.
        count: U64,
    }
);
wire!(
    /// The head of `DEVICE_FEATURE`.
    RawFeature, 8 {
        /// Bytes that the reply may have.
        argsz: U32,
        /// Feature and action.
        flags: U32,
    }
);

/// Bytes of a header.
pub const HEADER_LEN: usize = size_of::<RawHeader>();
