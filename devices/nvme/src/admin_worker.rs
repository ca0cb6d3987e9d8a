//! The actor of the admin queues: it fetches commands and gives them to [`Admin`], does what comes of them with the workers of the I/O queues, and
//! begins and ends all of them.
//!
//! ```text
//!   messages: start, stop, DMA, subsystem, doorbells, what workers have done
//!        |
//!        v
//!   AdminWorker -- Run: admin SQ and CQ, workers by CQ, commands that are not answered yet
//!        |            |
//!        |            v
//!        '------> Admin (sans-IO): Done | Failed | Held | Queue | Format
//! ```
//! It lives as long as its controller, and has a [`Run`] while that is enabled. What a worker answers names the run that it is about, so that nothing is taken for
//! another's.
//!
//! Unsafe, because admin data is copied from and to memory that a host shares.
#![allow(unsafe_code)]

mod keep;
mod news;
mod queues;
mod storage;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use bluff_block::Buffers;
use bluff_memory::{Access, GuestMemory, IoVec};
use bluff_pci::{Dma, Done, Vector};
use bluff_reactor::{Actor, Context, Event, Handle, Poll, Turn};

use crate::admin::{Admin, BadDoorbell, ErrorReport, Outcome, Transfer};
use crate::controller::{Core, Runs};
use crate::data::Resolver;
use crate::health::{Counters, Settings};
use crate::interrupt::{Coalescing, Interrupts, Signal, Wire};
use crate::queue::{
    CompletionQueue, InvalidValue, QueueError, Shadow, Side, SubmissionQueue, completion,
};
use crate::queues::{CreateCq, CreateSq};
use crate::registers::{AdminQueues, Run as RunNumber, Stop};
use crate::report::{QueueEvent, Shared};
use crate::spec::{Command, Completion, Status, admin as opcode};
use crate::subsystem::SubsystemEvent;
use crate::token::Token;
use crate::worker::{Message as ToWorker, WorkerHandle};
use news::{Formatted, News};
use queues::Answer;
use storage::{FlushAll, Format};

/// Admin commands taken in one turn.
const COMMANDS: usize = 8;
/// Most commands that are not answered, requests of events aside.
const PENDING: usize = 64;

/// What the actor is told.
pub(crate) enum Message {
    /// The controller was enabled.
    Start {
        /// Which time.
        run: RunNumber,
        /// Where the admin queues are.
        queues: AdminQueues,
    },
    /// Another process has enabled the controller, and it goes on.
    Resume {
        /// Which time.
        run: RunNumber,
        /// Where the admin queues are.
        queues: AdminQueues,
    },
    /// All queues end; then [`Core::all_stopped`].
    Stop {
        /// Why.
        why: Stop,
        /// How long.
        bound: Duration,
    },
    /// The workers of the stop under way have ended.
    WorkersEnded,
    /// A stop under way has no longer than this.
    Hurry {
        /// How long.
        bound: Duration,
    },
    /// As [`bluff_pci::Device::set_dma`].
    Dma {
        /// How far the host lets the controller reach.
        dma: Dma,
        /// How long.
        bound: Duration,
        /// It holds for all queues.
        done: Done,
    },
    /// The subsystem has changed.
    Subsystem(SubsystemEvent),
    /// A doorbell was rung that no queue has.
    NoDoorbell,
    /// A worker has something to say.
    Event(QueueEvent),
    /// A worker has done what a command asked for.
    Answer(RunNumber, Answer),
    /// The format's namespaces are not in use any more.
    Drained(u64),
    /// The tables up to this one are all workers'.
    Taken(u64),
    /// A format is over.
    Formatted(Formatted),
    /// The controller is no more.
    End,
}

/// The actor.
pub(crate) struct AdminWorker {
    core: Arc<Core>,
    mailbox: Receiver<Message>,
    admin: Admin,
    settings: Arc<Settings>,
    shared: Arc<Shared>,
    counters: Arc<Counters>,
    vectors: Vec<Wire>,
    reactors: Vec<Handle>,
    poll: Poll,
    bound: Duration,
    dma: Dma,
    run: Option<Run>,
    stopping: Option<Stopping>,
    format: Option<Format>,
    formats: u64,
    news: News,
    /// Something may have changed since the last turn that found nothing to do.
    stirred: bool,
    /// Something may have changed since it was written down.
    unkept: bool,
    /// Another process has written down a run, and it is not known whether this one goes on with it.
    undecided: bool,
    ended: bool,
}

