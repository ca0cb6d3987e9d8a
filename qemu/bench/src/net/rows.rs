//! What is measured of networks.

use super::frames::Tunnel;

/// What carries our tunnels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// A vhost-user port.
    Port,
    /// The kernel's UDP sockets.
    Udp,
    /// A tap device, in a bridge with the wire.
    Tap,
}

/// Who does a row's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// bluffd.
    Bluffd {
        /// What carries its tunnels.
        carrier: Carrier,
        /// Flows, each to an address of its own.
        flows: usize,
    },
    /// Open vSwitch with DPDK; with AF_XDP where the row's frames leave by the kernel.
    Ovs {
        /// As above.
        flows: usize,
    },
    /// DPDK's testpmd: what comes from one port goes to the other, whatever it is.
    Testpmd,
    /// The kernel's own VXLAN device, behind a bridge that a tap is in.
    Kernel,
}

impl Peer {
    /// Its name in the table.
    pub fn name(&self, path: Path) -> String {
        let kernel = path.leaves_by_kernel();
        match self {
            Self::Bluffd {
                carrier: Carrier::Udp,
                ..
            } if kernel => "bluffd, UDP".into(),
            Self::Bluffd {
                carrier: Carrier::Tap,
                ..
            } if kernel => "bluffd, tap".into(),
            Self::Bluffd { flows: 1, .. } => "bluffd".into(),
            Self::Bluffd { flows, .. } => format!("bluffd, {flows} addresses"),
            Self::Ovs { .. } if kernel => "OVS, AF_XDP".into(),
            Self::Ovs { flows: 1 } => "OVS-DPDK".into(),
            Self::Ovs { flows } => format!("OVS-DPDK, {flows} addresses"),
            Self::Testpmd => "testpmd".into(),
            Self::Kernel => "kernel's VXLAN".into(),
        }
    }

    /// Flows, each to an address of its own.
    pub fn flows(&self) -> usize {
        match self {
            Self::Bluffd { flows, .. } | Self::Ovs { flows } => *flows,
            Self::Testpmd | Self::Kernel => 1,
        }
    }

    /// Whether it needs DPDK's memory.
    pub fn has_dpdk(&self) -> bool {
        matches!(self, Self::Ovs { .. } | Self::Testpmd)
    }
}

/// Which way frames go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// From one function to another on the same card.
    Switch,
    /// The same, both ways, by testpmd in the place of our drivers.
    Across,
    /// From a function into a tunnel, on a vhost-user port.
    Encapsulation(Tunnel),
    /// From a tunnel on a vhost-user port to a function.
    Decapsulation(Tunnel),
    /// From a function into a tunnel, and out by the kernel.
    Kernel(Tunnel),
    /// The same with TCP segments that stand for several.
    Segments(Tunnel),
}

impl Path {
    /// Whether what is in tunnels leaves by the kernel.
    pub fn leaves_by_kernel(self) -> bool {
        matches!(self, Self::Kernel(_) | Self::Segments(_))
    }

    /// What frames are wrapped in.
    pub fn tunnel(self) -> Option<Tunnel> {
        match self {
            Self::Switch | Self::Across => None,
            Self::Encapsulation(tunnel)
            | Self::Decapsulation(tunnel)
            | Self::Kernel(tunnel)
            | Self::Segments(tunnel) => Some(tunnel),
        }
    }
}

/// The work of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Which way frames go.
    pub path: Path,
    /// Bytes of a tenant's frame, with its Ethernet header.
    pub len: usize,
}

/// A row of the table: the first of the peers against the others.
#[derive(Clone, Debug)]
pub struct Row {
    /// Its name, which `--only` looks in.
    pub name: String,
    /// What is done.
    pub work: Work,
    /// Who does it.
    pub peers: Vec<Peer>,
    /// How many of the first peers are ours: the best of them stands first.
    pub ours: usize,
    /// What the first is to reach, as a share of the first that is not ours.
    pub target: Option<f64>,
}

/// Where many addresses are in use: so many.
const MANY: usize = 10_000;
/// Bytes of a frame that a guest leaves for the device to segment: 46 segments, as many as fit into an outer packet.
const SEGMENTS: usize = 54 + 46 * super::frames::MSS;
const OVS: Peer = Peer::Ovs { flows: 1 };

const fn bluffd(flows: usize) -> Peer {
    Peer::Bluffd {
        carrier: Carrier::Port,
        flows,
    }
}

fn row(
    name: impl Into<String>,
    path: Path,
    len: usize,
    peers: &[Peer],
    target: Option<f64>,
) -> Row {
    Row {
        name: format!("net: {}", name.into()),
        work: Work { path, len },
        peers: peers.to_vec(),
        ours: 1,
        target,
    }
}

/// All rows, in the order of the table.
pub fn all() -> Vec<Row> {
    let switch = [bluffd(1), OVS, Peer::Testpmd];
    let mut rows = vec![
        row("port to port, 64 B", Path::Switch, 64, &switch, Some(1.0)),
        row("port to port, 1450 B", Path::Switch, 1450, &switch, None),
        row(
            "port to port both ways, 64 B, testpmd drives",
            Path::Across,
            64,
            &[bluffd(1), OVS],
            None,
        ),
    ];
    for tunnel in [Tunnel::Vxlan, Tunnel::Geneve] {
        for (len, target) in [(64, 1.2), (1450, 1.0)] {
            let peers = [bluffd(1), OVS];
            let name = tunnel.name();
            let path = Path::Encapsulation(tunnel);
            rows.push(row(
                format!("{name} encapsulation, {len} B"),
                path,
                len,
                &peers,
                Some(target),
            ));
            let path = Path::Decapsulation(tunnel);
            rows.push(row(
                format!("{name} decapsulation, {len} B"),
                path,
                len,
                &peers,
                Some(target),
            ));
        }
    }
    let many = [bluffd(MANY), bluffd(1), Peer::Ovs { flows: MANY }];
    for (verb, path) in [
        ("encapsulation", Path::Encapsulation(Tunnel::Vxlan)),
        ("decapsulation", Path::Decapsulation(Tunnel::Vxlan)),
    ] {
        let name = format!("vxlan {verb}, 64 B, {MANY} flows and addresses");
        rows.push(row(name, path, 64, &many, Some(0.9)));
    }
    let [udp, tap] = [Carrier::Udp, Carrier::Tap].map(|carrier| Peer::Bluffd { carrier, flows: 1 });
    let small = Path::Kernel(Tunnel::Vxlan);
    let large = Path::Segments(Tunnel::Vxlan);
    for (what, path, len, other) in [
        ("64 B", small, 64, OVS),
        ("64 KiB of TCP", large, SEGMENTS, Peer::Kernel),
    ] {
        let name = format!("vxlan over the kernel, {what}");
        let row = row(name, path, len, &[udp, tap, other], Some(1.0));
        rows.push(Row { ours: 2, ..row });
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_rows_differ() {
        let mut names: Vec<_> = all().into_iter().map(|row| row.name).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
        assert!(names.iter().all(|name| name.contains("net")));
    }
}
