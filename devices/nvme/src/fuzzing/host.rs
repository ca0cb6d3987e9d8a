//! A small NVMe host that writes queues by hand, on a reactor that it steps.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bluff_block::{Geometry, Volume};
use bluff_memory::{GuestMemory, Region, RegionSpec};
use bluff_pci::Dma;
use bluff_reactor::{Handle, Options, Poll, Reactor, UringUse};
use zerocopy::{FromBytes, IntoBytes};

use super::slow::{Desk, Slow};
use crate::QueueCounters;
use crate::interrupt::{Coalescing, Signal};
use crate::journal::Journal;
use crate::namespace::{Namespace, Namespaces};
use crate::queue::{Doorbells, Shadow};
use crate::report::{QueueEvent, Shared};
use crate::spec::{Command, Completion, Status, io};
use crate::worker::{Message, Setup, SqSetup, WorkerHandle};

/// Guest address of the first of two regions that adjoin for the guest only.
pub(crate) const BASE: u64 = 0x10_0000;
/// Bytes of a region.
pub(crate) const REGION: u64 = 0x10_0000;
/// A page for lists.
pub(crate) const LISTS: u64 = BASE + 0x6_0000;
/// Where data begins; it goes on in the second region.
pub(crate) const DATA: u64 = BASE + 0x8_0000;
/// Shadow doorbells, and event indices.
pub(crate) const SHADOW: Shadow = Shadow {
    doorbells: BASE + 0x5_0000,
    events: BASE + 0x5_1000,
    page: 4096,
};
/// Turns within which everything is over that does not wait for somebody. A reactor that is busy looks at its clock once in a
/// while only.
pub(crate) const TURNS: usize = 1024;
/// A long time.
pub(crate) const LONG: Duration = Duration::from_secs(1000);

/// What gives shared memory of its own to each that maps it.
fn zeroes() -> OwnedFd {
    let file = File::options().read(true).write(true).open("/dev/zero");
    OwnedFd::from(file.expect("/dev/zero can be opened"))
}

fn options() -> Options {
    Options {
        uring: UringUse::Off,
        ..Options::default()
    }
}

/// A region of fresh memory.
pub(crate) fn region(guest: u64, len: u64) -> Region {
    let spec = RegionSpec {
        guest,
        len,
        user: guest,
        offset: 0,
        file: zeroes(),
    };
    Region::new(spec, &GuestMemory::empty()).expect("anonymous memory")
}

/// The first `n` regions; those that are in `old` are the same.
pub(crate) fn memory(old: &GuestMemory, n: u64) -> Arc<GuestMemory> {
    let one = |i: u64| {
        let start = BASE + i * REGION;
        let kept = old.regions().find(|r| r.guest() == start).cloned();
        kept.unwrap_or_else(|| region(start, REGION))
    };
    GuestMemory::new((0..n).map(one).collect()).expect("they adjoin")
}

/// A volume of `size` bytes in memory, and its desk.
pub(crate) fn slow(size: u64, change: impl FnOnce(&mut Geometry)) -> (Arc<dyn Volume>, Arc<Desk>) {
    let inner = bluff_block::ram::Ram::new(512, size).expect("a little memory");
    let desk = Arc::new(Desk::default());
    let mut geometry = inner.geometry();
    // As if a flush had something to do.
    geometry.volatile_cache = true;
    change(&mut geometry);
    let volume = Slow {
        inner: Arc::new(inner),
        geometry,
        desk: desk.clone(),
    };
    (Arc::new(volume), desk)
}

/// One submission queue, from the host's side.
pub(crate) struct HostSq {
    pub(crate) qid: u16,
    pub(crate) base: u64,
    pub(crate) size: u32,
    pub(crate) tail: u32,
    pub(crate) counters: Arc<QueueCounters>,
}

/// A completion queue with its submission queues, and its worker.
pub(crate) struct Queues {
    pub(crate) qid: u16,
    pub(crate) base: u64,
    pub(crate) size: u32,
    pub(crate) head: u32,
    phase: bool,
    pub(crate) sqs: Vec<HostSq>,
    pub(crate) worker: WorkerHandle,
    pub(crate) interrupts: Arc<AtomicU64>,
}

