//! A turn: completions first, then new commands, as far as the budget goes.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use bluff_block::{ChannelHandle, Completion};
use bluff_memory::GuestMemory;
use bluff_pci::Dma;
use bluff_reactor::Context;

use super::bounce::Bounces;
use super::slots::Slots;
use super::space::Space;
use super::{Setup, SqSetup};
use crate::command::status_of;
use crate::counters::{QueueCounters, Tally, add};
use crate::data::Resolver;
use crate::interrupt::{Interrupts, Told};
use crate::journal::QueueJournal;
use crate::namespace::NamespaceTable;
use crate::queue::{
    CompletionQueue, Doorbells, InvalidValue, QueueError, Shadow, Side, SubmissionQueue, completion,
};
use crate::report::{CommandError, QueueEvent, Shared};
use crate::spec::{Command, Completion as Entry, Status, io};

/// Commands taken in one turn.
const COMMANDS: u32 = 32;
/// How often a worker that stays busy says so.
const TELL_BUSY: Duration = Duration::from_millis(10);
/// Bytes after which a turn takes no more.
const BYTES: u64 = 1 << 20;

/// A submission queue.
pub(super) struct Sq {
    pub(super) queue: SubmissionQueue,
    counters: Arc<QueueCounters>,
    tally: Tally,
    pub(super) in_flight: u64,
    /// Something is to be added to its counters.
    dirty: bool,
    /// No more is taken from it.
    pub(super) ends: bool,
}

/// Everything that moves in a turn.
pub(super) struct Io {
    pub(super) cq: CompletionQueue,
    pub(super) interrupts: Interrupts,
    interrupt_count: Arc<AtomicU64>,
    /// By a number that their commands know; `None`: deleted.
    pub(super) sqs: Vec<Option<Sq>>,
    /// Which of them is first in the next turn.
    first: usize,
    doorbells: Arc<Doorbells>,
    pub(super) shadow: Option<Shadow>,
    /// `None`: the host lets us not reach it.
    pub(super) memory: Option<Arc<GuestMemory>>,
    pub(super) resolver: Resolver,
    pub(super) namespaces: NamespaceTable,
    /// Namespaces on this reactor, by a number that their commands know.
    pub(super) spaces: Vec<Option<Space>>,
    /// The namespace of the last command, and its space.
    pub(super) last: Option<(u32, u32)>,
    pub(super) slots: Slots,
    pub(super) done: Vec<Completion>,
    pub(super) bounces: Bounces,
    /// Commands that wait for a bounce buffer.
    pub(super) waiting: VecDeque<u32>,
    pub(super) scratch: Vec<u8>,
    pub(super) shared: Arc<Shared>,
    /// Completions posted in this turn.
    pub(super) posted: u32,
    /// Completions that wait for memory to be posted to, and the slots that are kept for them.
    pub(super) parked: Vec<(Entry, u32)>,
    /// Where it is written down what is in flight, if it is.
    pub(super) journal: Option<QueueJournal>,
    /// Nothing is taken before it is known what was in flight.
    pub(super) resuming: bool,
    /// Another process may have posted what waits for memory: so the host's head may be ahead of what we know of.
    pub(super) uncertain: bool,
    /// What another process had in flight, and is to be done again.
    pub(super) again: VecDeque<(u32, Command)>,
    /// The head that is written down.
    head: u16,
    /// Nothing is answered any more, and nothing begun.
    pub(super) mute: bool,
    /// Since when there are commands in flight, as far as that was not counted.
    busy: Option<Instant>,
}

impl Io {
    /// A completion queue without submission queues.
    pub(super) fn new(setup: Setup) -> Result<Self, QueueError> {
        let memory = match setup.dma {
            Dma::Off => None,
            Dma::On(memory) => Some(memory),
        };
        let (qid, base, size) = (setup.qid, setup.base, setup.size);
        let mut cq = match &setup.journal {
            Some(journal) if setup.resumes => {
                let (posted, head) = journal.position();
                CompletionQueue::resume(qid, base, size, &setup.doorbells, posted, head)?
            }
            _ => CompletionQueue::new(qid, base, size, &setup.doorbells)?,
        };
        let fresh = !setup.resumes;
        cq.set_memory(memory.as_ref(), setup.shadow.as_ref(), fresh)?;
        if let Some(journal) = setup.journal.as_ref().filter(|_| fresh) {
            journal.begin();
        }
        Ok(Self {
            head: cq.head(),
            cq,
            interrupts: Interrupts::new(setup.signal, setup.coalescing),
            interrupt_count: setup.interrupts,
            sqs: Vec::new(),
            first: 0,
            doorbells: setup.doorbells,
            shadow: setup.shadow,
            memory,
            resolver: Resolver::new(setup.page_shift),
            namespaces: setup.namespaces,
            spaces: Vec::new(),
            last: None,
            slots: Slots::default(),
            done: Vec::with_capacity(COMMANDS as usize),
            bounces: Bounces::default(),
            waiting: VecDeque::new(),
            scratch: Vec::new(),
            shared: setup.shared,
            posted: 0,
            parked: Vec::new(),
            journal: setup.journal,
            resuming: setup.resumes,
            uncertain: false,
            again: VecDeque::new(),
            mute: false,
            busy: None,
        })
    }

