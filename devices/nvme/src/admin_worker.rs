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
//! ```text
//!   run: a controller that is enabled      execute: from a command to its answer      queues, storage: what takes longer
//!   stop: the end of all queues            keep: what outlives the process            news: what the host hears of namespaces
//! ```
//! It lives as long as its controller, and has a [`Run`] while that is enabled. What a worker answers names the run that it is about, so that nothing is taken for
//! another's.

mod execute;
mod keep;
mod news;
mod queues;
mod run;
mod stop;
mod storage;

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use bluff_memory::GuestMemory;
use bluff_pci::{Dma, Done, Vector};
use bluff_reactor::{Actor, Context, Event, Handle, Poll, Turn};

use crate::admin::{Admin, BadDoorbell};
use crate::controller::{Core, Runs};
use crate::health::{Counters, Settings};
use crate::interrupt::Wire;
use crate::queue::{CompletionQueue, QueueError, Side, SubmissionQueue};
use crate::registers::{AdminQueues, Run as RunNumber, Stop};
use crate::report::{QueueEvent, Shared};
use crate::subsystem::SubsystemEvent;
use crate::token::Token;
use crate::worker::{Message as ToWorker, WorkerHandle};
use news::{Formatted, News};
use queues::Answer;
use run::Run;
use stop::Stopping;
use storage::Format;

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
        self.run = Some(Run::new(
            number,
            queues.page,
            sq,
            cq,
            self.vectors[0].clone(),
        ));
        // Before the host can see that it is ready.
        self.write_down(cx.now());
        Ok(())
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
