//! Feature bits (virtio 1.3 §6), as masks.

/// `VIRTIO_F_INDIRECT_DESC`: a descriptor may point to a table of descriptors.
pub const INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`: each side says up to which index it wants no notification.
pub const EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`: not the legacy layout.
pub const VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_ACCESS_PLATFORM`: addresses go through an IOMMU. Never offered.
pub const ACCESS_PLATFORM: u64 = 1 << 33;
/// `VIRTIO_F_RING_PACKED`: packed rings.
pub const RING_PACKED: u64 = 1 << 34;
/// `VIRTIO_F_IN_ORDER`: buffers are used in the order in which they were made available.
pub const IN_ORDER: u64 = 1 << 35;
/// `VIRTIO_F_RING_RESET`: a queue can be reset alone.
pub const RING_RESET: u64 = 1 << 40;
/// `VHOST_F_LOG_ALL`: log every write to guest memory. Not the driver's, but the front end's.
pub const LOG_ALL: u64 = 1 << 26;

/// What the rings of this crate offer on behalf of any device.
pub const RING: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1 | RING_PACKED | IN_ORDER | RING_RESET;
