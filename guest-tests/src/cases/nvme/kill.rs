//! A data half that dies and is replaced, while its guest works on. QEMU would not connect again, so its connection must stay.

use anyhow::{Result, ensure};

use super::{Context, Host, MIB};
use crate::controller::Manner;
use crate::runner::is_long;

/// What a driver says that has noticed something, or the block layer for it.
const NOTICED: &str = "nvme.*(timeout|abort|reset|error|frozen)|I/O error";

/// It is killed with commands in flight, again and again: none is lost, what was acknowledged stays, and the guest's driver notices nothing
/// but a pause. With doorbells that are trapped at first and have shadows then, and with mapped ones, which the next data half has to find
/// where the guest goes on writing them.
pub(super) fn data_half(context: &Context<'_>) -> Result<()> {
    ["adaptive", "always"]
        .into_iter()
        .try_for_each(|poll| killed(context, poll))
}

fn killed(context: &Context<'_>, poll: &'static str) -> Result<()> {
    let kills = if is_long() { 100 } else { 10 };
    let namespace = context.namespace(1, 64 * MIB, 512)?;
    let mut function = context.nvme().with(namespace.manner(Manner::Slow));
    function.poll = poll;
    let mut served = context.serve(&function)?;
    let guest = served.attach(context.guest()?).start()?;
    let host = Host::new(&guest)?;
    let disk = host.disk(1)?;
    // What was said when it was found is of no interest.
    guest.sh("dmesg -c >/dev/null")?;
    let load = disk.load(2)?;
    let mut gaps = Vec::new();
    for kill in 0..kills {
        disk.wait_in_flight(8)?;
        served.kill_data_half()?;
        gaps.push(disk.wait_progress()?);
        served.check()?;
        log::info!("kill {kill}: {:?}", gaps.last());
    }
    load.finish(&guest)?;
    gaps.sort();
    println!(
        "poll = {poll:?}: {kills} kills; from the kill to the next completion {:?} (median), {:?} (longest)",
        gaps[gaps.len() / 2],
        gaps[gaps.len() - 1]
    );
    let said = guest.sh(&format!("dmesg | grep -iE '{NOTICED}' || true"))?;
    ensure!(said.is_empty(), "the guest's driver has noticed: {said}");
    served.check()
}
