//! The controller as its PCI function sees it: registers and doorbells on the attachment's thread, everything else on reactors.
//!
//! ```text
//!   attachment --> Controller: Device ---- doorbell ------> Doorbells, and a wake
//!                     |  register                              of whom Routes names
//!                     v
//!                  Core: Registers --- effects: start, stop --> AdminWorker, on a reactor
//!                     ^                                            |
//!                     '---------- started, stopped, failed --------'
//! ```
//! Registers change when a host writes them, when queues have begun or ended, and when the subsystem is reset: each on its own thread, so they have a
//! lock, which no I/O takes.

mod core;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{self};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bluff_pci::config::{Identity as PciIdentity, Link, MsixPlace};
use bluff_pci::{Bar, ConfigSpace, Device, Dma, Done, Error, Function, IoEvent, Resources, Vector};
use bluff_reactor::{Handle, Poll};

pub(crate) use self::core::{Core, Routes};
use self::core::{Mailbox, lock};
use crate::admin::{Admin, ControllerOptions};
use crate::admin_worker::{AdminWorker, Message};
use crate::bells::Bells;
use crate::health::{Counters, Settings};
use crate::journal::Journal;
use crate::queue::{Doorbells, OFFSET};
use crate::registers::{Limits, Registers};
use crate::report::{QueueEvent, Shared};
use crate::spec::registers::Cap;
use crate::subsystem::{Membership, Subsystem, SubsystemError};

/// Class code: mass storage, non-volatile memory, NVM Express (PCIe Transport 1.1 §3.8.1.4).
const CLASS: u32 = 0x01_08_02;
/// The project owns no vendor ID. These are for experiments (QEMU, docs/specs/pci-ids.rst); drivers go by the class code.
const VENDOR: u16 = 0x1af4;
const DEVICE: u16 = 0x10f0;
/// The BAR of the MSI-X table and its pending bits.
const MSIX_BAR: u8 = 4;

/// How a controller runs.
#[derive(Clone, Debug)]
pub struct Runs {
    /// The reactors that its queues are spread over; at least one. The admin queues are on the first.
    pub reactors: Vec<Handle>,
    /// How its queues are polled. With [`Poll::Always`] the doorbells can be mapped by the host, and shadow doorbells are not offered.
    pub poll: Poll,
    /// How long queues may take to end when the host disables the controller or shuts it down, before what is in flight is cancelled.
    pub bound: Duration,
}

/// What of a controller outlives the process that serves it.
#[derive(Debug)]
pub enum Keep {
    /// Nothing.
    Nothing,
    /// Its [files](Controller::files), which are made now.
    Fresh,
    /// The files of a controller of the same subsystem, with the same options, that another process served. It goes on where that one ended when its function is
    /// [loaded](bluff_pci::PciFunction::load), and is as after power on where it is not.
    Restored(Vec<OwnedFd>),
}

