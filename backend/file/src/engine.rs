//! Where work that may block is done: the reactor's io_uring, or threads where there is none.
//!
//! Unsafe, because work names memory that the kernel uses later.
#![allow(unsafe_code)]

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use bluff_block::OpenContext;
use bluff_reactor::{Offload, Port, Waker};
use io_uring::{opcode, types};

use crate::slot::Orphans;
use crate::storage::Storage;

/// Threads of a volume: so many operations are under way where there is no io_uring.
const THREADS: usize = 8;

/// What the kernel is to do. The memory that it names is the channel's arena (or the zeroes that are
/// never freed), which stays until the result was delivered, also when the channel goes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Work {
    Read {
        ptr: *mut u8,
        len: usize,
        offset: u64,
    },
    Write {
        ptr: *mut u8,
        len: usize,
        offset: u64,
        durable: bool,
    },
    Sync,
    Allocate {
        mode: i32,
        offset: u64,
        len: u64,
    },
    DiscardDevice {
        offset: u64,
        len: u64,
    },
}

// SAFETY: the addresses are of memory that is not bound to a thread; the engine gives work away once.
unsafe impl Send for Work {}

/// Nothing more can be started now.
#[derive(Debug)]
pub(crate) struct Full;

/// The threads of a volume, started when the first channel needs them.
#[derive(Debug, Default)]
pub(crate) struct Threads(OnceLock<Option<Pool>>);

struct Pool(Offload);

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pool")
    }
}

impl Threads {
    pub(crate) fn pool(&self) -> Option<&Offload> {
        let pool = self.0.get_or_init(|| {
            Offload::new("file", THREADS)
                .inspect_err(|e| log::error!("no threads for a file volume: {e}"))
                .ok()
                .map(Pool)
        });
        pool.as_ref().map(|p| &p.0)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // Whoever drops the volume does not wait for a disk that hangs.
        if let Some(Some(pool)) = self.0.take() {
            pool.0.detach();
        }
    }
}

/// What threads deliver.
struct Mail {
    waker: Waker,
    filled: AtomicBool,
    inner: Mutex<Letters>,
}

#[derive(Default)]
struct Letters {
    results: Vec<(u32, i32)>,
    /// Who gets them when the channel has gone.
    heir: Option<Arc<Mutex<Orphans>>>,
}

impl Mail {
    fn deliver(&self, id: u32, result: i32) {
        let mut letters = self
            .inner
            .lock()
            .expect("nothing panics while it holds the mail");
        if let Some(heir) = &letters.heir {
            heir.lock()
                .expect("nothing panics while it holds the orphans")
                .end(id, result);
            return;
        }
        letters.results.push((id, result));
        drop(letters);
        self.filled.store(true, Ordering::Release);
        self.waker.wake();
    }
}

const QUEUED: u8 = 0;
const BEGUN: u8 = 1;
const WITHDRAWN: u8 = 2;

struct Job {
    id: u32,
    work: Work,
    state: Arc<AtomicU8>,
    storage: Arc<Storage>,
    mail: Arc<Mail>,
}

fn claim(state: &AtomicU8, to: u8) -> bool {
    state
        .compare_exchange(QUEUED, to, Ordering::AcqRel, Ordering::Acquire)
        .is_ok()
}

impl Job {
    fn run(self) {
        if claim(&self.state, BEGUN) {
            let result = self.storage.perform(&self.work);
            self.mail.deliver(self.id, result);
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        // The pool ended before its turn came.
        if claim(&self.state, WITHDRAWN) {
            self.mail.deliver(self.id, -libc::ECANCELED);
        }
    }
}

/// A channel's way to the kernel.
pub(crate) struct Engine {
    storage: Arc<Storage>,
    port: Option<Port>,
    threads: Arc<Threads>,
    mail: Arc<Mail>,
    /// What the threads have.
    jobs: Vec<(u32, Arc<AtomicU8>)>,
}

impl Engine {
    /// `None` where there is neither an io_uring nor a thread.
    pub(crate) fn new(
        storage: Arc<Storage>,
        threads: Arc<Threads>,
        context: &OpenContext,
    ) -> Option<Self> {
        let port = context
            .uring
            .as_ref()
            .map(|u| u.port(context.waker.clone()));
        if port.is_none() {
            threads.pool()?;
        }
        Some(Self {
            storage,
            port,
            threads,
            mail: Arc::new(Mail {
                waker: context.waker.clone(),
                filled: AtomicBool::new(false),
                inner: Mutex::default(),
            }),
            jobs: Vec::new(),
        })
    }

