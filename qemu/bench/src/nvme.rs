//! An NVMe function, driven by an NVMe host of our own over its vfio-user socket.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use bluff_nvme_host::{
    ClientBar, Controller, HostMemory, Load, LoadConfig, Pattern, Queues, Setup,
};
use bluff_vfio_client::{Client, Options, Pci};

use crate::load::Count;
use crate::rows::Work;

/// Entries of each queue.
const ENTRIES: u32 = 512;
/// Where the host's memory begins.
const BASE: u64 = 1 << 30;
/// When nothing is completed any more.
const STUCK: Duration = Duration::from_secs(5);

/// A host with its controller enabled.
struct Host {
    controller: Controller<ClientBar>,
    memory: Arc<HostMemory>,
    client: Arc<Client>,
}

impl Host {
    fn connect(socket: &Path, bytes: u64) -> Result<Self> {
        let client = Arc::new(Client::connect(socket, Options::default())?);
        let memory = HostMemory::flat(BASE, bytes.next_multiple_of(2 << 20))?;
        memory.share(&client)?;
        Pci::new(&client).enable()?;
        let bar = ClientBar::new(&client).map_err(|e| anyhow!(e))?;
        let mut controller = Controller::new(bar, &memory)?;
        controller.enable(&Setup::default())?;
        Ok(Self {
            controller,
            memory,
            client,
        })
    }

    /// One load for each pair of queues.
    fn loads(&mut self, work: &Work) -> Result<Vec<Load<ClientBar>>> {
        self.controller.set_queue_count(work.queues, work.queues)?;
        let queues: Vec<Queues<ClientBar>> = (1..=work.queues)
            .map(|id| self.controller.create_queues(id, 1, ENTRIES, None))
            .collect::<Result<_, _>>()?;
        let namespace = self.controller.identify_namespace(1)?;
        let block = u32::try_from(namespace.block())?;
        let load = |(seed, queues)| {
            let config = LoadConfig {
                nsid: 1,
                capacity: namespace.nsze(),
                block,
                len: work.len,
                depth: work.depth,
                pattern: match work.random {
                    true => Pattern::Random,
                    false => Pattern::Sequential,
                },
                write: work.write,
                seed,
            };
            Ok(Load::new(queues, &self.memory, config)?)
        };
        (1..).zip(queues).map(load).collect()
    }
}

/// Measures the function that listens on `socket`; as [`crate::load::vhost_user`].
pub fn measure(
    socket: &Path,
    work: &Work,
    span: Duration,
    mut around: impl FnMut() -> Result<()>,
) -> Result<Count> {
    let data = u64::from(work.len) * u64::from(work.depth) * u64::from(work.queues);
    let mut host = Host::connect(socket, data * 2 + (16 << 20)).context("the controller")?;
    let mut loads = host.loads(work)?;
    // Buffers are touched, and polling is under way.
    drive(&mut loads, span / 4)?;
    let messages = host.client.sent();
    around()?;
    let count = drive(&mut loads, span)?;
    around()?;
    ensure!(
        host.client.sent() == messages,
        "messages were sent while doorbells are mapped"
    );
    let start = Instant::now();
    for load in &mut loads {
        while load.in_flight() > 0 {
            load.drain()?;
            ensure!(start.elapsed() < STUCK, "requests are not finished");
        }
    }
    for load in loads {
        host.controller.delete_queues(load.into_queues())?;
    }
    host.controller.shut_down(false)?;
    Ok(count)
}

fn drive(loads: &mut [Load<ClientBar>], span: Duration) -> Result<Count> {
    let start = Instant::now();
    let (mut requests, mut spins, mut last) = (0u64, 0u32, (0u64, start));
    loop {
        for load in loads.iter_mut() {
            requests += u64::from(load.step()?.completed);
        }
        spins += 1;
        if spins.is_multiple_of(64) {
            let now = Instant::now();
            if now - start >= span {
                return Ok(Count {
                    requests,
                    span: now - start,
                });
            }
            if requests != last.0 {
                last = (requests, now);
            }
            ensure!(now - last.1 < STUCK, "nothing was completed for {STUCK:?}");
        }
    }
}

/// Attaches a host to each socket, with a queue pair and shadow doorbells, and calls `measure` while all of them have nothing to do.
pub fn idle(
    sockets: impl Iterator<Item = PathBuf>,
    measure: impl FnOnce() -> Result<f64>,
) -> Result<f64> {
    let work = crate::rows::READ;
    let mut hosts = Vec::new();
    for socket in sockets {
        let mut host = Host::connect(&socket, 4 << 20)?;
        let mut loads = host.loads(&work)?;
        host.controller
            .shadow_doorbells(&mut loads.iter_mut().map(Load::queues).collect::<Vec<_>>())?;
        let start = Instant::now();
        let mut done = 0;
        while done == 0 {
            done = loads[0].step()?.completed;
            ensure!(start.elapsed() < STUCK, "a read does not end");
        }
        while loads[0].in_flight() > 0 {
            loads[0].drain()?;
            ensure!(start.elapsed() < STUCK, "a read does not end");
        }
        hosts.push((host, loads));
    }
    measure()
}
