//! Which I/O queues there are: creation, deletion and abort, checked in the order of Base 2.1 §5.2.1 to §5.2.4.
//!
//! A plain table: the admin worker asks it, does what comes of it with the actors that have the rings, and says when that is over. A submission queue that
//! is being deleted is still there for everyone who asks.

use serde::{Deserialize, Serialize};

use crate::spec::Status;
use crate::spec::admin::{RawAbort, RawCreateCq, RawCreateSq};
use crate::spec::registers::{Cc, IOCQES, IOSQES};

/// A completion queue to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CreateCq {
    /// Its identifier.
    pub qid: u16,
    /// Entries: 2 to 65536.
    pub entries: u32,
    /// Where it is, all of it; aligned to a memory page.
    pub base: u64,
    /// Its vector, where it gives interrupts.
    pub vector: Option<u16>,
}

/// A submission queue to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CreateSq {
    /// Its identifier.
    pub qid: u16,
    /// Entries: 2 to 65536.
    pub entries: u32,
    /// Where it is, all of it; aligned to a memory page.
    pub base: u64,
    /// The completion queue that it posts to, whose actor gets it.
    pub cqid: u16,
}

/// Where a command to be aborted is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Abort {
    /// With the admin worker: only an asynchronous event request can be given back.
    Admin {
        /// Its command identifier.
        cid: u16,
    },
    /// With the actor of completion queue `cqid`.
    Io {
        /// The actor.
        cqid: u16,
        /// The submission queue.
        sqid: u16,
        /// Its command identifier.
        cid: u16,
    },
}

#[derive(Clone, Copy, Debug, Default)]
struct Cq {
    /// Submission queues that post to it, those being deleted among them.
    users: u16,
    deleting: bool,
}

#[derive(Clone, Copy, Debug)]
struct Sq {
    cqid: u16,
    deleting: bool,
}

/// The I/O queues of a controller.
#[derive(Debug)]
pub(crate) struct QueueTable {
    /// How many pairs there can be at most.
    limit: u16,
    mqes_z: u16,
    vectors: u16,
    /// How many the host was granted: submission and completion queues.
    granted: (u16, u16),
    /// At QID - 1.
    cqs: Vec<Option<Cq>>,
    sqs: Vec<Option<Sq>>,
}

impl QueueTable {
    /// For `limit` pairs of I/O queues with up to `mqes_z` + 1 entries, and so many vectors.
    pub fn new(limit: u16, mqes_z: u16, vectors: u16) -> Self {
        Self {
            limit,
            mqes_z,
            vectors,
            granted: (limit, limit),
            cqs: vec![None; limit.into()],
            sqs: vec![None; limit.into()],
        }
    }

    /// As after a controller level reset.
    pub fn reset(&mut self) {
        *self = Self::new(self.limit, self.mqes_z, self.vectors);
    }

    /// Takes up the queues that another process had; `page`: a memory page in bytes. `false`: they cannot be.
    #[must_use]
    pub fn restore(
        &mut self,
        granted: (u16, u16),
        cqs: &[CreateCq],
        sqs: &[CreateSq],
        page: u64,
    ) -> bool {
        self.reset();
        let most = 1..=self.limit;
        if !most.contains(&granted.0) || !most.contains(&granted.1) {
            return false;
        }
        self.granted = granted;
        let sized = 2..=u32::from(self.mqes_z) + 1;
        let fits = |entries: u32, base: u64| sized.contains(&entries) && base.is_multiple_of(page);
        for made in cqs {
            let vector = made.vector.is_none_or(|vector| vector < self.vectors);
            match slot(&mut self.cqs, made.qid, granted.1) {
                Ok(slot @ None) if vector && fits(made.entries, made.base) => {
                    *slot = Some(Cq::default());
                }
                _ => return false,
            }
        }
        for made in sqs {
            let cq = slot(&mut self.cqs, made.cqid, granted.1);
            let sq = slot(&mut self.sqs, made.qid, granted.0);
            match (cq, sq) {
                (Ok(Some(cq)), Ok(sq @ None)) if fits(made.entries, made.base) => {
                    cq.users += 1;
                    *sq = Some(Sq {
                        cqid: made.cqid,
                        deleting: false,
                    });
                }
                _ => return false,
            }
        }
        true
    }

    /// Whether there is no I/O queue.
    pub fn is_empty(&self) -> bool {
        self.cqs.iter().all(Option::is_none) && self.sqs.iter().all(Option::is_none)
    }

    /// How many submission and completion queues the host has.
    pub fn granted(&self) -> (u16, u16) {
        self.granted
    }

    /// The most that it can have of each.
    pub fn limit(&self) -> u16 {
        self.limit
    }

    /// Grants as many as were asked for, as far as there are.
    ///
    /// # Errors
    /// [`Status::SEQUENCE_ERROR`] where there are queues (Base 2.1 §5.1.25, Number of Queues).
    pub fn grant(&mut self, sqs: u16, cqs: u16) -> Result<(u16, u16), Status> {
        if !self.is_empty() {
            return Err(Status::SEQUENCE_ERROR);
        }
        self.granted = (sqs.clamp(1, self.limit), cqs.clamp(1, self.limit));
        Ok(self.granted)
    }

