//! A guest moves from one QEMU to another, between two back ends on one file.

use std::time::Instant;

use anyhow::{Result, ensure};
use bluff_qemu::guest::Guest;
use serde_json::Value;

use super::disk::{Disk, VDA};
use super::{MIB, STEP};
use crate::backend::{Ability, Running, Volume};
use crate::runner::Context;

/// So that requests are in flight at each step.
const SLOW: &str = r#"{ kind = "delay", read = "2ms", write = "2ms", jitter = "4ms" }"#;

pub(super) fn split(context: &Context<'_>) -> Result<()> {
    migrate(context, false)
}

pub(super) fn packed(context: &Context<'_>) -> Result<()> {
    migrate(context, true)
}

/// Under verified I/O: a migration that is broken off on its way, after which the source goes on, and then one that is not.
fn migrate(context: &Context<'_>, packed: bool) -> Result<()> {
    let mut volume = context.volume("volume.raw", 128 * MIB, 2)?;
    if context.has(Ability::Layers) {
        volume = volume.layers(SLOW);
    }
    let mut source_backend = context.start("source", std::slice::from_ref(&volume))?;
    let mut target_backend = context.start("target", std::slice::from_ref(&volume))?;
    let source = context
        .guest()?
        .vhost_user_blk(
            context
                .function("blk0", &*source_backend, &volume)
                .packed(packed),
        )
        .start()?;
    let disk = Disk::new(&source, VDA);
    let load = disk.load(2)?;

    let unwanted = target(context, &*target_backend, &volume, packed)?;
    source.migration_bandwidth(4 * MIB)?;
    source.migrate_start(&unwanted)?;
    let end = Instant::now() + STEP;
    let sent = |statistics: &Value| statistics["ram"]["transferred"].as_u64().unwrap_or(0);
    // Some megabytes: the dirty log is in use by now.
    while sent(&source.migration()?) < 8 * MIB {
        ensure!(Instant::now() < end, "the migration does not begin");
        disk.wait_progress()?;
    }
    source.migrate_cancel(STEP)?;
    drop(unwanted);
    disk.wait_progress()?;
    source_backend.check()?;
    target_backend.check()?;

    let target = target(context, &*target_backend, &volume, packed)?;
    source.migration_bandwidth(1 << 30)?;
    disk.wait_in_flight(1)?;
    let statistics = source.migrate_to(&target, STEP)?;
    log::info!("down for {} ms", statistics["downtime"]);
    source_backend.check()?;
    source.quit(STEP)?;
    Disk::new(&target, VDA).wait_progress()?;
    load.finish(&target)?;
    target_backend.check()
}

/// A QEMU that waits for the guest.
fn target(
    context: &Context<'_>,
    backend: &dyn Running,
    volume: &Volume,
    packed: bool,
) -> Result<Guest> {
    let function = context.function("blk0", backend, volume).packed(packed);
    context.guest()?.vhost_user_blk(function).incoming().start()
}