/// A controller that is enabled.
struct Run {
    number: RunNumber,
    sq: SubmissionQueue,
    cq: CompletionQueue,
    interrupts: Interrupts,
    resolver: Resolver,
    page: u64,
    shadow: Option<Shadow>,
    /// By completion queue.
    workers: BTreeMap<u16, Arc<WorkerHandle>>,
    /// Interrupts given, by completion queue.
    counts: BTreeMap<u16, Arc<AtomicU64>>,
    /// Their vectors.
    vectors: BTreeMap<u16, Option<u16>>,
    /// The I/O queues that there are, those that are being deleted among them.
    cqs: BTreeMap<u16, CreateCq>,
    /// As above.
    sqs: BTreeMap<u16, CreateSq>,
    /// Commands that are answered later.
    pending: Vec<Command>,
    /// Commands that another process has taken and not answered, to be done again when there is memory.
    again: VecDeque<Command>,
    /// Completions that are not posted: what they tell is written down before, and they may wait for memory.
    outbox: VecDeque<Completion>,
    /// So many of them, the first, another process may have posted.
    uncertain: usize,
    /// Completions that the host has not been told of.
    posted: u32,
    /// The memory of the admin queues has gone; until then it may come back.
    lost: Option<Instant>,
    /// It cannot go on (CSTS.CFS): no more commands are taken.
    failed: bool,
}

/// A stop under way.
struct Stopping {
    why: Stop,
    deadline: Instant,
    /// Those that are ending: what is asked of all workers is asked of them, too.
    workers: Vec<Arc<WorkerHandle>>,
    /// All of them have.
    ended: bool,
    /// A format that was under way, until nothing of it is in flight.
    format: Option<Format>,
    flush: Option<FlushAll>,
}

/// How long the memory of the admin queues may be missing, as in a worker.
const GRACE: Duration = Duration::from_millis(500);

impl AdminWorker {
    /// Starts it on the first reactor.
    #[allow(clippy::too_many_arguments, reason = "once, from one place")]
    pub(crate) fn start(
        core: &Arc<Core>,
        mailbox: Receiver<Message>,
        admin: Admin,
        settings: Arc<Settings>,
        shared: Arc<Shared>,
        counters: Arc<Counters>,
        vectors: Vec<Vector>,
        runs: Runs,
        restored: bool,
    ) {
        let core = core.clone();
        let reactor = runs.reactors[0].clone();
        reactor.send(move |cx| {
            cx.insert(runs.poll, |cx, id| {
                let _ = core.admin.waker.set(cx.waker(id));
                Box::new(Self {
                    core,
                    mailbox,
                    admin,
                    settings,
                    shared,
                    counters,
                    vectors: vectors.into_iter().map(Wire::new).collect(),
                    reactors: runs.reactors,
                    poll: runs.poll,
                    bound: runs.bound,
                    dma: Dma::Off,
                    run: None,
                    stopping: None,
                    format: None,
                    formats: 0,
                    news: News::default(),
                    stirred: true,
                    unkept: false,
                    undecided: restored,
                    ended: false,
                })
            });
        });
    }

    /// All workers, those that are ending among them.
    fn workers(&self) -> impl Iterator<Item = &Arc<WorkerHandle>> {
        let run = self.run.iter().flat_map(|run| run.workers.values());
        run.chain(self.stopping.iter().flat_map(|stopping| &stopping.workers))
    }

    fn memory(&self) -> Option<&Arc<GuestMemory>> {
        match &self.dma {
            Dma::Off => None,
            Dma::On(memory) => Some(memory),
        }
    }

    fn take_messages(&mut self, cx: &mut Context<'_>) {
        while !self.ended
            && let Ok(message) = self.mailbox.try_recv()
        {
            self.take(cx, message);
        }
    }

