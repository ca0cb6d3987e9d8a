//! NVMe functions, and the subsystems that they are controllers of.

use std::collections::BTreeMap;
use std::error::Error;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bluff_attachment::keeper::{Descriptors, Keeper};
use bluff_attachment::limit::Limit;
use bluff_nvme::{
    Controller, ControllerError, ControllerOptions, Counters, Identity, Keep, NamespaceOptions,
    QueueCounters, Runs, Subsystem, SubsystemOptions,
};
use bluff_vfio_user::keeper::BOUNDS;
use bluff_vfio_user::{Attachment, AttachmentEvent, Options, Record, Resume};

use super::formats::ByControl;
use super::{Data, Stands};
use crate::message::{FromData, SessionInfo, record};
use crate::spec::{
    DeviceSpec, FunctionSpec, Id, NamespaceSpec, SERIAL_MAX, SubsystemKey as Key, SubsystemSpec,
};
use crate::stats::{FunctionStatistics, QueueStatistics};

/// How many NSIDs a subsystem has at least (NN): firmware asks for each in turn.
const NSIDS: u32 = 256;

/// A subsystem, while a function is in it.
#[derive(Debug)]
pub(super) struct OpenSubsystem {
    subsystem: Arc<Subsystem>,
    keeper: Arc<ByControl>,
    nqn: String,
    /// The volumes of its namespaces, by NSID.
    volumes: BTreeMap<u32, Id>,
    users: usize,
}

impl OpenSubsystem {
    pub(super) fn stands_on(&self, volume: &Id) -> bool {
        self.volumes.values().any(|id| id == volume)
    }
}

/// An NVMe function.
#[derive(Debug)]
pub(super) struct Nvme {
    pub(super) key: Key,
    pub(super) counters: Arc<Counters>,
    pub(super) messages: Arc<bluff_vfio_user::Counters>,
    /// The reactors that its queues are spread over.
    pub(super) reactors: Vec<u16>,
    /// Descriptors of a session that it will go on with.
    pub(super) restored: Descriptors,
    /// Whether its controller was another data half's, so that it can go on with a session.
    goes_on: bool,
}

impl Nvme {
    /// The front end that control has handed over, in mid-session where something is recorded.
    pub(super) fn resume(&mut self, descriptors: Vec<OwnedFd>) -> Result<Resume> {
        let files = std::mem::take(&mut self.restored);
        let mut descriptors = descriptors.into_iter();
        let socket = descriptors.next().context("no connection came along")?;
        let recorded = match descriptors.next() {
            None => None,
            Some(state) => {
                // What its controller has done, and the doorbells that its host may have mapped, are nowhere else.
                ensure!(self.goes_on, "its controller's files are gone");
                let state = record::read(state.as_fd(), BOUNDS.record);
                let state = state.context("the record of its session")?;
                Some((Record::from_bytes(&state)?, files))
            }
        };
        // One session: the next one finds the controller as new, in this process as in another.
        self.goes_on = false;
        Ok(Resume {
            socket: UnixStream::from(socket),
            recorded,
        })
    }

    pub(super) fn statistics(&self, id: &Id) -> FunctionStatistics {
        let queue = |(qid, counters): (u16, Arc<QueueCounters>)| {
            let get = |cell: &AtomicU64| cell.load(Ordering::Relaxed);
            let queue = qid.saturating_sub(1);
            QueueStatistics {
                queue,
                reactor: self.reactors[usize::from(queue) % self.reactors.len()],
                reads: get(&counters.reads),
                writes: get(&counters.writes),
                flushes: get(&counters.flushes),
                discards: get(&counters.discards),
                read_bytes: get(&counters.bytes_read),
                written_bytes: get(&counters.bytes_written),
                errors: get(&counters.errors),
                in_flight: u32::try_from(get(&counters.in_flight)).unwrap_or(u32::MAX),
                ..QueueStatistics::default()
            }
        };
        FunctionStatistics {
            function: id.clone(),
            messages: Some(self.messages.total()),
            queues: self.counters.running().into_iter().map(queue).collect(),
            net: None,
        }
    }
}

