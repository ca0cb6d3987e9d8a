//! The virtio-blk device
