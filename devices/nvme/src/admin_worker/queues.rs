//! Commands about queues: the table says whether they can be, the workers do them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{AdminWorker, Message};
use crate::admin::QueueCommand;
use crate::controller::Core;
use crate::interrupt::{Coalescing, Signal};
use crate::queue::{QueueError, Shadow};
use crate::queues::{Abort, CreateCq, CreateSq};
use crate::registers::Run as RunNumber;
use crate::spec::{Command, Status};
use crate::token::Token;
use crate::worker::{Message as ToWorker, Setup, SqSetup, WorkerHandle};

/// What a worker has done.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The command that asked for it.
    command: Command,
    done: What,
}

#[derive(Debug)]
enum What {
    CqMade(CreateCq, Result<(), QueueError>),
    SqMade(CreateSq, Result<(), QueueError>),
    SqDeleted(u16),
    CqDeleted(u16),
    /// Whether it was.
    Aborted(bool),
    Shadowed,
}

/// Gives an answer, also where whoever was to give it has gone: exactly once.
struct Reply {
    core: Arc<Core>,
    run: RunNumber,
    answer: Option<Answer>,
}

impl Reply {
    /// With what is found.
    fn with(mut self, what: What) {
        if let Some(answer) = &mut self.answer {
            answer.done = what;
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some(answer) = self.answer.take() {
            self.core.admin.send(Message::Answer(self.run, answer));
        }
    }
}

impl AdminWorker {
    /// What is answered to `command`; `otherwise` where the worker has gone.
    fn reply(&self, command: &Command, otherwise: What) -> Reply {
        Reply {
            core: self.core.clone(),
            run: self.run.as_ref().expect("it has a command").number,
            answer: Some(Answer {
                command: *command,
                done: otherwise,
            }),
        }
    }

    pub(super) fn queue(&mut self, command: &Command, queue: QueueCommand) -> Result<(), Status> {
        let cc = self.core.registers().cc();
        match queue {
            QueueCommand::CreateCq(raw) => {
                let made = self.admin.queues.create_cq(&raw, cc)?;
                self.make_cq(command, &made);
            }
            QueueCommand::CreateSq(raw) => {
                let made = self.admin.queues.create_sq(&raw, cc)?;
                let gone = Err(QueueError::Doorbell(made.qid));
                let reply = self.reply(command, What::SqMade(made, gone));
                let done = move |result| reply.with(What::SqMade(made, result));
                self.add_sq(&made, false, done);
            }
            QueueCommand::DeleteSq(qid) => {
                let cqid = self.admin.queues.delete_sq(qid)?;
                self.core.routes().tails[usize::from(qid)] = None;
                let reply = self.reply(command, What::SqDeleted(qid));
                let (bound, done) = (self.bound, Box::new(move || drop(reply)));
                self.tell(cqid, ToWorker::DeleteSq { qid, bound, done });
            }
            QueueCommand::DeleteCq(qid) => {
                self.admin.queues.delete_cq(qid)?;
                self.core.routes().heads[usize::from(qid)] = None;
                let reply = self.reply(command, What::CqDeleted(qid));
                let stop = ToWorker::Stop {
                    bound: Duration::ZERO,
                    answer: true,
                    done: Box::new(move || drop(reply)),
                };
                self.tell(qid, stop);
            }
            QueueCommand::Abort(raw) => match self.admin.queues.abort(raw) {
                Ok(Abort::Admin { cid }) => {
                    let found = self.give_event_back(cid);
                    self.admin.abort_done();
                    self.complete(command.cid.get(), u32::from(!found), Status::SUCCESS);
                }
                Ok(Abort::Io { cqid, sqid, cid }) => {
                    let reply = self.reply(command, What::Aborted(false));
                    let reply = Box::new(move |aborted| reply.with(What::Aborted(aborted)));
                    self.tell(cqid, ToWorker::Abort { sqid, cid, reply });
                }
                Err(status) => {
                    self.admin.abort_done();
                    return Err(status);
                }
            },
            QueueCommand::DoorbellBuffer { shadow, event } => {
                let run = self.run.as_ref().expect("it has a command");
                let shadow = Shadow {
                    doorbells: shadow,
                    events: event,
                    page: run.page,
                };
                let there = self.memory().is_some_and(|memory| shadow.is_in(memory));
                if !there {
                    return Err(Status::INVALID_FIELD);
                }
                let reply = std::sync::Mutex::new(Some(self.reply(command, What::Shadowed)));
                let token = Token::new(move || drop(reply));
                let run = self.run.as_mut().expect("it has a command");
                run.shadow = Some(shadow);
                for worker in run.workers.values() {
                    worker.send(ToWorker::Shadow {
                        shadow,
                        done: token.done(),
                    });
                }
            }
        }
        Ok(())
    }

    /// Completes an event request that is to be aborted; whether there is one. Where there is no room for that, it stays with the controller.
    fn give_event_back(&mut self, cid: u16) -> bool {
        let run = self.run.as_mut().expect("it has a command");
        if !matches!(run.cq.room(), Ok(1..)) || !self.admin.abort_event(cid) {
            return false;
        }
        run.cq.reserve();
        self.complete(cid, 0, Status::ABORT_REQUESTED);
        true
    }

    pub(super) fn tell(&self, cqid: u16, message: ToWorker) {
        // Where there is none the message goes, and with it the reply, which so is given.
        if let Some(worker) = self.run.as_ref().and_then(|run| run.workers.get(&cqid)) {
            worker.send(message);
        }
    }

    fn make_cq(&mut self, command: &Command, made: &CreateCq) {
        let made = *made;
        let gone = Err(QueueError::Doorbell(made.qid));
        let reply = self.reply(command, What::CqMade(made, gone));
        self.start_worker(&made, false, move |result| {
            reply.with(What::CqMade(made, result));
        });
    }

