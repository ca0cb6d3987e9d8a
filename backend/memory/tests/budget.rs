//! Memory that costs a front end nothing does not use up the process. Alone in its process, which it fills.
//!
//! Not on other machines: their tests run under an emulator, which writes down every page of a mapping.
#![cfg(target_arch = "x86_64")]
#![allow(unsafe_code)]

mod memfd;

use std::sync::{Mutex, PoisonError};

use bluff_memory::{Mapping, MemoryError};
use memfd::memfd;

/// One test at a time: both use up the same budget.
static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn b08_a_sparse_file_does_not_use_up_the_address_space() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let file = memfd(1 << 47);
    let mut mapped = Vec::new();
    // The gaps that the large ones leave are filled by the small ones.
    for len in [1 << 43, 1 << 40, 1 << 37, 1 << 34, 1 << 31] {
        let refused = loop {
            match Mapping::new(file.try_clone().unwrap().into(), 0, len) {
                Ok(m) => mapped.push(m),
                Err(e) => break e,
            }
            assert!(mapped.len() < 1000, "never refused");
        };
        assert!(
            matches!(refused, MemoryError::TooLarge(_)),
            "{len:#x}: {refused}"
        );
    }
    let total: u64 = mapped.iter().map(Mapping::len).sum();
    assert!(total >= 1 << 44, "a limit that is too low: {total:#x}");
    // The process has room for what it needs itself.
    let own: Vec<u8> = Vec::with_capacity(1 << 30);
    assert!(own.capacity() > 0);
    drop(mapped.pop());
    mapped.push(Mapping::new(file.try_clone().unwrap().into(), 0, 1 << 31).unwrap());
    drop(mapped);
    Mapping::new(file.into(), 0, total).unwrap();
}

/// Whether the process may have `n` descriptors: each mapping has one.
fn has_descriptors(n: u64) -> bool {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the structure is ours.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit), 0);
        limit.rlim_cur = n;
        limit.rlim_max = limit.rlim_max.max(n);
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) == 0
    }
}

#[test]
fn b08_many_regions_do_not_use_up_the_mappings() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let granted = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    let granted: usize = granted.trim().parse().unwrap();
    if granted > 1 << 17 || !has_descriptors(granted as u64) {
        eprintln!("not run: {granted} mappings are granted, and fewer descriptors");
        return;
    }
    let file = memfd(3 * 4096);
    let mut mapped = Vec::new();
    // Offsets in turn, as the kernel makes one of neighbours that fit.
    let refused = loop {
        let offset = (mapped.len() as u64 % 2) * 2 * 4096;
        match Mapping::new(file.try_clone().unwrap().into(), offset, 4096) {
            Ok(m) => mapped.push(m),
            Err(e) => break e,
        }
        assert!(mapped.len() < granted, "never refused");
    };
    assert!(matches!(refused, MemoryError::TooMany(_)), "{refused}");
    // Also where every one of them shrinks: the process goes on.
    assert!(mapped.len() * 2 < granted);
    let mut own = Vec::new();
    for _ in 0..100 {
        own.push(std::thread::spawn(|| ()));
    }
    own.into_iter().for_each(|t| t.join().unwrap());
}
