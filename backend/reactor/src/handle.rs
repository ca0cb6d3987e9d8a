//! What other threads hold of a reactor.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::{ActorId, Context, Options, Reactor};

type Message = Box<dyn FnOnce(&mut Context<'_>) + Send>;

/// What has reached a reactor from outside.
#[derive(Default)]
pub(crate) struct Inbox {
    pub(crate) messages: Vec<Message>,
    pub(crate) woken: Vec<ActorId>,
    pub(crate) stop: bool,
    /// The reactor is gone: what comes is dropped.
    closed: bool,
}

pub(crate) struct Shared {
    inbox: Mutex<Inbox>,
    /// Something is in the inbox.
    pending: AtomicBool,
    /// The reactor is in epoll, or about to be.
    sleeping: AtomicBool,
    pub(crate) bell: EventFd,
    pub(crate) counters: Counters,
}

/// What a reactor counts. One writer, so plain loads and stores suffice; readers may be late.
#[derive(Debug)]
pub struct Counters {
    /// When the reactor was made.
    since: Instant,
    /// Times round the loop.
    pub turns: AtomicU64,
    /// Times it went to sleep.
    pub sleeps: AtomicU64,
    /// Nanoseconds asleep, up to the last time that it woke.
    pub asleep_ns: AtomicU64,
    /// Nanoseconds from `since` to when it went to sleep; 0 while it is awake.
    asleep_from: AtomicU64,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            turns: AtomicU64::new(0),
            sleeps: AtomicU64::new(0),
            asleep_ns: AtomicU64::new(0),
            asleep_from: AtomicU64::new(0),
        }
    }
}

impl Counters {
    /// How long the reactor has been awake since it was made: time that it worked or polled.
    pub fn awake(&self) -> Duration {
        let now = self.ns(Instant::now());
        let now_asleep = match self.asleep_from.load(Ordering::Relaxed) {
            0 => 0,
            from => now.saturating_sub(from),
        };
        let asleep = self.asleep_ns.load(Ordering::Relaxed) + now_asleep;
        Duration::from_nanos(now.saturating_sub(asleep))
    }

    fn ns(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.since).as_nanos()).unwrap_or(u64::MAX)
    }

    pub(crate) fn slept_from(&self, start: Instant) {
        self.asleep_from
            .store(self.ns(start).max(1), Ordering::Relaxed);
    }

    pub(crate) fn slept_to(&self, start: Instant, now: Instant) {
        self.asleep_from.store(0, Ordering::Relaxed);
        Self::add(&self.sleeps, 1);
        Self::add(&self.asleep_ns, (now - start).as_nanos() as u64);
    }

    pub(crate) fn add(cell: &AtomicU64, n: u64) {
        cell.store(
            cell.load(Ordering::Relaxed).wrapping_add(n),
            Ordering::Relaxed,
        );
    }
}

impl Shared {
    pub(crate) fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            inbox: Mutex::default(),
            pending: AtomicBool::new(false),
            sleeping: AtomicBool::new(false),
            bell: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            counters: Counters::default(),
        }))
    }

    fn put(&self, f: impl FnOnce(&mut Inbox)) {
        {
            let mut inbox = self
                .inbox
                .lock()
                .expect("nothing panics while it holds the inbox");
            if inbox.closed {
                // A message that is dropped may use wakers: not under the lock.
                drop(inbox);
                return;
            }
            f(&mut inbox);
        }
        self.pending.store(true, Ordering::Release);
        // Either this sees `sleeping`, or the reactor, which set it before its last look, sees
        // `pending` (both sides put a full fence between their store and their load).
        fence(Ordering::SeqCst);
        if self.sleeping.load(Ordering::Relaxed) {
            // Fails only when the counter is full, and then the bell is rung already.
            let _ = self.bell.write(1);
        }
    }

    pub(crate) fn is_pending(&self) -> bool {
        self.pending.load(Ordering::Acquire)
    }

    pub(crate) fn take(&self) -> Inbox {
        self.pending.store(false, Ordering::Relaxed);
        std::mem::take(
            &mut self
                .inbox
                .lock()
                .expect("nothing panics while it holds the inbox"),
        )
    }

    /// The reactor ends: messages that it did not come to are dropped, and so is what follows, so
    /// that whoever waits for an answer learns that none comes.
    pub(crate) fn close(&self) {
        let rest = {
            let mut inbox = self
                .inbox
                .lock()
                .expect("nothing panics while it holds the inbox");
            inbox.closed = true;
            std::mem::take(&mut inbox.messages)
        };
        drop(rest);
    }

    /// Declares sleep; `false` where something has come.
    pub(crate) fn try_sleep(&self) -> bool {
        self.sleeping.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if self.pending.load(Ordering::Relaxed) {
            self.sleeping.store(false, Ordering::Relaxed);
            return false;
        }
        true
    }

    /// Ends sleep; a bell that rang meanwhile is still to be read.
    pub(crate) fn rise(&self) {
        self.sleeping.store(false, Ordering::Relaxed);
    }

    pub(crate) fn awake(&self) {
        self.rise();
        let _ = self.bell.read();
    }
}

