//! From a command to its operations: it is begun, answered, or waits for a buffer.
//!
//! Unsafe, because operations name the host's buffers.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bluff_block::{Buffers, Kind, Op};
use bluff_memory::{Access, IoVec};
use bluff_reactor::Context;

use super::batch::Io;
use super::slots::{ALL, Origin};
use super::space::Space;
use super::steps::Steps;
use crate::command::{self, Request, Span, status_of};
use crate::namespace::Namespace;
use crate::spec::{ALL_NAMESPACES, Command, Status, io, nvm};

impl Io {
    /// Begins a command, or answers it; says how many bytes it moves.
    #[inline(always)]
    pub(super) fn begin(&mut self, cx: &mut Context<'_>, sq: u16, command: &Command) -> u64 {
        let index = self.slots.take(Origin::of(sq, command));
        if let Some(journal) = &self.journal {
            let queue = &self.sqs[usize::from(sq)]
                .as_ref()
                .expect("it is served")
                .queue;
            let number = self.slots.get(index).number;
            journal.take(
                index,
                number,
                queue.qid(),
                queue.taken().wrapping_sub(1),
                command,
            );
        }
        self.begin_in(cx, index, command)
    }

    /// As [`Io::begin`], in this slot.
    #[inline(always)]
    pub(super) fn begin_in(&mut self, cx: &mut Context<'_>, index: u32, command: &Command) -> u64 {
        match self.prepare(cx, index, command) {
            Ok(()) => {
                let slot = self.slots.get(index);
                let len = slot.len;
                if slot.pending == 0 && slot.steps.is_none() {
                    self.end(index);
                }
                len
            }
            Err(status) => {
                let slot = self.slots.get(index);
                slot.status = status;
                slot.lba = match command.opcode {
                    io::FLUSH | io::DATASET_MANAGEMENT => 0,
                    _ => command.slba(),
                };
                self.end(index);
                0
            }
        }
    }

    /// Turns a command into operations; none: it is done.
    #[inline(always)]
    fn prepare(
        &mut self,
        cx: &mut Context<'_>,
        index: u32,
        command: &Command,
    ) -> Result<(), Status> {
        command::precheck(command)?;
        let nsid = command.nsid.get();
        let at = match self.last {
            Some((last, at)) if last == nsid => at,
            _ if nsid == ALL_NAMESPACES => return self.flush_all(cx, index, command),
            _ => self.space(cx, nsid)?,
        };
        let space = self.spaces[at as usize].as_mut().expect("just found");
        if space.namespace.is_blocked() {
            return Err(Status::FORMAT_IN_PROGRESS);
        }
        if let Some(status) = space.refusal {
            return Err(status);
        }
        let through = self.shared.write_through.load(Ordering::Relaxed);
        let request = command::parse(command, &space.namespace, through)?;
        let volatile = space.namespace.shape().volatile_cache;
        let slot = self.slots.get(index);
        slot.space = at;
        let (kind, span) = match request {
            Request::Read(span) => (Kind::Read, span),
            Request::Write { span, fua } => {
                let fua = fua && volatile;
                (Kind::Write { fua }, span)
            }
            _ => return self.prepare_rare(index, command, request),
        };
        slot.lba = command.slba();
        let memory = self.memory.as_deref().expect("else nothing is taken");
        // MDTS: it fits in 32 bits.
        let access = match kind {
            Kind::Read => Access::Write,
            _ => Access::Read,
        };
        self.resolver
            .resolve(memory, access, command, span.len as u32, &mut slot.data)?;
        slot.len = span.len;
        if span.len > u64::from(space.namespace.shape().max_transfer) {
            self.split(index, kind, span);
            return Ok(());
        }
        (slot.pending, slot.parts) = (1, 1);
        // SAFETY: `data` stays as it is until the slot is given back, which is after the completion; its vector does not move
        // with the slot. The memory is kept by `self.memory`, or by the change of memory that waits for this slot.
        let buffers = unsafe { Buffers::new(&slot.data) };
        space.ops.push(Op {
            tag: space.channel.tag(self.slots.key(index), 0),
            kind,
            offset: span.offset,
            len: span.len,
            buffers,
        });
        Ok(())
    }

