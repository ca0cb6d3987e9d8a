//! Hostile data pointers, queues and doorbells, in bytes: for cargo-fuzz, and for a smoke test that runs everywhere.
//!
//! ```text
//!   bytes --> lists in memory, a data pointer --> pieces, which lie in memory and are as long as was asked for
//!   bytes --> [ command | raw entry | doorbell | shadow | poke | turns | memory | bus mastering | queue deleted | abort
//!               | namespaces | drain | storage holds or fails | stop ] ...
//! ```
//! The same bytes do the same each time: the reactor is stepped, and the volumes are in memory.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bluff_memory::{GuestMemory, IoVec};
use bluff_pci::Dma;
use zerocopy::IntoBytes;

use super::choices::Choices;
use super::host::{self, BASE, DATA, Host, LISTS, Plan, Queues, REGION, SHADOW, memory, slow};
use super::slow::Desk;
use crate::data::Resolver;
use crate::namespace::{Namespace, Namespaces};
use crate::spec::{ALL_NAMESPACES, Command};
use crate::worker::Message;

impl Choices<'_> {
    /// An address: mostly of a page, or of the lists; now and then elsewhere.
    fn addr(&mut self) -> u64 {
        match self.u8() {
            n @ 0..0x80 => DATA + u64::from(n) * 0x1000,
            n @ 0x80..0xe0 => LISTS + u64::from(n & 0x3f) * 8,
            n @ 0xe0..0xf0 => LISTS + 0x1000 - u64::from(n & 0xf) * 8,
            0xff => u64::MAX - u64::from(self.u16()),
            _ => BASE.wrapping_add(u64::from(self.u16()) << 5) + u64::from(self.u8()),
        }
    }

    fn len(&mut self) -> u32 {
        match self.u8() {
            0xff => u32::from(self.u16()) << 16 | u32::from(self.u16()),
            n @ 0x80.. => u32::from(n & 0x7f) * 16,
            n => u32::from(n) * 512,
        }
    }

    /// Entries of lists, and descriptors.
    fn lists(&mut self, memory: &GuestMemory) {
        for _ in 0..self.u8() % 16 {
            let at = LISTS + u64::from(self.u8()) * 16;
            let mut entry = [0; 16];
            entry[..8].copy_from_slice(&self.addr().to_le_bytes());
            if self.u8() & 1 == 0 {
                entry[8..].copy_from_slice(&self.addr().to_le_bytes());
            } else {
                entry[8..12].copy_from_slice(&self.len().to_le_bytes());
                entry[15] = self.descriptor();
            }
            // What lies outside of memory goes nowhere.
            let _ = memory.write(at, &entry);
        }
    }

    fn descriptor(&mut self) -> u8 {
        match self.u8() {
            n @ 0..0xf0 => [0x00, 0x20, 0x30][usize::from(n % 3)],
            _ => self.u8(),
        }
    }
}

/// Resolves data pointers that `data` makes up. What is resolved must lie in memory, and be as long as was asked for. Gives
/// how many were, and how many were refused.
pub fn fuzz_data(data: &[u8]) -> (u64, u64) {
    let mut input = Choices(data);
    let memory = memory(&GuestMemory::empty(), 2);
    let mut resolver = Resolver::new(12 + input.u8() % 5);
    let (mut good, mut bad) = (0, 0);
    let mut out = Vec::new();
    while !input.is_empty() {
        input.lists(&memory);
        let mut command = Command {
            flags: input.u8() & 0xc0,
            ..Command::default()
        };
        command.dptr[0] = input.addr().into();
        command.dptr[1] = match command.flags >> 6 {
            0 => input.addr(),
            _ => u64::from(input.descriptor()) << 56 | u64::from(input.len()),
        }
        .into();
        let len = input.len() % (1 << 20) + 1;
        out.clear();
        match resolver.resolve(&memory, bluff_memory::Access::Both, &command, len, &mut out) {
            Ok(()) => {
                assert_eq!(IoVec::total(&out), u64::from(len));
                assert!(out.iter().all(|v| memory.maps(*v)));
                good += 1;
            }
            Err(_) => bad += 1,
        }
    }
    (good, bad)
}

/// Queues under a host that does what `data` says.
struct World {
    host: Host,
    queues: Queues,
    desk: Arc<Desk>,
    plan: Plan,
    all: Vec<Arc<Namespace>>,
    /// Regions that there are, and whether they may be reached.
    on: bool,
    /// What has not been told to be over.
    open: Vec<Arc<Mutex<bool>>>,
}

