//! A batch of one queue: completions first, then new chains, as far as the budget goes.
//!
//! Unsafe, because operations name the buffers of chains.
#![allow(unsafe_code)]

use std::sync::atomic::Ordering;
use std::time::Instant;

use bluff_block::{BlockError, Buffers, ChannelHandle, Completion, Geometry, Kind, Op};
use bluff_virtio::{Chain, Pop, Ring, RingError};

use super::Shared;
use crate::counters::{QueueCounters, add};
use crate::request::{self, Mode, RangeOp, Refused, Request};
use crate::slots::{Class, Slots};
use crate::spec::{ID_LEN, status};

/// Chains taken from a ring in one turn.
const CHAINS: usize = 32;
/// Bytes after which a turn takes no more chains.
const BYTES: u64 = 1 << 20;
/// What a descriptor counts: a chain of as many as a ring has is a turn of its own.
const DESCRIPTOR: u64 = 256;

/// Everything that a batch needs beside the ring.
pub(super) struct Io {
    pub(super) channel: ChannelHandle,
    pub(super) slots: Slots,
    /// Operations that the channel has not taken yet.
    pub(super) ops: Vec<Op>,
    pub(super) done: Vec<Completion>,
    ranges: Vec<RangeOp>,
    pub(super) geometry: Geometry,
    mode: Mode,
    pub(super) tally: Tally,
    /// What was cancelled stays recorded as in flight.
    pub(super) leave: bool,
    /// How many requests were left so.
    pub(super) left: usize,
    /// The ring must not be touched any more: it is broken, or the driver has gone.
    pub(super) mute: bool,
}

/// Which chains a turn may take.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Take {
    /// All that there are.
    All,
    /// Those that an earlier life left.
    Again,
    /// None.
    Nothing,
}

/// What a turn adds to the counters.
#[derive(Default)]
pub(super) struct Tally {
    reads: u64,
    writes: u64,
    flushes: u64,
    discards: u64,
    bytes_read: u64,
    bytes_written: u64,
    pub(super) errors: u64,
}

impl Io {
    /// Nothing in flight.
    pub(super) fn new(channel: ChannelHandle, geometry: Geometry, mode: Mode) -> Self {
        Self {
            channel,
            slots: Slots::default(),
            ops: Vec::with_capacity(CHAINS),
            done: Vec::with_capacity(CHAINS),
            ranges: Vec::new(),
            geometry,
            mode,
            tally: Tally::default(),
            leave: false,
            left: 0,
            mute: false,
        }
    }

    #[inline(always)]
    pub(super) fn batch<R: Ring>(
        &mut self,
        ring: &mut R,
        take: Take,
        shared: &Shared,
        now: Instant,
    ) -> Result<(bool, bool), RingError> {
        let mut worked = self.collect(ring, now);
        // What is waiting for the channel goes first; while it waits, the ring is not read.
        if take != Take::Nothing && self.ops.is_empty() {
            worked |= self.take(ring, take, shared)?;
        }
        if !self.ops.is_empty() && self.submit() {
            worked = true;
            // What was completed at once is seen at once.
            self.collect(ring, now);
        }
        let notify = worked && !self.mute && ring.publish();
        Ok((worked, notify))
    }

    /// Takes chains off the ring and turns them into operations, or answers them.
    #[inline(always)]
    fn take<R: Ring>(
        &mut self,
        ring: &mut R,
        take: Take,
        shared: &Shared,
    ) -> Result<bool, RingError> {
        let (mut chains, mut bytes) = (0, 0);
        while chains < CHAINS && bytes < BYTES && (take == Take::All || ring.again() > 0) {
            let Some(index) = self.slots.take() else {
                break;
            };
            let chain = &mut self.slots.get(index).chain;
            match ring.pop(chain) {
                Ok(Pop::Chain) => {
                    bytes += u64::from(chain.walked()) * DESCRIPTOR;
                    bytes += self.begin(ring, index, shared);
                }
                Ok(Pop::Bad(e)) => {
                    log::debug!("bad chain: {e}");
                    bytes += u64::from(chain.walked()) * DESCRIPTOR;
                    let refused = refuse(chain);
                    self.answer(ring, index, Err(refused));
                }
                Ok(Pop::Empty) => {
                    self.slots.give(index);
                    break;
                }
                Err(e) => {
                    self.slots.give(index);
                    return Err(e);
                }
            }
            chains += 1;
        }
        Ok(chains > 0)
    }

