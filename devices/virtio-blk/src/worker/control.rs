//! What happens to a queue from outside: messages, stops, revocation of memory, the volume's lock.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bluff_block::{BlockError, Cancel, InUse, lock_pause};
use bluff_memory::GuestMemory;
use bluff_reactor::{Context, Turn};
use bluff_virtio::{Chain, Message, Pop, QueueChange, Ring, RingError, Stop, Stopped, with_ring};

use super::Worker;
use super::batch::Io;
use crate::request::Refused;
use crate::spec::status;

/// When to say that it is held.
const LOCK_TELL: Duration = Duration::from_secs(2);

/// What a queue is doing.
pub(super) enum State {
    /// It waits for the volume's lock; the ring is not served.
    Locking {
        since: Instant,
        next: Instant,
        told: bool,
    },
    /// It serves its ring.
    Running,
    /// It finishes what is in flight.
    Stopping(Stopping),
    /// The ring makes no sense; it waits to be stopped.
    Broken,
    /// It is at its end.
    Stopped,
}

/// A stop under way.
pub(super) struct Stopping {
    stop: Stop,
    deadline: Instant,
    cancelled: bool,
    done: Stopped,
}

/// Memory that has gone, and requests that still use it.
pub(super) struct Revocation {
    /// Keeps it mapped until they are finished.
    old: Arc<GuestMemory>,
    deadline: Instant,
    cancelled: bool,
    done: Box<dyn FnOnce() + Send>,
}

impl Worker {
    /// Whether the ring may be touched.
    pub(super) fn serves(&self) -> bool {
        matches!(self.state, State::Running) && self.enabled
    }

    /// Whether a stop under way has to do what an earlier life left: nobody would after it.
    pub(super) fn finishes_again(&self) -> bool {
        matches!(&self.state, State::Stopping(s) if !s.cancelled)
            && self.lock.is_some()
            && !self.io.leave
            && !self.io.mute
            && with_ring!(&self.queue, ring => ring.again()) > 0
    }

    pub(super) fn take_messages(&mut self, cx: &mut Context<'_>) {
        while let Ok(message) = self.mailbox.try_recv() {
            match message {
                Message::Change(change) => self.change(cx, change),
                Message::Stop(stop, done) => self.stop(cx, stop, done),
            }
        }
    }

    fn change(&mut self, cx: &mut Context<'_>, change: QueueChange) {
        match change {
            QueueChange::Memory {
                memory,
                bound,
                done,
            } => self.set_memory(cx, memory, bound, done),
            // The turn that follows looks at the ring, so a kick that went to the old one is not lost.
            QueueChange::Kick(kick) => self.line.set_kick(cx, kick),
            QueueChange::Call(call) => self.line.set_call(call),
            QueueChange::Error(error) => self.line.set_error(error),
            QueueChange::Log { log, done } => {
                with_ring!(&mut self.queue, ring => ring.set_log(log));
                done();
            }
            QueueChange::Enable(enabled) => self.enabled = enabled,
        }
    }

    /// Moves to a new epoch. Requests whose buffers have gone are waited for.
    fn set_memory(
        &mut self,
        cx: &mut Context<'_>,
        memory: Arc<GuestMemory>,
        bound: Duration,
        done: Box<dyn FnOnce() + Send>,
    ) {
        let old = with_ring!(&self.queue, ring => ring.memory().clone());
        let mut waits = false;
        for (_, slot) in self.io.slots.busy() {
            slot.revoked = !slot.chain.mapped_in(&memory);
            waits |= slot.revoked;
        }
        if !matches!(self.state, State::Broken)
            && let Err(e) = with_ring!(&mut self.queue, ring => ring.set_memory(memory))
        {
            self.broken(&e);
        }
        if waits {
            let deadline = cx.now() + bound;
            cx.timer(cx.id(), deadline, 0);
            // Another one may be under way: each keeps what it waits for.
            self.revocations.push(Revocation {
                old,
                deadline,
                cancelled: false,
                done,
            });
        } else {
            drop(old);
            done();
        }
    }

    /// Ends revocations when nothing uses the old memory any more.
    pub(super) fn check_revocations(&mut self) {
        if self.io.slots.busy().any(|(_, slot)| slot.revoked) {
            return;
        }
        for Revocation { old, done, .. } in self.revocations.drain(..) {
            // In this order: who is told may count on it.
            drop(old);
            done();
        }
    }

    fn stop(&mut self, cx: &mut Context<'_>, stop: Stop, done: Stopped) {
        let deadline = cx.now() + stop.bound;
        cx.timer(cx.id(), deadline, 0);
        let stopping = Stopping {
            stop,
            deadline,
            cancelled: false,
            done,
        };
        // Without a record nobody would do them again.
        self.io.leave = stop.leave && self.record.is_some();
        self.io.mute |= !stop.answer;
        self.state = State::Stopping(stopping);
    }

