//! What the loop of sessions serves.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Instant;

use event_manager::EventSet;

/// Has something done with a function that was taken off the loop.
pub type Removed<F> = Box<dyn FnOnce(F) + Send>;

/// Tells a slot something, from any thread; where it is gone, nobody.
pub type Post<N> = Arc<dyn Fn(N) + Send + Sync>;

/// One attachment on the loop: its connection, its session, its function.
///
/// A slot never waits and touches no epoll: after whatever was done to one, the loop asks what it wants to be woken for
/// ([`Attached::interests`]) and compares that with what is registered.
pub trait Attached: Send + Sized + 'static {
    /// The name of the loop's thread, also in the log.
    const PROTOCOL: &'static str;
    /// Bytes of the buffer that all slots of a loop read into.
    const BUFFER: usize = 0;

    /// What a slot is made of.
    type Attachment: Send;
    /// What is given back in the end.
    type Function;
    /// A connection, with what was recorded of its session.
    type Resume: Send;
    /// What other threads tell it.
    type News: Send;
    /// Which of its descriptors.
    type Role: Copy + PartialEq + Send;

    /// A slot that waits for a connection; its function may `post` from now on.
    fn new(attachment: Self::Attachment, post: Post<Self::News>) -> Self;

    /// The attachment's name.
    fn name(&self) -> &str;

    /// What the slot wants to be woken for.
    fn interests(&mut self) -> Vec<(Self::Role, RawFd, EventSet)>;

    /// Closes what is over. Called when no descriptor that is not among the interests is waited for: a
    /// keeper may hold the same connection, and an epoll would go on reporting it.
    fn bury(&mut self);

    /// Whether memory has to be looked after.
    fn is_connected(&self) -> bool;

    /// One of its descriptors is ready. What is in `buffer` is another slot's after that.
    fn ready(&mut self, role: Self::Role, set: EventSet, buffer: &mut [u8], now: Instant);

    /// Somebody has posted.
    fn news(&mut self, news: Self::News, now: Instant);

    /// Takes up a connection, in mid-session where one is recorded.
    fn given(&mut self, resume: Self::Resume, now: Instant);

    /// The keeper has done the step numbered `seq`.
    fn committed(&mut self, seq: u64, now: Instant);

    /// Time has passed, and some slot is connected: memory is looked after.
    fn tick(&mut self, now: Instant);

    /// The function goes to `removal` when nothing of a connection is left.
    fn remove(&mut self, removal: Removed<Self::Function>, now: Instant);

    /// Whether a slot that is to be removed can go.
    fn is_removed(&self) -> bool;

    /// Gives the function back.
    fn finish(self);
}
