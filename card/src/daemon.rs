//! The control half of `bluffd`: one loop that waits for signals, the data half and the control socket.
//!
//! It owns the registry, the sockets, and what sessions stand on, so that a data half that is a process takes nothing along
//! when it dies that a host would notice. Nothing in the loop waits for anybody, but for an NVMe function that is attached or
//! gets a namespace while formats are being recorded, which waits for the state directory, for 5 s at most.

mod again;
mod answer;
mod carry;
mod formats;
mod fronts;
mod half;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use again::Again;
use anyhow::{Context, Result, anyhow, bail};
use bluff_vhost_user::limit::Limit;
use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use formats::Recorder;
use fronts::Fronts;
use half::Health;
use vmm_sys_util::epoll::EventSet;

use crate::config::Config;
use crate::control::server::{ClientNumber, Server};
use crate::data_half::{Body, DataHalf, Options};
use crate::descriptors;
use crate::identity::Identity;
use crate::message::{AddressEntry, FromData, Numbered, Outbox, ToData};
use crate::registry::{FunctionState, NetworkState, Registry, VolumeState};
use crate::runtime_dir::{BoundSocket, CONTROL_SOCKET, RuntimeDir};
use crate::spec::{CardSpec, DataMode, DeviceSpec, FunctionSpec, Id, Text};
use crate::stats::Statistics;

/// How long the data half may take to stop all queues, where no function's own bound is longer.
const DRAIN: Duration = Duration::from_secs(5);
/// How long it may take to end after that; also how long past its own bound draining may take.
const END: Duration = Duration::from_secs(2);
/// The mode of the control socket: whoever may connect may do everything.
const CONTROL_MODE: u32 = 0o600;

const SIGNAL: u32 = 0;
const LINK: u32 = 1;
const SERVER: u32 = 2;
const FRONTS: u32 = 3;
const FORMATS: u32 = 4;

/// What a daemon is started with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The card.
    pub config: Config,
    /// Where sockets stand.
    pub runtime_dir: PathBuf,
    /// Where state is kept that outlives the daemon.
    pub state_dir: PathBuf,
    /// The data half, where it runs as a thread. As a process, this program is started again.
    pub body: Body,
}

/// Runs a daemon until it is told to end by SIGTERM or SIGINT.
///
/// # Errors
/// Where it cannot start, where the data half fails for good, or where draining took longer than its bound.
pub fn run(settings: Settings) -> Result<()> {
    let dir = RuntimeDir::take(&settings.runtime_dir)?;
    let signals = signals().context("signals")?;
    let control = BoundSocket::bind(&dir.path().join(CONTROL_SOCKET), CONTROL_MODE)?;
    let server = Server::new(control).context("the control socket")?;
    let daemon = Daemon::start(settings, server, signals)?;
    let mut events = EventManager::new().map_err(|error| anyhow!("the event loop: {error}"))?;
    let id = events.add_subscriber(daemon);
    let outcome = loop {
        let daemon = events
            .subscriber_mut(id)
            .map_err(|error| anyhow!("the event loop: {error}"))?;
        daemon.tick(Instant::now());
        if let Some(outcome) = daemon.outcome.take() {
            break outcome;
        }
        let timeout = daemon.timeout(Instant::now());
        events
            .run_with_timeout(timeout)
            .map_err(|error| anyhow!("the event loop: {error}"))?;
    };
    let daemon = events
        .remove_subscriber(id)
        .map_err(|error| anyhow!("the event loop: {error}"))?;
    let ended = daemon.end();
    drop(dir);
    outcome.and(ended)
}

/// A stream that gets a byte for each signal that asks the daemon to end.
fn signals() -> std::io::Result<UnixStream> {
    let (reader, writer) = UnixStream::pair()?;
    reader.set_nonblocking(true)?;
    for signal in [libc::SIGTERM, libc::SIGINT] {
        signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
    }
    Ok(reader)
}

type ControlLink = Outbox<Numbered<ToData>, Numbered<FromData>>;

/// How far the daemon is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Not everything of the configuration stands yet.
    Starting,
    /// Everything stood once.
    Ready,
    /// It was told to end, and gives the data half until then.
    Draining(Instant),
}

