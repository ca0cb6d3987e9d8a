//! Payloads as they lie on the wire (vhost-user, "Message Specification"), in the machine's own byte
//! order, and what the headers of the protocol name.

use zerocopy::native_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `VHOST_USER_F_PROTOCOL_FEATURES`: the back end speaks protocol features, and rings start disabled.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// `VHOST_VRING_F_LOG`: writes to the used ring are logged.
pub const VRING_F_LOG: u32 = 1;
/// Bit 8 of the payload of `SET_VRING_KICK`, `_CALL` and `_ERR`: no descriptor comes along.
pub const VRING_NO_FILE: u64 = 1 << 8;
/// Bits 0 to 7 of the same payload: the vring.
pub const VRING_INDEX: u64 = 0xff;
/// How many vrings these payloads can name.
pub const MAX_VRINGS: u16 = 256;
/// Regions in one `SET_MEM_TABLE`.
pub const MAX_REGIONS: u32 = 8;
/// Regions in all, with `CONFIGURE_MEM_SLOTS`.
pub const MAX_SLOTS: usize = 509;
/// Bytes that a front end may have mapped, of regions, log and in-flight region together: more than any guest has, and an
/// eighth of what a process can map where addresses have 47 bits.
pub const MAX_MAPPED: u64 = 16 << 40;
/// Descriptors that a session can name in all: regions; kick, call, error and in-flight region of each vring; the log, the
/// front end's in-flight region, the channel; those of a message that is not whole.
pub const MAX_DESCRIPTORS: usize = MAX_SLOTS + 4 * MAX_VRINGS as usize + 3 + crate::unix::MAX_FILES;
/// How far configuration space may reach, in bytes.
pub const MAX_CONFIG: u32 = 4096;
/// `DEVICE_NEEDS_RESET` (virtio 1.3 §2.1).
pub const STATUS_NEEDS_RESET: u8 = 0x40;
/// `VIRTIO_ID_NETWORK` (virtio 1.3 §5.1).
pub const DEVICE_NET: u32 = 1;

/// Protocol features (vhost-user, "Protocol features"), as masks.
pub mod protocol {
    use vhost::vhost_user::message::VhostUserProtocolFeatures as F;

    /// More than the device's default number of queues.
    pub const MQ: u64 = F::MQ.bits();
    /// The dirty log comes as a file.
    pub const LOG_SHMFD: u64 = F::LOG_SHMFD.bits();
    /// SEND_RARP.
    pub const RARP: u64 = F::RARP.bits();
    /// Acknowledgements of any message.
    pub const REPLY_ACK: u64 = F::REPLY_ACK.bits();
    /// NET_SET_MTU.
    pub const MTU: u64 = F::MTU.bits();
    /// A channel for requests of the back end.
    pub const BACKEND_REQ: u64 = F::BACKEND_REQ.bits();
    /// GET_CONFIG and SET_CONFIG.
    pub const CONFIG: u64 = F::CONFIG.bits();
    /// GET_INFLIGHT_FD and SET_INFLIGHT_FD.
    pub const INFLIGHT_SHMFD: u64 = F::INFLIGHT_SHMFD.bits();
    /// RESET_DEVICE.
    pub const RESET_DEVICE: u64 = F::RESET_DEVICE.bits();
    /// Memory region by region.
    pub const CONFIGURE_MEM_SLOTS: u64 = F::CONFIGURE_MEM_SLOTS.bits();
    /// GET_STATUS and SET_STATUS.
    pub const STATUS: u64 = F::STATUS.bits();
    /// GET_VRING_BASE may leave requests recorded as in flight.
    pub const GET_VRING_BASE_INFLIGHT: u64 = F::GET_VRING_BASE_INFLIGHT.bits();

    /// What any device offers.
    pub const ANY: u64 = MQ
        | LOG_SHMFD
        | REPLY_ACK
        | BACKEND_REQ
        | CONFIG
        | RESET_DEVICE
        | CONFIGURE_MEM_SLOTS
        | STATUS;
    /// What devices offer besides that record what is in flight.
    pub const RECORDS: u64 = INFLIGHT_SHMFD | GET_VRING_BASE_INFLIGHT;
    /// What network devices offer besides.
    pub const NET: u64 = MTU | RARP;
}

macro_rules! wire {
    ($(#[$doc:meta])* $name:ident, $len:literal { $($(#[$fdoc:meta])* $field:ident: $ty:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub struct $name {
            $($(#[$fdoc])* pub $field: $ty,)*
        }
        const _: () = assert!(size_of::<$name>() == $len);
    };
}

wire!(
    /// "A vring state description".
    RawVringState, 8 {
        /// The vring.
        index: U32,
        /// Size, base or flag.
        num: U32,
    }
);
wire!(
    /// "A vring address description".
    RawVringAddr, 40 {
        /// The vring.
        index: U32,
        /// [`VRING_F_LOG`].
        flags: U32,
        /// Descriptor area, at a front-end address.
        descriptor: U64,
        /// Device area.
        used: U64,
        /// Driver area.
        available: U64,
        /// Guest address of the used ring, for the log.
        log: U64,
    }
);
wire!(
    /// The head of "Memory regions description".
    RawRegions, 8 {
        /// How many follow.
        count: U32,
        /// Not used.
        padding: U32,
    }
);
wire!(
    /// "Memory region".
    RawRegion, 32 {
        /// Guest physical address.
        guest: U64,
        /// Bytes.
        size: U64,
        /// Front-end address.
        user: U64,
        /// Offset in the file.
        offset: U64,
    }
);
wire!(
    /// "Single memory region description".
    RawSingleRegion, 40 {
        /// Not used.
        padding: U64,
        /// The region.
        region: RawRegion,
    }
);
wire!(
    /// "Log description".
    RawLog, 16 {
        /// Bytes.
        size: U64,
        /// Offset in the file.
        offset: U64,
    }
);
wire!(
    /// The head of "Virtio device config space".
    RawConfig, 12 {
        /// First byte.
        offset: U32,
        /// Bytes.
        size: U32,
        /// 0: written by the driver; 1: by a migration.
        flags: U32,
    }
);
wire!(
    /// "Inflight description".
    RawInflight, 20 {
        /// Bytes of the region.
        size: U64,
        /// Offset in the file.
        offset: U64,
        /// Queues.
        queues: U16,
        /// Descriptors of a queue.
        queue_size: U16,
    }
);
