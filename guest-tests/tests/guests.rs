//! The cases against our daemon, our reference, and QEMU's own server, which proves the cases themselves.

use std::process::ExitCode;

use guest_tests::backend::StorageDaemon;
use guest_tests::card::{Bluffd, Reference};
use guest_tests::runner::{Always, Stage};
use guest_tests::{cases, runner};

const BLUFFD: Bluffd = Bluffd {
    name: "bluffd",
    data: "threads",
};

/// The data half as a process of its own.
const BLUFFD_PROCESS: Bluffd = Bluffd {
    name: "bluffd-process",
    data: "process",
};

const STAGES: &[Stage] = &[
    Stage {
        backend: &BLUFFD,
        always: Always::All,
    },
    Stage {
        backend: &BLUFFD_PROCESS,
        always: Always::Named(&[]),
    },
    Stage {
        backend: &Reference,
        always: Always::Named(&["qemu_11_split_rings_do_io"]),
    },
    Stage {
        backend: &StorageDaemon,
        always: Always::Named(&[]),
    },
];

fn main() -> ExitCode {
    env_logger::init();
    runner::main(STAGES, cases::VIRTIO_BLK)
}
