//! What `bluffctl` prints: tables for people.

pub mod net;
mod table;
pub mod top;

use crate::control::{FunctionEntry, NamespaceEntry, NamespacesEntry, Status, VolumeEntry};
use crate::spec::{DeviceSpec, Id, SubsystemUse};
use crate::stats::FunctionStatistics;
use crate::units::show_size;
pub use table::Table;

/// How the daemon is.
pub fn status(status: &Status) -> String {
    let data = match status.data_pid {
        Some(pid) => format!(
            "{} (process {pid}, started again {} times)",
            status.data, status.restarts
        ),
        None => status.data.to_string(),
    };
    let mut table = Table::plain();
    table.row(["phase", &status.phase]);
    table.row(["version", &status.version]);
    table.row(["process", &status.pid.to_string()]);
    table.row(["uptime", &format!("{} s", status.uptime_s)]);
    table.row(["data half", &data]);
    table.row(["reactors", &status.reactors.to_string()]);
    table.row(["volumes", &status.volumes.to_string()]);
    table.row(["networks", &status.networks.to_string()]);
    table.row([
        "functions",
        &format!("{}, {} connected", status.functions, status.connected),
    ]);
    table.to_string()
}

/// All functions, one a line.
pub fn functions(functions: &[FunctionEntry]) -> String {
    let mut table = Table::new(["FUNCTION", "KIND", "STATE", "VOLUME", "QUEUES", "SOCKET"]);
    for function in functions {
        let (kind, queues) = (
            function.spec.device.kind().word(),
            function.spec.queues.to_string(),
        );
        let socket = socket(function);
        table.row([
            function.id.as_str(),
            kind,
            &function.state,
            &stands_on(function),
            &queues,
            &socket,
        ]);
    }
    table.to_string()
}

/// One function, with what its queues did since they were started.
pub fn function(function: &FunctionEntry, statistics: Option<&FunctionStatistics>) -> String {
    let mut table = Table::plain();
    table.row(["function", function.id.as_str()]);
    table.row(["kind", function.spec.device.kind().word()]);
    table.row([
        "attached by",
        &format!("{}, as {}", function.spec.attach, function.spec.mode),
    ]);
    table.row(["socket", &socket(function)]);
    match &function.spec.device {
        DeviceSpec::VirtioBlk { .. } => table.row(["volume", &stands_on(function)]),
        DeviceSpec::VirtioNet { port, .. } => {
            table.row(["network", &stands_on(function)]);
            net::port(&mut table, port);
        }
        DeviceSpec::Uplink(uplink) => {
            if let Some(mac) = uplink.mac {
                table.row(["mac on the wire", &mac.to_string()]);
            }
            table.row(["mtu", &uplink.mtu.to_string()]);
        }
        DeviceSpec::Nvme { serial, .. } => {
            table.row(["stands on", &stands_on(function)]);
            let serial = serial.as_deref();
            table.row(["serial", serial.unwrap_or(function.id.as_str())]);
        }
    }
    table.row(["queues", &function.spec.queues.to_string()]);
    table.row([
        "poll",
        function.spec.poll.map_or("as the card", |poll| poll.word()),
    ]);
    table.row(["state", &function.state]);
    if let Some(reason) = &function.reason {
        table.row(["reason", reason]);
    }
    if let Some(messages) = statistics.and_then(|statistics| statistics.messages) {
        table.row(["messages", &messages.to_string()]);
    }
    // What a virtio driver negotiates.
    let is_virtio = matches!(
        function.spec.device,
        DeviceSpec::VirtioBlk { .. } | DeviceSpec::VirtioNet { .. } | DeviceSpec::Uplink(_)
    );
    if let Some(session) = function.session.as_ref().filter(|_| is_virtio) {
        table.row(["features", &format!("{:#018x}", session.features)]);
        let status = session
            .status
            .map_or("not told".to_owned(), |status| format!("{status:#04x}"));
        table.row(["device status", &status]);
        table.row(["queues running", &session.queues.to_string()]);
    }
    let mut text = table.to_string();
    if !function.namespaces.is_empty() {
        text.push('\n');
        text.push_str(&namespace_table(&function.namespaces).to_string());
    }
    if let Some(counted) = statistics.and_then(|statistics| statistics.net.as_ref()) {
        text.push_str(&net::counters(counted));
    }
    if let Some(statistics) = statistics.filter(|statistics| !statistics.queues.is_empty()) {
        let names = [
            "QUEUE",
            "READS",
            "WRITES",
            "FLUSHES",
            "DISCARDS",
            "READ",
            "WRITTEN",
            "ERRORS",
            "IN FLIGHT",
        ];
        let mut table = Table::new(names);
        for queue in &statistics.queues {
            let counts = [
                u64::from(queue.queue),
                queue.reads,
                queue.writes,
                queue.flushes,
                queue.discards,
            ];
            let mut row: Vec<String> = counts.iter().map(u64::to_string).collect();
            row.extend([show_size(queue.read_bytes), show_size(queue.written_bytes)]);
            row.extend([queue.errors.to_string(), queue.in_flight.to_string()]);
            table.row(row);
        }
        text.push('\n');
        text.push_str(&table.to_string());
    }
    text
}