    /// Gives a submission queue to its worker; `resumes`: another process has taken commands from it.
    pub(super) fn add_sq(
        &self,
        made: &CreateSq,
        resumes: bool,
        done: impl FnOnce(Result<(), QueueError>) + Send + 'static,
    ) {
        let queue = SqSetup {
            qid: made.qid,
            base: made.base,
            size: made.entries,
            counters: self.counters.queue(made.qid),
            resumes,
        };
        let done = Box::new(done);
        self.tell(made.cqid, ToWorker::AddSq { queue, done });
    }

    /// Starts the worker of a completion queue; `resumes`: another process has posted to it.
    pub(super) fn start_worker(
        &mut self,
        made: &CreateCq,
        resumes: bool,
        started: impl FnOnce(Result<(), QueueError>) + Send + 'static,
    ) {
        let qid = made.qid;
        let signal = match made.vector {
            Some(vector) => {
                let wire = &self.vectors[usize::from(vector)];
                let mut others = self.run.iter().flat_map(|run| run.vectors.values());
                // The first one is the admin queue's, too.
                if vector == 0 || others.any(|other| *other == made.vector) {
                    wire.set_shared(true);
                }
                Signal::Vector(wire.clone())
            }
            None => Signal::None,
        };
        let namespaces = self.newest().for_workers(self.admin.highest());
        // All queues of a volume that bears few channels are on its first reactors.
        let bears = namespaces
            .attached()
            .iter()
            .map(|n| n.volume().max_channels())
            .min();
        let spread = self.reactors.len().min(bears.unwrap_or(usize::MAX)).max(1);
        let reactor = &self.reactors[usize::from(qid - 1) % spread];
        let run = self.run.as_ref().expect("it has a command");
        let interrupts = run.counts.get(&qid).cloned().unwrap_or_default();
        let setup = Setup {
            qid,
            base: made.base,
            size: made.entries,
            signal,
            coalescing: self.coalescing(made.vector),
            interrupts: interrupts.clone(),
            doorbells: self.core.doorbells(),
            shadow: run.shadow,
            dma: self.dma.clone(),
            page_shift: run.page.trailing_zeros() as u8,
            journal: self.core.journal.as_ref().map(|j| j.queue(qid)),
            resumes,
            namespaces,
            shared: self.shared.clone(),
        };
        let worker = Arc::new(WorkerHandle::start(reactor, self.poll, setup, started));
        let run = self.run.as_mut().expect("it has a command");
        run.counts.insert(qid, interrupts);
        run.vectors.insert(qid, made.vector);
        run.workers.insert(qid, worker);
    }

    /// How interrupts of a vector are put together (Base 2.1 §5.1.25.2.1 and §5.1.25.2.2).
    fn coalescing(&self, vector: Option<u16>) -> Coalescing {
        let off = vector.is_none_or(|vector| {
            let vectors = &self.settings.uncoalesced;
            vectors[usize::from(vector)].load(Ordering::Relaxed)
        });
        if off {
            return Coalescing::default();
        }
        let value = self.settings.coalescing.load(Ordering::Relaxed);
        Coalescing {
            threshold_z: value as u8,
            time: Duration::from_micros(u64::from(value >> 8) * 100),
        }
    }

    /// Passes on what features have changed for workers.
    pub(super) fn apply_settings(&self) {
        let through = !self.settings.write_cache.load(Ordering::Relaxed);
        self.shared.write_through.store(through, Ordering::Relaxed);
        let Some(run) = &self.run else {
            return;
        };
        for (qid, worker) in &run.workers {
            let vector = run.vectors.get(qid).copied().flatten();
            worker.send(ToWorker::Coalesce(self.coalescing(vector)));
        }
    }

    pub(super) fn answer(&mut self, answer: Answer) {
        let Answer { command, done } = answer;
        let cid = command.cid.get();
        let run = self.run.as_mut().expect("checked by who calls");
        let made = match done {
            What::CqMade(made, result) => {
                let qid = made.qid;
                match (&result, run.workers.get(&qid)) {
                    (Ok(()), Some(worker)) => {
                        run.cqs.insert(qid, made);
                        self.core.routes().heads[usize::from(qid)] = Some(worker.clone());
                    }
                    _ => {
                        run.workers.remove(&qid);
                        self.admin.queues.deleted_cq(qid);
                    }
                }
                result
            }
            What::SqMade(made, result) => {
                let qid = made.qid;
                match (&result, run.workers.get(&made.cqid)) {
                    (Ok(()), Some(worker)) => {
                        run.sqs.insert(qid, made);
                        self.core.routes().tails[usize::from(qid)] = Some(worker.clone());
                    }
                    _ => self.admin.queues.deleted_sq(qid),
                }
                result
            }
            What::SqDeleted(qid) => {
                run.sqs.remove(&qid);
                self.admin.queues.deleted_sq(qid);
                Ok(())
            }
            What::CqDeleted(qid) => {
                run.workers.remove(&qid);
                run.counts.remove(&qid);
                run.vectors.remove(&qid);
                run.cqs.remove(&qid);
                self.admin.queues.deleted_cq(qid);
                Ok(())
            }
            What::Aborted(aborted) => {
                self.admin.abort_done();
                return self.complete(cid, u32::from(!aborted), Status::SUCCESS);
            }
            What::Shadowed => Ok(()),
        };
        match made {
            Ok(()) => self.complete(cid, 0, Status::SUCCESS),
            Err(e) => {
                log::debug!("{e}");
                self.refuse(&command, Status::INVALID_FIELD);
            }
        }
    }
}
