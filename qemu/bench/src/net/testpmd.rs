//! DPDK's testpmd: as a forwarder between two vhost ports, and as a driver of two.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use bluff_qemu::hostdir::HostDir;

use super::frames::STATIONS;
use super::ovs::drivers;

/// What comes from one of these ports goes to the other, by one thread on `core`.
pub fn forwarder(
    tools: &HostDir,
    folder: &Path,
    ports: &[&str],
    core: usize,
    mebibytes: u64,
) -> Result<Command> {
    let mut command = testpmd(tools, "bluff-forwarder", core, mebibytes)?;
    for (i, port) in ports.iter().enumerate() {
        let socket = folder.join(format!("{port}.sock"));
        command.arg(format!(
            "--vdev=net_vhost{i},iface={},queues=1",
            socket.display()
        ));
    }
    command.args([
        "--",
        "--nb-cores=1",
        "--forward-mode=io",
        "--no-mlockall",
        "--auto-start",
    ]);
    // It ends when its input does, unless it prints.
    command.arg("--stats-period=600");
    Ok(command)
}

/// A driver of two functions: frames go from one to the other and back, over and over, by one thread on core 0. Prints what each port has carried every second.
pub fn driver(
    tools: &HostDir,
    sockets: &[PathBuf; 2],
    len: usize,
    mebibytes: u64,
) -> Result<Command> {
    let mut command = testpmd(tools, "bluff-driver", 0, mebibytes)?;
    for (i, socket) in sockets.iter().enumerate() {
        command.arg(format!(
            "--vdev=net_virtio_user{i},path={},mac={},queues=1,queue_size=512",
            socket.display(),
            STATIONS[i]
        ));
    }
    command.args([
        "--",
        "--nb-cores=1",
        "--forward-mode=macswap",
        "--port-topology=loop",
        "--no-mlockall",
    ]);
    for (i, other) in [STATIONS[1], STATIONS[0]].iter().enumerate() {
        command.arg(format!("--eth-peer={i},{other}"));
    }
    command.args(["--txd=512", "--rxd=512", "--tx-first", "--burst=32"]);
    command
        .arg(format!("--txpkts={len}"))
        .arg("--stats-period=1");
    Ok(command)
}

fn testpmd(tools: &HostDir, name: &str, core: usize, mebibytes: u64) -> Result<Command> {
    let mut command = tools.command("dpdk-testpmd")?;
    // The first core is for what is not forwarding.
    command.arg(format!("--lcores=0@0,1@{core}"));
    command.args([
        "--in-memory",
        "--single-file-segments",
        "--iova-mode=va",
        "--no-pci",
        "--no-telemetry",
    ]);
    command
        .arg(format!("--file-prefix={name}"))
        .arg("-m")
        .arg(mebibytes.to_string());
    for driver in drivers(
        tools,
        &["mempool_ring", "bus_vdev", "net_vhost", "net_virtio"],
    )? {
        command.arg("-d").arg(driver);
    }
    Ok(command)
}

/// The frames a second that a driver says that it has received: of each port in turn, as often as it has said so.
pub fn rates(said: &str) -> Vec<f64> {
    let words = said.split("Rx-pps:").skip(1);
    words
        .filter_map(|text| text.split_whitespace().next()?.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_from_what_is_said() {
        let text = "  Throughput (since last show)\n  Rx-pps:      4567890          Rx-bps:   123\n  Tx-pps:      1          Tx-bps:  2\n\
            more\n  Rx-pps:            7          Rx-bps:";
        assert_eq!(rates(text), [4_567_890.0, 7.0]);
    }
}
