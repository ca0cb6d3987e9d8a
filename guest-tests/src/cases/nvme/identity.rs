//! What the controller says of itself, its registers, its features.

use anyhow::{Result, ensure};

use super::host::{number, text};
use super::{Context, Host, MIB, QUEUES, SERIAL, command, log};
use crate::controller::{Ability, Function, Served};

/// Every command, in one guest: first what is only asked, then what changes something, then resets.
pub(super) fn commands(context: &Context<'_>) -> Result<()> {
    let function = context
        .nvme()
        .with(context.namespace(1, 256 * MIB, 512)?)
        .with(context.namespace(5, 64 * MIB, 4096)?);
    let mut served = context.serve(&function)?;
    // Or else nobody but the driver may look at registers.
    let guest = context.guest()?.append("iomem=relaxed");
    let guest = served.attach(guest).start()?;
    let host = Host::new(&guest)?;
    pci(&host)?;
    identify(context, &host, &function)?;
    registers(&host)?;
    features(context, &host)?;
    log::pages(context, &host, &function)?;
    for namespace in &function.namespaces {
        command::all(context, &host, namespace)?;
    }
    resets(context, &host, &function, &mut *served)?;
    served.check()
}

/// The function as lspci sees it.
fn pci(host: &Host<'_>) -> Result<()> {
    // Class 01h, subclass 08h: lspci tells it from other mass storage by the programming interface 02h (PCIe Transport 1.1 §3.8.1).
    let all = host.guest.sh("lspci -n -vv -d ::0108")?;
    let signs = ["0108", "MSI-X: Enable+", "Kernel driver in use: nvme"];
    for sign in signs {
        ensure!(
            all.contains(sign),
            "{sign} is not in what lspci says: {all}"
        );
    }
    Ok(())
}

/// Identify, against what was configured.
fn identify(context: &Context<'_>, host: &Host<'_>, function: &Function) -> Result<()> {
    let controller = host.admin_json("id-ctrl", "")?;
    for (name, expected) in [("sn", SERIAL), ("mn", context.peer().model())] {
        let found = text(&controller, name)?;
        ensure!(
            found == expected,
            "{name} is {found:?}, expected {expected:?}"
        );
    }
    ensure!(
        number(&controller, "ver")? >= 0x0001_0300,
        "the version is older than 1.3, which Linux reads identifiers of namespaces from"
    );
    // Compare, Dataset Management, Write Zeroes, Copy; Verify (NVMe 2.1 §5.1.13.2.1, ONCS).
    let mut wanted = 1 | 1 << 2 | 1 << 3 | 1 << 8;
    if context.has(Ability::Verify) {
        wanted |= 1 << 7;
    }
    let oncs = number(&controller, "oncs")?;
    ensure!(
        oncs & wanted == wanted,
        "ONCS is {oncs:#x}, without some of {wanted:#x}"
    );
    let last = function.namespaces.last().map_or(0, |last| last.nsid);
    ensure!(
        number(&controller, "nn")? >= u64::from(last),
        "NN is below the largest id"
    );

    let list = host.admin_json("list-ns", "")?;
    let found: Result<Vec<u64>> = list["nsid_list"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|entry| number(entry, "nsid"))
        .collect();
    let expected: Vec<u64> = function
        .namespaces
        .iter()
        .map(|namespace| namespace.nsid.into())
        .collect();
    let found = found?;
    ensure!(
        found == expected,
        "namespaces {found:?}, expected {expected:?}"
    );

    let mut identifiers = Vec::new();
    for namespace in &function.namespaces {
        let disk = host.disk(namespace.nsid)?;
        let (path, guest) = (disk.path(), host.guest);
        ensure!(
            disk.size()? == namespace.size,
            "the size of {path} is wrong"
        );
        let block: u32 = guest.sh(&format!("blockdev --getss {path}"))?.parse()?;
        ensure!(
            block == namespace.block_size,
            "{path} has blocks of {block} bytes"
        );
        let id =
            super::host::parse(&guest.sh(&format!("nvme id-ns {path} --output-format=json"))?)?;
        let blocks = namespace.block(namespace.size);
        ensure!(number(&id, "nsze")? == blocks, "NSZE is not {blocks}: {id}");
        ensure!(number(&id, "ncap")? == blocks, "NCAP is not {blocks}: {id}");
        // Descriptors that tell it from all others (NVMe 2.1 §5.1.13.2.3), and that Linux names it by.
        let described = guest.sh(&format!("nvme ns-descs {path}"))?;
        ensure!(
            ["uuid", "nguid", "eui64"]
                .iter()
                .any(|kind| described.contains(kind)),
            "{path} has no identifier: {described}"
        );
        identifiers.push(guest.sh(&format!("cat {}/wwid", disk.sys()))?);
        let line = guest.sh(&format!("nvme list | grep '^{path} '"))?;
        for word in [SERIAL, context.peer().model()] {
            ensure!(line.contains(word), "{word} is not in {line}");
        }
    }
    identifiers.sort();
    let all = identifiers.len();
    identifiers.dedup();
    ensure!(
        identifiers.len() == all,
        "two namespaces have one identifier: {identifiers:?}"
    );

    // And one for administration.
    let queues: u16 = host.attribute("queue_count")?.parse()?;
    ensure!(queues == QUEUES + 1, "{queues} queues in use");
    Ok(())
}

