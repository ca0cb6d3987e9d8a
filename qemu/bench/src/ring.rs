//! The ring alone: what a chain of three descriptors costs a device that does nothing with it.
//!
//! Driver and device take turns on one thread, and the device's turns are timed: the walk, the 16-byte header that is
//! read, the status byte that is written, the used entry, the publication. No session, no channel, no second core.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bluff_memory::{GuestMemory, Region, RegionSpec, Space};
use bluff_virtio::{
    Chain, Limits, Pop, Position, Queue, QueueSetup, Ring, RingAddresses, features, with_ring,
};
use bluff_virtio_driver::{
    Blk, BlkConfig, Config, DriverQueue, Features, Layout, Memory, PackedDriver, SplitDriver,
};
use vhost_user_backend::{VringRwLock, VringT};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

const BASE: u64 = 1 << 30;
const LEN: u64 = 4 << 20;
const SIZE: u16 = 512;
/// Bytes of a request's data, which nobody touches.
const DATA: u32 = 4096;

/// Whose ring is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// `bluff-virtio`.
    Ours {
        /// Packed, or split.
        packed: bool,
        /// Each chain in a table of its own.
        indirect: bool,
    },
    /// The loop that block back ends on `vhost-user-backend` and `virtio-queue` have: for each chain a
    /// `pop_descriptor_chain`, its iterator, memory accessed through `Bytes`, `add_used`, `needs_notification`. Split.
    Stock,
}

/// The device's time for at least `requests` requests, and how many they were, with up to `depth` available at once.
///
/// # Errors
/// Where memory cannot be had, or the device did not do its work.
pub fn time(device: Device, depth: u16, requests: u64) -> Result<(Duration, u64)> {
    let memory = Memory::flat(BASE, LEN)?;
    memory.populate();
    let (packed, indirect) = match device {
        Device::Ours { packed, indirect } => (packed, indirect),
        Device::Stock => (false, false),
    };
    let config = Config::new(
        SIZE,
        Features {
            event_idx: true,
            indirect,
            in_order: false,
        },
    );
    let load = BlkConfig {
        depth,
        request_len: DATA,
        indirect,
        ..BlkConfig::default()
    };
    // A device keeps its chains in slots, and so they grow once; here one is enough.
    let mut chain = Chain::default();
    if packed {
        let queue = PackedDriver::new(&memory, &config)?;
        let mut device = ours(&memory, queue.layout(), true)?;
        turns(
            Blk::new(&memory, queue, load)?,
            requests,
            || with_ring!(&mut device, ring => serve(&mut **ring, &mut chain)),
        )
    } else {
        let queue = SplitDriver::new(&memory, &config)?;
        let layout = queue.layout();
        let blk = Blk::new(&memory, queue, load)?;
        match device {
            Device::Stock => {
                let (memory, vring) = stock(&memory, layout)?;
                turns(blk, requests, || serve_stock(&memory, &vring))
            }
            Device::Ours { .. } => {
                let mut device = ours(&memory, layout, false)?;
                turns(
                    blk,
                    requests,
                    || with_ring!(&mut device, ring => serve(&mut **ring, &mut chain)),
                )
            }
        }
    }
}

fn turns<Q: DriverQueue>(
    mut blk: Blk<Q>,
    requests: u64,
    mut serve: impl FnMut() -> Result<u64>,
) -> Result<(Duration, u64)> {
    blk.queue().disable_interrupts();
    let (mut spent, mut done, mut completed) = (Duration::ZERO, 0, 0);
    while done < requests {
        completed += u64::from(blk.step()?.completed);
        let start = Instant::now();
        done += serve()?;
        spent += start.elapsed();
    }
    completed += u64::from(blk.drain()?);
    ensure!(
        completed == done,
        "{completed} requests came back of {done}"
    );
    Ok((spent, done))
}

/// Memory and ring as a session would set them up.
fn ours(memory: &Memory, layout: Layout, packed: bool) -> Result<Queue> {
    let none = GuestMemory::empty();
    let regions = memory.regions().iter().map(|r| {
        let spec = RegionSpec {
            guest: r.config().guest_addr,
            len: r.config().size,
            user: r.user_addr(),
            offset: r.config().file_offset,
            file: r.as_fd().try_clone_to_owned()?,
        };
        anyhow::Ok(Region::new(spec, &none)?)
    });
    let memory = GuestMemory::new(regions.collect::<Result<_>>()?)?;
    let kind = if packed { features::RING_PACKED } else { 0 };
    let setup = QueueSetup {
        index: 0,
        size: SIZE,
        features: features::VERSION_1 | features::EVENT_IDX | features::INDIRECT_DESC | kind,
        addresses: RingAddresses {
            space: Space::Guest,
            desc: layout.descriptors,
            driver: layout.driver,
            device: layout.device,
        },
        position: Position::START,
        memory,
        kick: None,
        call: None,
        error: None,
        inflight: None,
        log: None,
        enabled: true,
    };
    Ok(Queue::new(&setup, Limits { indirect: 128 })?)
}

fn serve<R: Ring>(ring: &mut R, chain: &mut Chain) -> Result<u64> {
    let mut done = 0;
    loop {
        match ring.pop(chain)? {
            Pop::Chain => {}
            Pop::Empty => break,
            Pop::Bad(e) => return Err(e.into()),
        }
        let mut header = [0; 16];
        ensure!(
            chain.take_front(&mut header) && chain.take_status(),
            "a header and a status byte are there"
        );
        std::hint::black_box(&header);
        chain.set_status(0);
        ring.complete(chain, DATA + 1);
        done += 1;
    }
    ring.publish();
    Ok(done)
}

type Mapped = GuestMemoryAtomic<GuestMemoryMmap>;

fn stock(memory: &Memory, layout: Layout) -> Result<(Mapped, VringRwLock<Mapped>)> {
    let ranges = memory.regions().iter().map(|r| {
        let file = std::fs::File::from(r.as_fd().try_clone_to_owned()?);
        let offset = vm_memory::FileOffset::new(file, r.config().file_offset);
        let at = vm_memory::GuestAddress(r.config().guest_addr);
        anyhow::Ok((at, r.config().size as usize, Some(offset)))
    });
    let ranges: Vec<_> = ranges.collect::<Result<_>>()?;
    let mapped = GuestMemoryAtomic::new(GuestMemoryMmap::from_ranges_with_files(ranges)?);
    let vring = VringRwLock::new(mapped.clone(), SIZE)?;
    vring.set_queue_info(layout.descriptors, layout.driver, layout.device)?;
    vring.set_queue_size(SIZE);
    vring.set_queue_event_idx(true);
    vring.set_queue_ready(true);
    Ok((mapped, vring))
}

fn serve_stock(memory: &Mapped, vring: &VringRwLock<Mapped>) -> Result<u64> {
    let mut vring = vring.get_mut();
    let mut done = 0;
    while let Some(chain) = vring.get_queue_mut().pop_descriptor_chain(memory.memory()) {
        let head = chain.head_index();
        let (mut header, mut status) = (None, None);
        for descriptor in chain {
            header.get_or_insert(descriptor.addr());
            status = Some(descriptor.addr());
        }
        let (header, status) = header.zip(status).context("a header and a status byte")?;
        let memory = memory.memory();
        std::hint::black_box(&memory.read_obj::<[u8; 16]>(header)?);
        memory.write_obj(0u8, status)?;
        vring.add_used(head, DATA + 1)?;
        if vring.needs_notification()? {
            vring.signal_used_queue()?;
        }
        done += 1;
    }
    Ok(done)
}
