//! The loop that serves every session of the data half, on one thread.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bluff_attachment::Watched;
use bluff_pci::PciFunction;
use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};

use crate::attachment::{Attachment, Options, Resume};
use crate::function::PciTarget;
use crate::mailbox::{Id, Letter, Mailbox};
use crate::session::Session;
use crate::slot::{BUFFER, Slot};

/// How often memory is looked after: a client that shrinks it is ended this late at most.
const LOOK: Duration = Duration::from_secs(1);

/// Reaches the loop from any thread.
#[derive(Clone, Debug)]
pub struct LoopHandle {
    mailbox: Arc<Mailbox>,
}

impl LoopHandle {
    /// Adds an attachment, and waits until it takes connections.
    ///
    /// # Errors
    /// `AlreadyExists` where the name is taken; `BrokenPipe` where the loop has ended.
    pub fn add(&self, attachment: Attachment) -> io::Result<()> {
        let (answer, question) = sync_channel(1);
        self.mailbox.post(Letter::Add(Box::new(attachment), answer));
        question
            .recv()
            .unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))
    }

    /// Ends a session within the bound and takes its attachment away; `then` gets the function, as after power on, on the
    /// loop's thread. Where there is no such attachment `then` is dropped.
    pub fn remove(&self, name: &str, then: impl FnOnce(Box<dyn PciFunction>) + Send + 'static) {
        self.mailbox
            .post(Letter::Remove(name.into(), Box::new(then)));
    }

    /// Gives an attachment a connection, with what was recorded of its session, if it has one already;
    /// where another client is there, or no such attachment, it is closed.
    pub fn connection(&self, name: &str, resume: Resume) {
        self.mailbox
            .post(Letter::Connection(name.into(), Box::new(resume)));
    }

    /// The keeper has recorded, consumed and replied what it answered [`Progress::Later`] to.
    ///
    /// [`Progress::Later`]: crate::keeper::Progress::Later
    pub fn committed(&self, name: &str, seq: u64) {
        self.mailbox.post(Letter::Committed(name.into(), seq));
    }
}

/// The loop's thread. Dropping it ends all sessions within their bounds.
#[derive(Debug)]
pub struct SessionLoop {
    mailbox: Arc<Mailbox>,
    thread: Option<JoinHandle<()>>,
}

impl SessionLoop {
    /// Starts the thread.
    ///
    /// # Errors
    /// Where descriptors or threads are used up.
    pub fn spawn() -> io::Result<Self> {
        let mailbox = Arc::new(Mailbox::new()?);
        let mut manager = EventManager::new().map_err(io::Error::other)?;
        let id = manager.add_subscriber(Driver::new(mailbox.clone()));
        let thread = std::thread::Builder::new()
            .name("vfio-user".into())
            .spawn({
                let mailbox = mailbox.clone();
                move || turn(manager, id, &mailbox)
            })?;
        Ok(Self {
            mailbox,
            thread: Some(thread),
        })
    }

    /// To reach it from any thread.
    pub fn handle(&self) -> LoopHandle {
        LoopHandle {
            mailbox: self.mailbox.clone(),
        }
    }
}

impl Drop for SessionLoop {
    fn drop(&mut self) {
        self.mailbox.post(Letter::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic there was printed there.
            let _ = thread.join();
        }
    }
}

fn turn(mut manager: EventManager<Driver>, id: SubscriberId, mailbox: &Mailbox) {
    loop {
        let Ok(driver) = manager.subscriber_mut(id) else {
            return;
        };
        if driver.is_finished() {
            return;
        }
        // One more, so that the deadline has passed when the wait is over.
        let timeout = driver
            .timeout(Instant::now())
            .map_or(-1, |t| i32::try_from(t.as_millis() + 1).unwrap_or(i32::MAX));
        match manager.run_with_timeout(timeout) {
            // The deadlines are looked at whenever there is a letter.
            Ok(0) => mailbox.ring(),
            Ok(_) => {}
            Err(e) => {
                log::error!("vfio-user sessions end: {e}");
                return;
            }
        }
    }
}

/// Every attachment, and what the epoll knows of them.
struct Driver {
    mailbox: Arc<Mailbox>,
    slots: HashMap<Id, Slot>,
    names: HashMap<String, Id>,
    watched: Watched<Id, ()>,
    buffer: Vec<u8>,
    next_id: Id,
    looked: Instant,
    stopping: bool,
}

