//! What happens to a worker from outside: messages, stops, memory that goes, aborts.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bluff_block::{BlockError, Cancel, ChannelHandle, Completion};
use bluff_memory::GuestMemory;
use bluff_pci::{Dma, Done};
use bluff_reactor::Context;

use super::batch::Io;
use super::slots::{ALL, Aborted, Slot};
use super::{SqSetup, Worker};
use crate::interrupt::Coalescing;
use crate::namespace::NamespaceTable;
use crate::queue::{QueueError, Shadow};
use crate::spec::Status;

/// How long a queue's memory may be missing. A VMM that splits or joins regions takes them away, and brings them back with its next message.
const GRACE: Duration = Duration::from_millis(500);

/// What a worker is told. What takes longer has a bound: what is in flight gets so long, and is then cancelled.
pub(crate) enum Message {
    /// One more submission queue; it is served at once.
    AddSq {
        /// Which.
        queue: SqSetup,
        /// Whether it could be.
        done: Box<dyn FnOnce(Result<(), QueueError>) + Send>,
    },
    /// A submission queue is deleted. Nothing more is taken from it; what was taken is completed, after the bound with "Command Aborted
    /// due to SQ Deletion" (Base 2.1 §5.2.3). With `done` nothing of it will be completed any more.
    DeleteSq {
        /// Its identifier.
        qid: u16,
        /// How long.
        bound: Duration,
        /// It is gone, or was not there.
        done: Done,
    },
    /// How far the host lets it reach. With `done` nothing uses what could be reached before and cannot now.
    Dma {
        /// How far.
        dma: Dma,
        /// How long.
        bound: Duration,
        /// It holds.
        done: Done,
    },
    /// The namespaces are others. With `done` nothing of those that went is in flight any more, and their volumes are let go of.
    Namespaces {
        /// Those that are attached now.
        table: NamespaceTable,
        /// How long.
        bound: Duration,
        /// It holds.
        done: Done,
    },
    /// Waits for what is in flight on a namespace now. Where it is blocked, nothing is afterwards.
    Drain {
        /// Which; [`crate::spec::ALL_NAMESPACES`] for all.
        nsid: u32,
        /// How long.
        bound: Duration,
        /// Nothing is.
        done: Done,
    },
    /// A command is to be aborted.
    Abort {
        /// Its submission queue.
        sqid: u16,
        /// Its identifier.
        cid: u16,
        /// Whether it was; it is completed then. `false`: it was not found, has ended by itself, or cannot be.
        reply: Aborted,
    },
    /// Nothing; what was sent before holds with `done`, but for what takes longer.
    Told {
        /// It does.
        done: Done,
    },
    /// The host has given shadow doorbells.
    Shadow {
        /// Where they are.
        shadow: Shadow,
        /// They are used.
        done: Done,
    },
    /// All submission queues that there were are there again, and what was in flight can be done again.
    Resume,
    /// Interrupts are put together in another way.
    Coalesce(Coalescing),
    /// The end. What is in flight is completed within the bound (`answer`), or nobody hears of it any more, and nothing begins.
    /// With `done` nothing of the worker uses memory.
    Stop {
        /// How long.
        bound: Duration,
        /// Whether completions are posted.
        answer: bool,
        /// It has ended.
        done: Done,
    },
}

/// What a worker is doing.
pub(super) enum State {
    /// It serves its queues.
    Running,
    /// The memory of a queue is not there; until then it may come back.
    Lost(Instant, QueueError),
    /// A queue cannot be used any more; it waits for its end.
    Broken,
    /// It finishes what is in flight.
    Stopping(Stopping),
    /// It is at its end.
    Stopped,
}

/// A stop under way.
pub(super) struct Stopping {
    deadline: Instant,
    cancelled: bool,
    done: Vec<Done>,
}

/// Something that is waited for: the commands that it concerns.
pub(super) struct Wait {
    what: What,
    /// Commands from this number on came later, and are not waited for.
    before: u64,
    /// What they are answered that have to be cancelled.
    cause: Status,
    deadline: Instant,
    cancelled: bool,
    done: Done,
}

