//! A volume that never answers must freeze neither the guest's machine nor the rest of its disk.

use std::time::Duration;

use anyhow::{Result, ensure};
use bluff_qemu::guest::Guest;
use serde_json::json;

use super::{MIB, STEP, in_flight, wait_in_flight};
use crate::runner::Context;

/// Reads and writes here are never answered. Partition tables, which a kernel reads when it boots, are elsewhere.
const SILENT: &str =
    r#"{ kind = "fault", action = "stall", kinds = "read,write", range = "32MiB-48MiB" }"#;
/// The bound of the design is 1 s, and QEMU has work of its own.
const BOUND: Duration = Duration::from_secs(2);

pub(super) fn split(context: &Context<'_>) -> Result<()> {
    leave(context, false)
}

pub(super) fn packed(context: &Context<'_>) -> Result<()> {
    leave(context, true)
}

/// With requests that are never answered on both queues: a memory change, a stop, a reset and QEMU's exit take their time and no more.
fn leave(context: &Context<'_>, packed: bool) -> Result<()> {
    let volume = context.volume("volume.raw", 64 * MIB, 2)?.layers(SILENT);
    let mut backend = context.start("backend", std::slice::from_ref(&volume))?;
    let function = context.function("blk0", &*backend, &volume).packed(packed);
    let guest = context
        .small_guest()?
        .memory_slots(1)
        .vhost_user_blk(function)
        .start()?;
    // What QEMU itself takes for it on this machine: its translator has half a GiB to forget.
    let own = guest.system_reset()?;
    guest.wait_for_boot()?;
    hang(&guest)?;
    works(&guest)?;
    within("memory hot-plug", guest.add_memory("dimm0", 128)?)?;
    works(&guest)?;
    within("QMP stop", guest.stop()?)?;
    guest.qmp("cont", json!({}))?;
    works(&guest)?;
    hang(&guest)?;
    let reset = guest.system_reset()?;
    log::info!("QMP system_reset took {reset:?}, of which {own:?} are QEMU's");
    within("QMP system_reset", reset.saturating_sub(own))?;
    guest.wait_for_boot()?;
    works(&guest)?;
    hang(&guest)?;
    within("QEMU's exit", guest.quit(STEP)?)?;
    backend.check()
}

/// Leaves requests without an answer, from each processor, and so on each queue.
fn hang(guest: &Guest) -> Result<()> {
    let before = in_flight(guest)?;
    for cpu in 0..2 {
        // The job is forgotten: it cannot end.
        let _hangs = guest.spawn(&format!(
            "taskset -c {cpu} dd if=/dev/vda of=/dev/null bs=64k count=1 skip={} iflag=direct",
            520 + cpu
        ))?;
    }
    wait_in_flight(guest, before + 2)
}

/// What is answered still is, on each queue.
fn works(guest: &Guest) -> Result<()> {
    for cpu in 0..2 {
        guest.sh(&format!(
            "taskset -c {cpu} timeout 60 dd if=/dev/urandom of=/dev/vda bs=64k count=4 seek=80 oflag=direct status=none"
        ))?;
    }
    Ok(())
}

fn within(what: &str, took: Duration) -> Result<()> {
    log::info!("{what} took {took:?}");
    ensure!(took <= BOUND, "{what} took {took:?}, above {BOUND:?}");
    Ok(())
}