    fn take(&mut self, cx: &mut Context<'_>, message: Message) {
        self.unkept = true;
        match message {
            Message::Start { run, queues } => {
                self.undecided = false;
                let begun = self.begin(cx, run, &queues);
                if let Err(e) = &begun {
                    log::debug!("the admin queues: {e}");
                }
                self.core.started(run, begun.is_ok());
            }
            Message::Resume { run, queues } => {
                self.undecided = false;
                if let Err(e) = self.resume(cx, run, &queues) {
                    log::error!("a controller cannot go on: {e}");
                    self.core.fail(run);
                    self.core.routes().resuming = false;
                }
            }
            Message::Stop { why, bound } => self.stop(cx, why, bound),
            Message::WorkersEnded => {
                if let Some(stopping) = &mut self.stopping {
                    stopping.ended = true;
                }
            }
            Message::Hurry { bound } => self.hurry(cx, bound),
            Message::Dma { dma, bound, done } => self.set_dma(cx, dma, bound, done),
            Message::Subsystem(event) => self.hear(event),
            Message::NoDoorbell => {
                if self.core.was_rung_nowhere() && self.run.is_some() {
                    self.admin.report_doorbell(BadDoorbell::Queue, None);
                }
            }
            Message::Event(event) => {
                self.core.event_taken();
                self.event(event);
            }
            Message::Answer(run, answer) => {
                if self.run.as_ref().is_some_and(|r| r.number == run) {
                    self.answer(answer);
                }
            }
            Message::Drained(number) => self.drained(number),
            Message::Taken(number) => self.taken(number),
            Message::Formatted(formatted) => self.formatted(formatted),
            Message::End => self.end(),
        }
    }

    /// The controller is enabled: its queues, as after a reset.
    fn begin(
        &mut self,
        cx: &mut Context<'_>,
        number: RunNumber,
        queues: &AdminQueues,
    ) -> Result<(), QueueError> {
        let doorbells = &self.core.doorbells();
        let mut sq = SubmissionQueue::new(0, queues.sq, queues.sq_entries.into(), doorbells)?;
        let mut cq = CompletionQueue::new(0, queues.cq, queues.cq_entries.into(), doorbells)?;
        sq.set_memory(self.memory(), None, true)?;
        cq.set_memory(self.memory(), None, true)?;
        self.admin.reset(queues.page, cx.now());
        self.vectors.iter().for_each(|wire| wire.set_shared(false));
        self.apply_settings();
        self.run = Some(self.new_run(number, queues.page, sq, cq));
        // Before the host can see that it is ready.
        self.write_down(cx.now());
        Ok(())
    }

    fn new_run(
        &self,
        number: RunNumber,
        page: u64,
        sq: SubmissionQueue,
        cq: CompletionQueue,
    ) -> Run {
        Run {
            number,
            sq,
            cq,
            interrupts: Interrupts::new(
                Signal::Vector(self.vectors[0].clone()),
                Coalescing::default(),
            ),
            resolver: Resolver::new(page.trailing_zeros() as u8),
            page,
            shadow: None,
            workers: BTreeMap::new(),
            counts: BTreeMap::new(),
            vectors: BTreeMap::new(),
            cqs: BTreeMap::new(),
            sqs: BTreeMap::new(),
            pending: Vec::new(),
            again: VecDeque::new(),
            outbox: VecDeque::new(),
            uncertain: 0,
            posted: 0,
            lost: None,
            failed: false,
        }
    }

    /// All queues end.
    fn stop(&mut self, cx: &mut Context<'_>, why: Stop, bound: Duration) {
        let deadline = cx.now() + bound;
        cx.timer(cx.id(), deadline, 0);
        self.core.routes().clear();
        let core = self.core.clone();
        // Dropped by the last worker, and at the end of this where there is none.
        let token = Token::new(move || core.admin.send(Message::WorkersEnded));
        let workers: Vec<_> = match self.run.take() {
            Some(run) => run.workers.into_values().collect(),
            None => Vec::new(),
        };
        // Whoever has waited to hear of something has gone.
        self.hear_all();
        for worker in &workers {
            worker.send(ToWorker::Stop {
                bound,
                answer: false,
                done: token.done(),
            });
        }
        self.stopping = Some(Stopping {
            why,
            deadline,
            workers,
            ended: false,
            format: self.cancel_format(),
            flush: None,
        });
    }