enum What {
    /// Those that use memory that has gone, which is kept until then.
    Memory(#[allow(dead_code, reason = "kept until it is dropped")] Option<Arc<GuestMemory>>),
    /// Those of a submission queue, which is dropped then.
    Sq(u16),
    /// Those of these spaces.
    Spaces(Vec<u32>),
    /// The same; these are dropped then.
    Gone(Vec<u32>),
}

impl Wait {
    fn concerns(&self, slot: &Slot) -> bool {
        let it = match &self.what {
            What::Memory(_) => slot.revoked,
            What::Sq(sq) => slot.sq == *sq,
            What::Spaces(all) | What::Gone(all) => slot.space == ALL || all.contains(&slot.space),
        };
        it && slot.number < self.before
    }
}

impl Worker {
    pub(super) fn take_messages(&mut self, cx: &mut Context<'_>) {
        while !matches!(self.state, State::Stopped)
            && let Ok(message) = self.mailbox.try_recv()
        {
            self.take(cx, message);
        }
        self.check_waits();
    }

    fn take(&mut self, cx: &mut Context<'_>, message: Message) {
        match message {
            Message::AddSq { queue, done } => done(self.io.add_sq(queue)),
            Message::DeleteSq { qid, bound, done } => {
                let sqs = self.io.sqs.iter_mut();
                let found = sqs.enumerate().find_map(|(i, sq)| {
                    let sq = sq.as_mut().filter(|sq| sq.queue.qid() == qid)?;
                    sq.ends = true;
                    Some(i)
                });
                match found {
                    Some(i) => self.wait(
                        cx,
                        What::Sq(i as u16),
                        Status::ABORTED_SQ_DELETION,
                        bound,
                        done,
                    ),
                    None => done(),
                }
            }
            Message::Dma { dma, bound, done } => self.set_dma(cx, dma, bound, done),
            Message::Namespaces { table, bound, done } => {
                let gone = self.io.set_namespaces(table);
                self.wait(cx, What::Gone(gone), Status::INVALID_NAMESPACE, bound, done);
            }
            Message::Drain { nsid, bound, done } => {
                let spaces = self.io.spaces_of(nsid);
                self.wait(
                    cx,
                    What::Spaces(spaces),
                    Status::FORMAT_IN_PROGRESS,
                    bound,
                    done,
                );
            }
            Message::Abort { sqid, cid, reply } => self.io.abort(sqid, cid, reply),
            Message::Told { done } => done(),
            Message::Shadow { shadow, done } => {
                self.io.shadow = Some(shadow);
                self.resolve(cx, true);
                done();
            }
            Message::Resume => {
                if let Err(e) = self.io.resume() {
                    self.io.broken(&e);
                    self.state = State::Broken;
                }
            }
            Message::Coalesce(coalescing) => self.io.interrupts.coalesce(coalescing),
            Message::Stop {
                bound,
                answer,
                done,
            } => self.stop(cx, bound, answer, done),
        }
    }

    fn wait(
        &mut self,
        cx: &mut Context<'_>,
        what: What,
        cause: Status,
        bound: Duration,
        done: Done,
    ) {
        // One that has nothing to wait for ends with the messages of this turn.
        let deadline = cx.now() + bound;
        cx.timer(cx.id(), deadline, 0);
        self.waits.push(Wait {
            what,
            before: self.io.slots.taken(),
            cause,
            deadline,
            cancelled: false,
            done,
        });
    }

    /// Ends what has nothing to wait for any more.
    pub(super) fn check_waits(&mut self) {
        let mut i = 0;
        while i < self.waits.len() {
            let wait = &self.waits[i];
            if self.io.slots.busy().any(|(_, slot)| wait.concerns(slot)) {
                i += 1;
                continue;
            }
            let Wait { what, done, .. } = self.waits.remove(i);
            match what {
                // In this order: who is told may count on it.
                What::Memory(old) => drop(old),
                What::Sq(sq) => self.io.drop_sq(sq),
                What::Spaces(_) => {}
                What::Gone(spaces) => {
                    for at in spaces {
                        self.io.spaces[at as usize] = None;
                    }
                }
            }
            done();
        }
    }

