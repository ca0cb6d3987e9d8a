//! `DMA_READ` and `DMA_WRITE`: what the server asks of the client, for memory without a file.
//!
//! ```text
//!   read, write --> queued --> sent, in pieces, by message ID --> whole, or failed --> DmaDone
//!                                   |                                 ^
//!                                   `-- given up: the reply, if it comes, is dropped
//! ```
//!
//! An operation is over once: when all its pieces were answered, or at the first error, its deadline, or when its memory is unmapped. The message IDs of
//! pieces whose replies nobody waits for any more stay taken until these have come, so that a late reply is never taken
//! for another one's.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use zerocopy::{FromBytes, IntoBytes};

use crate::framing;
use crate::spec::{RawDmaAccess, command, flag};
use crate::{Errno, Error};

/// Operations that are queued or under way.
pub const MAX_OPS: usize = 256;
/// Bytes of all of them.
pub const MAX_BYTES: usize = 16 << 20;
/// Pieces that are under way.
const WINDOW: usize = 16;
/// Pieces that were given up and whose replies have not come. More: the client answers nothing.
const MAX_ABANDONED: usize = 1024;

/// An operation that is over.
#[derive(Debug, PartialEq, Eq)]
pub struct DmaDone {
    /// As it was given.
    pub tag: u64,
    /// The bytes of a read, as many as were asked for; none for a write. An error of the client's or of this side:
    /// `EFAULT` where the memory was unmapped, `ETIMEDOUT`, `EIO` for a reply that makes no sense, `ECANCELED` by a reset, `ENOTCONN`.
    pub result: Result<Vec<u8>, Errno>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

#[derive(Debug)]
struct Op {
    tag: u64,
    direction: Direction,
    address: u64,
    /// What is written, or what was read so far: as long as the operation.
    data: Vec<u8>,
    /// Bytes that were asked for.
    sent: usize,
    /// Bytes that were answered.
    answered: usize,
    deadline: Instant,
}

/// Which bytes of which operation a message is about.
#[derive(Debug)]
struct Piece {
    command: u16,
    /// `None`: given up.
    of: Option<(u64, usize, usize)>,
}

/// The operations of one session.
#[derive(Debug, Default)]
pub(crate) struct Dma {
    /// By number, in the order they came.
    ops: BTreeMap<u64, Op>,
    next_op: u64,
    bytes: usize,
    pieces: BTreeMap<u16, Piece>,
    abandoned: usize,
    next_id: u16,
    done: VecDeque<DmaDone>,
}

impl Dma {
    /// Queues a read of `len` bytes.
    pub(crate) fn read(
        &mut self,
        tag: u64,
        address: u64,
        len: usize,
        deadline: Instant,
    ) -> Result<(), Errno> {
        self.admit(len)?;
        self.queue(tag, Direction::Read, address, vec![0; len], deadline);
        Ok(())
    }

    /// Queues a write.
    pub(crate) fn write(
        &mut self,
        tag: u64,
        address: u64,
        data: Vec<u8>,
        deadline: Instant,
    ) -> Result<(), Errno> {
        self.admit(data.len())?;
        self.queue(tag, Direction::Write, address, data, deadline);
        Ok(())
    }

    fn admit(&self, len: usize) -> Result<(), Errno> {
        let full = self.ops.len() == MAX_OPS || len > MAX_BYTES - self.bytes;
        if full || self.abandoned > MAX_ABANDONED {
            return Err(Errno::BUSY);
        }
        Ok(())
    }

    fn queue(
        &mut self,
        tag: u64,
        direction: Direction,
        address: u64,
        data: Vec<u8>,
        deadline: Instant,
    ) {
        self.bytes += data.len();
        let op = Op {
            tag,
            direction,
            address,
            data,
            sent: 0,
            answered: 0,
            deadline,
        };
        self.ops.insert(self.next_op, op);
        self.next_op += 1;
    }

    /// The next message to send, with at most `max` bytes of data.
    pub(crate) fn transmit(&mut self, max: usize) -> Option<Vec<u8>> {
        if max == 0 || self.pieces.len() - self.abandoned >= WINDOW {
            return None;
        }
        let (number, op) = self
            .ops
            .iter_mut()
            .find(|(_, op)| op.sent < op.data.len())?;
        let id = free_id(&self.pieces, &mut self.next_id);
        let (from, len) = (op.sent, max.min(op.data.len() - op.sent));
        op.sent += len;
        let raw = RawDmaAccess {
            // Checked against the mappings, so it cannot wrap.
            address: (op.address + from as u64).into(),
            count: (len as u64).into(),
        };
        let (command, data) = match op.direction {
            Direction::Read => (command::DMA_READ, &[][..]),
            Direction::Write => (command::DMA_WRITE, &op.data[from..from + len]),
        };
        let of = Some((*number, from, len));
        self.pieces.insert(id, Piece { command, of });
        Some(framing::message(
            id,
            command,
            flag::COMMAND,
            0,
            &[raw.as_bytes(), data],
        ))
    }