impl World {
    fn new(input: &mut Choices<'_>) -> Self {
        let (volume, desk) = slow(1 << 20, |_| {});
        let small = |g: &mut bluff_block::Geometry| {
            (g.max_transfer, g.write_zeroes, g.discard) = (8192, None, None);
        };
        let (other, _) = slow(1 << 20, small);
        let all = vec![Namespace::new(1, volume, 9), Namespace::new(2, other, 12)];
        let mut host = Host::new(all.clone());
        let plan = Plan {
            cq_size: 2 + u32::from(input.u8() % 64),
            sq_size: 2 + u32::from(input.u8() % 64),
            sqs: 2,
            ..Plan::default()
        };
        let queues = host.create(1, &plan);
        Self {
            host,
            queues,
            desk,
            plan,
            all,
            on: true,
            open: Vec::new(),
        }
    }

    fn send(&mut self, message: impl FnOnce(bluff_pci::Done) -> Message) {
        let over = self.host.send(&self.queues, message);
        self.open.push(over);
    }

    /// A command that mostly makes sense.
    fn command(&mut self, input: &mut Choices<'_>) {
        let opcode = match input.u8() {
            n @ 0..0xf0 => [0, 1, 2, 5, 8, 9, 0xc, 0x19][usize::from(n % 8)],
            n => n,
        };
        let mut command = host::blocks(
            opcode,
            1 + u32::from(input.u8() % 16 / 9),
            u64::from(input.u16() % 2100),
            1 + u32::from(input.u8() % 32),
            input.addr(),
        );
        match input.u8() {
            0..0x80 => {}
            n @ 0x80..0xc0 => {
                command.flags = 0x40;
                let kind = u64::from(input.descriptor()) << 56;
                command.dptr[1] = (kind | (u64::from(n & 0x1f) << 9)).into();
            }
            0xc0..0xf0 => command.dptr[1] = input.addr().into(),
            n => {
                // Any byte of it is another.
                let at = usize::from(input.u8() % 64);
                command.as_mut_bytes()[at] ^= n | input.u8();
            }
        }
        if opcode == 9 {
            (command.cdw10, command.cdw11) = (u32::from(input.u8()).into(), 4.into());
        }
        let sq = usize::from(input.u8() & 1) % self.queues.sqs.len();
        self.host.put(&mut self.queues, sq, command);
        self.host.tell_tail(&self.queues, sq);
    }

    fn step(&mut self, input: &mut Choices<'_>) {
        match input.u8() % 24 {
            0..=5 => self.command(input),
            6 => input.lists(&self.host.memory),
            7 => {
                let number = u64::from(input.u8() % 12);
                let value = u32::from(input.u16());
                self.host.ring(&self.queues, number, value);
            }
            8 => {
                let at = SHADOW.doorbells + u64::from(input.u8() % 12) * 4;
                self.host.set_word(at, u32::from(input.u8()));
                self.queues.worker.ring();
            }
            9 if self.on => {
                self.host.shadow = true;
                self.send(|done| Message::Shadow {
                    shadow: SHADOW,
                    done,
                });
            }
            10 => {
                let n = 1 + u64::from(input.u8() & 1);
                self.host.memory = memory(&self.host.memory, n);
                if self.on {
                    self.dma(Dma::On(self.host.memory.clone()));
                }
            }
            11 => {
                self.on = !self.on;
                let dma = match self.on {
                    true => Dma::On(self.host.memory.clone()),
                    false => Dma::Off,
                };
                self.dma(dma);
            }
            12 if self.queues.sqs.len() > 1 => {
                let sq = self.queues.sqs.pop().expect("two");
                self.send(|done| Message::DeleteSq {
                    qid: sq.qid,
                    bound: Duration::ZERO,
                    done,
                });
                // Its number can be used again when it is gone.
                self.finish();
                let size = self.plan.sq_size;
                self.host.add_sq(&mut self.queues, sq.qid, size);
                self.host.turns(2);
            }
            13 => {
                let cid = u16::from(input.u8());
                let sqid = 1 + u16::from(input.u8() % 3);
                let reply = Arc::new(Mutex::new(false));
                self.open.push(reply.clone());
                self.queues.worker.send(Message::Abort {
                    sqid,
                    cid,
                    reply: Box::new(move |_| *reply.lock().expect("one thread") = true),
                });
            }
            14 => {
                let which = input.u8();
                let some = self.all.iter().enumerate();
                let some = some.filter(|(i, _)| which >> i & 1 == 0);
                let table = Namespaces::new(16, some.map(|(_, n)| n.clone()).collect());
                self.send(|done| Message::Namespaces {
                    table,
                    bound: Duration::ZERO,
                    done,
                });
            }
            15 => {
                let nsid = [1, 2, 3, ALL_NAMESPACES][usize::from(input.u8() & 3)];
                self.send(|done| Message::Drain {
                    nsid,
                    bound: Duration::ZERO,
                    done,
                });
            }
            16 | 17 => {
                self.desk.hold.fetch_xor(true, Ordering::Relaxed);
                self.queues.worker.ring();
            }
            18 => {
                let every = usize::from(input.u8() % 4);
                self.desk.fail.store(every, Ordering::Relaxed);
            }
            19 => {
                let answer = input.u8() & 1 == 0;
                self.stop(answer);
                self.queues = self.host.create(1, &self.plan);
                if !self.on {
                    self.on = true;
                }
            }
            20 => {
                let (at, byte) = (BASE + u64::from(input.u16()) * 8, input.u8());
                let _ = self.host.memory.write(at, &[byte]);
            }
            n => {
                self.host.turns(1 + 2 * usize::from(n & 1));
                self.host.reap(&mut self.queues);
            }
        }
    }