    /// Moves to another epoch, or to none. Commands whose buffers have gone are waited for.
    fn set_dma(&mut self, cx: &mut Context<'_>, dma: Dma, bound: Duration, done: Done) {
        let (memory, cause) = match dma {
            // They are tried again by the host, when it hears of them.
            Dma::Off => (None, Status::INTERRUPTED),
            Dma::On(memory) => (Some(memory), Status::DATA_TRANSFER_ERROR),
        };
        for (_, slot) in self.io.slots.busy() {
            let mapped = |m: &Arc<GuestMemory>| slot.data.iter().all(|v| m.maps(*v));
            slot.revoked = !slot.data.is_empty() && !memory.as_ref().is_some_and(mapped);
        }
        let old = std::mem::replace(&mut self.io.memory, memory);
        self.io.resolver.forget();
        self.resolve(cx, false);
        self.io.unpark();
        self.wait(cx, What::Memory(old), cause, bound, done);
    }

    /// Resolves the queues in the epoch that there is.
    fn resolve(&mut self, cx: &mut Context<'_>, fresh: bool) {
        let resolved = self.io.resolve(fresh);
        match (&self.state, resolved) {
            (State::Lost(..), Ok(())) => self.state = State::Running,
            (State::Running, Err(e)) => {
                let until = cx.now() + GRACE;
                cx.timer(cx.id(), until, 0);
                self.state = State::Lost(until, e);
            }
            // Another part is missing now, and the time goes on.
            _ => {}
        }
    }

    fn stop(&mut self, cx: &mut Context<'_>, bound: Duration, answer: bool, done: Done) {
        let deadline = cx.now() + bound;
        cx.timer(cx.id(), deadline, 0);
        if !answer {
            self.io.mute = true;
            self.io.forget_waiting();
        }
        if let State::Stopping(s) = &mut self.state {
            s.deadline = s.deadline.min(deadline);
            s.done.push(done);
            return;
        }
        self.state = State::Stopping(Stopping {
            deadline,
            cancelled: false,
            done: vec![done],
        });
    }

    /// Finishes a stop when nothing is in flight any more.
    pub(super) fn try_stop(&mut self) -> bool {
        if self.io.slots.in_flight() > 0 {
            return false;
        }
        let State::Stopping(s) = std::mem::replace(&mut self.state, State::Stopped) else {
            unreachable!("called while stopping")
        };
        self.check_waits();
        self.io.let_go();
        for done in s.done {
            done();
        }
        true
    }

    /// A deadline may have come: takes back what is not done by now.
    pub(super) fn end_overdue(&mut self, now: Instant) {
        self.io.interrupt_due(now);
        for wait in &mut self.waits {
            if now >= wait.deadline && !wait.cancelled {
                wait.cancelled = true;
                self.io.cancel(wait.cause, |_, slot| wait.concerns(slot));
            }
        }
        if let State::Lost(until, e) = &self.state
            && now >= *until
        {
            self.io.broken(e);
            self.state = State::Broken;
        }
        if let State::Stopping(s) = &mut self.state
            && now >= s.deadline
            && !s.cancelled
        {
            s.cancelled = true;
            self.io.cancel(Status::ABORTED_SQ_DELETION, |_, _| true);
        }
        self.check_waits();
    }
}

impl Io {
    fn resolve(&mut self, fresh: bool) -> Result<(), QueueError> {
        let (memory, shadow) = (self.memory.as_ref(), self.shadow.as_ref());
        if fresh {
            // What was rung until now counts, by the doorbells that there were.
            for sq in self.sqs.iter_mut().flatten() {
                let _ = sq.queue.look();
            }
        }
        let mut result = self.cq.set_memory(memory, shadow, fresh);
        for sq in self.sqs.iter_mut().flatten() {
            result = result.and(sq.queue.set_memory(memory, shadow, fresh));
        }
        result
    }

    /// Takes a table up; gives the spaces that are in it no more.
    fn set_namespaces(&mut self, table: NamespaceTable) -> Vec<u32> {
        self.namespaces = table;
        self.last = None;
        let (table, spaces) = (&self.namespaces, self.spaces.iter_mut().enumerate());
        spaces
            .filter_map(|(i, space)| {
                let space = space.as_mut().filter(|s| !s.ends)?;
                let there = table.get(space.namespace.nsid());
                space.ends = !there.is_some_and(|n| Arc::ptr_eq(n, &space.namespace));
                space.refusal = table.refusal(space.namespace.nsid());
                space.ends.then_some(i as u32)
            })
            .collect()
    }