    /// Takes a submission queue on.
    pub(super) fn add_sq(&mut self, setup: SqSetup) -> Result<(), QueueError> {
        let (qid, base, size) = (setup.qid, setup.base, setup.size);
        let mut queue = match &self.journal {
            Some(journal) if setup.resumes => {
                let taken = journal.count_taken(qid);
                SubmissionQueue::resume(qid, base, size, &self.doorbells, taken)?
            }
            _ => SubmissionQueue::new(qid, base, size, &self.doorbells)?,
        };
        let fresh = !setup.resumes;
        queue.set_memory(self.memory.as_ref(), self.shadow.as_ref(), fresh)?;
        if let Some(journal) = self.journal.as_ref().filter(|_| fresh) {
            journal.begin_sq(qid);
        }
        let sq = Some(Sq {
            queue,
            counters: setup.counters,
            tally: Tally::default(),
            in_flight: 0,
            dirty: false,
            ends: false,
        });
        match self.sqs.iter_mut().find(|sq| sq.is_none()) {
            Some(place) => *place = sq,
            None => self.sqs.push(sq),
        }
        Ok(())
    }

    /// One turn; says whether anything was done.
    #[inline]
    pub(super) fn batch(&mut self, cx: &mut Context<'_>, takes: bool) -> bool {
        let now = cx.now();
        let mut worked = self.collect(now);
        // What waits for a channel goes first.
        worked |= self.submit(cx);
        if takes && self.may_take() && self.take_or_redo(cx) {
            worked = true;
            self.submit(cx);
            // What was completed at once is seen at once.
            self.collect(now);
        }
        if self.posted > 0 {
            self.publish(cx, now);
        }
        if self.interrupts.is_owed() && self.cq.is_on() && self.is_settled() {
            match self.cq.is_read() {
                Ok(true) => self.interrupts.read(),
                Ok(false) => {}
                Err(value) => self.invalid(self.cq.qid(), Side::Head, value),
            }
            self.note_head();
        }
        if worked {
            self.count();
            self.count_time(now);
        }
        worked
    }

    /// Whether it is known what another process has done.
    #[inline(always)]
    fn is_settled(&self) -> bool {
        !self.resuming && !self.uncertain
    }

    /// Whether commands are taken: not while a channel is too busy for what it has, unless there are others.
    fn may_take(&self) -> bool {
        let memory = self.cq.is_on() && !self.mute && self.is_settled();
        let mut spaces = self.spaces.iter().flatten();
        match (spaces.next(), spaces.next()) {
            (Some(only), None) => memory && only.ops.is_empty(),
            _ => memory,
        }
    }

    #[inline(always)]
    fn take_or_redo(&mut self, cx: &mut Context<'_>) -> bool {
        match self.again.is_empty() {
            true => self.take(cx),
            false => self.redo(cx, COMMANDS),
        }
    }

    /// Writes down how far the host has read, before anything is posted that hangs on it.
    #[inline(always)]
    fn note_head(&mut self) {
        if let Some(journal) = &self.journal
            && self.head != self.cq.head()
        {
            self.head = self.cq.head();
            journal.set_head(self.head);
        }
    }

    /// Takes commands, and begins or answers them.
    #[inline(always)]
    fn take(&mut self, cx: &mut Context<'_>) -> bool {
        let mut room = match self.cq.room() {
            Ok(room) => room,
            Err(value) => {
                self.invalid(self.cq.qid(), Side::Head, value);
                return true;
            }
        }
        .min(COMMANDS);
        self.note_head();
        let (before, mut bytes, count) = (room, 0, self.sqs.len());
        // A queue that takes all of a turn is the last one in the next.
        self.first = (self.first + 1) % count.max(1);
        for i in 0..count {
            let at = (self.first + i) % count;
            let Some(sq) = self.sqs[at]
                .as_mut()
                .filter(|sq| !sq.ends && sq.queue.is_on())
            else {
                continue;
            };
            let qid = sq.queue.qid();
            let looked = sq.queue.look();
            if let Err(value) = looked {
                self.invalid(qid, Side::Tail, value);
            }
            while room > 0 && bytes < BYTES && !self.slots.full() {
                let sq = self.sqs[at].as_mut().expect("it stays for this turn");
                let Some(command) = sq.queue.fetch() else {
                    break;
                };
                sq.in_flight += 1;
                self.cq.reserve();
                room -= 1;
                bytes += self.begin(cx, at as u16, &command);
            }
        }
        room < before
    }

