//! Ends writes that block: one thread for the process, which looks at those that notify.
//!
//! ```text
//!   a thread that notifies             the watchdog, every 100 ms
//!   turn = odd                         turn is odd, and was the same a tick ago:
//!   write(2) ............................ interrupted = turn; tgkill(SIGURG)
//!   turn = even
//! ```
//!
//! To the thread it costs two plain stores for a notification. The watchdog sleeps for good while there is no
//! notifier.
//!
//! # Why it is sound
//! `turn` and `interrupted` guard no other memory, so all accesses are relaxed. All that can go wrong by a late or
//! an early view of them is one of these:
//! - The watchdog sees an odd turn that is over. The signal hits whatever the thread does by then; the
//!   handler does nothing, and a system call that returns `EINTR` is repeated. If it is the next write of a notification,
//!   `interrupted` does not name its turn, and it is repeated too.
//! - The signal comes between the store of the turn and the write, as the thread was not running. Then the write
//!   blocks all the same; but the turn stays what it is, and each further tick sends another signal.
//! - The thread returns from an interrupted write and does not see `interrupted` yet. It writes again under a new
//!   turn, and is interrupted again.
//! - The watchdog sees the turn late: a store becomes visible in finite time, and a thread that sleeps in the kernel has
//!   been through a full barrier.
//!
//! So a write ends within two ticks and the time that the scheduler takes; and it is taken for hung only where the
//! watchdog named it and the kernel says `EINTR`, which it does only where it would have slept.
//! A thread leaves the list under the lock that is held while signals are sent, so that no signal goes to a thread that
//! has its number after it.
//!
//! The signal is SIGURG: ignored by default, so that one that is sent before the handler stands, or to a program without
//! one, does no harm.
//!
//! What it does not end: a write that waits for a lock in the kernel, as one to a pipe does while its other end is in a
//! page fault in the middle of a read. Such sleep is not interruptible.
//!
//! Unsafe, because signals, and a write with its bare result, are the C library's.
#![allow(unsafe_code)]

use std::cell::OnceCell;
use std::io;
use std::mem::zeroed;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// A write that is seen at two looks in a row has blocked for so long at least.
const TICK: Duration = Duration::from_millis(100);
const SIGNAL: libc::c_int = libc::SIGURG;

/// How a write ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Written {
    /// By itself, well or not.
    Ended,
    /// It blocked, and was interrupted.
    Hung,
}

/// A thread that notifies.
#[derive(Debug)]
struct Watched {
    thread: libc::pid_t,
    /// Odd while it writes. Only the thread itself changes it.
    turn: AtomicU64,
    /// The last turn that the watchdog found too long.
    interrupted: AtomicU64,
}

struct Registry {
    /// With the turn at the last look.
    threads: Vec<(Arc<Watched>, u64)>,
    /// How many notifiers there are.
    interests: usize,
    running: bool,
}

static REGISTRY: Mutex<Registry> = Mutex::new(Registry {
    threads: Vec::new(),
    interests: 0,
    running: false,
});
static WANTED: Condvar = Condvar::new();

fn registry() -> MutexGuard<'static, Registry> {
    // Nothing panics while it holds it.
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps the watchdog awake.
#[derive(Debug)]
pub(crate) struct Interest(());

impl Interest {
    pub(crate) fn new() -> io::Result<Self> {
        let mut registry = registry();
        if !registry.running {
            install()?;
            std::thread::Builder::new()
                .name("notify-watch".into())
                .spawn(watch)?;
            registry.running = true;
        }
        registry.interests += 1;
        WANTED.notify_one();
        Ok(Self(()))
    }
}

impl Drop for Interest {
    fn drop(&mut self) {
        registry().interests -= 1;
    }
}

/// Has the signal interrupt system calls: with a handler, and without `SA_RESTART`.
fn install() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: plain data, and a handler that does nothing.
    let rc = unsafe {
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
        libc::sigaction(SIGNAL, &raw const action, std::ptr::null_mut())
    };
    match rc {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn watch() {
    loop {
        let waiting = WANTED.wait_while(registry(), |registry| registry.interests == 0);
        drop(waiting);
        std::thread::sleep(TICK);
        look();
    }
}

fn look() {
    for (watched, seen) in &mut registry().threads {
        let turn = watched.turn.load(Ordering::Relaxed);
        if turn % 2 == 1 && turn == *seen {
            // It will be needed, and nobody who is in a hurry should start it.
            let _ = carrier();
            watched.interrupted.store(turn, Ordering::Relaxed);
            // SAFETY: no memory is involved; the thread is there, as it leaves the list before it ends.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), watched.thread, SIGNAL) };
        }
        *seen = turn;
    }
}

/// The calling thread's place in the list.
struct Place(Arc<Watched>);

impl Place {
    fn new() -> Self {
        // SAFETY: no memory but a set of our own is involved.
        let thread = unsafe {
            let mut set: libc::sigset_t = zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, SIGNAL);
            // Whoever started the thread may have had it blocked.
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
            libc::syscall(libc::SYS_gettid) as libc::pid_t
        };
        let watched = Arc::new(Watched {
            thread,
            turn: AtomicU64::new(0),
            interrupted: AtomicU64::new(0),
        });
        registry().threads.push((watched.clone(), 0));
        Self(watched)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        registry().threads.retain(|(w, _)| !Arc::ptr_eq(w, &self.0));
    }
}

thread_local! {
    static PLACE: OnceCell<Place> = const { OnceCell::new() };
}

/// Writes eight bytes, the number 1, under the eyes of the watchdog.
pub(crate) fn write(fd: RawFd) -> Written {
    let written = PLACE.try_with(|place| place.get_or_init(Place::new).0.write(fd));
    // A thread that is at its end has nobody left to notify.
    written.unwrap_or(Written::Ended)
}

impl Watched {
    fn write(&self, fd: RawFd) -> Written {
        let one = 1u64.to_ne_bytes();
        loop {
            let turn = self.turn.load(Ordering::Relaxed) + 1;
            self.turn.store(turn, Ordering::Relaxed);
            // SAFETY: the bytes are ours; a descriptor that is not open is an error.
            let rc = unsafe { libc::write(fd, one.as_ptr().cast(), one.len()) };
            let interrupted =
                rc < 0 && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted;
            self.turn.store(turn + 1, Ordering::Relaxed);
            if !interrupted {
                return Written::Ended;
            }
            if self.interrupted.load(Ordering::Relaxed) == turn {
                return Written::Hung;
            }
        }
    }
}

/// Something that the carrier's thread writes.
pub(crate) trait Carried: Send + Sync {
    fn carry(&self);
}

/// The thread that writes for those who have made another wait; `None` where it cannot be had.
fn carrier() -> Option<&'static Sender<Arc<dyn Carried>>> {
    static CARRIER: OnceLock<Option<Sender<Arc<dyn Carried>>>> = OnceLock::new();
    let sender = CARRIER.get_or_init(|| {
        let (sender, lines) = mpsc::channel::<Arc<dyn Carried>>();
        let run = move || lines.iter().for_each(|line| line.carry());
        let thread = std::thread::Builder::new().name("notify-carrier".into());
        thread
            .spawn(run)
            .inspect_err(|e| log::error!("no thread for notifications that may block: {e}"))
            .ok()
            .map(|_| sender)
    });
    sender.as_ref()
}

/// Hands a line to the carrier; `false` where there is none.
pub(crate) fn carry(line: Arc<dyn Carried>) -> bool {
    carrier().is_some_and(|sender| sender.send(line).is_ok())
}