    fn hurry(&mut self, cx: &mut Context<'_>, bound: Duration) {
        if let Some(stopping) = &mut self.stopping {
            stopping.deadline = stopping.deadline.min(cx.now() + bound);
            cx.timer(cx.id(), stopping.deadline, 0);
            for worker in &stopping.workers {
                worker.send(ToWorker::Stop {
                    bound,
                    answer: false,
                    done: Box::new(|| {}),
                });
            }
        }
    }

    /// Goes on with a stop; says whether anything was done.
    fn go_on_stopping(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(stopping) = &mut self.stopping else {
            return false;
        };
        if let Some(format) = &mut stopping.format {
            if !format.is_over(cx) {
                return false;
            }
            stopping.format = None;
        }
        if !stopping.ended {
            return false;
        }
        if stopping.flush.is_none() {
            stopping.workers.clear();
            if matches!(
                stopping.why,
                Stop::Shutdown(crate::spec::registers::ShutdownKind::Normal)
            ) {
                let table = self.admin.table().clone();
                stopping.flush = Some(FlushAll::begin(cx, &table));
            }
        }
        if let Some(flush) = &mut stopping.flush
            && !flush.is_done(cx, stopping.deadline)
        {
            return false;
        }
        self.stopping = None;
        self.core.all_stopped();
        true
    }

    fn set_dma(&mut self, cx: &mut Context<'_>, dma: Dma, bound: Duration, done: Done) {
        self.dma = dma.clone();
        // Kept until all who use it have moved on.
        let done = std::sync::Mutex::new(Some(done));
        let token = Token::new(move || {
            if let Some(done) = done.lock().ok().and_then(|mut done| done.take()) {
                done();
            }
        });
        let memory = match &self.dma {
            Dma::Off => None,
            Dma::On(memory) => Some(memory.clone()),
        };
        for worker in self.workers() {
            worker.send(ToWorker::Dma {
                dma: dma.clone(),
                bound,
                done: token.done(),
            });
        }
        let Some(run) = &mut self.run else {
            return;
        };
        self.stirred = true;
        // Admin commands use memory within a turn only.
        run.resolver.forget();
        let moved = run.sq.set_memory(memory.as_ref(), None, false);
        let moved = moved.and(run.cq.set_memory(memory.as_ref(), None, false));
        match moved {
            Ok(()) => run.lost = None,
            Err(e) => {
                log::debug!("{e}");
                let until = *run.lost.get_or_insert(cx.now() + GRACE);
                cx.timer(cx.id(), until, 0);
            }
        }
    }

    fn event(&mut self, event: QueueEvent) {
        if self.run.is_none() {
            return;
        }
        match event {
            QueueEvent::InvalidDoorbell { qid, side, value } => {
                log::debug!("queue {qid}: {side:?} doorbell {value}");
                let sq = (side == Side::Tail).then_some(qid);
                self.admin.report_doorbell(BadDoorbell::Value, sq);
            }
            QueueEvent::Broken { cause } => {
                log::debug!("{cause}");
                self.fail();
            }
        }
    }

    /// The controller cannot go on.
    fn fail(&mut self) {
        if let Some(run) = &mut self.run {
            run.failed = true;
            self.core.fail(run.number);
        }
    }

    /// The controller is no more.
    fn end(&mut self) {
        self.format = None;
        if let Some(run) = self.run.take() {
            for worker in run.workers.values() {
                worker.send(ToWorker::Stop {
                    bound: Duration::ZERO,
                    answer: false,
                    done: Box::new(|| {}),
                });
            }
        }
        self.stopping = None;
        self.ended = true;
    }

