//! A function: configuration space, interrupts and resets in front of a device.
//!
//! ```text
//!            Bus Master Enable, D0                     reset: FLR, D3hot to D0, the attachment's
//!   DMA off <---------------------> DMA on              registers at once, then the device, then done
//!      '-- set_dma(Off), settled with the write --'     (no access is answered meanwhile)
//! ```

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bluff_memory::GuestMemory;
use bluff_reactor::Notifier;

use crate::config::{Began, Controls, Live, ResetKind};
use crate::events::Events;
use crate::line::reason;
use crate::msix::Msix;
use crate::seam::{Done, Interrupt, IoEvent, PciEvent, PciFunction, Region, Written};
use crate::spec::CONFIG_SIZE;
use crate::state::State;
use crate::{ConfigSpace, Device, Dma, Error, Intx, Layout, Resources};

/// A PCI function: a [`Device`], and in front of it all that is PCI's.
#[derive(Debug)]
pub struct Function<D> {
    config: ConfigSpace,
    msix: Option<Msix>,
    intx: Option<Intx>,
    events: Events,
    device: D,
    memory: Arc<GuestMemory>,
    /// What the device was last told.
    dma: bool,
    owed: Owed,
    /// How many ends of bus mastering are not over.
    unsettled: Arc<AtomicU32>,
    resetting: Resetting,
}

/// What is to be done when the last write is settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owed {
    Nothing,
    DmaOff,
    Reset,
}

/// Whether a reset is going on, and who waits for it.
#[derive(Clone, Default)]
struct Resetting(Arc<Mutex<Option<Vec<Done>>>>);

impl std::fmt::Debug for Resetting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Resetting").field(&self.is_on()).finish()
    }
}

impl Resetting {
    fn lock(&self) -> MutexGuard<'_, Option<Vec<Done>>> {
        // Nothing panics while it is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_on(&self) -> bool {
        self.lock().is_some()
    }

    /// Joins the reset that is going on, or begins one: `true`.
    fn begin(&self, done: Done) -> bool {
        let mut waiting = self.lock();
        let begins = waiting.is_none();
        waiting.get_or_insert_default().push(done);
        begins
    }

    fn end(&self) {
        let waiting = self.lock().take();
        waiting.into_iter().flatten().for_each(|done| done());
    }
}