/// The host, its memory, and the controller's part that is tried.
pub(crate) struct Host {
    pub(crate) reactor: Reactor,
    pub(crate) handle: Handle,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) doorbells: Arc<Doorbells>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) events: Arc<Mutex<Vec<QueueEvent>>>,
    pub(crate) namespaces: Vec<Arc<Namespace>>,
    /// Whether the shadow doorbells are in use.
    pub(crate) shadow: bool,
    /// Where workers write down what is in flight.
    pub(crate) journal: Option<Arc<Journal>>,
    next_cid: u16,
    /// Wakes the worker after each doorbell.
    pub(crate) trapped: bool,
}

/// How a completion queue is made.
#[derive(Clone)]
pub(crate) struct Plan {
    pub(crate) cq_size: u32,
    pub(crate) sq_size: u32,
    pub(crate) sqs: u16,
    pub(crate) signal: Signal,
    pub(crate) coalescing: Coalescing,
    pub(crate) poll: Poll,
    pub(crate) page_shift: u8,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            cq_size: 64,
            sq_size: 64,
            sqs: 1,
            signal: Signal::None,
            coalescing: Coalescing::default(),
            poll: Poll::Never,
            page_shift: 12,
        }
    }
}

impl Host {
    pub(crate) fn new(namespaces: Vec<Arc<Namespace>>) -> Self {
        let reactor = Reactor::new(&options()).expect("a reactor");
        let events: Arc<Mutex<Vec<QueueEvent>>> = Arc::default();
        let sink = events.clone();
        Self {
            handle: reactor.handle(),
            reactor,
            memory: memory(&GuestMemory::empty(), 2),
            doorbells: Doorbells::new(16).expect("a page"),
            shared: Shared::new(
                Arc::new(crate::health::Counters::new(std::time::Instant::now())),
                move |event| sink.lock().expect("one thread").push(event),
            ),
            events,
            namespaces,
            shadow: false,
            journal: None,
            next_cid: 0,
            trapped: true,
        }
    }

    /// Creates a completion queue and its submission queues, which have the numbers from `qid` on.
    pub(crate) fn create(&mut self, qid: u16, plan: &Plan) -> Queues {
        let base = BASE + u64::from(qid) * 0x4000;
        // A host clears it before it creates the queue.
        let zeroes = vec![0; plan.cq_size as usize * 16];
        self.memory.write(base, &zeroes).expect("a place for it");
        let (worker, interrupts) = self.worker(qid, plan, false);
        let mut queues = Queues {
            qid,
            base,
            size: plan.cq_size,
            head: 0,
            phase: true,
            sqs: Vec::new(),
            worker,
            interrupts,
        };
        for i in 0..plan.sqs {
            self.add_sq(&mut queues, qid + i, plan.sq_size);
        }
        self.turns(2);
        queues
    }

    /// The process has died, and another one goes on with its queues.
    pub(crate) fn go_on(&mut self, queues: &mut Queues, plan: &Plan) {
        let reactor = Reactor::new(&options()).expect("a reactor");
        self.handle = reactor.handle();
        self.reactor = reactor;
        (queues.worker, queues.interrupts) = self.worker(queues.qid, plan, true);
        for sq in &mut queues.sqs {
            sq.counters = Arc::default();
            queues.worker.send(Message::AddSq {
                queue: SqSetup {
                    qid: sq.qid,
                    base: sq.base,
                    size: sq.size,
                    counters: sq.counters.clone(),
                    resumes: true,
                },
                done: Box::new(|result| result.expect("its memory is there")),
            });
        }
        queues.worker.send(Message::Resume);
        queues.worker.send(Message::Dma {
            dma: Dma::On(self.memory.clone()),
            bound: LONG,
            done: Box::new(|| {}),
        });
    }

    fn worker(&mut self, qid: u16, plan: &Plan, resumes: bool) -> (WorkerHandle, Arc<AtomicU64>) {
        let interrupts: Arc<AtomicU64> = Arc::default();
        let base = BASE + u64::from(qid) * 0x4000;
        let setup = Setup {
            qid,
            base,
            size: plan.cq_size,
            signal: plan.signal.clone(),
            coalescing: plan.coalescing,
            interrupts: interrupts.clone(),
            doorbells: self.doorbells.clone(),
            shadow: self.shadow.then_some(SHADOW),
            dma: match resumes {
                // It is turned on after that.
                true => Dma::Off,
                false => Dma::On(self.memory.clone()),
            },
            page_shift: plan.page_shift,
            journal: self.journal.as_ref().map(|j| j.queue(qid)),
            resumes,
            namespaces: Namespaces::new(16, self.namespaces.clone()),
            shared: self.shared.clone(),
        };
        let worker = WorkerHandle::start(&self.handle, plan.poll, setup, |result| {
            result.expect("its memory is there");
        });
        (worker, interrupts)
    }

