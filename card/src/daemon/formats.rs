//! Which formats namespaces have: recorded when a host has formatted one, before any host sees it.
//!
//! ```text
//!   data half: erased, flushed          control's loop                     a thread that may wait for the disk
//!        |-- KeepFormats, seq n ------> checked -------------- job -------> formats::Formats::record
//!        |                                                                        |
//!   hosts see it <-- FormatsKept, n --- known from now on <---- outcome ----------'
//! ```
//!
//! Where the disk fails so that nobody knows what it holds, nobody is answered: the namespace stays blocked, erased, and is not presented again by this daemon. The next one reads what there is,
//! which fits either way.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bluff_vhost_user::limit::Limit;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Daemon;
use crate::formats::{Formats, Key, RecordError, is_possible};
use crate::message::ToData;
use crate::registry::VolumeState;
use crate::spec::{
    DeviceSpec, FunctionSpec, Id, NAMESPACES_MAX, NamespaceFormat, NamespaceSpec, SubsystemKey,
    SubsystemSpec, SubsystemUse,
};

/// Most namespaces whose formats wait to be recorded. A host waits for each of its own, so a data half with more of them is not what it should be.
const WAITING_MAX: usize = 65_536;
/// How long a function that is about to be attached waits for what is being recorded.
const SETTLED: Duration = Duration::from_secs(5);

/// Who asked.
#[derive(Clone, Copy, Debug)]
struct Asked {
    /// Which data half, by how many there were before.
    half: u32,
    /// Its number for it.
    seq: u64,
}

struct Job {
    asked: Asked,
    more: Vec<(Key, u32)>,
}

struct Outcome {
    job: Job,
    recorded: Result<Formats, RecordError>,
}

/// The formats, and the thread that records them.
pub(super) struct Recorder {
    known: Formats,
    /// What may have been recorded or not.
    unknown: BTreeSet<Key>,
    /// How many namespaces wait.
    waiting: usize,
    jobs: Sender<Job>,
    outcomes: Receiver<Outcome>,
    wake: Arc<EventFd>,
    /// A host can cause what is logged.
    limit: Limit,
}

impl Recorder {
    pub(super) fn start(state_dir: &Path) -> Result<Self> {
        let known = Formats::take_up(state_dir)?;
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK).context("an eventfd")?);
        let ((jobs, for_thread), (from_thread, outcomes)) = (channel(), channel());
        let (state_dir, waker) = (state_dir.to_owned(), wake.clone());
        std::thread::Builder::new()
            .name("formats".to_owned())
            .spawn(move || record_all(&state_dir, &for_thread, &from_thread, &waker))
            .context("the thread that records formats")?;
        Ok(Self {
            known,
            unknown: BTreeSet::new(),
            waiting: 0,
            jobs,
            outcomes,
            wake,
            limit: Limit::default(),
        })
    }

    fn begin(&mut self, job: Job) -> Result<()> {
        let count = job.more.len();
        ensure!(
            self.waiting + count <= WAITING_MAX,
            "too many formats wait to be recorded"
        );
        self.jobs.send(job).ok().context("the thread has ended")?;
        self.waiting += count;
        Ok(())
    }

    /// Takes in what came of a job.
    fn note(&mut self, Outcome { job, recorded }: Outcome) -> (Asked, Result<(), RecordError>) {
        self.waiting = self.waiting.saturating_sub(job.more.len());
        let noted = recorded.map(|all| self.known = all);
        if let Err(RecordError::Unknown(_)) = &noted {
            self.unknown
                .extend(job.more.into_iter().map(|(key, _)| key));
        }
        (job.asked, noted)
    }
}

impl AsRawFd for Recorder {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

/// Until nobody asks any more.
fn record_all(state_dir: &Path, jobs: &Receiver<Job>, outcomes: &Sender<Outcome>, wake: &EventFd) {
    for job in jobs {
        let recorded = Formats::record(state_dir, &job.more);
        if outcomes.send(Outcome { job, recorded }).is_err() {
            return;
        }
        if let Err(error) = wake.write(1) {
            log::error!("formats: {error}");
        }
    }
}

impl Daemon {
    /// The data half has erased namespaces for their hosts.
    pub(super) fn keep_formats(
        &mut self,
        subsystem: &SubsystemKey,
        seq: u64,
        formats: &[NamespaceFormat],
    ) {
        let half = self.restarts;
        let asked = Asked { half, seq };
        let begun = self.changes(subsystem, formats).and_then(|more| {
            let recorder = self.recorder.as_mut().context("nothing is kept")?;
            recorder.begin(Job { asked, more })
        });
        if let Err(error) = begun {
            self.refuse_formats(asked, &error);
        }
    }

    /// What was recorded since the last turn.
    pub(super) fn formats_turn(&mut self) {
        if let Some(recorder) = &self.recorder {
            // Nothing there: that was seen in a turn before.
            let _ = recorder.wake.read();
        }
        while let Some(recorder) = &self.recorder
            && let Ok(outcome) = recorder.outcomes.try_recv()
        {
            self.formats_recorded(outcome);
        }
    }

