//! A guest moves from one QEMU to another, between two back ends on one file.

use std::time::Instant;

use anyhow::{Result, ensure};
use bluff_qemu::guest::Guest;
use serde_json::Value;

use super::{Load, MIB, STEP, wait_in_flight, wait_progress};
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
    let load = Load::start(&source, 2)?;

    let unwanted = target(context, &*target_backend, &volume, packed)?;
    source.migration_bandwidth(4 * MIB)?;
    source.migrate_start(&unwanted)?;
    let end = Instant::now() + STEP;
    let sent = |statistics: &Value| statistics["ram"]["transferred"].as_u64().unwrap_or(0);
    // Some megabytes: the dirty log is in use by now.
    while sent(&source.migration()?) < 8 * MIB {
        ensure!(Instant::now() < end, "the migration does not begin");
        wait_progress(&source)?;
    }
    source.migrate_cancel(STEP)?;
    drop(unwanted);
    wait_progress(&source)?;
    source_backend.check()?;
    target_backend.check()?;

    let target = target(context, &*target_backend, &volume, packed)?;
    source.migration_bandwidth(1 << 30)?;
    wait_in_flight(&source, 1)?;
    let statistics = source.migrate_to(&target, STEP)?;
    log::info!("down for {} ms", statistics["downtime"]);
    source_backend.check()?;
    source.quit(STEP)?;
    wait_progress(&target)?;
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
