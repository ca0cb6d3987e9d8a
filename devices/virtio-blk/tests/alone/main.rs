//! What is measured: the files and the memory of a process, and how long a stop or a neighbour's request takes. A program
//! of its own whose tests run one at a time: a neighbour's files, and reactors that poll on every core, would be measured
//! too.

mod baseline;
mod dropped;
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
