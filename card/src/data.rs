//! The data half: reactors, volumes, networks, functions and their sessions.
//!
//! ```text
//!   control's socket --> this thread: one message at a time
//!                          |             |                |
//!                       reactors      volumes      SessionLoop: a thread for all sessions
//!                          ^                              |
//!                          '------ queues move here ------'
//! ```
//!
//! What happens by itself (a front end comes, a volume grows) is told by whichever thread sees it.
//!
//! As a process it may be killed at any moment, and then another goes on with its sessions (`sessions`). So it also ends as if it
//! were killed where anything in it is broken, and where control is gone: an orderly end would tell the front ends.

mod formats;
mod networks;
mod nvme;
mod sessions;
mod underlays;
mod volumes;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bluff_attachment::keeper::Descriptors;
use bluff_block::{Subscription, Volume, VolumeEvent};
use bluff_reactor::Handle;
use bluff_vhost_user::SessionLoop;
use bluff_virtio_blk::{Blk, BlkOptions, QueueCounters};

use crate::data_half::Options;
use crate::message::{
    FromData, Link, LinkError, Numbered, Subject, ToData, VolumeInfo, address_parts,
    statistics_parts,
};
use crate::spec::{
    CardSpec, DeviceSpec, FunctionSpec, Id, Poll, SubsystemKey, SubsystemSpec, VolumeSpec,
};
use crate::stats::{FunctionStatistics, QueueStatistics, ReactorStatistics, Statistics};

/// Serves the socket until it is drained, or the other end closes.
///
/// # Errors
/// Where the socket fails.
pub fn run(socket: OwnedFd, options: &Options) -> Result<()> {
    let outgoing = socket.try_clone().context("the socket to control")?;
    let mut link: Link<Numbered<FromData>, Numbered<ToData>> = Link::new(socket);
    let teller = Teller(Arc::new(Mutex::new(Link::new(outgoing))));
    let mut data = Data::new(teller, options.is_process)?;
    let outcome = serve(&mut link, &mut data);
    if options.is_process && !matches!(outcome, Ok(End::Drained)) {
        // Its threads end with the process, which is about to.
        std::mem::forget(data);
    }
    outcome.map(|_| ())
}

/// How serving ends.
enum End {
    Drained,
    /// Control is gone.
    Closed,
}

fn serve(link: &mut Link<Numbered<FromData>, Numbered<ToData>>, data: &mut Data) -> Result<End> {
    loop {
        let (Numbered { number, message }, descriptors) = match link.receive() {
            Ok(Some(message)) => message,
            Ok(None) => continue,
            Err(LinkError::Closed) => return Ok(End::Closed),
            Err(error) => return Err(error.into()),
        };
        let about = subject(&message);
        let drains = matches!(message, ToData::Drain { .. });
        match data.handle(number, message, descriptors) {
            Ok(answers) => answers
                .into_iter()
                .for_each(|answer| data.teller.tell(number, answer)),
            Err(error) => data.teller.tell(
                number,
                FromData::Failed {
                    about,
                    error: format!("{error:#}"),
                },
            ),
        }
        if drains {
            return Ok(End::Drained);
        }
    }
}

/// What a message is about, for the answer that it failed.
fn subject(message: &ToData) -> Subject {
    match message {
        ToData::Start { .. }
        | ToData::Statistics { .. }
        | ToData::FormatsKept { .. }
        | ToData::Drain { .. } => Subject::Card,
        ToData::OpenVolume { volume, .. }
        | ToData::CloseVolume { volume }
        | ToData::ResizeVolume { volume, .. } => Subject::Volume(volume.clone()),
        ToData::OpenNetwork { network, .. }
        | ToData::CloseNetwork { network }
        | ToData::ListAddresses { network } => Subject::Network(network.clone()),
        ToData::SetLink { function, .. }
        | ToData::Restore { function, .. }
        | ToData::AttachFunction { function, .. }
        | ToData::Connection { function, .. }
        | ToData::Committed { function, .. }
        | ToData::AddNamespace { function, .. }
        | ToData::RemoveNamespace { function, .. }
        | ToData::DetachFunction { function } => Subject::Function(function.clone()),
    }
}

