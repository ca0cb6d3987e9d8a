//! The data half is killed under the load of an NVMe host (R1), which sees a pause and nothing else.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use bluff_card::control::{Request, Response, Status};
use bluff_nvme_host::verify::{Shape, Traffic, Volume};
use bluff_nvme_host::{ClientBar, Controller, HostMemory, Setup};
use bluff_testing::{Chance, times};
use bluff_vfio_client::pci::{Msix, Pci};
use bluff_vfio_client::{Client, Options};

use crate::support::daemon::{Daemon, Place};
use crate::support::{LIMIT, until};

const SIZE: u64 = 4 << 20;
const QUEUES: u16 = 4;
const DEPTH: u16 = 32;
/// Completions come late, and not in order.
const OUT_OF_ORDER: &str = r#"[
    { kind = "delay", read = "100us", write = "200us", flush = "100us", write_zeroes = "100us", jitter = "3ms" },
]"#;

/// How the host's doorbells come to the controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doorbells {
    Mapped,
    Trapped,
    Shadow,
}

impl Doorbells {
    fn poll(self) -> &'static str {
        match self {
            Self::Mapped => "always",
            Self::Trapped | Self::Shadow => "adaptive",
        }
    }
}

fn place(doorbells: Doorbells) -> Place {
    let place = Place::new(&format!(
        "[card]\ndata = \"process\"\npoll = \"{}\"\npoll_us = 20\n\
         [volume.disk0]\nuri = \"file:$DIR/disk0.raw\"\nlayers = {OUT_OF_ORDER}\n\
         [subsystem.s0]\nnamespaces = [\"disk0\"]\n{}{}",
        doorbells.poll(),
        function(0),
        function(1),
    ));
    place.make_file("disk0.raw", SIZE);
    place
}

/// A controller of the one subsystem.
fn function(n: u32) -> String {
    format!(
        "[function.nvme{n}]\nkind = \"nvme\"\nattach = \"vfio-user\"\nsubsystem = \"s0\"\nqueues = {QUEUES}\n"
    )
}

fn volume() -> Volume {
    Volume::new(1, 512, SIZE)
}

/// A host with its queues, each with an interrupt: one that is lost is a host that waits until its limit.
struct Host {
    client: Arc<Client>,
    controller: Controller<ClientBar>,
    traffic: Traffic<ClientBar>,
}

/// How far a host has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Its controller is as after power on.
    Off,
    /// It is enabled.
    On,
}

impl Host {
    fn start(place: &Place, doorbells: Doorbells, volume: &Volume) -> Self {
        Self::start_in_steps(place, doorbells, volume, |_| {})
    }

    /// As a driver begins; `step` is called after each thing that it does.
    fn start_in_steps(
        place: &Place,
        doorbells: Doorbells,
        volume: &Volume,
        step: impl FnMut(Stage),
    ) -> Self {
        let shape = Shape {
            depth: DEPTH,
            sgls: true,
            ..Shape::default()
        };
        Self::start_on(place, "nvme0", doorbells, volume, shape, step)
    }

    fn start_on(
        place: &Place,
        function: &str,
        doorbells: Doorbells,
        volume: &Volume,
        shape: Shape,
        mut step: impl FnMut(Stage),
    ) -> Self {
        let client = until("a session", || {
            // The host before it may be there for a moment still.
            Client::connect(&place.socket(function), Options::default()).ok()
        });
        let client = Arc::new(client);
        step(Stage::Off);
        let memory = HostMemory::flat(1 << 30, 32 << 20).unwrap();
        memory.share(&client).unwrap();
        step(Stage::Off);
        let pci = Pci::new(&client);
        pci.enable().unwrap();
        step(Stage::Off);
        let vectors = Msix::find(&pci).unwrap().enable(QUEUES + 1).unwrap();
        step(Stage::Off);
        let bar = ClientBar::new(&client).unwrap();
        assert_eq!(bar.is_mapped(), doorbells == Doorbells::Mapped);
        step(Stage::Off);
        let mut controller = Controller::new(bar, &memory).unwrap();
        controller.set_limit(LIMIT);
        let setup = Setup {
            event: Some(vectors[0].clone()),
            ..Setup::default()
        };
        controller.enable(&setup).unwrap();
        step(Stage::On);
        controller.set_queue_count(QUEUES, QUEUES).unwrap();
        step(Stage::On);
        let create = |id: u16| {
            let vector = Some((id, vectors[usize::from(id)].clone()));
            let queues = controller.create_queues(id, 1, u32::from(2 * DEPTH), vector);
            step(Stage::On);
            queues.unwrap()
        };
        let mut queues: Vec<_> = (1..=QUEUES).map(create).collect();
        if doorbells == Doorbells::Shadow {
            let mut all: Vec<_> = queues.iter_mut().collect();
            controller.shadow_doorbells(&mut all).unwrap();
            step(Stage::On);
        }
        // The judge of the volume panics where a read finds what it may not; a command that completes twice is an error of its queue.
        let volumes = std::slice::from_ref(volume);
        let traffic = Traffic::new(queues, volumes, &memory, shape).unwrap();
        Self {
            client,
            controller,
            traffic,
        }
    }

