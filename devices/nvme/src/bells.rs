//! Doorbells by descriptor: a host's kernel stores the value, and signals an event (vfio-user, "region I/O descriptors").
//!
//! ```text
//!   host's write --> its kernel: store in the doorbell's register (the file), then the event
//!                                                                            |
//!             Bell, an actor on a reactor <-- epoll, edge by edge -----------'
//!                  '--> the workers of its queues, by Routes
//! ```
//!
//! # Who is offered what
//! *Controllers whose queues sleep* (`adaptive`, `never`). One that always polls has its doorbells mapped, and nobody to wake.
//! *Only with memory for the value* (libvfio-user's "shadow ioeventfd"). A plain ioeventfd loses what was written. It would be
//! right only while the host keeps shadow doorbells, which begin when its driver gives buffers, end with any reset, and never come with firmware and some
//! drivers; whoever sets events up, before a driver is there, knows nothing of that. So none is offered, and a client without
//! the other kind sends messages as before.
//! *I/O queues*, up to [`QUEUES`]. Doorbells of the admin queues and of queues beyond are messages: they are rare, or many
//! more than a hypervisor has places for.
//!
//! # Why no ring is lost
//! The value is in the register before the event is signalled, and an actor that is called for the event comes after both (epoll's
//! lock). It wakes the workers, and a worker looks at its doorbells after each wake, before it sleeps. The edge of an event that comes
//! meanwhile is kept by epoll. An event is never read: a host has the same open file, and could have a read block.
//!
//! # What is shared out
//! At most [`EVENTS`] events, as one message has room for 16 descriptors and the memory is one of them. Queues share them by number, so that
//! queues of one event have workers on one reactor, where a host pairs its queues as drivers do; the event is watched there.
//!
//! # What a host can do with them
//! Signal at will: once in a reactor's look at its descriptors, at most [`QUEUES`] wakes come of it. Store at will: each value is checked by its
//! queue. Keep them after its end: they are watched no longer, and the next host's registers are in another file, which is made
//! before this one is given away.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use bluff_pci::{IoEvent, IoStore};
use bluff_reactor::{Actor, Context, Event, Handle, Poll, Turn, Waker};
use rustix::event::EventfdFlags;

use crate::controller::Core;
use crate::queue::{Doorbells, OFFSET, Side};
use crate::worker::WorkerHandle;

/// Events of one controller at most: with the memory as many descriptors as vfio-user has in a message.
const EVENTS: u16 = 15;
/// I/O queues whose doorbells are offered at most. A virtual machine has 1000 places for such registers in all (KVM).
const QUEUES: u16 = 256;
/// How often doorbells are looked after whose event cannot be watched.
const LOOK_AFTER: Duration = Duration::from_millis(1);

/// The events of a controller, for one host.
#[derive(Debug)]
pub(crate) struct Bells {
    events: Vec<Arc<OwnedFd>>,
    /// The actors that watch them.
    actors: Vec<(Handle, Arc<OnceLock<Waker>>)>,
    queues: u16,
    /// The registers of the next host.
    next: Arc<Doorbells>,
}

impl Bells {
    /// Events for so many I/O queues, watched on these reactors from now on.
    ///
    /// # Errors
    /// Where there are no descriptors, or is no memory.
    pub(crate) fn new(core: &Arc<Core>, queues: u16, reactors: &[Handle]) -> io::Result<Self> {
        let next = Doorbells::new(u32::from(queues) + 1)?;
        let queues = queues.min(QUEUES);
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let event = |_| Ok(Arc::new(rustix::event::eventfd(0, flags)?));
        let count = events(queues, reactors.len());
        let events: Vec<_> = (0..count).map(event).collect::<io::Result<_>>()?;
        let mut actors = Vec::new();
        for (index, event) in events.iter().enumerate() {
            let bell = Bell {
                core: Arc::downgrade(core),
                first: index + 1,
                step: events.len(),
                last: usize::from(queues),
                event: event.clone(),
                is_watched: false,
            };
            let reactor = &reactors[index % reactors.len()];
            let waker = Arc::new(OnceLock::new());
            actors.push((reactor.clone(), waker.clone()));
            reactor.send(move |cx| bell.begin(cx, &waker));
        }
        Ok(Self {
            events,
            actors,
            queues,
            next,
        })
    }

