//! Commands in flight.

use bluff_memory::IoVec;
use zerocopy::little_endian::U16;

use super::bounce::Bounce;
use super::steps::Steps;
use crate::spec::{Command, Status};

/// Most commands of one worker that are in flight at once; the rest waits in its queues.
pub(super) const MOST: usize = crate::journal::COMMANDS as usize;

/// The place of a space for commands that concern all of them.
pub(super) const ALL: u32 = u32::MAX;

/// Called when a command has ended that was to be aborted: whether it was.
pub(super) type Aborted = Box<dyn FnOnce(bool) + Send>;

/// One command in flight.
pub(super) struct Slot {
    /// Its data in host memory.
    pub(super) data: Vec<IoVec>,
    /// Other buffers of its operations: parts of `data`, or memory of ours.
    pub(super) own: Vec<IoVec>,
    pub(super) opcode: u8,
    pub(super) cid: U16,
    pub(super) nsid: u32,
    /// Its first block, for the error log.
    pub(super) lba: u64,
    /// Bytes, for the counters.
    pub(super) len: u64,
    /// Which of the worker's submission queues it came from.
    pub(super) sq: u16,
    /// Which of the worker's spaces it is about, or [`ALL`].
    pub(super) space: u32,
    /// Which command of this slot it is, so that nothing is taken for another's.
    generation: u16,
    busy: bool,
    /// Which of all commands it is: later ones have higher numbers.
    pub(super) number: u64,
    /// Operations that are not completed yet.
    pub(super) pending: u16,
    /// How many operations there were in this step.
    pub(super) parts: u16,
    pub(super) status: Status,
    /// It is to end, with this status where it is not finished.
    pub(super) cause: Option<Status>,
    /// It uses memory that has gone, which somebody waits for.
    pub(super) revoked: bool,
    /// What follows.
    pub(super) steps: Option<Box<Steps>>,
    pub(super) bounce: Option<Bounce>,
    pub(super) aborted: Option<Aborted>,
}

/// What a command is known by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Origin {
    pub(super) sq: u16,
    pub(super) opcode: u8,
    pub(super) cid: U16,
    pub(super) nsid: u32,
    pub(super) lba: u64,
}

impl Origin {
    /// Of a command of this submission queue; which block it begins with is not looked at yet.
    #[inline(always)]
    pub(super) fn of(sq: u16, command: &Command) -> Self {
        Self {
            sq,
            opcode: command.opcode,
            cid: command.cid,
            nsid: command.nsid.get(),
            lba: 0,
        }
    }
}

/// The slots of a worker. They are made as they are needed and kept.
#[derive(Default)]
pub(super) struct Slots {
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// How many are in neither: their command has ended, and its completion waits for memory.
    kept: usize,
    /// How many commands there have ever been.
    taken: u64,
}

impl Slots {
    /// How many commands are in flight.
    #[inline]
    pub(super) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len() - self.kept
    }

    /// How many commands there have ever been: the number of the next one.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    /// Whether no more can be taken.
    #[inline]
    pub(super) fn full(&self) -> bool {
        self.free.is_empty() && self.slots.len() == MOST
    }

    /// Takes a slot, where they are not full.
    #[inline(always)]
    pub(super) fn take(&mut self, origin: Origin) -> u32 {
        let index = match self.free.pop() {
            Some(index) => index,
            None => self.make(),
        };
        let number = self.taken;
        self.taken = self.taken.wrapping_add(1);
        self.occupy(index, number, origin);
        index
    }

    /// Takes this slot, for a command of this number that another process had in flight. Below [`MOST`].
    pub(super) fn adopt(&mut self, index: u32, number: u64, origin: Origin) {
        while self.slots.len() <= index as usize {
            let next = self.make();
            self.free.push(next);
        }
        self.free.retain(|free| *free != index);
        self.taken = self.taken.max(number.saturating_add(1));
        self.occupy(index, number, origin);
    }

    #[inline(always)]
    fn occupy(&mut self, index: u32, number: u64, origin: Origin) {
        let slot = &mut self.slots[index as usize];
        slot.busy = true;
        slot.number = number;
        slot.opcode = origin.opcode;
        slot.cid = origin.cid;
        slot.nsid = origin.nsid;
        slot.lba = origin.lba;
        slot.sq = origin.sq;
    }

    #[cold]
    fn make(&mut self) -> u32 {
        assert!(self.slots.len() < MOST, "the caller has looked");
        self.slots.push(Slot {
            data: Vec::new(),
            own: Vec::new(),
            opcode: 0,
            cid: U16::ZERO,
            nsid: 0,
            lba: 0,
            len: 0,
            sq: 0,
            space: ALL,
            generation: 0,
            busy: false,
            number: 0,
            pending: 0,
            parts: 0,
            status: Status::SUCCESS,
            cause: None,
            revoked: false,
            steps: None,
            bounce: None,
            aborted: None,
        });
        (self.slots.len() - 1) as u32
    }

    /// Gives a slot back: nothing of its command is left.
    #[inline(always)]
    pub(super) fn give(&mut self, index: u32) {
        self.end(index);
        self.free.push(index);
    }

    /// A command has ended; its slot is not free before [`Slots::release`].
    pub(super) fn keep(&mut self, index: u32) {
        self.end(index);
        self.kept += 1;
    }

    /// Gives a slot back that was kept.
    pub(super) fn release(&mut self, index: u32) {
        self.kept -= 1;
        self.free.push(index);
    }

    #[inline(always)]
    fn end(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        debug_assert!(slot.busy && slot.pending == 0);
        slot.busy = false;
        slot.generation = slot.generation.wrapping_add(1);
        slot.data.clear();
        slot.own.clear();
        (slot.len, slot.space, slot.parts) = (0, ALL, 0);
        (slot.status, slot.cause, slot.revoked) = (Status::SUCCESS, None, false);
        slot.steps = None;
    }

    #[inline(always)]
    pub(super) fn get(&mut self, index: u32) -> &mut Slot {
        &mut self.slots[index as usize]
    }

    /// The slot's part of a tag.
    #[inline(always)]
    pub(super) fn key(&self, index: u32) -> u32 {
        u32::from(self.slots[index as usize].generation) << 16 | index
    }

    /// The slot of a key whose command has an operation outstanding.
    #[inline(always)]
    pub(super) fn of(&self, key: u32) -> Option<u32> {
        let index = key & 0xffff;
        let slot = self.slots.get(index as usize)?;
        (slot.pending > 0 && slot.generation == (key >> 16) as u16).then_some(index)
    }

    /// The commands in flight, with their numbers.
    pub(super) fn busy(&mut self) -> impl Iterator<Item = (u32, &mut Slot)> {
        self.slots
            .iter_mut()
            .enumerate()
            .filter(|(_, s)| s.busy)
            .map(|(i, s)| (i as u32, s))
    }
}
