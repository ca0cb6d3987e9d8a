//! The flushes of a channel: they wait for a sync of the volume, this channel's or another's.

use std::sync::atomic::Ordering;

use bluff_block::BlockError;

use super::FileChannel;
use crate::engine::Work;
use crate::flushes::Progress;
use crate::slot::{SYNC, State};
use crate::storage::{Durability, Storage};

/// Flushes under way.
#[derive(Default)]
pub(super) struct Flushing {
    /// Slots, and the tickets that they wait with.
    slots: Vec<(u32, u64)>,
    /// The ends that `slots` has been tried against.
    seen: usize,
    /// The kernel has a sync of this channel.
    pub(super) in_kernel: bool,
    /// To be tried although no sync has ended: some are new, or the engine had no room for their sync.
    pub(super) due: bool,
}

impl Flushing {
    /// Whether [`FileChannel::flush`] has something to do.
    #[inline]
    pub(super) fn is_due(&self, storage: &Storage) -> bool {
        !self.slots.is_empty() && (self.due || self.seen != storage.flushes.ends())
    }

    /// Whether it waits for nobody's sync.
    pub(super) fn is_refused(&self) -> bool {
        !self.slots.is_empty() && self.due
    }

    pub(super) fn forget(&mut self, id: u32) {
        self.slots.retain(|f| f.0 != id);
    }
}

impl FileChannel {
    /// Has `id` wait for a sync; [`FileChannel::flush`] is to follow.
    pub(super) fn wait_for_sync(&mut self, id: u32) {
        self.slots[id as usize].state = State::Flushing;
        let ticket = self.storage.flushes.ticket();
        self.flushing.slots.push((id, ticket));
        self.flushing.due = true;
    }

    /// Ends the flushes whose sync has ended, and begins a sync where nobody else has one.
    #[cold]
    pub(super) fn flush(&mut self) {
        self.flushing.due = false;
        loop {
            self.flushing.seen = self.storage.flushes.ends();
            let ended = self.storage.flushes.ended();
            let mut i = 0;
            while let Some(&(id, ticket)) = self.flushing.slots.get(i) {
                if ticket <= ended {
                    self.flushing.slots.swap_remove(i);
                    let verdict = self.verdict();
                    self.finish(id, verdict);
                } else {
                    i += 1;
                }
            }
            // The next sync is in time for all of them.
            let Some(ticket) = self.flushing.slots.iter().map(|f| f.1).max() else {
                return;
            };
            match self.storage.flushes.advance(ticket, &self.waker) {
                Progress::Ended => {}
                Progress::Wait => return,
                Progress::Sync => {
                    if self.engine().start(SYNC, Work::Sync).is_ok() {
                        self.flushing.in_kernel = true;
                    } else {
                        self.flushing.due = true;
                        self.storage.flushes.end(false);
                    }
                    return;
                }
            }
        }
    }

    /// What a flush may say whose sync has ended. Also where it went well an error counts that another has
    /// met since: nobody knows which writes it was about.
    pub(super) fn verdict(&self) -> Result<(), BlockError> {
        if self.storage.flush_failed.load(Ordering::Acquire) {
            Err(BlockError::Io)
        } else {
            Ok(())
        }
    }

    /// The kernel is done with this channel's sync.
    pub(super) fn synced(&mut self, result: i32) {
        self.flushing.in_kernel = false;
        self.storage.note(Durability::Sync, result);
    }
}
