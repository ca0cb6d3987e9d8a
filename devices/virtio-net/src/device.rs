//! The device, as its attachment sees it.

use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};

use bluff_net::{Counters, NetError, Port};
use bluff_reactor::{Actor, Context, Handle, Poll};
use bluff_virtio::{
    DeviceError, Limits, LineCounters, Queue, QueueChange, QueueSetup, Queues, RingError, Stop,
    Stopped, Tell, VirtioDevice, Wiring, features,
};
use zerocopy::IntoBytes;

use crate::cable::Cable;
use crate::config::{SPEED_UNKNOWN, Shown, config};
use crate::control::Control;
use crate::control_queue::{Commands, Whole};
use crate::receive::{Receiving, Shape};
use crate::settings::{Mac, Settings};
use crate::shared::Shared;
use crate::spec::{Config, DEVICE_ID, feature};
use crate::transmit::{Outward, Transmit};

/// The most pieces of an indirect chain: a frame of 64 KiB by pages, and some.
const INDIRECT: u16 = 1024;
/// The most pairs of queues.
pub const PAIRS_MAX: u16 = 128;

/// What a device is made with.
#[derive(Clone, Debug)]
pub struct NetOptions {
    /// Pairs of queues: 1 to [`PAIRS_MAX`].
    pub pairs: u16,
    /// Its address: of one station.
    pub mac: Mac,
    /// Mbit/s that its driver is told of; `None`: unknown.
    pub speed: Option<u32>,
    /// Its attachment hands the control queue to the device, all of it: so what only a control queue sets may be offered. Others have one of their own,
    /// and would have a driver set what nobody here hears of.
    pub control_queue: bool,
    /// How its transmit queues are polled.
    pub poll: Poll,
    /// The reactors that its pairs are spread over; at least one.
    pub reactors: Vec<Handle>,
}

/// A virtio-net device.
pub struct Net {
    options: NetOptions,
    shared: Arc<Shared>,
    features: u64,
    queues: Queues,
    lines: Vec<Arc<LineCounters>>,
    state: Arc<Mutex<State>>,
    /// What was set before this process, until the features are known again.
    restored: Option<(u64, Settings)>,
}

/// What drivers and operators set.
pub(crate) struct State {
    pub(crate) control: Control,
    /// The driver is asked to announce itself.
    pub(crate) announce: bool,
}

impl fmt::Debug for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Net")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

/// What a queue is for (virtio 1.3 §5.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Receive(u16),
    Transmit(u16),
    Control,
}