    /// Offers operations to the channels; says whether they took any.
    #[inline(always)]
    fn submit(&mut self, cx: &mut Context<'_>) -> bool {
        let mut worked = false;
        for space in self.spaces.iter_mut().flatten() {
            worked |= space.submit(cx);
        }
        worked
    }

    /// Takes completions from the channels, and ends what is finished or goes on with it.
    #[inline(always)]
    fn collect(&mut self, now: Instant) -> bool {
        if self.slots.in_flight() == 0 {
            return false;
        }
        for space in self.spaces.iter_mut().flatten() {
            space.poll(now, &mut self.done);
        }
        self.finish_done()
    }

    /// Goes through what is completed.
    #[inline(always)]
    pub(super) fn finish_done(&mut self) -> bool {
        if self.done.is_empty() {
            return false;
        }
        let mut done = std::mem::take(&mut self.done);
        for completion in done.drain(..) {
            self.completed(completion);
        }
        self.done = done;
        true
    }

    #[inline(always)]
    fn completed(&mut self, completion: Completion) {
        let Some(index) = self.slots.of(ChannelHandle::slot(completion.tag)) else {
            log::error!("a completion of nothing: {completion:?}");
            return;
        };
        let slot = self.slots.get(index);
        slot.pending -= 1;
        if let Err(e) = completion.result
            && !slot.status.is_error()
        {
            slot.status = match (e, slot.cause) {
                (bluff_block::BlockError::Cancelled, Some(cause)) => cause,
                _ => status_of(e, is_write(slot.opcode)),
            };
        }
        if slot.pending > 0 {
            return;
        }
        if slot.steps.is_some() && self.goes_on(index) {
            return;
        }
        self.end(index);
    }

    /// Begins the next step, where there is one and the command is not to end.
    #[cold]
    fn goes_on(&mut self, index: u32) -> bool {
        let mute = self.mute;
        let slot = self.slots.get(index);
        if slot.status.is_error() {
            return false;
        }
        if let Some(cause) = slot.cause {
            slot.status = cause;
            return false;
        }
        // Nobody is there to be told, or to want it.
        !mute && self.step(index)
    }

    /// Answers a command.
    #[inline(always)]
    pub(super) fn end(&mut self, index: u32) {
        let mute = self.mute;
        let slot = self.slots.get(index);
        if slot.bounce.is_some() || slot.aborted.is_some() {
            self.end_rare(index);
        }
        let slot = self.slots.get(index);
        let sq = self.sqs[usize::from(slot.sq)]
            .as_mut()
            .expect("waits for its commands");
        sq.in_flight -= 1;
        sq.dirty = true;
        let mut status = slot.status;
        if status.is_error() {
            status = status.more();
            fail(sq, slot, &self.shared);
        } else {
            tally(&mut sq.tally, slot.opcode, slot.len);
        }
        let entry = completion(sq.queue.qid(), sq.queue.head(), slot.cid, 0, status);
        if mute {
            self.cq.release();
            self.slots.give(index);
        } else {
            let posted = self.post(index, &entry, CompletionQueue::post);
            if posted {
                self.slots.give(index);
            } else {
                self.slots.keep(index);
                self.parked.push((entry, index));
            }
        }
    }

    /// Posts the completion of a slot by `post`, with what is written down around it; `false`: it has to wait for memory.
    #[inline(always)]
    fn post(
        &mut self,
        index: u32,
        entry: &Entry,
        post: impl FnOnce(&mut CompletionQueue, &Entry) -> bool,
    ) -> bool {
        if let Some(journal) = &self.journal {
            journal.complete(index, self.cq.posted(), entry);
        }
        let posted = post(&mut self.cq, entry);
        self.posted += u32::from(posted);
        if let Some(journal) = &self.journal {
            if posted {
                journal.set_posted(self.cq.posted());
                journal.strike(index);
            } else {
                journal.unpost(index);
            }
        }
        posted
    }

    #[cold]
    fn end_rare(&mut self, index: u32) {
        let slot = self.slots.get(index);
        let aborted = slot.status.code() == Status::ABORT_REQUESTED.code();
        if let Some(reply) = slot.aborted.take() {
            reply(aborted);
        }
        if let Some(bounce) = self.slots.get(index).bounce.take() {
            self.bounces.give(bounce);
            // Who waits for it is served when this one has ended: see `count`.
        }
    }

    /// Posts what waited for memory.
    pub(super) fn unpark(&mut self) {
        for (entry, index) in std::mem::take(&mut self.parked) {
            // Of another process's it is not known.
            if self.post(index, &entry, CompletionQueue::post_unless_there) {
                self.slots.release(index);
            } else {
                self.parked.push((entry, index));
            }
        }
        self.uncertain &= !self.parked.is_empty();
    }

