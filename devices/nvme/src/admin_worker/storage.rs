//! What the controller does to namespaces by itself: flushes at a shutdown, erases for a format. One operation of each at a time.
//!
//! Unsafe, because operations name buffers: zeroes that are static.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::time::Instant;

use bluff_block::{BlockError, Buffers, ChannelHandle, Completion, InUse, Kind, Op, lock_pause};
use bluff_memory::IoVec;
use bluff_reactor::Context;

use super::news::Formatted;
use super::{AdminWorker, Message};
use crate::admin::{Erase, FormatCommand};
use crate::attached::Table;
use crate::command::status_of;
use crate::namespace::Namespace;
use crate::registers::Run as RunNumber;
use crate::spec::{Command, Status};
use crate::subsystem::Formatting;
use crate::worker::zeroes;

/// The slot of the one operation.
const SLOT: u32 = 0;

/// A namespace, and the operation on it.
struct Own {
    namespace: Arc<Namespace>,
    channel: ChannelHandle,
    lock: Option<InUse>,
    buffers: Vec<IoVec>,
    /// Wanted, and not taken by the channel.
    wanted: Option<(Kind, u64, u64)>,
    busy: bool,
    done: Vec<Completion>,
}

impl Own {
    fn open(cx: &mut Context<'_>, namespace: &Arc<Namespace>) -> Result<Self, BlockError> {
        Ok(Self {
            channel: ChannelHandle::open(cx, namespace.volume())?,
            namespace: namespace.clone(),
            lock: None,
            buffers: Vec::new(),
            wanted: None,
            busy: false,
            done: Vec::new(),
        })
    }

    /// Begins an operation; none is under way.
    fn begin(&mut self, kind: Kind, offset: u64, len: u64) {
        debug_assert!(!self.busy && self.wanted.is_none());
        self.buffers.clear();
        if kind.has_data() {
            zeroes(len, &mut self.buffers);
        }
        self.wanted = Some((kind, offset, len));
    }

    /// Goes on; `Some` when the operation is over.
    fn poll(&mut self, cx: &mut Context<'_>) -> Option<Result<(), BlockError>> {
        if let Some((kind, offset, len)) = self.wanted {
            if self.lock.is_none() {
                match InUse::new(self.namespace.volume().clone()) {
                    Ok(lock) => self.lock = Some(lock),
                    Err(BlockError::Locked) => {
                        cx.timer(cx.id(), cx.now() + lock_pause(), 0);
                        return None;
                    }
                    Err(e) => {
                        self.wanted = None;
                        return Some(Err(e));
                    }
                }
            }
            // SAFETY: `buffers` stays as it is until the operation is completed, or its channel's handle is dropped; it names zeroes that
            // are static, and only read.
            let buffers = unsafe { Buffers::new(&self.buffers) };
            let tag = self.channel.tag(SLOT, 0);
            let op = Op {
                tag,
                kind,
                offset,
                len,
                buffers,
            };
            if let Err(e) = op.check(&self.namespace.volume().geometry()) {
                self.wanted = None;
                return Some(Err(e));
            }
            if self.channel.submit(&[op]) == 1 {
                self.channel.kick();
                (self.wanted, self.busy) = (None, true);
            }
        }
        if !self.busy {
            return None;
        }
        self.channel.poll(cx.now(), &mut self.done);
        let completion = self.done.pop()?;
        self.busy = false;
        Some(completion.result)
    }

    /// Nobody waits for it any more.
    fn give_up(&mut self) {
        self.wanted = None;
        if self.busy {
            self.channel.cancel(self.channel.tag(SLOT, 0));
        }
    }
}

impl Drop for Own {
    /// What is under way is cancelled: a write of zeroes must not come after what is written next.
    fn drop(&mut self) {
        self.give_up();
    }
}

/// A flush of all namespaces that may have lost something in a power cut.
pub(super) struct FlushAll {
    parts: Vec<Own>,
}

impl FlushAll {
    pub(super) fn begin(cx: &mut Context<'_>, table: &Table) -> Self {
        let mut parts = Vec::new();
        for attached in table.iter().filter(|n| n.geometry.volatile_cache) {
            match Own::open(cx, &attached.namespace) {
                Ok(mut own) => {
                    own.begin(Kind::Flush, 0, 0);
                    parts.push(own);
                }
                Err(e) => log::warn!("namespace {}: no flush at shutdown: {e}", attached.nsid()),
            }
        }
        Self { parts }
    }

    /// Goes on; says whether it is over, which it is at the deadline.
    pub(super) fn is_done(&mut self, cx: &mut Context<'_>, deadline: Instant) -> bool {
        self.parts.retain_mut(|own| match own.poll(cx) {
            None => true,
            Some(Ok(())) => false,
            Some(Err(e)) => {
                let nsid = own.namespace.nsid();
                log::warn!("namespace {nsid}: the flush at shutdown failed: {e}");
                false
            }
        });
        if cx.now() >= deadline {
            for own in self.parts.drain(..) {
                let nsid = own.namespace.nsid();
                log::warn!("namespace {nsid}: the flush at shutdown is not over in time");
            }
        }
        self.parts.is_empty()
    }
}

/// A Format NVM command under way, until all is erased. What then goes on is [`Formatting::finish`]'s.
pub(super) struct Format {
    number: u64,
    run: RunNumber,
    command: Command,
    erase: Erase,
    formatting: Formatting,
    /// Those that are not erased yet.
    rest: Vec<Arc<Namespace>>,
    /// The one that is being erased, and how far that is.
    now: Option<(Own, u64)>,
    /// Nothing of them is in flight any more.
    drained: bool,
}

