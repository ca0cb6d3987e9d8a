//! The loop that serves every session of an attachment's kind, on one thread.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};

use crate::attached::{Attached, Removed};
use crate::mailbox::Mailbox;
use crate::watched::Watched;

/// How often memory is looked after: a host that shrinks it is ended this late at most.
const LOOK: Duration = Duration::from_secs(1);

/// Names a slot from its addition to its removal; never used twice.
type Id = u64;

/// What other threads can say to the loop.
enum Letter<S: Attached> {
    /// For a slot.
    News(Id, S::News),
    /// Take up an attachment; whether that went well is the answer.
    Add(Box<S::Attachment>, SyncSender<io::Result<()>>),
    /// End a session and give its function back; dropped where there is no such attachment.
    Remove(String, Removed<S::Function>),
    /// A connection for an attachment.
    Connection(String, Box<S::Resume>),
    /// A keeper has recorded.
    Committed(String, u64),
    /// End everything.
    Stop,
}

/// Reaches the loop from any thread.
pub struct LoopHandle<S: Attached> {
    mailbox: Arc<Mailbox<Letter<S>>>,
}

impl<S: Attached> LoopHandle<S> {
    /// Adds an attachment, and waits until it takes connections.
    ///
    /// # Errors
    /// `AlreadyExists` where the name is taken; `BrokenPipe` where the loop has ended.
    pub fn add(&self, attachment: S::Attachment) -> io::Result<()> {
        let (answer, question) = sync_channel(1);
        self.mailbox.post(Letter::Add(Box::new(attachment), answer));
        question
            .recv()
            .unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))
    }

    /// Ends a session within the bound and takes its attachment away; `then` gets the function, as it is without a host, on
    /// the loop's thread. Where there is no such attachment `then` is dropped.
    pub fn remove(&self, name: &str, then: impl FnOnce(S::Function) + Send + 'static) {
        self.mailbox
            .post(Letter::Remove(name.into(), Box::new(then)));
    }

    /// Gives an attachment a connection, with what was recorded of its session, if it has one already;
    /// where another is there, or no such attachment, it is closed.
    pub fn connection(&self, name: &str, resume: S::Resume) {
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

impl<S: Attached> Clone for LoopHandle<S> {
    fn clone(&self) -> Self {
        Self {
            mailbox: self.mailbox.clone(),
        }
    }
}

impl<S: Attached> fmt::Debug for LoopHandle<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LoopHandle").field(&S::PROTOCOL).finish()
    }
}

/// The loop's thread. Dropping it ends all sessions within their bounds.
#[derive(Debug)]
pub struct SessionLoop<S: Attached> {
    handle: LoopHandle<S>,
    thread: Option<JoinHandle<()>>,
}

impl<S: Attached> SessionLoop<S> {
    /// Starts the thread.
    ///
    /// # Errors
    /// Where descriptors or threads are used up.
    pub fn spawn() -> io::Result<Self> {
        let mailbox = Arc::new(Mailbox::new()?);
        let mut manager = EventManager::new().map_err(io::Error::other)?;
        let id = manager.add_subscriber(Driver::<S>::new(mailbox.clone()));
        let handle = LoopHandle { mailbox };
        let thread = std::thread::Builder::new()
            .name(S::PROTOCOL.into())
            .spawn({
                let handle = handle.clone();
                move || turn(manager, id, &handle.mailbox)
            })?;
        Ok(Self {
            handle,
            thread: Some(thread),
        })
    }

    /// To reach it from any thread.
    pub fn handle(&self) -> LoopHandle<S> {
        self.handle.clone()
    }
}

impl<S: Attached> Drop for SessionLoop<S> {
    fn drop(&mut self) {
        self.handle.mailbox.post(Letter::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic there was printed there.
            let _ = thread.join();
        }
    }
}

fn turn<S: Attached>(
    mut manager: EventManager<Driver<S>>,
    id: SubscriberId,
    mailbox: &Mailbox<Letter<S>>,
) {
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
                log::error!("{} sessions end: {e}", S::PROTOCOL);
                return;
            }
        }
    }
}

