//! What the threads of a controller share: registers, routes of doorbells, mailboxes.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bluff_pci::Done;
use bluff_reactor::{Handle, Waker};

use crate::admin_worker::Message;
use crate::journal::Journal;
use crate::queue::{Doorbells, OFFSET, Side};
use crate::registers::{Effect, Registers, Run};
use crate::report::QueueEvent;
use crate::subsystem::{Subsystem, SubsystemEvent};
use crate::worker::WorkerHandle;

/// What tells the admin worker something.
#[derive(Debug)]
pub(crate) struct Mailbox {
    pub(super) sender: Sender<Message>,
    pub(crate) waker: Arc<OnceLock<Waker>>,
    pub(super) reactor: Handle,
}

impl Mailbox {
    /// Messages are in order.
    pub(crate) fn send(&self, message: Message) {
        // Fails where the worker has ended; what waits for an answer is told by the drop.
        let _ = self.sender.send(message);
        self.wake();
    }

    /// Has it look at its messages and its doorbells.
    pub(crate) fn wake(&self) {
        match self.waker.get() {
            Some(waker) => waker.wake(),
            // It looks at its messages when it begins.
            None => {
                let waker = self.waker.clone();
                self.reactor.send(move |cx| {
                    if let Some(waker) = waker.get() {
                        cx.wake(waker.actor());
                    }
                });
            }
        }
    }
}

/// Who is woken by which doorbell.
#[derive(Debug)]
pub(crate) struct Routes {
    /// By submission queue: the worker that takes from it.
    pub(crate) tails: Vec<Option<Arc<WorkerHandle>>>,
    /// By completion queue: its worker.
    pub(crate) heads: Vec<Option<Arc<WorkerHandle>>>,
    /// Queues of another process are being made again. They look at their doorbells after this.
    pub(crate) resuming: bool,
}

impl Routes {
    pub(super) fn new(queues: u16) -> Self {
        let none = || (0..=queues).map(|_| None).collect();
        Self {
            tails: none(),
            heads: none(),
            resuming: false,
        }
    }

    /// There are no I/O queues any more.
    pub(crate) fn clear(&mut self) {
        self.tails.fill(None);
        self.heads.fill(None);
    }
}

/// What the threads of a controller share.
pub(crate) struct Core {
    pub(super) registers: Mutex<Registers>,
    /// Who waits for the end of all queues.
    pub(super) stopped: Mutex<Vec<Done>>,
    pub(super) routes: Mutex<Routes>,
    /// The registers of this host. Those of the one before stay with its queues, until these have ended.
    pub(super) doorbells: Mutex<Arc<Doorbells>>,
    /// Where it is written down what another process would need to go on.
    pub(crate) journal: Option<Arc<Journal>>,
    pub(crate) admin: Mailbox,
    pub(super) subsystem: std::sync::Weak<Subsystem>,
    pub(super) bound: Duration,
    /// The admin worker is to hear of a doorbell that no queue has.
    pub(super) rung_nowhere: AtomicBool,
    /// Events of queues that the admin worker has not taken yet.
    pub(super) untaken: AtomicU32,
}

/// Events of queues that may wait to be taken: a host can have as many as it likes, and the log has room for the last ones only.
const EVENTS: u32 = 64;

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core")
            .field("registers", &self.registers)
            .finish_non_exhaustive()
    }
}

