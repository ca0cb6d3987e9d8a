//! Virtqueues as a device sees them: split and packed rings, in-flight tracking, the virtio device trait