    fn spaces_of(&self, nsid: u32) -> Vec<u32> {
        let is_it = |n: u32| nsid == crate::spec::ALL_NAMESPACES || n == nsid;
        let spaces = self.spaces.iter().enumerate();
        spaces
            .filter(|(_, s)| s.as_ref().is_some_and(|s| is_it(s.namespace.nsid())))
            .map(|(i, _)| i as u32)
            .collect()
    }

    fn drop_sq(&mut self, sq: u16) {
        self.count();
        self.sqs[usize::from(sq)] = None;
    }

    fn abort(&mut self, sqid: u16, cid: u16, reply: Aborted) {
        let sqs = &self.sqs;
        let found = self.slots.busy().find(|(_, slot)| {
            let sq = sqs[usize::from(slot.sq)].as_ref();
            slot.cid.get() == cid && sq.is_some_and(|sq| sq.queue.qid() == sqid)
        });
        let Some((index, slot)) = found else {
            return reply(false);
        };
        if slot.aborted.is_some() {
            // Somebody is to hear of it already.
            return reply(false);
        }
        slot.aborted = Some(reply);
        if !self.cancel(Status::ABORT_REQUESTED, |i, _| i == index)
            && let Some(reply) = self.slots.get(index).aborted.take()
        {
            // It ends when it ends.
            reply(false);
        }
    }

    /// Cancels commands, which are answered `cause` if they are not finished. Says whether any of them ends soon.
    fn cancel(&mut self, cause: Status, which: impl Fn(u32, &Slot) -> bool) -> bool {
        let mut chosen = Vec::new();
        for (index, slot) in self.slots.busy() {
            if which(index, slot) {
                slot.cause.get_or_insert(cause);
                chosen.push(index);
            }
        }
        let mut soon = self.drop_waiting(&chosen);
        soon |= self.again.iter().any(|(index, _)| chosen.contains(index));
        // What no channel has taken is cancelled by ourselves, and never submitted.
        let own = self.done.len();
        let slots = &self.slots;
        for space in self.spaces.iter_mut().flatten() {
            space.ops.retain(|op| {
                let slot = slots.of(ChannelHandle::slot(op.tag));
                let keep = !slot.is_some_and(|index| chosen.contains(&index));
                if !keep {
                    self.done.push(Completion {
                        tag: op.tag,
                        result: Err(BlockError::Cancelled),
                    });
                }
                keep
            });
        }
        soon |= self.done.len() > own;
        for &index in &chosen {
            let key = self.slots.key(index);
            let slot = self.slots.get(index);
            if slot.pending == 0 {
                continue;
            }
            for (at, space) in self.spaces.iter_mut().enumerate() {
                let Some(space) = space else { continue };
                if slot.space != ALL && slot.space as usize != at {
                    continue;
                }
                for part in 0..slot.parts {
                    soon |= space.channel.cancel(space.channel.tag(key, part)) == Cancel::Soon;
                }
            }
        }
        self.finish_done();
        soon
    }

    /// Ends commands of these that wait for a bounce buffer.
    fn drop_waiting(&mut self, chosen: &[u32]) -> bool {
        let waiting = std::mem::take(&mut self.waiting);
        let (ends, stay): (VecDeque<u32>, _) =
            waiting.into_iter().partition(|i| chosen.contains(i));
        self.waiting = stay;
        for &index in &ends {
            let slot = self.slots.get(index);
            slot.status = slot.cause.unwrap_or(Status::ABORT_REQUESTED);
            self.end(index);
        }
        !ends.is_empty()
    }

    /// What has not begun does not begin: commands that wait for a buffer, and operations that no channel has taken.
    fn forget_waiting(&mut self) {
        let waiting: Vec<u32> = self.waiting.iter().copied().collect();
        self.drop_waiting(&waiting);
        for (index, _) in std::mem::take(&mut self.again) {
            self.slots.get(index).status = Status::ABORT_REQUESTED;
            self.end(index);
        }
        let done = &mut self.done;
        for space in self.spaces.iter_mut().flatten() {
            done.extend(space.ops.drain(..).map(|op| Completion {
                tag: op.tag,
                result: Err(BlockError::Cancelled),
            }));
        }
        self.finish_done();
    }

    /// Nothing is in flight, and nothing is used any more.
    fn let_go(&mut self) {
        self.count();
        self.interrupts.read();
        self.parked.clear();
        self.memory = None;
        self.shadow = None;
        self.resolve(false).expect("there is no memory to miss");
        self.spaces.clear();
    }
}
