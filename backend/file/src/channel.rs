//! A file volume on one reactor.
//!
//! ```text
//!   submit --inline--------------------------------------------------> done
//!     \--> waiting --> kernel --> (next round, or flush) --> waiting
//!           | |  ^        |  \-------------------------------------> done
//!           | v  |        v cancel: done at once; the slot stays
//!           | blocked  abandoned --> free, when the kernel lets go
//!           \--> flushing: a sync of the volume, shared ------------> done
//! ```

mod flush;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bluff_block::{BlockError, Buffers, Cancel, Channel, Completion, Kind, Op, OpenContext, Tag};
use bluff_memory::IoVec;
use bluff_reactor::Waker;

use self::flush::Flushing;
use crate::abandoned::Ticket;
use crate::arena::{Arena, Bounce, LARGEST};
use crate::engine::{Engine, Threads, Work};
use crate::slot::{Begun, Orphans, SYNC, Slot, State, Step, is_fua, rest, zeroes};
use crate::storage::{Durability, Storage};

/// How many operations a channel takes.
const DEPTH: usize = 512;
/// How many of them the kernel has at once, given-up ones included.
const IN_KERNEL: usize = 256;
/// How many bytes are copied inline between two polls; one operation is always taken, however large. Small, because
/// nothing of what is done shows before the poll: with a whole ring in one batch the driver waits for the last
/// copy to see the first completion, and neighbours on the reactor wait with it. Eight blocks of 4 KiB are
/// enough to spread the cost of a publication.
const BUDGET: u64 = 32 << 10;
/// How soon to offer work again to an io_uring that its neighbours have filled.
const RETRY: Duration = Duration::from_millis(1);

pub(crate) struct FileChannel {
    storage: Arc<Storage>,
    /// `Some` until dropped.
    engine: Option<Engine>,
    /// `Some` until dropped.
    arena: Option<Arena>,
    waker: Waker,
    slots: Vec<Slot>,
    free: Vec<u32>,
    waiting: VecDeque<u32>,
    blocked: Vec<u32>,
    flushing: Flushing,
    /// The releases that `blocked` has been tried against.
    seen: usize,
    done: Vec<Completion>,
    /// Accepted and not completed.
    live: usize,
    in_kernel: usize,
    /// Bytes copied inline since the last poll.
    copied: u64,
    retry_at: Option<Instant>,
    results: Vec<(u32, i32)>,
    pieces: Vec<IoVec>,
}

fn error(errno: i32) -> BlockError {
    BlockError::from(io::Error::from_raw_os_error(errno))
}

impl FileChannel {
    pub(crate) fn new(
        storage: Arc<Storage>,
        threads: Arc<Threads>,
        context: &OpenContext,
    ) -> Result<Self, BlockError> {
        let arena = Arena::new().map_err(|_| BlockError::Unavailable)?;
        zeroes().map_err(|_| BlockError::Unavailable)?;
        let engine = Engine::new(storage.clone(), threads, context);
        Ok(Self {
            seen: storage.abandoned.releases(),
            storage,
            engine: Some(engine.ok_or(BlockError::Unavailable)?),
            arena: Some(arena),
            waker: context.waker.clone(),
            slots: Vec::with_capacity(DEPTH),
            free: Vec::with_capacity(DEPTH),
            waiting: VecDeque::with_capacity(DEPTH),
            blocked: Vec::new(),
            flushing: Flushing::default(),
            done: Vec::with_capacity(DEPTH),
            live: 0,
            in_kernel: 0,
            copied: 0,
            retry_at: None,
            results: Vec::with_capacity(DEPTH),
            pieces: Vec::new(),
        })
    }

    fn engine(&mut self) -> &mut Engine {
        self.engine.as_mut().expect("there until dropped")
    }

    fn arena(&mut self) -> &mut Arena {
        self.arena.as_mut().expect("there until dropped")
    }