/// The volume, the volumes, or the subsystem that has them.
fn stands_on(function: &FunctionEntry) -> String {
    match &function.spec.device {
        DeviceSpec::VirtioBlk { volume, .. } => volume.to_string(),
        DeviceSpec::VirtioNet { network, .. } => network.to_string(),
        DeviceSpec::Uplink(_) => "-".to_owned(),
        DeviceSpec::Nvme { subsystem, .. } => match subsystem {
            SubsystemUse::Shared { subsystem } => format!("subsystem {subsystem}"),
            SubsystemUse::Own(own) => {
                let volumes = own.namespaces.iter().map(|n| n.volume.as_str());
                volumes.collect::<Vec<_>>().join(",")
            }
        },
    }
}

/// The namespaces of a function, one a line.
pub fn namespaces(entry: &NamespacesEntry) -> String {
    let mut head = Table::plain();
    let functions: Vec<&str> = entry.functions.iter().map(Id::as_str).collect();
    head.row(["subsystem", &entry.nqn]);
    head.row(["functions", &functions.join(",")]);
    format!("{head}\n{}", namespace_table(&entry.namespaces))
}

fn namespace_table(namespaces: &[NamespaceEntry]) -> Table {
    let mut table = Table::new(["NSID", "VOLUME", "SIZE", "BLOCK"]);
    for namespace in namespaces {
        let shown = |found: Option<String>| found.unwrap_or_else(|| "-".to_owned());
        table.row([
            namespace.nsid.to_string(),
            namespace.volume.to_string(),
            shown(namespace.info.map(|info| show_size(info.size))),
            shown(namespace.block_size.map(|size| size.to_string())),
        ]);
    }
    table
}

fn socket(function: &FunctionEntry) -> String {
    function
        .spec
        .socket
        .as_ref()
        .map_or_else(String::new, |path| path.display().to_string())
}

/// All volumes, one a line.
pub fn volumes(volumes: &[VolumeEntry]) -> String {
    let mut table = Table::new(["VOLUME", "STATE", "SIZE", "BLOCK", "FUNCTIONS", "URI"]);
    for volume in volumes {
        let size = volume
            .info
            .map_or_else(|| "-".to_owned(), |info| show_size(info.size));
        let block = volume
            .info
            .map_or_else(|| "-".to_owned(), |info| info.block_size.to_string());
        let functions: Vec<&str> = volume.functions.iter().map(|id| id.as_str()).collect();
        let functions = if functions.is_empty() {
            "-".to_owned()
        } else {
            functions.join(",")
        };
        table.row([
            volume.id.as_str(),
            &volume.state,
            &size,
            &block,
            &functions,
            &volume.spec.uri,
        ]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::VolumeInfo;
    use crate::spec::VolumeSpec;

    #[test]
    fn a_namespace_has_the_blocks_that_it_was_formatted_to() {
        let entry = |nsid, volume: Option<u32>, block_size| NamespaceEntry {
            nsid,
            volume: "disk0".parse().unwrap(),
            info: volume.map(|block_size| VolumeInfo {
                size: 1 << 30,
                block_size,
                read_only: false,
                channels: None,
            }),
            block_size,
        };
        let all = [
            entry(1, Some(512), Some(4096)),
            entry(5, None, Some(512)),
            entry(7, None, None),
        ];
        assert_eq!(
            namespace_table(&all).to_string(),
            "NSID  VOLUME  SIZE   BLOCK\n\
             1     disk0   1 GiB  4096\n\
             5     disk0   -      512\n\
             7     disk0   -      -\n"
        );
    }

    #[test]
    fn volumes_stand_in_columns() {
        let entry = |id: &str, info| VolumeEntry {
            id: id.parse().unwrap(),
            spec: VolumeSpec {
                uri: "ram:?size=1GiB".to_owned(),
                layers: Vec::new(),
            },
            state: "open".to_owned(),
            reason: None,
            info,
            functions: Vec::new(),
        };
        let info = VolumeInfo {
            size: 1 << 30,
            block_size: 512,
            read_only: false,
            channels: None,
        };
        let text = volumes(&[entry("disk0", Some(info)), entry("a-long-name", None)]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "VOLUME       STATE  SIZE   BLOCK  FUNCTIONS  URI");
        assert_eq!(
            lines[1],
            "disk0        open   1 GiB  512    -          ram:?size=1GiB"
        );
        assert_eq!(
            lines[2],
            "a-long-name  open   -      -      -          ram:?size=1GiB"
        );
    }
}
