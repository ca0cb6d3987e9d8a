//! A controller whose process is killed again and again, under a host that notices nothing: one life of it from enabling to shutdown, with all that is written down on
//! the way.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use bluff_block::Volume;
use bluff_memory::GuestMemory;
use bluff_pci::{Function, PciFunction, Region};
use bluff_reactor::{Options, Poll, Reactor, UringUse};
use bluff_testing::{Chance, is_long, times};
use zerocopy::{FromBytes, IntoBytes};

use crate::fuzzing::host::{BASE, DATA, OK, memory, slow, status, write};
use crate::fuzzing::slow::Desk;
use crate::journal::death;
use crate::spec::registers::{csts, offset};
use crate::spec::{Command, Completion, admin, feature, log};
use crate::{
    Controller, ControllerError, ControllerOptions, Identity, Keep, NamespaceOptions, Runs,
    Subsystem, SubsystemOptions,
};

const CC: u32 = 6 << 16 | 4 << 20;
const ENABLE: u32 = 1;
const SHUTDOWN: u32 = 1 << 14;

/// Of a pair of rings: entries.
const SIZE: u32 = 7;

/// A ring pair of the host's; a CQ may have other SQs, too.
#[derive(Clone, Copy, Debug)]
struct Pair {
    sq: u64,
    cq: u64,
    tail: u32,
    head: u32,
    phase: bool,
}

impl Pair {
    fn new(qid: u16) -> Self {
        let sq = BASE + u64::from(qid) * 0x2000;
        Self {
            sq,
            cq: sq + 0x1000,
            tail: 0,
            head: 0,
            phase: true,
        }
    }
}

/// What is served by one process after the other.
struct Lives {
    reactor: Reactor,
    function: Function<Controller>,
    subsystem: Arc<Subsystem>,
    volume: Arc<dyn Volume>,
    desk: Arc<Desk>,
    namespaces: u32,
    memory: Arc<GuestMemory>,
    files: Vec<OwnedFd>,
    /// The function after the last message.
    saved: Option<Vec<u8>>,
    /// After how many stores the next one dies.
    fates: Vec<u64>,
    deaths: u32,
    pairs: BTreeMap<u16, Pair>,
    /// Commands that are not answered.
    open: Vec<(u16, u16)>,
    next: u16,
}

fn process(
    volume: &Arc<dyn Volume>,
    namespaces: u32,
    keep: Keep,
) -> Result<(Reactor, Arc<Subsystem>, Function<Controller>), ControllerError> {
    let options = Options {
        uring: UringUse::Off,
        ..Options::default()
    };
    let reactor = Reactor::new(&options).unwrap();
    let subsystem = Subsystem::new(SubsystemOptions::new("nqn.2025-01.test:lives")).unwrap();
    for n in 0..namespaces {
        add(&subsystem, volume, n);
    }
    let options = ControllerOptions {
        queues: 3,
        ..ControllerOptions::new("lives")
    };
    let runs = Runs {
        reactors: vec![reactor.handle()],
        // The desk wakes nobody.
        poll: Poll::Adaptive(Duration::from_secs(1000)),
        bound: Duration::from_secs(100),
    };
    let function = Controller::function_kept(&subsystem, options, runs, keep)?;
    Ok((reactor, subsystem, function))
}

fn add(subsystem: &Arc<Subsystem>, volume: &Arc<dyn Volume>, n: u32) {
    let options = NamespaceOptions::new(Identity::hashed(&format!("{n}")));
    subsystem.add(volume.clone(), options).unwrap();
}

fn clone(files: &[OwnedFd]) -> Vec<OwnedFd> {
    files.iter().map(|f| f.try_clone().unwrap()).collect()
}

impl Lives {
    fn new(fates: Vec<u64>) -> Self {
        let (volume, desk) = slow(1 << 20, |_| {});
        let (reactor, subsystem, function) = process(&volume, 1, Keep::Fresh).unwrap();
        let mut this = Self {
            files: function.device().files().unwrap(),
            reactor,
            function,
            subsystem,
            volume,
            desk,
            namespaces: 1,
            memory: memory(&GuestMemory::empty(), 2),
            saved: None,
            fates,
            deaths: 0,
            pairs: BTreeMap::new(),
            open: Vec::new(),
            next: 0,
        };
        let memory = this.memory.clone();
        this.function
            .set_memory(memory, Duration::ZERO, Box::new(|| {}));
        death::after(this.fates.pop());
        // Memory space, and bus master.
        this.message(|f| {
            let _ = f.write(Region::Config, 4, &6u16.to_le_bytes()).unwrap();
        });
        this
    }

