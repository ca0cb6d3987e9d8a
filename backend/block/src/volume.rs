//! What all users of a volume share.

use std::fmt;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use bluff_reactor::{Uring, Waker};

use crate::{BlockError, Channel, Geometry};

/// Something happened to a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VolumeEvent {
    /// It has another size now: [`Volume::geometry`] tells.
    Resized,
    /// Its storage is reachable, or is not any more.
    Path {
        /// Whether it is reachable.
        up: bool,
    },
}

/// What a channel is opened with: the reactor that it will live on.
#[derive(Clone)]
pub struct OpenContext {
    /// Wakes whoever polls the channel, from any thread.
    pub waker: Waker,
    /// The reactor's io_uring; `None` where the kernel forbids it, and then a channel does its slow
    /// work on threads.
    pub uring: Option<Uring>,
}

/// Storage of a fixed shape: what a storage function stands on.
///
/// # Contract
/// Methods are called from control threads and may block, but for [`Volume::geometry`], which a
/// reactor calls too.
pub trait Volume: Send + Sync + fmt::Debug {
    /// Its shape now.
    fn geometry(&self) -> Geometry;

    /// How many channels it bears; a function on a one-channel volume has all queues on one reactor.
    fn max_channels(&self) -> usize {
        usize::MAX
    }

    /// Opens a channel, on the thread of the reactor that it will live on. It must not block.
    ///
    /// # Errors
    /// Where the storage is not available or no more channels can be had.
    fn open(&self, context: &OpenContext) -> Result<Box<dyn Channel>, BlockError>;

    /// Takes the volume for this process: called before the first queue starts (through [`InUse`]), on
    /// a reactor. It does not wait: who finds it taken tries again.
    ///
    /// # Errors
    /// [`BlockError::Locked`] where somebody else holds it.
    fn lock(&self) -> Result<(), BlockError> {
        Ok(())
    }

    /// Gives it up: the last queue has stopped, and no operation is in flight.
    fn unlock(&self) {}

    /// Changes the size, in bytes.
    ///
    /// # Errors
    /// [`BlockError::Unsupported`] where this kind of volume cannot, [`BlockError::Invalid`] for a
    /// size that is no multiple of the block size.
    fn resize(&self, size: u64) -> Result<(), BlockError> {
        let _ = size;
        Err(BlockError::Unsupported)
    }

    /// Who wants to hear of its events.
    fn events(&self) -> &Events;
}

type Listener = dyn Fn(VolumeEvent) + Send + Sync;

/// The listeners of a volume.
#[derive(Default)]
pub struct Events(Mutex<Vec<Weak<Listener>>>);

/// Ends when dropped: the listener is not called again after that, but for a call under way.
#[must_use]
pub struct Subscription {
    _listener: Arc<Listener>,
}

impl Events {
    /// Calls `listener` at every event, on whatever thread it happens. It must not block.
    pub fn subscribe(
        &self,
        listener: impl Fn(VolumeEvent) + Send + Sync + 'static,
    ) -> Subscription {
        let listener: Arc<Listener> = Arc::new(listener);
        self.0
            .lock()
            .expect("listeners do not panic")
            .push(Arc::downgrade(&listener));
        Subscription {
            _listener: listener,
        }
    }

    /// Tells everybody.
    pub fn emit(&self, event: VolumeEvent) {
        let listeners: Vec<_> = {
            let mut all = self.0.lock().expect("listeners do not panic");
            all.retain(|l| l.strong_count() > 0);
            all.iter().filter_map(Weak::upgrade).collect()
        };
        for listener in listeners {
            listener(event);
        }
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Events")
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Subscription")
    }
}

/// A volume in use: holds its lock until dropped. A volume counts: its first `lock` takes it from
/// other processes, its last `unlock` gives it up.
#[derive(Debug)]
pub struct InUse {
    volume: Arc<dyn Volume>,
}

impl InUse {
    /// Takes the volume's lock.
    ///
    /// # Errors
    /// [`BlockError::Locked`] where another process holds it.
    pub fn new(volume: Arc<dyn Volume>) -> Result<Self, BlockError> {
        volume.lock()?;
        Ok(Self { volume })
    }

    /// As [`InUse::new`], for a thread that may wait: for as long as `patience`, as somebody may be about
    /// to let go (the source of a migration).
    ///
    /// # Errors
    /// As [`InUse::new`].
    pub fn within(volume: Arc<dyn Volume>, patience: Duration) -> Result<Self, BlockError> {
        let until = Instant::now() + patience;
        loop {
            match Self::new(volume.clone()) {
                Err(BlockError::Locked) if Instant::now() < until => {
                    std::thread::sleep(lock_pause());
                }
                result => return result,
            }
        }
    }

    /// The volume.
    pub fn volume(&self) -> &Arc<dyn Volume> {
        &self.volume
    }
}

/// How long to wait before a lock is tried again. Two processes that come at once may both give way, so
/// each has a pause of its own length.
pub fn lock_pause() -> Duration {
    Duration::from_micros(10_000 + u64::from(std::process::id() % 32) * 500)
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.volume.unlock();
    }
}
