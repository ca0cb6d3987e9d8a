//! Commands of several steps. A step is one operation or a few; when all of them are completed the next one begins, unless one has failed or the
//! command is to end. So what has not begun when a queue stops never begins.
//!
//! Unsafe, because operations name buffers, and host memory is compared with.
#![allow(unsafe_code)]

use bluff_block::{Buffers, Kind, Op};
use bluff_memory::IoVec;

use super::batch::Io;
use super::bounce::{self, BOUNCE, Bounce};
use super::slots::Slot;
use crate::command::{CopyPlan, MAX_TRANSFER, Span};
use crate::namespace::Namespace;
use crate::spec::Status;

/// Operations of one step that need no buffers.
const WINDOW: usize = 16;

/// What of a command is still to be done.
pub(super) enum Steps {
    /// A part is read; then it is compared with the host's bytes from `at` on.
    Compare { rest: Span, at: u64, reading: u64 },
    /// Part by part is read.
    Verify { rest: Span },
    /// A part is read, then written.
    Copy {
        plan: CopyPlan,
        next: usize,
        /// What was read, and is to be written next.
        read: u64,
        fua: bool,
    },
    /// Zeroes, by operations of the volume's own.
    Zeroes { rest: Span, kind: Kind, most: u64 },
    /// Zeroes, by writing them.
    WrittenZeroes { rest: Span, fua: bool },
    /// Ranges are given back.
    Deallocate {
        spans: Vec<Span>,
        next: usize,
        most: u64,
    },
}

impl Steps {
    /// Whether a bounce buffer is needed.
    pub(super) fn bounces(&self) -> bool {
        matches!(
            self,
            Self::Compare { .. } | Self::Verify { .. } | Self::Copy { .. }
        )
    }
}

/// The operations of a step: of which kind, where, and whether they have the slot's own buffers.
struct Step {
    ops: [(Kind, Span); WINDOW],
    count: usize,
}

impl Step {
    fn none() -> Self {
        Self {
            ops: [(Kind::Flush, Span::default()); WINDOW],
            count: 0,
        }
    }

    fn one(kind: Kind, span: Span) -> Self {
        let mut step = Self::none();
        step.push(kind, span);
        step
    }

    fn push(&mut self, kind: Kind, span: Span) {
        self.ops[self.count] = (kind, span);
        self.count += 1;
    }

    fn is_full(&self) -> bool {
        self.count == WINDOW
    }
}

impl Io {
    /// Begins the next step of a command; `false`: there is none, and the command has ended with what its status says.
    pub(super) fn step(&mut self, index: u32) -> bool {
        let key = self.slots.key(index);
        let slot = self.slots.get(index);
        let Some(space) = self.spaces[slot.space as usize].as_mut() else {
            unreachable!("a space stays for its commands")
        };
        let step = next(slot, &space.namespace);
        for (part, &(kind, Span { offset, len })) in step.ops[..step.count].iter().enumerate() {
            let buffers = match kind.has_data() {
                // SAFETY: `own` stays as it is until the next step, which begins when this one is completed. It names
                // a bounce buffer that the slot has, which is not touched until then either; or zeroes, which are static.
                true => unsafe { Buffers::new(&slot.own) },
                false => Buffers::NONE,
            };
            space.ops.push(Op {
                tag: space.channel.tag(key, part as u16),
                kind,
                offset,
                len,
                buffers,
            });
        }
        (slot.pending, slot.parts) = (step.count as u16, step.count as u16);
        step.count > 0
    }
}

/// What is done next.
fn next(slot: &mut Slot, namespace: &Namespace) -> Step {
    let Slot {
        steps,
        own,
        data,
        bounce,
        status,
        ..
    } = slot;
    let shape = namespace.shape();
    let chunk = (BOUNCE as u64).min(u64::from(shape.max_transfer));
    let buffer = |own: &mut Vec<IoVec>, bounce: &mut Option<Bounce>, len| {
        own.clear();
        own.push(bounce.as_mut().expect("it was waited for").buffer(len));
    };
    match steps.as_deref_mut() {
        None => Step::none(),
        Some(Steps::Compare { rest, at, reading }) => {
            if *reading > 0 {
                let ours = bounce.as_ref().expect("it was read into").bytes(*reading);
                // The data is mapped: a slot whose memory has gone is not stepped on.
                if !equal(data, *at, ours) {
                    *status = Status::COMPARE_FAILURE;
                    return Step::none();
                }
                *at += *reading;
            }
            let span = rest.take(chunk);
            *reading = span.len;
            if span.len == 0 {
                return Step::none();
            }
            buffer(own, bounce, span.len);
            Step::one(Kind::Read, span)
        }
        Some(Steps::Verify { rest }) => {
            let span = rest.take(chunk);
            if span.len == 0 {
                return Step::none();
            }
            buffer(own, bounce, span.len);
            Step::one(Kind::Read, span)
        }
        Some(Steps::Copy {
            plan,
            next,
            read,
            fua,
        }) => {
            if *read > 0 {
                let span = plan.to.take(*read);
                *read = 0;
                return Step::one(Kind::Write { fua: *fua }, span);
            }
            while plan.from.get(*next).is_some_and(|s| s.len == 0) {
                *next += 1;
            }
            let Some(from) = plan.from.get_mut(*next) else {
                return Step::none();
            };
            let span = from.take(chunk);
            *read = span.len;
            buffer(own, bounce, span.len);
            Step::one(Kind::Read, span)
        }
        Some(Steps::Zeroes { rest, kind, most }) => {
            let mut step = Step::none();
            while rest.len > 0 && !step.is_full() {
                step.push(*kind, rest.take(*most));
            }
            step
        }
        Some(Steps::WrittenZeroes { rest, fua }) => {
            let most = u64::from(shape.max_transfer.min(MAX_TRANSFER));
            let span = rest.take(most);
            if span.len == 0 {
                return Step::none();
            }
            own.clear();
            bounce::zeroes(span.len, own);
            Step::one(Kind::Write { fua: *fua }, span)
        }
        Some(Steps::Deallocate { spans, next, most }) => {
            let mut step = Step::none();
            while let Some(span) = spans.get_mut(*next)
                && !step.is_full()
            {
                match span.len {
                    0 => *next += 1,
                    _ => step.push(Kind::Discard, span.take(*most)),
                }
            }
            step
        }
    }
}

/// Whether the host's bytes from `at` on are `ours`.
fn equal<'a>(data: &[IoVec], at: u64, ours: impl Iterator<Item = &'a [u8]>) -> bool {
    let mut copy = [0; 4096];
    let (mut piece, mut skip) = (0, at as usize);
    for ours in ours {
        let mut done = 0;
        while done < ours.len() {
            // There are as many bytes as the command has.
            let v = &data[piece];
            if skip >= v.len() {
                skip -= v.len();
                piece += 1;
                continue;
            }
            let n = (v.len() - skip).min(ours.len() - done);
            // SAFETY: mapped, as the slot is not revoked, and in that piece; the host may change it, so it is copied, once.
            unsafe { std::ptr::copy_nonoverlapping(v.ptr().add(skip), copy.as_mut_ptr(), n) };
            if copy[..n] != ours[done..done + n] {
                return false;
            }
            (done, skip) = (done + n, skip + n);
        }
    }
    true
}
