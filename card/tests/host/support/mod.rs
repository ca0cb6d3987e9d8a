//! What every test here stands on: a daemon, a guest without a VM, and a judge of what the guest reads.

pub mod daemon;
pub mod guest;

use std::time::{Duration, Instant};

pub use bluff_testing::checker;

/// What is waited for happens within this time, or the test fails.
pub const LIMIT: Duration = Duration::from_secs(20);

/// Looks until there is something.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < LIMIT, "{what} does not come to be");
        std::thread::sleep(Duration::from_millis(1));
    }
}
