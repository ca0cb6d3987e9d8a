//! A buffer that a backend can name without knowing a device.

use std::fmt;

/// A piece of memory, laid out as the kernel's `struct iovec`, so that a slice of these can be
/// handed to `preadv`, `sendmsg` or an io_uring as it is.
///
/// It is a name, not a borrow: making one is safe, using one asks that whoever resolved it still
/// holds the memory (see `GuestMemory`). The bytes may change at any time.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct IoVec(libc::iovec);

// SAFETY: an IoVec is an address and a length; using them is what needs care, on any thread.
#[allow(unsafe_code)]
unsafe impl Send for IoVec {}
// SAFETY: as above; it has no interior that a shared reference could change.
#[allow(unsafe_code)]
unsafe impl Sync for IoVec {}

impl IoVec {
    /// Names `len` bytes at `ptr`.
    pub fn new(ptr: *mut u8, len: usize) -> Self {
        Self(libc::iovec {
            iov_base: ptr.cast(),
            iov_len: len,
        })
    }

    /// The first byte.
    pub fn ptr(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// The length in bytes.
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether it names no bytes.
    pub fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }

    /// Drops the first `n` bytes.
    ///
    /// # Panics
    /// Where it has fewer.
    pub fn advance(&mut self, n: usize) {
        assert!(n <= self.len(), "advance past the end of a buffer");
        *self = Self::new(self.ptr().wrapping_add(n), self.len() - n);
    }

    /// Keeps the first `n` bytes, or all where there are fewer.
    pub fn truncate(&mut self, n: usize) {
        *self = Self::new(self.ptr(), self.len().min(n));
    }

    /// The slice as the kernel's type.
    pub fn as_raw(slice: &[Self]) -> *const libc::iovec {
        slice.as_ptr().cast()
    }

    /// The sum of the lengths, in bytes.
    pub fn total(slice: &[Self]) -> u64 {
        slice.iter().map(|v| v.len() as u64).sum()
    }
}

impl Default for IoVec {
    fn default() -> Self {
        Self::new(std::ptr::null_mut(), 0)
    }
}

impl fmt::Debug for IoVec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:p}+{:#x}", self.ptr(), self.len())
    }
}
