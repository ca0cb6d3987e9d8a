//! How a queue's driver reaches it, and how it reaches its driver.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bluff_reactor::Context;
use vmm_sys_util::eventfd::EventFd;

use crate::{DeviceEvent, Notice, Notifier, QueueSetup, RingError};

/// How often a ring without a kick descriptor is looked at while it is idle.
const UNTOLD: Duration = Duration::from_millis(1);

/// Says what happened to a queue.
pub type Tell = Arc<dyn Fn(DeviceEvent) + Send + Sync>;

/// What goes over a queue's line. Only its worker writes, with plain loads and stores; readers may be a moment late.
#[derive(Debug, Default)]
pub struct LineCounters {
    /// Notifications from the driver.
    pub kicks: AtomicU64,
    /// Notifications to the driver.
    pub interrupts: AtomicU64,
    /// Notifiers given up, because they blocked.
    pub hung: AtomicU64,
}

/// Adds to a counter that the calling thread alone writes.
fn add(cell: &AtomicU64, n: u64) {
    let value = cell.load(Ordering::Relaxed).wrapping_add(n);
    cell.store(value, Ordering::Relaxed);
}

/// The notifications of one queue, both ways. It belongs to the queue's worker, on its reactor.
pub struct Line {
    index: u16,
    kick: Option<EventFd>,
    call: Option<Notifier>,
    error: Option<Notifier>,
    counters: Arc<LineCounters>,
    tell: Tell,
}

impl Line {
    /// The token under which kicks come to the worker, as [`bluff_reactor::Event::Ready`].
    pub const KICK: u16 = 0;

    /// Takes the descriptors out of `setup`, for the actor that is being built.
    pub(crate) fn new(
        cx: &mut Context<'_>,
        setup: &mut QueueSetup,
        counters: Arc<LineCounters>,
        tell: Tell,
    ) -> Self {
        let mut this = Self {
            index: setup.index,
            kick: None,
            call: setup.call.take(),
            error: setup.error.take(),
            counters,
            tell,
        };
        this.set_kick(cx, setup.kick.take());
        this
    }

    /// Which queue it is.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// A kick has come.
    pub fn kicked(&self) {
        add(&self.counters.kicks, 1);
    }

    /// Notifies the driver.
    pub fn notify(&self) {
        match self.call.as_ref().map(Notifier::notify) {
            Some(Notice::Given) => add(&self.counters.interrupts, 1),
            Some(Notice::Hung) => self.hung(),
            Some(Notice::Dropped) | None => {}
        }
    }

    /// A notifier has blocked. Our attachment says so: it knows how often that may be said.
    #[cold]
    fn hung(&self) {
        add(&self.counters.hung, 1);
        (self.tell)(DeviceEvent::NotifierHung(self.index));
    }

    /// Another kick descriptor. The ring has to be looked at: what came on the old one is not lost.
    pub fn set_kick(&mut self, cx: &mut Context<'_>, kick: Option<EventFd>) {
        self.hang_up(cx);
        let Some(kick) = kick else { return };
        // Edge-triggered, and never read: each write to an eventfd is an edge, whatever it counts. So a kick costs
        // no system call, and a descriptor that is none, or that a hostile front end made blocking, cannot
        // hold the reactor or have it spin.
        let events = epoll::Events::EPOLLIN | epoll::Events::EPOLLET;
        match cx.register(kick.as_raw_fd(), Self::KICK, events) {
            Ok(()) => self.kick = Some(kick),
            // The ring is polled from now on, as without a descriptor.
            Err(e) => log::debug!(
                "queue {}: kick descriptor cannot be watched: {e}",
                self.index
            ),
        }
    }

    /// Another call descriptor. The driver may have been told on the one before and not have heard it, so it is told again.
    pub fn set_call(&mut self, call: Option<Notifier>) {
        self.call = call;
        self.notify();
    }

    /// Another error descriptor.
    pub fn set_error(&mut self, error: Option<Notifier>) {
        self.error = error;
    }

    /// Listens to the driver no more.
    pub fn hang_up(&mut self, cx: &mut Context<'_>) {
        if let Some(old) = self.kick.take() {
            cx.unregister(old.as_raw_fd());
        }
    }

    /// Called when the worker goes to sleep: where nobody tells, it is woken now and then. Who wants more says `poll = "always"`.
    pub fn doze(&self, cx: &mut Context<'_>) {
        if self.kick.is_none() {
            let at: Instant = cx.now() + UNTOLD;
            cx.timer(cx.id(), at, 0);
        }
    }

    /// The ring cannot be used any more.
    pub fn broken(&self, e: &RingError) {
        self.failed(e.to_string().into());
    }

    pub(crate) fn failed(&self, cause: Arc<str>) {
        if self.error.as_ref().map(Notifier::notify) == Some(Notice::Hung) {
            self.hung();
        }
        (self.tell)(DeviceEvent::QueueBroken {
            queue: self.index,
            cause,
        });
    }
}