impl Data {
    pub(super) fn attach_nvme(
        &mut self,
        id: &Id,
        spec: FunctionSpec,
        subsystem: Option<SubsystemSpec>,
        order: &[usize],
        files: Vec<OwnedFd>,
    ) -> Result<Vec<OwnedFd>> {
        let DeviceSpec::Nvme {
            subsystem: used,
            serial,
        } = spec.device
        else {
            unreachable!("asked for by its kind");
        };
        let key = used.key(id);
        let subsystem = subsystem.context("no subsystem came along")?;
        let open = self.subsystem(&key, &subsystem)?;
        let mut serial = serial.unwrap_or_else(|| id.to_string());
        serial.truncate(SERIAL_MAX);
        let options = ControllerOptions {
            queues: spec.queues,
            ..ControllerOptions::new(serial)
        };
        let bound = Duration::from_millis(spec.stop_timeout_ms.into());
        let runs = Runs {
            reactors: order
                .iter()
                .map(|&i| self.reactors[i].handle.clone())
                .collect(),
            poll: self.poll(spec.poll),
            bound,
        };
        let mut goes_on = !files.is_empty();
        let keep = match (self.keeps, goes_on) {
            (false, _) => Keep::Nothing,
            (true, false) => Keep::Fresh,
            (true, true) => Keep::Restored(files),
        };
        let make = |keep| Controller::function_kept(&open, options.clone(), runs.clone(), keep);
        let mut function = make(keep);
        // Another version wrote them, or a process in a host's hand: that host loses its session, and the function is there for the next one.
        if let Err(e @ (ControllerError::Journal(_) | ControllerError::Doorbells(_))) = &function
            && goes_on
        {
            log::error!(
                "function {id}: what was kept of it cannot be used: {e}: {:?}",
                e.source()
            );
            goes_on = false;
            function = make(Keep::Fresh);
        }
        let function = function.inspect_err(|_| self.forget_unused());
        let function = function.context("the controller")?;
        let fresh = match goes_on {
            true => Ok(Vec::new()),
            false => function.device().files(),
        };
        let fresh = fresh.inspect_err(|_| self.forget_unused());
        let fresh = fresh.context("the controller's files")?;
        let counters = function.device().counters().clone();
        let attachment = self.nvme_attachment(id, Box::new(function), bound);
        let messages = attachment.counters();
        let added = self.vfio.handle().add(attachment);
        added.context("the thread of vfio-user sessions")?;
        if let Some(open) = self.subsystems.get_mut(&key) {
            open.users += 1;
        }
        let nvme = Nvme {
            key,
            counters,
            messages,
            reactors: order.iter().map(|i| *i as u16).collect(),
            restored: Descriptors::new(),
            goes_on,
        };
        self.functions.insert(id.clone(), Stands::Nvme(nvme));
        Ok(fresh)
    }

