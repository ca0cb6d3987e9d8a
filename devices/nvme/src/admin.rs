//! The admin side of a controller, without rings and threads: a command in, an outcome out (Base 2.1 §5).
//!
//! ```text
//!   admin worker: fetches, copies ---> transfer: how many bytes go where
//!                                        |  data from the host, where it takes some
//!                                        v
//!                                      execute ---> Done | Failed | Held | Queue | Format
//!                                        ^                            |
//!   Subsystem --- handle_event ----------+       poll_event <---------+ an event request can be answered
//!   workers ---- report_error, report_doorbell --+
//! ```
//!
//! A command is parsed into a [`Request`] first; everything that can be refused without the state is refused there.

mod errors;
mod events;
mod features;
mod format;
mod identify;
mod logs;
mod options;
mod parse;
mod saved;
#[cfg(test)]
pub(crate) mod tests;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::attached::Table;
use crate::health::{Counters, Settings};
use crate::queues::QueueTable;
use crate::spec::admin::{RawAbort, RawCreateCq, RawCreateSq};
use crate::spec::{Command, Status};
use crate::subsystem::{Subsystem, SubsystemEvent};

use errors::ErrorLog;
pub(crate) use errors::ErrorReport;
use events::{Event, Events};
use features::Features;
pub(crate) use format::{Erase, FormatCommand};
pub use options::{CommandLimits, ControllerOptions};
use parse::Request;
pub(crate) use saved::Saved;

/// What a command moves, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transfer {
    /// Nothing.
    None,
    /// So many from the host.
    FromHost(usize),
    /// So many to the host.
    ToHost(usize),
}

/// What becomes of a command.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Answer now: dword 0, and just as many bytes for the host as [`Admin::transfer`] said.
    Done {
        /// Dword 0 of the completion.
        dw0: u32,
        /// For the host.
        data: Vec<u8>,
    },
    /// Answer with this.
    Failed(Status),
    /// Kept: an asynchronous event request. [`Admin::poll_event`] or [`Admin::abort_event`] gives it back.
    Held,
    /// The worker does it, and answers when it is done.
    Queue(QueueCommand),
    /// All I/O of the namespaces ends, they are erased and have a new format: [`Subsystem::begin_format`].
    Format(FormatCommand),
}

/// What concerns queues. Their fields are not checked against each other: [`QueueTable`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QueueCommand {
    /// [`QueueTable::create_cq`].
    CreateCq(RawCreateCq),
    /// [`QueueTable::create_sq`].
    CreateSq(RawCreateSq),
    /// [`QueueTable::delete_sq`].
    DeleteSq(u16),
    /// [`QueueTable::delete_cq`].
    DeleteCq(u16),
    /// [`QueueTable::abort`]; when it is answered, [`Admin::abort_done`]. Dword 0 is 0 where the command was aborted, 1 where it was not.
    Abort(RawAbort),
    /// Shadow doorbells and event indices, at these addresses; each a page, and aligned to one (§5.2.5).
    DoorbellBuffer {
        /// The host writes its doorbells there, too.
        shadow: u64,
        /// The controller says there when it wants to be rung.
        event: u64,
    },
}

/// What was wrong with a doorbell that the host rang (§5.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BadDoorbell {
    /// There is no such queue.
    Queue,
    /// The value is not below the queue's size, or says that it has more than it can.
    Value,
}

/// The admin side of a controller.
#[derive(Debug)]
pub(crate) struct Admin {
    options: Arc<ControllerOptions>,
    subsystem: Arc<Subsystem>,
    id: u16,
    counters: Arc<Counters>,
    settings: Arc<Settings>,
    /// The I/O queues.
    pub queues: QueueTable,
    /// CC.MPS's page in bytes, of this run.
    page: u64,
    table: Arc<Table>,
    /// A volatile cache was there when the controller was enabled. What comes later is written through, as the host need not flush.
    has_cache: bool,
    features: Features,
    errors: ErrorLog,
    events: Events,
    changed: logs::ChangedNamespaces,
    ana_changes: u64,
    /// Abort commands that are not answered.
    aborts: usize,
}

impl Admin {
    /// Of controller `id`. Its table comes with [`Admin::handle_event`]; then [`Admin::reset`] begins a run.
    ///
    /// # Panics
    /// Where the options are not valid.
    pub fn new(
        options: Arc<ControllerOptions>,
        subsystem: Arc<Subsystem>,
        id: u16,
        counters: Arc<Counters>,
        settings: Arc<Settings>,
        now: Instant,
    ) -> Self {
        assert!(options.is_valid(), "{options:?}");
        let queues = QueueTable::new(options.queues, options.mqes_z, options.vectors);
        let features = Features::new(now);
        Self {
            options,
            subsystem,
            id,
            counters,
            settings,
            queues,
            page: 4096,
            table: Arc::default(),
            has_cache: false,
            features,
            errors: ErrorLog::default(),
            events: Events::default(),
            changed: logs::ChangedNamespaces::default(),
            ana_changes: 0,
            aborts: 0,
        }
    }

    /// A controller level reset is over, and a run with pages of `page` bytes begins: features are at their defaults, logs that do not outlive it are empty, event requests are
    /// forgotten, and there are no I/O queues (Base 2.1 §3.7.2).
    pub fn reset(&mut self, page: u64, now: Instant) {
        self.page = page;
        self.queues.reset();
        self.features.reset(now);
        self.errors.clear();
        self.events = Events::default();
        self.changed = logs::ChangedNamespaces::default();
        self.aborts = 0;
        self.has_cache = self
            .table
            .iter()
            .any(|namespace| namespace.geometry.volatile_cache);
        self.settings.reset(self.has_cache);
    }

