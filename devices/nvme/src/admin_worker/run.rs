//! A controller that is enabled, as its admin side has it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use crate::data::Resolver;
use crate::interrupt::{Coalescing, Interrupts, Signal, Wire};
use crate::queue::{CompletionQueue, Shadow, SubmissionQueue};
use crate::queues::{CreateCq, CreateSq};
use crate::registers::Run as RunNumber;
use crate::spec::{Command, Completion};
use crate::worker::WorkerHandle;

/// Most commands that are not answered, requests of events aside.
const PENDING: usize = 64;

/// A controller that is enabled.
pub(super) struct Run {
    pub(super) number: RunNumber,
    pub(super) sq: SubmissionQueue,
    pub(super) cq: CompletionQueue,
    pub(super) interrupts: Interrupts,
    pub(super) resolver: Resolver,
    pub(super) page: u64,
    pub(super) shadow: Option<Shadow>,
    /// By completion queue.
    pub(super) workers: BTreeMap<u16, Arc<WorkerHandle>>,
    /// Interrupts given, by completion queue.
    pub(super) counts: BTreeMap<u16, Arc<AtomicU64>>,
    /// Their vectors.
    pub(super) vectors: BTreeMap<u16, Option<u16>>,
    /// The I/O queues that there are, those that are being deleted among them.
    pub(super) cqs: BTreeMap<u16, CreateCq>,
    /// As above.
    pub(super) sqs: BTreeMap<u16, CreateSq>,
    /// Commands that are answered later.
    pub(super) pending: Vec<Command>,
    /// Commands that another process has taken and not answered, to be done again when there is memory.
    pub(super) again: VecDeque<Command>,
    /// Completions that are not posted: what they tell is written down before, and they may wait for memory.
    pub(super) outbox: VecDeque<Completion>,
    /// So many of them, the first, another process may have posted.
    pub(super) uncertain: usize,
    /// Completions that the host has not been told of.
    pub(super) posted: u32,
    /// The memory of the admin queues has gone; until then it may come back.
    pub(super) lost: Option<Instant>,
    /// It cannot go on (CSTS.CFS): no more commands are taken.
    pub(super) failed: bool,
}

impl Run {
    /// One whose queues are these; `wire`: the vector of its completions.
    pub(super) fn new(
        number: RunNumber,
        page: u64,
        sq: SubmissionQueue,
        cq: CompletionQueue,
        wire: Wire,
    ) -> Self {
        Self {
            number,
            sq,
            cq,
            interrupts: Interrupts::new(Signal::Vector(wire), Coalescing::default()),
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

    /// Whether the host has done nothing that it has to be looked at for.
    #[inline]
    pub(super) fn is_quiet(&self) -> bool {
        self.sq.is_quiet() && !self.interrupts.is_owed()
    }

    /// Whether commands are taken: not without memory, nor while too many are not answered.
    pub(super) fn takes(&self) -> bool {
        // The host's head may be ahead of what we know to be posted.
        let certain = self.uncertain == 0;
        let there = self.cq.is_on() && self.sq.is_on();
        there && certain && !self.failed && self.pending.len() < PENDING
    }

    /// Posts what is to be posted, as far as there is memory.
    pub(super) fn post(&mut self) {
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
