//! What is measured.

use crate::ring::Device;

/// Who does a row's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// The ideal ring, on a thread of this process.
    Ideal,
    /// bluffd.
    Bluffd {
        /// The function's `poll`.
        poll: &'static str,
        /// Packed rings.
        packed: bool,
    },
    /// bluffd's NVMe function, over vfio-user with mapped doorbells.
    Nvme,
    /// bluff-reference: the stock rust-vmm stack.
    Reference,
    /// qemu-storage-daemon.
    StorageDaemon,
    /// `memcpy` of the same buffers, one after the other.
    Memcpy,
    /// A system call for each buffer, one after the other, on the same file.
    Calls,
    /// A ring with nothing behind it, driver and device in turn on one thread; the device's turns count.
    Ring(Device),
}

impl Peer {
    /// Its name in the table.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ideal => "ideal ring",
            Self::Bluffd { packed: true, .. } => "bluffd, packed",
            Self::Bluffd {
                poll: "adaptive", ..
            } => "bluffd, adaptive",
            Self::Bluffd { poll: "never", .. } => "bluffd, never",
            Self::Bluffd { .. } => "bluffd",
            Self::Nvme => "bluffd, NVMe",
            Self::Reference => "bluff-reference",
            Self::StorageDaemon => "qemu-storage-daemon",
            Self::Memcpy => "memcpy",
            Self::Calls => "pread and pwrite",
            Self::Ring(Device::Stock) => "virtio-queue",
            Self::Ring(Device::Ours { packed: true, .. }) => "bluff-virtio, packed",
            Self::Ring(Device::Ours { .. }) => "bluff-virtio",
        }
    }
}

/// What stands behind the function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Volume {
    /// Nothing: what is left is the ring.
    Null,
    /// Memory; for qemu-storage-daemon, which has none, its null-co.
    Ram,
    /// A file on tmpfs.
    Tmpfs,
    /// A file on a disk, with O_DIRECT.
    Disk,
}

/// The work of a row.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// What stands behind the function.
    pub volume: Volume,
    /// Requests in flight on each queue.
    pub depth: u16,
    /// Queues.
    pub queues: u16,
    /// Bytes of a request.
    pub len: u32,
    /// Writes, or reads.
    pub write: bool,
    /// Random, or sequential.
    pub random: bool,
    /// The driver sleeps until it is notified.
    pub sleeps: bool,
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
    /// What the first is to reach, as a share of the second.
    pub target: Option<f64>,
    /// The most CPU time that the first may take for a request, in microseconds.
    pub limit: Option<f64>,
}

/// The least of a row: random 4 KiB reads of nothing, one at a time. Rows say what they do otherwise.
pub const READ: Work = Work {
    volume: Volume::Null,
    depth: 1,
    queues: 1,
    len: 4096,
    write: false,
    random: true,
    sleeps: false,
};

const fn ours(poll: &'static str, packed: bool) -> Peer {
    Peer::Bluffd { poll, packed }
}

const OURS: Peer = ours("always", false);
const PACKED: Peer = ours("always", true);
const ADAPTIVE: Peer = ours("adaptive", false);
const NEVER: Peer = ours("never", false);
const QSD: Peer = Peer::StorageDaemon;

fn verb(write: bool) -> &'static str {
    if write { "write" } else { "read" }
}

fn row(name: impl Into<String>, work: Work, peers: &[Peer], target: Option<f64>) -> Row {
    Row {
        name: name.into(),
        work,
        peers: peers.to_vec(),
        target,
        limit: None,
    }
}

/// All rows, in the order of the table.
pub fn all() -> Vec<Row> {
    let mut rows = vec![ring()];
    rows.extend(null());
    rows.extend(ram());
    rows.extend(files());
    rows.extend(sleeps());
    rows.extend(nvme());
    rows
}

/// The ring alone.
fn ring() -> Row {
    let device = |packed| {
        let indirect = false;
        Peer::Ring(Device::Ours { packed, indirect })
    };
    let work = Work { depth: 128, ..READ };
    let peers = [device(false), Peer::Ring(Device::Stock), device(true)];
    Row {
        limit: Some(0.040),
        ..row("ring alone, 3-descriptor chain", work, &peers, Some(8.0))
    }
}

