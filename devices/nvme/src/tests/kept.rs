//! Workers that are killed, and others that go on with what they had.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use bluff_block::Kind;
use bluff_memory::GuestMemory;
use bluff_pci::Dma;
use bluff_reactor::Poll;
use bluff_testing::{Chance, times};

use crate::fuzzing::host::{DATA, Host, LONG, OK, Plan, Queues, slow, status, write};
use crate::fuzzing::slow::Desk;
use crate::journal::{Journal, death};
use crate::namespace::Namespace;
use crate::report::QueueEvent;
use crate::worker::Message;

/// A host with some queues, and what it has asked for.
struct Play {
    host: Host,
    queues: Queues,
    plan: Plan,
    desk: Arc<Desk>,
    /// Commands that are not answered, by queue and identifier, with their blocks.
    open: BTreeMap<(u16, u16), u64>,
    /// Blocks whose writes were answered.
    answered: BTreeSet<u64>,
    heads: BTreeMap<u16, u32>,
    next: u64,
    deaths: u32,
}

impl Play {
    fn new() -> Self {
        let (volume, desk) = slow(1 << 20, |_| {});
        let mut host = Host::new(vec![Namespace::new(1, volume, 9)]);
        host.journal = Some(Journal::new(4).unwrap());
        let plan = Plan {
            cq_size: 8,
            sq_size: 5,
            sqs: 2,
            // The desk wakes nobody.
            poll: Poll::Always,
            ..Plan::default()
        };
        let queues = host.create(1, &plan);
        Self {
            host,
            queues,
            plan,
            desk,
            open: BTreeMap::new(),
            answered: BTreeSet::new(),
            heads: BTreeMap::new(),
            next: 0,
            deaths: 0,
        }
    }

    /// Puts writes of blocks that nobody has written yet into a queue.
    fn put(&mut self, sq: usize, most: u32) {
        let (qid, size) = (self.queues.sqs[sq].qid, self.queues.sqs[sq].size);
        let head = self.heads.get(&qid).copied().unwrap_or(0);
        let used = (self.queues.sqs[sq].tail + size - head) % size;
        for _ in 0..most.min(size - 1 - used) {
            let cid = self
                .host
                .put(&mut self.queues, sq, write(self.next, 1, DATA));
            self.open.insert((qid, cid), self.next);
            self.next += 1;
        }
        self.host.tell_tail(&self.queues, sq);
    }

    fn reap(&mut self) {
        for entry in self.host.reap(&mut self.queues) {
            assert_eq!(status(&entry), OK);
            let key = (entry.sq_id.get(), entry.cid.get());
            let block = self.open.remove(&key);
            let block = block.expect("asked for once, and answered once");
            self.answered.insert(block);
            self.heads.insert(key.0, entry.sq_head.get().into());
        }
    }

    /// Takes turns, as far as the process lives; where it dies another goes on.
    fn turns(&mut self, n: usize) {
        let lived = catch_unwind(AssertUnwindSafe(|| self.host.turns(n)));
        if let Err(cause) = lived {
            assert!(cause.is::<death::Killed>(), "died of itself");
            self.deaths += 1;
            // Everything that was posted is answered, whoever posted it.
            self.reap();
            self.desk.take();
            self.host.go_on(&mut self.queues, &self.plan);
        }
        for (kind, offset, ..) in self.desk.take() {
            assert!(matches!(kind, Kind::Write { .. }));
            let block = offset / 512;
            assert!(!self.answered.contains(&block), "{block} written again");
        }
    }

    fn finish(&mut self) {
        self.desk.hold(false);
        for _ in 0..2000 {
            if self.open.is_empty() {
                break;
            }
            self.turns(1);
            self.reap();
        }
        assert_eq!(self.open, BTreeMap::new(), "never answered");
        self.turns(20);
        self.reap();
        assert_eq!(self.host.told(), Vec::<QueueEvent>::new());
    }
}

/// A script of its own for each seed.
fn script(play: &mut Play, seed: u64, steps: u32) {
    let mut chance = Chance::new(seed);
    for _ in 0..steps {
        match chance.below(6) {
            0 => play.put(0, 1 + chance.below(4) as u32),
            1 => play.put(1, 1 + chance.below(4) as u32),
            2 => play.desk.hold(chance.below(2) == 0),
            3 => play.reap(),
            _ => play.turns(1 + chance.below(3) as usize),
        }
    }
}

#[test]
fn r02_killed_before_any_store() {
    for seed in 0..times(3, 60) {
        for stores in 0.. {
            let mut play = Play::new();
            death::after(Some(stores));
            script(&mut play, seed, 40);
            play.finish();
            death::after(None);
            if play.deaths == 0 {
                break;
            }
        }
    }
}

#[test]
fn r03_killed_again_during_recovery() {
    let mut chance = Chance::new(3);
    let mut deaths = 0;
    for seed in 0..times(100, 20_000) {
        let mut play = Play::new();
        for round in 0..8 {
            death::after(Some(chance.below(60)));
            script(&mut play, seed << 8 | round, 8);
        }
        death::after(None);
        play.finish();
        deaths += play.deaths;
    }
    assert!(deaths > times(100, 20_000), "{deaths}");
}

#[test]
fn r01_commands_that_wait_for_memory_outlive_the_process() {
    let mut play = Play::new();
    play.desk.hold(true);
    play.put(0, 4);
    play.turns(4);
    assert_eq!(play.desk.held(), 4);
    // The memory goes, and they are completed: there is no place for that.
    let memory = play.host.memory.clone();
    let off = |dma: Dma| {
        |done| Message::Dma {
            dma,
            bound: LONG,
            done,
        }
    };
    let over = play.host.send(&play.queues, off(Dma::Off));
    play.desk.hold(false);
    play.turns(10);
    assert!(*over.lock().unwrap());
    play.reap();
    assert_eq!(play.open.len(), 4, "nothing was posted");
    // The next process has it not either, at first; then both.
    let host = &mut play.host;
    host.memory = GuestMemory::empty();
    host.go_on(&mut play.queues, &play.plan);
    host.turns(5);
    host.memory = memory.clone();
    host.tell(&play.queues, off(Dma::On(memory)));
    host.turns(20);
    assert_eq!(play.desk.take(), [], "they were done");
    play.finish();
}

#[test]
fn a_journal_that_makes_no_sense_breaks_the_queue() {
    let mut play = Play::new();
    play.desk.hold(true);
    play.put(0, 3);
    play.turns(4);
    let journal = play.host.journal.as_ref().unwrap().queue(1);
    let command = write(0, 1, DATA);
    // Of a queue that is not there; and more than the queue has entries.
    let lies: [&dyn Fn(); 2] = [&|| journal.take(5, 9, 4, 0, &command), &|| {
        (5..20).for_each(|i| journal.take(i, 9, 1, 0, &command));
    }];
    for lie in lies {
        lie();
        play.host.go_on(&mut play.queues, &play.plan);
        play.host.turns(20);
        let told = play.host.told();
        assert!(matches!(told[..], [QueueEvent::Broken { .. }]), "{told:?}");
        play.reap();
        assert_eq!(play.answered.len(), 0);
        (5..20).for_each(|i| journal.strike(i));
    }
}
