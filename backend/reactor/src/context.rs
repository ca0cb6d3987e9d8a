//! What an actor or a message sees of its reactor.

use std::io;
use std::os::fd::RawFd;
use std::time::Instant;

use crate::core::Inner;
use crate::{Actor, ActorId, Handle, Poll, Uring, Waker};

/// Why an actor is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A descriptor that it registered is ready.
    Ready {
        /// The number that it registered it under.
        token: u16,
        /// What it is ready for, as `EPOLLIN` and so on.
        events: u32,
    },
    /// A timer ran out.
    Timer {
        /// The number that it was set with.
        token: u16,
    },
    /// Its waker was used.
    Woken,
}

/// What a turn did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Something; there may be more.
    Worked,
    /// Nothing was there.
    Idle,
    /// It has come to its end: the reactor drops it.
    Done,
}

/// A reactor, as an actor or a message on it sees it.
pub struct Context<'a> {
    pub(crate) inner: &'a mut Inner,
    pub(crate) current: Option<ActorId>,
}

impl Context<'_> {
    /// The reactor's clock. It stands still during a turn and is a few microseconds late while the
    /// reactor polls.
    pub fn now(&self) -> Instant {
        self.inner.now
    }

    /// Adds an actor, which is active at first. `build` runs at once, with the new actor as the
    /// current one.
    pub fn insert(
        &mut self,
        poll: Poll,
        build: impl FnOnce(&mut Context<'_>, ActorId) -> Box<dyn Actor>,
    ) -> ActorId {
        let id = self.inner.reserve(poll);
        let actor = build(
            &mut Context {
                inner: self.inner,
                current: Some(id),
            },
            id,
        );
        self.inner.fill(id, actor);
        id
    }

    /// The actor that is being called.
    ///
    /// # Panics
    /// In a message, which has none.
    pub fn id(&self) -> ActorId {
        self.current.expect("called by an actor")
    }

    /// A waker for an actor here.
    pub fn waker(&self, actor: ActorId) -> Waker {
        Waker {
            shared: self.inner.shared.clone(),
            actor,
        }
    }

    /// Makes an actor here active, with [`Event::Woken`] before its next turn.
    pub fn wake(&mut self, actor: ActorId) {
        self.inner.woken.push(actor);
    }

    /// Drops an actor after the present call; nothing happens where it is gone.
    pub fn remove(&mut self, actor: ActorId) {
        self.inner.removed.push(actor);
    }

    /// Watches a descriptor for the current actor. It stays the caller's, who keeps it open until it
    /// is unregistered or the actor is gone.
    ///
    /// # Errors
    /// Where epoll refuses it (a file that cannot be watched, no memory).
    pub fn register(&mut self, fd: RawFd, token: u16, events: epoll::Events) -> io::Result<()> {
        let id = self.id();
        self.inner.register(id, fd, token, events)
    }

    /// Stops watching a descriptor of the current actor.
    pub fn unregister(&mut self, fd: RawFd) {
        let id = self.id();
        self.inner.unregister(id, fd);
    }

    /// Gives `actor` an [`Event::Timer`] at `at`. It cannot be taken back: who does not want it any
    /// more ignores it.
    pub fn timer(&mut self, actor: ActorId, at: Instant, token: u16) {
        self.inner.set_timer(at, actor, token);
    }

    /// The reactor's io_uring, where it has one.
    pub fn uring(&self) -> Option<Uring> {
        self.inner.uring.clone()
    }

    /// A handle for other threads.
    pub fn handle(&self) -> Handle {
        Handle::new(self.inner.shared.clone())
    }
}