    /// Runs the load until it is told to stop.
    fn run(mut self, shared: &Shared) -> Self {
        let mut last = Instant::now();
        while !shared.stop.load(Ordering::Relaxed) {
            self.traffic.fill(DEPTH).unwrap();
            let taken = self.traffic.take_some(LIMIT).unwrap();
            shared.gap.fetch_max(micros(last), Ordering::Relaxed);
            shared.done.fetch_add(taken, Ordering::Relaxed);
            last = Instant::now();
        }
        self
    }
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap()
}

/// What is known of a load by those who watch it.
#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    done: AtomicU64,
    /// The longest time without a completion, in microseconds; whoever looks sets it back.
    gap: AtomicU64,
}

/// A load on a thread of its own.
struct Load {
    shared: Arc<Shared>,
    thread: JoinHandle<Host>,
}

impl Load {
    fn start(host: Host) -> Self {
        let shared = Arc::new(Shared::default());
        let its = shared.clone();
        let thread = std::thread::spawn(move || host.run(&its));
        Self { shared, thread }
    }

    /// Waits until so many more have completed; the load's own limit is what ends a wait in vain.
    fn wait(&self, more: u64) {
        let done = || self.shared.done.load(Ordering::Relaxed);
        let wanted = done() + more;
        while done() < wanted {
            assert!(!self.thread.is_finished(), "the load has ended");
            sleep(Duration::from_micros(200));
        }
    }