    /// A read or write that the volume wants in parts.
    #[cold]
    fn split(&mut self, index: u32, kind: Kind, mut span: Span) {
        let key = self.slots.key(index);
        let slot = self.slots.get(index);
        let space = self.spaces[slot.space as usize].as_mut().expect("found");
        let most = u64::from(space.namespace.shape().max_transfer);
        let mut cuts = Vec::new();
        let mut pieces = slot.data.iter();
        let mut piece = IoVec::default();
        let mut parts = Vec::new();
        while span.len > 0 {
            let part = span.take(most);
            let (from, mut left) = (slot.own.len(), part.len as usize);
            while left > 0 {
                if piece.is_empty() {
                    piece = *pieces.next().expect("as long as the command is");
                }
                let mut front = piece;
                front.truncate(left);
                piece.advance(front.len());
                left -= front.len();
                slot.own.push(front);
            }
            cuts.push(from..slot.own.len());
            parts.push(part);
        }
        (slot.pending, slot.parts) = (parts.len() as u16, parts.len() as u16);
        for (i, (part, cut)) in parts.into_iter().zip(cuts).enumerate() {
            // SAFETY: as in `prepare`, for `own`, which is complete now.
            let buffers = unsafe { Buffers::new(&slot.own[cut]) };
            space.ops.push(Op {
                tag: space.channel.tag(key, i as u16),
                kind,
                offset: part.offset,
                len: part.len,
                buffers,
            });
        }
    }

    /// Commands other than Read and Write.
    #[cold]
    #[inline(never)]
    fn prepare_rare(
        &mut self,
        index: u32,
        command: &Command,
        request: Request,
    ) -> Result<(), Status> {
        let slot = self.slots.get(index);
        let at = slot.space;
        let space = self.spaces[at as usize].as_mut().expect("found");
        let namespace = space.namespace.clone();
        let shape = namespace.shape();
        let steps = match request {
            Request::Read(_) | Request::Write { .. } => unreachable!("not rare"),
            Request::Hints => return Ok(()),
            Request::Flush => {
                if shape.volatile_cache {
                    (slot.pending, slot.parts) = (1, 1);
                    let tag = space.channel.tag(self.slots.key(index), 0);
                    space.ops.push(Op::without_data(tag, Kind::Flush, 0, 0));
                }
                return Ok(());
            }
            Request::Compare(span) => {
                slot.lba = command.slba();
                slot.len = span.len;
                let memory = self.memory.as_deref().expect("else nothing is taken");
                let len = span.len as u32;
                self.resolver
                    .resolve(memory, Access::Read, command, len, &mut slot.data)?;
                Steps::Compare {
                    rest: span,
                    at: 0,
                    reading: 0,
                }
            }
            Request::Verify(span) => {
                (slot.lba, slot.len) = (command.slba(), span.len);
                Steps::Verify { rest: span }
            }
            Request::Zeroes {
                span,
                fua,
                deallocate,
            } => {
                slot.lba = command.slba();
                let fua = fua && shape.volatile_cache;
                match shape.write_zeroes {
                    Some(limits) => Steps::Zeroes {
                        rest: span,
                        kind: Kind::WriteZeroes {
                            unmap: deallocate && limits.unmap,
                            fua,
                        },
                        most: limits.max,
                    },
                    None => Steps::WrittenZeroes { rest: span, fua },
                }
            }
            Request::Deallocate(count) => {
                self.fetch_data(index, command, count * size_of::<nvm::Range>())?;
                let mut spans = Vec::new();
                command::deallocate(&self.scratch, &namespace, &mut spans)?;
                match shape.discard {
                    Some(limits) => Steps::Deallocate {
                        spans,
                        next: 0,
                        most: limits.max,
                    },
                    // The command allows to give nothing back ("may deallocate", NVM 1.1 §3.2.3).
                    None => return Ok(()),
                }
            }
            Request::Copy { count, to, fua } => {
                slot.lba = command.slba();
                self.fetch_data(index, command, count * size_of::<nvm::SourceRange>())?;
                let plan = command::copy(&self.scratch, to, &namespace)?;
                let slot = self.slots.get(index);
                slot.len = plan.to.len;
                Steps::Copy {
                    plan,
                    next: 0,
                    read: 0,
                    fua: fua && shape.volatile_cache,
                }
            }
        };
        let bounces = steps.bounces();
        self.slots.get(index).steps = Some(Box::new(steps));
        if bounces {
            self.waiting.push_back(index);
            self.serve_waiting();
        } else if !self.step(index) {
            self.slots.get(index).steps = None;
        }
        Ok(())
    }