/// Nothing panics while one of these is held, but for mistakes that end the process's host anyway.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Core {
    pub(crate) fn registers(&self) -> MutexGuard<'_, Registers> {
        lock(&self.registers)
    }

    /// The subsystem, while there is one.
    pub(crate) fn subsystem(&self) -> Option<Arc<Subsystem>> {
        self.subsystem.upgrade()
    }

    pub(crate) fn doorbells(&self) -> Arc<Doorbells> {
        lock(&self.doorbells).clone()
    }

    pub(crate) fn routes(&self) -> MutexGuard<'_, Routes> {
        lock(&self.routes)
    }

    /// Writes the registers down. With the lock held.
    pub(super) fn keep(&self, registers: &Registers) {
        if let Some(journal) = &self.journal {
            journal.set_registers(registers.save());
        }
    }

    /// Does what a change of the registers asks for. With the lock held, so that messages are in the order of the changes.
    pub(super) fn carry_out(&self, registers: &Registers, effects: Vec<Effect>, bound: Duration) {
        self.keep(registers);
        for effect in effects {
            match effect {
                Effect::Start(run, queues) => self.admin.send(Message::Start { run, queues }),
                Effect::Resume(run, queues) => {
                    self.routes().resuming = true;
                    self.admin.send(Message::Resume { run, queues });
                }
                Effect::Stop(why) => self.admin.send(Message::Stop { why, bound }),
                Effect::SubsystemReset => {
                    unreachable!("told apart where the register is written")
                }
                // There is no pin, and no MSI (Base 2.1 §3.1.4.3: not for MSI-X).
                Effect::Mask(_) => {}
            }
        }
    }

    /// As [`Registers::started`].
    pub(crate) fn started(&self, run: Run, well: bool) {
        let mut registers = self.registers();
        registers.started(run, well);
        self.keep(&registers);
    }

    /// As [`Registers::fail`].
    pub(crate) fn fail(&self, run: Run) {
        let mut registers = self.registers();
        registers.fail(run);
        self.keep(&registers);
    }

    /// All queues have ended, and nothing uses memory.
    pub(crate) fn all_stopped(&self) {
        let mut registers = self.registers();
        let effects = registers.stopped();
        let goes_on = registers.is_stopping();
        self.carry_out(&registers, effects, self.bound);
        // With the lock held: who comes later waits for the next stop.
        let waiting = match goes_on {
            true => Vec::new(),
            false => std::mem::take(&mut *lock(&self.stopped)),
        };
        drop(registers);
        waiting.into_iter().for_each(|done| done());
    }

    /// A worker has something to say.
    pub(super) fn queue_event(&self, event: QueueEvent) {
        let waiting = self.untaken.fetch_add(1, Ordering::Relaxed);
        if waiting >= EVENTS && matches!(event, QueueEvent::InvalidDoorbell { .. }) {
            self.untaken.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        self.admin.send(Message::Event(event));
    }

    /// An event was taken.
    pub(crate) fn event_taken(&self) {
        self.untaken.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether a doorbell was rung that no queue has, since the last time.
    pub(crate) fn was_rung_nowhere(&self) -> bool {
        self.rung_nowhere.swap(false, Ordering::Relaxed)
    }

    /// The subsystem has changed.
    pub(super) fn hear(&self, event: SubsystemEvent) {
        if matches!(event, SubsystemEvent::Reset) {
            let mut registers = self.registers();
            let effects = registers.subsystem_reset();
            self.carry_out(&registers, effects, self.bound);
        } else {
            self.admin.send(Message::Subsystem(event));
        }
    }

    pub(super) fn write(&self, at: u64, from: &[u8]) {
        let mut registers = self.registers();
        let mut effects = registers.write(at, from);
        let resets = effects.contains(&Effect::SubsystemReset);
        effects.retain(|e| *e != Effect::SubsystemReset);
        self.carry_out(&registers, effects, self.bound);
        drop(registers);
        if resets && let Some(subsystem) = self.subsystem() {
            // Which tells this controller, too.
            subsystem.reset();
        }
    }

    /// A doorbell was written (PCIe Transport 1.1 §3.1.2: 32 bits).
    pub(super) fn ring(&self, at: u64, from: &[u8]) {
        let Ok(value) = <[u8; 4]>::try_from(from) else {
            return;
        };
        if !self.registers().takes_commands() {
            // Queues that are not there have no doorbells: the host is told when it is there to be told.
            return;
        }
        let value = u32::from_le_bytes(value);
        let rung = lock(&self.doorbells).ring(at - OFFSET, value);
        let found = match rung {
            Some((0, _)) => {
                self.admin.wake();
                return;
            }
            Some((qid, side)) => {
                let routes = self.routes();
                let of = match side {
                    Side::Tail => &routes.tails,
                    Side::Head => &routes.heads,
                };
                let found = of.get(usize::from(qid)).and_then(Clone::clone);
                if found.is_none() && routes.resuming {
                    return;
                }
                found
            }
            None => None,
        };
        match found {
            Some(worker) => worker.ring(),
            // Once, however often it is rung until somebody looks.
            None if !self.rung_nowhere.swap(true, Ordering::Relaxed) => {
                self.admin.send(Message::NoDoorbell);
            }
            None => {}
        }
    }
}
