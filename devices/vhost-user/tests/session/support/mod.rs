//! A device that records what is asked of it, and front ends that send anything.

mod device;
mod front_end;
mod function;
mod wire;

use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

pub use device::*;
pub use front_end::*;
pub use function::*;
pub use wire::*;

/// How long anything may take before a test fails.
pub const PATIENCE: Duration = Duration::from_secs(20);

static TURN: RwLock<()> = RwLock::new(());

/// For tests that count descriptors or measure time: no other one runs beside them.
pub fn alone() -> RwLockWriteGuard<'static, ()> {
    TURN.write().unwrap_or_else(|e| e.into_inner())
}

/// For tests that do neither.
pub fn beside() -> RwLockReadGuard<'static, ()> {
    TURN.read().unwrap_or_else(|e| e.into_inner())
}

pub fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// How often a repeated case is repeated.
pub fn times(long: usize) -> usize {
    bluff_testing::times((long / 100).max(10), long)
}