    /// A reply has come.
    ///
    /// # Errors
    /// [`Error::Reply`]: nobody has asked.
    pub(crate) fn reply(
        &mut self,
        id: u16,
        command: u16,
        error: Option<u32>,
        payload: &[u8],
    ) -> Result<(), Error> {
        let piece = self.pieces.get(&id).filter(|p| p.command == command);
        let Some(of) = piece.map(|p| p.of) else {
            return Err(Error::Reply { id, command });
        };
        self.pieces.remove(&id);
        let Some((number, from, len)) = of else {
            self.abandoned -= 1;
            return Ok(());
        };
        let op = self
            .ops
            .get_mut(&number)
            .expect("pieces of operations that are over are given up");
        let result = match error {
            Some(number) => Err(i32::try_from(number).map_or(Errno::IO, Errno::new)),
            None => check(op, from, len, payload).ok_or(Errno::IO),
        };
        match result {
            Err(errno) => self.fail(number, errno),
            Ok(data) => {
                op.data[from..from + data.len()].copy_from_slice(data);
                op.answered += len;
                if op.answered == op.data.len() {
                    self.finish(number, None);
                }
            }
        }
        Ok(())
    }

    /// Operations that touch what `hits` says of address and length have failed.
    pub(crate) fn fail_where(&mut self, errno: Errno, hits: impl Fn(u64, u64) -> bool) {
        let hit = |op: &Op| hits(op.address, op.data.len() as u64);
        let over: Vec<u64> = self
            .ops
            .iter()
            .filter(|(_, op)| hit(op))
            .map(|(n, _)| *n)
            .collect();
        for number in over {
            self.fail(number, errno);
        }
    }

    /// When an operation is late.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.ops.values().map(|op| op.deadline).min()
    }

    /// Fails what is late.
    pub(crate) fn timeout(&mut self, now: Instant) {
        let late = self.ops.iter().filter(|(_, op)| op.deadline <= now);
        let late: Vec<u64> = late.map(|(n, _)| *n).collect();
        for number in late {
            self.fail(number, Errno::TIMEDOUT);
        }
    }

    /// The client has gone: nothing will be answered any more.
    pub(crate) fn end(&mut self) {
        self.fail_where(Errno::NOTCONN, |_, _| true);
        self.pieces.clear();
        self.abandoned = 0;
    }

    pub(crate) fn done(&mut self) -> Option<DmaDone> {
        self.done.pop_front()
    }

    fn fail(&mut self, number: u64, errno: Errno) {
        for piece in self.pieces.values_mut() {
            if piece.of.is_some_and(|(op, ..)| op == number) {
                piece.of = None;
                self.abandoned += 1;
            }
        }
        self.finish(number, Some(errno));
    }

    fn finish(&mut self, number: u64, error: Option<Errno>) {
        let op = self.ops.remove(&number).expect("an operation is over once");
        self.bytes -= op.data.len();
        let result = match (error, op.direction) {
            (Some(errno), _) => Err(errno),
            (None, Direction::Read) => Ok(op.data),
            (None, Direction::Write) => Ok(Vec::new()),
        };
        self.done.push_back(DmaDone {
            tag: op.tag,
            result,
        });
    }
}

/// An ID that no piece has. There are far fewer pieces than IDs.
fn free_id(pieces: &BTreeMap<u16, Piece>, next: &mut u16) -> u16 {
    loop {
        let id = *next;
        *next = next.wrapping_add(1);
        if !pieces.contains_key(&id) {
            return id;
        }
    }
}

/// The data of a reply; `None` where it is not the one to this piece. The reply to a write has a count of eight bytes in QEMU
/// 11.1 and of four in the specification; older ones of QEMU sent the header alone.
fn check<'a>(op: &Op, from: usize, len: usize, payload: &'a [u8]) -> Option<&'a [u8]> {
    let address = op.address + from as u64;
    if op.direction == Direction::Write {
        let mut whole = [0; size_of::<RawDmaAccess>()];
        match payload.len() {
            0 => return Some(&[]),
            12 | 16 => whole[..payload.len()].copy_from_slice(payload),
            _ => return None,
        }
        let raw = RawDmaAccess::read_from_bytes(&whole).ok()?;
        return (raw.address.get() == address && raw.count.get() == len as u64).then_some(&[]);
    }
    let (raw, data) = RawDmaAccess::read_from_prefix(payload).ok()?;
    let same = raw.address.get() == address && raw.count.get() == len as u64;
    (same && data.len() == len).then_some(data)
}
