//! What keeps SIGBUS from ending the daemon when a front end shrinks its memory file.
//!
//! The kernel raises SIGBUS at the first touch of a mapped page that its file no longer has. The
//! handler looks the address up among the guarded ranges, puts zero pages over the rest of that
//! range and marks it; the access is repeated and succeeds. An address outside every guarded range
//! is somebody else's fault: the handler that was there before gets it.
//!
//! Unsafe, because it is a signal handler: it may only use atomics and `mmap`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Mutex, Once};

use crate::MemoryError;
use crate::mapping::Flag;

/// How many mappings can be guarded at once.
const SLOTS: usize = 1 << 16;

struct Slot {
    /// First address; 0 for a free slot.
    start: AtomicUsize,
    end: AtomicUsize,
    page: AtomicUsize,
    poisoned: Flag,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        poisoned: Flag::new(),
    }
}; SLOTS];

/// One more than the highest slot that was ever used: what the handler has to look at.
static HIGH: AtomicUsize = AtomicUsize::new(0);
static FREE: Mutex<Vec<usize>> = Mutex::new(Vec::new());

/// How often the handler repaired anything. Who has seen a number, and found nothing of his marked, need not look again
/// while it is the same.
static REPAIRS: AtomicU64 = AtomicU64::new(0);

/// How often a mapping of this process was repaired; 0 is before the first time.
pub(crate) fn repairs() -> u64 {
    // With acquire: the marks that were set before are seen after it.
    REPAIRS.load(Ordering::Acquire)
}

/// A range of addresses that the handler repairs, for as long as this lives.
#[derive(Debug)]
pub struct Guarded(usize);

impl Guarded {
    /// Guards `len` bytes from `start` on, in pages of `page` bytes.
    ///
    /// # Errors
    /// [`MemoryError::TooMany`] where all slots are taken.
    pub fn new(start: usize, len: usize, page: usize) -> Result<Self, MemoryError> {
        install();
        let mut free = FREE.lock().expect("no panic while the lock is held");
        let index = match free.pop() {
            Some(index) => index,
            None => {
                let index = HIGH.load(Ordering::Relaxed);
                if index == SLOTS {
                    return Err(MemoryError::TooMany(SLOTS as u64));
                }
                HIGH.store(index + 1, Ordering::Release);
                index
            }
        };
        let slot = &TABLE[index];
        slot.poisoned.set(false);
        // The start of the mapping that had this slot is gone before the end of the new one shows.
        fence(Ordering::Release);
        slot.end.store(start + len, Ordering::Relaxed);
        slot.page.store(page, Ordering::Relaxed);
        // Last: a handler that sees the start sees the rest.
        slot.start.store(start, Ordering::Release);
        Ok(Self(index))
    }

    /// Whether the handler had to repair it.
    pub fn is_poisoned(&self) -> bool {
        TABLE[self.0].poisoned.get()
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        TABLE[self.0].start.store(0, Ordering::Release);
        FREE.lock()
            .expect("no panic while the lock is held")
            .push(self.0);
    }
}

/// The size of the pages that a mapping of `file` consists of, in bytes.
///
/// # Errors
/// Whatever `fstatfs` says.
pub fn page_size(file: &File) -> io::Result<u64> {
    // SAFETY: plain data, filled by the kernel.
    let mut fs: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open and the buffer is ours.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut fs) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if fs.f_type == libc::HUGETLBFS_MAGIC {
        return Ok(fs.f_bsize as u64);
    }
    // SAFETY: no memory is involved.
    Ok(unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64)
}

static OLD: Mutex<Option<libc::sigaction>> = Mutex::new(None);

fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: plain data; the handler below keeps to what a signal handler may do.
        unsafe {
            let mut new: libc::sigaction = std::mem::zeroed();
            let mut old: libc::sigaction = std::mem::zeroed();
            new.sa_sigaction = on_sigbus as *const () as usize;
            new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&raw mut new.sa_mask);
            let rc = libc::sigaction(libc::SIGBUS, &raw const new, &raw mut old);
            assert_eq!(rc, 0, "SIGBUS can be handled");
            *OLD.lock().expect("only here and in a dying process") = Some(old);
        }
    });
}

extern "C" fn on_sigbus(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes a valid siginfo_t to an SA_SIGINFO handler.
    let addr = unsafe { (*info).si_addr() } as usize;
    if !repair(addr) {
        // Not ours: put the old disposition back; the access is repeated and meets it.
        let old = OLD.try_lock().ok().and_then(|o| *o);
        // SAFETY: a saved or the default disposition.
        unsafe {
            match old {
                Some(old) => libc::sigaction(libc::SIGBUS, &raw const old, std::ptr::null_mut()),
                None => libc::signal(libc::SIGBUS, libc::SIG_DFL) as libc::c_int,
            };
        }
    }
}

fn repair(addr: usize) -> bool {
    let high = HIGH.load(Ordering::Acquire);
    for slot in &TABLE[..high] {
        let start = slot.start.load(Ordering::Acquire);
        let end = slot.end.load(Ordering::Relaxed);
        if start == 0 || !(start..end).contains(&addr) {
            continue;
        }
        let page = slot.page.load(Ordering::Relaxed);
        // A slot that was given to another mapping in between may have shown the start of one and the
        // end of the other.
        fence(Ordering::Acquire);
        if slot.start.load(Ordering::Relaxed) != start {
            continue;
        }
        // First the mark: who reads zeroes there finds it set.
        slot.poisoned.set(true);
        REPAIRS.fetch_add(1, Ordering::Release);
        let from = addr - addr % page;
        // SAFETY: the range lies in a guarded mapping, which its owner unmaps only after it has
        // freed the slot; mmap is a plain system call.
        let got = unsafe {
            libc::mmap(
                from as *mut libc::c_void,
                end - from,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        return got != libc::MAP_FAILED;
    }
    false
}
