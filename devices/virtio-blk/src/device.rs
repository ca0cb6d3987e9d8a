//! The device, as its attachment sees it.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use bluff_block::{Subscription, Volume, VolumeEvent};
use bluff_reactor::{Actor, Context, Event, Handle, Poll, Turn, Waker};
use bluff_virtio::inflight::InflightQueue;
use bluff_virtio::{
    DeviceError, DeviceEvent, Notice, Notifier, Position, QueueChange, QueueSetup, Stop,
    StoppedQueue, VirtioDevice,
};
use zerocopy::IntoBytes;

use crate::config;
use crate::counters::{QueueCounters, add};
use crate::request;
use crate::spec::{Config, DEVICE_ID, WRITEBACK_OFFSET, feature};
use crate::worker::{Message, Shared, Worker, drops};

/// What a device is made with.
#[derive(Clone, Debug)]
pub struct BlkOptions {
    /// How many queues it has: 1 to 1024.
    pub queues: u16,
    /// What GET_ID answers: at most 20 bytes of it.
    pub serial: String,
    /// Whether the driver may switch between write-back and write-through (`VIRTIO_BLK_F_CONFIG_WCE`).
    ///
    /// Else the mode follows from FLUSH: a driver that has it negotiated flushes. Front ends remember the mode
    /// for their driver and do not say it again to a device that has restarted, or to another that the driver
    /// migrates to; so a device that cannot know it writes through, which is slow and safe.
    pub config_wce: bool,
    /// How its queues are polled.
    pub poll: Poll,
    /// The reactors that its queues are spread over; at least one.
    pub reactors: Vec<Handle>,
}

/// Whether the driver and we have the same cache mode in mind, where the driver may choose it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Mode {
    /// Neither has told the other: a front end that was there before us may remember another one.
    Untold,
    /// It was read: a driver that begins now knows it. One that was there before may know another one.
    Read,
    /// The driver has begun with it, or has set it.
    Agreed,
}

type Listener = Arc<Mutex<Option<Arc<dyn Fn(DeviceEvent) + Send + Sync>>>>;

/// A virtio-blk device.
pub struct Blk {
    options: BlkOptions,
    shared: Arc<Shared>,
    features: u64,
    /// The cache mode that a driver has that may choose it: write-back until one chooses.
    chosen: AtomicBool,
    /// What its driver can know of that: a [`Mode`].
    mode: AtomicU8,
    queues: Vec<Option<Running>>,
    counters: Vec<Arc<QueueCounters>>,
    listener: Listener,
    _events: Subscription,
}

impl fmt::Debug for Blk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blk")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

/// A queue that runs, from outside.
struct Running {
    reactor: Handle,
    sender: Sender<Message>,
    /// Set when the worker is built; messages to a reactor are in order, so it is set when it is
    /// looked at there.
    waker: Arc<OnceLock<Waker>>,
}

impl Running {
    fn send(&self, message: Message) {
        // Fails where the worker has ended by itself; then the message is dropped, and with it what
        // waits for an answer.
        let _ = self.sender.send(message);
        let waker = self.waker.clone();
        self.reactor.send(move |cx| {
            if let Some(waker) = waker.get() {
                cx.wake(waker.actor());
            }
        });
    }
}

impl Blk {
    /// A device on `volume`.
    ///
    /// # Panics
    /// Where the options name no reactor, or no queue.
    pub fn new(volume: Arc<dyn Volume>, options: BlkOptions) -> Self {
        assert!(!options.reactors.is_empty() && (1..=1024).contains(&options.queues));
        let shared = Arc::new(Shared {
            size: AtomicU64::new(volume.geometry().size),
            writeback: AtomicBool::new(true),
            id: request::id(&options.serial),
            volume: volume.clone(),
        });
        let listener = Listener::default();
        let (s, l) = (shared.clone(), listener.clone());
        let events = volume.events().subscribe(move |event| {
            if event == VolumeEvent::Resized {
                s.size.store(s.volume.geometry().size, Ordering::Relaxed);
                tell(&l, DeviceEvent::ConfigChanged);
            }
        });
        let counters = (0..options.queues).map(|_| Arc::default()).collect();
        let queues = (0..options.queues).map(|_| None).collect();
        let this = Self {
            options,
            shared,
            features: 0,
            chosen: AtomicBool::new(true),
            mode: AtomicU8::new(Mode::Untold as u8),
            queues,
            counters,
            listener,
            _events: events,
        };
        // What was missed before there was a subscription.
        this.shared
            .size
            .store(this.shared.volume.geometry().size, Ordering::Relaxed);
        this
    }

    /// The counters of its queues, in their order.
    pub fn counters(&self) -> &[Arc<QueueCounters>] {
        &self.counters
    }

    fn config(&self) -> Config {
        // A driver without the choice does not look, and the next one may have it.
        let writeback = match self.features & feature::CONFIG_WCE != 0 {
            true => self.shared.writeback.load(Ordering::Relaxed),
            false => self.chosen.load(Ordering::Relaxed),
        };
        config::config(
            &self.shared.volume.geometry(),
            self.options.queues,
            writeback,
        )
    }

