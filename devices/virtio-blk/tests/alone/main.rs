//! What is measured: the files and the memory of a process, and the time that a stop takes. A program of its own whose
//! tests run one at a time, as a neighbour's files, or reactors that poll on every core, would be measured too.

mod baseline;
mod hung_notifiers;
#[allow(dead_code)] // The other program uses the rest.
#[path = "../blk/rig/mod.rs"]
mod rig;
mod stops;

use std::sync::{Mutex, MutexGuard};

/// Each test holds this.
fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(|e| e.into_inner())
}
