//! What a request costs the host: the load of the benchmarks against a controller that does nothing, in turns on one thread.
//!
//! The controller fetches each entry and completes it with success; its turns are timed by themselves and taken off.
//!
//! `cargo bench -p bluff-nvme-host`

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bluff_nvme_host::{
    Bar, BarError, Controller, HostMemory, Load, LoadConfig, Pattern, Queues, Setup,
};
use bluff_virtio_driver::Span;

/// Registers that say yes to everything, and eight doorbells: those of the admin queue and of one pair.
#[derive(Default)]
struct Nothing {
    cc: AtomicU32,
    doorbells: [AtomicU32; 4],
    /// Of the queues that were created: SQ, CQ.
    rings: Mutex<Option<[(u64, u32); 2]>>,
    admin: Mutex<Option<Admin>>,
}

/// The admin queue: every command is fine.
struct Admin {
    memory: Arc<HostMemory>,
    places: [u64; 2],
    done: u32,
}

const ADMIN_ENTRIES: u32 = 32;

impl Nothing {
    fn admin(&self, tail: u32) {
        let mut admin = self.admin.lock().unwrap();
        let admin = admin.as_mut().expect("memory is known");
        let memory = admin.memory.memory();
        while admin.done % ADMIN_ENTRIES != tail {
            let slot = admin.done % ADMIN_ENTRIES;
            let entry = memory
                .span(admin.places[0] + u64::from(slot) * 64, 64)
                .unwrap();
            let (at, id) = (entry.read_u64(24), entry.read_u32(40));
            let ring = (at, (id >> 16) + 1);
            let mut rings = self.rings.lock().unwrap();
            let rings = rings.get_or_insert([(0, 0); 2]);
            match entry.read_u8(0) {
                1 => rings[0] = ring,
                5 => rings[1] = ring,
                _ => {}
            }
            admin.done += 1;
            let phase = u32::from(((admin.done - 1) / ADMIN_ENTRIES).is_multiple_of(2)) << 16;
            let cid = u32::from(entry.read_u16(2));
            let to = memory
                .span(admin.places[1] + u64::from(slot) * 16, 16)
                .unwrap();
            to.write_u32_pair(0, 0, 0);
            to.write_u32(8, admin.done % ADMIN_ENTRIES);
            to.store_u32(12, cid | phase, Ordering::Release);
        }
    }
}

impl Bar for Nothing {
    fn read32(&self, offset: u64) -> Result<u32, BarError> {
        let cc = self.cc.load(Ordering::Relaxed);
        Ok(match offset {
            0x1c => cc & 1,
            _ => cc,
        })
    }
    fn read64(&self, _offset: u64) -> Result<u64, BarError> {
        Ok(0xfff | 1 << 16 | 1 << 24 | 1 << 37)
    }
    fn write32(&self, offset: u64, value: u32) -> Result<(), BarError> {
        if offset == 0x14 {
            self.cc.store(value, Ordering::Relaxed);
        }
        Ok(())
    }
    fn write64(&self, offset: u64, value: u64) -> Result<(), BarError> {
        let mut admin = self.admin.lock().unwrap();
        admin.as_mut().expect("memory is known").places[usize::from(offset == 0x30)] = value;
        Ok(())
    }
    #[inline(always)]
    fn doorbell(&self, offset: u64, value: u32) -> Result<(), BarError> {
        let index = (offset - 0x1000) as usize / 4;
        self.doorbells[index].store(value, Ordering::Release);
        if index == 0 {
            self.admin(value);
        }
        Ok(())
    }
}

/// The I/O pair of the controller.
struct Device {
    bar: Arc<Nothing>,
    sq: (Span, u32),
    cq: (Span, u32),
    head: u32,
    tail: u32,
    phase: u32,
}

impl Device {
    fn new(bar: &Arc<Nothing>, memory: &HostMemory) -> Self {
        let rings = bar.rings.lock().unwrap().expect("queues were created");
        let span = |(at, entries): (u64, u32), size: u64| {
            let len = u64::from(entries) * size;
            (memory.memory().span(at, len).unwrap(), entries)
        };
        Self {
            sq: span(rings[0], 64),
            cq: span(rings[1], 16),
            bar: bar.clone(),
            head: 0,
            tail: 0,
            phase: 1 << 16,
        }
    }

    fn turn(&mut self) {
        let end = self.bar.doorbells[2].load(Ordering::Acquire);
        while self.head != end {
            let entry = self.head as usize * 64;
            // As much as any controller has to look at.
            let (first, _) = self.sq.0.read_u64_pair(entry);
            std::hint::black_box(self.sq.0.read_u64_pair(entry + 24));
            std::hint::black_box(self.sq.0.read_u64_pair(entry + 40));
            self.head = (self.head + 1) % self.sq.1;
            let at = self.tail as usize * 16;
            self.cq.0.write_u64(at, 0);
            self.cq.0.write_u32(at + 8, self.head | 1 << 16);
            let cid = (first >> 16) as u32 & 0xffff;
            self.cq
                .0
                .store_u32(at + 12, cid | self.phase, Ordering::Release);
            self.tail += 1;
            if self.tail == self.cq.1 {
                (self.tail, self.phase) = (0, self.phase ^ 1 << 16);
            }
        }
    }
}

fn measure(depth: u16, span: Duration) -> f64 {
    let memory = HostMemory::flat(1 << 30, 64 << 20).unwrap();
    let bar = Arc::new(Nothing::default());
    *bar.admin.lock().unwrap() = Some(Admin {
        memory: memory.clone(),
        places: [0; 2],
        done: 0,
    });
    let mut controller = Controller::new(bar.clone(), &memory).unwrap();
    controller.enable(&Setup::default()).unwrap();
    let queues: Queues<Arc<Nothing>> = controller.create_queues(1, 1, 256, None).unwrap();
    let config = LoadConfig {
        nsid: 1,
        capacity: 1 << 21,
        block: 512,
        len: 4096,
        depth,
        pattern: Pattern::Random,
        write: false,
        seed: 1,
    };
    let mut load = Load::new(queues, &memory, config).unwrap();
    let mut device = Device::new(&bar, &memory);
    let (mut requests, mut off) = (0u64, Duration::ZERO);
    let start = Instant::now();
    while start.elapsed() < span {
        for _ in 0..64 {
            requests += u64::from(load.step().unwrap().completed);
            let turn = Instant::now();
            device.turn();
            off += turn.elapsed();
        }
    }
    // The two looks at the clock in each turn count as well; at depth 1 they are most of it.
    (start.elapsed() - off).as_nanos() as f64 / requests as f64
}

fn main() {
    // `cargo test` runs it too, and wants to know only whether it works.
    let is_bench = std::env::args().any(|a| a == "--bench");
    let span = Duration::from_millis(if is_bench { 1000 } else { 10 });
    for depth in [1, 32, 128] {
        let ns = measure(depth, span);
        println!("depth {depth}: {ns:.1} ns of the host for a request");
    }
}