    /// Takes commands; says whether there were any.
    fn serve(&mut self, cx: &mut Context<'_>) -> bool {
        let mut worked = false;
        for _ in 0..COMMANDS {
            let Some(run) = &mut self.run else {
                return worked;
            };
            if !run.takes() {
                return worked;
            }
            let (looked, room) = (run.sq.look(), run.cq.room());
            if let Err(InvalidValue(value)) = looked.map(|_| ()) {
                log::debug!("admin queue: tail doorbell {value}");
                self.admin.report_doorbell(BadDoorbell::Value, Some(0));
            }
            let room = match room {
                Ok(room) => room,
                Err(InvalidValue(value)) => {
                    log::debug!("admin queue: head doorbell {value}");
                    self.admin.report_doorbell(BadDoorbell::Value, None);
                    return true;
                }
            };
            if room == 0 {
                return worked;
            }
            let run = self.run.as_mut().expect("it was there");
            let next = run.again.pop_front().or_else(|| run.sq.fetch());
            let Some(command) = next else {
                break;
            };
            run.cq.reserve();
            worked = true;
            self.execute(cx, &command);
        }
        worked |= self.tell_events();
        worked
    }

    fn execute(&mut self, cx: &mut Context<'_>, command: &Command) {
        // What workers have failed is in the log before the host can ask for it.
        for error in self.shared.errors.take() {
            self.admin.report_error(&ErrorReport {
                sqid: Some(error.sqid),
                command: Some((error.cid, error.opcode)),
                status: error.status,
                location: None,
                lba: error.lba,
                nsid: error.nsid,
            });
        }
        if let Err(status) = self.try_execute(cx, command) {
            self.refuse(command, status);
        }
    }

    fn refuse(&mut self, command: &Command, status: Status) {
        self.admin
            .report_error(&ErrorReport::of(0, command, status));
        self.complete(command.cid.get(), 0, status.more());
    }

    fn try_execute(&mut self, cx: &mut Context<'_>, command: &Command) -> Result<(), Status> {
        let transfer = self.admin.transfer(command)?;
        let mut pieces = Vec::new();
        let mut data = Vec::new();
        let (Transfer::FromHost(len) | Transfer::ToHost(len)) = transfer else {
            return self.dispatch(cx, command, &data, &pieces);
        };
        if len > 0 {
            let memory = match &self.dma {
                Dma::Off => return Err(Status::DATA_TRANSFER_ERROR),
                Dma::On(memory) => memory,
            };
            let access = match transfer {
                Transfer::FromHost(_) => Access::Read,
                _ => Access::Write,
            };
            let run = self.run.as_mut().expect("else nothing is taken");
            run.resolver
                .resolve(memory, access, command, len as u32, &mut pieces)?;
        }
        if let Transfer::FromHost(len) = transfer {
            data.resize(len, 0);
            // SAFETY: resolved in the epoch that `self.dma` keeps; the name does not leave this function.
            unsafe { Buffers::new(&pieces) }.copy_to(&mut data);
            pieces.clear();
        }
        self.dispatch(cx, command, &data, &pieces)
    }

    fn dispatch(
        &mut self,
        cx: &mut Context<'_>,
        command: &Command,
        data: &[u8],
        pieces: &[IoVec],
    ) -> Result<(), Status> {
        let cid = command.cid.get();
        match self.admin.execute(command, data, cx.now()) {
            Outcome::Done { dw0, data } => {
                // SAFETY: as above; nothing has changed the epoch meanwhile.
                unsafe { Buffers::new(pieces) }.copy_from(&data);
                if command.opcode == opcode::SET_FEATURES {
                    self.apply_settings();
                }
                self.complete(cid, dw0, Status::SUCCESS);
                Ok(())
            }
            Outcome::Failed(status) => Err(status),
            Outcome::Held => {
                // Its completion is reserved when there is one.
                self.run.as_mut().expect("it has a command").cq.release();
                Ok(())
            }
            Outcome::Queue(queue) => {
                self.answer_later(command);
                self.queue(command, queue)
            }
            Outcome::Format(format) => {
                self.answer_later(command);
                self.begin_format(command, &format)
            }
        }
    }

    fn answer_later(&mut self, command: &Command) {
        let run = self.run.as_mut().expect("it has a command");
        run.pending.push(*command);
    }