    /// Completes an operation that has no slot.
    fn push(&mut self, tag: Tag, result: Result<(), BlockError>) {
        self.done.push(Completion { tag, result });
    }

    /// Completes an operation and frees its slot.
    fn finish(&mut self, id: u32, result: Result<(), BlockError>) {
        let tag = self.slots[id as usize].op.tag;
        self.push(tag, result);
        self.live -= 1;
        self.release(id);
    }

    fn release(&mut self, id: u32) {
        let slot = &mut self.slots[id as usize];
        slot.state = State::Free;
        slot.op.buffers = Buffers::NONE;
        if let Some(bounce) = slot.bounce.take() {
            self.arena().free(bounce);
        }
        self.free.push(id);
    }

    /// Queues an operation of which `moved` bytes are done.
    fn queue(&mut self, op: &Op, step: Step, moved: u64) {
        let slot = Slot {
            op: *op,
            state: State::Waiting,
            step,
            fresh: moved == 0,
            moved,
            bounce: None,
            chunk: 0,
        };
        let id = match self.free.pop() {
            Some(id) => {
                self.slots[id as usize] = slot;
                id
            }
            None => {
                self.slots.push(slot);
                (self.slots.len() - 1) as u32
            }
        };
        self.live += 1;
        self.waiting.push_back(id);
    }

    #[inline]
    fn accept(&mut self, op: &Op) {
        if op.len == 0 && op.kind != Kind::Flush {
            return self.push(op.tag, Ok(()));
        }
        match op.kind {
            Kind::Flush if self.storage.memory => self.push(op.tag, Ok(())),
            Kind::Flush => self.queue(op, Step::Sync, 0),
            Kind::Read | Kind::Write { .. } => {
                let write = op.kind != Kind::Read;
                debug_assert_eq!(op.buffers.total(), op.len, "checked by the submitter");
                if self.storage.tries_inline(write) && self.storage.abandoned.is_empty() {
                    self.inline(op, write);
                } else {
                    self.queue(op, Step::Move, 0);
                }
            }
            Kind::Discard => self.queue(op, Step::Punch, 0),
            Kind::WriteZeroes { unmap, .. } => {
                let unmap = unmap
                    && self
                        .storage
                        .geometry()
                        .write_zeroes
                        .is_some_and(|z| z.unmap);
                let step = if unmap { Step::Punch } else { self.zero_step() };
                self.queue(op, step, 0);
            }
        }
    }

    fn zero_step(&self) -> Step {
        if self.storage.zero_range.load(Ordering::Relaxed) {
            Step::Zero
        } else {
            Step::Fill
        }
    }

    /// Does what can be done without waiting, and queues the rest.
    #[inline]
    fn inline(&mut self, op: &Op, write: bool) {
        let mut moved = match self.storage.inline(write, op.buffers.as_slice(), op.offset) {
            Ok(n) if n == op.len => n,
            Ok(0) => return self.push(op.tag, Err(BlockError::Io)),
            Ok(n) => n,
            Err(e) => return self.not_inline(op, 0, e),
        };
        self.copied += moved;
        while moved < op.len {
            let mut pieces = std::mem::take(&mut self.pieces);
            rest(op.buffers.as_slice(), moved, &mut pieces);
            let got = self.storage.inline(write, &pieces, op.offset + moved);
            self.pieces = pieces;
            match got {
                Ok(0) => return self.push(op.tag, Err(BlockError::Io)),
                Ok(n) => {
                    moved += n;
                    self.copied += n;
                }
                Err(e) => return self.not_inline(op, moved, e),
            }
        }
        match op.kind {
            Kind::Write { fua: true } if !self.storage.memory => self.queue(op, Step::Sync, moved),
            _ => self.push(op.tag, Ok(())),
        }
    }

    #[cold]
    fn not_inline(&mut self, op: &Op, moved: u64, errno: i32) {
        if self.storage.memory && errno != libc::EINTR {
            return self.push(op.tag, Err(error(errno)));
        }
        // Whatever it is, the way through the kernel tells it better.
        let block = u64::from(self.storage.geometry().block_size);
        self.queue(op, Step::Move, moved / block * block);
    }