    /// Waits until nothing is being recorded: what is presented from now on must be what the file says.
    fn settle_formats(&mut self) -> Result<()> {
        let deadline = Instant::now() + SETTLED;
        while let Some(recorder) = &self.recorder
            && recorder.waiting > 0
        {
            let left = deadline.saturating_duration_since(Instant::now());
            match recorder.outcomes.recv_timeout(left) {
                Ok(outcome) => self.formats_recorded(outcome),
                Err(RecvTimeoutError::Timeout) => bail!("formats are still being recorded"),
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("the thread that records formats has ended")
                }
            }
        }
        Ok(())
    }

    fn formats_recorded(&mut self, outcome: Outcome) {
        let Some(recorder) = &mut self.recorder else {
            return;
        };
        let (asked, noted) = recorder.note(outcome);
        match noted {
            Ok(()) => self.answer_formats(asked, None),
            Err(RecordError::Unchanged(error)) => self.refuse_formats(asked, &error),
            Err(unknown @ RecordError::Unknown(_)) => {
                let unknown = anyhow::Error::from(unknown);
                log::error!(
                    "{unknown:#}; these namespaces cannot be used until bluffd is started again"
                );
            }
        }
    }

    fn refuse_formats(&mut self, asked: Asked, error: &anyhow::Error) {
        let error = format!("{error:#}");
        if let Some(recorder) = &mut self.recorder {
            let line = format_args!("a format is not recorded: {error}");
            recorder
                .limit
                .warn(Instant::now(), format_args!("formats"), line);
        }
        self.answer_formats(asked, Some(error));
    }

    fn answer_formats(&mut self, Asked { half, seq }: Asked, error: Option<String>) {
        // Another one was told the format when its functions were attached, and would take the number for one of its own.
        if half == self.restarts {
            self.send(ToData::FormatsKept { seq, error }, Vec::new());
        }
    }

    /// What is to be recorded, if it could be: the data half may be in a host's hand.
    fn changes(&self, key: &SubsystemKey, formats: &[NamespaceFormat]) -> Result<Vec<(Key, u32)>> {
        let all = self.registry.functions().iter();
        let uses = |(id, device): (&Id, &DeviceSpec)| match device {
            DeviceSpec::Nvme { subsystem, .. } => subsystem.key(id) == *key,
            DeviceSpec::VirtioBlk { .. } | DeviceSpec::VirtioNet { .. } | DeviceSpec::Uplink(_) => {
                false
            }
        };
        let mut served = all.filter(|(_, function)| function.state.is_attached());
        let (id, function) = served
            .find(|(id, function)| uses((id, &function.spec.device)))
            .context("no function has that subsystem")?;
        let spec = self.subsystem(id, &function.spec);
        let spec = spec.context("the function has no subsystem")?;
        let nqn = spec.nqn.context("the subsystem has no name")?;
        ensure!(
            (1..=NAMESPACES_MAX).contains(&formats.len()),
            "{} namespaces at once",
            formats.len()
        );
        let mut changes = BTreeMap::new();
        for NamespaceFormat { nsid, block_size } in formats {
            let mut namespaces = spec.namespaces.iter();
            let namespace = namespaces.find(|n| n.nsid == *nsid);
            let volume = namespace.with_context(|| format!("there is no namespace {nsid}"))?;
            let volume = volume.volume.clone();
            let VolumeState::Open(info) = self.registry.volume(&volume)?.state else {
                bail!("volume {volume} is not open");
            };
            ensure!(!info.read_only, "volume {volume} is read-only");
            let (size, of) = (*block_size, info.block_size);
            ensure!(
                is_possible(size, of),
                "volume {volume} has blocks of {of} bytes, and can have none of {size}"
            );
            let nqn = nqn.clone();
            let before = changes.insert(Key { nqn, volume }, size);
            ensure!(before.is_none(), "namespace {nsid} twice");
        }
        Ok(changes.into_iter().collect())
    }

    /// The subsystem of a function, by the name that hosts see, with what hosts have formatted its namespaces to.
    pub(super) fn subsystem(&self, id: &Id, spec: &FunctionSpec) -> Option<SubsystemSpec> {
        let DeviceSpec::Nvme { subsystem, .. } = &spec.device else {
            return None;
        };
        let found = self.registry.subsystem_of(subsystem)?;
        let nqn = found.nqn.clone();
        let nqn = nqn.or_else(|| {
            let identity = self.identity?;
            Some(match subsystem {
                SubsystemUse::Shared { subsystem } => identity.nqn("subsystem", subsystem),
                SubsystemUse::Own(_) => identity.nqn("function", id),
            })
        });
        let namespaces = found.namespaces.iter();
        let namespaces = namespaces.map(|namespace| self.with_format(nqn.as_deref(), namespace));
        Some(SubsystemSpec {
            namespaces: namespaces.collect(),
            nqn,
        })
    }