    pub(crate) fn add_sq(&mut self, queues: &mut Queues, qid: u16, size: u32) {
        let base = BASE + u64::from(qid) * 0x4000 + 0x2000;
        let counters: Arc<QueueCounters> = Arc::default();
        queues.sqs.push(HostSq {
            qid,
            base,
            size,
            tail: 0,
            counters: counters.clone(),
        });
        queues.worker.send(Message::AddSq {
            queue: SqSetup {
                qid,
                base,
                size,
                counters,
                resumes: false,
            },
            done: Box::new(|result| result.expect("its memory is there")),
        });
    }

    pub(crate) fn turns(&mut self, n: usize) {
        for _ in 0..n {
            self.reactor.step(Some(Duration::ZERO));
        }
    }

    /// Steps until nothing is left to do but to sleep.
    pub(crate) fn rest(&mut self) {
        self.until(|host| host.reactor.rest().then_some(()));
    }

    /// Steps until `what` is there.
    pub(crate) fn until<T>(&mut self, mut what: impl FnMut(&mut Self) -> Option<T>) -> T {
        for _ in 0..TURNS {
            if let Some(t) = what(self) {
                return t;
            }
            self.turns(1);
        }
        panic!("nothing came in {TURNS} turns");
    }

    /// Sends a message whose end is waited for.
    pub(crate) fn tell(
        &mut self,
        queues: &Queues,
        message: impl FnOnce(bluff_pci::Done) -> Message,
    ) {
        let over = self.send(queues, message);
        self.until(|_| over.lock().expect("one thread").then_some(()));
    }

    /// Sends a message, and gives whether it is over.
    pub(crate) fn send(
        &mut self,
        queues: &Queues,
        message: impl FnOnce(bluff_pci::Done) -> Message,
    ) -> Arc<Mutex<bool>> {
        let over = Arc::new(Mutex::new(false));
        let told = over.clone();
        let done = Box::new(move || *told.lock().expect("one thread") = true);
        queues.worker.send(message(done));
        over
    }

    /// Ends a worker.
    pub(crate) fn stop(&mut self, queues: &Queues, answer: bool, bound: Duration) {
        self.tell(queues, |done| Message::Stop {
            bound,
            answer,
            done,
        });
    }

    /// Gives the shadow doorbells.
    pub(crate) fn give_shadow(&mut self, queues: &Queues) {
        self.shadow = true;
        self.tell(queues, |done| Message::Shadow {
            shadow: SHADOW,
            done,
        });
    }

    /// Writes a doorbell, as a register.
    pub(crate) fn ring(&mut self, queues: &Queues, number: u64, value: u32) {
        let known = self.doorbells.ring(number * 4, value);
        assert!(known.is_some());
        if self.trapped {
            queues.worker.ring();
        }
    }

    /// Puts a command into a queue, without telling; gives its identifier.
    pub(crate) fn put(&mut self, queues: &mut Queues, sq: usize, mut command: Command) -> u16 {
        self.next_cid = self.next_cid.wrapping_add(1);
        command.cid = self.next_cid.into();
        let sq = &mut queues.sqs[sq];
        let at = sq.base + u64::from(sq.tail) * 64;
        self.memory
            .write(at, command.as_bytes())
            .expect("the queue is there");
        sq.tail = (sq.tail + 1) % sq.size;
        self.next_cid
    }

    /// Tells how far a queue is filled: says whether the register was written.
    pub(crate) fn tell_tail(&mut self, queues: &Queues, sq: usize) -> bool {
        let sq = &queues.sqs[sq];
        let (number, value) = (u64::from(sq.qid) * 2, sq.tail);
        self.doorbell(queues, number, value)
    }

