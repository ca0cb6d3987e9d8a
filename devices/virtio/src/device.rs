//! The seam between an attachment and a virtio device.

use std::sync::Arc;
use std::time::Duration;

use bluff_memory::{DirtyLog, GuestMemory, Space};
use vmm_sys_util::eventfd::EventFd;

use crate::{DeviceError, Notifier, inflight::InflightQueue};

/// Where the three parts of a ring are (virtio 1.3 §2.7, §2.8: descriptor area, driver area, device
/// area).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    /// Which addresses these are.
    pub space: Space,
    /// Descriptor table, or packed descriptor ring.
    pub desc: u64,
    /// Available ring, or driver event suppression.
    pub driver: u64,
    /// Used ring, or device event suppression.
    pub device: u64,
}

/// How far a ring has got.
///
/// For a split ring the indices are free-running and the wrap counters are not used. For a packed
/// ring they are positions in the ring with their wrap counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// What the device looks at next.
    pub avail: u16,
    /// The wrap counter for `avail`.
    pub avail_wrap: bool,
    /// What the device uses next. A split ring reads it from the ring at its start.
    pub used: u16,
    /// The wrap counter for `used`.
    pub used_wrap: bool,
}

impl Position {
    /// A fresh ring.
    pub const START: Self = Self {
        avail: 0,
        avail_wrap: true,
        used: 0,
        used_wrap: true,
    };
}

/// Where a queue's writes are logged.
#[derive(Clone, Debug)]
pub struct QueueLog {
    /// The log.
    pub log: Arc<DirtyLog>,
    /// Guest address of the used ring, where writes to it are to be logged too (`VHOST_VRING_F_LOG`).
    pub used: Option<u64>,
}

/// Everything that a queue is built from. It moves to the reactor, and the queue is built there.
#[derive(Debug)]
pub struct QueueSetup {
    /// Which queue.
    pub index: u16,
    /// How many descriptors: 1 to 32768, for a split ring a power of two.
    pub size: u16,
    /// What was negotiated with the driver.
    pub features: u64,
    /// Where the ring is.
    pub addresses: RingAddresses,
    /// Where to go on.
    pub position: Position,
    /// The epoch of guest memory.
    pub memory: Arc<GuestMemory>,
    /// Readable when the driver has made buffers available. `None`: the ring has to be polled.
    pub kick: Option<EventFd>,
    /// How the driver is notified. `None`: it polls.
    pub call: Option<Notifier>,
    /// Notified once when the ring is broken.
    pub error: Option<Notifier>,
    /// Where requests in flight are recorded, and what is to be done again.
    pub inflight: Option<InflightQueue>,
    /// Where writes are logged.
    pub log: Option<QueueLog>,
    /// Whether the queue works, or only keeps its place.
    pub enabled: bool,
}

/// A change to a queue that runs.
pub enum QueueChange {
    /// A new epoch of memory. `done` is called when nothing uses the one before it any more: within
    /// `bound` requests that touch what has gone are waited for, then cancelled.
    Memory {
        /// The new epoch.
        memory: Arc<GuestMemory>,
        /// How long requests may go on.
        bound: Duration,
        /// Called on the reactor's thread.
        done: Box<dyn FnOnce() + Send>,
    },
    /// Another kick descriptor. What was signalled on the old one is not lost: the ring is looked at.
    Kick(Option<EventFd>),
    /// Another call descriptor. The driver is notified once on it, as it may have missed one.
    Call(Option<Notifier>),
    /// Another error descriptor.
    Error(Option<Notifier>),
    /// Logging starts or ends. `done` is called when every write from then on obeys it.
    Log {
        /// The log, or none.
        log: Option<QueueLog>,
        /// Called on the reactor's thread.
        done: Box<dyn FnOnce() + Send>,
    },
    /// Enabled or disabled.
    Enable(bool),
}

/// How a queue is to be stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stop {
    /// How long requests may go on before they are cancelled.
    pub bound: Duration,
    /// What could not be finished stays recorded as in flight, to be done again at the next start
    /// (it needs [`QueueSetup::inflight`]). `false`: it is answered with an error.
    pub leave: bool,
    /// Whether the ring may be written at all: `false` for a reset or a front end that has gone,
    /// where what is unfinished is dropped. With neither `leave` nor `answer` the record of what is in
    /// flight is dropped too: the next start begins with a fresh ring.
    pub answer: bool,
}

