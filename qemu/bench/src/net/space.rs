//! Network namespaces without a name: they go with the last process that is in them, so nothing is left behind.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use bluff_packet::Mac;
use bluff_qemu::hostdir::HostDir;
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

/// Of the thread that opens it.
const OWN: &str = "/proc/thread-self/ns/net";

/// A network namespace.
pub struct Space(File);

/// Back to where it was before, when it is dropped.
pub struct Entered(File);

impl Drop for Entered {
    fn drop(&mut self) {
        let back = move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network));
        back.expect("the namespace that it came from");
    }
}

impl Space {
    /// A new one, without IPv6, so that nothing is sent that nobody asked for.
    pub fn new() -> Result<Self> {
        let make = || {
            #[allow(deprecated)]
            rustix::thread::unshare(UnshareFlags::NEWNET)
                .context("a network namespace; only root may have one")?;
            for which in ["all", "default"] {
                let path = format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6");
                // Not there where the kernel has no IPv6.
                let _ = fs::write(path, "1");
            }
            anyhow::Ok(Self(File::open(OWN)?))
        };
        std::thread::scope(|scope| scope.spawn(make).join().expect("it does not panic"))
    }

    /// The calling thread is in it, and what it starts, until the end of what is given.
    pub fn enter(&self) -> Result<Entered> {
        let before = Entered(File::open(OWN)?);
        move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network))?;
        Ok(before)
    }

    /// Runs `ip` in it, with these words.
    pub fn ip(&self, tools: &HostDir, words: &str) -> Result<()> {
        let _in = self.enter()?;
        said(tools.command("ip")?.args(words.split_whitespace()))?;
        Ok(())
    }

    /// Its name for programs that take one: a path.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

/// Runs a program to its end; gives what it printed.
pub fn said(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    ensure!(
        output.status.success(),
        "{command:?}: {}\n{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    Ok(text(&output.stdout))
}

/// The card's namespace and that of the neighbour, who counts what comes and throws it away: no address there is the
/// one that frames are sent to, so the stack lets go of them where it would look for a route.
pub struct Wire {
    /// Where the card is.
    pub card: Space,
    counters: File,
    // It is what the counters are of.
    _sink: Space,
}

/// The card's end of the wire.
pub const CARD_END: &str = "wire0";
const SINK_END: &str = "wire1";
/// The neighbour's own address: what is sent by way of it is for somebody else, who is not there.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 254);

/// What came over the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrived {
    /// Bytes, with Ethernet headers.
    pub bytes: u64,
    /// Packets: those of a batch that crosses as one are one.
    pub packets: u64,
}

impl Wire {
    /// A new one. `addresses`: the card's, where its end is to have one, and the neighbour's, who is at `neighbour`.
    pub fn new(
        tools: &HostDir,
        mtu: u16,
        addresses: [Ipv4Addr; 2],
        neighbour: Mac,
        assign: bool,
    ) -> Result<Self> {
        let (card, sink) = (Space::new()?, Space::new()?);
        card.ip(
            tools,
            &format!(
                "link add {CARD_END} mtu {mtu} type veth peer name {SINK_END} mtu {mtu} address {neighbour} netns {}",
                sink.path()
            ),
        )?;
        card.ip(tools, "link set lo up")?;
        sink.ip(tools, &format!("address add {GATEWAY}/24 dev {SINK_END}"))?;
        sink.ip(tools, &format!("link set {SINK_END} up"))?;
        card.ip(tools, &format!("link set {CARD_END} up"))?;
        if assign {
            let [own, other] = addresses;
            card.ip(tools, &format!("address add {own}/24 dev {CARD_END}"))?;
            card.ip(
                tools,
                &format!(
                    "neighbour replace {other} lladdr {neighbour} nud permanent dev {CARD_END}"
                ),
            )?;
        }
        let counters = {
            let _in = sink.enter()?;
            File::open("/proc/thread-self/net/dev")?
        };
        Ok(Self {
            card,
            counters,
            _sink: sink,
        })
    }

    /// What has come to the neighbour since it is there.
    pub fn arrived(&self) -> Result<Arrived> {
        let mut room = [0; 4096];
        let len = self.counters.read_at(&mut room, 0)?;
        let text = std::str::from_utf8(&room[..len])?;
        arrived(text).with_context(|| format!("no {SINK_END} in {text}"))
    }
}

/// From the text of `/proc/net/dev`.
fn arrived(text: &str) -> Option<Arrived> {
    let line = text
        .lines()
        .find_map(|line| line.trim().strip_prefix(SINK_END)?.strip_prefix(':'))?;
    let mut words = line.split_whitespace().map(str::parse);
    let mut next = || words.next()?.ok();
    Some(Arrived {
        bytes: next()?,
        packets: next()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_from_their_line() {
        let text = "Inter-|   Receive                                                |  Transmit\n \
            face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs\n \
            lo:       0       0    0    0    0     0          0         0        0       0    0\n \
            wire1: 1234      7    0    0    0     0          0         0        5       6    0\n";
        let wanted = Arrived {
            bytes: 1234,
            packets: 7,
        };
        assert_eq!(arrived(text), Some(wanted));
        assert_eq!(arrived("wire10: 1 2 3"), None);
    }
}
