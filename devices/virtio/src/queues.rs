//! The queues of a device, from outside: each is moved to its reactor, and is told there what is to change.

use std::fmt;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use bluff_reactor::{Actor, Context, Event, Handle, Poll, Turn, Waker};

use crate::inflight::InflightQueue;
use crate::line::{Line, LineCounters, Tell};
use crate::{DeviceError, QueueChange, QueueSetup, Stop, StoppedQueue};

/// Called when a queue has stopped.
pub type Stopped = Box<dyn FnOnce(Option<StoppedQueue>) + Send>;

/// What a device tells the worker of a queue.
pub enum Message {
    /// A change.
    Change(QueueChange),
    /// The end.
    Stop(Stop, Stopped),
}

impl Stop {
    /// Whether it is a reset: what is recorded as in flight is dropped too.
    pub fn drops(&self) -> bool {
        !self.leave && !self.answer
    }
}

/// What a worker is built around.
pub struct Wiring {
    /// Its notifications.
    pub line: Line,
    /// What it is told. The worker is woken when there is something.
    pub mailbox: Receiver<Message>,
}

/// A queue that runs, from outside.
struct Running {
    reactor: Handle,
    sender: Sender<Message>,
    /// Set when the worker is built; messages to a reactor are in order, so it is set when it is
    /// looked at there.
    waker: Arc<OnceLock<Waker>>,
}

impl Running {
    fn send(&self, message: Message) {
        // Fails where the worker has ended by itself; then the message is dropped, and with it what
        // waits for an answer.
        let _ = self.sender.send(message);
        let waker = self.waker.clone();
        self.reactor.send(move |cx| {
            if let Some(waker) = waker.get() {
                cx.wake(waker.actor());
            }
        });
    }
}

type Listener = Arc<Mutex<Option<Tell>>>;

/// The queues of a device.
pub struct Queues {
    running: Vec<Option<Running>>,
    listener: Listener,
}

impl fmt::Debug for Queues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Queues({})", self.running.len())
    }
}

impl Queues {
    /// So many, none of which runs.
    pub fn new(count: u16) -> Self {
        Self {
            running: (0..count).map(|_| None).collect(),
            listener: Listener::default(),
        }
    }

    /// Who is told of events; replaces the one before.
    pub fn on_event(&mut self, listener: Tell) {
        *self
            .listener
            .lock()
            .expect("listeners are called without the lock") = Some(listener);
    }

    /// Tells the listener that there is at that time.
    pub fn teller(&self) -> Tell {
        let listener = self.listener.clone();
        Arc::new(move |event| {
            let to = listener
                .lock()
                .expect("listeners are called without the lock")
                .clone();
            if let Some(to) = to {
                to(event);
            }
        })
    }

    /// Whether a queue could be started.
    ///
    /// # Errors
    /// [`DeviceError::Queue`], [`DeviceError::Started`].
    pub fn check(&self, index: u16) -> Result<(), DeviceError> {
        match self.running.get(usize::from(index)) {
            None => Err(DeviceError::Queue(index)),
            Some(Some(_)) => Err(DeviceError::Started(index)),
            Some(None) => Ok(()),
        }
    }

    /// Moves a queue to its reactor, where `build` makes its worker. Where it cannot, the front end is told
    /// ([`crate::DeviceEvent::QueueBroken`]), and something stands in for the worker until it is stopped.
    ///
    /// # Errors
    /// As [`Queues::check`].
    pub fn start<E: fmt::Display>(
        &mut self,
        reactor: &Handle,
        poll: Poll,
        mut setup: QueueSetup,
        counters: Arc<LineCounters>,
        build: impl FnOnce(&mut Context<'_>, QueueSetup, Wiring) -> Result<Box<dyn Actor>, (E, Wiring)>
        + Send
        + 'static,
    ) -> Result<(), DeviceError> {
        self.check(setup.index)?;
        let (sender, mailbox) = mpsc::channel();
        let waker = Arc::new(OnceLock::new());
        self.running[usize::from(setup.index)] = Some(Running {
            reactor: reactor.clone(),
            sender,
            waker: waker.clone(),
        });
        let tell = self.teller();
        reactor.send(move |cx| {
            cx.insert(poll, |cx, id| {
                let _ = waker.set(cx.waker(id));
                let line = Line::new(cx, &mut setup, counters, tell);
                let record = setup.inflight.clone();
                match build(cx, setup, Wiring { line, mailbox }) {
                    Ok(worker) => worker,
                    Err((e, mut wiring)) => {
                        wiring.line.hang_up(cx);
                        wiring
                            .line
                            .failed(format!("it cannot be started: {e}").into());
                        Box::new(Failed {
                            mailbox: wiring.mailbox,
                            record,
                            stopped: false,
                        })
                    }
                }
            });
        });
        Ok(())
    }

    /// As [`crate::VirtioDevice::change_queue`].
    pub fn change(&mut self, index: u16, change: QueueChange) {
        match self.running.get(usize::from(index)) {
            Some(Some(queue)) => queue.send(Message::Change(change)),
            _ => skip(change),
        }
    }

    /// As [`crate::VirtioDevice::stop_queue`].
    pub fn stop(&mut self, index: u16, stop: Stop, done: Stopped) {
        let place = self.running.get_mut(usize::from(index));
        match place.and_then(Option::take) {
            Some(queue) => queue.send(Message::Stop(stop, done)),
            None => done(None),
        }
    }
}

impl Drop for Queues {
    /// Queues that still run are told to end, and not waited for. They write nothing to their rings any more; what is
    /// recorded as in flight stays so.
    fn drop(&mut self) {
        let stop = Stop {
            bound: Duration::ZERO,
            leave: true,
            answer: false,
        };
        for queue in self.running.iter_mut().filter_map(Option::take) {
            queue.send(Message::Stop(stop, Box::new(drop)));
        }
    }
}

/// Answers a change that no queue is there for.
fn skip(change: QueueChange) {
    match change {
        QueueChange::Memory { done, .. } | QueueChange::Log { done, .. } => done(),
        QueueChange::Kick(_)
        | QueueChange::Call(_)
        | QueueChange::Error(_)
        | QueueChange::Enable(_) => {}
    }
}

/// A queue that could not be started: it answers until it is stopped.
struct Failed {
    mailbox: Receiver<Message>,
    record: Option<InflightQueue>,
    stopped: bool,
}

impl Actor for Failed {
    fn event(&mut self, _: &mut Context<'_>, _: Event) {
        while let Ok(message) = self.mailbox.try_recv() {
            match message {
                Message::Change(change) => skip(change),
                Message::Stop(stop, done) => {
                    self.stopped = true;
                    if let Some(record) = &self.record
                        && stop.drops()
                    {
                        record.forget();
                    }
                    done(None);
                }
            }
        }
    }

    fn turn(&mut self, _: &mut Context<'_>) -> Turn {
        if self.stopped { Turn::Done } else { Turn::Idle }
    }
}
