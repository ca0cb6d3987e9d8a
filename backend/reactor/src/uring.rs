//! The reactor's io_uring, shared by the channels on it.
//!
//! Unsafe, because entries name buffers that the kernel uses later.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;

use io_uring::{IoUring, squeue};

use crate::Waker;

/// Entries of the submission queue; the completion queue has four times as many.
const ENTRIES: u32 = 1024;

/// Takes what comes after an owner has left.
type Heir = Box<dyn FnMut(u32, i32)>;

struct Owner {
    /// `None` when it has left.
    waker: Option<Waker>,
    heir: Option<Heir>,
    done: Vec<(u32, i32)>,
    in_flight: u32,
}

struct Inner {
    ring: IoUring,
    owners: Vec<Owner>,
    free: Vec<u32>,
    in_flight: u32,
}

/// A reactor's io_uring.
#[derive(Clone)]
pub struct Uring(Rc<RefCell<Inner>>);

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Uring")
    }
}

/// No entry is free: offer it again after a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the io_uring is full")]
pub struct Full;

impl Uring {
    pub(crate) fn new() -> io::Result<Self> {
        let build = |all: bool| {
            let mut builder = IoUring::builder();
            builder.setup_cqsize(ENTRIES * 4).setup_clamp();
            if all {
                // One entry that is refused does not keep those behind it from the kernel (Linux 5.18).
                builder.setup_submit_all();
            }
            builder.build(ENTRIES)
        };
        let ring = match build(true) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => build(false)?,
            other => other?,
        };
        let inner = Inner {
            ring,
            owners: Vec::new(),
            free: Vec::new(),
            in_flight: 0,
        };
        Ok(Self(Rc::new(RefCell::new(inner))))
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.0.borrow().ring.as_raw_fd()
    }

    /// A share of the ring. `waker` is used when something of it is completed that its owner did not
    /// come for itself.
    pub fn port(&self, waker: Waker) -> Port {
        let mut inner = self.0.borrow_mut();
        let owner = Owner {
            waker: Some(waker),
            heir: None,
            done: Vec::new(),
            in_flight: 0,
        };
        let index = match inner.free.pop() {
            Some(index) => {
                inner.owners[index as usize] = owner;
                index
            }
            None => {
                inner.owners.push(owner);
                (inner.owners.len() - 1) as u32
            }
        };
        Port {
            uring: self.clone(),
            index,
        }
    }

    /// Tells the kernel of entries that it was too busy for before; `false` where it still is.
    pub(crate) fn flush(&self) -> bool {
        let mut inner = self.0.borrow_mut();
        if !inner.ring.submission().is_empty() {
            let _ = inner.ring.submit();
        }
        inner.ring.submission().is_empty()
    }

    /// Whether the kernel has entries that are not completed.
    pub(crate) fn is_busy(&self) -> bool {
        self.0.borrow().in_flight > 0
    }

    /// Hands completions to their owners and wakes these.
    pub(crate) fn reap(&self) {
        self.0.borrow_mut().reap(None);
    }
}

impl Inner {
    fn reap(&mut self, by: Option<u32>) {
        for entry in self.ring.completion() {
            let (index, data) = ((entry.user_data() >> 32) as u32, entry.user_data() as u32);
            self.in_flight -= 1;
            let owner = &mut self.owners[index as usize];
            owner.in_flight -= 1;
            match &owner.waker {
                Some(waker) => {
                    if owner.done.is_empty() && by != Some(index) {
                        waker.wake();
                    }
                    owner.done.push((data, entry.result()));
                }
                // Its owner has gone before it.
                None => {
                    if let Some(heir) = &mut owner.heir {
                        heir(data, entry.result());
                    }
                    if owner.in_flight == 0 {
                        owner.heir = None;
                        self.free.push(index);
                    }
                }
            }
        }
    }
}

/// One channel's share of an io_uring.
pub struct Port {
    uring: Uring,
    index: u32,
}

impl Port {
    /// Puts an entry into the submission queue, with `data` to recognise its completion by.
    ///
    /// # Errors
    /// [`Full`] where the ring cannot take it now.
    ///
    /// # Safety
    /// What the entry names (buffers, descriptors) stays valid until its completion was taken.
    pub unsafe fn push(&self, entry: squeue::Entry, data: u32) -> Result<(), Full> {
        let mut inner = self.uring.0.borrow_mut();
        // The completion queue must have room for everything in flight.
        if inner.in_flight >= inner.ring.params().cq_entries() {
            return Err(Full);
        }
        let entry = entry.user_data(u64::from(self.index) << 32 | u64::from(data));
        // SAFETY: passed on to the caller.
        if unsafe { inner.ring.submission().push(&entry) }.is_err() {
            inner.ring.submit().map_err(|_| Full)?;
            // SAFETY: as above.
            unsafe { inner.ring.submission().push(&entry) }.map_err(|_| Full)?;
        }
        inner.in_flight += 1;
        inner.owners[self.index as usize].in_flight += 1;
        Ok(())
    }

    /// Tells the kernel of what was pushed. What it is too busy for is told again by the reactor.
    pub fn submit(&self) {
        let inner = self.uring.0.borrow();
        // EAGAIN, EBUSY, EINTR, or fewer than there are: entries stay in the queue. The next submit takes them, or
        // the reactor, when it looks at its descriptors or before it sleeps.
        let _ = inner.ring.submit();
    }

    /// Whether the kernel has yet to be told of some entries.
    pub fn unsubmitted(&self) -> bool {
        !self.uring.0.borrow_mut().ring.submission().is_empty()
    }

    /// Moves this share's completions, as `(data, result)`, to `out`.
    pub fn take(&self, out: &mut Vec<(u32, i32)>) {
        let mut inner = self.uring.0.borrow_mut();
        inner.reap(Some(self.index));
        out.append(&mut inner.owners[self.index as usize].done);
    }

    /// How many of its entries the kernel still has.
    pub fn in_flight(&self) -> usize {
        self.uring.0.borrow().owners[self.index as usize].in_flight as usize
    }

    /// Leaves before the kernel has let go of everything: `heir` gets each completion that has not
    /// been taken, as `(data, result)`, now or on the reactor's thread, and is dropped after the
    /// last one. So it is the place for buffers that the kernel still uses. It must not use the ring.
    ///
    /// Where the ring itself ends first, `heir` is dropped with entries outstanding, and must leak
    /// what these name.
    pub fn leave(self, mut heir: impl FnMut(u32, i32) + 'static) {
        let mut done = Vec::new();
        self.take(&mut done);
        for (data, result) in done {
            heir(data, result);
        }
        // Dropping self frees the share where nothing is outstanding, and the heir with it.
        self.uring.0.borrow_mut().owners[self.index as usize].heir = Some(Box::new(heir));
    }

    /// Blocks until at least one entry of anybody is completed. For an owner that must not leave
    /// before the kernel has let go of its buffers.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn wait(&self) -> io::Result<()> {
        self.uring.0.borrow().ring.submit_and_wait(1).map(drop)
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        let mut inner = self.uring.0.borrow_mut();
        let index = self.index;
        let owner = &mut inner.owners[index as usize];
        owner.waker = None;
        owner.done.clear();
        if owner.in_flight == 0 {
            owner.heir = None;
            inner.free.push(index);
        }
    }
}
