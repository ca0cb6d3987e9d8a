//! The device, as its attachment sees it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use bluff_block::{Subscription, Volume, VolumeEvent};
use bluff_reactor::{Actor, Context, Handle, Poll};
use bluff_virtio::{
    DeviceError, DeviceEvent, Position, QueueChange, QueueSetup, Queues, Stop, Stopped, Tell,
    VirtioDevice,
};
use zerocopy::IntoBytes;

use crate::config;
use crate::counters::QueueCounters;
use crate::request;
use crate::spec::{Config, DEVICE_ID, WRITEBACK_OFFSET, feature};
use crate::worker::{Shared, Worker};

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

/// A virtio-blk device.
pub struct Blk {
    options: BlkOptions,
    shared: Arc<Shared>,
    features: u64,
    /// The cache mode that a driver has that may choose it: write-back until one chooses.
    chosen: AtomicBool,
    /// What its driver can know of that: a [`Mode`].
    mode: AtomicU8,
    queues: Queues,
    counters: Vec<Arc<QueueCounters>>,
    _events: Subscription,
}

impl fmt::Debug for Blk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blk")
            .field("options", &self.options)
            .finish_non_exhaustive()
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
        let queues = Queues::new(options.queues);
        let (s, tell) = (shared.clone(), queues.teller());
        let events = volume.events().subscribe(move |event| {
            if event == VolumeEvent::Resized {
                s.size.store(s.volume.geometry().size, Ordering::Relaxed);
                tell(DeviceEvent::ConfigChanged);
            }
        });
        let counters = (0..options.queues).map(|_| Arc::default()).collect();
        let this = Self {
            options,
            shared,
            features: 0,
            chosen: AtomicBool::new(true),
            mode: AtomicU8::new(Mode::Untold as u8),
            queues,
            counters,
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
        self.queues.check(index)?;
        if self.features & feature::CONFIG_WCE != 0 {
            self.agree(setup.position == Position::START);
        }
        let shared = self.shared.clone();
        let counters = self.counters[usize::from(index)].clone();
        let line = counters.line.clone();
        let reactor = self.reactor(index).clone();
        let build = move |cx: &mut Context<'_>, setup, wiring| {
            let worker = Worker::new(cx, setup, wiring, shared, counters)?;
            Ok(Box::new(worker) as Box<dyn Actor>)
        };
        self.queues
            .start(&reactor, self.options.poll, setup, line, build)
    }

    fn change_queue(&mut self, index: u16, change: QueueChange) {
        self.queues.change(index, change);
    }

    fn stop_queue(&mut self, index: u16, stop: Stop, done: Stopped) {
        self.queues.stop(index, stop, done);
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

    fn on_event(&mut self, listener: Tell) {
        self.queues.on_event(listener);
    }
}

/// The version of what [`Blk`] saves.
const STATE_VERSION: u8 = 1;

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
