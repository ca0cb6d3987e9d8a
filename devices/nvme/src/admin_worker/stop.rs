//! The end of all queues: of a run, or of the controller.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bluff_reactor::Context;

use super::storage::{FlushAll, Format};
use super::{AdminWorker, Message};
use crate::registers::Stop;
use crate::spec::registers::ShutdownKind;
use crate::token::Token;
use crate::worker::{Message as ToWorker, WorkerHandle};

/// A stop under way.
pub(super) struct Stopping {
    pub(super) why: Stop,
    pub(super) deadline: Instant,
    /// Those that are ending: what is asked of all workers is asked of them, too.
    pub(super) workers: Vec<Arc<WorkerHandle>>,
    /// All of them have.
    pub(super) ended: bool,
    /// A format that was under way, until nothing of it is in flight.
    pub(super) format: Option<Format>,
    pub(super) flush: Option<FlushAll>,
}

impl AdminWorker {
    /// All queues end.
    pub(super) fn stop(&mut self, cx: &mut Context<'_>, why: Stop, bound: Duration) {
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

    pub(super) fn hurry(&mut self, cx: &mut Context<'_>, bound: Duration) {
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
    pub(super) fn go_on_stopping(&mut self, cx: &mut Context<'_>) -> bool {
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
            if matches!(stopping.why, Stop::Shutdown(ShutdownKind::Normal)) {
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

    /// The controller is no more.
    pub(super) fn end(&mut self) {
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
}
