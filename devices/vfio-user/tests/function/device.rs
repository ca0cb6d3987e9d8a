//! A device that does DMA when its registers say so, and what a test sees of it.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use bluff_memory::GuestMemory;
use bluff_pci::config::{Identity, Link, MsixPlace};
use bluff_pci::{Area, Bar, ConfigSpace, Device, Dma, Done, Function, IoEvent, Resources};
use bluff_vfio_user::AttachmentEvent;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::support::{PAGE, PATIENCE};

/// Registers of BAR 0: what is written to it goes to the address, as eight bytes, and vector 0 is signalled.
pub const WRITE_TO: u64 = 0;
/// Reads eight bytes from the address that is written here.
pub const READ_FROM: u64 = 8;
/// What was read; all ones where that failed.
pub const RESULT: u64 = 16;
/// The one that the device writes.
pub const DATA: u64 = 24;
/// Asserts INTx where it is not 0.
pub const LEVEL: u64 = 32;
/// The page that can be mapped.
pub const AREA: u64 = 0x1000;
pub const TABLE: u64 = 0x2000;
pub const BAR0: u64 = 0x4000;
pub const VECTORS: u16 = 40;

/// A call that takes its time.
pub struct Waiting {
    pub what: &'static str,
    pub bound: Duration,
    pub done: Done,
}

/// What a test sees of a device.
#[derive(Clone, Default)]
pub struct Seen {
    pub state: Arc<(Mutex<State>, Condvar)>,
}

#[derive(Default)]
pub struct State {
    late: bool,
    pub waiting: Vec<Waiting>,
    /// How often it was given memory, or had it taken away.
    changes: usize,
    regions: usize,
    pub events: Vec<AttachmentEvent>,
}

impl Seen {
    /// From now on changes and resets are over later.
    pub fn hold(&self, late: bool) {
        self.state.0.lock().unwrap().late = late;
    }

    fn over(&self, what: &'static str, bound: Duration, done: Done) {
        let mut state = self.state.0.lock().unwrap();
        state.changes += 1;
        if state.late {
            state.waiting.push(Waiting { what, bound, done });
            self.state.1.notify_all();
            return;
        }
        drop(state);
        done();
    }

    fn until<T>(&self, mut get: impl FnMut(&mut State) -> Option<T>) -> T {
        let start = Instant::now();
        let mut state = self.state.0.lock().unwrap();
        loop {
            if let Some(got) = get(&mut state) {
                return got;
            }
            assert!(start.elapsed() < PATIENCE, "nothing happens");
            state = self.state.1.wait_timeout(state, PATIENCE).unwrap().0;
        }
    }

    /// The next call that waits to be over.
    pub fn next(&self) -> Waiting {
        self.until(|s| (!s.waiting.is_empty()).then(|| s.waiting.remove(0)))
    }

    pub fn changes(&self) -> usize {
        self.state.0.lock().unwrap().changes
    }

    /// How many regions of memory the device has.
    pub fn regions(&self) -> usize {
        self.state.0.lock().unwrap().regions
    }

    /// Waits until the attachment says something; all since the last call.
    pub fn event(&self) -> AttachmentEvent {
        self.until(|s| (!s.events.is_empty()).then(|| s.events.remove(0)))
    }

    /// Waits for just this.
    pub fn expect(&self, want: AttachmentEvent) {
        assert_eq!(self.event(), want);
    }
}

pub struct Echo {
    seen: Seen,
    resources: Resources,
    memory: Option<Arc<GuestMemory>>,
    data: u64,
    result: u64,
    event: Arc<OwnedFd>,
}

impl Device for Echo {
    fn read(&mut self, _: u8, offset: u64, to: &mut [u8]) {
        let value = match offset {
            RESULT => self.result,
            DATA => self.data,
            _ => 0,
        };
        let bytes = value.to_le_bytes();
        to.copy_from_slice(&bytes[..to.len()]);
    }

    fn write(&mut self, _: u8, offset: u64, from: &[u8]) {
        let mut bytes = [0; 8];
        bytes[..from.len()].copy_from_slice(from);
        let value = u64::from_le_bytes(bytes);
        match offset {
            WRITE_TO => {
                let memory = self.memory.clone().unwrap_or_default();
                if memory.write(value, &self.data.to_le_bytes()).is_ok() {
                    self.resources.vectors[0].signal();
                } else {
                    self.resources.vectors[1].signal();
                }
            }
            READ_FROM => {
                let memory = self.memory.clone().unwrap_or_default();
                let mut got = [0xff; 8];
                let read = memory.read(value, &mut got);
                self.result = read.map_or(u64::MAX, |()| u64::from_le_bytes(got));
            }
            DATA => self.data = value,
            LEVEL if value != 0 => drop(self.resources.intx.as_ref().unwrap().assert()),
            LEVEL => self.resources.intx.as_ref().unwrap().deassert(),
            _ => {}
        }
    }

    fn set_dma(&mut self, dma: Dma, bound: Duration, done: Done) {
        let (what, memory) = match dma {
            Dma::Off => ("off", None),
            Dma::On(memory) => ("on", Some(memory)),
        };
        self.seen.state.0.lock().unwrap().regions = memory.as_ref().map_or(0, |m| m.len());
        self.memory = memory;
        self.seen.over(what, bound, done);
    }

    fn reset(&mut self, bound: Duration, done: Done) {
        (self.memory, self.data, self.result) = (None, 0, 0);
        self.seen.state.0.lock().unwrap().regions = 0;
        self.seen.over("reset", bound, done);
    }

    fn save(&self) -> Vec<u8> {
        [self.data.to_le_bytes(), self.result.to_le_bytes()].concat()
    }

    fn load(&mut self, state: &[u8]) -> Result<(), bluff_pci::Error> {
        let (data, result) = state.split_at(8);
        self.data = u64::from_le_bytes(data.try_into().unwrap());
        self.result = u64::from_le_bytes(result.try_into().unwrap());
        Ok(())
    }

    fn io_events(&mut self, bar: u8) -> Vec<IoEvent> {
        let event = |offset| IoEvent {
            offset,
            len: 4,
            value: None,
            event: self.event.clone(),
            store: None,
        };
        match bar {
            0 => vec![event(AREA), event(AREA + 4)],
            _ => Vec::new(),
        }
    }
}

const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0010,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
    class: 0x01_08_02,
    revision: 7,
};

/// A function, what is seen of its device, and the area that can be mapped.
pub fn function() -> (Function<Echo>, Seen, Area) {
    let seen = Seen::default();
    let area = Area::new(AREA, PAGE).unwrap();
    let space = ConfigSpace::builder(IDENTITY)
        .bar(0, Bar::memory_64(BAR0).with_areas(vec![area.clone()]))
        .intx()
        .power_management(true)
        .msix(VECTORS, MsixPlace::in_bar(0, TABLE as u32, VECTORS))
        .express(Link::default())
        .build();
    let function = Function::new(space, |resources| Echo {
        seen: seen.clone(),
        resources,
        memory: None,
        data: 0,
        result: 0,
        event: Arc::new(bluff_attachment::descriptor::owned(
            EventFd::new(EFD_NONBLOCK).unwrap(),
        )),
    });
    (function, seen, area)
}