impl Driver {
    fn new(mailbox: Arc<Mailbox>) -> Self {
        Self {
            mailbox,
            slots: HashMap::new(),
            names: HashMap::new(),
            watched: Watched::default(),
            buffer: vec![0; BUFFER],
            next_id: 1,
            looked: Instant::now(),
            stopping: false,
        }
    }

    fn is_finished(&self) -> bool {
        self.stopping && self.slots.is_empty()
    }

    fn timeout(&self, now: Instant) -> Option<Duration> {
        let look = self.slots.values().any(Slot::is_connected);
        look.then(|| (self.looked + LOOK).saturating_duration_since(now))
    }

    fn letter(&mut self, letter: Letter, now: Instant, ops: &mut EventOps) {
        match letter {
            Letter::Finished(id, ticket) => {
                self.with(id, ops, |slot| slot.finished(ticket, now));
            }
            Letter::Event(id, event) => {
                self.with(id, ops, |slot| slot.function_event(event, now));
            }
            Letter::Connection(name, resume) => {
                if let Some(id) = self.names.get(&name).copied() {
                    self.with(id, ops, |slot| slot.given(*resume, now));
                }
            }
            Letter::Committed(name, seq) => {
                if let Some(id) = self.names.get(&name).copied() {
                    self.with(id, ops, |slot| slot.committed(seq));
                }
            }
            Letter::Remove(name, then) => {
                if let Some(id) = self.names.get(&name).copied() {
                    self.with(id, ops, |slot| slot.remove(then));
                }
            }
            Letter::Add(attachment, answer) => {
                // Whoever asked may have lost interest.
                let _ = answer.send(self.add(*attachment));
            }
            Letter::Stop => {
                self.stopping = true;
                for id in self.slots.keys().copied().collect::<Vec<_>>() {
                    self.with(id, ops, |slot| slot.remove(Box::new(drop)));
                }
            }
        }
    }

    fn with(&mut self, id: Id, ops: &mut EventOps, act: impl FnOnce(&mut Slot)) {
        if let Some(slot) = self.slots.get_mut(&id) {
            act(slot);
            self.settle(id, ops);
        }
    }

    fn add(&mut self, attachment: Attachment) -> io::Result<()> {
        if self.stopping {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if self.names.contains_key(&attachment.name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let id = self.next_id;
        self.next_id += 1;
        let Attachment {
            name,
            mut function,
            options,
            events,
            counters,
        } = attachment;
        let Options {
            bound,
            limits,
            keeper,
        } = options;
        let mailbox = self.mailbox.clone();
        function.on_event(Arc::new(move |event| {
            mailbox.post(Letter::Event(id, event));
        }));
        let mailbox = self.mailbox.clone();
        let finish = Arc::new(move |ticket| mailbox.post(Letter::Finished(id, ticket)));
        let target = PciTarget::new(function, limits, bound, finish);
        let session = Session::counted(target, limits, counters);
        self.slots
            .insert(id, Slot::new(name.clone(), session, keeper, events));
        self.names.insert(name, id);
        Ok(())
    }

    /// Brings the epoll to what a slot wants now.
    fn settle(&mut self, id: Id, ops: &mut EventOps) {
        let Some(slot) = self.slots.get_mut(&id) else {
            return;
        };
        let wants = slot.interests();
        self.watched.forget(id, &wants, ops);
        slot.bury();
        self.watched.watch(id, &wants, ops);
        if slot.is_removed()
            && let Some(slot) = self.slots.remove(&id)
        {
            self.names.remove(slot.name());
            slot.finish();
        }
    }

    fn tick(&mut self, now: Instant, ops: &mut EventOps) {
        if now.saturating_duration_since(self.looked) < LOOK {
            return;
        }
        self.looked = now;
        for id in self.slots.keys().copied().collect::<Vec<_>>() {
            self.with(id, ops, |slot| slot.tick(now));
        }
    }
}

impl MutEventSubscriber for Driver {
    fn init(&mut self, ops: &mut EventOps) {
        let events = Events::new_raw(self.mailbox.fd(), EventSet::IN);
        ops.add(events).expect("a fresh epoll takes a descriptor");
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let now = Instant::now();
        let fd = events.fd().as_raw_fd();
        if fd == self.mailbox.fd() {
            for letter in self.mailbox.empty() {
                self.letter(letter, now, ops);
            }
        } else if let Some((id, ())) = self.watched.whose(fd) {
            if let Some(slot) = self.slots.get_mut(&id) {
                slot.ready(events.event_set(), &mut self.buffer, now);
            }
            self.settle(id, ops);
        }
        self.tick(now, ops);
    }
}
