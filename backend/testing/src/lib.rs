//! What the tests of all crates ask for: how much they should do here, and reproducible chance.
//!
//! With [`checker`] a judge of storage, for every load that knows what it writes; with [`namespace`] networks of a test's own.
//!
//! Only tests use it, and what `bluff_block` has for the tests of others.

pub mod checker;
pub mod namespace;

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU8, Ordering};

/// Whether full counts are asked for: `BLUFF_TEST_LONG=1`.
pub fn is_long() -> bool {
    is_set("BLUFF_TEST_LONG")
}

/// Whether `cargo xtask test` runs this for another machine than it is on: `BLUFF_EMULATED=1`.
pub fn is_emulated() -> bool {
    is_set("BLUFF_EMULATED")
}

fn is_set(variable: &str) -> bool {
    std::env::var(variable).as_deref() == Ok("1")
}

/// How often to repeat: `ci` times, or `long` times where full counts are asked for.
pub fn times<T>(ci: T, long: T) -> T {
    if is_long() { long } else { ci }
}

/// An address of this machine (127.0.0.0/8) that no other test has while this process runs: its ports are all free. There are 256 for a process.
pub fn loopback() -> Ipv4Addr {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    // By a process's number, but for what 16 bits do not tell apart. Addresses of all ones or zeros mean something else.
    let [.., high, low] = std::process::id().to_be_bytes();
    let last = NEXT.fetch_add(1, Ordering::Relaxed);
    assert!((1..255).contains(&last), "as many as there are");
    Ipv4Addr::new(127, high | 1, low, last)
}

/// Numbers that look random; the same seed gives the same ones in every run.
#[derive(Clone, Debug)]
pub struct Chance(fastrand::Rng);

impl Chance {
    /// Begins at `seed`.
    pub fn new(seed: u64) -> Self {
        // Tests count seeds up, and what the generator gives for neighbours is far from independent. A second
        // one, whose seed is the first number, cures that.
        Self(fastrand::Rng::with_seed(seed).fork())
    }

    /// Any number.
    pub fn word(&mut self) -> u64 {
        self.0.u64(..)
    }

    /// A number below `n`, which is not 0.
    pub fn below(&mut self, n: u64) -> u64 {
        self.0.u64(..n)
    }

    /// True in `p` of 100 calls.
    pub fn percent(&mut self, p: u64) -> bool {
        self.below(100) < p
    }

    /// One of these; there is at least one.
    pub fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.0.usize(..all.len())]
    }

    /// Puts them into any order.
    pub fn shuffle<T>(&mut self, all: &mut [T]) {
        self.0.shuffle(all);
    }

    /// `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.fill(&mut bytes);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_numbers() {
        let [mut a, mut b, mut other] = [1, 1, 2].map(Chance::new);
        assert_eq!(a.bytes(100), b.bytes(100));
        assert_eq!(a.word(), b.word());
        assert_ne!(a.word(), other.word());
    }

    #[test]
    fn neighbouring_seeds_begin_apart() {
        let mut bins = [0; 8];
        for seed in 0..8000 {
            let one = Chance::new(seed).below(64);
            let next = Chance::new(seed + 1).below(64);
            bins[(next.wrapping_sub(one) % 64 / 8) as usize] += 1;
        }
        assert!(bins.iter().all(|n| (800..1200).contains(n)), "{bins:?}");
    }

    #[test]
    fn every_number_below_comes() {
        let mut chance = Chance::new(3);
        let mut came = [0; 10];
        for _ in 0..1000 {
            came[chance.below(10) as usize] += 1;
        }
        assert!(came.iter().all(|n| (50..200).contains(n)), "{came:?}");
        assert!(!chance.percent(0) && chance.percent(100));
        let mut all: Vec<u32> = (0..100).collect();
        chance.shuffle(&mut all);
        assert!(!all.is_sorted());
        all.sort();
        assert!(all.into_iter().eq(0..100));
        assert_eq!(chance.one_of(&[7]), 7);
    }
}