/// Who waits for the data half's answer.
#[derive(Debug)]
enum Pending {
    /// A client that wants a volume to have another size.
    Resize(ClientNumber, Id),
    /// A client that wants the namespaces of a function to be others.
    Namespaces(ClientNumber, Id),
    /// A client that wants counters, and those that came already.
    Statistics(ClientNumber, Statistics),
    /// A client that wants the addresses of a network, and those that came already.
    Addresses(ClientNumber, Vec<AddressEntry>),
    /// A client that wants a cable pulled out or plugged in.
    Link(ClientNumber, Id),
}

impl Pending {
    fn client(&self) -> ClientNumber {
        match self {
            Self::Resize(client, _)
            | Self::Namespaces(client, _)
            | Self::Statistics(client, _)
            | Self::Addresses(client, _)
            | Self::Link(client, _) => *client,
        }
    }
}

struct Daemon {
    card: CardSpec,
    /// There where a function has a name that is made of it.
    identity: Option<Identity>,
    /// There where a function has namespaces: what hosts have formatted them to.
    recorder: Option<Recorder>,
    body: Body,
    options: Options,
    registry: Registry,
    server: Server,
    signals: UnixStream,
    link: ControlLink,
    half: Option<DataHalf>,
    health: Health,
    restarts: u32,
    reactors: u16,
    fronts: Fronts,
    /// When to connect next, for functions in client mode without a front end.
    connect_at: BTreeMap<Id, Instant>,
    /// Volumes to be opened again that could not be.
    reopen: Again,
    /// Networks, likewise.
    reopen_networks: Again,
    /// What may be logged of functions whose front ends cause it.
    limits: BTreeMap<Id, Limit>,
    pending: BTreeMap<u64, Pending>,
    next_number: u64,
    phase: Phase,
    started: Instant,
    /// Why the data half is of no use, where it says so itself.
    useless: Option<anyhow::Error>,
    outcome: Option<Result<()>>,
}

impl Daemon {
    fn start(settings: Settings, server: Server, signals: UnixStream) -> Result<Self> {
        let Settings {
            config,
            runtime_dir,
            state_dir,
            body,
        } = settings;
        let mut registry = Registry::new(&runtime_dir);
        for (id, spec) in config.volumes {
            registry.create_volume(id, spec)?;
        }
        for (id, spec) in config.subsystems {
            registry.create_subsystem(id, spec)?;
        }
        for (id, spec) in config.networks {
            registry.create_network(id, spec)?;
        }
        let is_nvme = |spec: &FunctionSpec| matches!(spec.device, DeviceSpec::Nvme { .. });
        let has_formats = config.functions.values().any(is_nvme);
        let is_named = |spec: &FunctionSpec| {
            let is_nameless = match &spec.device {
                DeviceSpec::VirtioNet { port, .. } => port.mac.is_none(),
                DeviceSpec::Uplink(uplink) => uplink.mac.is_none(),
                DeviceSpec::VirtioBlk { .. } | DeviceSpec::Nvme { .. } => false,
            };
            is_nvme(spec) || is_nameless
        };
        let identity = config
            .functions
            .values()
            .any(is_named)
            .then(|| Identity::of_card(&state_dir))
            .transpose()?;
        for (id, mut spec) in config.functions {
            let mac = match &mut spec.device {
                DeviceSpec::VirtioNet { port, .. } => Some(&mut port.mac),
                DeviceSpec::Uplink(uplink) => Some(&mut uplink.mac),
                DeviceSpec::VirtioBlk { .. } | DeviceSpec::Nvme { .. } => None,
            };
            if let (Some(mac), Some(card)) = (mac, identity) {
                mac.get_or_insert_with(|| Text(card.mac(&id)));
            }
            registry.create_function(id, spec)?;
        }
        let functions = registry.functions().values();
        let needed = descriptors::needed_by_all(functions.map(|function| function.spec.rings()));
        if needed > descriptors::limit() {
            log::warn!(
                "the functions need up to {needed} open descriptors, and {} are allowed (RLIMIT_NOFILE)",
                descriptors::limit()
            );
        }
        let recorder = has_formats
            .then(|| Recorder::start(&state_dir))
            .transpose()?;
        let options = Options {
            state_dir,
            is_process: config.card.data == DataMode::Process,
        };
        let (link, half) = spawn(body, &options)?;
        let now = Instant::now();
        let mut daemon = Self {
            card: config.card,
            identity,
            recorder,
            body,
            options,
            registry,
            server,
            signals,
            link,
            half: Some(half),
            health: Health::default(),
            restarts: 0,
            reactors: 0,
            fronts: Fronts::new().context("the functions' sockets")?,
            connect_at: BTreeMap::new(),
            reopen: Again::default(),
            reopen_networks: Again::default(),
            limits: BTreeMap::new(),
            pending: BTreeMap::new(),
            next_number: 1,
            phase: Phase::Starting,
            started: now,
            useless: None,
            outcome: None,
        };
        daemon.begin();
        Ok(daemon)
    }