    /// Whether it was lived through; where not, another process is there.
    fn lives<T>(&mut self, act: impl FnOnce(&mut Self) -> T) -> Option<T> {
        let lived = catch_unwind(AssertUnwindSafe(|| act(self)));
        match lived {
            Ok(value) => Some(value),
            Err(cause) if cause.is::<death::Killed>() => {
                self.deaths += 1;
                while !self.restart() {
                    self.deaths += 1;
                }
                None
            }
            Err(cause) => std::panic::resume_unwind(cause),
        }
    }

    fn restart(&mut self) -> bool {
        death::after(self.fates.pop());
        let again = catch_unwind(AssertUnwindSafe(|| {
            let keep = Keep::Restored(clone(&self.files));
            let made = process(&self.volume, self.namespaces, keep);
            let (reactor, subsystem, function) = made.unwrap();
            (self.function, self.reactor, self.subsystem) = (function, reactor, subsystem);
            let memory = self.memory.clone();
            self.function
                .set_memory(memory, Duration::ZERO, Box::new(|| {}));
            // The session is taken up when it comes.
            for _ in 0..self.deaths % 3 {
                self.reactor.step(Some(Duration::ZERO));
            }
            if let Some(saved) = &self.saved {
                self.function.load(saved).unwrap();
            }
        }));
        match again {
            Ok(()) => true,
            Err(cause) if cause.is::<death::Killed>() => false,
            Err(cause) => std::panic::resume_unwind(cause),
        }
    }

    /// One message of the host, which is dealt with again where the process dies before it is recorded.
    fn message(&mut self, act: impl Fn(&mut Function<Controller>)) {
        while self.lives(|this| act(&mut this.function)).is_none() {}
        self.saved = Some(self.function.save());
    }

    fn set(&mut self, at: u64, value: u32) {
        self.message(|f| {
            let _ = f.write(Region::Bar(0), at, &value.to_le_bytes()).unwrap();
        });
    }

    fn csts(&mut self) -> u32 {
        let mut bytes = [0; 4];
        self.function
            .read(Region::Bar(0), offset::CSTS, &mut bytes)
            .unwrap();
        // What the host has seen is recorded.
        self.saved = Some(self.function.save());
        u32::from_le_bytes(bytes)
    }

    fn turn(&mut self) {
        self.lives(|this| this.reactor.step(Some(Duration::ZERO)));
    }

    #[track_caller]
    fn until(&mut self, mut what: impl FnMut(&mut Self) -> bool) {
        for _ in 0..3000 {
            if what(self) {
                return;
            }
            self.turn();
        }
        panic!(
            "nothing came; {:?} are open; {:?}",
            self.open,
            self.function.device()
        );
    }

    fn pair(&mut self, qid: u16) -> &mut Pair {
        self.pairs.get_mut(&qid).unwrap()
    }

    fn new_pair(&mut self, qid: u16) -> Pair {
        let pair = Pair::new(qid);
        self.memory
            .write(pair.cq, &[0; 16 * SIZE as usize])
            .unwrap();
        self.pairs.insert(qid, pair);
        pair
    }

    /// Gives a command; its identifier.
    fn give(&mut self, qid: u16, command: Command) -> u16 {
        self.next += 1;
        let cid = self.next;
        let command = Command {
            cid: cid.into(),
            ..command
        };
        let pair = self.pair(qid);
        let at = pair.sq + u64::from(pair.tail) * 64;
        pair.tail = (pair.tail + 1) % SIZE;
        let tail = pair.tail;
        self.memory.write(at, command.as_bytes()).unwrap();
        self.open.push((qid, cid));
        self.ring(u64::from(qid) * 2, tail);
        cid
    }

    /// A doorbell, as by a host that has shadows and rings each time nevertheless.
    fn ring(&mut self, number: u64, value: u32) {
        let shadow = BASE + 0x5_0000 + number * 4;
        self.memory.write(shadow, &value.to_le_bytes()).unwrap();
        self.set(0x1000 + number * 4, value);
    }

    /// What was completed on a CQ.
    fn reap(&mut self, qid: u16) -> Vec<Completion> {
        let mut found = Vec::new();
        let mut pair = *self.pair(qid);
        loop {
            let mut bytes = [0; 16];
            let at = pair.cq + u64::from(pair.head) * 16;
            self.memory.read(at, &mut bytes).unwrap();
            let entry = Completion::read_from_bytes(&bytes).unwrap();
            if (entry.status.get() & 1 == 1) != pair.phase {
                break;
            }
            let key = (entry.sq_id.get(), entry.cid.get());
            let open = self.open.iter().position(|o| *o == key);
            self.open
                .remove(open.unwrap_or_else(|| panic!("{key:?} answered again")));
            found.push(entry);
            pair.head += 1;
            if pair.head == SIZE {
                (pair.head, pair.phase) = (0, !pair.phase);
            }
        }
        if !found.is_empty() {
            *self.pair(qid) = pair;
            self.ring(u64::from(qid) * 2 + 1, pair.head);
        }
        found
    }

