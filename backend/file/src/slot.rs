//! Operations of a file channel, and what is left of them when it goes.

use std::io;
use std::sync::{Arc, OnceLock};

use bluff_block::{Kind, Op};
use bluff_memory::IoVec;

use crate::abandoned::Ticket;
use crate::arena::{Arena, Bounce, LARGEST, Mapping};
use crate::storage::{Durability, Storage};

/// Names a channel's sync of the volume where others are named by their slot.
pub(crate) const SYNC: u32 = u32::MAX;

#[derive(Debug)]
pub(crate) enum State {
    Free,
    Waiting,
    /// An abandoned write is in its way.
    Blocked,
    /// A sync of the volume is to make it durable.
    Flushing,
    Kernel,
    /// Completed as cancelled; the kernel still has it. Writes keep their range taken.
    Abandoned(Option<Ticket>),
}

/// What an operation does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Moves data through a bounce buffer.
    Move,
    /// Gives storage back.
    Punch,
    /// Has the file system make zeroes.
    Zero,
    /// Writes zeroes.
    Fill,
    /// Makes it durable.
    Sync,
}

pub(crate) struct Slot {
    pub(crate) op: Op,
    pub(crate) state: State,
    pub(crate) step: Step,
    /// Nothing of it has been started.
    pub(crate) fresh: bool,
    /// Bytes that are done.
    pub(crate) moved: u64,
    pub(crate) bounce: Option<Bounce>,
    /// Bytes that the kernel has now.
    pub(crate) chunk: usize,
}

pub(crate) enum Begun {
    Started,
    /// Completed without the kernel.
    Ended,
    /// An abandoned write is in its way.
    Held,
    /// It waits for a sync of the volume.
    Flushing,
    NoRoom,
}

/// What the kernel still has when a channel goes.
pub(crate) struct Orphans {
    pub(crate) storage: Arc<Storage>,
    /// `Some` until dropped.
    pub(crate) arena: Option<Arena>,
    pub(crate) left: Vec<(u32, Option<Ticket>, Durability)>,
}

impl Orphans {
    pub(crate) fn is_empty(&self) -> bool {
        self.left.is_empty()
    }

    pub(crate) fn end(&mut self, id: u32, result: i32) {
        if let Some(i) = self.left.iter().position(|l| l.0 == id) {
            let (_, ticket, durability) = self.left.swap_remove(i);
            self.storage.note(durability, result);
            if let Some(ticket) = ticket {
                self.storage.release(ticket);
            }
        }
    }
}

impl Drop for Orphans {
    fn drop(&mut self) {
        // The io_uring ended with its reactor: nobody will tell when the kernel lets go. The ranges
        // stay taken, for what may land in them.
        if let Some(arena) = self.arena.take()
            && !self.left.is_empty()
        {
            log::warn!("{} operations outlive their reactor", self.left.len());
            if self.left.iter().any(|l| l.0 == SYNC) {
                // What it says is lost, and with it, maybe, the one report of a lost write.
                self.storage.note(Durability::Sync, -libc::EIO);
            }
            arena.leak();
        }
    }
}

/// Zeroes to write from; never freed.
pub(crate) fn zeroes() -> io::Result<*mut u8> {
    static ZEROES: OnceLock<Mapping> = OnceLock::new();
    match ZEROES.get() {
        Some(z) => Ok(z.ptr()),
        None => {
            let fresh = Mapping::new(LARGEST)?;
            Ok(ZEROES.get_or_init(|| fresh).ptr())
        }
    }
}

pub(crate) fn is_fua(op: &Op) -> bool {
    matches!(
        op.kind,
        Kind::Write { fua: true } | Kind::WriteZeroes { fua: true, .. }
    )
}

/// The pieces of `all` from byte `skip` on.
pub(crate) fn rest(all: &[IoVec], skip: u64, out: &mut Vec<IoVec>) {
    out.clear();
    let mut skip = skip as usize;
    for piece in all {
        let mut piece = *piece;
        let drop = skip.min(piece.len());
        piece.advance(drop);
        skip -= drop;
        if !piece.is_empty() {
            out.push(piece);
        }
    }
}