/// Why a controller cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    /// Its subsystem does not take it.
    #[error(transparent)]
    Subsystem(#[from] SubsystemError),
    /// There is no memory for its doorbells.
    #[error("memory for doorbells")]
    Doorbells(#[source] io::Error),
    /// There is no memory for its journal, or what was restored is none.
    #[error("the journal")]
    Journal(#[source] io::Error),
}

/// A controller.
#[derive(Debug)]
pub struct Controller {
    core: Arc<Core>,
    membership: Membership,
    counters: Arc<Counters>,
    /// Doorbells by descriptor, since its host has asked for them.
    bells: Option<Bells>,
    queues: u16,
    runs: Runs,
    /// Another process has begun what is in the journal.
    restored: bool,
}

/// Its doorbells and its journal, and whether they are another process's.
struct Files {
    doorbells: Arc<Doorbells>,
    journal: Option<Arc<Journal>>,
    restored: bool,
}

impl Files {
    fn new(keep: Keep, queues: u16) -> Result<Self, ControllerError> {
        use ControllerError as E;
        let count = u32::from(queues) + 1;
        let fresh = || Doorbells::new(count).map_err(E::Doorbells);
        let (doorbells, journal, restored) = match keep {
            Keep::Nothing => (fresh()?, None, false),
            Keep::Fresh => {
                let journal = Journal::new(queues).map_err(E::Journal)?;
                (fresh()?, Some(journal), false)
            }
            Keep::Restored(files) => {
                let files: Result<[OwnedFd; 2], _> = files.try_into();
                let wrong = |_| E::Journal(io::ErrorKind::InvalidData.into());
                let [doorbells, journal] = files.map_err(wrong)?;
                let doorbells = Doorbells::open(doorbells, count).map_err(E::Doorbells)?;
                let journal = Journal::open(journal, queues).map_err(E::Journal)?;
                (doorbells, Some(journal), true)
            }
        };
        Ok(Self {
            doorbells,
            journal,
            restored,
        })
    }
}

impl Controller {
    /// A PCI function that is a controller of this subsystem.
    ///
    /// # Errors
    /// [`ControllerError`].
    ///
    /// # Panics
    /// Where there is no reactor, or the options have no queues.
    pub fn function(
        subsystem: &Arc<Subsystem>,
        options: ControllerOptions,
        runs: Runs,
    ) -> Result<Function<Self>, ControllerError> {
        Self::function_kept(subsystem, options, runs, Keep::Nothing)
    }

    /// As [`Controller::function`], one that another process can go on with.
    ///
    /// # Errors
    /// [`ControllerError`].
    ///
    /// # Panics
    /// As [`Controller::function`].
    pub fn function_kept(
        subsystem: &Arc<Subsystem>,
        options: ControllerOptions,
        runs: Runs,
        keep: Keep,
    ) -> Result<Function<Self>, ControllerError> {
        assert!(!runs.reactors.is_empty() && (1..=1023).contains(&options.queues));
        let options = ControllerOptions {
            vendor: VENDOR,
            subsystem_vendor: VENDOR,
            shadow_doorbells: runs.poll != Poll::Always,
            vectors: options.queues + 1,
            ..options
        };
        let Files {
            doorbells,
            journal,
            restored,
        } = Files::new(keep, options.queues)?;
        let config = config(&options, &runs, &doorbells);
        let queues = options.queues;
        let mut made = None;
        // Joining tells the controller its namespaces, so it has to be there first.
        let (sender, mailbox) = mpsc::channel();
        let to_admin = Mailbox {
            sender,
            waker: Arc::default(),
            reactor: runs.reactors[0].clone(),
        };
        let registers = Registers::new(Limits {
            cap: Cap {
                mqes_z: options.mqes_z,
                timeout: Cap::timeout_for(runs.bound),
                mps_min: 0,
                mps_max: options.mps_max,
            },
        });
        let core = Arc::new(Core {
            registers: Mutex::new(registers),
            stopped: Mutex::default(),
            routes: Mutex::new(Routes::new(queues)),
            doorbells: Mutex::new(doorbells),
            journal,
            admin: to_admin,
            subsystem: Arc::downgrade(subsystem),
            bound: runs.bound,
            rung_nowhere: AtomicBool::new(false),
            untaken: AtomicU32::new(0),
        });
        let weak = Arc::downgrade(&core);
        let membership = subsystem.join(move |event| {
            if let Some(core) = weak.upgrade() {
                core.hear(event);
            }
        })?;
        let counters = Arc::new(Counters::new(Instant::now()));
        counters.belong_to(Arc::downgrade(&core));
        let settings = Arc::new(Settings::new(options.vectors));
        let admin = Admin::new(
            Arc::new(options),
            subsystem.clone(),
            membership.id(),
            counters.clone(),
            settings.clone(),
            Instant::now(),
        );
        let weak = Arc::downgrade(&core);
        let shared = Shared::new(counters.clone(), move |event: QueueEvent| {
            if let Some(core) = weak.upgrade() {
                core.queue_event(event);
            }
        });
        let function = Function::new(config, |resources: Resources| {
            made = Some(resources.vectors);
            Self {
                core: core.clone(),
                membership,
                counters: counters.clone(),
                bells: None,
                queues,
                runs: runs.clone(),
                restored,
            }
        });
        let vectors: Vec<Vector> = made.expect("the function has made its device");
        AdminWorker::start(
            &core, mailbox, admin, settings, shared, counters, vectors, runs, restored,
        );
        Ok(function)
    }

    /// Its identifier in the subsystem (CNTLID).
    pub fn id(&self) -> u16 {
        self.membership.id()
    }

    /// Duplicates of its files, for whoever keeps them for the next process that serves it: [`Keep::Restored`]. None with [`Keep::Nothing`].
    ///
    /// # Errors
    /// Where there are no descriptors left.
    pub fn files(&self) -> io::Result<Vec<OwnedFd>> {
        match &self.core.journal {
            None => Ok(Vec::new()),
            Some(journal) => Ok(vec![
                self.core.doorbells().area().file.try_clone()?,
                journal.file()?,
            ]),
        }
    }

    /// What it counts.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Whether its host has enabled it, and it is ready (CSTS.RDY).
    pub fn is_ready(&self) -> bool {
        self.core.registers().csts() & crate::spec::registers::csts::RDY != 0
    }
}

/// Configuration space, with its BARs.
fn config(options: &ControllerOptions, runs: &Runs, doorbells: &Arc<Doorbells>) -> ConfigSpace {
    let identity = PciIdentity {
        vendor: options.vendor,
        device: DEVICE,
        subsystem_vendor: options.subsystem_vendor,
        subsystem: DEVICE,
        class: CLASS,
        revision: 1,
    };
    let area = doorbells.area().clone();
    let size = (area.offset + area.len).next_power_of_two();
    let registers = Bar::memory_64(size);
    let registers = match runs.poll {
        Poll::Always => registers.with_areas(vec![area]),
        // A mapped page cannot wake a sleeper.
        _ => registers,
    };
    let place = MsixPlace::in_bar(MSIX_BAR, 0, options.vectors);
    let table = (u64::from(place.pending) + 4096).next_power_of_two();
    ConfigSpace::builder(identity)
        .bar(0, registers)
        .bar(MSIX_BAR, Bar::memory_64(table))
        .power_management(true)
        .express(Link::default())
        .msix(options.vectors, place)
        .build()
}

impl Drop for Controller {
    /// Queues that still run are told to end, and not waited for: nothing is written to the host's memory after their cancelled operations.
    fn drop(&mut self) {
        self.core.admin.send(Message::End);
    }
}

impl Device for Controller {
    fn read(&mut self, bar: u8, offset: u64, to: &mut [u8]) {
        match bar {
            0 => self.core.registers().read(offset, to),
            _ => to.fill(0),
        }
    }

    fn write(&mut self, bar: u8, offset: u64, from: &[u8]) {
        match bar {
            0 if offset >= OFFSET => self.core.ring(offset, from),
            0 => self.core.write(offset, from),
            _ => {}
        }
    }

    fn set_dma(&mut self, dma: Dma, bound: Duration, done: Done) {
        self.core.admin.send(Message::Dma { dma, bound, done });
    }

    fn reset(&mut self, bound: Duration, done: Done) {
        let mut registers = self.core.registers();
        let safe = registers.is_safe();
        let effects = registers.reset();
        let stopping = registers.is_stopping();
        if stopping {
            lock(&self.core.stopped).push(done);
            self.core.carry_out(&registers, effects, bound);
            drop(registers);
            self.counters.power_cycled(safe);
            // A stop that was told before has its own bound; this one may be shorter.
            self.core.admin.send(Message::Hurry { bound });
            self.forget_memory(bound, Box::new(|| {}));
        } else {
            self.core.carry_out(&registers, effects, bound);
            drop(registers);
            self.counters.power_cycled(safe);
            self.forget_memory(bound, done);
        }
    }

    fn io_events(&mut self, bar: u8) -> Vec<IoEvent> {
        // Where another process may have to go on, the registers are those that it is given.
        let kept = self.core.journal.is_some();
        if bar != 0 || self.runs.poll == Poll::Always || kept {
            return Vec::new();
        }
        if self.bells.is_none() {
            let made = Bells::new(&self.core, self.queues, &self.runs.reactors);
            // Without them doorbells are messages.
            self.bells = made
                .inspect_err(|e| log::debug!("events of doorbells: {e}"))
                .ok();
        }
        let now = self.core.doorbells();
        self.bells
            .as_ref()
            .map_or_else(Vec::new, |bells| bells.io_events(&now))
    }

    fn drop_io_events(&mut self) {
        if let Some(bells) = self.bells.take() {
            *lock(&self.core.doorbells) = bells.into_next();
        }
    }

    /// All of it is in the files that are kept.
    fn load(&mut self, state: &[u8]) -> Result<(), Error> {
        if !state.is_empty() {
            return Err(Error::State("the device has none"));
        }
        let written = self.core.journal.as_ref().and_then(|j| j.registers());
        let Some(written) = written.filter(|_| self.restored) else {
            return Ok(());
        };
        let mut registers = self.core.registers();
        let effects = registers.load(written);
        let effects = effects.ok_or(Error::State("registers that cannot be"))?;
        self.core.carry_out(&registers, effects, self.core.bound);
        Ok(())
    }

    fn transactions_pending(&self) -> bool {
        let running = self.counters.running();
        let busy = |q: &crate::QueueCounters| q.in_flight.load(Ordering::Relaxed) > 0;
        running.iter().any(|(_, q)| busy(q))
    }
}

impl Controller {
    fn forget_memory(&self, bound: Duration, done: Done) {
        let dma = Dma::Off;
        self.core.admin.send(Message::Dma { dma, bound, done });
    }
}