    /// Copies `len` bytes of a command's data, which are not used as buffers.
    fn fetch_data(&mut self, index: u32, command: &Command, len: usize) -> Result<(), Status> {
        let slot = self.slots.get(index);
        let memory = self.memory.as_deref().expect("else nothing is taken");
        // A few KiB.
        self.resolver
            .resolve(memory, Access::Read, command, len as u32, &mut slot.data)?;
        self.scratch.clear();
        self.scratch.resize(len, 0);
        // SAFETY: resolved in the epoch that `self.memory` keeps; the name does not leave this function.
        let copied = unsafe { Buffers::new(&slot.data) }.copy_to(&mut self.scratch);
        slot.data.clear();
        debug_assert_eq!(copied, len);
        Ok(())
    }

    /// A flush of every namespace that is attached (Base 2.1 §7.2; Identify Controller, VWC).
    #[cold]
    fn flush_all(
        &mut self,
        cx: &mut Context<'_>,
        index: u32,
        command: &Command,
    ) -> Result<(), Status> {
        if command.opcode != io::FLUSH {
            return Err(Status::INVALID_NAMESPACE);
        }
        let table = self.namespaces.clone();
        let volatile = |n: &&Arc<Namespace>| n.shape().volatile_cache;
        let mut spaces = Vec::new();
        for namespace in table.attached().iter().filter(volatile) {
            if namespace.is_blocked() {
                return Err(Status::FORMAT_IN_PROGRESS);
            }
            if let Some(status) = table.refusal(namespace.nsid()) {
                return Err(status);
            }
            spaces.push(self.space(cx, namespace.nsid())?);
        }
        let key = self.slots.key(index);
        for &at in &spaces {
            let space = self.spaces[at as usize].as_mut().expect("just found");
            let tag = space.channel.tag(key, 0);
            space.ops.push(Op::without_data(tag, Kind::Flush, 0, 0));
        }
        let slot = self.slots.get(index);
        slot.space = ALL;
        (slot.pending, slot.parts) = (spaces.len() as u16, 1);
        Ok(())
    }

    /// The space of a namespace, which is opened where it has none.
    #[cold]
    #[inline(never)]
    fn space(&mut self, cx: &mut Context<'_>, nsid: u32) -> Result<u32, Status> {
        let Some(namespace) = self.namespaces.get(nsid) else {
            // An NSID that no namespace can have is invalid; one that none has now is inactive (Base 2.1 §3.2.1.2, §3.2.1.4).
            return Err(match nsid {
                0 => Status::INVALID_NAMESPACE,
                n if n > self.namespaces.highest() => Status::INVALID_NAMESPACE,
                _ => Status::INVALID_FIELD,
            });
        };
        let is_it = |s: &Option<Space>| {
            s.as_ref()
                .is_some_and(|s| !s.ends && Arc::ptr_eq(&s.namespace, namespace))
        };
        let at = match self.spaces.iter().position(is_it) {
            Some(at) => at,
            None => {
                let mut space = Space::open(cx, namespace).map_err(|e| status_of(e, false))?;
                space.refusal = self.namespaces.refusal(nsid);
                match self.spaces.iter().position(Option::is_none) {
                    Some(at) => {
                        self.spaces[at] = Some(space);
                        at
                    }
                    None => {
                        self.spaces.push(Some(space));
                        self.spaces.len() - 1
                    }
                }
            }
        };
        self.last = Some((nsid, at as u32));
        Ok(at as u32)
    }

    /// Gives bounce buffers to commands that wait for one, and begins these.
    pub(super) fn serve_waiting(&mut self) {
        while let Some(&index) = self.waiting.front() {
            let Some(bounce) = self.bounces.take() else {
                return;
            };
            self.waiting.pop_front();
            self.slots.get(index).bounce = Some(bounce);
            let began = self.step(index);
            assert!(began, "what needs a buffer begins with a read");
        }
    }
}
