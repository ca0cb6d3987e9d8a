//! A function with a device that records, and a host that reads and writes.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bluff_memory::GuestMemory;
use bluff_pci::config::{Identity, Link, MsixPlace};
use bluff_pci::{
    Area, Bar, ConfigSpace, Device, Dma, Done, Error, Function, Interrupt, PciEvent, PciFunction,
    Region, Resources, Written,
};
use bluff_reactor::Notifier;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub const BOUND: Duration = Duration::from_millis(700);
pub const VECTORS: u16 = 70;
/// Where the table and the pending bits are in BAR 0.
pub const TABLE: u64 = 0x2000;
pub const PENDING: u64 = 0x3000;
pub const BAR0: u64 = 0x10000;
pub const BAR2: u64 = 0x100;

/// Offsets of the sample function, which a driver would find by walking the list.
pub const PM: u64 = 0x40;
pub const MSIX: u64 = 0x48;
pub const PCIE: u64 = 0x54;
pub const VENDOR: u64 = 0x90;

pub const COMMAND: u64 = 4;
pub const MEMORY: u16 = 2;
pub const MASTER: u16 = 4;
pub const INTX_OFF: u16 = 1 << 10;
pub const MSIX_CONTROL: u64 = MSIX + 2;
pub const ENABLE: u16 = 1 << 15;
pub const ALL_MASKED: u16 = 1 << 14;
pub const DEVICE_CONTROL: u64 = PCIE + 8;
pub const DEVICE_STATUS: u64 = PCIE + 10;
pub const FLR: u16 = 1 << 15;
pub const PMCSR: u64 = PM + 4;

/// What the device was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    Write(u8, u64, Vec<u8>),
    DmaOff(Duration),
    /// With how many regions of memory.
    DmaOn(usize),
    Reset(Duration),
}

/// What the test sees of the device.
#[derive(Clone, Default)]
pub struct Seen {
    pub calls: Arc<Mutex<Vec<Call>>>,
    /// What waits to be over.
    pub waiting: Arc<Mutex<Vec<Done>>>,
    /// Whether things are over at once.
    pub late: Arc<Mutex<bool>>,
    pub busy: Arc<Mutex<bool>>,
}

impl Seen {
    pub fn take(&self) -> Vec<Call> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }

    pub fn finish(&self) {
        let waiting = std::mem::take(&mut *self.waiting.lock().unwrap());
        assert!(!waiting.is_empty(), "nothing waits");
        waiting.into_iter().for_each(|done| done());
    }
}

/// Registers of BAR 0 and 2 that hold what is written, apart from those that MSI-X takes.
pub struct Recorder {
    pub seen: Seen,
    pub resources: Resources,
    registers: Vec<[u8; 0x10000]>,
    pub state: Vec<u8>,
}

impl Recorder {
    fn over(&self, call: Call, done: Done) {
        self.seen.calls.lock().unwrap().push(call);
        if *self.seen.late.lock().unwrap() {
            self.seen.waiting.lock().unwrap().push(done);
        } else {
            done();
        }
    }
}

impl Device for Recorder {
    fn read(&mut self, bar: u8, offset: u64, to: &mut [u8]) {
        let at = offset as usize;
        to.copy_from_slice(&self.registers[usize::from(bar)][at..at + to.len()]);
    }

    fn write(&mut self, bar: u8, offset: u64, from: &[u8]) {
        // The contract's promise.
        assert!(matches!(from.len(), 1 | 2 | 4 | 8) && offset.is_multiple_of(from.len() as u64));
        let at = offset as usize;
        self.registers[usize::from(bar)][at..at + from.len()].copy_from_slice(from);
        let call = Call::Write(bar, offset, from.to_vec());
        self.seen.calls.lock().unwrap().push(call);
    }

    fn set_dma(&mut self, dma: Dma, bound: Duration, done: Done) {
        let call = match dma {
            Dma::Off => Call::DmaOff(bound),
            Dma::On(memory) => Call::DmaOn(memory.len()),
        };
        self.over(call, done);
    }

    fn reset(&mut self, bound: Duration, done: Done) {
        self.registers.iter_mut().for_each(|r| r.fill(0));
        self.over(Call::Reset(bound), done);
    }

    fn transactions_pending(&self) -> bool {
        *self.seen.busy.lock().unwrap()
    }

    fn save(&self) -> Vec<u8> {
        self.state.clone()
    }

    fn load(&mut self, state: &[u8]) -> Result<(), Error> {
        if state == b"bad" {
            return Err(Error::State("bad"));
        }
        self.state = state.to_vec();
        Ok(())
    }
}

pub const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0010,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
    class: 0x01_08_02,
    revision: 7,
};

/// The sample's configuration space.
pub fn space(no_soft_reset: bool) -> ConfigSpace {
    let areas = vec![Area::new(0x1000, 0x1000).unwrap()];
    ConfigSpace::builder(IDENTITY)
        .bar(0, Bar::memory_64(BAR0).with_areas(areas))
        .bar(2, Bar::memory_32(BAR2))
        .intx()
        .power_management(no_soft_reset)
        .msix(VECTORS, MsixPlace::in_bar(0, TABLE as u32, VECTORS))
        .express(Link::default())
        .capability(9, &[0x10, 1, 2, 3], &[0, 0xff])
        .serial_number(0x0011_2233_4455_6677)
        .extended(0x000b, 2, &[1, 2, 3, 4], &[0, 0, 0xf0])
        .build()
}

