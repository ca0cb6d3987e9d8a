//! One mapped piece of a front end's memory file.
//!
//! Unsafe, because it keeps raw pointers into a mapping that another process shares.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vm_memory::{FileOffset, MmapRegion};

use crate::budget::{self, Share};
use crate::{MemoryError, guard};

/// Which bytes of which file: two mappings of the same are the same memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId {
    /// Device of the file.
    pub device: u64,
    /// Inode of the file.
    pub inode: u64,
    /// Offset of the first byte, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

impl FileId {
    /// The first byte after it.
    fn end(&self) -> u64 {
        // Checked when it was examined.
        self.offset + self.len
    }

    /// The bytes, as offsets in the file, that both are.
    pub(crate) fn common(&self, other: &Self) -> Option<Range<u64>> {
        let same = (self.device, self.inode) == (other.device, other.inode);
        let common = self.offset.max(other.offset)..self.end().min(other.end());
        (same && !common.is_empty()).then_some(common)
    }

    /// Whether all of `other` is in it.
    pub(crate) fn contains(&self, other: &Self) -> bool {
        self.common(other) == Some(other.offset..other.end())
    }
}

/// What a mapping is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Protection {
    /// A write to it ends this process.
    ReadOnly,
    ReadWrite,
}

/// The serial of the next mapping.
static NEXT: AtomicU64 = AtomicU64::new(0);

impl Protection {
    fn flags(self) -> libc::c_int {
        match self {
            Self::ReadOnly => libc::PROT_READ,
            Self::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        }
    }
}

/// One shared mapping of a piece of a file, unmapped when the last epoch that names it is gone.
#[derive(Debug)]
pub struct Mapping {
    // Dropped first: the guard must forget the addresses before they are unmapped.
    guarded: Option<guard::Guarded>,
    region: MmapRegion,
    /// From the start of `region` to the first byte that was asked for.
    skip: usize,
    id: FileId,
    protection: Protection,
    serial: u64,
    /// Given back last, when it is unmapped.
    _share: Share,
}

impl Mapping {
    /// Maps `len` bytes of `file` from `offset` on, shared and writable.
    ///
    /// `offset` need not be a multiple of the page size; the pages around it are mapped, but not
    /// handed out.
    ///
    /// # Errors
    /// [`MemoryError::ShortFile`] where the file ends too early, [`MemoryError::Map`] where the
    /// kernel refuses (a file opened for reading only, a sealed one), [`MemoryError::TooMany`] and
    /// [`MemoryError::TooLarge`] where the process has no more to spare for guests.
    pub fn new(file: OwnedFd, offset: u64, len: u64) -> Result<Self, MemoryError> {
        Examined::new(file.into(), offset, len)?.map()
    }

    /// Maps other bytes of the same file.
    ///
    /// # Errors
    /// As [`Mapping::new`].
    pub(crate) fn again(&self, offset: u64, len: u64) -> Result<Self, MemoryError> {
        let file = self.file().try_clone().map_err(MemoryError::Map)?;
        Examined::new(file, offset, len)?.map_for(self.protection)
    }

    /// Its number: no other mapping of this process ever has the same.
    pub fn serial(&self) -> u64 {
        self.serial
    }

    /// The file that it is of.
    pub fn file(&self) -> &File {
        self.region
            .file_offset()
            .expect("mapped from a file")
            .file()
    }

    /// The first byte.
    pub fn ptr(&self) -> *mut u8 {
        self.region.as_ptr().wrapping_add(self.skip)
    }

    /// The length in bytes.
    pub fn len(&self) -> u64 {
        self.id.len
    }

    /// Never: a mapping of no bytes cannot be made.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Which bytes of which file it is.
    pub fn id(&self) -> FileId {
        self.id
    }

    /// Whether the file shrank under it: its pages read as zero and what is written is lost.
    pub fn is_poisoned(&self) -> bool {
        self.guarded
            .as_ref()
            .is_some_and(guard::Guarded::is_poisoned)
    }
}

/// A piece of a file that can be mapped, as far as can be seen.
#[derive(Debug)]
pub(crate) struct Examined {
    file: File,
    id: FileId,
    /// How long the file is, where that says how far it can be mapped.
    size: Option<u64>,
    /// The size of its pages in bytes.
    page: u64,
    /// From the start of a page to the first byte.
    skip: u64,
    /// Whole pages, in bytes.
    map_len: usize,
}

