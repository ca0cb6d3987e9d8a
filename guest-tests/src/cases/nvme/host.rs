//! The NVMe host in a guest: Linux's driver through sysfs, and `nvme-cli`.

use anyhow::{Context as _, Result, bail, ensure};
use bluff_qemu::agent::Output;
use bluff_qemu::guest::Guest;
use serde_json::Value;

use super::{Disk, SERIAL, wait_until};

/// A guest that has one NVMe controller.
#[derive(Clone, Copy)]
pub(super) struct Host<'a> {
    pub(super) guest: &'a Guest,
}

impl<'a> Host<'a> {
    /// Waits until the driver has a controller of ours that works.
    pub(super) fn new(guest: &'a Guest) -> Result<Self> {
        let host = Self { guest };
        host.wait_live()?;
        Ok(host)
    }

    pub(super) fn wait_live(&self) -> Result<()> {
        wait_until(
            self.guest,
            "[ \"$(cat /sys/class/nvme/nvme*/state 2>/dev/null)\" = live ]",
        )
    }

    /// The kernel's name for the controller, as `nvme0`. It changes when the controller goes and comes.
    pub(super) fn controller(&self) -> Result<String> {
        let found = self.guest.sh(&format!(
            "for c in /sys/class/nvme/nvme*; do [ $(cat $c/serial) = {SERIAL} ] && basename $c; done; true"
        ))?;
        ensure!(
            found.starts_with("nvme") && !found.contains('\n'),
            "controllers with serial number {SERIAL}: {found:?}"
        );
        Ok(found)
    }

    /// `/sys/class/nvme/nvme0/NAME`.
    pub(super) fn attribute(&self, name: &str) -> Result<String> {
        let controller = self.controller()?;
        self.guest
            .sh(&format!("cat /sys/class/nvme/{controller}/{name}"))
    }

    /// Waits for the namespace of this id. Linux counts the names of namespaces, so they say nothing of their ids.
    pub(super) fn disk(&self, nsid: u32) -> Result<Disk<'a>> {
        wait_until(self.guest, &format!("[ $({}) ]", finds(nsid)))?;
        let name = self.guest.sh(&finds(nsid))?;
        Ok(Disk::new(self.guest, &name))
    }

    /// Waits until there is no namespace of this id.
    pub(super) fn wait_gone(&self, nsid: u32) -> Result<()> {
        wait_until(self.guest, &format!("[ ! $({}) ]", finds(nsid)))
    }

    /// A command of `nvme-cli` for the controller, which must succeed.
    pub(super) fn admin(&self, verb: &str, more: &str) -> Result<String> {
        let controller = self.controller()?;
        self.guest
            .sh(&format!("nvme {verb} /dev/{controller} {more}"))
    }

    /// The same, with what it says as JSON.
    pub(super) fn admin_json(&self, verb: &str, more: &str) -> Result<Value> {
        parse(&self.admin(verb, &format!("{more} --output-format=json"))?)
    }

    /// A command of `nvme-cli` that the controller must refuse; `why` is a part of what is said of the status.
    pub(super) fn admin_refused(&self, verb: &str, more: &str, why: &str) -> Result<()> {
        let controller = self.controller()?;
        let script = format!("nvme {verb} /dev/{controller} {more}");
        refused(&script, &self.guest.run(&script)?, why)
    }

    /// A log page as it is.
    pub(super) fn log_page(&self, id: u8, bytes: u32) -> Result<Vec<u8>> {
        let controller = self.controller()?;
        let output = self.guest.run(&format!(
            "nvme get-log /dev/{controller} --log-id={id} --log-len={bytes} --raw-binary"
        ))?;
        output
            .check()
            .with_context(|| format!("log page {id:#x}"))?;
        ensure!(
            output.stdout.len() == bytes as usize,
            "log page {id:#x} has {} bytes",
            output.stdout.len()
        );
        Ok(output.stdout)
    }

    /// The current value of a feature.
    pub(super) fn feature(&self, id: u8, more: &str) -> Result<u64> {
        let said = self.admin("get-feature", &format!("--feature-id={id} {more}"))?;
        // get-feature:0x07 (Number of Queues), Current value:0x00010001
        let value = said
            .split_once("alue:")
            .and_then(|(_, value)| value.split_whitespace().next());
        value
            .and_then(hexadecimal)
            .with_context(|| format!("feature {id:#x}: {said}"))
    }
}

/// A script that writes the name of the namespace with this id. Paths of a multipath disk are in /sys/block and not in /dev.
fn finds(nsid: u32) -> String {
    format!(
        "for b in /sys/block/nvme*n*; do n=${{b##*/}}; [ \"$(cat $b/nsid 2>/dev/null)\" = {nsid} ] && [ -b /dev/$n ] && echo $n; done; true"
    )
}

pub(super) fn parse(text: &str) -> Result<Value> {
    // nvme-cli may warn before it answers.
    let start = text.find(['{', '[']).unwrap_or(0);
    serde_json::from_str(&text[start..]).with_context(|| format!("no JSON: {text}"))
}

/// A field that is a number, in whatever way it is written.
pub(super) fn number(value: &Value, name: &str) -> Result<u64> {
    let field = &value[name];
    let found = match field {
        Value::Number(number) => number.as_u64(),
        Value::String(text) => text.parse().ok().or_else(|| hexadecimal(text)),
        _ => None,
    };
    found.with_context(|| format!("{name} is {field}, no number, in {value}"))
}

fn hexadecimal(text: &str) -> Option<u64> {
    u64::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
}

/// A field that is text, without white space around it.
pub(super) fn text<'a>(value: &'a Value, name: &str) -> Result<&'a str> {
    let found = value[name].as_str().map(str::trim);
    found.with_context(|| format!("{name} is no text in {value}"))
}

/// That a script failed, and said this.
pub(super) fn refused(script: &str, output: &Output, why: &str) -> Result<()> {
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    if output.status == 0 {
        bail!("{script} succeeded: {said}");
    }
    let (found, why_) = (said.to_lowercase(), why.to_lowercase());
    ensure!(found.contains(&why_), "{script}: {said}, expected {why}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_they_are_written() {
        let value =
            parse("warning\n{\"a\":7,\"b\":\"12\",\"c\":\"0x1f\",\"d\":null,\"e\":\" x \"}")
                .expect("JSON");
        assert_eq!(number(&value, "a").ok(), Some(7));
        assert_eq!(number(&value, "b").ok(), Some(12));
        assert_eq!(number(&value, "c").ok(), Some(31));
        assert!(number(&value, "d").is_err());
        assert_eq!(text(&value, "e").ok(), Some("x"));
    }

    #[test]
    fn a_refusal_has_its_reason() {
        let output = |status, stderr: &str| Output {
            status,
            stdout: vec![],
            stderr: stderr.into(),
        };
        refused(
            "x",
            &output(1, "NVMe status: LBA Out of Range"),
            "lba out of range",
        )
        .expect("refused");
        assert!(refused("x", &output(1, "no such file"), "lba out of range").is_err());
        assert!(refused("x", &output(0, "lba out of range"), "lba out of range").is_err());
    }
}