    /// What the command moves. To be asked before its data pointer is looked at.
    ///
    /// # Errors
    /// What it is refused with.
    pub fn transfer(&self, command: &Command) -> Result<Transfer, Status> {
        let transfer = self.parse(command)?.transfer();
        match transfer {
            // MDTS holds for admin commands as well (§5.1.13.2.1).
            Transfer::FromHost(len) | Transfer::ToHost(len) if len > self.options.max_transfer => {
                Err(Status::INVALID_FIELD)
            }
            _ => Ok(transfer),
        }
    }

    fn parse(&self, command: &Command) -> Result<Request, Status> {
        Request::parse(command, self.options.shadow_doorbells, self.page)
    }

    /// Does it. `data`: what came from the host, as long as [`Admin::transfer`] said.
    pub fn execute(&mut self, command: &Command, data: &[u8], now: Instant) -> Outcome {
        match self.dispatch(command, data, now) {
            Ok(outcome) => outcome,
            Err(status) => Outcome::Failed(status),
        }
    }

    fn dispatch(
        &mut self,
        command: &Command,
        data: &[u8],
        now: Instant,
    ) -> Result<Outcome, Status> {
        let transfer = self.transfer(command)?;
        if let Transfer::FromHost(len) = transfer
            && data.len() != len
        {
            return Err(Status::DATA_TRANSFER_ERROR);
        }
        let done = |dw0, data: Vec<u8>| Ok(Outcome::Done { dw0, data });
        let outcome = match self.parse(command)? {
            Request::Identify(identify) => done(0, self.identify(&identify)?),
            Request::GetLogPage(log) => done(0, self.log_page(&log, now)?),
            Request::GetFeatures(feature, select) => {
                let (dw0, data) = self.get_feature(&feature, select, now)?;
                done(dw0, data)
            }
            Request::SetFeatures(feature) => {
                done(self.set_feature(&feature, data, now)?, Vec::new())
            }
            Request::Event => {
                let limit = usize::from(self.options.event_requests_z) + 1;
                self.events.request(command.cid.get(), limit)?;
                Ok(Outcome::Held)
            }
            Request::Abort(abort) => {
                if self.aborts > self.options.aborts_z.into() {
                    return Err(Status::ABORT_LIMIT);
                }
                self.aborts += 1;
                Ok(Outcome::Queue(QueueCommand::Abort(abort)))
            }
            Request::Queue(queue) => Ok(Outcome::Queue(queue)),
            Request::Format(raw) => self.format(&raw).map(Outcome::Format),
        }?;
        if let (Transfer::ToHost(len), Outcome::Done { data, .. }) = (transfer, &outcome) {
            assert_eq!(data.len(), len, "as many bytes as the host was promised");
        }
        Ok(outcome)
    }

    /// An Abort command was answered.
    ///
    /// # Panics
    /// Where there was none.
    pub fn abort_done(&mut self) {
        self.aborts = self.aborts.checked_sub(1).expect("an Abort under way");
    }

    /// Gives an event request back, so that it can be completed with [`Status::ABORT_REQUESTED`]; `false`: there is none with this
    /// identifier.
    pub fn abort_event(&mut self, cid: u16) -> bool {
        self.events.withdraw(cid)
    }

    /// An event request that can be completed now: its identifier and dword 0.
    pub fn poll_event(&mut self) -> Option<(u16, u32)> {
        let warning = self.warning();
        self.events.health(warning, self.features.events_enabled());
        self.events.poll()
    }

    /// The subsystem has changed. What comes of it for workers (the table, a drain, a reset) is the caller's affair.
    pub fn handle_event(&mut self, event: &SubsystemEvent) {
        match event {
            SubsystemEvent::Table(table) => self.table = table.clone(),
            SubsystemEvent::NamespaceChanged(nsid) => {
                self.changed.add(*nsid);
                self.events
                    .report(Event::NamespaceChanged, self.features.events_enabled());
            }
            SubsystemEvent::AnaChanged => {
                self.ana_changes = self.ana_changes.wrapping_add(1);
                self.events
                    .report(Event::AnaChanged, self.features.events_enabled());
            }
            SubsystemEvent::Drain(..) | SubsystemEvent::Reset => {}
        }
    }

    /// A command has failed, and the error log is to say why. The completion may then have the bit "More".
    pub fn report_error(&mut self, report: &ErrorReport) {
        let count = self.counters.error_entries.load(Ordering::Relaxed);
        let count = count.wrapping_add(1);
        self.counters.error_entries.store(count, Ordering::Relaxed);
        self.errors.push(count, report);
    }

    /// The host rang a doorbell that is none, or with a value that cannot be.
    pub fn report_doorbell(&mut self, what: BadDoorbell, sqid: Option<u16>) {
        self.report_error(&ErrorReport::doorbell(sqid));
        let event = match what {
            BadDoorbell::Queue => Event::BadDoorbellQueue,
            BadDoorbell::Value => Event::BadDoorbellValue,
        };
        self.events.report(event, self.features.events_enabled());
    }

    /// Its controller's identifier.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// The largest valid NSID (NN).
    pub fn highest(&self) -> u32 {
        self.subsystem.options().max_namespaces
    }

    /// Its namespaces.
    pub fn table(&self) -> &Arc<Table> {
        &self.table
    }
}