    /// A doorbell, as a driver writes it: the shadow first, where there is one, and the register where the event index asks for it.
    fn doorbell(&mut self, queues: &Queues, number: u64, value: u32) -> bool {
        if self.shadow {
            let old = self.word(SHADOW.doorbells + number * 4) as u16;
            self.set_word(SHADOW.doorbells + number * 4, value);
            let event = self.word(SHADOW.events + number * 4) as u16;
            let new = value as u16;
            if new.wrapping_sub(event).wrapping_sub(1) >= new.wrapping_sub(old) {
                return false;
            }
        }
        self.ring(queues, number, value);
        true
    }

    pub(crate) fn word(&self, at: u64) -> u32 {
        let mut bytes = [0; 4];
        self.memory.read(at, &mut bytes).expect("mapped");
        u32::from_le_bytes(bytes)
    }

    pub(crate) fn set_word(&self, at: u64, value: u32) {
        self.memory.write(at, &value.to_le_bytes()).expect("mapped");
    }

    /// What was completed; the head is told.
    pub(crate) fn reap(&mut self, queues: &mut Queues) -> Vec<Completion> {
        let (found, _) = self.reap_quietly(queues);
        if !found.is_empty() {
            self.tell_head(queues);
        }
        found
    }

    pub(crate) fn tell_head(&mut self, queues: &Queues) -> bool {
        self.doorbell(queues, u64::from(queues.qid) * 2 + 1, queues.head)
    }

    /// What was completed; the head is not told.
    pub(crate) fn reap_quietly(&mut self, queues: &mut Queues) -> (Vec<Completion>, u32) {
        let mut found = Vec::new();
        while found.len() < queues.size as usize {
            let mut bytes = [0; 16];
            let at = queues.base + u64::from(queues.head) * 16;
            self.memory
                .read(at, &mut bytes)
                .expect("the queue is there");
            let entry = Completion::read_from_bytes(&bytes).expect("of this size");
            if (entry.status.get() & 1 == 1) != queues.phase {
                break;
            }
            found.push(entry);
            queues.head += 1;
            if queues.head == queues.size {
                (queues.head, queues.phase) = (0, !queues.phase);
            }
        }
        (found, queues.head)
    }

    /// Does a command; gives its status.
    pub(crate) fn run(&mut self, queues: &mut Queues, command: Command) -> u16 {
        let cid = self.put(queues, 0, command);
        self.tell_tail(queues, 0);
        let entry = self.until(|host| host.reap(queues).pop());
        assert_eq!(entry.cid.get(), cid);
        status(&entry)
    }

    /// What the workers told since the last time.
    pub(crate) fn told(&self) -> Vec<QueueEvent> {
        std::mem::take(&mut self.events.lock().expect("one thread"))
    }
}

/// The status of a completion: type and code.
pub(crate) fn status(entry: &Completion) -> u16 {
    entry.status.get() >> 1 & 0x7ff
}

/// Of success.
pub(crate) const OK: u16 = 0;

/// The code of a status.
pub(crate) fn code(status: Status) -> u16 {
    status.code()
}

/// A command about blocks, with its data at `at` if that is all in two pages or in one piece that begins with a page.
pub(crate) fn blocks(opcode: u8, nsid: u32, lba: u64, count: u32, at: u64) -> Command {
    let mut command = Command {
        opcode,
        nsid: nsid.into(),
        cdw10: (lba as u32).into(),
        cdw11: ((lba >> 32) as u32).into(),
        cdw12: (count - 1).into(),
        ..Command::default()
    };
    command.dptr[0] = at.into();
    command.dptr[1] = (at & !0xfff).wrapping_add(0x1000).into();
    command
}

/// The same for data of any length: an SGL of one block.
pub(crate) fn with_sgl(mut command: Command, at: u64, len: u32) -> Command {
    command.flags = 0x40;
    command.dptr[0] = at.into();
    command.dptr[1] = u64::from(len).into();
    command
}

pub(crate) fn read(lba: u64, count: u32, at: u64) -> Command {
    with_sgl(blocks(io::READ, 1, lba, count, at), at, count * 512)
}

pub(crate) fn write(lba: u64, count: u32, at: u64) -> Command {
    with_sgl(blocks(io::WRITE, 1, lba, count, at), at, count * 512)
}