/// Tells control, from any thread.
#[derive(Clone)]
struct Teller(Arc<Mutex<Link<Numbered<FromData>, Numbered<ToData>>>>);

impl Teller {
    fn tell(&self, number: u64, message: FromData) {
        if let Err(error) = self.send(number, message, &[]) {
            // Where control has ended, the thread that reads sees it too.
            log::debug!("to control: {error}");
        }
    }

    fn send(
        &self,
        number: u64,
        message: FromData,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), LinkError> {
        let link = self.0.lock().expect("telling does not panic");
        match link.send(&Numbered { number, message }, descriptors)? {
            true => Ok(()),
            // It waits for room, so what there is none for are descriptors.
            false => Err(LinkError::Full),
        }
    }
}

/// A reactor that runs.
struct Reactor {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
    cpu: Option<u32>,
}

struct OpenVolume {
    volume: Arc<dyn Volume>,
    _events: Subscription,
}

/// A function, by its kind.
enum Stands {
    Blk(Blocks),
    Net(networks::Nets),
    Nvme(nvme::Nvme),
}

/// A virtio-blk function.
struct Blocks {
    volume: Id,
    /// Descriptors of a session that it will go on with.
    restored: Descriptors,
    counters: Vec<Arc<QueueCounters>>,
    /// The reactor of each queue.
    reactors: Vec<u16>,
}

/// Everything that the data half has.
struct Data {
    teller: Teller,
    /// Whether control keeps what sessions stand on.
    keeps: bool,
    card: CardSpec,
    // Dropped in this order: sessions stop their queues on reactors that still run.
    sessions: SessionLoop,
    vfio: bluff_vfio_user::SessionLoop,
    functions: BTreeMap<Id, Stands>,
    subsystems: BTreeMap<SubsystemKey, nvme::OpenSubsystem>,
    /// Formats that control is asked to keep.
    records: formats::Records,
    volumes: BTreeMap<Id, OpenVolume>,
    networks: networks::Networks,
    underlays: underlays::Underlays,
    reactors: Vec<Reactor>,
    /// The reactor that the next function begins with.
    turn: usize,
}

impl Data {
    fn new(teller: Teller, keeps: bool) -> Result<Self> {
        Ok(Self {
            teller,
            keeps,
            card: CardSpec::default(),
            sessions: SessionLoop::spawn().context("the thread of sessions")?,
            vfio: bluff_vfio_user::SessionLoop::spawn()
                .context("the thread of vfio-user sessions")?,
            functions: BTreeMap::new(),
            subsystems: BTreeMap::new(),
            records: formats::Records::default(),
            volumes: BTreeMap::new(),
            networks: networks::Networks::default(),
            underlays: underlays::Underlays::default(),
            reactors: Vec::new(),
            turn: 0,
        })
    }

