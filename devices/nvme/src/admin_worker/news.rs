//! What the subsystem tells: workers have it before the host hears of it. So a host that is told of a namespace can use it at once, and one that has formatted it does
//! not find it as it was.
//!
//! ```text
//!   Subsystem: Table, NamespaceChanged ...       format: over
//!        |                                          |
//!        v                                          v
//!   News: in order, each with the table that it is about --- all workers have that ---> Admin: logs, events; answers
//! ```

use std::collections::VecDeque;
use std::sync::Arc;

use super::{AdminWorker, Message};
use crate::attached::Table;
use crate::registers::Run as RunNumber;
use crate::spec::{Command, Status};
use crate::subsystem::{NotKept, SubsystemEvent};
use crate::token::Token;
use crate::worker::Message as ToWorker;

/// What the host is to hear of.
#[derive(Default)]
pub(super) struct News {
    /// The table that workers have, or are about to have.
    table: Arc<Table>,
    /// How many tables workers were told.
    told: u64,
    /// How many of these all of them have.
    taken: u64,
    /// What waits, with the number of the table that was told before it.
    waiting: VecDeque<(u64, What)>,
}

enum What {
    Event(SubsystemEvent),
    Formatted(Formatted),
}

/// A format is over.
pub(crate) struct Formatted {
    /// The run whose host has asked for it.
    pub(super) run: RunNumber,
    pub(super) command: Command,
    pub(super) nsids: Vec<u32>,
    /// What comes of it was told before.
    pub(super) kept: Result<(), NotKept>,
}

impl AdminWorker {
    /// The table that workers have, or are about to.
    pub(super) fn newest(&self) -> &Arc<Table> {
        &self.news.table
    }

    /// The subsystem has changed.
    pub(super) fn hear(&mut self, event: SubsystemEvent) {
        match &event {
            SubsystemEvent::Table(table) => {
                self.news.table = table.clone();
                self.tell_workers();
            }
            SubsystemEvent::Drain(nsid, token) => {
                for worker in self.workers() {
                    let token = token.clone();
                    worker.send(ToWorker::Drain {
                        nsid: *nsid,
                        bound: self.bound,
                        done: Box::new(move || drop(token)),
                    });
                }
                return;
            }
            SubsystemEvent::NamespaceChanged(_)
            | SubsystemEvent::AnaChanged
            | SubsystemEvent::Reset => {}
        }
        self.wait_or_say(What::Event(event));
    }

    fn tell_workers(&mut self) {
        let table = self.news.table.for_workers(self.admin.highest());
        let mut workers = self.workers().peekable();
        if workers.peek().is_none() {
            return;
        }
        let number = self.news.told + 1;
        let core = self.core.clone();
        let token = Token::new(move || core.admin.send(Message::Taken(number)));
        for worker in workers {
            worker.send(ToWorker::Namespaces {
                table: table.clone(),
                bound: self.bound,
                done: Box::new(|| {}),
            });
            worker.send(ToWorker::Told { done: token.done() });
        }
        self.news.told = number;
    }

    /// Workers have so many tables.
    pub(super) fn taken(&mut self, number: u64) {
        self.news.taken = self.news.taken.max(number);
        while let Some((number, _)) = self.news.waiting.front()
            && *number <= self.news.taken
            && let Some((_, what)) = self.news.waiting.pop_front()
        {
            self.say(what);
        }
    }

    /// Nobody waits for workers any more.
    pub(super) fn hear_all(&mut self) {
        self.taken(self.news.told);
    }

    /// A format is over: what the host does next is done with the new one.
    pub(super) fn formatted(&mut self, formatted: Formatted) {
        let is_waiting = |run: &super::Run| run.number == formatted.run;
        if self.run.as_ref().is_some_and(is_waiting) {
            self.wait_or_say(What::Formatted(formatted));
        } else if formatted.kept.is_ok() {
            // It has outlived a reset. The host has begun anew, and may have seen the namespaces as they were.
            for nsid in formatted.nsids {
                self.hear(SubsystemEvent::NamespaceChanged(nsid));
            }
        }
    }

    fn wait_or_say(&mut self, what: What) {
        let news = &mut self.news;
        // What waits is about the last table or one before it, so nothing is overtaken.
        if news.taken < news.told {
            news.waiting.push_back((news.told, what));
        } else {
            self.say(what);
        }
    }

    fn say(&mut self, what: What) {
        match what {
            What::Event(event) => self.admin.handle_event(&event),
            What::Formatted(Formatted {
                run: number,
                command,
                kept,
                ..
            }) => {
                if self.run.as_ref().is_none_or(|run| run.number != number) {
                    return;
                }
                match kept {
                    Ok(()) => self.complete(command.cid.get(), 0, Status::SUCCESS),
                    Err(NotKept) => self.refuse(&command, Status::INTERNAL_ERROR),
                }
            }
        }
    }
}
