//! Network namespaces of Linux, and a cable between two of them: an underlay that nothing else on the machine has a part in.
//!
//! A namespace lives as long as a process that holds it (`unshare … cat`), and that ends with its owner, also where the owner is killed: its
//! input is a pipe. Programs enter by `nsenter`, which becomes the program. Without being root it is a namespace of users, too, where the
//! machine allows that.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::debian::is_root;
use crate::hostdir::HostDir;
use crate::process::Process;

/// Both are made of what every Debian has, and do little.
const PATIENCE: Duration = Duration::from_secs(20);

/// The way into a network namespace; good as long as the [`Namespace`] is there.
#[derive(Clone, Copy, Debug)]
pub struct Entrance {
    holder: u32,
    users: bool,
}

impl Entrance {
    /// The same command within the namespace. Its process is the program's own, for signals and for waiting.
    pub fn command(self, inner: &Command) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--net", "--target", &self.holder.to_string()]);
        if self.users {
            command.args(["--user", "--preserve-credentials"]);
        }
        command.arg("--").arg(inner.get_program());
        command.args(inner.get_args());
        for (name, value) in inner.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command
    }
}

/// A network namespace. Dropping it removes it, once nobody else is in it.
#[derive(Debug)]
pub struct Namespace {
    entrance: Entrance,
    // Its log is in the folder.
    _holder: Process,
    _folder: TempDir,
}

impl Namespace {
    /// One with nothing but a loopback that is up. An error where the machine does not allow it.
    pub fn new() -> Result<Self> {
        let mut command = Command::new("unshare");
        command.arg("--net");
        let users = !is_root();
        if users {
            command.args(["--user", "--map-root-user"]);
        }
        Self::hold(command, users)
    }

    /// Another one, with the same users.
    fn beside(&self) -> Result<Self> {
        let mut command = Command::new("unshare");
        command.arg("--net");
        let command = match self.entrance.users {
            true => self.entrance.command(&command),
            false => command,
        };
        Self::hold(command, self.entrance.users)
    }

    fn hold(mut command: Command, users: bool) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("bluff-namespace.")
            .tempdir()?;
        let log = folder.path().join("holder.log");
        command.args(["sh", "-c", "echo held; exec cat"]);
        let mut holder = Process::spawn(command.stdin(Stdio::piped()), "unshare", &log)?;
        let end = Instant::now() + PATIENCE;
        while !std::fs::read_to_string(&log)?.contains("held") {
            holder
                .check_alive()
                .context("no network namespace of our own")?;
            ensure!(Instant::now() < end, "unshare does not get ready");
            std::thread::sleep(Duration::from_millis(2));
        }
        let namespace = Self {
            entrance: Entrance {
                holder: holder.id(),
                users,
            },
            _holder: holder,
            _folder: folder,
        };
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// The way into it.
    pub fn entrance(&self) -> Entrance {
        self.entrance
    }

    /// Runs `ip` (iproute2) in it, with these words.
    pub fn ip(&self, words: &str) -> Result<()> {
        let mut command = HostDir::guest()?.command("ip")?;
        command.args(words.split_whitespace());
        let output = self.entrance.command(&command).output().context("ip")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "ip {words}: {}", said.trim_end());
        Ok(())
    }

    /// Writes down what passes `eth0` and fits a filter of tcpdump's, one line or more for each packet, until it is `count` packets.
    pub fn capture(&self, filter: &str, count: u32, log: &Path) -> Result<Capture> {
        let mut command = HostDir::guest()?.command("tcpdump")?;
        command.args([
            "-i",
            "eth0",
            "-n",
            "-e",
            "-l",
            "-t",
            "--immediate-mode",
            "-Z",
            "root",
        ]);
        command.args(["-c", &count.to_string()]).arg(filter);
        let mut command = self.entrance.command(&command);
        let mut process = Process::spawn(command.stdin(Stdio::null()), "tcpdump", log)?;
        let end = Instant::now() + PATIENCE;
        while !std::fs::read_to_string(log)?.contains("listening on") {
            process.check_alive()?;
            ensure!(Instant::now() < end, "tcpdump does not get ready");
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(Capture(process))
    }
}

/// A tcpdump that looks on.
#[derive(Debug)]
pub struct Capture(Process);

impl Capture {
    /// Waits until it has seen enough, and answers what it wrote about the packets.
    pub fn wait(mut self, bound: Duration) -> Result<String> {
        let ended = self.0.wait(bound);
        let text = std::fs::read_to_string(self.0.log())?;
        let status = ended.with_context(|| format!("it has seen:\n{text}"))?;
        ensure!(status.success(), "tcpdump ended with {status}:\n{text}");
        let of_packets = |line: &&str| line.contains(" > ") || line.starts_with([' ', '\t']);
        Ok(text
            .lines()
            .filter(of_packets)
            .collect::<Vec<_>>()
            .join("\n"))
    }
}

/// Two namespaces whose `eth0` are the ends of a cable, with an MTU of 1500.
#[derive(Debug)]
pub struct Cable {
    /// Its ends.
    pub ends: [Namespace; 2],
}

impl Cable {
    /// Gives each end these addresses, with the lengths of their prefixes.
    pub fn new(addresses: [&[&str]; 2]) -> Result<Self> {
        let one = Namespace::new()?;
        let ends = [one.beside()?, one];
        let other = ends[0].entrance.holder;
        // Made by the one that has the users, if there are any.
        ends[1].ip(&format!(
            "link add eth0 type veth peer name eth0 netns {other}"
        ))?;
        for (end, addresses) in ends.iter().zip(addresses) {
            for address in addresses {
                // Nobody else can have it, so nobody needs to be asked.
                let unasked = if address.contains(':') { " nodad" } else { "" };
                end.ip(&format!("address add {address} dev eth0{unasked}"))?;
            }
            end.ip("link set eth0 up")?;
        }
        Ok(Self { ends })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entrance_keeps_the_command_and_its_environment() {
        let entrance = Entrance {
            holder: 42,
            users: true,
        };
        let mut inner = Command::new("/bin/echo");
        inner.arg("a b").env("NAME", "value");
        let command = entrance.command(&inner);
        let words: Vec<_> = command.get_args().map(|w| w.to_string_lossy()).collect();
        let all = "--net --target 42 --user --preserve-credentials -- /bin/echo";
        assert_eq!(words[..7].join(" "), all);
        assert_eq!(words[7], "a b");
        assert_eq!(command.get_envs().count(), 1);
    }
}
