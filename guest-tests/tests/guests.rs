//! The cases against QEMU's own server: they prove the cases, the guests and the framework.

use std::process::ExitCode;

use guest_tests::backend::StorageDaemon;
use guest_tests::{cases, runner};

fn main() -> ExitCode {
    env_logger::init();
    runner::main(&[&StorageDaemon], cases::VIRTIO_BLK)
}