    fn nvme_attachment(
        &self,
        id: &Id,
        function: Box<dyn bluff_pci::PciFunction>,
        bound: Duration,
    ) -> Attachment {
        let (teller, name) = (self.teller.clone(), id.clone());
        let limit = Mutex::new(Limit::default());
        let listener = Arc::new(move |_: &str, event| {
            let warn = |line: std::fmt::Arguments<'_>| {
                let mut limit = limit.lock().expect("logging does not panic");
                limit.warn(Instant::now(), format_args!("function {name}"), line);
            };
            let function = name.clone();
            match event {
                AttachmentEvent::Connected => {
                    let session = SessionInfo::default();
                    teller.tell(0, FromData::FrontEnd { function, session });
                }
                AttachmentEvent::Negotiated => {}
                AttachmentEvent::Disconnected(reason) => {
                    teller.tell(0, FromData::FrontEndGone { function, reason });
                }
                AttachmentEvent::Refused => {
                    warn(format_args!("a front end too many was handed over"));
                }
                AttachmentEvent::Failed(cause) => warn(format_args!("{cause}")),
            }
        });
        let options = Options {
            bound,
            keeper: (self.keeps).then(|| Box::new(self.recorder(id)) as Box<dyn Keeper>),
            ..Options::default()
        };
        Attachment::new(id.to_string(), function, options, listener)
    }

    /// The subsystem, which is made for its first function.
    fn subsystem(&mut self, key: &Key, spec: &SubsystemSpec) -> Result<Arc<Subsystem>> {
        if let Some(open) = self.subsystems.get(key) {
            return Ok(open.subsystem.clone());
        }
        let nqn = spec.nqn.clone().context("the subsystem has no name")?;
        // What control has sent with the function may be older than what it answers.
        ensure!(
            !self.records.are_awaited(key),
            "a format of its subsystem is being recorded"
        );
        let keeper = Arc::new(ByControl::new(key, &self.records, &self.teller));
        let highest = spec.namespaces.iter().map(|n| n.nsid).max();
        let options = SubsystemOptions {
            nqn: nqn.clone(),
            shared: matches!(key, Key::Shared(_)),
            max_namespaces: highest.unwrap_or(0).max(NSIDS),
            keeper: Some(keeper.clone()),
        };
        let mut open = OpenSubsystem {
            subsystem: Subsystem::new(options)?,
            keeper,
            nqn,
            volumes: BTreeMap::new(),
            users: 0,
        };
        for namespace in &spec.namespaces {
            self.add_to(&mut open, namespace)?;
        }
        let subsystem = open.subsystem.clone();
        self.subsystems.insert(key.clone(), open);
        Ok(subsystem)
    }

    fn add_to(&self, open: &mut OpenSubsystem, namespace: &NamespaceSpec) -> Result<()> {
        let volume = self.volume(&namespace.volume)?.clone();
        // The same volume under the same name is the same namespace, wherever a host finds it.
        let identity = Identity::hashed(&format!("{}/{}", open.nqn, namespace.volume));
        let options = NamespaceOptions {
            nsid: Some(namespace.nsid),
            block_size: namespace.block_size,
            ..NamespaceOptions::new(identity)
        };
        open.subsystem.add(volume, options)?;
        open.volumes
            .insert(namespace.nsid, namespace.volume.clone());
        Ok(())
    }

    fn key_of(&self, function: &Id) -> Result<Key> {
        match self.functions.get(function) {
            Some(Stands::Nvme(nvme)) => Ok(nvme.key.clone()),
            _ => anyhow::bail!("it has no namespaces"),
        }
    }

    pub(super) fn add_namespace(&mut self, function: &Id, namespace: &NamespaceSpec) -> Result<()> {
        let key = self.key_of(function)?;
        let mut open = self.subsystems.remove(&key).context("no subsystem")?;
        let added = self.add_to(&mut open, namespace);
        self.subsystems.insert(key, open);
        added
    }

    /// Removes a namespace, and answers when nothing of it is in flight any more.
    pub(super) fn remove_namespace(&mut self, number: u64, function: Id, nsid: u32) -> Result<()> {
        let key = self.key_of(&function)?;
        let open = self.subsystems.get_mut(&key).context("no subsystem")?;
        ensure!(
            open.volumes.contains_key(&nsid),
            "there is no such namespace"
        );
        open.subsystem.remove(nsid)?;
        open.volumes.remove(&nsid);
        let teller = self.teller.clone();
        open.subsystem.settle(nsid, move || {
            teller.tell(number, FromData::NamespaceRemoved { function, nsid });
        });
        Ok(())
    }

    /// A function has left its subsystem.
    pub(super) fn leave(&mut self, key: &Key) {
        if let Some(open) = self.subsystems.get_mut(key) {
            open.users -= 1;
        }
        self.forget_unused();
    }

    fn forget_unused(&mut self) {
        self.subsystems.retain(|_, open| {
            if open.users == 0 {
                open.keeper.retire();
            }
            open.users > 0
        });
    }
}
