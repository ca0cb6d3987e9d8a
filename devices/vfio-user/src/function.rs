//! A PCI function as the target of a session.
//!
//! ```text
//!   Session --> PciTarget --> PciFunction
//!               regions        layout, read, write, settle
//!               map, unmap     an epoch of memory each
//!               set_irqs       a Notifier for each descriptor
//!               tickets <----- done, on any thread
//! ```
//!
//! # Bounds
//! QEMU gives each reply 5 s, and holds its big lock meanwhile. All that a command waits for, and those that came while it waited, has one
//! deadline: the function's bound (1 s) from its begin. What is in flight then is cancelled.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use bluff_attachment::descriptor;
use bluff_attachment::keeper::Descriptors;
use bluff_memory::{GuestMemory, MemoryError, RegionSpec, Rights, Windows};
use bluff_pci::{Bar, Done, Interrupt, PciFunction};
use bluff_reactor::{Distrust, Notifier};

use crate::record::{Record, Source, duplicate};
use crate::spec::{irq, region};
use crate::target::{
    IoEventFd, IrqAction, IrqChange, Irqs, Progress, Region, RegionMap, Target, Ticket, Written,
};
use crate::{Errno, Error, Limits, Mapping};

/// Mappings of the process that one client may have. Windows of 16 GiB, so more than the largest machines need; and far fewer than a process has.
pub(crate) const MAX_MAPPINGS: usize = 2048;
/// The sizes of configuration space (PCIe §7.2).
const CONFIG_SIZE: u64 = 4096;
/// Regions that go at once; with more, all others are copied.
const FEW: usize = 64;

/// Gives a ticket back to its session, from any thread.
pub type Finish = Arc<dyn Fn(Ticket) + Send + Sync>;

/// A PCI function that a session presents.
pub struct PciTarget {
    function: Box<dyn PciFunction>,
    regions: Vec<Region>,
    memory: Arc<GuestMemory>,
    windows: Windows,
    limits: Limits,
    distrust: Distrust,
    bound: Duration,
    deadline: Option<Instant>,
    finish: Finish,
    /// Interrupts that the client has masked: type and number.
    masked: BTreeSet<(u32, u32)>,
    /// Descriptors of interrupts, for the record; `None` where nobody keeps one.
    kept: Option<BTreeMap<(u32, u32), Kept>>,
    next_serial: u64,
}

/// The descriptor of an interrupt, and its number: no other one of this function has the same.
struct Kept {
    serial: u64,
    file: OwnedFd,
}

impl std::fmt::Debug for PciTarget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PciTarget")
            .field("memory", &self.memory.len())
            .finish_non_exhaustive()
    }
}

/// Whether a `done` was called, and who has to be told.
struct Pending(AtomicU8);

impl Pending {
    const RUNNING: u8 = 0;
    /// Over, before the call returned.
    const OVER: u8 = 1;
    /// The call has returned, and the ticket is waited for.
    const WAITED: u8 = 2;
}

impl PciTarget {
    /// A function as after power on. Commands wait for it at most `bound`, plus what cancelling takes; `finish` is called for those
    /// that do, on any thread.
    pub fn new(
        function: Box<dyn PciFunction>,
        limits: Limits,
        bound: Duration,
        finish: Finish,
    ) -> Self {
        let layout = function.layout();
        let bars = layout.bars.iter().map(|bar| bar.as_ref());
        let mut regions: Vec<_> = bars
            .map(|bar| bar.map_or_else(Region::default, of))
            .collect();
        regions.resize(region::PCI_COUNT as usize, Region::default());
        regions[region::PCI_CONFIG as usize] = Region {
            size: CONFIG_SIZE,
            read: true,
            write: true,
            map: None,
        };
        Self {
            function,
            regions,
            memory: GuestMemory::empty(),
            windows: Windows::new(MAX_MAPPINGS, limits.max_mapped),
            limits,
            distrust: Distrust::default(),
            bound,
            deadline: None,
            finish,
            masked: BTreeSet::new(),
            kept: None,
            next_serial: 0,
        }
    }

    /// Keeps what a record of the session needs. Descriptors for writes are not offered then: they would not outlive this process.
    pub fn keep(&mut self) {
        self.kept = Some(BTreeMap::new());
    }

    /// The file of a mapping that has one.
    pub(crate) fn file_of(&self, mapping: &Mapping) -> Option<(Source, BorrowedFd<'_>)> {
        if !mapping.file {
            return None;
        }
        let region = self.memory.regions_from(mapping.address).next()?;
        let mapping = region.mapping();
        Some((Source::Mapping(mapping.serial()), mapping.file().as_fd()))
    }

