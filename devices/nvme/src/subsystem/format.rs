//! Formatting: the namespace is blocked, commands in flight drain on every controller, and somebody erases; then the new format is recorded, and the namespace is another one.

use std::fmt;
use std::sync::Arc;

use super::{Kept, NamespaceFormat, NotKept, Subsystem, SubsystemEvent};
use crate::attached::Table;
use crate::namespace::Namespace;
use crate::spec::Status;
use crate::token::Token;

/// A format under way: its namespaces are blocked. Dropped before [`Formatting::finish`] it has failed: the namespaces are what they were, but their contents may be anything.
pub struct Formatting {
    subsystem: Arc<Subsystem>,
    controller: u16,
    /// What is to be erased, each whole, before it is finished. As the controller sees them that asked.
    namespaces: Table,
    /// log2 of the new block's bytes.
    shifts: Vec<(u32, u8)>,
    /// Nothing of it is to be undone any more.
    over: bool,
}

impl fmt::Debug for Formatting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Formatting")
            .field("shifts", &self.shifts)
            .finish_non_exhaustive()
    }
}

impl Subsystem {
    /// Begins to format namespaces, to formats by index. All controllers refuse commands for them from now on. `drained` is called, on any thread, when no controller has commands of
    /// them in flight; it may be before this returns.
    ///
    /// # Errors
    /// [`Status::FORMAT_IN_PROGRESS`] where one is being formatted, [`Status::INVALID_NAMESPACE`] where one has gone, [`Status::FORMAT`] for a format that one does not have.
    /// Nothing has begun then, and `drained` is not called.
    pub fn begin_format(
        self: &Arc<Self>,
        controller: u16,
        nsids: &[u32],
        format: u8,
        drained: impl FnOnce() + Send + Sync + 'static,
    ) -> Result<Formatting, Status> {
        let state = self.lock();
        let mut shifts = Vec::new();
        for nsid in nsids {
            let entry = state.namespaces.get(nsid);
            let entry = entry.ok_or(Status::INVALID_NAMESPACE)?;
            if entry.namespace.is_blocked() {
                return Err(Status::FORMAT_IN_PROGRESS);
            }
            let geometry = entry.namespace.volume().geometry();
            let shift = self.options.formats(&geometry).nth(format.into());
            shifts.push((*nsid, shift.ok_or(Status::FORMAT)?));
        }
        let snapshots = nsids.iter().map(|n| self.snapshot(&state, *n, controller));
        let namespaces = Table::new(snapshots);
        let token = Token::new(drained);
        for nsid in nsids {
            let entry = &state.namespaces[nsid];
            entry.namespace.block(true);
            for (id, listener) in &state.controllers {
                if entry.is_attached(*id) {
                    listener(SubsystemEvent::Drain(*nsid, token.clone()));
                }
            }
        }
        // `drained` may want the subsystem.
        drop(state);
        drop(token);
        Ok(Formatting {
            subsystem: self.clone(),
            controller,
            namespaces,
            shifts,
            over: false,
        })
    }
}

impl Subsystem {
    /// Waits for what controllers have in flight on an NSID now, also where its namespace has been removed. `done` is called, on any thread, when nothing is;
    /// it may be before this returns.
    pub fn settle(&self, nsid: u32, done: impl FnOnce() + Send + Sync + 'static) {
        let token = Token::new(done);
        let state = self.lock();
        for listener in state.controllers.values() {
            listener(SubsystemEvent::Drain(nsid, token.clone()));
        }
        // `done` may want the subsystem.
        drop(state);
        drop(token);
    }
}

impl Formatting {
    /// What is to be erased.
    pub fn namespaces(&self) -> &Table {
        &self.namespaces
    }

    /// All of them read as zeroes, also after a loss of power. The new formats are recorded, where somebody keeps them; then they are what hosts see, and `then` is called, on any
    /// thread, which may be before this returns. Until then the namespaces stay blocked, whatever becomes of the controller.
    pub fn finish(self, then: impl FnOnce(Result<(), NotKept>) + Send + Sync + 'static) {
        let format = |(nsid, shift): &(u32, u8)| NamespaceFormat {
            nsid: *nsid,
            block_size: 1 << shift,
        };
        let formats: Vec<_> = self.shifts.iter().map(format).collect();
        let keeper = self.subsystem.options.keeper.clone();
        let kept = Kept::new(self, then);
        match keeper {
            Some(keeper) => keeper.keep(&formats, kept),
            // There are no others than the volumes' own.
            None => kept.answer(Ok(())),
        }
    }

    /// They have their new format: all controllers get new tables, and the hosts of the others are told.
    pub(super) fn hold(mut self) {
        self.over = true;
        let state = &mut *self.subsystem.lock();
        for (nsid, shift) in &self.shifts {
            if let Some(entry) = state.namespaces.get_mut(nsid) {
                // The one before stays blocked, for workers that still have it.
                let volume = entry.namespace.volume().clone();
                entry.namespace = Namespace::new(*nsid, volume, *shift);
                state.renew(*nsid);
                // Whose host has formatted it gets a status (Base 2.1 §5.1.2: it is not told of what it did itself).
                self.subsystem
                    .tell_changed(state, *nsid, Some(self.controller));
            }
        }
    }

    /// Nobody knows which format they have: they stay blocked.
    pub(super) fn leave(mut self) {
        self.over = true;
    }
}

impl Drop for Formatting {
    fn drop(&mut self) {
        if !self.over {
            let state = self.subsystem.lock();
            for (nsid, _) in &self.shifts {
                if let Some(entry) = state.namespaces.get(nsid) {
                    entry.namespace.block(false);
                }
            }
        }
    }
}
