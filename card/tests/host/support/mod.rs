//! What every test here stands on: a daemon, a guest without a VM, and a judge of what the guest reads.

pub mod checker;
pub mod daemon;
pub mod guest;

use std::time::{Duration, Instant};

/// What is waited for happens within this time, or the test fails.
pub const LIMIT: Duration = Duration::from_secs(20);

/// How often something is done: in CI, or in a long run.
pub fn times(short: usize, long: usize) -> usize {
    match std::env::var_os("BLUFF_TEST_LONG") {
        Some(_) => long,
        None => short,
    }
}

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

/// Reproducible chance (splitmix64).
pub struct Chance(pub u64);

impl Chance {
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.word() % n
    }
}
