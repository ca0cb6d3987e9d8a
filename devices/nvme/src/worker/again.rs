//! Going on with what another process had in flight ([`crate::journal`]).

use bluff_reactor::Context;

use super::batch::Io;
use super::slots::Origin;
use crate::journal::Stage;
use crate::queue::QueueError;

impl Io {
    /// Takes up what the journal has: what is not completed is done again, and what is completed is posted, where it was not.
    ///
    /// # Errors
    /// [`QueueError::Position`] where the journal says what cannot be.
    pub(super) fn resume(&mut self) -> Result<(), QueueError> {
        self.resuming = false;
        let qid = self.cq.qid();
        let Some(journal) = self.journal.clone() else {
            return Ok(());
        };
        let posted = self.cq.posted();
        for found in journal.commands() {
            let entry = match found.stage {
                Stage::Posting(place, _) if place < posted => {
                    journal.strike(found.index);
                    continue;
                }
                Stage::Posting(place, _) if place > posted => {
                    return Err(QueueError::Position(qid));
                }
                Stage::Posting(_, entry) => Some((true, entry)),
                Stage::Completed(entry) => Some((false, entry)),
                Stage::Begun => None,
            };
            self.cq.reserve_again()?;
            let sqs = self.sqs.iter_mut().enumerate();
            let mut sqs = sqs.filter_map(|(at, sq)| Some((at, sq.as_mut()?)));
            let sq = sqs.find(|(_, sq)| sq.queue.qid() == found.sq);
            let command = found.command;
            match (entry, sq) {
                // Its queue may have gone: it is only to be told.
                (Some((first, entry)), _) => {
                    let origin = Origin::of(0, &command);
                    self.slots.adopt(found.index, found.number, origin);
                    self.slots.keep(found.index);
                    // At most one was being posted, before all others.
                    let at = if first { 0 } else { self.parked.len() };
                    self.parked.insert(at, (entry, found.index));
                }
                (None, Some((at, sq))) => {
                    let origin = Origin::of(at as u16, &command);
                    sq.in_flight += 1;
                    self.slots.adopt(found.index, found.number, origin);
                    self.again.push_back((found.index, command));
                }
                (None, None) => return Err(QueueError::Position(qid)),
            }
        }
        // Whether the host was told of the last ones is not known. Once too often does no harm.
        if self.cq.unread() > 0 {
            self.posted += 1;
        }
        self.uncertain = true;
        self.unpark();
        Ok(())
    }

    /// Does up to `most` of them again; says whether there were any.
    #[cold]
    pub(super) fn redo(&mut self, cx: &mut Context<'_>, most: u32) -> bool {
        for _ in 0..most {
            let Some((index, command)) = self.again.pop_front() else {
                break;
            };
            let slot = self.slots.get(index);
            match slot.cause {
                Some(cause) => {
                    slot.status = cause;
                    self.end(index);
                }
                None => drop(self.begin_in(cx, index, &command)),
            }
        }
        true
    }
}