    /// Sets the mode, for a driver that has the choice.
    fn choose(&self, writeback: bool) {
        self.chosen.store(writeback, Ordering::Relaxed);
        self.shared.writeback.store(writeback, Ordering::Relaxed);
    }

    /// A queue starts, whose driver may choose the mode; `begins`: it has not been used before.
    fn agree(&self, begins: bool) {
        let mode = self.mode.load(Ordering::Relaxed);
        if mode == Mode::Agreed as u8 {
            return;
        }
        if begins && mode == Mode::Read as u8 {
            self.mode.store(Mode::Agreed as u8, Ordering::Relaxed);
        } else {
            if self.chosen.load(Ordering::Relaxed) {
                log::info!(
                    "what the driver was told of the cache before is not known here: writes go through until it says"
                );
            }
            self.choose(false);
        }
    }

    fn reactor(&self, index: u16) -> &Handle {
        let all = &self.options.reactors;
        // A volume that bears fewer channels than there are reactors is used on its first ones.
        let n = all.len().min(self.shared.volume.max_channels()).max(1);
        &all[usize::from(index) % n]
    }
}

impl Drop for Blk {
    /// Queues that still run are told to end, and not waited for. They write nothing to their rings any more; what is
    /// recorded as in flight stays so.
    fn drop(&mut self) {
        let stop = Stop {
            bound: Duration::ZERO,
            leave: true,
            answer: false,
        };
        for queue in self.queues.iter_mut().filter_map(Option::take) {
            queue.send(Message::Stop(stop, Box::new(drop)));
        }
    }
}

fn tell(listener: &Listener, event: DeviceEvent) {
    let to = listener
        .lock()
        .expect("listeners are called without the lock")
        .clone();
    if let Some(to) = to {
        to(event);
    }
}

impl VirtioDevice for Blk {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn queues(&self) -> u16 {
        self.options.queues
    }

    fn features(&self) -> u64 {
        let choice = if self.options.config_wce {
            0
        } else {
            feature::CONFIG_WCE
        };
        config::offered(&self.shared.volume.geometry()) & !choice
    }

    fn set_features(&mut self, features: u64) {
        self.features = features;
        // Without a choice of its own the driver infers the mode from FLUSH (§5.2.6.2); without FLUSH it
        // has to be write-through in any case (§5.2.5.2).
        let flush = features & feature::FLUSH != 0;
        let chosen = features & feature::CONFIG_WCE == 0 || self.chosen.load(Ordering::Relaxed);
        self.shared
            .writeback
            .store(flush && chosen, Ordering::Relaxed);
    }

    fn config_len(&self) -> u32 {
        size_of::<Config>() as u32
    }

    fn read_config(&self, offset: u32, to: &mut [u8]) {
        let config = self.config();
        let bytes = config.as_bytes().get(offset as usize..).unwrap_or(&[]);
        let n = bytes.len().min(to.len());
        to[..n].copy_from_slice(&bytes[..n]);
        to[n..].fill(0);
        let end = u64::from(offset) + to.len() as u64;
        if (u64::from(offset)..end).contains(&u64::from(WRITEBACK_OFFSET)) {
            self.mode.fetch_max(Mode::Read as u8, Ordering::Relaxed);
        }
    }

    fn write_config(&mut self, offset: u32, from: &[u8]) -> Result<(), DeviceError> {
        let refused = DeviceError::Config {
            offset,
            len: from.len(),
        };
        match (offset, from) {
            (WRITEBACK_OFFSET, [mode @ (0 | 1)]) if self.features & feature::CONFIG_WCE != 0 => {
                self.choose(*mode == 1);
                self.mode.store(Mode::Agreed as u8, Ordering::Relaxed);
                Ok(())
            }
            _ => Err(refused),
        }
    }

    fn start_queue(&mut self, setup: QueueSetup) -> Result<(), DeviceError> {
        let index = setup.index;
        let reactor = self.reactor(index).clone();
        let place = self
            .queues
            .get_mut(usize::from(index))
            .ok_or(DeviceError::Queue(index))?;
        if place.is_some() {
            return Err(DeviceError::Started(index));
        }
        let begins = setup.position == Position::START;
        let (sender, mailbox) = mpsc::channel();
        let waker = Arc::new(OnceLock::new());
        *place = Some(Running {
            reactor: reactor.clone(),
            sender,
            waker: waker.clone(),
        });
        if self.features & feature::CONFIG_WCE != 0 {
            self.agree(begins);
        }
        let shared = self.shared.clone();
        let counters = self.counters[usize::from(index)].clone();
        let (poll, listener) = (self.options.poll, self.listener.clone());
        reactor.send(move |cx| {
            cx.insert(poll, |cx, id| {
                let _ = waker.set(cx.waker(id));
                let said = Arc::new(move |event| tell(&listener, event));
                build(cx, setup, shared, counters, said, mailbox)
            });
        });
        Ok(())
    }

