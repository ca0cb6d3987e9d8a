//! A volume that never answers must freeze neither the guest's machine nor the rest of its disk.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;

use super::disk::{Disk, VDA};
use super::{MIB, STEP};
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
    let disk = Disk::new(&guest, VDA);
    // What QEMU itself takes for it on this machine: its translator has half a GiB to forget.
    let own = guest.system_reset()?;
    guest.wait_for_boot()?;
    hang(&disk)?;
    works(&disk)?;
    within("memory hot-plug", guest.add_memory("dimm0", 128)?)?;
    works(&disk)?;
    within("QMP stop", guest.stop()?)?;
    guest.qmp("cont", json!({}))?;
    works(&disk)?;
    hang(&disk)?;
    let reset = guest.system_reset()?;
    log::info!("QMP system_reset took {reset:?}, of which {own:?} are QEMU's");
    within("QMP system_reset", reset.saturating_sub(own))?;
    guest.wait_for_boot()?;
    works(&disk)?;
    hang(&disk)?;
    within("QEMU's exit", guest.quit(STEP)?)?;
    backend.check()
}

/// Leaves requests without an answer, from each processor, and so on each queue. They are for bytes from 32.5 MiB on.
pub(super) fn hang(disk: &Disk<'_>) -> Result<()> {
    let before = disk.in_flight()?;
    for cpu in 0..2 {
        // The job is forgotten: it cannot end.
        let _hangs = disk.guest.spawn(&format!(
            "taskset -c {cpu} dd if={} of=/dev/null bs=64k count=1 skip={} iflag=direct",
            disk.path(),
            520 + cpu
        ))?;
    }
    disk.wait_in_flight(before + 2)
}

/// What is answered still is, on each queue.
pub(super) fn works(disk: &Disk<'_>) -> Result<()> {
    for cpu in 0..2 {
        disk.guest.sh(&format!(
            "taskset -c {cpu} timeout 60 dd if=/dev/urandom of={} bs=64k count=4 seek=80 oflag=direct status=none",
            disk.path()
        ))?;
    }
    Ok(())
}

/// What a host waits for synchronously takes its time and no more.
pub(super) fn within(what: &str, took: Duration) -> Result<()> {
    log::info!("{what} took {took:?}");
    ensure!(took <= BOUND, "{what} took {took:?}, above {BOUND:?}");
    Ok(())
}