impl<D: Device> Function<D> {
    /// A function with what `config` describes, and the device that `make` makes.
    pub fn new(config: ConfigSpace, make: impl FnOnce(Resources) -> D) -> Self {
        let events = Events::default();
        let vectors = config.layout().vectors;
        let msix = config.msix_place();
        let msix = msix.map(|place| Msix::new(place, vectors, &events));
        let intx = config.layout().intx.then(|| Intx::new(events.clone()));
        let device = make(Resources {
            vectors: msix.as_ref().map_or_else(Vec::new, |m| m.vectors().into()),
            intx: intx.clone(),
            events: events.clone(),
        });
        let mut this = Self {
            config,
            msix,
            intx,
            events,
            device,
            memory: GuestMemory::empty(),
            dma: false,
            owed: Owed::Nothing,
            unsettled: Arc::default(),
            resetting: Resetting::default(),
        };
        this.gate(this.config.controls());
        this
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The device.
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    fn live(&self) -> Live {
        Live {
            interrupt: self.intx.as_ref().is_some_and(Intx::is_asserted),
            transactions: self.owed != Owed::Nothing
                || self.resetting.is_on()
                || self.unsettled.load(Ordering::Acquire) != 0
                || self.device.transactions_pending(),
        }
    }

    /// An access to a region that is there and large enough.
    fn check(&self, region: Region, offset: u64, len: usize) -> Result<(), Error> {
        let size = match region {
            Region::Config => Some(CONFIG_SIZE as u64),
            Region::Bar(index) => {
                let bar = self.config.layout().bars.get(usize::from(index));
                bar.and_then(Option::as_ref).map(|bar| bar.size)
            }
        };
        let size = size.ok_or(Error::NoRegion(region))?;
        let end = offset.checked_add(len as u64);
        end.filter(|end| *end <= size)
            .map(|_| ())
            .ok_or(Error::Range {
                region,
                offset,
                len,
            })
    }

    /// Whether no access is answered: a reset is owed, or going on.
    fn is_deaf(&self) -> bool {
        self.owed == Owed::Reset || self.resetting.is_on()
    }

    /// Whether a BAR answers an access of this kind. Accesses that are not aligned to their width, or have another than
    /// 1, 2, 4 or 8 bytes, are no such thing as a driver of any device makes.
    fn answers(&mut self, offset: u64, len: usize, read: bool) -> bool {
        if self.is_deaf() {
            return false;
        }
        if !self.config.controls().memory {
            self.config.note_unsupported(read);
            return false;
        }
        matches!(len, 1 | 2 | 4 | 8) && offset.is_multiple_of(len as u64)
    }

    /// Interrupts as the host's controls have them.
    fn gate(&mut self, controls: Controls) {
        let on = controls.msix.is_some_and(|m| m.enabled);
        if let Some(msix) = &self.msix {
            let masked = controls.msix.is_some_and(|m| !m.enabled || m.masked);
            // A message is a write to memory (PCIe §7.5.1.1.3); INTx is not.
            msix.set_all(reason::BUS, !controls.bus_master);
            msix.set_all(reason::CONTROL, masked);
        }
        if let Some(intx) = &self.intx {
            let disabled = controls.intx_disable || on;
            intx.note(intx.line.set(reason::BUS, !controls.powered));
            intx.note(intx.line.set(reason::CONTROL, disabled));
        }
    }

    fn write_config(&mut self, offset: u64, from: &[u8]) -> Written {
        let before = self.config.controls();
        if self.config.write(offset, from) == Began::Reset {
            self.owed = Owed::Reset;
            self.dma = false;
            return Written::Unsettled;
        }
        let controls = self.config.controls();
        if controls == before {
            return Written::Done;
        }
        self.gate(controls);
        match (self.dma, controls.bus_master) {
            (false, true) => {
                self.dma = true;
                let dma = Dma::On(self.memory.clone());
                self.device.set_dma(dma, Duration::ZERO, Box::new(|| {}));
                Written::Done
            }
            (true, false) => {
                self.dma = false;
                self.owed = Owed::DmaOff;
                Written::Unsettled
            }
            _ => Written::Done,
        }
    }

    fn begin_reset(&mut self, kind: ResetKind, bound: Duration, done: Done) {
        self.owed = Owed::Nothing;
        // Before a vector could be heard by the next driver.
        self.each_line(|line| line.mask(reason::RESET));
        self.config.reset(kind);
        if let Some(msix) = &mut self.msix {
            msix.reset();
        }
        self.dma = false;
        self.gate(self.config.controls());
        if !self.resetting.begin(done) {
            return;
        }
        let resetting = self.resetting.clone();
        let vectors = self.msix.as_ref().map(|m| m.vectors().to_vec());
        let intx = self.intx.clone();
        let end = move || {
            let vectors = vectors.iter().flatten();
            vectors.for_each(|vector| vector.line().end_reset());
            intx.iter().for_each(|intx| intx.line.end_reset());
            resetting.end();
        };
        self.device.reset(bound, Box::new(end));
    }

    fn each_line(&self, each: impl Fn(&crate::line::Line<Notifier>)) {
        let vectors = self.msix.iter().flat_map(Msix::vectors);
        vectors.for_each(|vector| each(vector.line()));
        self.intx.iter().for_each(|intx| each(&intx.line));
    }

    /// Does something to an interrupt's line, and tells where its notifier is found to hang.
    fn at_line(
        &self,
        interrupt: Interrupt,
        act: impl FnOnce(&crate::line::Line<Notifier>) -> Option<bluff_reactor::Notice>,
    ) -> Result<(), Error> {
        let line = match interrupt {
            Interrupt::Intx => self.intx.as_ref().map(|intx| &*intx.line),
            Interrupt::Msix(index) => {
                let vectors = self.msix.as_ref().map(Msix::vectors);
                let vector = vectors.and_then(|all| all.get(usize::from(index)));
                vector.map(|vector| vector.line())
            }
        };
        let line = line.ok_or(Error::NoInterrupt(interrupt))?;
        self.events.note(interrupt, act(line));
        Ok(())
    }
}

impl<D: Device> PciFunction for Function<D> {
    fn layout(&self) -> &Layout {
        self.config.layout()
    }

    fn io_events(&mut self, bar: u8) -> Vec<IoEvent> {
        self.device.io_events(bar)
    }