/// Wakes one actor, from any thread, any number of times; also after it is gone.
#[derive(Clone)]
pub struct Waker {
    pub(crate) shared: Arc<Shared>,
    pub(crate) actor: ActorId,
}

impl Waker {
    /// The actor gets [`crate::Event::Woken`], once for any number of wakes before that.
    pub fn wake(&self) {
        let actor = self.actor;
        self.shared.put(|inbox| {
            if inbox.woken.last() != Some(&actor) {
                inbox.woken.push(actor);
            }
        });
    }

    /// Whether both wake the same actor of the same reactor.
    pub fn is_same(&self, other: &Self) -> bool {
        self.actor == other.actor && Arc::ptr_eq(&self.shared, &other.shared)
    }

    /// Which actor it wakes.
    pub fn actor(&self) -> ActorId {
        self.actor
    }
}

impl std::fmt::Debug for Waker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Waker({:?})", self.actor)
    }
}

/// A reactor on a thread of its own.
#[derive(Clone)]
pub struct Handle {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Handle")
    }
}

impl Handle {
    /// Starts a reactor. It ends at [`Handle::stop`]; the [`JoinHandle`] then returns.
    ///
    /// # Errors
    /// Where the thread, its epoll instance or its pinning cannot be had.
    pub fn spawn(options: Options) -> io::Result<(Self, JoinHandle<()>)> {
        let (tx, rx) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new()
            .name(options.name.clone())
            .spawn(move || {
                let made = options
                    .cpu
                    .map_or(Ok(()), pin)
                    .and_then(|()| Reactor::new(&options));
                match made {
                    Ok(mut reactor) => {
                        let _ = tx.send(Ok(reactor.handle()));
                        reactor.run();
                    }
                    Err(e) => {
                        let _ = tx.send(Err(e));
                    }
                }
            })?;
        match rx.recv() {
            Ok(Ok(handle)) => Ok((handle, thread)),
            Ok(Err(e)) => Err(e),
            Err(_) => Err(io::Error::other("the reactor's thread ended at once")),
        }
    }

    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Runs `message` on the reactor's thread, soon. Messages of one thread run in order. After
    /// [`Handle::stop`] they are dropped.
    pub fn send(&self, message: impl FnOnce(&mut Context<'_>) + Send + 'static) {
        self.shared
            .put(|inbox| inbox.messages.push(Box::new(message)));
    }

    /// Ends the reactor after its present turn; its actors are dropped on its thread.
    pub fn stop(&self) {
        self.shared.put(|inbox| inbox.stop = true);
    }

    /// What it counts.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }
}

/// Pins the calling thread to a CPU. Unsafe, because libc's sets are filled through pointers.
#[allow(unsafe_code)]
fn pin(cpu: usize) -> io::Result<()> {
    if cpu >= libc::CPU_SETSIZE as usize {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    // SAFETY: a set of our own, and an index inside of it.
    let rc = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set)
    };
    if rc == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
