//! What the server shares of a region, mapped.
//!
//! Unsafe, because it maps memory and gives access to it by bounds-checked atomics: the device uses the same bytes at
//! the same time, so no reference to them ever exists.
#![allow(unsafe_code)]

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::fs::fstat;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::Error;

const PAGE: u64 = 4096;

/// A mapped area. Words in it are little-endian, as PCI's are.
#[derive(Debug)]
pub struct Mapped {
    at: NonNull<u8>,
    len: usize,
    writable: bool,
}

// SAFETY: the pointer names a mapping that lives as long as this does; every access is atomic.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// Maps `len` bytes of a file. A file that is shorter is refused: an access would be the end of the process. One
    /// that shrinks later is not guarded against, as servers that tests talk to do not do that.
    ///
    /// # Errors
    /// [`Error::Shared`], [`Error::Map`].
    pub fn new(file: BorrowedFd<'_>, offset: u64, len: u64, writable: bool) -> Result<Self, Error> {
        if len == 0 || !len.is_multiple_of(PAGE) || !offset.is_multiple_of(PAGE) {
            return Err(Error::Shared("an area is not made of pages"));
        }
        let end = offset
            .checked_add(len)
            .ok_or(Error::Shared("an area wraps"))?;
        let map = |errno: rustix::io::Errno| Error::Map(errno.into());
        let size = u64::try_from(fstat(file).map_err(map)?.st_size).unwrap_or(0);
        if size < end {
            return Err(Error::Shared("its file is too short"));
        }
        let len = usize::try_from(len).map_err(|_| Error::Shared("an area is too long"))?;
        let protection = if writable {
            ProtFlags::READ | ProtFlags::WRITE
        } else {
            ProtFlags::READ
        };
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                protection,
                MapFlags::SHARED,
                file,
                offset,
            )
        };
        let at = NonNull::new(at.map_err(map)?.cast()).expect("no mapping at 0");
        Ok(Self { at, len, writable })
    }

    /// Bytes.
    #[expect(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    #[inline(always)]
    fn word(&self, offset: usize, width: usize) -> *mut u8 {
        assert!(
            offset < self.len && width <= self.len - offset && offset.is_multiple_of(width),
            "inside of the area and aligned"
        );
        // SAFETY: just checked to be inside.
        unsafe { self.at.as_ptr().add(offset) }
    }

    /// Loads a word; what was loaded and stored after it in the program comes after it.
    #[inline(always)]
    pub fn load32(&self, offset: usize) -> u32 {
        let at = self.word(offset, 4);
        // SAFETY: `word` checked bounds and alignment; the memory is only ever accessed atomically.
        u32::from_le(unsafe { AtomicU32::from_ptr(at.cast()) }.load(Ordering::Acquire))
    }

    /// Stores a word after everything that was loaded and stored before it in the program.
    #[inline(always)]
    pub fn store32(&self, offset: usize, value: u32) {
        assert!(self.writable, "the server lets it be written");
        let at = self.word(offset, 4);
        // SAFETY: as above.
        unsafe { AtomicU32::from_ptr(at.cast()) }.store(value.to_le(), Ordering::Release);
    }

    /// As [`Mapped::load32`], of a double word.
    #[inline(always)]
    pub fn load64(&self, offset: usize) -> u64 {
        let at = self.word(offset, 8);
        // SAFETY: as above.
        u64::from_le(unsafe { AtomicU64::from_ptr(at.cast()) }.load(Ordering::Acquire))
    }

    /// As [`Mapped::store32`], of a double word.
    #[inline(always)]
    pub fn store64(&self, offset: usize, value: u64) {
        assert!(self.writable, "the server lets it be written");
        let at = self.word(offset, 8);
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(at.cast()) }.store(value.to_le(), Ordering::Release);
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `new` mapped, which nothing else points to.
        let _ = unsafe { munmap(self.at.as_ptr().cast(), self.len) };
    }
}
