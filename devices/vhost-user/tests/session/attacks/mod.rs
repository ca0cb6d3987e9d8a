//! The rows of the attack list that concern messages, each against a device that only records.
//! Full counts with `BLUFF_TEST_LONG=1`.

mod ends;
mod memory;
mod negotiation;
mod rings;
mod stream;

use std::time::Instant;

use bluff_vhost_user::unix;

use crate::support::*;

fn file(len: u64) -> std::os::fd::OwnedFd {
    unix::sealed_memory(c"test", len).unwrap()
}

/// Every test ends with this: a well-behaved front end is served as if nothing had happened.
fn still_serves(function: &Function) {
    let front = function.negotiated();
    let _memory = front.memory();
    front.start(0);
    assert!(function.control.is_running(0));
    assert_eq!(front.base(0), 7);
    assert!(!function.control.is_running(0));
}

/// Waits until as many descriptors are open as before.
fn settled(before: usize) {
    let end = Instant::now() + PATIENCE;
    while open_files() > before {
        assert!(
            Instant::now() < end,
            "{} descriptors, {before} before",
            open_files()
        );
        std::thread::yield_now();
    }
}
