//! What channels, threads and the kernel's leftovers share of a volume.
//!
//! Unsafe, because it hands addresses to system calls.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bluff_block::Geometry;
use bluff_memory::IoVec;
use syscalls::{Errno, Sysno, raw_syscall};

use crate::abandoned::{Abandoned, Ticket};
use crate::flushes::Flushes;
use crate::probe::{self, Found};
use crate::{engine::Work, lock};

/// Who holds the lock on the file.
#[derive(Debug, Default)]
pub(crate) struct LockState {
    pub(crate) holders: u32,
    pub(crate) held: bool,
    /// The error with which the lock itself failed the last time.
    failed: Option<i32>,
}

impl LockState {
    /// Remembers how an attempt ended; says whether it failed in another way than the one before. Queues try
    /// again every few milliseconds for as long as it fails.
    pub(crate) fn is_news(&mut self, failed: Option<i32>) -> bool {
        let before = std::mem::replace(&mut self.failed, failed);
        failed.is_some() && failed != before
    }
}

/// The file and what is known of it.
#[derive(Debug)]
pub(crate) struct Storage {
    pub(crate) file: File,
    /// For syncs, where writes with a flush built in (`RWF_DSYNC`) are used too. The kernel tells of a lost write
    /// once for each open file: on one such a write could take what a sync at the same time is to hear.
    sync: Option<File>,
    pub(crate) device: bool,
    pub(crate) direct: bool,
    /// In memory: reads and writes are done inline.
    pub(crate) memory: bool,
    shape: Geometry,
    pub(crate) size: AtomicU64,
    /// Whether the file system does not refuse `RWF_NOWAIT`; found out by use.
    pub(crate) nowait_read: AtomicBool,
    pub(crate) nowait_write: AtomicBool,
    /// Whether it has `FALLOC_FL_ZERO_RANGE`; found out by use.
    pub(crate) zero_range: AtomicBool,
    /// A flush failed. The kernel tells of a lost write once and then calls the pages clean, so no
    /// later flush of this volume may claim anything: it has to be opened again.
    pub(crate) flush_failed: AtomicBool,
    pub(crate) flushes: Flushes,
    pub(crate) abandoned: Abandoned,
    pub(crate) lock: Mutex<LockState>,
}

impl Storage {
    pub(crate) fn new(found: Found) -> Self {
        Self {
            size: AtomicU64::new(found.geometry.size),
            shape: found.geometry,
            file: found.file,
            sync: found.sync,
            device: found.device,
            direct: found.direct,
            memory: found.memory,
            nowait_read: AtomicBool::new(true),
            nowait_write: AtomicBool::new(true),
            zero_range: AtomicBool::new(true),
            flush_failed: AtomicBool::new(false),
            flushes: Flushes::default(),
            abandoned: Abandoned::default(),
            lock: Mutex::default(),
        }
    }

    #[inline]
    pub(crate) fn geometry(&self) -> Geometry {
        Geometry {
            size: self.size.load(Ordering::Acquire),
            ..self.shape
        }
    }

    /// What is to be synced.
    pub(crate) fn sync_file(&self) -> &File {
        self.sync.as_ref().unwrap_or(&self.file)
    }

    /// Whether reads (or writes) are worth trying inline.
    #[inline]
    pub(crate) fn tries_inline(&self, write: bool) -> bool {
        let nowait = if write {
            &self.nowait_write
        } else {
            &self.nowait_read
        };
        self.memory || (!self.direct && nowait.load(Ordering::Relaxed))
    }

    /// Reads or writes once, inline: what is there without waiting, or all of it where the file is
    /// in memory.
    #[inline(always)]
    pub(crate) fn inline(&self, write: bool, pieces: &[IoVec], offset: u64) -> Result<u64, i32> {
        if self.memory
            && let [one] = pieces
        {
            // One buffer costs half of what a vector costs. And the call stands here, not in libc: where the kernel
            // defends itself against speculation with returns, the first return after it is mispredicted, and that
            // costs a tenth of a write.
            let call = if write {
                Sysno::pwrite64
            } else {
                Sysno::pread64
            };
            let fd = self.file.as_raw_fd();
            // SAFETY: as below.
            let n = unsafe { raw_syscall!(call, fd, one.ptr(), one.len(), offset) };
            return match Errno::from_ret(n) {
                Ok(n) => Ok(n as u64),
                Err(e) => Err(e.into_raw()),
            };
        }
        self.inline_vector(write, pieces, offset)
    }

    /// [`inline`](Self::inline) for several pieces, or where the kernel is told not to wait.
    #[inline]
    fn inline_vector(&self, write: bool, pieces: &[IoVec], offset: u64) -> Result<u64, i32> {
        let fd = self.file.as_raw_fd();
        let at = offset as libc::off_t;
        // More pieces than the kernel takes at once: the caller goes on with the rest.
        let count = pieces.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
        let list = IoVec::as_raw(pieces);
        // SAFETY: the pieces are mapped (contract of `Buffers`); the call is over when it returns.
        let n = unsafe {
            match (self.memory, write) {
                (true, false) => libc::preadv(fd, list, count, at),
                (true, true) => libc::pwritev(fd, list, count, at),
                (false, false) => libc::preadv2(fd, list, count, at, libc::RWF_NOWAIT),
                (false, true) => libc::pwritev2(fd, list, count, at, libc::RWF_NOWAIT),
            }
        };
        if n >= 0 {
            return Ok(n as u64);
        }
        let error = errno();
        if !self.memory && matches!(error, libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) {
            let known = if write {
                &self.nowait_write
            } else {
                &self.nowait_read
            };
            known.store(false, Ordering::Relaxed);
        }
        Err(error)
    }