    /// Tells the host, as it wants to be told.
    fn publish(&mut self, cx: &mut Context<'_>, now: Instant) {
        let posted = std::mem::take(&mut self.posted);
        match self.interrupts.posted(posted, now) {
            Told::Now => add(&self.interrupt_count, 1),
            Told::At(at) => cx.timer(cx.id(), at, 0),
            Told::Nothing => {}
        }
    }

    /// Adds to the counters.
    pub(super) fn count(&mut self) {
        if !self.waiting.is_empty() {
            self.serve_waiting();
        }
        for sq in self.sqs.iter_mut().flatten() {
            if sq.dirty {
                sq.dirty = false;
                sq.tally.count(&sq.counters, sq.in_flight);
            }
        }
    }

    /// A doorbell may have been rung. The head is looked at while we work only where that matters; one that makes no sense is told of here, too.
    pub(super) fn look_at_head(&mut self) {
        if self.cq.is_on()
            && self.is_settled()
            && let Err(value) = self.cq.look()
        {
            self.invalid(self.cq.qid(), Side::Head, value);
        }
        self.note_head();
    }

    /// Counts the time in which commands are in flight (SMART, Controller Busy Time).
    #[inline(always)]
    fn count_time(&mut self, now: Instant) {
        match (self.busy, self.slots.in_flight()) {
            (None, 0) => {}
            (None, _) => self.busy = Some(now),
            (Some(from), n) if n == 0 || now - from >= TELL_BUSY => {
                self.shared.counters.was_busy(from, now);
                self.busy = (n > 0).then_some(now);
            }
            _ => {}
        }
    }

    /// A doorbell makes no sense.
    #[cold]
    fn invalid(&self, qid: u16, side: Side, InvalidValue(value): InvalidValue) {
        (self.shared.tell)(QueueEvent::InvalidDoorbell { qid, side, value });
    }

    /// A queue cannot be used any more.
    #[cold]
    pub(super) fn broken(&mut self, e: &QueueError) {
        self.mute = true;
        (self.shared.tell)(QueueEvent::Broken {
            cause: e.to_string().into(),
        });
    }

    /// Interrupts that were to wait no longer than until now.
    pub(super) fn interrupt_due(&mut self, now: Instant) {
        if self.interrupts.due(now) {
            add(&self.interrupt_count, 1);
        }
    }

    /// Asks for what wakes us; says whether there is nothing to do.
    pub(super) fn arm(&mut self, cx: &mut Context<'_>, serves: bool) -> bool {
        for space in self.spaces.iter_mut().flatten() {
            let busy = !space.ops.is_empty();
            if !space.channel.park(cx, busy) {
                return false;
            }
        }
        if !serves || !self.may_take() || self.slots.full() {
            // Nothing is taken now, whatever the host does; something else will wake us.
            return true;
        }
        if !self.again.is_empty() {
            return false;
        }
        let room = self.cq.room();
        self.note_head();
        match room {
            // Only when the host has read on is there anything to do.
            Ok(0) => return !self.cq.arm(),
            Ok(_) => {}
            Err(value) => {
                self.invalid(self.cq.qid(), Side::Head, value);
                return false;
            }
        }
        let mut armed = true;
        let sqs = self.sqs.iter_mut().flatten();
        for sq in sqs.filter(|sq| !sq.ends && sq.queue.is_on()) {
            armed &= !sq.queue.arm();
        }
        armed
    }
}

fn is_write(opcode: u8) -> bool {
    !matches!(opcode, io::READ | io::COMPARE | io::VERIFY)
}

/// Counts a command that was done (SMART, Base 2.1 §5.2.12.1.3: Compare and Verify read, Copy writes).
#[inline(always)]
fn tally(t: &mut Tally, opcode: u8, len: u64) {
    match opcode {
        io::READ | io::COMPARE | io::VERIFY => {
            t.reads += 1;
            t.bytes_read += len;
        }
        io::WRITE | io::COPY => {
            t.writes += 1;
            t.bytes_written += len;
        }
        io::FLUSH => t.flushes += 1,
        _ => t.discards += 1,
    }
}

/// Counts and reports a command that was not.
#[cold]
fn fail(sq: &mut Sq, slot: &super::slots::Slot, shared: &Shared) {
    sq.tally.errors += 1;
    let code = slot.status.code();
    if code == Status::READ_ERROR.code() || code == Status::WRITE_FAULT.code() {
        sq.tally.media_errors += 1;
    }
    shared.errors.push(CommandError {
        sqid: sq.queue.qid(),
        cid: slot.cid.get(),
        opcode: slot.opcode,
        status: slot.status,
        nsid: slot.nsid,
        lba: slot.lba,
    });
}