impl Examined {
    pub(crate) fn new(file: File, offset: u64, len: u64) -> Result<Self, MemoryError> {
        let meta = file.metadata().map_err(MemoryError::Stat)?;
        let end = offset.checked_add(len).filter(|_| len > 0);
        let end = end.ok_or(MemoryError::BadRegion { start: offset, len })?;
        // A device file (a DAX device, /dev/shm aside) says zero: then the kernel judges.
        let size = meta.file_type().is_file().then(|| meta.size());
        if size.is_some_and(|size| size < end) {
            return Err(MemoryError::ShortFile {
                size: meta.size(),
                offset,
                len,
            });
        }
        let page = guard::page_size(&file).map_err(MemoryError::Stat)?;
        let skip = offset % page;
        // A device file says nothing of its length, so that the sum can pass the end of addresses.
        let map_len = usize::try_from(len + skip)
            .ok()
            .and_then(|n| n.checked_next_multiple_of(page as usize))
            .ok_or(MemoryError::BadRegion { start: offset, len })?;
        let id = FileId {
            device: meta.dev(),
            inode: meta.ino(),
            offset,
            len,
        };
        Ok(Self {
            file,
            id,
            size,
            page,
            skip,
            map_len,
        })
    }

    /// Other bytes of the same file, which have to be in it.
    pub(crate) fn widened(&self, offset: u64, len: u64) -> Result<Self, MemoryError> {
        let file = self.file.try_clone().map_err(MemoryError::Map)?;
        Self::new(file, offset, len)
    }

    /// How long the file is; `None` where it is no ordinary one: such a file does not say, and two mappings of it need not be the same memory.
    pub(crate) fn size(&self) -> Option<u64> {
        self.size
    }

    pub(crate) fn id(&self) -> FileId {
        self.id
    }

    /// Whether the file was opened for reading and writing, without which it cannot be mapped for that.
    pub(crate) fn is_writable(&self) -> bool {
        self.can(Protection::ReadWrite)
    }

    /// Whether the file was opened for what a mapping of this kind needs.
    pub(crate) fn can(&self, protection: Protection) -> bool {
        // SAFETY: the descriptor is open; no memory is involved.
        let flags = unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_GETFL) };
        let mode = flags & libc::O_ACCMODE;
        flags >= 0
            && flags & libc::O_PATH == 0
            && match protection {
                Protection::ReadOnly => mode != libc::O_WRONLY,
                Protection::ReadWrite => mode == libc::O_RDWR,
            }
    }

    pub(crate) fn map(self) -> Result<Mapping, MemoryError> {
        self.map_for(Protection::ReadWrite)
    }

    pub(crate) fn map_for(self, protection: Protection) -> Result<Mapping, MemoryError> {
        let map_len = self.map_len;
        let share = budget::PROCESS.take(map_len as u64)?;
        // vm-memory's own constructor checks the file's length against whole pages, which a file
        // whose last page is cut does not pass; the length was checked above.
        // SAFETY: a new mapping at an address of the kernel's choice; the result is checked.
        let addr = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                map_len,
                protection.flags(),
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                self.file.as_raw_fd(),
                (self.id.offset - self.skip) as libc::off_t,
            )
        };
        if addr == libc::MAP_FAILED {
            return Err(MemoryError::Map(std::io::Error::last_os_error()));
        }
        self.adopt(addr.cast(), protection, share)
    }

    fn adopt(
        self,
        addr: *mut u8,
        protection: Protection,
        share: Share,
    ) -> Result<Mapping, MemoryError> {
        let map_len = self.map_len;
        let unmap = |e| {
            // SAFETY: mapped above with this length, and nobody has been told of it.
            unsafe { libc::munmap(addr.cast(), map_len) };
            e
        };
        // SAFETY: the range was mapped just now with these flags.
        let region = unsafe {
            vm_memory::mmap::MmapRegionBuilder::new(map_len)
                .with_mmap_prot(protection.flags())
                .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
                .with_file_offset(FileOffset::new(self.file, self.id.offset - self.skip))
                .with_raw_mmap_pointer(addr)
                .build()
        }
        .map_err(|e| unmap(MemoryError::Map(std::io::Error::other(e))))?;
        let guarded = match guard::Guarded::new(addr as usize, map_len, self.page as usize) {
            Ok(g) => g,
            Err(e) => return Err(unmap(e)),
        };
        Ok(Mapping {
            guarded: Some(guarded),
            region,
            skip: self.skip as usize,
            id: self.id,
            protection,
            serial: NEXT.fetch_add(1, Ordering::Relaxed),
            _share: share,
        })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.guarded = None;
        // `with_raw_mmap_pointer` leaves unmapping to whoever mapped.
        // SAFETY: mapped in `new` with this length; no epoch names it any more.
        let rc = unsafe { libc::munmap(self.region.as_ptr().cast(), self.region.size()) };
        assert_eq!(rc, 0, "munmap of a guest mapping");
    }
}

/// A flag that a signal handler sets and its owner reads.
#[derive(Debug, Default)]
pub(crate) struct Flag(AtomicBool);

impl Flag {
    pub(crate) const fn new() -> Self {
        Self(AtomicBool::new(false))
    }
    pub(crate) fn set(&self, to: bool) {
        self.0.store(to, Ordering::Release);
    }
    pub(crate) fn get(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}
