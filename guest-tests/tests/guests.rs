//! The cases against our daemon, our reference, and QEMU's own server, which proves the cases themselves.

use std::process::ExitCode;

use guest_tests::backend::StorageDaemon;
use guest_tests::card::{Bluffd, Reference};
use guest_tests::{cases, runner};

const BLUFFD: Bluffd = Bluffd {
    name: "bluffd",
    data: "threads",
};

fn main() -> ExitCode {
    env_logger::init();
    runner::main(&[&BLUFFD, &Reference, &StorageDaemon], cases::VIRTIO_BLK)
}