    /// Starts what waits, as far as there is room.
    fn pump(&mut self) {
        self.begin_waiting();
        // After them all: one sync for what came together.
        if self.flushing.is_due(&self.storage) {
            self.flush();
        }
    }

    fn begin_waiting(&mut self) {
        while let Some(&id) = self.waiting.front() {
            match self.begin(id) {
                Begun::NoRoom => return,
                Begun::Started => self.slots[id as usize].state = State::Kernel,
                Begun::Ended => {}
                Begun::Flushing => self.wait_for_sync(id),
                Begun::Held => {
                    self.slots[id as usize].state = State::Blocked;
                    self.blocked.push(id);
                }
            }
            self.waiting.pop_front();
        }
    }

    fn begin(&mut self, id: u32) -> Begun {
        let slot = &self.slots[id as usize];
        let (op, step, moved) = (slot.op, slot.step, slot.moved);
        if slot.fresh
            && op.kind != Kind::Flush
            && !self
                .storage
                .abandoned
                .is_free(op.offset, op.len, &self.waker)
        {
            return Begun::Held;
        }
        if step == Step::Sync {
            if let Err(e) = self.verdict() {
                self.finish(id, Err(e));
                return Begun::Ended;
            }
            return Begun::Flushing;
        }
        if self.in_kernel >= IN_KERNEL {
            return Begun::NoRoom;
        }
        let (offset, left) = (op.offset + moved, op.len - moved);
        let mut bounce = None;
        let mut chunk = left as usize;
        let durable = self.writes_durably(&op);
        let work = match step {
            Step::Move => {
                let Some((b, n)) = self.arena().take(left) else {
                    return Begun::NoRoom;
                };
                chunk = n;
                let ptr = self.arena().ptr(&b);
                let work = if op.kind == Kind::Read {
                    Work::Read {
                        ptr,
                        len: n,
                        offset,
                    }
                } else {
                    self.arena().fill(&b, &op.buffers, moved, n);
                    Work::Write {
                        ptr,
                        len: n,
                        offset,
                        durable,
                    }
                };
                bounce = Some(b);
                work
            }
            Step::Fill => {
                chunk = chunk.min(LARGEST);
                Work::Write {
                    ptr: zeroes().expect("made when the channel was opened"),
                    len: chunk,
                    offset,
                    durable,
                }
            }
            Step::Sync => unreachable!("it waits for a sync of the volume"),
            Step::Punch if op.kind == Kind::Discard && self.storage.device => {
                Work::DiscardDevice { offset, len: left }
            }
            Step::Punch | Step::Zero => Work::Allocate {
                mode: libc::FALLOC_FL_KEEP_SIZE
                    | if step == Step::Punch {
                        libc::FALLOC_FL_PUNCH_HOLE
                    } else {
                        libc::FALLOC_FL_ZERO_RANGE
                    },
                offset,
                len: left,
            },
        };
        if self.engine().start(id, work).is_err() {
            if let Some(bounce) = bounce {
                self.arena().free(bounce);
            }
            return Begun::NoRoom;
        }
        self.in_kernel += 1;
        let slot = &mut self.slots[id as usize];
        slot.fresh = false;
        slot.bounce = bounce;
        slot.chunk = chunk;
        Begun::Started
    }

    /// Whether the write itself is to be durable. Without O_DIRECT it is a write and a flush, so that
    /// a lack of space can be told from a failed flush.
    fn writes_durably(&self, op: &Op) -> bool {
        self.storage.direct && is_fua(op)
    }

    fn durability(&self, slot: &Slot) -> Durability {
        match slot.step {
            Step::Move | Step::Fill if self.writes_durably(&slot.op) => Durability::Write,
            _ => Durability::None,
        }
    }

