//! I/O commands by `nvme-cli`, and Format.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use anyhow::{Context as _, Result, ensure};

use super::host::refused;
use super::{Context, Host, MIB};
use crate::controller::{Ability, Namespace};

/// What a command here moves.
const BYTES: u64 = 64 << 10;

/// A namespace, and the commands for it.
struct Commands<'a> {
    host: Host<'a>,
    namespace: &'a Namespace,
    path: String,
}

impl Commands<'_> {
    /// `nvme VERB` for `bytes` from `byte` on.
    fn script(&self, verb: &str, byte: u64, bytes: u64, more: &str) -> String {
        let (path, block) = (&self.path, |byte| self.namespace.block(byte));
        // The number of blocks is zero's based.
        format!(
            "nvme {verb} {path} --start-block={} --block-count={} {more}",
            block(byte),
            block(bytes) - 1
        )
    }

    fn run(&self, verb: &str, byte: u64, bytes: u64, more: &str) -> Result<()> {
        self.host
            .guest
            .sh(&self.script(verb, byte, bytes, more))
            .map(drop)
    }

    fn refused(&self, verb: &str, byte: u64, more: &str, why: &str) -> Result<()> {
        let script = self.script(verb, byte, BYTES, more);
        refused(&script, &self.host.guest.run(&script)?, why)
    }

    /// A command with [`BYTES`] in a file of the guest.
    fn data(&self, verb: &str, byte: u64, file: &str) -> Result<()> {
        let more = format!("--data-size={BYTES} --data={file}");
        self.run(verb, byte, BYTES, &more)
    }

    /// That [`BYTES`] from `byte` on are those of a file.
    fn holds(&self, byte: u64, file: &str) -> Result<()> {
        self.data("read", byte, "/tmp/found")?;
        self.host
            .guest
            .sh(&format!("cmp {file} /tmp/found"))
            .with_context(|| format!("{} at {byte}", self.path))
            .map(drop)
    }

    fn sh(&self, script: &str) -> Result<String> {
        self.host.guest.sh(script)
    }
}

/// Every command, with data that shows what it did.
pub(super) fn all(context: &Context<'_>, host: &Host<'_>, namespace: &Namespace) -> Result<()> {
    let commands = Commands {
        host: *host,
        namespace,
        path: host.disk(namespace.nsid)?.path(),
    };
    // `half` is `data` with its halves exchanged, and `part` has zeroes for the second one.
    commands.sh(
        "cd /tmp && head -c 64k /dev/urandom >data && head -c 64k /dev/urandom >other && head -c 64k /dev/zero >zeroes && \
         (tail -c 32k data; head -c 32k data) >half && (head -c 32k data; head -c 32k zeroes) >part",
    )?;
    write_and_compare(&commands)?;
    copy_and_verify(context, &commands)?;
    zeroes(&commands)?;
    deallocate(&commands)?;
    let path = &commands.path;
    commands.sh(&format!("nvme flush {path}"))?;
    let script = format!(
        "nvme io-passthru {path} --opcode=0x7f --namespace-id={}",
        namespace.nsid
    );
    refused(&script, &host.guest.run(&script)?, "invalid command opcode")
}

fn write_and_compare(commands: &Commands<'_>) -> Result<()> {
    const AT: u64 = MIB;
    commands.data("write", AT, "/tmp/other")?;
    let more = format!("--force-unit-access --data-size={BYTES} --data=/tmp/data");
    commands.run("write", AT, BYTES, &more)?;
    commands.holds(AT, "/tmp/data")?;
    // Where the volume has it, and as the kernel reads it.
    let mut bytes = vec![0; BYTES as usize];
    File::open(&commands.namespace.path)?.read_exact_at(&mut bytes, AT)?;
    ensure!(
        commands.host.guest.get("/tmp/data")? == bytes,
        "the volume has something else at {AT}"
    );
    commands.sh(&format!(
        "dd if={} bs=64k skip=16 count=1 iflag=direct status=none | cmp - /tmp/data",
        commands.path
    ))?;
    commands.data("compare", AT, "/tmp/data")?;
    let other = format!("--data-size={BYTES} --data=/tmp/other");
    commands.refused("compare", AT, &other, "compare failure")?;
    commands.refused("write", commands.namespace.size, &other, "lba out of range")?;
    commands.holds(AT, "/tmp/data")
}