    /// The descriptors of interrupts: type, number, and what they are recorded as.
    pub(crate) fn interrupts(&self) -> impl Iterator<Item = (u32, u32, Source, BorrowedFd<'_>)> {
        let all = self.kept.iter().flatten();
        all.map(|((index, vector), kept)| {
            let source = Source::Interrupt(kept.serial);
            (*index, *vector, source, kept.file.as_fd())
        })
    }

    /// Interrupts that the client has masked.
    pub(crate) fn masked(&self) -> impl Iterator<Item = (u32, u32)> {
        self.masked.iter().copied()
    }

    /// Goes on where another process ended: memory, interrupts and their masks, then the function's state.
    pub(crate) fn resume(&mut self, record: &Record, files: &Descriptors) -> Result<(), Error> {
        let mut memory = GuestMemory::empty();
        for (mapping, key) in &record.mappings {
            if let Some(key) = key {
                let region = self.region_of(mapping, duplicate(files, *key)?);
                memory = region
                    .and_then(|region| memory.with(region))
                    .map_err(|e| Error::Target(errno(&e)))?;
            }
        }
        self.memory = memory.clone();
        // Nothing runs yet, and what begins with the state is told of memory in order.
        self.function
            .set_memory(memory, self.bound, Box::new(|| {}));
        for (index, vector, key) in &record.interrupts {
            self.exists(*index, *vector)?;
            let change = IrqChange::Assign {
                action: IrqAction::Trigger,
                start: *vector,
                files: vec![Some(duplicate(files, *key)?)],
            };
            self.set_irqs(*index, change).map_err(Error::Target)?;
        }
        for (index, vector) in &record.masked {
            self.exists(*index, *vector)?;
            let change = IrqChange::Now {
                action: IrqAction::Mask,
                vectors: vec![*vector],
            };
            self.set_irqs(*index, change).map_err(Error::Target)?;
        }
        let loaded = self.function.load(&record.function);
        loaded.map_err(|_| Error::Recorded("the function's state"))
    }

    fn exists(&self, index: u32, vector: u32) -> Result<(), Error> {
        let there = index < self.irq_types() && vector < self.irqs(index).count;
        there
            .then_some(())
            .ok_or(Error::Recorded("an interrupt that is not there"))
    }

    fn region_of(
        &mut self,
        mapping: &Mapping,
        file: OwnedFd,
    ) -> Result<bluff_memory::Region, MemoryError> {
        let spec = RegionSpec {
            guest: mapping.address,
            len: mapping.size,
            user: mapping.address,
            offset: mapping.offset,
            file,
        };
        let rights = Rights {
            read: mapping.read,
            write: mapping.write,
        };
        bluff_memory::Region::within(spec, rights, &mut self.windows)
    }

    /// The function.
    pub fn function(&self) -> &dyn PciFunction {
        &*self.function
    }

    /// The function, without its attachment.
    pub fn into_function(self) -> Box<dyn PciFunction> {
        self.function
    }

    /// What the function may use of the client's memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Whether the client has shrunk its memory: it is to be ended.
    pub fn is_poisoned(&self) -> bool {
        self.memory.is_poisoned()
    }

    /// Does something that takes up to what is left of the command's time.
    fn wait(
        &mut self,
        ticket: Ticket,
        call: impl FnOnce(&mut dyn PciFunction, Duration, Done),
    ) -> Progress {
        let now = Instant::now();
        let deadline = *self.deadline.get_or_insert(now + self.bound);
        let pending = Arc::new(Pending(AtomicU8::new(Pending::RUNNING)));
        let done = {
            let (pending, finish) = (pending.clone(), self.finish.clone());
            move || {
                if pending.0.swap(Pending::OVER, Ordering::AcqRel) == Pending::WAITED {
                    finish(ticket);
                }
            }
        };
        let left = deadline.saturating_duration_since(now);
        call(&mut *self.function, left, Box::new(done));
        match pending.0.swap(Pending::WAITED, Ordering::AcqRel) {
            Pending::OVER => Progress::Done,
            _ => Progress::Pending,
        }
    }
}

/// A BAR as a region. Of its areas those are offered that can be: in one file, in which the BAR begins at one place.
fn of(bar: &Bar) -> Region {
    let base = |area: &bluff_pci::Area| area.file_offset.checked_sub(area.offset);
    let first = bar.areas.iter().find(|area| base(area).is_some());
    let map = first.map(|first| RegionMap {
        file: first.file.clone(),
        offset: base(first).expect("that is how it was found"),
        areas: (bar.areas.iter())
            .filter(|area| Arc::ptr_eq(&area.file, &first.file) && base(area) == base(first))
            .map(|area| (area.offset, area.len))
            .collect(),
    });
    Region {
        size: bar.size,
        read: true,
        write: true,
        map,
    }
}