    /// Does what control asks for; gives the answers.
    fn handle(
        &mut self,
        number: u64,
        message: ToData,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Vec<FromData>> {
        Ok(match message {
            ToData::Start { card } => {
                self.start(card)?;
                vec![FromData::Started {
                    reactors: self.reactors.len() as u16,
                }]
            }
            ToData::OpenVolume { volume, spec } => {
                let info = self.open(&volume, &spec)?;
                vec![FromData::VolumeOpened { volume, info }]
            }
            ToData::CloseVolume { volume } => {
                let is_its = |f: &Stands| matches!(f, Stands::Blk(blk) if blk.volume == volume);
                let used = self.functions.values().any(is_its)
                    || self.subsystems.values().any(|s| s.stands_on(&volume));
                ensure!(!used, "a function stands on it");
                self.volumes.remove(&volume).context("it is not open")?;
                vec![FromData::VolumeClosed { volume }]
            }
            ToData::ResizeVolume { volume, size } => {
                let open = self.volumes.get(&volume).context("it is not open")?;
                open.volume.resize(size)?;
                vec![FromData::VolumeResized {
                    volume,
                    size: open.volume.geometry().size,
                }]
            }
            ToData::OpenNetwork { network, spec } => {
                let info = self.open_network(&network, &spec)?;
                vec![FromData::NetworkOpened { network, info }]
            }
            ToData::CloseNetwork { network } => {
                self.close_network(&network)?;
                vec![FromData::NetworkClosed { network }]
            }
            ToData::ListAddresses { network } => {
                address_parts(&network, &self.addresses(&network)?)
            }
            ToData::SetLink { function, up } => {
                self.set_link(&function, up)?;
                vec![FromData::LinkSet { function, up }]
            }
            ToData::AttachFunction {
                function,
                spec,
                subsystem,
                descriptors: share,
                files,
            } => {
                // Without those that this process had no room for it would be another function than its front end knows.
                let there = descriptors.len() == files;
                ensure!(there, "the function's files were lost on the way");
                let fresh = self.attach(&function, spec, subsystem, share, descriptors)?;
                let files = fresh.len();
                let fresh: Vec<_> = fresh.iter().map(AsFd::as_fd).collect();
                let attached = FromData::FunctionAttached { function, files };
                self.teller.send(number, attached, &fresh)?;
                Vec::new()
            }
            ToData::AddNamespace {
                function,
                namespace,
            } => {
                self.add_namespace(&function, &namespace)?;
                vec![FromData::NamespaceAdded {
                    function,
                    namespace,
                }]
            }
            ToData::RemoveNamespace { function, nsid } => {
                self.remove_namespace(number, function, nsid)?;
                Vec::new()
            }
            ToData::DetachFunction { function } => {
                let found = self.functions.remove(&function);
                self.underlays.unplug(&function);
                let (teller, name) = (self.teller.clone(), function.to_string());
                let told = move || teller.tell(number, FromData::FunctionDetached { function });
                match found.context("it is not attached")? {
                    // What is left of it is dropped first: with its device a port leaves its network.
                    stands @ (Stands::Blk(_) | Stands::Net(_)) => {
                        drop(stands);
                        self.sessions.handle().remove(&name, move |device| {
                            drop(device);
                            told();
                        });
                    }
                    Stands::Nvme(nvme) => {
                        self.leave(&nvme.key);
                        self.vfio.handle().remove(&name, move |function| {
                            drop(function);
                            told();
                        });
                    }
                }
                Vec::new()
            }
            ToData::Statistics { function } => statistics_parts(self.statistics(function.as_ref())),
            ToData::Drain { within_ms } => {
                self.drain(Duration::from_millis(u64::from(within_ms)));
                vec![FromData::Drained]
            }
            ToData::Restore { function, keys } => {
                let restored = match self.functions.get_mut(&function) {
                    Some(Stands::Blk(blk)) => &mut blk.restored,
                    Some(Stands::Net(net)) => &mut net.restored,
                    Some(Stands::Nvme(nvme)) => &mut nvme.restored,
                    None => bail!("it is not attached"),
                };
                // Those that this process had no room for are missed when the session is taken up.
                restored.extend(keys.into_iter().zip(descriptors));
                Vec::new()
            }
            ToData::Connection { function, .. } => match self.connect(&function, descriptors) {
                Ok(()) => Vec::new(),
                // Nothing is wrong with the function: its next front end may be served.
                Err(error) => {
                    let reason = Some(format!("it cannot be served: {error:#}"));
                    vec![FromData::FrontEndGone { function, reason }]
                }
            },
            ToData::Committed { function, seq } => {
                let name = function.as_str();
                match self.functions.get(&function) {
                    Some(Stands::Blk(_) | Stands::Net(_)) => {
                        self.sessions.handle().committed(name, seq);
                    }
                    Some(Stands::Nvme(_)) => self.vfio.handle().committed(name, seq),
                    // It was detached meanwhile.
                    None => {}
                }
                Vec::new()
            }
            ToData::FormatsKept { seq, error } => {
                self.records.answered(seq, error);
                Vec::new()
            }
        })
    }

    fn start(&mut self, card: CardSpec) -> Result<()> {
        ensure!(self.reactors.is_empty(), "it has started already");
        let cpus: Vec<Option<u32>> = match card.reactors.is_empty() {
            true => vec![None],
            false => card.reactors.iter().copied().map(Some).collect(),
        };
        for (index, cpu) in cpus.into_iter().enumerate() {
            let options = bluff_reactor::Options {
                name: format!("reactor-{index}"),
                cpu: cpu.map(|cpu| cpu as usize),
                ..Default::default()
            };
            let (handle, thread) =
                Handle::spawn(options).with_context(|| format!("reactor {index}"))?;
            self.reactors.push(Reactor {
                handle,
                thread: Some(thread),
                cpu,
            });
        }
        self.card = card;
        Ok(())
    }

    fn open(&mut self, id: &Id, spec: &VolumeSpec) -> Result<VolumeInfo> {
        ensure!(!self.volumes.contains_key(id), "it is open already");
        let volume = volumes::open(spec)?;
        let geometry = volume.geometry();
        let (teller, name, weak) = (self.teller.clone(), id.clone(), Arc::downgrade(&volume));
        let events = volume.events().subscribe(move |event| {
            if let (VolumeEvent::Resized, Some(volume)) = (event, weak.upgrade()) {
                let size = volume.geometry().size;
                teller.tell(
                    0,
                    FromData::VolumeResized {
                        volume: name.clone(),
                        size,
                    },
                );
            }
        });
        let channels = u32::try_from(volume.max_channels()).ok();
        self.volumes.insert(
            id.clone(),
            OpenVolume {
                volume,
                _events: events,
            },
        );
        Ok(VolumeInfo {
            size: geometry.size,
            block_size: geometry.block_size,
            read_only: geometry.read_only,
            channels,
        })
    }

    /// Makes a function, over the files that it had in another data half; gives those that it has made.
    fn attach(
        &mut self,
        id: &Id,
        spec: FunctionSpec,
        subsystem: Option<SubsystemSpec>,
        descriptors: u32,
        files: Vec<OwnedFd>,
    ) -> Result<Vec<OwnedFd>> {
        ensure!(!self.functions.contains_key(id), "it is attached already");
        ensure!(!self.reactors.is_empty(), "there are no reactors");
        // Each function begins on the next reactor, so that functions of one queue are spread too.
        let count = self.reactors.len();
        let order: Vec<usize> = (0..count).map(|i| (self.turn + i) % count).collect();
        self.turn = (self.turn + 1) % count;
        match spec.device {
            DeviceSpec::VirtioBlk { .. } => {
                self.attach_blk(id, spec, order, descriptors)?;
                Ok(Vec::new())
            }
            DeviceSpec::VirtioNet { .. } | DeviceSpec::Uplink(_) => {
                self.attach_net(id, spec, &order, descriptors)?;
                Ok(Vec::new())
            }
            DeviceSpec::Nvme { .. } => self.attach_nvme(id, spec, subsystem, &order, files),
        }
    }

    fn volume(&self, id: &Id) -> Result<&Arc<dyn Volume>> {
        let open = self.volumes.get(id).context("its volume is not open")?;
        Ok(&open.volume)
    }

    fn attach_blk(
        &mut self,
        id: &Id,
        spec: FunctionSpec,
        order: Vec<usize>,
        descriptors: u32,
    ) -> Result<()> {
        let DeviceSpec::VirtioBlk {
            volume: volume_id,
            config_wce,
        } = spec.device
        else {
            unreachable!("asked for by its kind");
        };
        let volume = self.volume(&volume_id)?;
        let options = BlkOptions {
            queues: spec.queues,
            serial: id.to_string(),
            config_wce,
            poll: self.poll(spec.poll),
            reactors: order
                .iter()
                .map(|&i| self.reactors[i].handle.clone())
                .collect(),
        };
        let stop_timeout = Duration::from_millis(spec.stop_timeout_ms.into());
        let device = Blk::new(volume.clone(), options);
        let counters = device.counters().to_vec();
        let spread = order.len().min(volume.max_channels()).max(1);
        let reactors = (0..usize::from(spec.queues))
            .map(|q| order[q % spread] as u16)
            .collect();
        self.present(id, Box::new(device), None, stop_timeout, descriptors)?;
        self.functions.insert(
            id.clone(),
            Stands::Blk(Blocks {
                volume: volume_id,
                restored: Descriptors::new(),
                counters,
                reactors,
            }),
        );
        Ok(())
    }

    fn poll(&self, poll: Option<Poll>) -> bluff_reactor::Poll {
        match poll.unwrap_or(self.card.poll) {
            Poll::Always => bluff_reactor::Poll::Always,
            Poll::Never => bluff_reactor::Poll::Never,
            Poll::Adaptive => {
                let span = Duration::from_micros(u64::from(self.card.poll_us));
                bluff_reactor::Poll::Adaptive(span)
            }
        }
    }

    fn statistics(&self, only: Option<&Id>) -> Statistics {
        let functions = self
            .functions
            .iter()
            .filter(|(id, _)| only.is_none_or(|only| only == *id))
            .map(|(id, function)| match function {
                Stands::Blk(blk) => FunctionStatistics {
                    function: id.clone(),
                    messages: None,
                    queues: blk
                        .counters
                        .iter()
                        .zip(&blk.reactors)
                        .enumerate()
                        .map(|(i, (counters, &reactor))| queue(i as u16, reactor, counters))
                        .collect(),
                    net: None,
                },
                Stands::Net(net) => net.statistics(id),
                Stands::Nvme(nvme) => nvme.statistics(id),
            })
            .collect();
        let reactors = self
            .reactors
            .iter()
            .enumerate()
            .map(|(i, r)| reactor(i as u16, r));
        Statistics {
            at_ns: monotonic_ns(),
            functions,
            reactors: reactors.collect(),
        }
    }

    /// Stops every session within `within`; what takes longer is left to the end of the process.
    fn drain(&mut self, within: Duration) {
        let deadline = Instant::now() + within;
        let (stopped, all) = sync_channel(self.functions.len());
        let (blk, nvme) = (self.sessions.handle(), self.vfio.handle());
        for (id, function) in &self.functions {
            let stopped = stopped.clone();
            let tell = move || {
                let _ = stopped.send(());
            };
            match function {
                Stands::Blk(_) | Stands::Net(_) => blk.remove(id.as_str(), move |_| tell()),
                Stands::Nvme(_) => nvme.remove(id.as_str(), move |_| tell()),
            }
        }
        drop(stopped);
        for _ in 0..self.functions.len() {
            let left = deadline.saturating_duration_since(Instant::now());
            if all.recv_timeout(left).is_err() {
                log::warn!("not every function could be stopped in {within:?}");
                return;
            }
        }
        self.functions.clear();
    }
}

impl Drop for Data {
    fn drop(&mut self) {
        for reactor in &mut self.reactors {
            reactor.handle.stop();
            if let Some(thread) = reactor.thread.take() {
                // A panic there was printed there.
                let _ = thread.join();
            }
        }
    }
}

fn queue(index: u16, reactor: u16, counters: &QueueCounters) -> QueueStatistics {
    let get = |cell: &std::sync::atomic::AtomicU64| cell.load(Ordering::Relaxed);
    QueueStatistics {
        queue: index,
        reactor,
        reads: get(&counters.reads),
        writes: get(&counters.writes),
        flushes: get(&counters.flushes),
        discards: get(&counters.discards),
        read_bytes: get(&counters.bytes_read),
        written_bytes: get(&counters.bytes_written),
        errors: get(&counters.errors),
        in_flight: u32::try_from(get(&counters.in_flight)).unwrap_or(u32::MAX),
        kicks: get(&counters.line.kicks),
        interrupts: get(&counters.line.interrupts),
        hung: get(&counters.line.hung),
    }
}

fn reactor(index: u16, reactor: &Reactor) -> ReactorStatistics {
    let counters = reactor.handle.counters();
    ReactorStatistics {
        reactor: index,
        cpu: reactor.cpu,
        turns: counters.turns.load(Ordering::Relaxed),
        sleeps: counters.sleeps.load(Ordering::Relaxed),
        busy_ns: u64::try_from(counters.awake().as_nanos()).unwrap_or(u64::MAX),
    }
}

/// The monotonic clock, in nanoseconds.
fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
