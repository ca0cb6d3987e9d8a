//! How a host is notified, by a write that cannot hold its thread.
//!
//! The descriptor is the front end's as much as ours: the flag `O_NONBLOCK` belongs to the open file that both
//! share. So a front end can clear it whenever it likes, fill the counter of its eventfd, and have our next write
//! wait for a read that never comes, with all the functions of that reactor. A look ahead (`poll`, or
//! setting the flag again) only makes the window smaller, and costs a system call for each notification.
//!
//! ```text
//!   notify() --> hung before? --> dropped
//!      |
//!      +-- the front end is trusted --> write, on this thread -------- watchdog: interrupts a write
//!      |                                   | interrupted               that takes longer than a tick
//!      |                                   v
//!      |                          hung; distrust its function
//!      +-- it is not ---------------> write, on the carrier's thread
//! ```
//!
//! A write that blocks is interrupted (see [`crate::watchdog`]), and its notifier is dead: the ring goes on, and the
//! driver hears nothing until another descriptor comes. As a front end could send one after the other, its
//! function is trusted once: after that its descriptors are written by a thread of their own, where only others
//! of that sort wait for them.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::watchdog::{self, Written};

/// What became of a notification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Notice {
    /// It was given.
    Given,
    /// Writing blocked, and the notifier is given up. Said once; where the carrier found it, by the next notification.
    Hung,
    /// The notifier was given up before.
    Dropped,
}

/// Whether a notifier of this function has ever hung. One for all notifiers of a function, also those of its
/// later front ends.
#[derive(Clone, Debug, Default)]
pub struct Distrust(Arc<AtomicBool>);

