//! Log pages.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::host::{number, text};
use super::{Context, Host};
use crate::controller::{Ability, Function};

/// Supported log pages (NVMe 2.1 §5.1.12.1.1): 256 entries of four bytes, of which bit 0 says that the page is there.
const SUPPORTED: u8 = 0x00;
/// Commands Supported and Effects (§5.1.12.1.6): 256 admin and 256 I/O commands, four bytes each, of which bit 0 says that the command is there.
const EFFECTS: u8 = 0x05;

/// Every page that a guest's tools ask for.
pub(super) fn pages(context: &Context<'_>, host: &Host<'_>, function: &Function) -> Result<()> {
    if context.has(Ability::SupportedLogPages) {
        supported(host)?;
    }
    effects(context, host)?;
    let controller = host.admin_json("id-ctrl", "")?;
    let firmware = host.admin("fw-log", "")?;
    let revision = text(&controller, "fr")?;
    ensure!(
        firmware.contains(revision),
        "{revision} is not in {firmware}"
    );
    // Linux reads it, and so clears it, at each event.
    host.admin("changed-ns-list-log", "")?;
    smart(host, function)?;
    errors(context, host, function)
}

/// That each page which is listed can be had, and that those are which must be.
fn supported(host: &Host<'_>) -> Result<()> {
    host.admin("supported-log-pages", "")?;
    let list = host.log_page(SUPPORTED, 1024)?;
    let listed: Vec<u8> = (0..=255)
        .filter(|id| list[usize::from(*id) * 4] & 1 == 1)
        .collect();
    // Errors, health, firmware, changed namespaces (as events of them are offered), effects.
    for id in [0x00, 0x01, 0x02, 0x03, 0x04, 0x05] {
        ensure!(
            listed.contains(&id),
            "log page {id:#x} is not in {listed:x?}"
        );
    }
    for id in listed {
        host.log_page(id, 64)?;
    }
    Ok(())
}

fn effects(context: &Context<'_>, host: &Host<'_>) -> Result<()> {
    host.admin("effects-log", "")?;
    let page = host.log_page(EFFECTS, 4096)?;
    let has = |offset: usize, opcode: usize| page[offset + opcode * 4] & 1 == 1;
    // Delete and create queues, Get Log Page, Identify, Abort, features, events.
    for opcode in [0x00, 0x01, 0x02, 0x04, 0x05, 0x06, 0x08, 0x09, 0x0a, 0x0c] {
        ensure!(has(0, opcode), "admin command {opcode:#x} has no effects");
    }
    // Flush, Write, Read, Compare, Write Zeroes, Dataset Management, Copy.
    let mut commands = vec![0x00, 0x01, 0x02, 0x05, 0x08, 0x09, 0x19];
    if context.has(Ability::Verify) {
        commands.push(0x0c);
    }
    for opcode in commands {
        ensure!(has(1024, opcode), "I/O command {opcode:#x} has no effects");
    }
    ensure!(
        !has(0, 0x7f) && !has(1024, 0x7f),
        "an opcode that no one has has effects"
    );
    Ok(())
}

/// SMART / Health Information: it is well, and counts what the host does.
fn smart(host: &Host<'_>, function: &Function) -> Result<()> {
    const KEYS: [&str; 2] = ["host_read_commands", "host_write_commands"];
    let path = host.disk(function.namespaces[0].nsid)?.path();
    let read = || -> Result<(Value, [u64; 2])> {
        let log = host.admin_json("smart-log", "")?;
        let counts = [number(&log, KEYS[0])?, number(&log, KEYS[1])?];
        Ok((log, counts))
    };
    let (log, before) = read()?;
    ensure!(
        number(&log, "critical_warning")? == 0,
        "a critical warning: {log}"
    );
    ensure!(number(&log, "media_errors")? == 0, "media errors: {log}");
    host.guest.sh(&format!(
        "dd if=/dev/zero of={path} bs=4k count=8 oflag=direct status=none && dd if={path} of=/dev/null bs=4k count=8 iflag=direct status=none"
    ))?;
    let (_, after) = read()?;
    for (i, key) in KEYS.iter().enumerate() {
        // Others read too: udev's part is played by nobody here, but the kernel looks for partitions.
        ensure!(
            after[i] >= before[i] + 8,
            "{key}: {} after 8 more, {} before",
            after[i],
            before[i]
        );
    }
    Ok(())
}

/// A command that is refused, and what the error log says of it.
fn errors(context: &Context<'_>, host: &Host<'_>, function: &Function) -> Result<()> {
    let last = function.namespaces.last().context("a namespace")?;
    let path = host.disk(last.nsid)?.path();
    let entries = || number(&host.admin_json("smart-log", "")?, "num_err_log_entries");
    let before = entries()?;
    let beyond = last.block(last.size);
    let script = format!(
        "nvme read {path} --start-block={beyond} --block-count=0 --data-size={} --data=/dev/null",
        last.block_size
    );
    let output = host.guest.run(&script)?;
    super::host::refused(&script, &output, "lba out of range")?;
    let log = host.admin_json("error-log", "--log-entries=4")?;
    // The newest is the first (NVMe 2.1 §5.1.12.1.2).
    let newest = &log["errors"][0];
    let claimed = context.has(Ability::ErrorLog);
    let after = entries()?;
    ensure!(
        after > before || !claimed,
        "{after} entries in the error log, {before} before"
    );
    for (name, expected) in [
        ("error_count", after),
        ("nsid", last.nsid.into()),
        ("lba", beyond),
    ] {
        let found = number(newest, name)?;
        ensure!(
            found == expected || !claimed,
            "{name} is {found}, expected {expected}: {newest}"
        );
    }
    Ok(())
}