    fn stop(self) -> Host {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

fn status(daemon: &Daemon) -> Status {
    match daemon.ask(Request::Status) {
        Ok(Response::Status(status)) => status,
        other => panic!("{other:?}"),
    }
}

fn state(daemon: &Daemon) -> String {
    state_of(daemon, "nvme0")
}

fn state_of(daemon: &Daemon, function: &str) -> String {
    let id = function.parse().unwrap();
    match daemon.ask(Request::ShowFunction { id }) {
        Ok(Response::Function(function)) => function.state,
        other => panic!("{other:?}"),
    }
}

/// Kills the data half, and waits until the next one has the session.
fn replace_data_half(daemon: &Daemon) {
    let before = status(daemon).restarts;
    daemon.kill_data_half();
    until("another data half", || {
        (status(daemon).restarts > before).then_some(())
    });
    until("a session", || (state(daemon) == "connected").then_some(()));
}

/// Memory, interrupts, configuration space and what is mapped of a BAR belong to the session, which goes on.
fn kill_while_it_sets_up(doorbells: Doorbells, until_stage: Stage) {
    let place = place(doorbells);
    let daemon = place.start();
    let step = |stage| {
        if stage == Stage::Off || until_stage == Stage::On {
            replace_data_half(&daemon);
        }
    };
    let mut host = Host::start_in_steps(&place, doorbells, &volume(), step);
    host.traffic.run(500, DEPTH, LIMIT).unwrap();
    host.traffic.verify(LIMIT).unwrap();
    assert!(status(&daemon).restarts >= 5);
    drop(host);
    daemon.terminate();
}

fn kill_again_and_again(doorbells: Doorbells, kills: u32) {
    let place = place(doorbells);
    let mut daemon = place.start();
    let load = Load::start(Host::start(&place, doorbells, &volume()));
    load.wait(500);
    let mut chance = Chance::new(31);
    let mut gaps = Vec::new();
    for kill in 1..=kills {
        daemon.kill_data_half();
        until("another data half", || {
            (status(&daemon).restarts == kill).then_some(())
        });
        if kill % 4 == 0 {
            // More than five in a row that die before they serve anybody are the end of the daemon.
            until("a session", || {
                (state(&daemon) == "connected").then_some(())
            });
            // More than what was in flight: some of it is new.
            load.wait(u64::from(QUEUES * DEPTH) + chance.below(1000));
            gaps.push(Duration::from_micros(
                load.shared.gap.swap(0, Ordering::Relaxed),
            ));
        } else {
            // Anywhere in its start, or soon after.
            sleep(Duration::from_micros(chance.below(40_000)));
        }
    }
    until("a session", || {
        (state(&daemon) == "connected").then_some(())
    });
    load.wait(u64::from(QUEUES * DEPTH));
    gaps.push(Duration::from_micros(
        load.shared.gap.swap(0, Ordering::Relaxed),
    ));
    let done = load.shared.done.load(Ordering::Relaxed);
    let mut host = load.stop();
    host.traffic.verify(LIMIT).unwrap();
    let tally = host.traffic.volumes()[0].judge().tally;
    assert_eq!((tally.errors, tally.abandoned), (0, 0));
    // The admin queue has gone on too, and so has the session: no other one would know this host's queues.
    assert_eq!(host.controller.active_namespaces(0).unwrap(), [1]);
    let smart = host.controller.log_page(2, 0xffff_ffff, 0, 512).unwrap();
    let cycles = u64::from_le_bytes(smart[112..120].try_into().unwrap());
    assert!(cycles <= 1, "{cycles} power cycles");
    assert_eq!(
        host.controller.status().unwrap() & 3,
        1,
        "ready, and not failed"
    );
    assert_eq!(status(&daemon).restarts, kills);
    daemon.assert_alive();
    gaps.sort_unstable();
    println!(
        "{doorbells:?}: {kills} kills, {done} commands, {} messages; the longest gaps are {:?} (median), {:?} (longest)",
        host.client.sent(),
        gaps[gaps.len() / 2],
        gaps[gaps.len() - 1],
    );
    drop(host);
    daemon.terminate();
}

#[test]
fn r01_kill_minus_9_of_the_data_half_under_nvme_load_mapped() {
    kill_again_and_again(Doorbells::Mapped, times(10, 100));
}

#[test]
fn r01_kill_minus_9_of_the_data_half_under_nvme_load_trapped() {
    kill_again_and_again(Doorbells::Trapped, times(10, 100));
}

#[test]
fn r01_kill_minus_9_of_the_data_half_under_nvme_load_shadow() {
    kill_again_and_again(Doorbells::Shadow, times(10, 100));
}

#[test]
fn a_data_half_killed_while_an_nvme_host_has_not_enabled_its_controller() {
    for doorbells in [Doorbells::Mapped, Doorbells::Trapped] {
        kill_while_it_sets_up(doorbells, Stage::Off);
    }
}

#[test]
fn a_data_half_killed_at_each_step_of_an_nvme_host_that_sets_up() {
    for doorbells in [Doorbells::Mapped, Doorbells::Trapped, Doorbells::Shadow] {
        kill_while_it_sets_up(doorbells, Stage::On);
    }
}

/// Nothing of the last host is left for the next one, whoever served it.
#[test]
fn the_next_host_finds_the_controller_as_new_in_the_next_data_half() {
    for doorbells in [Doorbells::Mapped, Doorbells::Shadow] {
        let place = place(doorbells);
        let (daemon, volume) = (place.start(), volume());
        let baseline = daemon.descriptors();
        for round in 0..times(3, 30) {
            let mut host = Host::start(&place, doorbells, &volume);
            host.traffic.run(100, DEPTH, LIMIT).unwrap();
            host.traffic.fill(DEPTH).unwrap();
            // It leaves in mid-I/O, before, while or after the data half dies.
            host.traffic.abandon();
            let (client, controller) = (host.client, host.controller);
            let leave = move || drop((client, controller));
            if round % 3 == 0 {
                leave();
                daemon.kill_data_half();
            } else {
                daemon.kill_data_half();
                sleep(Duration::from_millis(round % 3 * 5));
                leave();
            }
            until("the end of its session", || {
                (state(&daemon) == "idle").then_some(())
            });
        }
        assert!(status(&daemon).restarts > 0);
        // Control has let go of what it kept of them all, and has the files of the functions still.
        daemon.until_let_go(baseline);
        daemon.terminate();
    }
}

/// What was kept of a controller is nothing that the next data half can go on with: its host loses the session, and the next one finds the controller as new.
#[test]
fn a_journal_that_the_next_data_half_does_not_know() {
    let place = place(Doorbells::Shadow);
    let (daemon, volume) = (place.start(), volume());
    let mut host = Host::start(&place, Doorbells::Shadow, &volume);
    host.traffic.run(100, DEPTH, LIMIT).unwrap();
    let mut spoilt = 0;
    for file in std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap() {
        let path = file.unwrap().path();
        let is_memory = |name: &Path| name.to_string_lossy().contains("memfd:");
        if !std::fs::read_link(&path).is_ok_and(|name| is_memory(&name)) {
            continue;
        }
        let options = File::options().read(true).write(true).open(&path);
        let Ok(file) = options else { continue };
        let mut magic = [0; 8];
        if file.read_at(&mut magic, 0).is_ok_and(|n| n == 8) && &magic == b"BluffNVM" {
            // Of another version.
            file.write_all_at(&99u64.to_le_bytes(), 8).unwrap();
            spoilt += 1;
        }
    }
    assert_eq!(spoilt, 2, "of both functions");
    daemon.kill_data_half();
    until("the end of its session", || {
        (state(&daemon) == "idle").then_some(())
    });
    host.traffic.abandon();
    drop((host.client, host.controller));
    let mut host = Host::start(&place, Doorbells::Shadow, &volume);
    host.traffic.run(100, DEPTH, LIMIT).unwrap();
    // And it is kept again.
    replace_data_half(&daemon);
    host.traffic.run(100, DEPTH, LIMIT).unwrap();
    host.traffic.settle(LIMIT).unwrap();
    drop(host);
    daemon.terminate();
}

/// Who a controller is does not depend on the order in which the next data half makes them.
#[test]
fn controllers_of_a_subsystem_stay_who_they_are_over_kills() {
    let place = place(Doorbells::Shadow);
    let (daemon, volume) = (place.start(), volume());
    let shape = |n: u16| Shape {
        depth: DEPTH,
        host: n * QUEUES,
        seed: n.into(),
        ..Shape::default()
    };
    let start = |n| {
        let name = format!("nvme{n}");
        Host::start_on(&place, &name, Doorbells::Shadow, &volume, shape(n), |_| {})
    };
    let mut hosts = [start(1), start(0)];
    let mut ids = || {
        hosts.each_mut().map(|host| {
            host.traffic.run(200, DEPTH, LIMIT).unwrap();
            let identify = host.controller.identify_controller().unwrap();
            (identify.cntlid(), identify.serial())
        })
    };
    let before = ids();
    assert_ne!(before[0].0, before[1].0);
    for _ in 0..times(3, 30) {
        replace_data_half(&daemon);
        until("the other session", || {
            (state_of(&daemon, "nvme1") == "connected").then_some(())
        });
        assert_eq!(ids(), before);
    }
    for host in &mut hosts {
        host.traffic.settle(LIMIT).unwrap();
    }
    hosts[0].traffic.verify(LIMIT).unwrap();
    drop(hosts);
    daemon.terminate();
}

/// What a host has asked for stays asked for: features, and events that have not come.
#[test]
fn features_and_event_requests_outlive_kills() {
    let place = place(Doorbells::Shadow);
    let (daemon, volume) = (place.start(), volume());
    let mut host = Host::start(&place, Doorbells::Shadow, &volume);
    // Namespace attribute notices (bit 8), interrupt coalescing.
    let features = [(0x0b, 1 << 8), (0x08, 0x0203)];
    for (feature, value) in features {
        host.controller.set_feature(feature, 0, value).unwrap();
    }
    for round in 1..=times(3, 30) {
        host.controller.request_event().unwrap();
        replace_data_half(&daemon);
        for (feature, value) in features {
            assert_eq!(host.controller.feature(feature, 0).unwrap(), value);
        }
        let (id, size) = ("disk0".parse().unwrap(), SIZE + round * 4096);
        daemon.ask(Request::ResizeVolume { id, size }).unwrap();
        // Namespace Attribute Changed, by the log page of changed namespaces (NVMe Base 2.1 §5.1.2).
        let event = until("an event", || host.controller.poll_event().unwrap());
        assert_eq!(event, 0x04_00_02);
        assert_eq!(
            host.controller.log_page(4, 0xffff_ffff, 0, 4096).unwrap()[..8],
            [1, 0, 0, 0, 0, 0, 0, 0]
        );
        host.traffic.run(200, DEPTH, LIMIT).unwrap();
    }
    drop(host);
    daemon.terminate();
}
