//! Storage that is late, or never answers.

use anyhow::{Result, ensure};
use bluff_qemu::guest::Guest;

use super::{Context, Host, MIB, STEP};
use crate::cases::silence::{hang, within, works};
use crate::controller::Manner;
use crate::runner::is_long;

/// With commands that are never answered on both queues, a reset of the machine and QEMU's exit take their time and no more.
pub(super) fn silent(context: &Context<'_>) -> Result<()> {
    let namespace = context.namespace(1, 64 * MIB, 512)?;
    let function = context.nvme().with(namespace.manner(Manner::Silent));
    let mut served = context.serve(&function)?;
    let guest = served.attach(context.small_guest()?).start()?;
    // What QEMU itself takes for it on this machine: its translator has half a GiB to forget.
    let own = guest.system_reset()?;
    guest.wait_for_boot()?;
    let host = Host::new(&guest)?;
    let disk = host.disk(1)?;
    hang(&disk)?;
    works(&disk)?;
    let reset = guest.system_reset()?;
    log::info!("QMP system_reset took {reset:?}, of which {own:?} are QEMU's");
    within("QMP system_reset", reset.saturating_sub(own))?;
    guest.wait_for_boot()?;
    host.wait_live()?;
    let disk = host.disk(1)?;
    works(&disk)?;
    hang(&disk)?;
    within("QEMU's exit", guest.quit(STEP)?)?;
    served.check()
}

/// Some commands last longer than the host waits for them: it aborts them, and resets the controller where that does not help. What the
/// guest reads afterwards is what it wrote last, and nothing that is late lands in memory that it has reused.
pub(super) fn late(context: &Context<'_>) -> Result<()> {
    let namespace = context.namespace(1, 64 * MIB, 512)?;
    let function = context.nvme().with(namespace.manner(Manner::Late));
    let mut served = context.serve(&function)?;
    let guest = context.guest()?.append("nvme_core.io_timeout=3");
    let guest = served.attach(guest).start()?;
    let host = Host::new(&guest)?;
    let disk = host.disk(1)?;
    let load = disk.load(2)?;
    let rounds = if is_long() { 4 } else { 1 };
    for round in 1..=rounds {
        disk.wait_in_flight(8)?;
        served.delay(&guest)?;
        wait_time_outs(&guest, round)?;
        disk.wait_progress()?;
    }
    load.finish(&guest)?;
    host.wait_live()?;
    let said = guest.sh("dmesg | grep -c 'I/O error' || true")?;
    ensure!(said == "0", "{said} I/O errors in the guest");
    served.check()
}

/// Waits until the host has lost its patience so often.
fn wait_time_outs(guest: &Guest, count: u32) -> Result<()> {
    super::wait_until(
        guest,
        &format!("[ $(dmesg | grep -c \"nvme.*timeout\") -ge {count} ]"),
    )
}