    fn read(&mut self, region: Region, offset: u64, to: &mut [u8]) -> Result<(), Error> {
        to.fill(0xff);
        self.check(region, offset, to.len())?;
        match region {
            Region::Config => self.config.read(offset, to, self.live()),
            Region::Bar(bar) if self.answers(offset, to.len(), true) => {
                let table = self.msix.as_ref();
                if !table.is_some_and(|msix| msix.read(bar, offset, to)) {
                    self.device.read(bar, offset, to);
                }
            }
            Region::Bar(_) => {}
        }
        Ok(())
    }

    fn write(&mut self, region: Region, offset: u64, from: &[u8]) -> Result<Written, Error> {
        self.check(region, offset, from.len())?;
        match region {
            Region::Config if self.is_deaf() => {}
            Region::Config => return Ok(self.write_config(offset, from)),
            Region::Bar(bar) if self.answers(offset, from.len(), false) => {
                let table = self.msix.as_mut();
                if !table.is_some_and(|msix| msix.write(bar, offset, from)) {
                    self.device.write(bar, offset, from);
                }
            }
            Region::Bar(_) => {}
        }
        Ok(Written::Done)
    }

    fn settle(&mut self, bound: Duration, done: Done) {
        match std::mem::replace(&mut self.owed, Owed::Nothing) {
            Owed::Nothing => done(),
            Owed::Reset => self.begin_reset(ResetKind::FunctionLevel, bound, done),
            Owed::DmaOff => {
                let unsettled = self.unsettled.clone();
                unsettled.fetch_add(1, Ordering::AcqRel);
                let done = move || {
                    unsettled.fetch_sub(1, Ordering::AcqRel);
                    done();
                };
                self.device.set_dma(Dma::Off, bound, Box::new(done));
            }
        }
    }

    fn set_interrupt(
        &mut self,
        interrupt: Interrupt,
        notifier: Option<Notifier>,
    ) -> Result<(), Error> {
        self.at_line(interrupt, |line| line.connect(notifier))
    }

    fn mask_interrupt(&mut self, interrupt: Interrupt, masked: bool) -> Result<(), Error> {
        let why = match masked {
            true => reason::CLIENT,
            false => reason::CLIENT | reason::GIVEN,
        };
        self.at_line(interrupt, |line| line.set(why, masked))
    }

    fn trigger_interrupt(&mut self, interrupt: Interrupt) -> Result<(), Error> {
        self.at_line(interrupt, |line| line.trigger())
    }

    fn set_memory(&mut self, memory: Arc<GuestMemory>, bound: Duration, done: Done) {
        self.memory = memory;
        let dma = match self.dma {
            true => Dma::On(self.memory.clone()),
            // It may have been on a moment ago.
            false => Dma::Off,
        };
        self.device.set_dma(dma, bound, done);
    }

    fn reset(&mut self, bound: Duration, done: Done) {
        self.begin_reset(ResetKind::Conventional, bound, done);
    }

    fn detach(&mut self, bound: Duration, done: Done) {
        self.each_line(|line| {
            line.connect(None);
            line.unmask(reason::CLIENT);
        });
        self.memory = GuestMemory::empty();
        self.device.drop_io_events();
        self.begin_reset(ResetKind::Conventional, bound, done);
    }

    fn save(&self) -> Vec<u8> {
        State::save(
            &self.config,
            self.msix.as_ref(),
            self.intx.as_ref(),
            self.device.save(),
        )
    }

    fn load(&mut self, state: &[u8]) -> Result<(), Error> {
        let state = State::parse(state, self.layout().vectors)?;
        let mut config = self.config.clone();
        if !config.load(state.config, state.msix_told) {
            return Err(Error::State("a power state that does not exist"));
        }
        self.device.load(state.device)?;
        self.config = config;
        if let Some(msix) = &mut self.msix {
            msix.load(state.entries);
        }
        let controls = self.config.controls();
        self.gate(controls);
        // What was asked for, and not given before the end, is given now.
        for index in state.pending {
            self.at_line(Interrupt::Msix(index), |line| line.request())?;
        }
        if let Some(intx) = self.intx.as_ref().filter(|_| state.intx) {
            intx.assert();
        }
        if controls.bus_master {
            self.dma = true;
            let dma = Dma::On(self.memory.clone());
            self.device.set_dma(dma, Duration::ZERO, Box::new(|| {}));
        }
        Ok(())
    }

    fn on_event(&mut self, listener: Arc<dyn Fn(PciEvent) + Send + Sync>) {
        self.events.set(listener);
    }
}