    /// Does `work` and blocks for it. The result is as of an io_uring: a count, or a negative error.
    pub(crate) fn perform(&self, work: &Work) -> i32 {
        let fd = self.file.as_raw_fd();
        loop {
            // SAFETY: the memory that it names stays until its result was delivered (see `Work`).
            let n = unsafe {
                match *work {
                    Work::Read { ptr, len, offset } => {
                        libc::pread(fd, ptr.cast(), len, offset as libc::off_t)
                    }
                    Work::Write {
                        ptr,
                        len,
                        offset,
                        durable,
                    } => {
                        let at = offset as libc::off_t;
                        if durable {
                            self.write_durably(&IoVec::new(ptr, len), at)
                        } else {
                            libc::pwrite(fd, ptr.cast(), len, at)
                        }
                    }
                    Work::Sync => libc::fdatasync(self.sync_file().as_raw_fd()) as isize,
                    Work::Allocate { mode, offset, len } => {
                        let (offset, len) = (offset as libc::off_t, len as libc::off_t);
                        libc::fallocate(fd, mode, offset, len) as isize
                    }
                    Work::DiscardDevice { offset, len } => {
                        match probe::discard_device(&self.file, offset, len) {
                            Ok(()) => 0,
                            Err(_) => -1,
                        }
                    }
                }
            };
            if n >= 0 {
                return n as i32;
            }
            match errno() {
                libc::EINTR => {}
                error => return -error,
            }
        }
    }

    /// A write with the flush built in; the result is as of the system call.
    fn write_durably(&self, piece: &IoVec, at: libc::off_t) -> isize {
        let fd = self.file.as_raw_fd();
        let list = IoVec::as_raw(std::slice::from_ref(piece));
        // SAFETY: as in `perform`, whose caller answers for the memory.
        unsafe {
            let n = libc::pwritev2(fd, list, 1, at, libc::RWF_DSYNC);
            if n >= 0 || !matches!(errno(), libc::ENOSYS | libc::EOPNOTSUPP) {
                return n;
            }
            // A kernel (or an emulation of one) without the flag.
            let n = libc::pwrite(fd, piece.ptr().cast(), piece.len(), at);
            if n >= 0 && libc::fdatasync(fd) != 0 {
                return -1;
            }
            n
        }
    }

    /// Remembers what an error of `work` means for later flushes, and where it was a sync, tells that it is over.
    pub(crate) fn note(&self, work: Durability, result: i32) {
        let harmless = match work {
            Durability::None => true,
            Durability::Sync => matches!(-result, libc::EINTR | libc::EAGAIN | libc::ECANCELED),
            // Such a write did not begin, for lack of space; nothing that was there is lost.
            Durability::Write => matches!(
                -result,
                libc::EINTR
                    | libc::EAGAIN
                    | libc::ECANCELED
                    | libc::ENOSPC
                    | libc::EDQUOT
                    | libc::EFBIG
                    | libc::EINVAL
                    | libc::EOPNOTSUPP
            ),
        };
        if result < 0 && !harmless && !self.flush_failed.swap(true, Ordering::AcqRel) {
            let e = std::io::Error::from_raw_os_error(-result);
            log::error!("a flush failed ({e}): no flush succeeds until the volume is opened again");
        }
        if work == Durability::Sync {
            // After the error: who is told that it is over looks for it.
            self.flushes.end(result >= 0 || !harmless);
        }
    }

    /// The kernel has let go of an abandoned write.
    pub(crate) fn release(&self, ticket: Ticket) {
        self.abandoned.release(ticket);
        if self.abandoned.is_empty() {
            let mut state = self.lock_state();
            self.settle_lock(&mut state);
        }
    }

    pub(crate) fn lock_state(&self) -> std::sync::MutexGuard<'_, LockState> {
        self.lock
            .lock()
            .expect("nothing panics while it holds the lock's state")
    }

    /// Gives the lock up where nobody needs it. A write that may still land is a reason to keep it.
    pub(crate) fn settle_lock(&self, state: &mut LockState) {
        if state.held && state.holders == 0 && self.abandoned.is_empty() {
            lock::give(&self.file);
            state.held = false;
        }
    }
}

/// What an error says about durability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Durability {
    /// Nothing.
    None,
    /// It was the sync that [`Flushes`] lets through.
    Sync,
    /// It was a write with the flush built in.
    Write,
}

fn errno() -> i32 {
    std::io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or(libc::EIO)
}

#[cfg(test)]
mod tests {
    use super::LockState;

    #[test]
    fn a_lock_that_fails_is_news_once() {
        let mut state = LockState::default();
        let tries = [None, Some(22), Some(22), Some(37), Some(37), None, Some(37)];
        let news = tries.map(|failed| state.is_news(failed));
        assert_eq!(news, [false, true, false, true, false, false, true]);
    }
}
