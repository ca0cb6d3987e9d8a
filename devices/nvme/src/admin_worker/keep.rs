//! What the admin side stands on, written down before its host is told, and taken up by another process.
//!
//! ```text
//!   turn: messages, commands --> state, outbox --> commit: written down --> posted to the host
//! ```
//! A command that was taken after the last time that it was written down is taken again: nothing of it was told. One that was answered and not posted is posted; one that is
//! being done is done again, from its beginning (but for formats of what others may have). Creations and deletions of queues are written down when they are over.

use std::sync::Arc;
use std::time::Instant;

use bluff_reactor::Context;
use serde::{Deserialize, Serialize};

use super::AdminWorker;
use super::run::Run;
use crate::admin::Saved;
use crate::queue::{CompletionQueue, QueueError, Shadow, SubmissionQueue};
use crate::queues::{CreateCq, CreateSq};
use crate::registers::{AdminQueues, Run as RunNumber};
use crate::report::QueueEvent;
use crate::spec::{Command, Status, admin as opcode};
use crate::worker::Message as ToWorker;

/// Why it cannot be gone on.
#[derive(Debug, thiserror::Error)]
pub(super) enum ResumeError {
    #[error("nothing is recorded of this run")]
    Missing,
    #[error("what is recorded makes no sense")]
    Invalid,
    #[error(transparent)]
    Queue(#[from] QueueError),
}

#[derive(Serialize, Deserialize)]
struct Record {
    admin: Saved,
    run: Option<RunRecord>,
}

#[derive(Serialize, Deserialize)]
struct RunRecord {
    number: u64,
    /// Commands taken from the admin submission queue.
    taken: u64,
    /// Completions posted to the admin completion queue, and how far the host has read.
    posted: u64,
    head: u16,
    cqs: Vec<CreateCq>,
    sqs: Vec<CreateSq>,
    pending: Vec<[u64; 8]>,
    outbox: Vec<[u64; 2]>,
    /// Shadow doorbells, and event indices.
    shadow: Option<(u64, u64)>,
}

impl AdminWorker {
    /// Writes down what has changed, then posts what the host is to be told.
    pub(super) fn commit(&mut self, now: Instant) {
        if std::mem::take(&mut self.unkept) {
            self.write_down(now);
        }
        if let Some(run) = &mut self.run {
            run.post();
        }
    }

    /// Writes down what there is, where that is kept.
    pub(super) fn write_down(&mut self, now: Instant) {
        let Some(journal) = self.core.journal.as_ref().filter(|_| !self.undecided) else {
            return;
        };
        let run = self.run.as_ref().map(|run| {
            let again = run.again.iter();
            let words = |c: &Command| -> [u64; 8] { zerocopy::transmute!(*c) };
            RunRecord {
                number: run.number.0,
                taken: run.sq.taken(),
                posted: run.cq.posted(),
                head: run.cq.head(),
                cqs: run.cqs.values().copied().collect(),
                sqs: run.sqs.values().copied().collect(),
                pending: run.pending.iter().chain(again).map(words).collect(),
                outbox: run
                    .outbox
                    .iter()
                    .map(|entry| zerocopy::transmute!(*entry))
                    .collect(),
                shadow: run.shadow.map(|s| (s.doorbells, s.events)),
            }
        });
        let admin = self.admin.save(now);
        let bytes = serde_json::to_vec(&Record { admin, run }).expect("plain numbers and lists");
        if !journal.set_admin(&bytes) {
            // All that it holds is bounded, by less than there is room for.
            log::error!("{} bytes of a controller cannot be kept", bytes.len());
            self.fail();
        }
    }

    /// Goes on with a run.
    pub(super) fn resume(
        &mut self,
        cx: &mut Context<'_>,
        number: RunNumber,
        queues: &AdminQueues,
    ) -> Result<(), ResumeError> {
        let written = self.core.journal.as_ref().and_then(|j| j.admin());
        let written = written.ok_or(ResumeError::Missing)?;
        let record = serde_json::from_slice(&written);
        let Record { admin, run } = record.map_err(|_| ResumeError::Invalid)?;
        let record = run.filter(|run| run.number == number.0);
        let record = record.ok_or(ResumeError::Missing)?;
        let (cqs, sqs, page) = (&record.cqs, &record.sqs, queues.page);
        if !self.admin.restore(&admin, cqs, sqs, page, cx.now()) {
            return Err(ResumeError::Invalid);
        }
        let doorbells = self.core.doorbells();
        let (size, taken) = (queues.sq_entries.into(), record.taken);
        let mut sq = SubmissionQueue::resume(0, queues.sq, size, &doorbells, taken)?;
        let (size, posted, head) = (queues.cq_entries.into(), record.posted, record.head);
        let mut cq = CompletionQueue::resume(0, queues.cq, size, &doorbells, posted, head)?;
        sq.set_memory(self.memory(), None, false)?;
        cq.set_memory(self.memory(), None, false)?;
        for _ in &record.outbox {
            cq.reserve_again()?;
        }
        let mut run = Run::new(number, page, sq, cq, self.vectors[0].clone());
        run.uncertain = record.outbox.len();
        run.outbox = record
            .outbox
            .iter()
            .map(|words| zerocopy::transmute!(*words))
            .collect();
        let pending = record.pending.iter();
        let pending = pending.map(|words| -> Command { zerocopy::transmute!(*words) });
        let (interrupted, again): (Vec<_>, Vec<_>) = pending.partition(|c| self.must_not_repeat(c));
        run.again = again.into();
        run.shadow = record.shadow.map(|(doorbells, events)| Shadow {
            doorbells,
            events,
            page,
        });
        run.cqs = cqs.iter().map(|made| (made.qid, *made)).collect();
        run.sqs = sqs.iter().map(|made| (made.qid, *made)).collect();
        // Whether the host was told of the last completions is not known.
        let _ = run.interrupts.posted(1, cx.now());
        for _ in &interrupted {
            run.cq.reserve_again()?;
        }
        self.run = Some(run);
        for command in &interrupted {
            self.refuse(command, Status::INTERRUPTED);
        }
        self.apply_settings();
        for made in cqs {
            let broken = self.broken();
            self.start_worker(made, true, broken);
        }
        for made in sqs {
            let broken = self.broken();
            self.add_sq(made, true, broken);
        }
        let run = self.run.as_ref().expect("made just now");
        let mut routes = self.core.routes();
        for (qid, worker) in &run.workers {
            routes.heads[usize::from(*qid)] = Some(worker.clone());
        }
        for made in sqs {
            routes.tails[usize::from(made.qid)] = run.workers.get(&made.cqid).cloned();
        }
        routes.resuming = false;
        drop(routes);
        // Last, so that what was rung before they had their routes is seen.
        for worker in run.workers.values() {
            worker.send(ToWorker::Resume);
        }
        Ok(())
    }

    /// A format may be over, and be another host's namespace by now, who has written there: this one's host has to ask again.
    fn must_not_repeat(&self, command: &Command) -> bool {
        let shared = self.core.subsystem().is_none_or(|s| s.options().shared);
        shared && command.opcode == opcode::FORMAT_NVM
    }

    /// What follows where a queue cannot be made again.
    fn broken(&self) -> impl FnOnce(Result<(), QueueError>) + Send + 'static {
        let shared = Arc::clone(&self.shared);
        move |result| {
            if let Err(e) = result {
                (shared.tell)(QueueEvent::Broken {
                    cause: e.to_string().into(),
                });
            }
        }
    }
}