    /// Does an admin command; its status and dword 0.
    fn admin(&mut self, command: Command) -> (u16, u32) {
        let cid = self.give(0, command);
        let mut answer = None;
        self.until(|this| {
            for entry in this.reap(0) {
                assert_eq!(entry.cid.get(), cid, "an event that nobody expects");
                answer = Some((status(&entry), entry.dw0.get()));
            }
            answer.is_some()
        });
        answer.unwrap()
    }

    fn well(&mut self, command: Command) -> u32 {
        let (status, dword) = self.admin(command);
        assert_eq!(status, OK, "{command:?}");
        dword
    }

    fn enable(&mut self) {
        let admin = self.new_pair(0);
        self.set(offset::AQA, (SIZE - 1) << 16 | (SIZE - 1));
        self.set(offset::ASQ, admin.sq as u32);
        self.set(offset::ACQ, admin.cq as u32);
        self.set(offset::ASQ + 4, 0);
        self.set(offset::ACQ + 4, 0);
        self.set(offset::CC, CC | ENABLE);
        self.until(|this| this.csts() & csts::RDY != 0);
    }

    fn create(&mut self, qid: u16, cqid: u16) {
        let mut pair = self.new_pair(qid);
        if qid == cqid {
            let mut cq = command(admin::CREATE_CQ, u32::from(qid) | (SIZE - 1) << 16, 1);
            cq.dptr[0] = pair.cq.into();
            self.well(cq);
        }
        pair = *self.pair(qid);
        let flags = 1 | u32::from(cqid) << 16;
        let mut sq = command(admin::CREATE_SQ, u32::from(qid) | (SIZE - 1) << 16, flags);
        sq.dptr[0] = pair.sq.into();
        self.well(sq);
    }

    /// Writes, some of them at once.
    fn io(&mut self, qid: u16, cqid: u16, rounds: u32) {
        for round in 0..rounds {
            self.desk.hold(true);
            for n in 0..3 {
                self.give(qid, write(u64::from(round * 3 + n), 1, DATA));
            }
            self.turn();
            self.desk.hold(false);
            let mut missing = 3;
            self.until(|this| {
                for entry in this.reap(cqid) {
                    assert_eq!(status(&entry), OK);
                    missing -= 1;
                }
                missing == 0
            });
        }
    }
}

fn command(opcode: u8, cdw10: u32, cdw11: u32) -> Command {
    Command {
        opcode,
        cdw10: cdw10.into(),
        cdw11: cdw11.into(),
        ..Command::default()
    }
}

fn with_data(mut command: Command) -> Command {
    command.dptr[0] = DATA.into();
    command
}

/// A life, with all that a controller writes down; says how many stores were left to its fate.
fn live(l: &mut Lives) -> Option<u64> {
    l.enable();
    l.well(with_data(command(admin::IDENTIFY, 1, 0)));
    let mut vendor = [0; 2];
    l.memory.read(DATA, &mut vendor).unwrap();
    assert_eq!(vendor, 0x1af4u16.to_le_bytes());
    let set = |id: u8, value| command(admin::SET_FEATURES, id.into(), value);
    let get = |id: u8| command(admin::GET_FEATURES, id.into(), 0);
    assert_eq!(l.well(set(feature::id::QUEUES, 2 << 16 | 2)), 2 << 16 | 2);
    l.well(set(feature::id::ASYNC_EVENTS, 1 << 8));
    l.well(set(feature::id::TEMPERATURE, 330));
    let event = l.give(0, command(admin::ASYNC_EVENT, 0, 0));
    l.create(1, 1);
    l.create(2, 1);
    l.create(3, 3);
    l.io(1, 1, 3);
    l.io(2, 1, 3);
    let mut shadows = command(admin::DOORBELL_BUFFER, 0, 0);
    shadows.dptr = [(BASE + 0x5_0000).into(), (BASE + 0x5_1000).into()];
    l.well(shadows);
    l.io(1, 1, 2);
    l.io(3, 3, 3);
    assert_eq!(l.well(get(feature::id::TEMPERATURE)), 330);
    assert_eq!(l.well(get(feature::id::QUEUES)), 2 << 16 | 2);
    // A namespace comes, also where the process dies over it.
    l.namespaces += 1;
    let (subsystem, volume) = (l.subsystem.clone(), l.volume.clone());
    add(&subsystem, &volume, l.namespaces - 1);
    l.until(|l| {
        let told = l.reap(0).pop();
        told.inspect(|e| assert_eq!((e.cid.get(), status(e)), (event, OK)))
            .is_some()
    });
    let changed = u32::from(log::id::CHANGED) | 1023 << 16;
    l.well(with_data(command(admin::GET_LOG_PAGE, changed, 0)));
    let mut nsids = [0; 8];
    l.memory.read(DATA, &mut nsids).unwrap();
    assert_eq!(nsids, [2, 0, 0, 0, 0, 0, 0, 0]);
    l.well(command(admin::DELETE_SQ, 2, 0));
    l.io(1, 1, 2);
    l.well(command(admin::DELETE_SQ, 1, 0));
    l.well(command(admin::DELETE_CQ, 1, 0));
    l.create(1, 1);
    l.io(1, 1, 1);
    // Off and on again, with a queue that is in use.
    l.desk.hold(true);
    l.give(3, write(0, 1, DATA));
    l.turn();
    l.set(offset::CC, CC);
    l.open.clear();
    l.desk.hold(false);
    l.until(|l| l.csts() & csts::RDY == 0);
    l.enable();
    assert_eq!(l.well(get(feature::id::TEMPERATURE)), 343, "the default");
    l.create(1, 1);
    l.io(1, 1, 2);
    l.set(offset::CC, CC | ENABLE | SHUTDOWN);
    l.until(|l| l.csts() & csts::SHST_COMPLETE != 0);
    l.set(offset::CC, CC);
    l.until(|l| l.csts() == 0);
    death::after(None)
}