impl AdminWorker {
    pub(super) fn begin_format(
        &mut self,
        command: &Command,
        format: &FormatCommand,
    ) -> Result<(), Status> {
        if self.format.is_some() {
            return Err(Status::FORMAT_IN_PROGRESS);
        }
        let subsystem = self.core.subsystem();
        let subsystem = subsystem.ok_or(Status::INTERNAL_ERROR)?;
        self.formats += 1;
        let number = self.formats;
        let core = Arc::downgrade(&self.core);
        let drained = move || {
            if let Some(core) = core.upgrade() {
                core.admin.send(Message::Drained(number));
            }
        };
        let (id, nsids) = (self.admin.id(), &format.nsids);
        let formatting = subsystem.begin_format(id, nsids, format.format, drained)?;
        let run = self.run.as_ref().expect("it has a command").number;
        self.format = Some(Format {
            number,
            run,
            command: *command,
            erase: format.erase,
            rest: formatting
                .namespaces()
                .iter()
                .map(|n| n.namespace.clone())
                .collect(),
            formatting,
            now: None,
            drained: false,
        });
        Ok(())
    }

    /// Nothing of the namespaces is in flight any more.
    pub(super) fn drained(&mut self, number: u64) {
        if let Some(format) = self.format.as_mut().filter(|f| f.number == number) {
            format.drained = true;
        }
    }

    /// Its queue has gone: the namespaces are what they were, with whatever they hold now. What is in flight is cancelled; until it
    /// [is over](Format::is_over) nobody may write there, as an old write of zeroes must not land on that.
    pub(super) fn cancel_format(&mut self) -> Option<Format> {
        let mut format = self.format.take()?;
        if let Some((own, _)) = &mut format.now {
            own.give_up();
        }
        Some(format)
    }

    /// Goes on with a format; says whether anything was done.
    pub(super) fn go_on_formatting(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(format) = self.format.as_mut().filter(|f| f.drained) else {
            return false;
        };
        let outcome = match format.step(cx) {
            Ok(false) => return false,
            Ok(true) => Ok(()),
            Err(e) => Err(e),
        };
        let Format {
            run,
            command,
            formatting,
            now,
            ..
        } = self.format.take().expect("just looked at");
        drop(now);
        match outcome {
            Ok(()) => {
                let nsids = formatting.namespaces().iter().map(|n| n.nsid()).collect();
                let core = Arc::downgrade(&self.core);
                // After the table that was told then.
                formatting.finish(move |kept| {
                    if let Some(core) = core.upgrade() {
                        core.admin.send(Message::Formatted(Formatted {
                            run,
                            command,
                            nsids,
                            kept,
                        }));
                    }
                });
            }
            Err(e) => {
                drop(formatting);
                self.refuse(&command, status_of(e, true));
            }
        }
        true
    }

    /// Asks channels to wake us; says whether there is nothing to do.
    pub(super) fn park(&mut self, cx: &mut Context<'_>) -> bool {
        let stopping = self.stopping.as_mut();
        let (flush, ending) = match stopping {
            Some(stopping) => (stopping.flush.as_mut(), stopping.format.as_mut()),
            None => (None, None),
        };
        let parts = flush.into_iter().flat_map(|f| &mut f.parts);
        let formats = self.format.as_mut().into_iter().chain(ending);
        let formats = formats.filter_map(|f| f.now.as_mut());
        let mut all = parts.chain(formats.map(|(own, _)| own));
        all.all(|own| {
            own.channel
                .park(cx, own.wanted.is_some() && own.lock.is_some())
        })
    }
}

impl Format {
    /// After its end: whether nothing of it is in flight.
    pub(super) fn is_over(&mut self, cx: &mut Context<'_>) -> bool {
        match &mut self.now {
            Some((own, _)) if own.busy => own.poll(cx).is_some(),
            _ => true,
        }
    }

    /// Erases on; `true` when all is erased.
    fn step(&mut self, cx: &mut Context<'_>) -> Result<bool, BlockError> {
        // A turn has a bound, and what is done at once must not make one long.
        for _ in 0..8 {
            let Some((own, at)) = &mut self.now else {
                let Some(next) = self.rest.pop() else {
                    return Ok(true);
                };
                let mut own = Own::open(cx, &next)?;
                let end = begin_erase(&mut own, 0, self.erase);
                self.now = Some((own, end));
                continue;
            };
            match own.poll(cx) {
                None => return Ok(false),
                Some(result) => result?,
            }
            let size = own.namespace.volume().geometry().size;
            if *at < size {
                *at = begin_erase(own, *at, self.erase);
            } else if *at == size && own.namespace.volume().geometry().volatile_cache {
                // What was erased stays erased.
                own.begin(Kind::Flush, 0, 0);
                *at += 1;
            } else {
                self.now = None;
            }
        }
        cx.wake(cx.id());
        Ok(false)
    }
}

/// Erases from `at` on; says how far.
fn begin_erase(own: &mut Own, at: u64, erase: Erase) -> u64 {
    let geometry = own.namespace.volume().geometry();
    let left = geometry.size - at;
    let (kind, len) = match geometry.write_zeroes {
        Some(limits) => {
            let unmap = erase == Erase::None && limits.unmap;
            let kind = Kind::WriteZeroes { unmap, fua: false };
            (kind, left.min(limits.max).min(ERASE))
        }
        None => {
            let most = u64::from(geometry.max_transfer);
            (Kind::Write { fua: false }, left.min(most).min(1 << 20))
        }
    };
    own.begin(kind, at, len);
    at + len
}

/// Most bytes that are erased at once, so that a reset need not wait for long.
const ERASE: u64 = 256 << 20;
