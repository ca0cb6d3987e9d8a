//! The program: a virtio-blk device on a vhost-user socket (see the library).
//!
//! Unsafe, because a descriptor is named by its number on the command line.
#![allow(unsafe_code)]

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

use anyhow::{Context, bail};
use bluff_reference::{Capabilities, DeviceOptions, Endpoint, Server, open_volume};
use clap::{ArgGroup, Parser};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// virtio-blk over vhost-user, on the plain rust-vmm stack.
#[derive(Debug, Parser)]
#[command(name = "bluff-reference", version)]
#[command(group = ArgGroup::new("socket").args(["socket_path", "fd", "print_capabilities"]).required(true))]
#[command(group = ArgGroup::new("storage").args(["volume", "blk_file", "print_capabilities"]).required(true))]
struct Arguments {
    /// Listen at this path
    #[arg(long, value_name = "PATH")]
    socket_path: Option<PathBuf>,
    /// Use this socket, which listens or is connected
    #[arg(long, value_name = "N")]
    fd: Option<RawFd>,
    /// The volume, as ram:?size=256MiB
    #[arg(long, value_name = "URI")]
    volume: Option<String>,
    /// A raw file or block device: short for --volume file:PATH
    #[arg(long, value_name = "PATH")]
    blk_file: Option<PathBuf>,
    /// Number of queues, and of threads
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    num_queues: u16,
    /// Largest size of a queue, a power of two
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = queue_size)]
    queue_size: u16,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    /// The device's identification string, at most 20 bytes
    #[arg(long, value_name = "S", default_value = "bluff-reference", value_parser = serial)]
    serial: String,
    /// Poll the rings and never sleep while a driver is there
    #[arg(long)]
    poll: bool,
    /// Print what this program can do, as JSON, and end
    #[arg(long)]
    print_capabilities: bool,
}

fn queue_size(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(n @ 2..=32768) if u16::is_power_of_two(n) => Ok(n),
        _ => Err("a power of two, 2 to 32768".into()),
    }
}

fn serial(text: &str) -> Result<String, String> {
    if text.len() <= bluff_reference::spec::ID_LEN {
        Ok(text.into())
    } else {
        Err("at most 20 bytes".into())
    }
}

fn main() -> anyhow::Result<()> {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    let arguments = Arguments::parse();
    if arguments.print_capabilities {
        println!("{}", serde_json::to_string_pretty(&Capabilities::ours())?);
        return Ok(());
    }
    let uri = match (arguments.volume, arguments.blk_file) {
        (Some(uri), _) => uri,
        (None, Some(path)) => format!("file:{}", escape(&path)?),
        (None, None) => unreachable!("one of them is required"),
    };
    let endpoint = match (arguments.socket_path, arguments.fd) {
        (Some(path), _) => Endpoint::Path(path),
        (None, Some(fd)) if fd > 2 => {
            // SAFETY: it asks for flags, of any number.
            if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
                bail!("--fd: {fd} is not open");
            }
            // SAFETY: whoever started this program passed the descriptor on for this purpose, and
            // nothing else here uses its number.
            Endpoint::Socket(unsafe { OwnedFd::from_raw_fd(fd) })
        }
        _ => bail!("--fd: 0, 1 and 2 are not sockets of this kind"),
    };
    let options = DeviceOptions {
        num_queues: arguments.num_queues,
        queue_size: arguments.queue_size,
        read_only: arguments.read_only,
        serial: arguments.serial,
        poll: arguments.poll,
    };
    let mut signals = Signals::new([SIGTERM, SIGINT]).context("signals")?;
    let volume = open_volume(&uri).with_context(|| uri.clone())?;
    let mut server = Server::new(volume, options, endpoint)?;
    let stop = server.stop();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for _ in signals.forever() {
                stop.stop();
            }
        })?;
    println!("ready");
    server.run()?;
    Ok(())
}

/// A path inside of a URI: what would end it there is written as %XX.
fn escape(path: &std::path::Path) -> anyhow::Result<String> {
    let path = path.to_str().context("--blk-file: the path is not UTF-8")?;
    Ok(path.replace('%', "%25").replace('?', "%3F"))
}
