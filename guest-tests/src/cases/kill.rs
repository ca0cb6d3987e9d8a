//! A back end that dies and comes back, while its guest works on.

use anyhow::{Result, ensure};
use bluff_qemu::device::VhostUserBlk;

use super::MIB;
use super::disk::{Disk, VDA};
use crate::backend::Ability;
use crate::runner::{Context, is_long};

/// Slow enough that the guest always waits for something, and not for all in the order in which it asked.
const SLOW: &str = r#"{ kind = "delay", read = "5ms", write = "5ms", jitter = "10ms" }"#;

/// The back end is killed while no request is in flight, and comes back: the guest notices nothing but a pause. So it is with a
/// second function, where it is QEMU that listens and the back end that connects.
pub(super) fn idle(context: &Context<'_>) -> Result<()> {
    let mut volumes = vec![context.volume("volume0.raw", 64 * MIB, 1)?];
    let mut disks = "/dev/vda".to_owned();
    if context.has(Ability::Connects) {
        volumes.push(context.volume("volume1.raw", 64 * MIB, 1)?.connects());
        disks += " /dev/vdb";
    }
    let mut backend = context.start("backend", &volumes)?;
    let mut builder = context.guest()?;
    for (i, volume) in volumes.iter().enumerate() {
        let function =
            VhostUserBlk::new(&format!("blk{i}"), &backend.socket(i)).queues(volume.queues);
        builder = builder.vhost_user_blk(match volume.connects {
            true => function.listens(),
            false => function.reconnect_ms(100),
        });
    }
    let guest = builder.start()?;
    let sums = guest.sh(&format!(
        "for d in {disks}; do dd if=/dev/urandom of=$d bs=1M count=16 oflag=direct status=none; done && sha256sum {disks}"
    ))?;
    for _ in 0..3 {
        backend.kill()?;
        backend.restart()?;
        let found = guest.sh(&format!(
            "echo 3 >/proc/sys/vm/drop_caches; sha256sum {disks}"
        ))?;
        ensure!(
            found == sums,
            "read {found} after the restart, {sums} before"
        );
    }
    backend.check()
}

pub(super) fn split(context: &Context<'_>) -> Result<()> {
    under_io(context, false)
}

pub(super) fn packed(context: &Context<'_>) -> Result<()> {
    under_io(context, true)
}

/// The back end is killed with requests in flight, again and again: none is lost, and what was acknowledged stays.
fn under_io(context: &Context<'_>, packed: bool) -> Result<()> {
    let kills = if is_long() { 50 } else { 3 };
    let volume = context.volume("volume.raw", 64 * MIB, 2)?.layers(SLOW);
    let mut backend = context.start("backend", std::slice::from_ref(&volume))?;
    let function = context
        .function("blk0", &*backend, &volume)
        .packed(packed)
        .reconnect_ms(100);
    let guest = context.guest()?.vhost_user_blk(function).start()?;
    let disk = Disk::new(&guest, VDA);
    let load = disk.load(2)?;
    let mut gaps = Vec::new();
    let (mut kill, mut in_vain) = (0, 0);
    while kill < kills {
        disk.wait_in_flight(8)?;
        backend.kill()?;
        // The load may have come to the end of a pass just before.
        if disk.in_flight()? > 0 {
            kill += 1;
        } else {
            in_vain += 1;
            ensure!(in_vain <= kills, "nothing is in flight when it dies");
        }
        backend.restart()?;
        // Every third comes while the one before is being recovered from.
        if kill % 3 != 1 {
            gaps.push(disk.wait_progress()?);
        }
        backend.check()?;
    }
    load.finish(&guest)?;
    log::info!("from ready to the next completion: {gaps:?}");
    backend.check()
}
