//! The cases against our daemon, our reference, and QEMU's own server, which proves the cases themselves.

use std::process::ExitCode;

use guest_tests::backend::StorageDaemon;
use guest_tests::card::{Bluffd, BluffdNet, BluffdNvme, Reference};
use guest_tests::controller::{Controller, QemuNvme};
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

/// For NVMe it is QEMU's own controller that proves the cases.
const NVME_STAGES: &[Stage<dyn Controller>] = &[
    Stage {
        backend: &BluffdNvme(BLUFFD),
        always: Always::Named(&[
            "nvme_commands_agree_with_the_configuration",
            "nvme_does_verified_io_over_resets",
            "nvme_boots_by_bios",
        ]),
    },
    Stage {
        backend: &BluffdNvme(BLUFFD_PROCESS),
        always: Always::Named(&["nvme_outlives_kills_of_the_data_half_under_io"]),
    },
    Stage {
        backend: &QemuNvme,
        always: Always::Named(&[]),
    },
];

/// Nobody else's cards: what proves these cases is that both ends must agree, and that tcpdump understands what is between them.
const NET_STAGES: &[Stage<BluffdNet>] = &[
    Stage {
        backend: &BluffdNet(BLUFFD),
        always: Always::All,
    },
    Stage {
        backend: &BluffdNet(BLUFFD_PROCESS),
        always: Always::Named(&[]),
    },
];

fn main() -> ExitCode {
    env_logger::init();
    let mut tests = runner::tests(STAGES, cases::VIRTIO_BLK);
    tests.extend(runner::tests(NVME_STAGES, cases::NVME));
    tests.extend(runner::tests(NET_STAGES, cases::VIRTIO_NET));
    runner::main(tests)
}