    /// The kernel is done with what it was given.
    fn ended(&mut self, id: u32, result: i32) {
        if id == SYNC {
            return self.synced(result);
        }
        self.in_kernel -= 1;
        let slot = &mut self.slots[id as usize];
        if let State::Abandoned(ticket) = &mut slot.state {
            let ticket = ticket.take();
            let durability = self.durability(&self.slots[id as usize]);
            self.storage.note(durability, result);
            if let Some(ticket) = ticket {
                self.storage.release(ticket);
            }
            return self.release(id);
        }
        let durability = self.durability(&self.slots[id as usize]);
        self.storage.note(durability, result);
        let slot = &mut self.slots[id as usize];
        let bounce = slot.bounce.take();
        let mut outcome = None;
        if matches!(-result, libc::EINTR | libc::EAGAIN) {
            // Once more, as it was.
        } else if result < 0 {
            outcome = self.failed(id, -result);
        } else {
            outcome = self.advanced(id, result as usize, bounce.as_ref());
        }
        if let Some(bounce) = bounce {
            self.arena().free(bounce);
        }
        match outcome {
            Some(result) => self.finish(id, result),
            None => {
                self.slots[id as usize].state = State::Waiting;
                self.waiting.push_front(id);
            }
        }
    }

    /// An error: another way, or the end.
    fn failed(&mut self, id: u32, errno: i32) -> Option<Result<(), BlockError>> {
        let slot = &mut self.slots[id as usize];
        let unsupported = matches!(
            errno,
            libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::ENODEV
        );
        let zeroes = matches!(slot.op.kind, Kind::WriteZeroes { .. });
        match slot.step {
            Step::Punch if zeroes && unsupported => {
                let step = self.zero_step();
                self.slots[id as usize].step = step;
                None
            }
            Step::Zero if unsupported => {
                self.storage.zero_range.store(false, Ordering::Relaxed);
                slot.step = Step::Fill;
                None
            }
            Step::Punch if unsupported => Some(Err(BlockError::Unsupported)),
            _ => Some(Err(error(errno))),
        }
    }

    /// `n` bytes were moved, or a step without data was done.
    fn advanced(
        &mut self,
        id: u32,
        n: usize,
        bounce: Option<&Bounce>,
    ) -> Option<Result<(), BlockError>> {
        let slot = &mut self.slots[id as usize];
        let (op, step, moved, chunk) = (slot.op, slot.step, slot.moved, slot.chunk);
        match step {
            Step::Sync => unreachable!("the kernel has syncs, not slots that flush"),
            Step::Punch | Step::Zero => slot.moved = op.len,
            Step::Move | Step::Fill => {
                let n = n.min(chunk);
                // What is cut short goes on at a whole block, as O_DIRECT must; nothing at all is the
                // end of a file that somebody has made smaller.
                let block = self.storage.geometry().block_size as usize;
                let n = if n == chunk { n } else { n / block * block };
                if n == 0 {
                    return Some(Err(BlockError::Io));
                }
                if op.kind == Kind::Read {
                    let bounce = bounce.expect("a read has a buffer");
                    self.arena().drain(bounce, &op.buffers, moved, n);
                }
                self.slots[id as usize].moved = moved + n as u64;
            }
        }
        let slot = &mut self.slots[id as usize];
        if slot.moved < op.len {
            return None;
        }
        let durable = matches!(step, Step::Move | Step::Fill) && self.storage.direct;
        if is_fua(&op) && !durable && !self.storage.memory {
            slot.step = Step::Sync;
            return None;
        }
        Some(Ok(()))
    }