/// Every slot, and what the epoll knows of them.
struct Driver<S: Attached> {
    mailbox: Arc<Mailbox<Letter<S>>>,
    slots: HashMap<Id, S>,
    names: HashMap<String, Id>,
    watched: Watched<Id, S::Role>,
    buffer: Vec<u8>,
    next_id: Id,
    looked: Instant,
    stopping: bool,
}

impl<S: Attached> Driver<S> {
    fn new(mailbox: Arc<Mailbox<Letter<S>>>) -> Self {
        Self {
            mailbox,
            slots: HashMap::new(),
            names: HashMap::new(),
            watched: Watched::default(),
            buffer: vec![0; S::BUFFER],
            next_id: 1,
            looked: Instant::now(),
            stopping: false,
        }
    }

    fn is_finished(&self) -> bool {
        self.stopping && self.slots.is_empty()
    }

    fn timeout(&self, now: Instant) -> Option<Duration> {
        let look = self.slots.values().any(S::is_connected);
        look.then(|| (self.looked + LOOK).saturating_duration_since(now))
    }

    fn letter(&mut self, letter: Letter<S>, now: Instant, ops: &mut EventOps) {
        match letter {
            Letter::News(id, news) => self.with(id, ops, |slot| slot.news(news, now)),
            Letter::Connection(name, resume) => {
                self.with_named(&name, ops, |slot| slot.given(*resume, now));
            }
            Letter::Committed(name, seq) => {
                self.with_named(&name, ops, |slot| slot.committed(seq, now));
            }
            Letter::Remove(name, then) => {
                self.with_named(&name, ops, |slot| slot.remove(then, now));
            }
            Letter::Add(attachment, answer) => {
                // Whoever asked may have lost interest.
                let _ = answer.send(self.add(*attachment));
            }
            Letter::Stop => {
                self.stopping = true;
                self.with_all(ops, |slot| slot.remove(Box::new(drop), now));
            }
        }
    }

    fn add(&mut self, attachment: S::Attachment) -> io::Result<()> {
        if self.stopping {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let id = self.next_id;
        self.next_id += 1;
        let mailbox = self.mailbox.clone();
        let post = Arc::new(move |news| mailbox.post(Letter::News(id, news)));
        let slot = S::new(attachment, post);
        if self.names.contains_key(slot.name()) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.names.insert(slot.name().into(), id);
        self.slots.insert(id, slot);
        Ok(())
    }

    fn with(&mut self, id: Id, ops: &mut EventOps, act: impl FnOnce(&mut S)) {
        if let Some(slot) = self.slots.get_mut(&id) {
            act(slot);
            self.settle(id, ops);
        }
    }

    fn with_named(&mut self, name: &str, ops: &mut EventOps, act: impl FnOnce(&mut S)) {
        if let Some(id) = self.names.get(name) {
            self.with(*id, ops, act);
        }
    }

    fn with_all(&mut self, ops: &mut EventOps, act: impl Fn(&mut S)) {
        for id in self.slots.keys().copied().collect::<Vec<_>>() {
            self.with(id, ops, &act);
        }
    }

    /// Brings the epoll to what a slot wants now.
    fn settle(&mut self, id: Id, ops: &mut EventOps) {
        let Some(slot) = self.slots.get_mut(&id) else {
            return;
        };
        let removed = slot.is_removed();
        let wants = match removed {
            true => Vec::new(),
            false => slot.interests(),
        };
        self.watched.forget(id, &wants, ops);
        slot.bury();
        self.watched.watch(id, &wants, ops);
        if removed && let Some(slot) = self.slots.remove(&id) {
            self.names.remove(slot.name());
            slot.finish();
        }
    }

    fn tick(&mut self, now: Instant, ops: &mut EventOps) {
        if now.saturating_duration_since(self.looked) >= LOOK {
            self.looked = now;
            self.with_all(ops, |slot| slot.tick(now));
        }
    }
}

impl<S: Attached> Drop for Driver<S> {
    /// The loop has ended, be it by a panic.
    fn drop(&mut self) {
        self.mailbox.close();
    }
}

impl<S: Attached> MutEventSubscriber for Driver<S> {
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
        } else if let Some((id, role)) = self.watched.whose(fd) {
            if let Some(slot) = self.slots.get_mut(&id) {
                slot.ready(role, events.event_set(), &mut self.buffer, now);
            }
            self.settle(id, ops);
        }
        self.tick(now, ops);
    }
}
