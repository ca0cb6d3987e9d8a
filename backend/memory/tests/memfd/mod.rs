//! Files that a front end shares.
#![allow(dead_code, unsafe_code)]

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};

use bluff_memory::{GuestMemory, Region, RegionSpec};

/// A file in memory that may be sealed.
pub fn memfd(len: u64) -> File {
    // SAFETY: a literal name; the descriptor is new and nobody else's.
    let file = unsafe {
        let fd = libc::memfd_create(
            c"guest".as_ptr(),
            libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
        );
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(len).unwrap();
    file
}

pub fn spec(file: &File, guest: u64, len: u64, offset: u64) -> RegionSpec {
    RegionSpec {
        guest,
        len,
        user: guest + 0x7000_0000_0000,
        offset,
        file: OwnedFd::from(file.try_clone().unwrap()),
    }
}

pub fn region(file: &File, guest: u64, len: u64, offset: u64) -> Region {
    Region::new(spec(file, guest, len, offset), &GuestMemory::empty()).unwrap()
}