    /// Answers event requests, as far as there is room.
    fn tell_events(&mut self) -> bool {
        let mut told = false;
        while let Some(run) = &mut self.run
            && run.cq.is_on()
            && matches!(run.cq.room(), Ok(1..))
            && let Some((cid, dw0)) = self.admin.poll_event()
        {
            run.cq.reserve();
            self.complete(cid, dw0, Status::SUCCESS);
            told = true;
        }
        told
    }

    /// Answers a command whose completion is reserved.
    fn complete(&mut self, cid: u16, dw0: u32, status: Status) {
        if let Some(run) = &mut self.run {
            let answered = run.pending.iter().position(|c| c.cid.get() == cid);
            answered.map(|at| run.pending.remove(at));
            let entry = completion(0, run.sq.head(), cid.into(), dw0, status);
            run.outbox.push_back(entry);
        }
    }

    /// Interrupts for what was posted in this turn.
    fn publish(&mut self, now: Instant) {
        let Some(run) = &mut self.run else {
            return;
        };
        let posted = std::mem::take(&mut run.posted);
        if posted > 0 {
            // The admin queue is not coalesced (Base 2.1 §5.1.25.2.2).
            let _ = run.interrupts.posted(posted, now);
        }
        if run.interrupts.is_owed() && run.takes() && run.cq.is_read() == Ok(true) {
            run.interrupts.read();
        }
    }
}

impl Run {
    /// Whether the host has done nothing that it has to be looked at for.
    #[inline]
    fn is_quiet(&self) -> bool {
        self.sq.is_quiet() && !self.interrupts.is_owed()
    }

    /// Whether commands are taken: not without memory, nor while too many are not answered.
    fn takes(&self) -> bool {
        // The host's head may be ahead of what we know to be posted.
        let certain = self.uncertain == 0;
        let there = self.cq.is_on() && self.sq.is_on();
        there && certain && !self.failed && self.pending.len() < PENDING
    }

    /// Posts what is to be posted, as far as there is memory.
    fn post(&mut self) {
        while let Some(entry) = self.outbox.front() {
            let posted = match self.uncertain {
                0 => self.cq.post(entry),
                _ => self.cq.post_unless_there(entry),
            };
            if !posted {
                return;
            }
            self.outbox.pop_front();
            self.uncertain = self.uncertain.saturating_sub(1);
            self.posted += 1;
        }
    }
}

impl Actor for AdminWorker {
    fn event(&mut self, cx: &mut Context<'_>, event: Event) {
        self.stirred = true;
        match event {
            Event::Woken => self.take_messages(cx),
            Event::Timer { .. } => {
                let lost = self.run.as_ref().and_then(|run| run.lost);
                if lost.is_some_and(|until| cx.now() >= until) {
                    self.fail();
                }
            }
            Event::Ready { .. } => {}
        }
    }

    fn turn(&mut self, cx: &mut Context<'_>) -> Turn {
        if self.ended {
            return Turn::Done;
        }
        // Polled between commands, it looks at no more than the doorbell.
        if !self.stirred && self.run.as_ref().is_none_or(Run::is_quiet) {
            return Turn::Idle;
        }
        let mut worked = self.go_on_stopping(cx);
        worked |= self.go_on_formatting(cx);
        if let Some(run) = self.run.as_mut().filter(|run| run.uncertain > 0) {
            run.post();
        }
        worked |= self.serve(cx);
        self.unkept |= worked;
        self.commit(cx.now());
        self.publish(cx.now());
        // What does not wake it is looked for.
        let full = |run: &mut Run| run.takes() && !matches!(run.cq.room(), Ok(1..));
        self.stirred = worked
            || self.stopping.is_some()
            || self.format.is_some()
            || self.run.as_mut().is_some_and(full);
        if worked { Turn::Worked } else { Turn::Idle }
    }

    fn arm(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.park(cx) {
            return false;
        }
        let Some(run) = &mut self.run else {
            return true;
        };
        if !run.takes() {
            return true;
        }
        if !run.again.is_empty() {
            return false;
        }
        match run.cq.room() {
            Ok(0) | Err(_) => !run.cq.arm(),
            Ok(_) => !run.sq.arm(),
        }
    }
}
