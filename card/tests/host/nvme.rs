//! NVMe functions, by an NVMe host of our own over the daemon's sockets.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bluff_card::control::{NamespacesEntry, Request, Response};
use bluff_nvme_host::verify::{Shape, Traffic, Volume};
use bluff_nvme_host::{ClientBar, Controller, HostMemory, Setup};
use bluff_testing::times;
use bluff_vfio_client::{Client, Options, Pci};

use crate::support::daemon::{Daemon, Place};
use crate::support::{LIMIT, until};

pub const SIZE: u64 = 1 << 20;

/// Two controllers of one subsystem on disk0 and disk1, and disk2 that nobody has.
pub fn place() -> Place {
    let mut config = "[card]\npoll_us = 20\n".to_owned();
    for n in 0..3 {
        config += &format!(
            "[volume.disk{n}]\nuri = \"file:$DIR/disk{n}.raw?block_size={}\"\n",
            if n == 1 { 4096 } else { 512 }
        );
    }
    config += "[subsystem.s0]\nnqn = \"nqn.2026-11.example:s0\"\n\
               namespaces = [\"disk0\", { volume = \"disk1\", nsid = 5 }]\n";
    for n in 0..2 {
        config += &format!(
            "[function.nvme{n}]\nkind = \"nvme\"\nattach = \"vfio-user\"\nsubsystem = \"s0\"\nserial = \"DB000{n}\"\nqueues = 4\n"
        );
    }
    let place = Place::new(&config);
    for n in 0..3 {
        place.make_file(&format!("disk{n}.raw"), SIZE);
    }
    place
}

pub struct Host {
    pub controller: Controller<ClientBar>,
    pub memory: Arc<HostMemory>,
}

impl Host {
    pub fn connect(socket: &Path) -> Self {
        // The one before it may be there for a moment still.
        let client = until("a session", || {
            Client::connect(socket, Options::default()).ok()
        });
        let client = Arc::new(client);
        let memory = HostMemory::flat(1 << 30, 32 << 20).unwrap();
        memory.share(&client).unwrap();
        Pci::new(&client).enable().unwrap();
        let bar = ClientBar::new(&client).unwrap();
        let mut controller = Controller::new(bar, &memory).unwrap();
        controller.enable(&Setup::default()).unwrap();
        Self { controller, memory }
    }

    fn traffic(&mut self, queues: u16, volumes: &[Volume], shape: Shape) -> Traffic<ClientBar> {
        self.controller.set_queue_count(queues, queues).unwrap();
        let queues = (1..=queues).map(|id| self.controller.create_queues(id, 1, 64, None).unwrap());
        Traffic::new(queues.collect(), volumes, &self.memory, shape).unwrap()
    }

    pub fn next_event(&mut self) -> u32 {
        until("an event", || self.controller.poll_event().unwrap())
    }
}

pub fn namespaces(daemon: &Daemon, request: Request) -> Result<NamespacesEntry, String> {
    match daemon.ask(request) {
        Ok(Response::Namespaces(entry)) => Ok(entry),
        Ok(other) => panic!("{other:?}"),
        Err(error) => Err(error.to_string()),
    }
}

fn nsids(entry: &NamespacesEntry) -> Vec<u32> {
    entry.namespaces.iter().map(|n| n.nsid).collect()
}

/// Namespace Attribute Changed, by the log page of changed namespaces (NVMe Base 2.1 §5.1.2).
pub const CHANGED: u32 = 0x04_00_02;

#[test]
fn two_controllers_share_a_subsystem() {
    let place = place();
    let daemon = place.start();
    let mut first = Host::connect(&place.socket("nvme0"));
    let mut second = Host::connect(&place.socket("nvme1"));
    let one = first.controller.identify_controller().unwrap();
    let two = second.controller.identify_controller().unwrap();
    assert_eq!(
        (one.serial(), two.serial()),
        ("DB0000".into(), "DB0001".into())
    );
    assert_eq!(one.nqn(), "nqn.2026-11.example:s0");
    assert_eq!(one.nqn(), two.nqn());
    assert_ne!(one.cntlid(), two.cntlid());
    for host in [&mut first, &mut second] {
        assert_eq!(host.controller.active_namespaces(0).unwrap(), [1, 5]);
    }
    let of = |host: &mut Host| host.controller.identify_namespace(5).unwrap();
    assert_eq!(of(&mut first).nguid(), of(&mut second).nguid());
    assert_eq!(of(&mut first).block(), 4096);

    let volumes = [Volume::new(1, 512, SIZE), Volume::new(5, 4096, SIZE)];
    let mut loads = [
        first.traffic(2, &volumes, Shape::default()),
        second.traffic(
            2,
            &volumes,
            Shape {
                host: 2,
                seed: 7,
                ..Shape::default()
            },
        ),
    ];
    for _ in 0..times(20, 500) {
        for load in &mut loads {
            load.run(50, 16, LIMIT).unwrap();
        }
    }
    for load in &mut loads {
        load.settle(LIMIT).unwrap();
    }
    loads[1].verify(LIMIT).unwrap();
    let counted = daemon.queues("nvme0");
    assert_eq!(counted.len(), 2);
    assert!(
        counted.iter().all(|q| q.requests() > 0 && q.errors == 0),
        "{counted:?}"
    );
    daemon.terminate();
}