    /// Begins the request in a slot; says how many bytes it moves.
    #[inline(always)]
    fn begin<R: Ring>(&mut self, ring: &mut R, index: u32, shared: &Shared) -> u64 {
        // After the chain was taken: a mode that was set before it was made available holds for it.
        self.mode.writeback = shared.writeback.load(Ordering::Relaxed);
        let tag = self.channel.tag(index, 0);
        let slot = self.slots.get(index);
        let answer = match request::parse(&mut slot.chain, &self.mode) {
            Ok(Request::Data { kind, offset, len }) => {
                let data = match kind {
                    Kind::Read => slot.chain.writable(),
                    _ => slot.chain.readable(),
                };
                // SAFETY: the chain stays as it is until the slot is given back, which is after the
                // completion; its vector does not move with the slot. The memory is kept by the ring,
                // or by the revocation that waits for this slot.
                let buffers = unsafe { Buffers::new(data) };
                let op = Op {
                    tag,
                    kind,
                    offset,
                    len,
                    buffers,
                };
                match op.check(&self.geometry) {
                    Ok(()) => {
                        if kind == Kind::Read {
                            slot.chain.fill();
                        }
                        slot.begin(Class::of(kind), len, 1);
                        self.ops.push(op);
                        return len;
                    }
                    Err(e) => Err(Refused::Status(request::status_of(e))),
                }
            }
            Ok(Request::Flush) => {
                slot.begin(Class::Flush, 0, 1);
                let kind = Kind::Flush;
                self.ops.push(Op {
                    tag,
                    kind,
                    offset: 0,
                    len: 0,
                    buffers: Buffers::NONE,
                });
                return 0;
            }
            Ok(Request::Id) => Ok(copy_id(&mut slot.chain, &shared.id)),
            Ok(Request::Ranges { zeroes }) => {
                match request::ranges(
                    &mut slot.chain,
                    zeroes,
                    &self.mode,
                    &self.geometry,
                    &mut self.ranges,
                ) {
                    Ok(()) if self.ranges.is_empty() => Ok(0),
                    Ok(()) => {
                        slot.begin(Class::Ranges, 0, self.ranges.len() as u16);
                        for (part, &(kind, offset, len)) in self.ranges.iter().enumerate() {
                            let tag = self.channel.tag(index, part as u16);
                            let buffers = Buffers::NONE;
                            self.ops.push(Op {
                                tag,
                                kind,
                                offset,
                                len,
                                buffers,
                            });
                        }
                        return 0;
                    }
                    Err(status) => Err(Refused::Status(status)),
                }
            }
            Err(refused) => Err(refused),
        };
        self.answer(ring, index, answer);
        0
    }

    /// Answers a request that needs no operation: with the bytes that were written before the status,
    /// or with what is wrong.
    fn answer<R: Ring>(&mut self, ring: &mut R, index: u32, answer: Result<u32, Refused>) {
        let slot = self.slots.get(index);
        let written = match answer {
            Ok(bytes) => {
                slot.chain.set_status(status::OK);
                // The status counts where nothing that was not written comes before it.
                let all = bluff_memory::IoVec::total(slot.chain.writable());
                bytes + u32::from(u64::from(bytes) == all)
            }
            Err(refused) => {
                self.tally.errors += 1;
                match refused {
                    Refused::Status(s) => {
                        slot.chain.set_status(s);
                        written_without_data(&slot.chain)
                    }
                    Refused::NoStatus => 0,
                }
            }
        };
        ring.complete(&slot.chain, written);
        self.slots.give(index);
    }