    /// Begins `work`. Its result carries `id`, which is not used again before.
    pub(crate) fn start(&mut self, id: u32, work: Work) -> Result<(), Full> {
        let fd = types::Fd(self.storage.file.as_raw_fd());
        let entry = match (&self.port, work) {
            (Some(_), Work::Read { ptr, len, offset }) => opcode::Read::new(fd, ptr, len as u32)
                .offset(offset)
                .build(),
            (
                Some(_),
                Work::Write {
                    ptr,
                    len,
                    offset,
                    durable,
                },
            ) => opcode::Write::new(fd, ptr, len as u32)
                .offset(offset)
                .rw_flags(if durable { libc::RWF_DSYNC } else { 0 })
                .build(),
            (Some(_), Work::Sync) => {
                opcode::Fsync::new(types::Fd(self.storage.sync_file().as_raw_fd()))
                    .flags(types::FsyncFlags::DATASYNC)
                    .build()
            }
            (Some(_), Work::Allocate { mode, offset, len }) => opcode::Fallocate::new(fd, len)
                .offset(offset)
                .mode(mode)
                .build(),
            _ => return self.send(id, work),
        };
        let port = self.port.as_ref().expect("checked above");
        // SAFETY: the memory is the arena's or the zeroes', the descriptor the storage's: the
        // channel keeps them, and its orphans after it, until the result was taken.
        unsafe { port.push(entry, id) }.map_err(|_| Full)
    }

    fn send(&mut self, id: u32, work: Work) -> Result<(), Full> {
        let state = Arc::new(AtomicU8::new(QUEUED));
        let job = Job {
            id,
            work,
            state: state.clone(),
            storage: self.storage.clone(),
            mail: self.mail.clone(),
        };
        self.jobs.push((id, state));
        match self.threads.pool() {
            Some(pool) => pool.run(move || job.run()),
            // Dropping it delivers that it was cancelled.
            None => drop(job),
        }
        Ok(())
    }

    pub(crate) fn kick(&self) {
        if let Some(port) = &self.port
            && port.unsubmitted()
        {
            port.submit();
        }
    }

    /// Moves the results to `out`.
    #[inline]
    pub(crate) fn take(&mut self, out: &mut Vec<(u32, i32)>) {
        if let Some(port) = &self.port {
            port.take(out);
        }
        if self.mail.filled.load(Ordering::Relaxed)
            && self.mail.filled.swap(false, Ordering::Acquire)
        {
            let mut letters = self
                .mail
                .inner
                .lock()
                .expect("nothing panics while it holds the mail");
            for (id, _) in &letters.results {
                self.jobs.retain(|j| j.0 != *id);
            }
            out.append(&mut letters.results);
        }
    }

    /// Takes work back that no thread has begun; there is no result then.
    pub(crate) fn withdraw(&mut self, id: u32) -> bool {
        let Some(i) = self.jobs.iter().position(|j| j.0 == id) else {
            return false;
        };
        let got = claim(&self.jobs[i].1, WITHDRAWN);
        if got {
            self.jobs.swap_remove(i);
        }
        got
    }

    /// Leaves what is under way to `orphans`.
    pub(crate) fn leave(self, orphans: Orphans) {
        if orphans.is_empty() {
            return;
        }
        let orphans = Arc::new(Mutex::new(orphans));
        {
            let mut letters = self
                .mail
                .inner
                .lock()
                .expect("nothing panics while it holds the mail");
            for (id, result) in std::mem::take(&mut letters.results) {
                orphans
                    .lock()
                    .expect("nothing panics while it holds the orphans")
                    .end(id, result);
            }
            letters.heir = Some(orphans.clone());
        }
        if let Some(port) = self.port {
            // What was not told to the kernel yet would wait for somebody's next submit.
            if port.unsubmitted() {
                port.submit();
            }
            port.leave(move |id, result| {
                orphans
                    .lock()
                    .expect("nothing panics while it holds the orphans")
                    .end(id, result);
            });
        }
    }
}
