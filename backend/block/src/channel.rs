//! One volume on one reactor.

use std::time::Instant;

use crate::{Completion, Op, Tag};

/// What became of a wish to cancel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancel {
    /// Its completion will come with the next [`Channel::poll`], and nothing touches its buffers
    /// after that completion was polled. It may also have been finished just before.
    Soon,
    /// It cannot be taken back; its completion comes when it is finished.
    Never,
    /// No operation with this tag is in flight.
    Unknown,
}

/// One volume on one reactor: submit, kick, poll.
///
/// # Contract
/// - The submitter has checked every operation with [`Op::check`] against the geometry that the volume had then; a
///   channel refuses what has become wrong since (a volume that was made smaller) with an error
///   completion, never with a panic.
/// - Each accepted operation is completed exactly once, in any order. An error is a completion.
/// - Operations in flight are not ordered, not even overlapping ones. What order the host wants it
///   makes by waiting; a [`crate::Kind::Flush`] covers what was *completed* before it was submitted.
/// - What was finished inside of `submit`, `kick` or `cancel` is there for the next `poll` and wakes
///   nobody; what is finished later wakes the reactor, unless a `poll` has handed it out before.
/// - Whoever submits polls soon after, in the same turn: a channel that depends on time learns it there.
/// - Whoever is woken polls the channel, also where nothing of its own is in flight: others may wait
///   for what only that poll finds out (a cancelled write that the kernel has let go of).
/// - Buffers are touched only between submission and the poll that hands out the completion.
/// - No call blocks for storage: slow work happens elsewhere and wakes the reactor through the
///   [`crate::OpenContext`].
/// - Dropping a channel ends what it has in flight without completions, as if it were cancelled: nothing
///   touches its buffers afterwards.
pub trait Channel {
    /// Takes operations from the front of `ops` and says how many. What it is too busy for stays
    /// with the caller, who offers it again after a completion. Never 0 while nothing is in flight.
    fn submit(&mut self, ops: &[Op]) -> usize;

    /// Passes on what was submitted: one system call or doorbell for all of it. A channel may begin earlier.
    fn kick(&mut self);

    /// Appends what has been finished to `done`. `now` is the reactor's clock: a channel that
    /// depends on time reads no other.
    fn poll(&mut self, now: Instant, done: &mut Vec<Completion>);

    /// Asks for an operation to end early. The completion still comes, with
    /// [`crate::BlockError::Cancelled`] or whatever it ended with.
    fn cancel(&mut self, tag: Tag) -> Cancel;

    /// When to poll again although nothing woke the reactor.
    fn deadline(&self) -> Option<Instant> {
        None
    }
}