    fn dma(&mut self, dma: Dma) {
        self.send(|done| Message::Dma {
            dma,
            bound: Duration::ZERO,
            done,
        });
        // The host may use what has gone for something else only after that, and this host does.
        self.finish();
    }

    /// Everything that was asked for has its end.
    fn finish(&mut self) {
        let open = std::mem::take(&mut self.open);
        self.host.until(|_| {
            let over = |o: &Arc<Mutex<bool>>| *o.lock().expect("one thread");
            open.iter().all(over).then_some(())
        });
    }

    fn stop(&mut self, answer: bool) {
        self.host.stop(&self.queues, answer, Duration::ZERO);
        self.finish();
        assert_eq!(self.desk.held(), 0);
        assert_eq!(self.desk.locks.load(Ordering::Relaxed), 0);
    }
}

/// Runs a worker under a host that does what `data` says. It must not panic, and everything must end. Gives how many commands
/// were done, and how many failed.
pub fn fuzz_queues(data: &[u8]) -> (u64, u64) {
    let mut input = Choices(data);
    let mut world = World::new(&mut input);
    while !input.is_empty() {
        world.step(&mut input);
    }
    world.host.turns(4);
    world.stop(true);
    let c = &world.queues.sqs[0].counters;
    let done = [&c.reads, &c.writes, &c.flushes, &c.discards];
    let done = done.iter().map(|n| n.load(Ordering::Relaxed)).sum();
    // Within the memory of one host, and no more.
    assert!(world.host.memory.end() <= BASE + 2 * REGION);
    (done, c.errors.load(Ordering::Relaxed))
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use bluff_testing::{Chance, is_emulated, is_long};
    use proptest::prelude::*;

    fn cases() -> ProptestConfig {
        ProptestConfig {
            cases: match (is_long(), is_emulated()) {
                (true, _) => 100_000,
                (_, true) => 300,
                _ => 1500,
            },
            failure_persistence: None,
            ..ProptestConfig::default()
        }
    }

    /// Scripts get as far as storage, and into the error paths.
    #[test]
    fn scripts_reach_the_volume() {
        let (mut done, mut failed, mut good, mut bad) = (0, 0, 0, 0);
        let mut chance = Chance::new(1);
        for _ in 0..500 {
            let data = chance.bytes(400);
            let (d, f) = fuzz_queues(&data);
            (done, failed) = (done + d, failed + f);
            let (g, b) = fuzz_data(&data);
            (good, bad) = (good + g, bad + b);
        }
        assert!(done > 100 && failed > 100, "{done} done, {failed} failed");
        assert!(good > 100 && bad > 100, "{good} resolved, {bad} refused");
    }

    proptest! {
        #![proptest_config(cases())]

        #[test]
        fn any_host_is_survived(data in prop::collection::vec(any::<u8>(), 0..600)) {
            fuzz_queues(&data);
        }

        #[test]
        fn any_pointer_is_survived(data in prop::collection::vec(any::<u8>(), 0..600)) {
            fuzz_data(&data);
        }
    }
}