/// The function's own name of a region that is there.
fn name(index: u32) -> bluff_pci::Region {
    match index {
        region::PCI_CONFIG => bluff_pci::Region::Config,
        // There are six of them, and of the others only configuration space has any bytes.
        bar => bluff_pci::Region::Bar(bar as u8),
    }
}

/// The function's own name of an interrupt that is there; of other types than these two it has none.
fn interrupt(index: u32, vector: u32) -> Option<Interrupt> {
    match index {
        irq::INTX => Some(Interrupt::Intx),
        // At most 2048.
        irq::MSIX => Some(Interrupt::Msix(vector as u16)),
        _ => None,
    }
}

fn errno(error: &MemoryError) -> Errno {
    match error {
        MemoryError::TooMany(_) | MemoryError::TooLarge(_) => Errno::NOSPC,
        MemoryError::Map(e) | MemoryError::Stat(e) => {
            e.raw_os_error().map_or(Errno::INVAL, Errno::new)
        }
        _ => Errno::INVAL,
    }
}

impl Target for PciTarget {
    fn begin(&mut self) {
        self.deadline = None;
    }

    fn regions(&self) -> u32 {
        region::PCI_COUNT
    }

    fn region(&self, index: u32) -> Region {
        self.regions[index as usize].clone()
    }

    fn io_event_fds(&mut self, index: u32) -> Vec<IoEventFd> {
        let bluff_pci::Region::Bar(bar) = name(index) else {
            return Vec::new();
        };
        if self.regions[index as usize].size == 0 || self.kept.is_some() {
            return Vec::new();
        }
        let events = self.function.io_events(bar).into_iter();
        let all = events.map(|io| IoEventFd {
            offset: io.offset,
            size: io.len.into(),
            value: io.value,
            file: io.event,
            store: io.store,
        });
        all.collect()
    }

    fn irq_types(&self) -> u32 {
        irq::PCI_COUNT
    }

    fn irqs(&self, index: u32) -> Irqs {
        let layout = self.function.layout();
        let (count, flags) = match index {
            irq::INTX => (
                u32::from(layout.intx),
                irq::EVENTFD | irq::MASKABLE | irq::AUTOMASKED,
            ),
            irq::MSIX => (layout.vectors.into(), irq::EVENTFD),
            // QEMU warns where there is none. Nothing is ever signalled.
            irq::ERR => (1, irq::EVENTFD),
            _ => (0, 0),
        };
        Irqs { count, flags }
    }

    fn read(&mut self, region: u32, offset: u64, to: &mut [u8]) -> Result<(), Errno> {
        let read = self.function.read(name(region), offset, to);
        read.map_err(|_| Errno::INVAL)
    }

    fn write(
        &mut self,
        region: u32,
        offset: u64,
        from: &[u8],
        ticket: Ticket,
    ) -> Result<Written, Errno> {
        let written = self.function.write(name(region), offset, from);
        Ok(match written.map_err(|_| Errno::INVAL)? {
            bluff_pci::Written::Done => Written::Done,
            bluff_pci::Written::Unsettled => {
                let progress = self.wait(ticket, |function, bound, done| {
                    function.settle(bound, done);
                });
                Written::Unsettled(progress)
            }
        })
    }

    fn set_irqs(&mut self, index: u32, change: IrqChange) -> Result<(), Errno> {
        let count = self.irqs(index).count;
        let mut duplicates = self.duplicates(&change)?;
        let all = (0..count).filter_map(|vector| interrupt(index, vector));
        self.note_mask(index, &change);
        let assigned = match &change {
            IrqChange::Assign {
                action: IrqAction::Trigger,
                start,
                files,
            } => Some((*start, files.len())),
            _ => None,
        };
        let disabled = matches!(change, IrqChange::Disable);
        let done = match change {
            IrqChange::Disable => all.into_iter().try_for_each(|interrupt| {
                self.function.set_interrupt(interrupt, None)?;
                // Whoever sets it again does not know of the mask.
                self.function.mask_interrupt(interrupt, false)
            }),
            IrqChange::Now { action, vectors } => vectors
                .into_iter()
                .filter_map(|vector| interrupt(index, vector))
                .try_for_each(|interrupt| match action {
                    IrqAction::Trigger => self.function.trigger_interrupt(interrupt),
                    IrqAction::Mask => self.function.mask_interrupt(interrupt, true),
                    IrqAction::Unmask => self.function.mask_interrupt(interrupt, false),
                }),
            IrqChange::Assign {
                action: IrqAction::Trigger,
                start,
                files,
            } => {
                let notifiers = files.into_iter().map(|file| self.notifier(file));
                // All of them first: where one is refused nothing has changed.
                let notifiers = notifiers.collect::<Result<Vec<_>, _>>()?;
                (start..).zip(notifiers).try_for_each(|(vector, notifier)| {
                    match interrupt(index, vector) {
                        Some(interrupt) => self.function.set_interrupt(interrupt, notifier),
                        None => Ok(()),
                    }
                })
            }
            // Masking by descriptor is KVM's short way for INTx; QEMU does without.
            IrqChange::Assign { files, .. } => {
                return match files.iter().all(Option::is_none) {
                    true => Ok(()),
                    false => Err(Errno::NOTSUP),
                };
            }
        };
        // They are those of its layout.
        done.map_err(|_| Errno::INVAL)?;
        let Some(kept) = &mut self.kept else {
            return Ok(());
        };
        if disabled {
            kept.retain(|(of, _), _| *of != index);
        }
        if let Some((start, count)) = assigned {
            for vector in (start..).take(count) {
                kept.remove(&(index, vector));
                if let Some(Some(file)) = duplicates.next() {
                    let serial = self.next_serial;
                    self.next_serial += 1;
                    kept.insert((index, vector), Kept { serial, file });
                }
            }
        }
        Ok(())
    }

