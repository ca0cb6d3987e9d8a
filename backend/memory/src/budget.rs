//! What guest memory may take of the process: addresses and mappings.
//!
//! A front end's file can be sparse and as long as it likes, and be mapped many times, so that memory of no cost to
//! it fills our address space, or the number of mappings that the kernel grants a process (`vm.max_map_count`).
//! The next allocation of the daemon's own would then fail, and end it. So guest memory has a part of both,
//! and what is beyond is refused.
//!
//! Unsafe, because it asks for a limit.
#![allow(unsafe_code)]

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::MemoryError;

/// What the kernel grants where it does not say (`DEFAULT_MAX_MAP_COUNT`).
const MAP_COUNT: u64 = 65530;
/// What a mapping can become: where its file shrinks, the guard puts other pages in the place of the tail,
/// which the kernel counts for itself.
const PARTS: u64 = 2;

/// Counts what is mapped.
#[derive(Debug)]
pub(crate) struct Budget {
    /// In bytes, whole pages.
    bytes: AtomicU64,
    mappings: AtomicU64,
    limits: OnceLock<Limits>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Limits {
    bytes: u64,
    mappings: u64,
}

/// That of this process.
pub(crate) static PROCESS: Budget = Budget::new();

/// One mapping's share of the budget, given back when dropped.
#[derive(Debug)]
pub(crate) struct Share {
    of: &'static Budget,
    bytes: u64,
}

impl Budget {
    const fn new() -> Self {
        Self {
            bytes: AtomicU64::new(0),
            mappings: AtomicU64::new(0),
            limits: OnceLock::new(),
        }
    }

    /// Takes a share for one mapping of `bytes` bytes.
    ///
    /// # Errors
    /// [`MemoryError::TooMany`], [`MemoryError::TooLarge`].
    pub(crate) fn take(&'static self, bytes: u64) -> Result<Share, MemoryError> {
        let limits = self.limits.get_or_init(Limits::of_the_machine);
        let grow = |count: &AtomicU64, by: u64, limit: u64| {
            count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| {
                n.checked_add(by).filter(|n| *n <= limit)
            })
        };
        grow(&self.mappings, 1, limits.mappings)
            .map_err(|_| MemoryError::TooMany(limits.mappings))?;
        if grow(&self.bytes, bytes, limits.bytes).is_err() {
            self.mappings.fetch_sub(1, Ordering::Relaxed);
            return Err(MemoryError::TooLarge(limits.bytes));
        }
        Ok(Share { of: self, bytes })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.of.mappings.fetch_sub(1, Ordering::Relaxed);
        self.of.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Limits {
    /// Half of the addresses; three quarters of the mappings.
    fn of_the_machine() -> Self {
        // Stacks and mappings lie near the end of a process's addresses, which is a power of two (less a
        // page): 2^47 on x86-64, 2^39 to 2^48 on aarch64.
        let here = 0u8;
        let end = (&raw const here as u64)
            .checked_next_power_of_two()
            .unwrap_or(1 << 63);
        let granted = std::fs::read_to_string("/proc/sys/vm/max_map_count")
            .ok()
            .and_then(|n| n.trim().parse().ok())
            .unwrap_or(MAP_COUNT);
        Self::new(end.min(address_limit()), granted)
    }

    fn new(addresses: u64, granted: u64) -> Self {
        Self {
            bytes: addresses / 2,
            mappings: granted / 4 * 3 / PARTS,
        }
    }
}

/// What `ulimit -v` allows, in bytes.
fn address_limit() -> u64 {
    let mut limit = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: the structure is ours. Where it fails, nothing is known of a limit.
    unsafe { libc::getrlimit(libc::RLIMIT_AS, &raw mut limit) };
    limit.rlim_cur
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(bytes: u64, mappings: u64) -> &'static Budget {
        let budget = Box::leak(Box::new(Budget::new()));
        budget.limits.set(Limits { bytes, mappings }).unwrap();
        budget
    }

    fn taken(budget: &Budget) -> (u64, u64) {
        (
            budget.bytes.load(Ordering::Relaxed),
            budget.mappings.load(Ordering::Relaxed),
        )
    }

    #[test]
    fn what_is_over_is_refused_and_what_goes_is_given_back() {
        let budget = budget(100, 3);
        let a = budget.take(60).unwrap();
        assert!(matches!(budget.take(41), Err(MemoryError::TooLarge(100))));
        assert!(matches!(
            budget.take(u64::MAX),
            Err(MemoryError::TooLarge(100))
        ));
        assert_eq!(taken(budget), (60, 1), "what was refused took nothing");
        let _b = budget.take(40).unwrap();
        drop(a);
        let _c = budget.take(0).unwrap();
        let d = budget.take(60).unwrap();
        assert!(matches!(budget.take(0), Err(MemoryError::TooMany(3))));
        assert_eq!(taken(budget), (100, 3));
        drop(d);
        assert_eq!(taken(budget), (40, 2));
    }

    #[test]
    fn limits_of_a_machine() {
        let limits = Limits::new(1 << 47, 65530);
        assert_eq!((limits.bytes, limits.mappings), (1 << 46, 24573));
        let here = Limits::of_the_machine();
        assert!(here.bytes >= 1 << 36, "{here:?}");
        // More than one front end's regions.
        assert!(here.mappings > 1000, "{here:?}");
    }
}