    /// A queue's size and place, as the host wants them.
    fn shape(
        &self,
        size_z: u16,
        contiguous: bool,
        prp1: u64,
        entry_size: bool,
        cc: Cc,
    ) -> Result<u32, Status> {
        // One entry is none (§3.3.3.1), and the entries' size must have been set before.
        if size_z == 0 || size_z > self.mqes_z || !entry_size {
            return Err(Status::QUEUE_SIZE);
        }
        // CAP.CQR is 1: a list of pages is not taken.
        if !contiguous {
            return Err(Status::INVALID_FIELD);
        }
        if !prp1.is_multiple_of(cc.page()) {
            return Err(Status::PRP_OFFSET);
        }
        Ok(u32::from(size_z) + 1)
    }

    /// Enters a completion queue.
    ///
    /// # Errors
    /// What is wrong with it; nothing is entered.
    pub fn create_cq(&mut self, raw: &RawCreateCq, cc: Cc) -> Result<CreateCq, Status> {
        let slot = slot(&mut self.cqs, raw.qid, self.granted.1)?;
        if slot.is_some() {
            return Err(Status::QUEUE_ID);
        }
        let sized = cc.iocqes() == IOCQES;
        let entries = self.shape(raw.size_z, raw.contiguous, raw.prp1, sized, cc)?;
        if raw.interrupts && raw.vector >= self.vectors {
            return Err(Status::INTERRUPT_VECTOR);
        }
        self.cqs[usize::from(raw.qid) - 1] = Some(Cq::default());
        Ok(CreateCq {
            qid: raw.qid,
            entries,
            base: raw.prp1,
            vector: raw.interrupts.then_some(raw.vector),
        })
    }

    /// Enters a submission queue.
    ///
    /// # Errors
    /// What is wrong with it; nothing is entered.
    pub fn create_sq(&mut self, raw: &RawCreateSq, cc: Cc) -> Result<CreateSq, Status> {
        let slot = slot(&mut self.sqs, raw.qid, self.granted.0)?;
        if slot.is_some() {
            return Err(Status::QUEUE_ID);
        }
        let sized = cc.iosqes() == IOSQES;
        let entries = self.shape(raw.size_z, raw.contiguous, raw.prp1, sized, cc)?;
        // One that cannot be has an invalid identifier, one that could be is no valid completion queue (§5.2.2).
        let granted = self.granted.1;
        let cq = self::slot(&mut self.cqs, raw.cqid, granted)?;
        let cq = cq.as_mut().filter(|cq| !cq.deleting);
        cq.ok_or(Status::CQ_INVALID)?.users += 1;
        self.sqs[usize::from(raw.qid) - 1] = Some(Sq {
            cqid: raw.cqid,
            deleting: false,
        });
        Ok(CreateSq {
            qid: raw.qid,
            entries,
            base: raw.prp1,
            cqid: raw.cqid,
        })
    }

    /// Begins to delete a submission queue; says which completion queue's actor has it. Commands of it are completed or aborted, then [`QueueTable::deleted_sq`].
    ///
    /// # Errors
    /// [`Status::QUEUE_ID`]: there is none, or it is being deleted.
    pub fn delete_sq(&mut self, qid: u16) -> Result<u16, Status> {
        match slot(&mut self.sqs, qid, u16::MAX)? {
            Some(sq) if !sq.deleting => {
                sq.deleting = true;
                Ok(sq.cqid)
            }
            _ => Err(Status::QUEUE_ID),
        }
    }

    /// Begins to delete a completion queue; [`QueueTable::deleted_cq`] ends it.
    ///
    /// # Errors
    /// [`Status::QUEUE_ID`]: there is none. [`Status::QUEUE_DELETION`]: submission queues post to it.
    pub fn delete_cq(&mut self, qid: u16) -> Result<(), Status> {
        match slot(&mut self.cqs, qid, u16::MAX)? {
            Some(cq) if !cq.deleting => match cq.users {
                0 => {
                    cq.deleting = true;
                    Ok(())
                }
                _ => Err(Status::QUEUE_DELETION),
            },
            _ => Err(Status::QUEUE_ID),
        }
    }

    /// A submission queue is no more, or could not be made after all.
    pub fn deleted_sq(&mut self, qid: u16) {
        if let Ok(slot) = slot(&mut self.sqs, qid, u16::MAX)
            && let Some(sq) = slot.take()
            && let Ok(Some(cq)) = self::slot(&mut self.cqs, sq.cqid, u16::MAX)
        {
            cq.users -= 1;
        }
    }

    /// A completion queue is no more, or could not be made after all.
    pub fn deleted_cq(&mut self, qid: u16) {
        if let Ok(slot) = slot(&mut self.cqs, qid, u16::MAX) {
            *slot = None;
        }
    }

    /// Where the command to be aborted would be.
    ///
    /// # Errors
    /// [`Status::INVALID_FIELD`]: there is no such submission queue.
    pub fn abort(&self, raw: RawAbort) -> Result<Abort, Status> {
        let RawAbort { sqid, cid } = raw;
        if sqid == 0 {
            return Ok(Abort::Admin { cid });
        }
        match self.sqs.get(usize::from(sqid) - 1) {
            Some(Some(sq)) => Ok(Abort::Io {
                cqid: sq.cqid,
                sqid,
                cid,
            }),
            _ => Err(Status::INVALID_FIELD),
        }
    }
}

/// The place of an I/O queue. Queue 0 is the admin queue, which is made and deleted by other means.
fn slot<T>(all: &mut [Option<T>], qid: u16, granted: u16) -> Result<&mut Option<T>, Status> {
    if qid == 0 || qid > granted {
        return Err(Status::QUEUE_ID);
    }
    all.get_mut(usize::from(qid) - 1).ok_or(Status::QUEUE_ID)
}

#[cfg(test)]
mod tests;