impl Distrust {
    /// Whether one has.
    pub fn is_earned(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A descriptor that a driver, or its front end, is notified by.
///
/// An eventfd; a pipe or a socket works too, as eight bytes are written. A thread that notifies has to take an
/// interrupted system call (`EINTR`) for what it is and repeat it: a signal may come when the write that it
/// was meant for is over.
#[derive(Debug)]
pub struct Notifier(Arc<Line>);

/// The descriptor, and what is known of it.
#[derive(Debug)]
struct Line {
    fd: EventFd,
    distrust: Distrust,
    hung: AtomicBool,
    told: AtomicBool,
    /// Waits for the carrier.
    pending: AtomicBool,
    _watch: watchdog::Interest,
}

impl Notifier {
    /// A notifier of a front end of which nothing is known.
    ///
    /// # Errors
    /// As [`Notifier::of`].
    pub fn new(fd: EventFd) -> std::io::Result<Self> {
        Self::of(fd, &Distrust::default())
    }

    /// A notifier of a function whose notifiers share `distrust`.
    ///
    /// # Errors
    /// Where the watchdog cannot be started, for want of a thread.
    pub fn of(fd: EventFd, distrust: &Distrust) -> std::io::Result<Self> {
        Ok(Self(Arc::new(Line {
            fd,
            distrust: distrust.clone(),
            hung: AtomicBool::new(false),
            told: AtomicBool::new(false),
            pending: AtomicBool::new(false),
            _watch: watchdog::Interest::new()?,
        })))
    }

    /// Notifies. It takes a fifth of a second at most, once for a function and a thread; from then on no time.
    pub fn notify(&self) -> Notice {
        let line = &self.0;
        if !line.hung.load(Ordering::Relaxed) {
            if line.distrust.is_earned() {
                // Nobody waits for it where it is on its way already. The carrier takes the mark away before it
                // writes, and both are read-modify-writes: where this one finds the mark, what we published
                // before is visible to whoever is woken by the write that follows.
                if !line.pending.swap(true, Ordering::AcqRel) && !watchdog::carry(line.clone()) {
                    line.hung.store(true, Ordering::Relaxed);
                }
            } else {
                line.write();
            }
        }
        if !line.hung.load(Ordering::Relaxed) {
            Notice::Given
        } else if line.told.swap(true, Ordering::Relaxed) {
            Notice::Dropped
        } else {
            Notice::Hung
        }
    }
}

impl Line {
    fn write(&self) {
        // A counter that is full, or an end that is closed, is the other side's affair.
        if watchdog::write(self.fd.as_raw_fd()) == Written::Hung {
            self.distrust.0.store(true, Ordering::Relaxed);
            self.hung.store(true, Ordering::Relaxed);
        }
    }
}

impl watchdog::Carried for Line {
    fn carry(&self) {
        self.pending.swap(false, Ordering::AcqRel);
        if !self.hung.load(Ordering::Relaxed) {
            self.write();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    //! Unsafe, because a front end's pipe becomes an [`EventFd`], as it does in an attachment.
    #![allow(unsafe_code)]

    use std::io::{Read, Write};
    use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    use super::*;

    /// The most that `notify` may take, and the time that a thread may be kept from running.
    const BOUND: Duration = Duration::from_secs(1);

    /// An eventfd that blocks who writes to it.
    fn full() -> (EventFd, EventFd) {
        let event = EventFd::new(0).unwrap();
        event.write(u64::MAX - 1).unwrap();
        (event.try_clone().unwrap(), event)
    }

    fn as_event(file: impl Into<OwnedFd>) -> EventFd {
        // SAFETY: an open descriptor changes its owner.
        unsafe { EventFd::from_raw_fd(file.into().into_raw_fd()) }
    }

    fn timed(notifier: &Notifier) -> (Notice, Duration) {
        let start = Instant::now();
        let notice = notifier.notify();
        (notice, start.elapsed())
    }

    #[test]
    fn one_that_is_read_hears_everything() {
        let event = EventFd::new(0).unwrap();
        let notifier = Notifier::new(event.try_clone().unwrap()).unwrap();
        for _ in 0..1000 {
            assert_eq!(notifier.notify(), Notice::Given);
        }
        assert_eq!(event.read().unwrap(), 1000);
    }

    #[test]
    fn one_that_blocks_is_given_up_and_said_once() {
        let (front, back) = full();
        let notifier = Notifier::new(back).unwrap();
        let (notice, took) = timed(&notifier);
        assert_eq!(notice, Notice::Hung);
        assert!(took < BOUND, "{took:?}");
        for _ in 0..100 {
            assert_eq!(notifier.notify(), Notice::Dropped);
        }
        assert_eq!(front.read().unwrap(), u64::MAX - 1);
        assert_eq!(notifier.notify(), Notice::Dropped, "for good");
        // This thread notifies others as before.
        let event = EventFd::new(0).unwrap();
        let other = Notifier::new(event.try_clone().unwrap()).unwrap();
        assert_eq!(other.notify(), Notice::Given);
        assert_eq!(event.read().unwrap(), 1);
    }

    #[test]
    fn pipes_and_sockets_too() {
        let (mut end, pipe) = std::io::pipe().unwrap();
        // What a pipe holds by default, and then some: it is filled by another thread, which blocks.
        let filler = std::thread::spawn({
            let mut pipe = pipe.try_clone().unwrap();
            move || pipe.write_all(&[0; 1 << 20])
        });
        let (socket, mut other) = UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        while (&socket).write(&[0; 8]).is_ok() {}
        socket.set_nonblocking(false).unwrap();
        for file in [as_event(pipe), as_event(socket)] {
            let notifier = Notifier::new(file).unwrap();
            let start = Instant::now();
            // The pipe may still have room for some.
            let notice = loop {
                match notifier.notify() {
                    Notice::Given => assert!(start.elapsed() < 10 * BOUND),
                    other => break other,
                }
            };
            assert_eq!(notice, Notice::Hung);
        }
        let mut sink = vec![0; 1 << 20];
        end.read_exact(&mut sink).unwrap();
        filler.join().unwrap().unwrap();
        let n = other.read(&mut sink).unwrap();
        assert!(n > 0);
    }

    /// A function whose notifier has hung costs its thread no time any more, however many descriptors it sends.
    #[test]
    fn trust_is_lost_once() {
        let distrust = Distrust::default();
        let (_front, back) = full();
        assert_eq!(
            Notifier::of(back, &distrust).unwrap().notify(),
            Notice::Hung
        );
        let start = Instant::now();
        let hostile: Vec<_> = (0..20)
            .map(|_| {
                let (front, back) = full();
                (front, Notifier::of(back, &distrust).unwrap())
            })
            .collect();
        for (_, notifier) in &hostile {
            assert_eq!(notifier.notify(), Notice::Given, "nobody knows better yet");
        }
        let took = start.elapsed();
        assert!(took < BOUND, "twenty in {took:?}");
        // The carrier finds out, and says so once.
        for (_, notifier) in &hostile {
            let start = Instant::now();
            while notifier.notify() == Notice::Given {
                assert!(start.elapsed() < 20 * BOUND);
                std::thread::yield_now();
            }
            assert_eq!(notifier.notify(), Notice::Dropped);
        }
        // An honest descriptor of that function is still heard.
        let event = EventFd::new(0).unwrap();
        let honest = Notifier::of(event.try_clone().unwrap(), &distrust).unwrap();
        for _ in 0..3 {
            assert_eq!(honest.notify(), Notice::Given);
            assert!(event.read().unwrap() >= 1);
        }
    }

    /// Signals that come when the write is over hit nothing: here they come all the time.
    #[test]
    fn late_signals_do_no_harm() {
        let (tx, rx) = std::sync::mpsc::channel();
        let writer = std::thread::spawn(move || {
            let event = EventFd::new(0).unwrap();
            let notifier = Notifier::new(event.try_clone().unwrap()).unwrap();
            assert_eq!(notifier.notify(), Notice::Given);
            // SAFETY: no memory is involved.
            let thread = unsafe { libc::syscall(libc::SYS_gettid) } as libc::pid_t;
            tx.send(thread).unwrap();
            let mut given = 1u64;
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(300) {
                assert_eq!(notifier.notify(), Notice::Given);
                given += 1;
            }
            assert_eq!(event.read().unwrap(), given);
        });
        let thread = rx.recv().unwrap();
        while !writer.is_finished() {
            // SAFETY: no memory is involved; a thread that has ended is an error.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, libc::SIGURG) };
        }
        writer.join().unwrap();
    }
}
