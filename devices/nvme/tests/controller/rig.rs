//! A card with NVMe functions, and hosts that use them.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bluff_block::Volume;
use bluff_nvme::{
    Controller, ControllerOptions, Counters, Identity, NamespaceOptions, Runs, Subsystem,
    SubsystemOptions,
};
use bluff_nvme_host::verify::{self, Shape, Traffic};
use bluff_nvme_host::{ClientBar, Error, HostMemory, Queues, Setup, Status};
use bluff_reactor::{Handle, Poll};
use bluff_vfio_client::pci::{Msix, Pci};
use bluff_vfio_client::{Client, Event, Options};
use bluff_vfio_user::{Attachment, AttachmentEvent, LoopHandle, SessionLoop};

use crate::whole::Whole;

/// How long anything may take that is not to take any time.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// What the card gives an end, before it cancels what is in flight.
pub const BOUND: Duration = Duration::from_millis(300);
/// An end is over by then: the bound, and what cancelling takes on a busy machine.
pub const SOON: Duration = Duration::from_secs(2);
/// Where the host's memory begins.
pub const BASE: u64 = 0x1_0000_0000;

pub const ADAPTIVE: Poll = Poll::Adaptive(Duration::from_micros(50));
/// All ways of polling.
pub const POLLS: [Poll; 3] = [Poll::Always, ADAPTIVE, Poll::Never];

pub type HostController = bluff_nvme_host::Controller<ClientBar>;
pub type HostQueues = Queues<ClientBar>;

/// A subsystem, its reactors, and the loop of its sessions.
pub struct Card {
    sessions: Option<SessionLoop>,
    reactors: Vec<(Handle, JoinHandle<()>)>,
    pub subsystem: Arc<Subsystem>,
    poll: Poll,
    /// What it gives an end, before it cancels what is in flight.
    pub bound: Duration,
}

impl Card {
    /// For one controller.
    pub fn new(poll: Poll, reactors: usize) -> Self {
        Self::with(
            poll,
            reactors,
            SubsystemOptions::new("nqn.2025-01.test:one"),
        )
    }

    /// For several.
    pub fn shared(poll: Poll, reactors: usize) -> Self {
        let mut options = SubsystemOptions::new("nqn.2025-01.test:shared");
        options.shared = true;
        Self::with(poll, reactors, options)
    }

    pub fn with(poll: Poll, reactors: usize, options: SubsystemOptions) -> Self {
        let spawn = |_| Handle::spawn(bluff_reactor::Options::default()).unwrap();
        Self {
            sessions: Some(SessionLoop::spawn().unwrap()),
            reactors: (0..reactors).map(spawn).collect(),
            subsystem: Subsystem::new(options).unwrap(),
            poll,
            bound: BOUND,
        }
    }

    /// A namespace of this block size on a volume.
    pub fn add(&self, volume: Arc<dyn Volume>, block: u32) -> u32 {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let n = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mut options = NamespaceOptions::new(Identity::hashed(&format!("volume {n}")));
        options.block_size = Some(block);
        self.subsystem.add(volume, options).unwrap()
    }

    /// A namespace in memory, and its judge.
    pub fn ram(&self, block: u32, size: u64) -> verify::Volume {
        let nsid = self.add(ram(block, size), block);
        verify::Volume::new(nsid, block, size)
    }

    /// Waits until all reactors sleep.
    pub fn sleep(&self) {
        // Of one that sleeps, the time awake stands still.
        let sleeps = |r: &(Handle, JoinHandle<()>)| {
            let counters = r.0.counters();
            counters.awake() == counters.awake()
        };
        until(|| self.reactors.iter().all(sleeps));
    }

    /// A controller with so many I/O queues.
    pub fn port(&self, name: &str, queues: u16) -> Port {
        let mut options = ControllerOptions::new(name);
        options.queues = queues;
        self.port_with(name, options)
    }

    pub fn port_with(&self, name: &str, options: ControllerOptions) -> Port {
        let queues = options.queues;
        let runs = Runs {
            reactors: self.reactors.iter().map(|r| r.0.clone()).collect(),
            poll: self.poll,
            bound: self.bound,
        };
        let function = Controller::function(&self.subsystem, options, runs).unwrap();
        let (id, counters) = (function.device().id(), function.device().counters().clone());
        let seen: Seen = Arc::default();
        let sink = seen.clone();
        let options = bluff_vfio_user::Options {
            bound: self.bound,
            ..Default::default()
        };
        let listener = Arc::new(move |_: &str, event| {
            sink.0.lock().unwrap().push(event);
            sink.1.notify_all();
        });
        let attachment = Attachment::new(name, Box::new(function), options, listener);
        let sessions = self.sessions.as_ref().unwrap().handle();
        sessions.add(attachment).unwrap();
        Port {
            name: name.into(),
            sessions,
            id,
            counters,
            seen,
            queues,
        }
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        // Sessions end before what their functions run on.
        self.sessions = None;
        for (handle, _) in &self.reactors {
            handle.stop();
        }
        for (_, thread) in self.reactors.drain(..) {
            let ended = thread.join();
            if !std::thread::panicking() {
                ended.expect("a reactor has not panicked");
            }
        }
    }
}

