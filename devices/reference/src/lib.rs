//! bluff-reference: virtio-blk on the plain rust-vmm stack