/// What is left of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoppedQueue {
    /// Where it would go on.
    pub position: Position,
    /// How many requests are recorded as in flight.
    pub in_flight: u16,
}

/// Something that the attachment has to tell the driver.
///
/// Devices log nothing that a driver can cause at will: the attachment does, and knows how often that may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceEvent {
    /// Configuration space has changed.
    ConfigChanged,
    /// A queue is broken: the device needs a reset.
    QueueBroken {
        /// Which one.
        queue: u16,
        /// What is wrong, for an operator.
        cause: Arc<str>,
    },
    /// What [`VirtioDevice::save`] gives is different now, without a call of the attachment's: whoever records it does so soon.
    StateChanged,
    /// A notifier of a queue blocked and was given up. The queue goes on; its driver hears nothing until it gets
    /// another.
    NotifierHung(u16),
}

/// A virtio device, as its attachment sees it.
///
/// # Contract
/// Methods are called by one attachment at a time, on its thread, and return at once; the work
/// happens on reactors. The attachment checks what comes from the driver or the front end against
/// what the device offers (queue indices, feature bits) before it calls; the device checks what only
/// it can know.
///
/// Queues are independent of each other. Between `start_queue` and the end of `stop_queue` the
/// device uses the guest's memory; at no other time.
pub trait VirtioDevice: Send {
    /// The device ID (virtio 1.3 §5).
    fn device_id(&self) -> u32;

    /// How many queues it has, at most 32768.
    fn queues(&self) -> u16;

    /// Every feature that it offers, those of the rings included.
    fn features(&self) -> u64;

    /// What the driver accepted, a subset of [`VirtioDevice::features`].
    fn set_features(&mut self, features: u64);

    /// The length of configuration space in bytes.
    fn config_len(&self) -> u32;

    /// Reads configuration space. Bytes past its end read as zero, as front ends ask for a fixed length.
    fn read_config(&self, offset: u32, to: &mut [u8]);

    /// Writes configuration space.
    ///
    /// # Errors
    /// [`DeviceError::Config`] where it is not writable.
    fn write_config(&mut self, offset: u32, from: &[u8]) -> Result<(), DeviceError>;

    /// Starts a queue on one of its reactors. Errors that only show there come as
    /// [`DeviceEvent::QueueBroken`].
    ///
    /// # Errors
    /// Where it cannot be started.
    fn start_queue(&mut self, setup: QueueSetup) -> Result<(), DeviceError>;

    /// Changes a queue that runs. For one that does not, `done` is called at once.
    fn change_queue(&mut self, index: u16, change: QueueChange);

    /// Stops a queue; `done` is called on its reactor's thread within the bound and what cancelling
    /// takes. For a queue that does not run it is called at once with `None`.
    fn stop_queue(
        &mut self,
        index: u16,
        stop: Stop,
        done: Box<dyn FnOnce(Option<StoppedQueue>) + Send>,
    );

    /// Forgets what the driver has set: features, configuration. All queues are stopped.
    fn reset(&mut self);

    /// Whether it records what is in flight ([`QueueSetup::inflight`]). A device that does not uses buffers in the order in which it
    /// takes them, and answers for nothing that it has not marked as used: where it dies, a split ring is taken up at its used index. What a packed ring
    /// would be taken up with is lost.
    fn records_in_flight(&self) -> bool {
        true
    }

    /// State that is neither in the guest's memory nor in the attachment's.
    fn save(&self) -> Vec<u8>;

    /// Takes up what [`VirtioDevice::save`] gave.
    ///
    /// # Errors
    /// [`DeviceError::State`] where it is not of this device or version.
    fn load(&mut self, state: &[u8]) -> Result<(), DeviceError>;

    /// Who is told of events, on any thread; replaces the one before.
    fn on_event(&mut self, listener: Arc<dyn Fn(DeviceEvent) + Send + Sync>);
}
