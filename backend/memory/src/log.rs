//! The dirty log of a migration: one bit for each 4 KiB of guest memory, in memory that the front
//! end shares (vhost-user, "Migration").
//!
//! Unsafe, because the bits are set in shared memory.
#![allow(unsafe_code)]

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::{GuestMemory, Mapping, MemoryError};

/// What one bit stands for, in bytes (`VHOST_LOG_PAGE`).
pub const LOG_PAGE: u64 = 4096;

/// A mapped dirty log.
#[derive(Debug)]
pub struct DirtyLog {
    mapping: Mapping,
}

impl DirtyLog {
    /// Maps a log of `size` bytes at `offset` of `file`.
    ///
    /// # Errors
    /// As [`Mapping::new`].
    pub fn new(file: OwnedFd, offset: u64, size: u64) -> Result<Self, MemoryError> {
        Ok(Self {
            mapping: Mapping::new(file, offset, size)?,
        })
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.mapping.len()
    }

    /// Whether it has a bit for every page of `memory`.
    ///
    /// # Errors
    /// [`MemoryError::ShortLog`] where it has not.
    pub fn covers(&self, memory: &GuestMemory) -> Result<(), MemoryError> {
        let end = memory.end();
        if end.div_ceil(LOG_PAGE).div_ceil(8) > self.size() {
            return Err(MemoryError::ShortLog {
                size: self.size(),
                end,
            });
        }
        Ok(())
    }

    /// Marks every page that `len` bytes at guest address `addr` touch. What lies outside of the log
    /// is not marked: a log that is too short was refused before ([`DirtyLog::covers`]).
    ///
    /// The caller has written the bytes before; the front end reads a bit and then the page, so the
    /// bit is released after the data.
    pub fn mark(&self, addr: u64, len: u64) {
        if len == 0 {
            return;
        }
        let last = addr.saturating_add(len - 1) / LOG_PAGE;
        for page in addr / LOG_PAGE..=last {
            let byte = page / 8;
            if byte >= self.size() {
                return;
            }
            // SAFETY: inside the mapping (checked above), which lives as long as self; the front
            // end changes the byte with atomic operations too.
            let cell = unsafe { AtomicU8::from_ptr(self.mapping.ptr().add(byte as usize)) };
            let bit = 1u8 << (page % 8);
            // Unconditionally: a bit that looks set may be cleared by the front end right after, and
            // then only an exchange that comes after our data makes it look again.
            cell.fetch_or(bit, Ordering::Release);
        }
    }
}