#[test]
fn r02_a_controller_killed_before_any_store() {
    // How many stores there are in a life that nothing ends.
    let mut whole = Lives::new(vec![u64::MAX]);
    let left = live(&mut whole).expect("it has not died");
    let stores = u64::MAX - left;
    let mut chance = Chance::new(2);
    let fates: Vec<u64> = match is_long() {
        true => (0..stores).collect(),
        false => (0..150).map(|_| chance.below(stores)).collect(),
    };
    let mut died = 0;
    for fate in &fates {
        let mut lives = Lives::new(vec![*fate]);
        live(&mut lives);
        died += lives.deaths as usize;
    }
    // Not each life has just as many turns.
    assert!(died > fates.len() / 2, "{died} of {}", fates.len());
}

/// A process in a hostile host's hand has written the journal: what it says is refused, or harms that host alone.
#[test]
fn a_journal_of_any_contents_ends_no_process() {
    let mut chance = Chance::new(4);
    let (mut refused, mut went_on) = (0, 0);
    for _ in 0..times(300, 20_000) {
        let mut l = Lives::new(vec![u64::MAX]);
        l.enable();
        l.create(1, 1);
        l.create(2, 1);
        l.io(1, 1, 1);
        l.desk.hold(true);
        l.give(2, write(0, 1, DATA));
        l.turn();
        let journal = File::from(l.files[1].try_clone().unwrap());
        let len = journal.metadata().unwrap().len();
        for _ in 0..1 + chance.below(6) {
            // What is in use is in the first pages, and behind the two copies of the admin side.
            let at = match chance.below(3) {
                0 => chance.below(0x2000),
                1 => 0x2000 + chance.below(0x600),
                _ => len - 3 * 0x21000 + chance.below(0x1400),
            } & !7;
            let word = match chance.below(4) {
                0 => chance.below(1 << 16),
                1 => u64::MAX - chance.below(3),
                2 => 0,
                _ => chance.below(u64::MAX),
            };
            journal.write_all_at(&word.to_le_bytes(), at).unwrap();
        }
        let keep = Keep::Restored(clone(&l.files));
        let Ok((reactor, subsystem, function)) = process(&l.volume, 1, keep) else {
            // The head of the file: it is none.
            refused += 1;
            continue;
        };
        (l.function, l.reactor, l.subsystem) = (function, reactor, subsystem);
        let memory = l.memory.clone();
        l.function
            .set_memory(memory, Duration::ZERO, Box::new(|| {}));
        if l.function.load(l.saved.as_ref().unwrap()).is_err() {
            refused += 1;
            continue;
        }
        went_on += 1;
        l.desk.hold(false);
        l.reactor.step(Some(Duration::ZERO));
        for _ in 0..30 {
            l.reactor.step(Some(Duration::ZERO));
        }
        // Whatever it is now, its host can have it anew.
        l.set(offset::CC, CC);
        l.until(|l| l.csts() & (csts::RDY | csts::CFS) == 0);
        l.open.clear();
        l.enable();
        l.create(1, 1);
        l.io(1, 1, 1);
    }
    assert!(refused > 0 && went_on > 0, "{refused} {went_on}");
}

#[test]
fn r03_a_controller_killed_again_and_again() {
    let (mut chance, mut died) = (Chance::new(3), 0);
    for _ in 0..times(40, 4000) {
        let fates = (0..1 + chance.below(40)).map(|_| chance.below(1500));
        let mut lives = Lives::new(fates.collect());
        live(&mut lives);
        died += lives.deaths;
    }
    assert!(died > times(40, 4000), "{died}");
}
