//! Reactors: the threads of the data path.
//!
//! ```text
//!            messages, wakers          timers     epoll (one wait)   io_uring (one, among epoll's)
//!                    \                   |             /              /
//!                     v                  v            v              v
//!   Reactor: [ active actors: turn, turn, turn ... ]  [ armed actors: asleep ]
//! ```
//!
//! A reactor owns [`Actor`]s: queues, channels, listeners. An actor is built on its reactor's thread
//! and never leaves it, so it needs no lock. What is **active** has its [`Actor::turn`] called again
//! and again; what found nothing to do for a while ([`Poll`]) is asked to [`Actor::arm`] itself and
//! then left alone until a descriptor, a timer or a [`Waker`] concerns it. Actors are armed one by
//! one, so that quiet queues cost nothing while their neighbours are polled. When all are armed the
//! thread sleeps in epoll, its io_uring among the descriptors there.
//!
//! What a reactor has to tell a host goes through a [`Notifier`], which a host that blocks its descriptor cannot hold.
//!
//! Where the kernel forbids io_uring, [`Context::uring`] is `None` and backends use threads.
//!
//! Not implemented: moving an actor between reactors. What moves is what it was built from.

mod context;
mod core;
mod glance;
mod handle;
mod notifier;
mod offload;
mod options;
mod uring;
mod watchdog;

pub use self::core::Reactor;
pub use context::{Context, Event, Turn};
pub use glance::Glance;
pub use handle::{Counters, Handle, Waker};
pub use notifier::{Distrust, Notice, Notifier};
pub use offload::Offload;
pub use options::{Options, Poll, UringUse};
pub use uring::{Full, Port, Uring};

/// Something that lives on a reactor.
///
/// # Contract
/// No call blocks. A turn does a bounded amount of work; who has more says [`Turn::Worked`] and is
/// called again after its neighbours.
pub trait Actor {
    /// A descriptor is ready, a timer ran out, or a waker was used. The actor is active after this.
    fn event(&mut self, cx: &mut Context<'_>, event: Event) {
        let _ = (cx, event);
    }

    /// Does some of the work that there is.
    fn turn(&mut self, cx: &mut Context<'_>) -> Turn;

    /// Turns notifications on and looks once more: `true` when there is nothing to do, and whatever
    /// comes from now on will wake it. `false` keeps it active.
    fn arm(&mut self, cx: &mut Context<'_>) -> bool {
        let _ = cx;
        true
    }
}

/// Names an actor on its reactor; never used twice there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ActorId {
    index: u32,
    generation: u32,
}