    /// Tells a new data half all that there is.
    fn begin(&mut self) {
        self.send(
            ToData::Start {
                card: self.card.clone(),
            },
            Vec::new(),
        );
        self.carry_out();
    }

    fn tick(&mut self, now: Instant) {
        self.server.tick(now);
        self.reopen(now);
        self.connect_clients(now);
        self.fronts_turn(now);
        if let Phase::Draining(deadline) = self.phase
            && now >= deadline
        {
            self.finish(Err(anyhow!("the data half did not drain in time")));
        }
    }

    /// How long the loop may sleep, in milliseconds, as epoll takes it.
    fn timeout(&self, now: Instant) -> i32 {
        let deadline = match self.phase {
            Phase::Draining(deadline) => Some(deadline),
            Phase::Starting | Phase::Ready => None,
        };
        let connect = self.connect_at.values().copied();
        let reopen = self.reopen.next().into_iter();
        let reopen = reopen.chain(self.reopen_networks.next());
        let next = connect.chain(reopen).chain(deadline);
        let accept = self.server.deadline().into_iter();
        let next = next.chain(accept).chain(self.fronts.deadline()).min();
        // Rounded up, so that the loop does not spin through the last millisecond.
        let wait = |at: Instant| at.saturating_duration_since(now).as_millis() + 1;
        next.map_or(-1, |at| i32::try_from(wait(at)).unwrap_or(i32::MAX))
    }

    fn finish(&mut self, outcome: Result<()>) {
        if self.outcome.is_none() {
            self.outcome = Some(outcome);
        }
    }

    fn terminate(&mut self) {
        let mut signals = [0; 16];
        let is_asked = matches!(self.signals.read(&mut signals), Ok(1..));
        match self.phase {
            _ if !is_asked => {}
            Phase::Draining(_) => self.finish(Err(anyhow!(
                "told to end a second time, before all was drained"
            ))),
            Phase::Starting | Phase::Ready => {
                log::info!("ending");
                // Nobody listens for systemd's sake in a test or on a terminal, which is no error.
                let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
                let functions = self.registry.functions().values();
                let longest = functions.map(|f| f.spec.stop_timeout_ms).max();
                let longest = Duration::from_millis(longest.unwrap_or_default().into());
                let within = DRAIN.max(longest + END);
                self.phase = Phase::Draining(Instant::now() + within + END);
                let within_ms = u32::try_from(within.as_millis()).expect("a minute or so");
                self.send(ToData::Drain { within_ms }, Vec::new());
            }
        }
    }

    /// Reads what the data half said. It is read until nothing is left, as the loop tells of it only once.
    fn hear(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = self.link.flush() {
            return self.lose_data_half(error.into(), ops);
        }
        while self.outcome.is_none() {
            match self.link.receive() {
                Ok(Some((Numbered { number, message }, descriptors))) => {
                    self.report(number, message, descriptors);
                    if let Some(error) = self.useless.take() {
                        return self.give_up_data_half(error, ops);
                    }
                }
                Ok(None) => return,
                Err(error) => return self.lose_data_half(error.into(), ops),
            }
        }
    }

    fn link_events(&self) -> Events {
        // Told once for each change, so that a socket with room does not keep the loop awake.
        let interest = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        Events::with_data(&self.link, LINK, interest)
    }

