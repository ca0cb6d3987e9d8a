//! What is measured.

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
    /// bluff-reference: the stock rust-vmm stack.
    Reference,
    /// qemu-storage-daemon.
    StorageDaemon,
    /// `memcpy` of the same buffers, one after the other.
    Memcpy,
}

impl Peer {
    /// bluffd as the figures ask for it.
    pub const OURS: Self = Self::Bluffd {
        poll: "always",
        packed: false,
    };

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
            Self::Reference => "bluff-reference",
            Self::StorageDaemon => "qemu-storage-daemon",
            Self::Memcpy => "memcpy",
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
    pub volume: Volume,
    pub depth: u16,
    pub queues: u16,
    pub len: u32,
    pub write: bool,
    pub random: bool,
    /// The driver sleeps until it is notified.
    pub sleeps: bool,
}

/// A row of the table: the first of the peers against the others.
#[derive(Clone, Debug)]
pub struct Row {
    pub name: String,
    pub work: Work,
    pub peers: Vec<Peer>,
    /// What the first is to reach, as a share of the second.
    pub target: Option<f64>,
}

const READ: Work = Work {
    volume: Volume::Null,
    depth: 1,
    queues: 1,
    len: 4096,
    write: false,
    random: true,
    sleeps: false,
};

/// All rows, in the order of the table.
pub fn all() -> Vec<Row> {
    let mut rows = Vec::new();
    let mut row = |name: String, work: Work, peers: &[Peer], target: Option<f64>| {
        rows.push(Row {
            name,
            work,
            peers: peers.to_vec(),
            target,
        });
    };
    let (ours, qsd) = (Peer::OURS, Peer::StorageDaemon);
    let adaptive = Peer::Bluffd {
        poll: "adaptive",
        packed: false,
    };
    let packed = Peer::Bluffd {
        poll: "always",
        packed: true,
    };
    let never = Peer::Bluffd {
        poll: "never",
        packed: false,
    };
    for (depth, target) in [(1, 0.80), (32, 0.50), (128, 0.45)] {
        let work = Work { depth, ..READ };
        let peers = [ours, Peer::Ideal, packed, Peer::Reference, qsd];
        row(
            format!("null read 4K depth {depth}"),
            work,
            &peers,
            Some(target),
        );
        row(
            format!("null read 4K depth {depth} adaptive"),
            work,
            &[adaptive, ours],
            Some(0.95),
        );
    }
    let write = Work {
        depth: 32,
        write: true,
        ..READ
    };
    row(
        "null write 4K depth 32".into(),
        write,
        &[ours, Peer::Ideal, qsd],
        None,
    );
    let two = Work {
        depth: 32,
        queues: 2,
        ..READ
    };
    row(
        "null read 4K depth 32, 2 queues".into(),
        two,
        &[ours, Peer::Ideal, qsd],
        None,
    );
    for depth in [32, 128] {
        let work = Work {
            volume: Volume::Ram,
            depth,
            ..READ
        };
        row(
            format!("ram read 4K depth {depth}"),
            work,
            &[ours, qsd, Peer::Reference],
            Some(1.4),
        );
    }
    let large = Work {
        volume: Volume::Ram,
        depth: 32,
        len: 128 << 10,
        random: false,
        ..READ
    };
    row(
        "ram read 128K sequential depth 32".into(),
        large,
        &[ours, Peer::Memcpy],
        Some(0.9),
    );
    for write in [false, true] {
        let verb = if write { "write" } else { "read" };
        for (depth, target) in [(1, 8.0), (32, 2.0), (128, 2.0)] {
            let work = Work {
                volume: Volume::Tmpfs,
                depth,
                write,
                ..READ
            };
            row(
                format!("tmpfs {verb} 4K depth {depth}"),
                work,
                &[ours, qsd],
                Some(target),
            );
        }
        for depth in [1, 32] {
            let work = Work {
                volume: Volume::Disk,
                depth,
                write,
                ..READ
            };
            row(
                format!("O_DIRECT {verb} 4K depth {depth}"),
                work,
                &[ours, qsd],
                Some(1.0),
            );
        }
    }
    for depth in [1, 32] {
        let work = Work {
            depth,
            sleeps: true,
            ..READ
        };
        row(
            format!("null read 4K depth {depth}, driver sleeps"),
            work,
            &[never, qsd],
            Some(1.0),
        );
    }
    rows
}
