//! The driver against the ideal device, against rust-vmm's `virtio-queue`, against a small packed device of its own, and
//! against devices that break the rules.
#![cfg(not(loom))]

mod blk;
mod memory;
mod packed;
mod packed_device;
mod split;
mod split_oracle;
mod violations;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bluff_virtio_driver::{Buffer, Error, Memory, Violation};

/// Where the tests' guest memory starts.
const BASE: u64 = 0x40_0000;

fn guest(size: u64) -> Arc<Memory> {
    Memory::flat(BASE, size).expect("memory")
}

fn violation<T: std::fmt::Debug>(result: Result<T, Error>) -> Violation {
    match result {
        Err(Error::Device(violation)) => violation,
        other => panic!("no violation but {other:?}"),
    }
}

/// A chain of that many readable and writable buffers, at addresses that tell chains apart.
fn chain(readable: u32, writable: u32, tag: u64) -> Vec<Buffer> {
    (0..readable + writable)
        .map(|i| Buffer {
            addr: 0x1000_0000 + tag * 0x1_0000 + u64::from(i) * 0x100,
            len: 16 + i,
            device_writable: i >= readable,
        })
        .collect()
}

fn writable(chain: &[Buffer]) -> u32 {
    chain
        .iter()
        .filter(|buffer| buffer.device_writable)
        .map(|buffer| buffer.len)
        .sum()
}

/// Ends the other thread of a test also when this one fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