/// A volume in memory.
pub fn ram(block: u32, size: u64) -> Arc<dyn Volume> {
    Arc::new(Whole::new(block, size))
}

type Seen = Arc<(Mutex<Vec<AttachmentEvent>>, Condvar)>;

/// A function of the card.
pub struct Port {
    name: String,
    sessions: LoopHandle,
    pub id: u16,
    pub counters: Arc<Counters>,
    seen: Seen,
    queues: u16,
}

impl Port {
    /// A host on it, with 64 MiB of memory.
    pub fn host(&self) -> Host {
        self.host_with(HostMemory::flat(BASE, 64 << 20).unwrap())
    }

    pub fn host_with(&self, memory: Arc<HostMemory>) -> Host {
        let host = self.connect();
        host.again(memory)
    }

    /// One that can reach `other` too.
    pub fn host_with_both(&self, other: Arc<HostMemory>, memory: Arc<HostMemory>) -> Host {
        let host = self.connect();
        other.share(&host.client).unwrap();
        host.again(memory)
    }

    fn connect(&self) -> Host {
        let memory = HostMemory::flat(0x1000, 4096).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.sessions.connection(&self.name, theirs.into());
        let client = Arc::new(Client::over(ours, Options::default()).unwrap());
        let pci = Pci::new(&client);
        pci.enable().unwrap();
        let msix = Msix::find(&pci).unwrap();
        let bar = ClientBar::new(&client).unwrap();
        let controller = HostController::new(bar, &memory).unwrap();
        Host {
            client,
            pci,
            msix,
            vectors: (0..=self.queues)
                .map(|_| Arc::new(Event::new().unwrap()))
                .collect(),
            memory,
            controller,
        }
    }

    /// Waits until its client has gone, and nothing of it is left.
    pub fn gone(&self) {
        let (list, changed) = &*self.seen;
        let mut list = list.lock().unwrap();
        let is = |e: &AttachmentEvent| matches!(e, AttachmentEvent::Disconnected(_));
        while !list.iter().any(is) {
            let (next, late) = changed.wait_timeout(list, PATIENCE).unwrap();
            assert!(!late.timed_out(), "the session does not end");
            list = next;
        }
        list.clear();
    }
}

/// A host.
pub struct Host {
    pub controller: HostController,
    pub vectors: Vec<Arc<Event>>,
    pub msix: Msix,
    pub pci: Pci,
    pub client: Arc<Client>,
    pub memory: Arc<HostMemory>,
}

impl Host {
    /// The same, from the beginning, with other memory.
    pub fn again(mut self, memory: Arc<HostMemory>) -> Self {
        memory.share(&self.client).unwrap();
        self.pci.enable().unwrap();
        self.vectors = self.msix.enable(self.vectors.len() as u16).unwrap();
        let bar = ClientBar::new(&self.client).unwrap();
        self.controller = HostController::new(bar, &memory).unwrap();
        self.controller.set_limit(PATIENCE);
        self.memory = memory;
        self
    }

    /// The same, with doorbells by descriptor from now on.
    pub fn by_events(mut self) -> Self {
        let bar = ClientBar::by_events(&self.client).unwrap();
        self.controller = HostController::new(bar, &self.memory).unwrap();
        self.controller.set_limit(PATIENCE);
        self
    }

    /// Enables the controller.
    pub fn enable(&mut self) {
        self.controller.enable(&Setup::default()).unwrap();
    }

    /// One with interrupts for the admin queue.
    pub fn enable_with_event(&mut self) {
        let setup = Setup {
            event: Some(self.vectors[0].clone()),
            ..Setup::default()
        };
        self.controller.enable(&setup).unwrap();
    }

    /// Queues with their own vector, from 1 on: each a CQ with so many SQs.
    pub fn queues(&mut self, cqs: u16, sqs: u16, entries: u32, events: bool) -> Vec<HostQueues> {
        // All that there are; some of them may be asked for later. Where there are queues already this is too late.
        let most = self.vectors.len() as u16 - 1;
        let _ = self.controller.set_queue_count(most, most);
        let one = |i: u16| {
            let id = 1 + i * sqs;
            let vector = events.then(|| (id, self.vectors[usize::from(id)].clone()));
            self.controller
                .create_queues(id, sqs, entries, vector)
                .unwrap()
        };
        (0..cqs).map(one).collect()
    }

    /// Verified load on new queues.
    pub fn traffic(
        &mut self,
        cqs: u16,
        sqs: u16,
        events: bool,
        volumes: &[verify::Volume],
        shape: Shape,
    ) -> Traffic<ClientBar> {
        let entries = u32::from(shape.depth) + 1;
        let queues = self.queues(cqs, sqs, entries, events);
        Traffic::new(queues, volumes, &self.memory, shape).unwrap()
    }
}

/// What a command was refused with.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(result: Result<T, Error>) -> Status {
    let error = result.expect_err("refused");
    error.status().unwrap_or_else(|| panic!("{error}"))
}

/// Waits until something holds.
#[track_caller]
pub fn until(mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "it does not come");
        std::thread::yield_now();
    }
}