    fn map(
        &mut self,
        mapping: Mapping,
        file: Option<OwnedFd>,
        ticket: Ticket,
    ) -> Result<Progress, Errno> {
        let Some(file) = file else {
            // Nothing of it can be mapped: DMA that goes there fails.
            return Ok(Progress::Done);
        };
        let region = self.region_of(&mapping, file);
        let memory = region.and_then(|region| self.memory.with(region));
        let memory = memory.map_err(|e| errno(&e))?;
        self.memory = memory.clone();
        Ok(self.wait(ticket, |function, bound, done| {
            function.set_memory(memory, bound, done);
        }))
    }

    fn unmap(&mut self, gone: &[Mapping], ticket: Ticket) -> Progress {
        let mut with_file = gone.iter().filter(|m| m.file);
        let memory = match with_file.clone().count() {
            0 => return Progress::Done,
            n if n == self.memory.len() => GuestMemory::empty(),
            1..=FEW => with_file.fold(self.memory.clone(), |memory, m| {
                memory.without(m.address).expect("a region that was mapped")
            }),
            _ => {
                // They are all that is mapped within a range, by address.
                let first = with_file.next().map_or(0, |m| m.address);
                let last = with_file.next_back().map_or(first, |m| m.address);
                self.memory.without_range(first, last)
            }
        };
        self.memory = memory.clone();
        self.wait(ticket, |function, bound, done| {
            function.set_memory(memory, bound, done);
        })
    }

    fn reset(&mut self, ticket: Ticket) -> Progress {
        self.wait(ticket, |function, bound, done| function.reset(bound, done))
    }

    fn disconnected(&mut self, ticket: Ticket) -> Progress {
        self.deadline = None;
        self.memory = GuestMemory::empty();
        self.masked.clear();
        self.kept.iter_mut().for_each(BTreeMap::clear);
        self.windows = Windows::new(MAX_MAPPINGS, self.limits.max_mapped);
        self.wait(ticket, |function, bound, done| function.detach(bound, done))
    }
}

impl PciTarget {
    /// For the record, one for each descriptor that is assigned.
    fn duplicates(&self, change: &IrqChange) -> Result<std::vec::IntoIter<Option<OwnedFd>>, Errno> {
        let files = match change {
            IrqChange::Assign { files, .. } if self.kept.is_some() => &files[..],
            _ => &[],
        };
        let one = |file: &Option<OwnedFd>| file.as_ref().map(OwnedFd::try_clone).transpose();
        let all = files.iter().map(one).collect::<Result<Vec<_>, _>>();
        all.map(Vec::into_iter).map_err(|_| Errno::IO)
    }

    fn note_mask(&mut self, index: u32, change: &IrqChange) {
        match change {
            IrqChange::Disable => self.masked.retain(|(of, _)| *of != index),
            IrqChange::Now { action, vectors } => {
                for vector in vectors {
                    match action {
                        IrqAction::Mask => drop(self.masked.insert((index, *vector))),
                        IrqAction::Unmask => drop(self.masked.remove(&(index, *vector))),
                        IrqAction::Trigger => {}
                    }
                }
            }
            IrqChange::Assign { .. } => {}
        }
    }

    /// An eventfd only: whatever else a client sends may never take what is written to it.
    fn notifier(&self, file: Option<OwnedFd>) -> Result<Option<Notifier>, Errno> {
        let Some(file) = file else {
            return Ok(None);
        };
        let number = |e: std::io::Error| e.raw_os_error().map_or(Errno::INVAL, Errno::new);
        descriptor::set_event(file.as_fd()).map_err(number)?;
        let event = descriptor::event_fd(file);
        Notifier::of(event, &self.distrust)
            .map(Some)
            .map_err(number)
    }
}