    /// Finishes a stop when nothing is in flight any more, or only what is left.
    pub(super) fn try_stop(&mut self, cx: &mut Context<'_>) -> bool {
        if self.io.slots.in_flight() > self.io.left || self.finishes_again() {
            return false;
        }
        if !self.io.leave && !self.io.mute {
            // Those of an earlier life that there was no time for, or no volume.
            let notify = with_ring!(&mut self.queue, ring => self.io.refuse_again(&mut **ring));
            if notify {
                self.line.notify();
            }
        }
        let State::Stopping(s) = std::mem::replace(&mut self.state, State::Stopped) else {
            unreachable!("called while stopping")
        };
        self.line.hang_up(cx);
        self.check_revocations();
        self.lock = None;
        if let Some(record) = &self.record
            && s.stop.drops()
        {
            record.forget();
        }
        let queue = with_ring!(&self.queue, ring => ring.position());
        self.counters
            .in_flight
            .store(0, std::sync::atomic::Ordering::Relaxed);
        (s.done)(Some(queue));
        true
    }

    /// A deadline may have come: takes back what is not done by now.
    pub(super) fn end_overdue(&mut self, now: Instant) {
        let mut due = false;
        for r in &mut self.revocations {
            due |= now >= r.deadline && !r.cancelled;
            r.cancelled |= now >= r.deadline;
        }
        if due {
            self.io.cancel(true);
        }
        if let State::Stopping(s) = &mut self.state
            && now >= s.deadline
            && !s.cancelled
        {
            s.cancelled = true;
            self.io.cancel(false);
        }
    }

    /// Takes the volume's lock, or tries again later.
    pub(super) fn try_lock(&mut self, cx: &mut Context<'_>) -> Turn {
        let State::Locking {
            since,
            next,
            mut told,
        } = self.state
        else {
            unreachable!("called while locking")
        };
        if cx.now() < next {
            return Turn::Idle;
        }
        match InUse::new(self.shared.volume.clone()) {
            Ok(lock) => {
                self.lock = Some(lock);
                self.state = State::Running;
                with_ring!(&mut self.queue, ring => ring.disable_notifications());
                if self.resumed {
                    // Who worked here before may have died between a used entry and its notification.
                    self.line.notify();
                }
                Turn::Worked
            }
            Err(e) => {
                if !told && cx.now() - since >= LOCK_TELL {
                    told = true;
                    log::error!(
                        "queue {}: {e}: {:?}; it is served when that changes",
                        self.line.index(),
                        self.shared.volume
                    );
                }
                let next = cx.now() + lock_pause();
                self.state = State::Locking { since, next, told };
                cx.timer(cx.id(), next, 0);
                Turn::Idle
            }
        }
    }

    /// The ring cannot be used any more.
    pub(super) fn broken(&mut self, e: &RingError) {
        self.io.mute = true;
        // A stop under way goes on: somebody waits for it.
        if !matches!(self.state, State::Stopping(_)) {
            self.state = State::Broken;
        }
        self.line.broken(e);
    }
}

impl Io {
    /// Cancels what is in flight, or of that only what uses revoked memory.
    fn cancel(&mut self, revoked: bool) {
        // What the channel has not taken is cancelled by itself.
        let mut own = Vec::new();
        let slots = &mut self.slots;
        self.ops.retain(|op| {
            let slot = slots.get(bluff_block::ChannelHandle::slot(op.tag));
            let keep = revoked && !slot.revoked;
            if !keep {
                own.push(op.tag);
            }
            keep
        });
        self.done
            .extend(own.into_iter().map(|tag| bluff_block::Completion {
                tag,
                result: Err(BlockError::Cancelled),
            }));
        for (index, slot) in self.slots.busy() {
            if !revoked || slot.revoked {
                for part in 0..slot.parts {
                    if self.channel.cancel(self.channel.tag(index, part)) == Cancel::Never {
                        log::debug!("an operation cannot be cancelled; its end is waited for");
                    }
                }
            }
        }
    }

    /// Answers what an earlier life left with an error; says whether the driver is to be told.
    #[cold]
    fn refuse_again<R: Ring>(&mut self, ring: &mut R) -> bool {
        let mut chain = Chain::default();
        for _ in 0..ring.again() {
            match ring.pop(&mut chain) {
                Ok(Pop::Empty) => break,
                Ok(Pop::Chain | Pop::Bad(_)) => {
                    let written = match super::batch::refuse(&mut chain) {
                        Refused::Status(s) => {
                            chain.set_status(s);
                            super::batch::written_without_data(&chain)
                        }
                        Refused::NoStatus => 0,
                    };
                    ring.complete(&chain, written);
                }
                // A record that lied; the queue ends in any case.
                Err(e) => {
                    log::debug!("{e}");
                    return false;
                }
            }
            self.tally.errors += 1;
        }
        ring.publish()
    }

    /// A request that was cancelled: it stays in flight, or the driver is told.
    #[cold]
    pub(super) fn set_aside<R: Ring>(&mut self, ring: &mut R, index: u32) {
        let slot = self.slots.get(index);
        (slot.cancelled, slot.revoked) = (false, false);
        if self.leave {
            // Recorded as in flight; it is done again by whoever starts the queue next.
            ring.cut_short(&slot.chain);
            self.left += 1;
            return;
        }
        slot.chain.set_status(status::IOERR);
        self.tally.errors += 1;
        ring.complete(&slot.chain, super::batch::written_without_data(&slot.chain));
        self.slots.give(index);
    }
}