    /// Says "ready" when all that was configured stands, and ends where something never will.
    fn check_ready(&mut self) {
        if self.phase != Phase::Starting || self.reactors_unknown() {
            return;
        }
        for (id, volume) in self.registry.volumes() {
            match &volume.state {
                VolumeState::Open(_) => {}
                VolumeState::Failed { reason } => {
                    let error = anyhow!("volume {id}: {reason}");
                    return self.finish(Err(error));
                }
                VolumeState::Opening | VolumeState::Closing => return,
            }
        }
        for (id, network) in self.registry.networks() {
            match &network.state {
                NetworkState::Open(_) => {}
                NetworkState::Failed { reason } => {
                    let error = anyhow!("network {id}: {reason}");
                    return self.finish(Err(error));
                }
                NetworkState::Opening | NetworkState::Closing => return,
            }
        }
        for (id, function) in self.registry.functions() {
            match &function.state {
                FunctionState::Idle | FunctionState::Connected(_) => {}
                FunctionState::Failed { reason } => {
                    let error = anyhow!("function {id}: {reason}");
                    return self.finish(Err(error));
                }
                FunctionState::Waiting
                | FunctionState::Attaching
                | FunctionState::Detaching { .. } => return,
            }
        }
        self.phase = Phase::Ready;
        if let Err(error) = announce() {
            self.finish(Err(error));
        }
    }

    fn reactors_unknown(&self) -> bool {
        // None runs without one: what a data half says is taken as at least that.
        self.reactors == 0
    }

    fn end(self) -> Result<()> {
        // Names go first, so that nobody connects to what nobody will accept.
        drop(self.fronts);
        drop(self.server);
        drop(self.link);
        self.half.map_or(Ok(()), |half| half.end(END))
    }
}

fn announce() -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    let said = writeln!(stdout, "ready").and_then(|()| stdout.flush());
    said.context("standard output")?;
    // Does nothing where no service manager asked for it.
    sd_notify::notify(&[sd_notify::NotifyState::Ready]).context("the service manager")
}

fn spawn(body: Body, options: &Options) -> Result<(ControlLink, DataHalf)> {
    let (socket, half) = if options.is_process {
        DataHalf::spawn_process(options)?
    } else {
        DataHalf::spawn_thread(body, options.clone())?
    };
    Ok((
        Outbox::new(socket).context("the socket of the data half")?,
        half,
    ))
}

impl MutEventSubscriber for Daemon {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let signals = Events::with_data(&self.signals, SIGNAL, EventSet::IN);
        let server = Events::with_data(&self.server, SERVER, EventSet::IN);
        let fronts = Events::with_data(&self.fronts, FRONTS, EventSet::IN);
        let recorder = self.recorder.iter();
        let formats = recorder.map(|recorder| Events::with_data(recorder, FORMATS, EventSet::IN));
        let formats: Vec<_> = formats.collect();
        let all = [signals, server, fronts, self.link_events()];
        for events in all.into_iter().chain(formats) {
            if let Err(error) = ops.add(events) {
                self.finish(Err(anyhow!("the event loop: {error}")));
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            SIGNAL => self.terminate(),
            LINK => self.hear(ops),
            SERVER => {
                for (client, request) in self.server.turn() {
                    self.question(client, request);
                }
            }
            FORMATS => self.formats_turn(),
            // Looked after in each turn.
            FRONTS => {}
            other => unreachable!("nothing was registered as {other}"),
        }
        self.carry_out();
        self.check_ready();
        self.check_served();
    }
}

/// Where state is kept unless told: the system's place, or the user's.
///
/// # Errors
/// Where a user has no home.
pub fn default_state_dir() -> Result<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Ok("/var/lib/diamond-bluff".into());
    }
    let set = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    match (set("XDG_STATE_HOME"), set("HOME")) {
        (Some(state), _) => Ok(state.join("diamond-bluff")),
        (None, Some(home)) => Ok(home.join(".local/state/diamond-bluff")),
        (None, None) => bail!("neither XDG_STATE_HOME nor HOME is set; give --state-dir"),
    }
}