/// No volume to speak of: the whole path without data.
fn null() -> Vec<Row> {
    let mut rows = Vec::new();
    for (depth, share) in [(1, 0.80), (32, 0.50), (128, 0.45)] {
        for (write, queues) in [(false, 1), (true, 1), (false, 2), (true, 2)] {
            let work = Work {
                depth,
                write,
                queues,
                ..READ
            };
            let mut name = format!("null {} 4K depth {depth}", verb(write));
            if queues > 1 {
                name += ", 2 queues";
                rows.push(row(name, work, &[OURS, Peer::Ideal, QSD], None));
                continue;
            }
            let peers = [OURS, Peer::Ideal, PACKED, Peer::Reference, QSD];
            rows.push(row(&*name, work, &peers, Some(share)));
            if !write {
                name += " adaptive";
                let peers = [ADAPTIVE, Peer::Ideal, OURS];
                rows.push(row(name, work, &peers, Some(0.95 * share)));
            }
        }
    }
    rows
}

fn ram() -> Vec<Row> {
    let ram = Work {
        volume: Volume::Ram,
        ..READ
    };
    let mut rows: Vec<_> = [32, 128]
        .map(|depth| {
            let work = Work { depth, ..ram };
            let name = format!("ram read 4K depth {depth}");
            row(name, work, &[OURS, QSD, Peer::Reference], Some(1.4))
        })
        .into();
    let large = Work {
        depth: 32,
        len: 128 << 10,
        random: false,
        ..ram
    };
    let name = "ram read 128K sequential depth 32";
    rows.push(row(name, large, &[OURS, Peer::Memcpy], Some(0.9)));
    rows
}

/// Files: on tmpfs through the page cache, on a disk past it.
fn files() -> Vec<Row> {
    let mut rows = Vec::new();
    for write in [false, true] {
        let tmpfs = [(1, 8.0), (32, 2.0), (128, 2.0)].map(|(d, t)| (Volume::Tmpfs, d, t));
        let disk = [(1, 1.0), (32, 1.0)].map(|(d, t)| (Volume::Disk, d, t));
        for (volume, depth, target) in tmpfs.into_iter().chain(disk) {
            let work = Work {
                volume,
                depth,
                write,
                ..READ
            };
            let place = if volume == Volume::Disk {
                "O_DIRECT"
            } else {
                "tmpfs"
            };
            let name = format!("{place} {} 4K depth {depth}", verb(write));
            let peers: &[Peer] = match volume {
                Volume::Tmpfs => &[OURS, QSD, Peer::Calls],
                _ => &[OURS, QSD],
            };
            rows.push(row(name, work, peers, Some(target)));
        }
        let work = Work {
            volume: Volume::Tmpfs,
            depth: 32,
            len: 128 << 10,
            random: false,
            write,
            ..READ
        };
        let name = format!("tmpfs {} 128K sequential depth 32", verb(write));
        rows.push(row(name, work, &[OURS, QSD, Peer::Calls], None));
    }
    rows
}

/// An NVMe controller: against the ideal ring, which has no queues of NVMe, and against our own virtio-blk.
fn nvme() -> Vec<Row> {
    let mut rows = Vec::new();
    for (depth, share) in [(1, 0.80), (32, 0.30), (128, 0.30)] {
        let work = Work { depth, ..READ };
        let name = format!("NVMe null read 4K depth {depth}");
        let peers = [Peer::Nvme, Peer::Ideal, OURS];
        rows.push(row(name, work, &peers, Some(share)));
    }
    for depth in [1, 32, 128] {
        let work = Work {
            volume: Volume::Ram,
            depth,
            ..READ
        };
        let name = format!("NVMe ram read 4K depth {depth}");
        rows.push(row(name, work, &[Peer::Nvme, OURS], Some(0.85)));
    }
    rows
}

/// A driver that sleeps until it is notified.
fn sleeps() -> Vec<Row> {
    [1, 32]
        .map(|depth| {
            let work = Work {
                depth,
                sleeps: true,
                ..READ
            };
            let name = format!("null read 4K depth {depth}, driver sleeps");
            row(name, work, &[NEVER, QSD, ADAPTIVE], Some(1.0))
        })
        .into()
}
