//! A device that records what is asked of it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bluff_memory::GuestMemory;
use bluff_virtio::{
    DeviceError, DeviceEvent, Position, QueueChange, QueueSetup, Stop, StoppedQueue, VirtioDevice,
    features,
};

use super::PATIENCE;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    Features(u64),
    Start(u16),
    Stop(u16, Stop),
    Memory(u16),
    Log(u16, bool),
    Kick(u16),
    Notifier(u16),
    Err(u16),
    Enable(u16, bool),
    Config(u32, Vec<u8>),
    Reset,
    Load(Vec<u8>),
}

/// What a device does with what takes time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// Done at once.
    Now,
    /// Done by another thread when the bound has passed, as with I/O that never completes.
    AtBound,
    /// Done when the test says so.
    Held,
}

type Done = Box<dyn FnOnce() + Send>;

pub struct Inner {
    pub calls: Vec<Call>,
    pub pace: Pace,
    pub running: BTreeMap<u16, QueueSetup>,
    /// The epoch that each queue uses.
    pub memory: BTreeMap<u16, Arc<GuestMemory>>,
    pub held: VecDeque<Done>,
    pub config: Vec<u8>,
    pub refuse_start: bool,
    listener: Option<Arc<dyn Fn(DeviceEvent) + Send + Sync>>,
}

/// The test's side of a device.
#[derive(Clone)]
pub struct Control(Arc<(Mutex<Inner>, Condvar)>);

pub struct Fake {
    control: Control,
    queues: u16,
    features: u64,
    id: u32,
}

impl Control {
    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn changed(&self) {
        self.0.1.notify_all();
    }

    /// Waits until the device is in a state.
    pub fn wait(&self, what: &str, mut until: impl FnMut(&mut Inner) -> bool) {
        let end = Instant::now() + PATIENCE;
        let mut inner = self.lock();
        while !until(&mut inner) {
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "waited for {what}; {:?}", inner.calls);
            inner = self.0.1.wait_timeout(inner, left).unwrap().0;
        }
    }

    /// Lets everything go on that was held.
    pub fn release(&self) {
        let held: Vec<_> = self.lock().held.drain(..).collect();
        held.into_iter().for_each(|done| done());
    }

    pub fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.lock().calls)
    }

    pub fn event(&self, event: DeviceEvent) {
        let listener = self.lock().listener.clone();
        listener.expect("attached")(event);
    }

    pub fn is_running(&self, index: u16) -> bool {
        self.lock().running.contains_key(&index)
    }
}

pub const FEATURES: u64 =
    features::VERSION_1 | features::EVENT_IDX | features::RING_PACKED | features::INDIRECT_DESC;

pub fn device(queues: u16) -> (Box<Fake>, Control) {
    let inner = Inner {
        calls: Vec::new(),
        pace: Pace::Now,
        running: BTreeMap::new(),
        memory: BTreeMap::new(),
        held: VecDeque::new(),
        config: (0..60).collect(),
        refuse_start: false,
        listener: None,
    };
    let control = Control(Arc::new((Mutex::new(inner), Condvar::new())));
    let fake = Fake {
        control: control.clone(),
        queues,
        features: FEATURES,
        id: 2,
    };
    (Box::new(fake), control)
}

pub fn net_device(queues: u16) -> (Box<Fake>, Control) {
    let (mut fake, control) = device(queues);
    fake.id = 1;
    (fake, control)
}

impl Fake {
    fn later(&self, bound: Duration, done: Done) {
        let pace = self.control.lock().pace;
        match pace {
            Pace::Now => done(),
            Pace::AtBound => {
                std::thread::spawn(move || {
                    std::thread::sleep(bound);
                    done();
                });
            }
            Pace::Held => {
                self.control.lock().held.push_back(done);
                self.control.changed();
            }
        }
    }

    fn call(&self, call: Call) {
        self.control.lock().calls.push(call);
        self.control.changed();
    }
}

/// Where a fake queue is when it stops.
pub fn stopped_at(index: u16) -> Position {
    Position {
        avail: 7 + index,
        avail_wrap: true,
        used: 7 + index,
        used_wrap: false,
    }
}