    /// Offers operations to the channel; says whether it took any.
    #[inline(always)]
    fn submit(&mut self) -> bool {
        let n = self.channel.submit(&self.ops);
        if n == self.ops.len() {
            self.ops.clear();
        } else {
            self.ops.drain(..n);
        }
        if n > 0 {
            self.channel.kick();
        }
        n > 0
    }

    /// Takes completions from the channel and completes what is finished.
    #[inline(always)]
    fn collect<R: Ring>(&mut self, ring: &mut R, now: Instant) -> bool {
        if self.slots.in_flight() == 0 {
            return false;
        }
        self.channel.poll(now, &mut self.done);
        if self.done.is_empty() {
            return false;
        }
        for i in 0..self.done.len() {
            let completion = self.done[i];
            self.completed(ring, completion);
        }
        self.done.clear();
        true
    }

    #[inline(always)]
    fn completed<R: Ring>(&mut self, ring: &mut R, completion: Completion) {
        let index = ChannelHandle::slot(completion.tag);
        let slot = self.slots.get(index);
        slot.pending -= 1;
        if let Err(e) = completion.result {
            slot.cancelled |= e == BlockError::Cancelled;
            if slot.status == status::OK {
                slot.status = request::status_of(e);
            }
        }
        if slot.pending > 0 {
            return;
        }
        if self.mute {
            ring.cut_short(&slot.chain);
            return self.slots.give(index);
        }
        if slot.cancelled {
            // What becomes of it is for the stop or the revocation to say: `control` looks after it.
            return self.set_aside(ring, index);
        }
        slot.revoked = false;
        slot.chain.set_status(slot.status);
        let written = if slot.status == status::OK {
            let t = &mut self.tally;
            match slot.class {
                Class::Read => {
                    t.reads += 1;
                    t.bytes_read += slot.len;
                }
                Class::Write => {
                    t.writes += 1;
                    t.bytes_written += slot.len;
                }
                Class::Flush => t.flushes += 1,
                Class::Ranges => t.discards += 1,
            }
            // At most 16 MiB and the status.
            if slot.class == Class::Read {
                slot.len as u32 + 1
            } else {
                written_without_data(&slot.chain)
            }
        } else {
            self.tally.errors += 1;
            written_without_data(&slot.chain)
        };
        ring.complete(&slot.chain, written);
        self.slots.give(index);
    }

    pub(super) fn count(&mut self, c: &QueueCounters) {
        let t = std::mem::take(&mut self.tally);
        for (cell, n) in [
            (&c.reads, t.reads),
            (&c.writes, t.writes),
            (&c.flushes, t.flushes),
            (&c.discards, t.discards),
            (&c.bytes_read, t.bytes_read),
            (&c.bytes_written, t.bytes_written),
            (&c.errors, t.errors),
        ] {
            if n > 0 {
                add(cell, n);
            }
        }
        c.in_flight
            .store(self.slots.in_flight() as u64, Ordering::Relaxed);
    }
}

/// What a request reports as written that failed, or that has no data: of the bytes that come first in its
/// buffers nothing is sure, so they cannot be counted; where there are none the status comes first.
pub(super) fn written_without_data(chain: &Chain) -> u32 {
    u32::from(chain.writable().is_empty())
}

/// How a bad chain is answered: with an error where its status byte is known, which is so where a buffer lies in
/// memory that we do not have. A driver need not look at the used length.
pub(super) fn refuse(chain: &mut Chain) -> Refused {
    if chain.take_status() {
        Refused::Status(status::IOERR)
    } else {
        Refused::NoStatus
    }
}

/// Copies the identification into a chain, as much as fits; says how much that is.
fn copy_id(chain: &mut Chain, id: &[u8; ID_LEN]) -> u32 {
    // SAFETY: the chain's memory is mapped, and the name does not leave this function.
    let buffers = unsafe { Buffers::new(chain.fill()) };
    buffers.copy_from(id) as u32
}