/// An attachment holds functions of any kind.
const _: fn(Box<dyn PciFunction>) = drop;

pub struct Rig {
    pub function: Function<Recorder>,
    pub seen: Seen,
    pub events: Arc<Mutex<Vec<PciEvent>>>,
}

impl Rig {
    pub fn new() -> Self {
        Self::of(space(true))
    }

    pub fn of(space: ConfigSpace) -> Self {
        let seen = Seen::default();
        let mut function = Function::new(space, |resources| Recorder {
            seen: seen.clone(),
            resources,
            registers: vec![[0; 0x10000]; 3],
            state: Vec::new(),
        });
        let events: Arc<Mutex<Vec<PciEvent>>> = Arc::default();
        let sink = events.clone();
        function.on_event(Arc::new(move |event| sink.lock().unwrap().push(event)));
        Self {
            function,
            seen,
            events,
        }
    }

    /// One that answers and is bus master.
    pub fn running() -> Self {
        let mut rig = Self::new();
        rig.set_u16(COMMAND, MEMORY | MASTER);
        rig.seen.take();
        rig
    }

    pub fn read<const N: usize>(&mut self, region: Region, offset: u64) -> [u8; N] {
        let mut to = [0; N];
        self.function.read(region, offset, &mut to).unwrap();
        to
    }

    pub fn write(&mut self, region: Region, offset: u64, from: &[u8]) -> Written {
        self.function.write(region, offset, from).unwrap()
    }

    pub fn u16(&mut self, offset: u64) -> u16 {
        u16::from_le_bytes(self.read(Region::Config, offset))
    }

    pub fn u32(&mut self, offset: u64) -> u32 {
        u32::from_le_bytes(self.read(Region::Config, offset))
    }

    pub fn bar_u32(&mut self, bar: u8, offset: u64) -> u32 {
        u32::from_le_bytes(self.read(Region::Bar(bar), offset))
    }

    /// Writes, and settles what that began.
    pub fn set(&mut self, offset: u64, from: &[u8]) {
        if self.write(Region::Config, offset, from) == Written::Unsettled {
            assert_eq!(self.settle(), 1, "the device is over at once");
        }
    }

    pub fn set_u16(&mut self, offset: u64, value: u16) {
        self.set(offset, &value.to_le_bytes());
    }

    pub fn set_u32(&mut self, offset: u64, value: u32) {
        self.set(offset, &value.to_le_bytes());
    }

    pub fn bar_set_u32(&mut self, bar: u8, offset: u64, value: u32) {
        let written = self.write(Region::Bar(bar), offset, &value.to_le_bytes());
        assert_eq!(written, Written::Done);
    }

    /// Settles, and says how often `done` was called by then.
    pub fn settle(&mut self) -> usize {
        let count = Count::default();
        self.function.settle(BOUND, count.done());
        count.get()
    }

    /// Gives an interrupt a descriptor.
    pub fn connect(&mut self, interrupt: Interrupt) -> EventFd {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let notifier = Notifier::new(event.try_clone().unwrap()).unwrap();
        let set = self.function.set_interrupt(interrupt, Some(notifier));
        set.unwrap();
        event
    }

    pub fn vector(&self, index: u16) -> bluff_pci::Vector {
        self.function.device().resources.vectors[usize::from(index)].clone()
    }

    pub fn intx(&self) -> bluff_pci::Intx {
        self.function.device().resources.intx.clone().unwrap()
    }
}

/// How often it was notified since it was last asked.
pub fn heard(event: &EventFd) -> u64 {
    event.read().unwrap_or(0)
}

/// Counts what is called.
#[derive(Clone, Default)]
pub struct Count(Arc<AtomicUsize>);

impl Count {
    pub fn done(&self) -> Done {
        let count = self.0.clone();
        Box::new(move || {
            count.fetch_add(1, Ordering::SeqCst);
        })
    }

    pub fn get(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

/// Memory of one region.
pub fn memory() -> Arc<GuestMemory> {
    let file = Area::new(0, 4096).unwrap().file;
    let spec = bluff_memory::RegionSpec {
        guest: 0x1000,
        len: 4096,
        user: 0x1000,
        offset: 0,
        file: file.try_clone().unwrap(),
    };
    let region = bluff_memory::Region::new(spec, &GuestMemory::empty()).unwrap();
    GuestMemory::new(vec![region]).unwrap()
}

/// The bits of the sample's registers that can be written: `(offset, mask)`.
pub const WRITABLE: &[(u64, u32)] = &[
    // Command; status has errors only, which are not there.
    (0x04, 0x0546),
    (0x0c, 0xff),
    (0x10, 0xffff_0000),
    (0x14, 0xffff_ffff),
    (0x18, 0xffff_ff00),
    (0x3c, 0xff),
    (PMCSR, 0b11),
    // Message Control, behind the header of the capability.
    (MSIX, 0xc000_0000),
    // Device Control without the bit that resets, in a second round.
    (DEVICE_CONTROL, 0x79ff),
    (PCIE + 0x10, 0xcb),
    (PCIE + 0x28, 0x10),
    (PCIE + 0x30, 0x2f),
    (VENDOR, 0xff00_0000),
    (0x110, 0x00f0_0000),
];
