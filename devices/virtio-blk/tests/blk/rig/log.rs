//! A dirty log, as a front end that migrates its guest sees it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use bluff_memory::{DirtyLog, LOG_PAGE};
use bluff_virtio::QueueLog;
use bluff_virtio_driver::Memory;

pub struct Log {
    memory: Arc<Memory>,
    pub log: Arc<DirtyLog>,
}

impl Log {
    /// A log for guest addresses below `end`.
    pub fn new(end: u64) -> Self {
        let size = end.div_ceil(LOG_PAGE).div_ceil(8);
        let memory = Memory::flat(0, size.next_multiple_of(4096)).unwrap();
        let fd: OwnedFd = memory.regions()[0].as_fd().try_clone_to_owned().unwrap();
        let log = Arc::new(DirtyLog::new(fd, 0, size).unwrap());
        Self { memory, log }
    }

    /// What a queue is given; `used`: the guest address of its used ring.
    pub fn queue(&self, used: u64) -> Option<QueueLog> {
        Some(QueueLog {
            log: self.log.clone(),
            used: Some(used),
        })
    }

    pub fn marked(&self, addr: u64) -> bool {
        let page = addr / LOG_PAGE;
        self.memory.read_u8(page / 8).unwrap() & 1 << (page % 8) != 0
    }

    /// The pages that are marked, by guest address; the marks are gone then.
    pub fn take(&self) -> Vec<u64> {
        let mut pages = Vec::new();
        let span = self.memory.span(0, self.memory.regions()[0].config().size);
        let span = span.unwrap();
        for word in (0..span.len()).step_by(8) {
            if span.load_u64(word, std::sync::atomic::Ordering::Relaxed) == 0 {
                continue;
            }
            for byte in word..word + 8 {
                let bits = self.swap(byte);
                let set = (0..8).filter(|i| bits & 1 << i != 0);
                pages.extend(set.map(|i| (byte as u64 * 8 + i) * LOG_PAGE));
            }
        }
        pages
    }

    /// Takes a byte of the log and leaves zero, in one step.
    #[allow(unsafe_code)]
    fn swap(&self, byte: usize) -> u8 {
        let at = self.memory.user_addr(byte as u64).unwrap() as *mut u8;
        // SAFETY: in bounds (the address was resolved), and only ever accessed atomically.
        let cell = unsafe { std::sync::atomic::AtomicU8::from_ptr(at) };
        cell.swap(0, std::sync::atomic::Ordering::SeqCst)
    }
}