#[test]
fn namespaces_come_and_go_under_a_running_host() {
    let place = place();
    let daemon = place.start();
    let mut host = Host::connect(&place.socket("nvme0"));
    let mut other = Host::connect(&place.socket("nvme1"));
    for host in [&mut host, &mut other] {
        // Namespace attribute notices (bit 8).
        host.controller.set_feature(0x0b, 0, 1 << 8).unwrap();
        host.controller.request_event().unwrap();
    }
    let function = |name: &str| name.parse().unwrap();
    let add = |nsid| Request::AddNamespace {
        function: function("nvme0"),
        volume: function("disk2"),
        nsid,
    };
    let refused = namespaces(&daemon, add(Some(5))).unwrap_err();
    assert!(
        refused.contains("there is a namespace 5 already"),
        "{refused}"
    );
    let entry = namespaces(&daemon, add(None)).unwrap();
    assert_eq!(nsids(&entry), [1, 2, 5]);
    assert_eq!(entry.functions.len(), 2);
    assert!(
        namespaces(&daemon, add(None)).is_err(),
        "it is there already"
    );
    for host in [&mut host, &mut other] {
        assert_eq!(host.next_event(), CHANGED);
        assert_eq!(host.controller.active_namespaces(0).unwrap(), [1, 2, 5]);
    }

    let volumes = [Volume::new(1, 512, SIZE), Volume::new(2, 512, SIZE)];
    let mut load = host.traffic(2, &volumes[..1], Shape::default());
    load.run(500, 16, LIMIT).unwrap();
    load.fill(16).unwrap();
    let remove = |name: &str| Request::RemoveNamespace {
        function: function(name),
        volume: function("disk2"),
    };
    let entry = namespaces(&daemon, remove("nvme1")).unwrap();
    assert_eq!(nsids(&entry), [1, 5]);
    assert!(namespaces(&daemon, remove("nvme1")).is_err());
    load.run(500, 16, LIMIT).unwrap();
    load.verify(LIMIT).unwrap();
    assert_eq!(host.controller.active_namespaces(0).unwrap(), [1, 5]);
    let list = Request::ListNamespaces {
        function: function("nvme1"),
    };
    assert_eq!(nsids(&namespaces(&daemon, list).unwrap()), [1, 5]);
    daemon.terminate();
}

#[test]
fn a_host_that_comes_back_finds_the_controller_as_new() {
    let place = place();
    let mut daemon = place.start();
    let socket = place.socket("nvme0");
    let volume = Volume::new(1, 512, SIZE);
    for round in 0..times(5, 50) {
        let mut host = Host::connect(&socket);
        let mut load = host.traffic(
            2,
            std::slice::from_ref(&volume),
            Shape {
                seed: round,
                ..Shape::default()
            },
        );
        load.run(200, 16, LIMIT).unwrap();
        load.verify(LIMIT).unwrap();
        let smart = host.controller.log_page(2, 0xffff_ffff, 0, 512).unwrap();
        let cycles = u64::from_le_bytes(smart[112..120].try_into().unwrap());
        assert_eq!(cycles, round + 1, "power cycles");
        // It goes in mid-I/O: what is in flight still writes to its memory.
        load.fill(16).unwrap();
        load.abandon();
        drop(host);
        daemon.assert_alive();
    }
    daemon.terminate();
}

#[test]
fn a_second_host_is_turned_away() {
    let place = place();
    let daemon = place.start();
    let socket = place.socket("nvme0");
    let mut host = Host::connect(&socket);
    let options = Options {
        limit: Duration::from_secs(5),
        ..Options::default()
    };
    assert!(Client::connect(&socket, options).is_err());
    assert_eq!(host.controller.active_namespaces(0).unwrap(), [1, 5]);
    daemon.terminate();
}

#[test]
fn a_namespace_grows_with_its_volume() {
    let place = place();
    let daemon = place.start();
    let mut host = Host::connect(&place.socket("nvme0"));
    host.controller.set_feature(0x0b, 0, 1 << 8).unwrap();
    host.controller.request_event().unwrap();
    let id = "disk0".parse().unwrap();
    daemon
        .ask(Request::ResizeVolume { id, size: 2 * SIZE })
        .unwrap();
    assert_eq!(host.next_event(), CHANGED);
    assert_eq!(
        host.controller.identify_namespace(1).unwrap().nsze(),
        2 * SIZE / 512
    );
    daemon.terminate();
}