/// Registers while the driver works with the controller (NVMe 2.1 §3.1.4).
fn registers(host: &Host<'_>) -> Result<()> {
    let registers = host.admin_json("show-regs", "")?;
    ensure!(
        number(&registers, "cc")? & 1 == 1,
        "CC.EN is 0: {registers}"
    );
    // RDY, and neither fatal, nor shut down, nor reset, nor paused.
    ensure!(
        number(&registers, "csts")? == 1,
        "CSTS is not 1: {registers}"
    );
    let version = host.admin_json("id-ctrl", "")?;
    ensure!(
        number(&registers, "vs")? == number(&version, "ver")?,
        "VS is not what Identify says: {registers}"
    );
    for address in ["asq", "acq"] {
        let value = number(&registers, address)?;
        ensure!(value != 0 && value % 4096 == 0, "{address} is {value:#x}");
    }
    ensure!(
        number(&registers, "cap")? & 0xffff != 0,
        "CAP.MQES is 0: {registers}"
    );
    Ok(())
}

/// Get Features: all that an I/O controller must have (NVMe 2.1 §3.1.3.6); Set Features, and that a reset undoes it.
fn features(context: &Context<'_>, host: &Host<'_>) -> Result<()> {
    const TEMPERATURE_THRESHOLD: u8 = 0x04;
    const NUMBER_OF_QUEUES: u8 = 0x07;
    // Arbitration, power, interrupt coalescing and vectors, write atomicity, events.
    for id in [0x01, 0x02, 0x08, 0x09, 0x0a, 0x0b] {
        host.feature(id, "")?;
    }
    host.feature(0x05, "--namespace-id=1")?;
    let queues = host.feature(NUMBER_OF_QUEUES, "")?;
    for count in [queues & 0xffff, queues >> 16] {
        ensure!(
            count == u64::from(QUEUES) - 1,
            "{count} (from 0) queues are allocated"
        );
    }
    // A volatile write cache that the controller has, and nobody turned off, is on.
    let controller = host.admin_json("id-ctrl", "")?;
    if number(&controller, "vwc")? & 1 == 1 {
        ensure!(host.feature(0x06, "")? & 1 == 1, "the write cache is off");
    }
    // In kelvins. Above the temperature, so that no event comes of it.
    const NEW: u64 = 360;
    let before = host.feature(TEMPERATURE_THRESHOLD, "")?;
    host.admin(
        "set-feature",
        &format!("--feature-id={TEMPERATURE_THRESHOLD} --value={NEW}"),
    )?;
    let found = host.feature(TEMPERATURE_THRESHOLD, "")?;
    ensure!(
        found == NEW,
        "the temperature threshold is {found}, was set to {NEW}"
    );
    host.admin("reset", "")?;
    host.wait_live()?;
    if context.has(Ability::FeatureReset) {
        let after = host.feature(TEMPERATURE_THRESHOLD, "")?;
        ensure!(
            after == before,
            "the temperature threshold is {after} after a reset, was {before}"
        );
    }
    host.admin_refused("get-feature", "--feature-id=0x7f", "invalid field")?;
    host.admin_refused("admin-passthru", "--opcode=0x7f", "invalid command opcode")
}

/// After a reset by the host everything works on, and the data is there.
fn resets(
    context: &Context<'_>,
    host: &Host<'_>,
    function: &Function,
    served: &mut dyn Served,
) -> Result<()> {
    let disk = host.disk(function.namespaces[0].nsid)?;
    let path = disk.path();
    let sum = format!("dd if={path} bs=1M count=8 iflag=direct status=none | sha256sum");
    host.guest.sh(&format!(
        "dd if=/dev/urandom of={path} bs=1M count=8 oflag=direct status=none"
    ))?;
    let before = host.guest.sh(&sum)?;
    let same = || -> Result<()> {
        let after = host.guest.sh(&sum)?;
        ensure!(after == before, "the data is {after}, was {before}");
        Ok(())
    };
    disk.reads()?;
    host.admin("reset", "")?;
    host.wait_live()?;
    disk.wait_progress()?;
    host.guest.sh("killall -9 fio")?;
    same()?;
    if context.has(Ability::SubsystemReset) {
        host.admin("subsystem-reset", "")?;
        // Linux leaves it at that: the controller is not enabled again by itself.
        host.admin("reset", "")?;
        host.wait_live()?;
        same()?;
    }
    served.check()
}