    fn change_queue(&mut self, index: u16, change: QueueChange) {
        match self.queues.get(usize::from(index)) {
            Some(Some(queue)) => queue.send(Message::Change(change)),
            _ => skip(change),
        }
    }

    fn stop_queue(
        &mut self,
        index: u16,
        stop: Stop,
        done: Box<dyn FnOnce(Option<StoppedQueue>) + Send>,
    ) {
        match self
            .queues
            .get_mut(usize::from(index))
            .and_then(Option::take)
        {
            Some(queue) => queue.send(Message::Stop(stop, done)),
            None => done(None),
        }
    }

    fn reset(&mut self) {
        // The mode stays: front ends go on telling their drivers what they have read or set before.
        self.features = 0;
    }

    fn save(&self) -> Vec<u8> {
        vec![
            STATE_VERSION,
            u8::from(self.shared.writeback.load(Ordering::Relaxed)),
            u8::from(self.chosen.load(Ordering::Relaxed)),
            self.mode.load(Ordering::Relaxed),
        ]
    }

    fn load(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        const MODES: u8 = Mode::Agreed as u8;
        let [
            STATE_VERSION,
            writeback @ (0 | 1),
            chosen @ (0 | 1),
            mode @ 0..=MODES,
        ] = state
        else {
            return Err(DeviceError::State);
        };
        self.choose(*chosen == 1);
        self.shared
            .writeback
            .store(*writeback == 1, Ordering::Relaxed);
        self.mode.store(*mode, Ordering::Relaxed);
        Ok(())
    }

    fn on_event(&mut self, listener: Arc<dyn Fn(DeviceEvent) + Send + Sync>) {
        *self
            .listener
            .lock()
            .expect("listeners are called without the lock") = Some(listener);
    }
}

/// The version of what [`Blk`] saves.
const STATE_VERSION: u8 = 1;

/// Answers a change that no queue is there for.
fn skip(change: QueueChange) {
    match change {
        QueueChange::Memory { done, .. } | QueueChange::Log { done, .. } => done(),
        QueueChange::Kick(_)
        | QueueChange::Call(_)
        | QueueChange::Error(_)
        | QueueChange::Enable(_) => {}
    }
}

/// Builds a worker, or what stands in for one that cannot be built.
fn build(
    cx: &mut Context<'_>,
    mut setup: QueueSetup,
    shared: Arc<Shared>,
    counters: Arc<QueueCounters>,
    said: Arc<dyn Fn(DeviceEvent) + Send + Sync>,
    mailbox: Receiver<Message>,
) -> Box<dyn Actor> {
    let (index, error, record) = (setup.index, setup.error.take(), setup.inflight.clone());
    match Worker::new(
        cx,
        setup,
        shared,
        counters.clone(),
        said.clone(),
        mailbox,
        error,
    ) {
        Ok(worker) => Box::new(worker),
        Err((e, mailbox, error)) => {
            if error.as_ref().map(Notifier::notify) == Some(Notice::Hung) {
                add(&counters.hung, 1);
                said(DeviceEvent::NotifierHung(index));
            }
            said(DeviceEvent::QueueBroken {
                queue: index,
                cause: format!("it cannot be started: {e}").into(),
            });
            Box::new(Failed {
                mailbox,
                record,
                stopped: false,
            })
        }
    }
}

/// A queue that could not be started: it answers until it is stopped.
struct Failed {
    mailbox: Receiver<Message>,
    record: Option<InflightQueue>,
    stopped: bool,
}

impl Actor for Failed {
    fn event(&mut self, _: &mut Context<'_>, _: Event) {
        while let Ok(message) = self.mailbox.try_recv() {
            match message {
                Message::Change(change) => skip(change),
                Message::Stop(stop, done) => {
                    self.stopped = true;
                    if let Some(record) = &self.record
                        && drops(stop)
                    {
                        record.forget();
                    }
                    done(None);
                }
            }
        }
    }

    fn turn(&mut self, _: &mut Context<'_>) -> Turn {
        if self.stopped { Turn::Done } else { Turn::Idle }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bluff_reactor::{Options, Reactor};

    /// Found by the differential test: a driver that can choose the mode, and cannot flush.
    #[test]
    fn who_cannot_flush_begins_with_write_through() {
        let reactor = Reactor::new(&Options::default()).unwrap();
        let options = BlkOptions {
            queues: 1,
            serial: String::new(),
            config_wce: true,
            poll: Poll::Never,
            reactors: vec![reactor.handle()],
        };
        let uri = bluff_block::Uri::parse("null:?size=1MiB").unwrap();
        let mut device = Blk::new(bluff_block::null::open(uri).unwrap(), options);
        let mut mode = |features| {
            device.reset();
            device.set_features(features);
            device.shared.writeback.load(Ordering::Relaxed)
        };
        assert!(!mode(0));
        assert!(mode(feature::FLUSH));
        assert!(mode(feature::FLUSH | feature::CONFIG_WCE));
        assert!(!mode(feature::CONFIG_WCE));
    }
}