/// What [`write_and_compare`] wrote is copied as two ranges, the second half first.
fn copy_and_verify(context: &Context<'_>, commands: &Commands<'_>) -> Result<()> {
    const TO: u64 = 2 * MIB;
    let block = |byte| commands.namespace.block(byte);
    let (first, second, count) = (block(MIB), block(MIB + BYTES / 2), block(BYTES / 2) - 1);
    commands.sh(&format!(
        "nvme copy {} --sdlba={} --slbs={second},{first} --blocks={count},{count}",
        commands.path,
        block(TO)
    ))?;
    commands.holds(TO, "/tmp/half")?;
    // A peer may have Verify and not say so in ONCS.
    if context.has(Ability::Verify) {
        commands.run("verify", TO, BYTES, "")?;
        commands.refused("verify", commands.namespace.size, "", "lba out of range")?;
    }
    Ok(())
}

fn zeroes(commands: &Commands<'_>) -> Result<()> {
    const AT: u64 = 3 * MIB;
    commands.data("write", AT, "/tmp/data")?;
    commands.run("write-zeroes", AT + BYTES / 2, BYTES / 2, "")?;
    commands.holds(AT, "/tmp/part")?;
    commands.run("write-zeroes", AT, BYTES / 2, "--deac")?;
    commands.holds(AT, "/tmp/zeroes")
}

/// Dataset Management gives the volume's space back, and what is beside it stays.
fn deallocate(commands: &Commands<'_>) -> Result<()> {
    const AT: u64 = 8 * MIB;
    const SIZE: u64 = 4 * MIB;
    let (path, namespace) = (&commands.path, commands.namespace);
    let used = || -> Result<u64> { Ok(std::fs::metadata(&namespace.path)?.blocks() * 512) };
    commands.sh(&format!(
        "dd if=/dev/urandom of={path} bs=1M seek=8 count=4 oflag=direct status=none"
    ))?;
    commands.data("write", AT + SIZE, "/tmp/data")?;
    let before = used()?;
    let (start, half) = (namespace.block(AT), namespace.block(SIZE / 2));
    commands.sh(&format!(
        "nvme dsm {path} --ad --slbs={start},{} --blocks={half},{half}",
        start + half
    ))?;
    let after = used()?;
    // A file with holes can need a few blocks more for its extents.
    ensure!(
        after + SIZE <= before + (64 << 10),
        "{path}: nothing is freed, {before} bytes before, {after} after"
    );
    commands.holds(AT + SIZE, "/tmp/data")
}

/// Format NVM from 512 to 4096 bytes a block and back: the guest sees it at once, the data is gone, and I/O works on.
pub(super) fn format(context: &Context<'_>) -> Result<()> {
    let function = context.nvme().with(context.namespace(1, 64 * MIB, 512)?);
    let mut served = context.serve(&function)?;
    let guest = served.attach(context.guest()?).start()?;
    let host = Host::new(&guest)?;
    let disk = host.disk(1)?;
    let path = disk.path();
    for block_size in [4096, 512] {
        guest.sh(&format!(
            "dd if=/dev/urandom of={path} bs=1M count=1 oflag=direct status=none"
        ))?;
        guest.sh(&format!(
            "nvme format {path} --block-size={block_size} --force"
        ))?;
        super::wait_until(
            &guest,
            &format!("[ $(blockdev --getss {path}) = {block_size} ]"),
        )?;
        disk.wait_size(64 * MIB)?;
        let left = guest.sh(&format!(
            "dd if={path} bs=1M count=1 iflag=direct status=none | tr -d '\\0' | wc -c"
        ))?;
        ensure!(left == "0", "{left} bytes of old data after a format");
        disk.verified_io("libaio", "0")?;
    }
    served.check()
}