    /// The doorbells that can be rung by them; `now`: where the registers of this host are.
    pub(crate) fn io_events(&self, now: &Doorbells) -> Vec<IoEvent> {
        let mut all = Vec::new();
        for qid in 1..=self.queues {
            let index = usize::from(qid - 1) % self.events.len();
            for side in [Side::Tail, Side::Head] {
                let at = Doorbells::offset(qid, side);
                let area = now.area();
                all.push(IoEvent {
                    offset: OFFSET + at,
                    len: 4,
                    value: None,
                    event: self.events[index].clone(),
                    store: Some(IoStore {
                        file: area.file.clone(),
                        offset: area.file_offset + at,
                    }),
                });
            }
        }
        all
    }

    /// The host has gone: the registers of the next one.
    pub(crate) fn into_next(self) -> Arc<Doorbells> {
        self.next.clone()
    }
}

impl Drop for Bells {
    fn drop(&mut self) {
        for (reactor, waker) in self.actors.drain(..) {
            // After the message that began it.
            reactor.send(move |cx| {
                if let Some(waker) = waker.get() {
                    cx.remove(waker.actor());
                }
            });
        }
    }
}

/// How many events so many queues share. A multiple of the reactors, where there is room for that: queues go round these, too.
fn events(queues: u16, reactors: usize) -> u16 {
    let most = queues.min(EVENTS);
    match u16::try_from(reactors) {
        Ok(reactors) if reactors <= most => most - most % reactors,
        _ => most,
    }
}

/// Watches one event.
struct Bell {
    core: Weak<Core>,
    /// Its queues: every `step`th one from the first to the last.
    first: usize,
    step: usize,
    last: usize,
    event: Arc<OwnedFd>,
    is_watched: bool,
}

impl Bell {
    fn begin(mut self, cx: &mut Context<'_>, waker: &OnceLock<Waker>) {
        cx.insert(Poll::Never, |cx, id| {
            let _ = waker.set(cx.waker(id));
            // Edge by edge, since nobody reads it.
            let edges = epoll::Events::EPOLLIN | epoll::Events::EPOLLET;
            let watched = cx.register(self.event.as_raw_fd(), 0, edges);
            self.is_watched = watched.is_ok();
            if let Err(e) = watched {
                log::warn!("an event of doorbells cannot be watched: {e}");
                cx.timer(id, cx.now() + LOOK_AFTER, 0);
            }
            Box::new(self)
        });
    }

    /// Wakes the workers of its queues, each once as far as they are neighbours.
    fn ring(&self) {
        let Some(core) = self.core.upgrade() else {
            return;
        };
        let mut last: Option<Arc<WorkerHandle>> = None;
        let routes = core.routes();
        for qid in (self.first..=self.last).step_by(self.step) {
            for worker in [&routes.tails[qid], &routes.heads[qid]]
                .into_iter()
                .flatten()
            {
                if !last.as_ref().is_some_and(|l| Arc::ptr_eq(l, worker)) {
                    worker.ring();
                    last = Some(worker.clone());
                }
            }
        }
    }
}

impl Actor for Bell {
    fn event(&mut self, cx: &mut Context<'_>, event: Event) {
        self.ring();
        if matches!(event, Event::Timer { .. }) && !self.is_watched {
            cx.timer(cx.id(), cx.now() + LOOK_AFTER, 0);
        }
    }

    fn turn(&mut self, _: &mut Context<'_>) -> Turn {
        Turn::Idle
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn queues_of_one_event_are_on_one_reactor() {
        for queues in 1..=1023u16 {
            for reactors in 1..=20usize {
                let n = usize::from(events(queues.min(QUEUES), reactors));
                assert!(
                    (1..=usize::from(EVENTS)).contains(&n),
                    "{queues} {reactors}"
                );
                if reactors > n {
                    continue;
                }
                for queue in 0..usize::from(queues.min(QUEUES)) {
                    // As the admin worker has them.
                    assert_eq!(queue % n % reactors, queue % reactors);
                }
            }
        }
    }
}