    /// Gives up an operation that has not ended.
    fn give_up(&mut self, id: u32) {
        let state = std::mem::replace(&mut self.slots[id as usize].state, State::Kernel);
        match state {
            State::Waiting => self.waiting.retain(|&i| i != id),
            State::Blocked => self.blocked.retain(|&i| i != id),
            State::Flushing => self.flushing.forget(id),
            State::Kernel if self.withdraw(id) => self.in_kernel -= 1,
            State::Kernel => {
                let ticket = self.ticket(id);
                let slot = &mut self.slots[id as usize];
                slot.state = State::Abandoned(ticket);
                slot.op.buffers = Buffers::NONE;
                let tag = slot.op.tag;
                self.live -= 1;
                return self.push(tag, Err(BlockError::Cancelled));
            }
            State::Free | State::Abandoned(_) => unreachable!("only what is live is given up"),
        }
        self.finish(id, Err(BlockError::Cancelled));
    }

    /// Takes it back from the threads, where none has begun it.
    fn withdraw(&mut self, id: u32) -> bool {
        self.engine().withdraw(id)
    }

    fn ticket(&self, id: u32) -> Option<Ticket> {
        let op = &self.slots[id as usize].op;
        op.kind
            .is_write()
            .then(|| self.storage.abandoned.add(op.offset, op.len))
    }
}

impl Channel for FileChannel {
    fn submit(&mut self, ops: &[Op]) -> usize {
        let geometry = self.storage.geometry();
        let mut n = 0;
        for op in ops {
            if self.live + self.done.len() >= DEPTH || self.copied >= BUDGET {
                break;
            }
            match op.check(&geometry) {
                Ok(()) => self.accept(op),
                Err(e) => self.push(op.tag, Err(e)),
            }
            n += 1;
        }
        if !self.waiting.is_empty() {
            self.pump();
        }
        n
    }

    fn kick(&mut self) {
        self.engine().kick();
    }

    fn poll(&mut self, now: Instant, done: &mut Vec<Completion>) {
        self.copied = 0;
        let mut results = std::mem::take(&mut self.results);
        self.engine().take(&mut results);
        for (id, result) in results.drain(..) {
            self.ended(id, result);
        }
        self.results = results;
        if !self.blocked.is_empty() {
            let releases = self.storage.abandoned.releases();
            if releases != self.seen {
                self.seen = releases;
                for id in self.blocked.drain(..) {
                    self.slots[id as usize].state = State::Waiting;
                    self.waiting.push_back(id);
                }
            }
        }
        self.retry_at = None;
        if !self.waiting.is_empty() || self.flushing.is_due(&self.storage) {
            self.pump();
            self.engine().kick();
            // The ring is full of others: no completion of ours will come and wake us.
            let starved = !self.waiting.is_empty() || self.flushing.is_refused();
            let starved = starved && self.in_kernel == 0 && !self.flushing.in_kernel;
            self.retry_at = starved.then(|| now + RETRY);
        }
        done.append(&mut self.done);
    }

    fn cancel(&mut self, tag: Tag) -> Cancel {
        let live = |s: &Slot| !matches!(s.state, State::Free | State::Abandoned(_));
        let id = self.slots.iter().position(|s| live(s) && s.op.tag == tag);
        if let Some(id) = id {
            self.give_up(id as u32);
            Cancel::Soon
        } else if self.done.iter().any(|c| c.tag == tag) {
            Cancel::Soon
        } else {
            Cancel::Unknown
        }
    }

    fn deadline(&self) -> Option<Instant> {
        self.retry_at
    }
}

impl Drop for FileChannel {
    fn drop(&mut self) {
        let mut left = Vec::new();
        for id in 0..self.slots.len() as u32 {
            let state = std::mem::replace(&mut self.slots[id as usize].state, State::Free);
            let ticket = match state {
                State::Abandoned(ticket) => ticket,
                State::Kernel if !self.withdraw(id) => self.ticket(id),
                _ => continue,
            };
            left.push((id, ticket, self.durability(&self.slots[id as usize])));
        }
        if self.flushing.in_kernel {
            // Others may wait for it.
            left.push((SYNC, None, Durability::Sync));
        }
        let orphans = Orphans {
            storage: self.storage.clone(),
            arena: self.arena.take(),
            left,
        };
        if let Some(engine) = self.engine.take() {
            engine.leave(orphans);
        }
    }
}