    fn with_format(&self, nqn: Option<&str>, namespace: &NamespaceSpec) -> NamespaceSpec {
        let key = nqn.map(|nqn| Key {
            nqn: nqn.to_owned(),
            volume: namespace.volume.clone(),
        });
        let recorder = self.recorder.as_ref();
        NamespaceSpec {
            block_size: key.and_then(|key| recorder?.known.get(&key)),
            ..namespace.clone()
        }
    }

    /// The subsystem of a function as it can be presented now.
    ///
    /// # Errors
    /// Where a namespace cannot be had in the format that its host has given it.
    pub(super) fn presentable(
        &mut self,
        id: &Id,
        spec: &FunctionSpec,
    ) -> Result<Option<SubsystemSpec>> {
        if !matches!(spec.device, DeviceSpec::Nvme { .. }) {
            return Ok(None);
        }
        self.settle_formats()?;
        let subsystem = self.subsystem(id, spec);
        let subsystem = subsystem.context("the function has no subsystem")?;
        for namespace in &subsystem.namespaces {
            self.check_format(subsystem.nqn.as_deref(), namespace)?;
        }
        Ok(Some(subsystem))
    }

    /// A namespace that is new in the subsystem of a function, as it can be presented now.
    ///
    /// # Errors
    /// As [`Daemon::presentable`].
    pub(super) fn presentable_namespace(
        &mut self,
        function: &Id,
        namespace: &NamespaceSpec,
    ) -> Result<NamespaceSpec> {
        self.settle_formats()?;
        let spec = &self.registry.function(function)?.spec;
        let subsystem = self.subsystem(function, spec);
        let nqn = subsystem.and_then(|subsystem| subsystem.nqn);
        let namespace = self.with_format(nqn.as_deref(), namespace);
        self.check_format(nqn.as_deref(), &namespace)?;
        Ok(namespace)
    }

    fn check_format(&self, nqn: Option<&str>, namespace: &NamespaceSpec) -> Result<()> {
        let NamespaceSpec { volume, nsid, .. } = namespace;
        let (Some(nqn), Some(recorder)) = (nqn, &self.recorder) else {
            bail!("nobody knows what hosts have formatted namespaces to");
        };
        let key = Key {
            nqn: nqn.to_owned(),
            volume: volume.clone(),
        };
        ensure!(
            !recorder.unknown.contains(&key),
            "namespace {nsid}, volume {volume}: nobody knows which format it has, until bluffd is started again"
        );
        let state = &self.registry.volume(volume)?.state;
        if let (Some(size), VolumeState::Open(info)) = (namespace.block_size, state) {
            let of = info.block_size;
            ensure!(
                is_possible(size, of),
                "namespace {nsid}: its host has formatted it to blocks of {size} bytes, which volume {volume} cannot have any more, as its own have {of}"
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(volume: &str, block_size: u32) -> Job {
        let key = Key {
            nqn: "nqn.2026-11.example:s0".to_owned(),
            volume: volume.parse().unwrap(),
        };
        Job {
            asked: Asked { half: 0, seq: 1 },
            more: vec![(key, block_size)],
        }
    }

    #[test]
    fn what_was_recorded_is_known_and_what_may_have_been_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let mut recorder = Recorder::start(dir.path()).unwrap();
        let key = |volume| job(volume, 512).more[0].0.clone();
        recorder.begin(job("disk0", 4096)).unwrap();
        assert_eq!(
            (recorder.waiting, recorder.known.get(&key("disk0"))),
            (1, None)
        );
        let outcome = recorder.outcomes.recv().unwrap();
        recorder.note(outcome).1.unwrap();
        assert_eq!(
            (recorder.waiting, recorder.known.get(&key("disk0"))),
            (0, Some(4096))
        );
        // It is told a moment later.
        while recorder.wake.read().is_err() {
            std::thread::yield_now();
        }

        let lost = || anyhow::anyhow!("the disk has gone");
        for (recorded, unknown) in [
            (RecordError::Unchanged(lost()), false),
            (RecordError::Unknown(lost()), true),
        ] {
            recorder.waiting += 1;
            let outcome = Outcome {
                job: job("disk0", 512),
                recorded: Err(recorded),
            };
            assert!(recorder.note(outcome).1.is_err());
            assert_eq!(recorder.unknown.contains(&key("disk0")), unknown);
            assert_eq!(recorder.known.get(&key("disk0")), Some(4096));
            assert_eq!(recorder.waiting, 0);
        }
    }

    #[test]
    fn no_more_wait_than_there_can_be() {
        let dir = tempfile::tempdir().unwrap();
        let mut recorder = Recorder::start(dir.path()).unwrap();
        recorder.waiting = WAITING_MAX;
        assert!(recorder.begin(job("disk0", 4096)).is_err());
        recorder.waiting -= 1;
        recorder.begin(job("disk0", 4096)).unwrap();
    }
}
