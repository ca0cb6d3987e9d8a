//! The worker of a completion queue and of the submission queues that post to it.
//!
//! ```text
//!   batch: fetch --> begin: command --> namespace (space) --> ops --> channel       one turn: 32 commands, 1 MiB
//!   steps:           those that take several: read, then compare; read, then write; a range in parts
//!   control: messages: queues, memory, namespaces, aborts, the end
//!   again:   what another process had in flight is done again
//! ```
//! A submission queue may share a completion queue with others, and all of them are on one reactor, so nothing here is locked.
//!
//! Whoever sends a message with a `done` is told by it; a worker that has ended drops messages, and their `done` with them. So who waits
//! takes a drop for an answer too.

mod again;
mod batch;
mod begin;
mod bounce;
mod control;
mod slots;
mod space;
mod steps;

use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, OnceLock};

use bluff_pci::Dma;
use bluff_reactor::{Actor, Context, Event, Handle, Poll, Turn, Waker};

use crate::counters::QueueCounters;
use crate::interrupt::{Coalescing, Signal};
use crate::journal::QueueJournal;
use crate::namespace::NamespaceTable;
use crate::queue::{Doorbells, QueueError, Shadow};
use crate::report::Shared;
use batch::Io;
pub(crate) use bounce::zeroes;
pub(crate) use control::Message;
use control::{State, Wait};

/// What a worker is made of.
#[derive(Debug)]
pub(crate) struct Setup {
    /// The completion queue's identifier.
    pub(crate) qid: u16,
    /// Guest address of its entries.
    pub(crate) base: u64,
    /// How many there are: 2 to 65,536.
    pub(crate) size: u32,
    /// What the host is told by.
    pub(crate) signal: Signal,
    /// How that is put together.
    pub(crate) coalescing: Coalescing,
    /// Interrupts given: this worker adds to it.
    pub(crate) interrupts: Arc<AtomicU64>,
    /// The controller's doorbells.
    pub(crate) doorbells: Arc<Doorbells>,
    /// Their shadows, where the host has given any.
    pub(crate) shadow: Option<Shadow>,
    /// How far the host lets it reach.
    pub(crate) dma: Dma,
    /// Bytes of a memory page (CC.MPS), as a power of two.
    pub(crate) page_shift: u8,
    /// Where it is written down what is in flight, if it is.
    pub(crate) journal: Option<QueueJournal>,
    /// It goes on with what is written there: nothing is served before [`Message::Resume`].
    pub(crate) resumes: bool,
    /// The namespaces that are attached.
    pub(crate) namespaces: NamespaceTable,
    /// What all workers of the controller share.
    pub(crate) shared: Arc<Shared>,
}

/// A submission queue that a worker takes on.
#[derive(Debug)]
pub(crate) struct SqSetup {
    /// Its identifier.
    pub(crate) qid: u16,
    /// Guest address of its entries.
    pub(crate) base: u64,
    /// How many there are: 2 to 65,536.
    pub(crate) size: u32,
    /// What it counts.
    pub(crate) counters: Arc<QueueCounters>,
    /// It goes on with what the worker's journal has of it.
    pub(crate) resumes: bool,
}

/// A worker, from outside.
#[derive(Debug)]
pub(crate) struct WorkerHandle {
    reactor: Handle,
    sender: Sender<Message>,
    waker: Arc<OnceLock<Waker>>,
}

impl WorkerHandle {
    /// Starts a worker. `started` is called on its reactor; where it gets an error there is no worker. Messages can be sent at once.
    pub(crate) fn start(
        reactor: &Handle,
        poll: Poll,
        setup: Setup,
        started: impl FnOnce(Result<(), QueueError>) + Send + 'static,
    ) -> Self {
        let (sender, mailbox) = mpsc::channel();
        let waker = Arc::new(OnceLock::new());
        let place = waker.clone();
        reactor.send(move |cx| {
            let io = match Io::new(setup) {
                Ok(io) => io,
                Err(e) => return started(Err(e)),
            };
            cx.insert(poll, |cx, id| {
                let _ = place.set(cx.waker(id));
                Box::new(Worker {
                    io,
                    mailbox,
                    state: State::Running,
                    waits: Vec::new(),
                    overdue: false,
                })
            });
            started(Ok(()));
        });
        Self {
            reactor: reactor.clone(),
            sender,
            waker,
        }
    }

    /// Tells it something. Messages are in order.
    pub(crate) fn send(&self, message: Message) {
        // Fails where the worker has ended; then the message is dropped, and with it what waits for an answer.
        let _ = self.sender.send(message);
        let waker = self.waker.clone();
        self.reactor.send(move |cx| {
            if let Some(waker) = waker.get() {
                cx.wake(waker.actor());
            }
        });
    }

    /// A doorbell of its queues was rung.
    pub(crate) fn ring(&self) {
        // One that is not built yet looks at its doorbells when it is.
        if let Some(waker) = self.waker.get() {
            waker.wake();
        }
    }
}

/// The worker of a completion queue.
struct Worker {
    io: Io,
    mailbox: Receiver<Message>,
    state: State,
    /// What is waited for.
    waits: Vec<Wait>,
    /// A timer has come, so some of those (or a stop, or an interrupt) may have waited long enough.
    overdue: bool,
}

impl Actor for Worker {
    fn event(&mut self, cx: &mut Context<'_>, event: Event) {
        match event {
            Event::Woken => {
                self.take_messages(cx);
                self.io.look_at_head();
            }
            Event::Timer { .. } => self.overdue = true,
            Event::Ready { .. } => {}
        }
    }

    fn turn(&mut self, cx: &mut Context<'_>) -> Turn {
        if matches!(self.state, State::Stopped) {
            return Turn::Done;
        }
        let takes = matches!(self.state, State::Running);
        let mut worked = self.io.batch(cx, takes);
        if std::mem::take(&mut self.overdue) {
            // Only now: a thread that was away finds deadlines and completions together.
            self.end_overdue(cx.now());
            worked = true;
        } else if worked && !self.waits.is_empty() {
            self.check_waits();
        }
        if matches!(self.state, State::Stopping(_)) && self.try_stop() {
            return Turn::Done;
        }
        if worked { Turn::Worked } else { Turn::Idle }
    }

    fn arm(&mut self, cx: &mut Context<'_>) -> bool {
        let serves = matches!(self.state, State::Running);
        self.io.arm(cx, serves)
    }
}