/// Why a worker could not be built.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("{0}")]
    Ring(#[from] RingError),
    #[error("{0}")]
    Net(#[from] NetError),
}

impl Net {
    /// A device at `port`.
    ///
    /// # Panics
    /// Where the options name no reactor, no pair or too many.
    pub fn new(port: Arc<dyn Port>, options: NetOptions) -> Self {
        assert!(!options.reactors.is_empty() && (1..=PAIRS_MAX).contains(&options.pairs));
        let count = 2 * options.pairs + 1;
        let control = Control::new(options.mac, options.pairs);
        Self {
            shared: Arc::new(Shared::new(port, options.pairs, control.settings())),
            features: 0,
            queues: Queues::new(count),
            lines: (0..count).map(|_| Arc::default()).collect(),
            state: Arc::new(Mutex::new(State {
                control,
                announce: false,
            })),
            restored: None,
            options,
        }
    }

    /// What its pairs count, in their order.
    pub fn counters(&self) -> &[Arc<Counters>] {
        self.shared.all_counters()
    }

    /// Notifications of its queues, in their order.
    pub fn lines(&self) -> &[Arc<LineCounters>] {
        &self.lines
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics with it")
    }

    /// Its cable, for whoever does not have the device itself.
    pub fn cable(&self) -> Cable {
        let reactor = self.options.reactors[0].clone();
        let (shared, state) = (self.shared.clone(), self.state.clone());
        Cable::new(shared, state, reactor, self.queues.teller())
    }

    /// As [`Cable::set_link`].
    pub fn set_link(&mut self, up: bool) {
        self.cable().set_link(up);
    }

    /// What a queue is for. The control queue comes after the pairs that the driver knows of: all, or one where it has negotiated
    /// neither MQ nor RSS (§5.1.2).
    fn role(&self, index: u16) -> Option<Role> {
        let several = self.features & (feature::MQ | feature::RSS) != 0;
        let pairs = if several { self.options.pairs } else { 1 };
        let control = self.features & feature::CTRL_VQ != 0;
        match index {
            i if i == 2 * pairs && control => Some(Role::Control),
            i if i < 2 * pairs && i % 2 == 0 => Some(Role::Receive(i / 2)),
            i if i < 2 * pairs => Some(Role::Transmit(i / 2)),
            _ => None,
        }
    }

    /// The settings were changed from outside of the control queue: `change` did it.
    fn change_control(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state();
        change(&mut state);
        let control = &state.control;
        self.shared.obey(control.settings(), control.steers());
    }

    fn shown(&self) -> Shown {
        let state = self.state();
        let attributes = self.shared.port.attributes();
        Shown {
            mac: state.control.settings().mac,
            link: self.shared.link.load(Ordering::Relaxed) && attributes.link,
            announce: state.announce,
            pairs: self.options.pairs,
            mtu: attributes.mtu,
            speed: self.options.speed.unwrap_or(SPEED_UNKNOWN),
        }
    }
}

/// What is offered whatever the port is.
const OFFERED: u64 = features::VERSION_1
    | features::EVENT_IDX
    | features::INDIRECT_DESC
    | features::IN_ORDER
    | features::RING_PACKED
    | feature::CSUM
    | feature::GUEST_CSUM
    | feature::GUEST_TSO4
    | feature::GUEST_TSO6
    | feature::GUEST_ECN
    | feature::GUEST_USO4
    | feature::GUEST_USO6
    | feature::HOST_TSO4
    | feature::HOST_TSO6
    | feature::HOST_ECN
    | feature::HOST_USO
    | feature::MRG_RXBUF
    | feature::MTU
    | feature::MAC
    | feature::STATUS
    | feature::GUEST_ANNOUNCE
    | feature::CTRL_VQ;

/// What is offered where the control queue comes here.
const BY_CONTROL: u64 = feature::CTRL_RX
    | feature::CTRL_RX_EXTRA
    | feature::CTRL_VLAN
    | feature::CTRL_MAC_ADDR
    | feature::CTRL_GUEST_OFFLOADS
    | feature::RSS
    | feature::HASH_REPORT
    | feature::NOTF_COAL
    | feature::VQ_NOTF_COAL;

impl VirtioDevice for Net {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn queues(&self) -> u16 {
        2 * self.options.pairs + 1
    }

    fn features(&self) -> u64 {
        let mut offered = OFFERED;
        if self.options.pairs > 1 {
            offered |= feature::MQ;
        }
        if self.options.speed.is_some() {
            offered |= feature::SPEED_DUPLEX;
        }
        if self.options.control_queue {
            offered |= BY_CONTROL;
        }
        offered
    }

    fn set_features(&mut self, features: u64) {
        self.features = features;
        let restored = self.restored.take().filter(|(of, _)| *of == features);
        self.change_control(|state| {
            state.control.reset(features);
            if let Some((_, settings)) = restored {
                state.control.take_up(settings);
                // Whoever knew where it is may be gone as well.
                state.announce |= state.control.may_be_asked();
            }
        });
    }

    fn config_len(&self) -> u32 {
        size_of::<Config>() as u32
    }

    fn read_config(&self, offset: u32, to: &mut [u8]) {
        let config = config(&self.shown());
        let bytes = config.as_bytes().get(offset as usize..).unwrap_or(&[]);
        let n = bytes.len().min(to.len());
        to[..n].copy_from_slice(&bytes[..n]);
        to[n..].fill(0);
    }

    fn write_config(&mut self, offset: u32, from: &[u8]) -> Result<(), DeviceError> {
        // Nothing is writable for a driver of this age (§5.1.4.1).
        Err(DeviceError::Config {
            offset,
            len: from.len(),
        })
    }

    fn start_queue(&mut self, mut setup: QueueSetup) -> Result<(), DeviceError> {
        let index = setup.index;
        let role = self.role(index).ok_or(DeviceError::Queue(index))?;
        // Nothing is in flight between turns, so there is nothing to record.
        setup.inflight = None;
        let reactors = &self.options.reactors;
        let reactor = reactors[usize::from(index / 2) % reactors.len()].clone();
        let shared = self.shared.clone();
        let whole = (role == Role::Control).then(|| Whole {
            device: self.state.clone(),
            shared: shared.clone(),
            tell: self.queues.teller(),
            // One reactor sees at once what it has done itself.
            reactors: match reactors.len() {
                1 => Vec::new(),
                _ => reactors.clone(),
            },
        });
        let line = self.lines[usize::from(index)].clone();
        // Frames are put into receive queues by others, so those have nothing to poll for.
        let poll = match role {
            Role::Transmit(_) => self.options.poll,
            Role::Receive(_) | Role::Control => Poll::Never,
        };
        let build = move |cx: &mut Context<'_>, setup: QueueSetup, wiring: Wiring| {
            let queue = match Queue::new(&setup, Limits { indirect: INDIRECT }) {
                Ok(queue) => queue,
                Err(e) => return Err((StartError::from(e), wiring)),
            };
            let worker: Box<dyn Actor> = match role {
                Role::Receive(_) => {
                    let shape = Shape::new(setup.features, setup.size);
                    Box::new(Receiving::new(
                        cx,
                        wiring,
                        queue,
                        setup.enabled,
                        shape,
                        shared,
                    ))
                }
                Role::Transmit(pair) => {
                    let lane = match shared.port.open(cx, pair) {
                        Ok(lane) => lane,
                        Err(e) => return Err((e.into(), wiring)),
                    };
                    let (features, size) = (setup.features, setup.size);
                    let waker = cx.waker(cx.id());
                    let out = Outward::new(lane, features, pair, size, shared, waker);
                    Box::new(Transmit::new(wiring, queue, setup.enabled, out))
                }
                Role::Control => {
                    let whole = whole.expect("made for it");
                    let waker = cx.waker(cx.id());
                    Box::new(Commands::new(wiring, queue, setup.enabled, whole, waker))
                }
            };
            Ok(worker)
        };
        self.queues.start(&reactor, poll, setup, line, build)?;
        self.state()
            .control
            .set_running(index, role != Role::Control);
        Ok(())
    }

    fn change_queue(&mut self, index: u16, change: QueueChange) {
        self.queues.change(index, change);
    }

    fn stop_queue(&mut self, index: u16, stop: Stop, done: Stopped) {
        self.change_control(|state| state.control.set_running(index, false));
        self.queues.stop(index, stop, done);
    }

    fn reset(&mut self) {
        self.features = 0;
        self.restored = None;
        self.change_control(|state| {
            state.control.reset(0);
            state.announce = false;
        });
    }

    fn records_in_flight(&self) -> bool {
        // A frame is served within a turn, and rings are used in order.
        false
    }

    fn save(&self) -> Vec<u8> {
        // Whether the cable is plugged in is the operator's, who says it to each device that is made.
        let state = self.state();
        let mut saved = vec![STATE_VERSION, u8::from(state.announce)];
        if self.features != 0 {
            saved.extend(state.control.save());
        }
        saved
    }

    fn load(&mut self, saved: &[u8]) -> Result<(), DeviceError> {
        let [STATE_VERSION, announce @ (0 | 1), settings @ ..] = saved else {
            return Err(DeviceError::State);
        };
        let mut state = self.state();
        let restored = match settings {
            [] => None,
            settings => Some(state.control.read(settings).ok_or(DeviceError::State)?),
        };
        state.announce = *announce == 1;
        drop(state);
        self.restored = restored;
        Ok(())
    }

    fn on_event(&mut self, listener: Tell) {
        self.queues.on_event(listener);
    }
}

/// The version of what [`Net`] saves.
const STATE_VERSION: u8 = 2;
