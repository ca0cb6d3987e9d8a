//! Hugepages for DPDK, reserved while they are needed.

use std::fs;
use std::io::Write;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

const NUMBER: &str = "/proc/sys/vm/nr_hugepages";
const FREE: &str = "HugePages_Free:";

/// Pages that are there until this is dropped. A process of its own puts the number back, so that it is put back too when
/// this one is killed.
pub struct Hugepages {
    keeper: Child,
}

impl Hugepages {
    /// At least `mebibytes` that nobody uses.
    pub fn reserve(mebibytes: u64) -> Result<Self> {
        let before: u64 = fs::read_to_string(NUMBER)?.trim().parse()?;
        let meminfo = || fs::read_to_string("/proc/meminfo");
        let size = number(&meminfo()?, "Hugepagesize:").context("this kernel has no hugepages")?;
        let wanted = (mebibytes * 1024).div_ceil(size);
        let free = number(&meminfo()?, FREE).unwrap_or(0);
        // In a group of its own: what a terminal sends to the others must not end it before them.
        let mut keeper = Command::new("setsid");
        keeper.args([
            "sh",
            "-c",
            "trap '' INT TERM HUP; cat > /dev/null; sleep 0.2; echo \"$0\" > \"$1\"",
        ]);
        keeper.args([&before.to_string(), NUMBER]);
        let keeper = keeper
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .context("setsid (util-linux)")?;
        let this = Self { keeper };
        if free < wanted {
            let total = before + wanted - free;
            let set = || {
                fs::write(NUMBER, total.to_string())
                    .context("hugepages; only root may reserve them")
            };
            set()?;
            if number(&meminfo()?, FREE).unwrap_or(0) < wanted {
                // Memory is there, but in pieces.
                let _ = fs::write("/proc/sys/vm/compact_memory", "1");
                set()?;
            }
        }
        let free = number(&meminfo()?, FREE).unwrap_or(0);
        ensure!(free >= wanted, "{free} hugepages of {wanted} could be had");
        Ok(this)
    }
}

impl Drop for Hugepages {
    fn drop(&mut self) {
        if let Some(mut stdin) = self.keeper.stdin.take() {
            let _ = stdin.flush();
        }
        let _ = self.keeper.wait();
    }
}

/// A number of `/proc/meminfo`.
fn number(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_by_name() {
        let text =
            "HugePages_Total:      12\nHugePages_Free:        7\nHugepagesize:       2048 kB\n";
        assert_eq!(number(text, FREE), Some(7));
        assert_eq!(number(text, "Hugepagesize:"), Some(2048));
        assert_eq!(number(text, "HugePages"), None);
    }
}