impl VirtioDevice for Fake {
    fn device_id(&self) -> u32 {
        self.id
    }
    fn queues(&self) -> u16 {
        self.queues
    }
    fn features(&self) -> u64 {
        self.features
    }
    fn set_features(&mut self, features: u64) {
        assert!(self.control.lock().running.is_empty(), "queues run");
        self.call(Call::Features(features));
    }
    fn config_len(&self) -> u32 {
        self.control.lock().config.len() as u32
    }
    fn read_config(&self, offset: u32, to: &mut [u8]) {
        let inner = self.control.lock();
        for (i, byte) in to.iter_mut().enumerate() {
            *byte = inner.config.get(offset as usize + i).copied().unwrap_or(0);
        }
    }
    fn write_config(&mut self, offset: u32, from: &[u8]) -> Result<(), DeviceError> {
        // The first half is read-only.
        if offset < 30 {
            return Err(DeviceError::Config {
                offset,
                len: from.len(),
            });
        }
        self.call(Call::Config(offset, from.to_vec()));
        self.control.lock().config[offset as usize..][..from.len()].copy_from_slice(from);
        Ok(())
    }
    fn start_queue(&mut self, setup: QueueSetup) -> Result<(), DeviceError> {
        let mut inner = self.control.lock();
        if inner.refuse_start {
            return Err(DeviceError::Backend("not today".into()));
        }
        let index = setup.index;
        inner.calls.push(Call::Start(index));
        inner.memory.insert(index, setup.memory.clone());
        let old = inner.running.insert(index, setup);
        assert!(old.is_none(), "queue {index} is started already");
        drop(inner);
        self.control.changed();
        Ok(())
    }
    fn change_queue(&mut self, index: u16, change: QueueChange) {
        assert!(self.control.is_running(index), "queue {index} does not run");
        match change {
            QueueChange::Memory {
                memory,
                bound,
                done,
            } => {
                self.call(Call::Memory(index));
                let control = self.control.clone();
                self.later(
                    bound,
                    Box::new(move || {
                        let mut inner = control.lock();
                        inner.memory.insert(index, memory.clone());
                        if let Some(setup) = inner.running.get_mut(&index) {
                            setup.memory = memory;
                        }
                        drop(inner);
                        done();
                    }),
                );
            }
            QueueChange::Kick(kick) => {
                self.control.lock().running.get_mut(&index).unwrap().kick = kick;
                self.call(Call::Kick(index));
            }
            QueueChange::Call(call) => {
                self.control.lock().running.get_mut(&index).unwrap().call = call;
                self.call(Call::Notifier(index));
            }
            QueueChange::Error(_) => self.call(Call::Err(index)),
            QueueChange::Log { log, done } => {
                self.call(Call::Log(index, log.is_some()));
                self.later(Duration::ZERO, done);
            }
            QueueChange::Enable(on) => {
                self.control.lock().running.get_mut(&index).unwrap().enabled = on;
                self.call(Call::Enable(index, on));
            }
        }
    }
    fn stop_queue(
        &mut self,
        index: u16,
        stop: Stop,
        done: Box<dyn FnOnce(Option<StoppedQueue>) + Send>,
    ) {
        self.call(Call::Stop(index, stop));
        if !self.control.is_running(index) {
            return done(None);
        }
        let control = self.control.clone();
        self.later(
            stop.bound,
            Box::new(move || {
                let mut inner = control.lock();
                inner.running.remove(&index);
                inner.memory.remove(&index);
                drop(inner);
                control.changed();
                done(Some(StoppedQueue {
                    position: stopped_at(index),
                    in_flight: 0,
                }));
            }),
        );
    }
    fn reset(&mut self) {
        assert!(self.control.lock().running.is_empty(), "queues run");
        self.call(Call::Reset);
    }
    fn records_in_flight(&self) -> bool {
        self.id != 1
    }
    fn save(&self) -> Vec<u8> {
        vec![4, 2]
    }
    fn load(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        assert_eq!(state, [4, 2]);
        self.call(Call::Load(state.to_vec()));
        Ok(())
    }
    fn on_event(&mut self, listener: Arc<dyn Fn(DeviceEvent) + Send + Sync>) {
        self.control.lock().listener = Some(listener);
    }
}

/// Reads guest memory as a device would.
pub fn touch(memory: &GuestMemory) -> u8 {
    let mut byte = [0];
    memory.read(memory.end() - 1, &mut byte).unwrap();
    byte[0]
}
