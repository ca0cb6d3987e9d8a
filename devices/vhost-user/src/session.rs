//! One function's sessions: carries out plans on the device, without any I/O of its own.
//!
//! ```text
//!            +-------------------- told(): recorded <--------------------+
//!            v                                                           |
//!   Idle -> Ready -- receive() --> [Preparing] -> Working -- done() --> Committing
//!    ^        |                                      |                   |
//!    |        +------------- end() ------------------+-------------------+
//!    +--- Stopping <-- Draining <----------------------------------------+
//! ```
//!
//! One message at a time. `Preparing` is there only where the state is kept and a ring starts: its
//! in-flight region has to be known to the keeper before the first request is taken off the ring.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bluff_virtio::{
    DeviceError, DeviceEvent, Distrust, QueueChange, StoppedQueue, VirtioDevice, features,
};

use crate::attachment::Negotiated;
use crate::channel::Channel;
use crate::framing::{Framer, Message};
use crate::keeper::Commit;
use crate::message::Request;
use crate::plan::{self, Effect, Offer, Plan};
use crate::reader::Piece;
use crate::spec::{self, protocol};
use crate::state::{Descriptors, Key, Mapped, SessionState};
use crate::{Error, unix};

mod end;
mod work;

use work::{notifier, queue_setup};

/// What network devices take besides [`VirtioDevice`].
pub trait NetControl: Send {
    /// `NET_SET_MTU`: the largest frame that the front end's side carries, in bytes.
    ///
    /// # Errors
    /// Where the device cannot do with it.
    fn set_mtu(&mut self, mtu: u16) -> Result<(), DeviceError>;

    /// `SEND_RARP`: tell the network where `mac` is now, as its driver cannot.
    ///
    /// # Errors
    /// Where the device cannot.
    fn announce(&mut self, mac: [u8; 6]) -> Result<(), DeviceError>;
}

/// A device has done what it was asked for.
#[derive(Debug)]
pub struct Done {
    /// Which plan asked.
    op: u64,
    /// The queue that stopped, and where it would go on; `None` where that is of no interest.
    stopped: Option<(u16, StoppedQueue)>,
}

/// Where devices say so, on any thread; hand it to [`Session::done`] on the session's own.
pub type Completions = Arc<dyn Fn(Done) + Send + Sync>;

/// What is to be done next.
#[derive(Debug)]
#[must_use]
pub enum Step {
    /// Wait for [`Done`].
    Wait,
    /// Record this, then call [`Session::committed`].
    Commit(Commit),
    /// Read on.
    Ready,
    /// Close the connection and call [`Session::end`].
    Close(Error),
    /// Nothing is left of the connection: the function is free.
    Ended,
}

/// A message that is being carried out.
struct Work {
    plan: Plan,
    effects: VecDeque<Effect>,
    /// Completions to come.
    waiting: usize,
    /// When rings began to be stopped, if any are.
    stops: Option<Instant>,
    answer: Answer,
}

/// What the answer to a message needs to know of it.
#[derive(Clone, Copy)]
struct Answer {
    request: u32,
    need_reply: bool,
    consume: usize,
}

enum Phase {
    Idle,
    Ready,
    /// Told the keeper what will be started.
    Preparing(Box<Work>),
    Working(Box<Work>),
    Committing,
    /// The front end has gone while these completions were to come; then these rings are stopped.
    Draining(usize, BTreeSet<u16>),
    /// This many rings are being stopped.
    Stopping(usize),
}

/// The sessions of one function, one after another.
pub struct Session {
    device: Box<dyn VirtioDevice>,
    net: Option<Box<dyn NetControl>>,
    bound: Duration,
    descriptors: usize,
    keep: bool,
    completions: Completions,
    state: SessionState,
    mapped: Mapped,
    files: Descriptors,
    /// Of all its front ends: who comes next may be the one before.
    distrust: Distrust,
    /// What the keeper holds.
    kept: BTreeSet<Key>,
    framer: Framer,
    channel: Option<(Key, Channel)>,
    /// Configuration space has changed, as far as the front end knows, since the first ring was last started.
    changed: bool,
    /// The device's state has changed since it was last recorded.
    unsaved: bool,
    /// Channels that were given up, until the loop has forgotten them.
    retired: Vec<Channel>,
    phase: Phase,
    /// The front end is still there and lets go last: what it waits for is answered.
    orderly: bool,
    op: u64,
    /// When a ring was last stopped, and how long that and what was stopped in a row with it took.
    stopped: Option<(Instant, Duration)>,
    /// What was last refused, for the log.
    refused: Option<Error>,
}

impl Session {
    /// A function without a front end. Rings are stopped and memory is given back within `bound`;
    /// `keep` where every state is recorded.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        net: Option<Box<dyn NetControl>>,
        bound: Duration,
        keep: bool,
        completions: Completions,
    ) -> Self {
        let queues = device.queues().min(spec::MAX_VRINGS);
        Self {
            device,
            net,
            bound,
            descriptors: spec::MAX_DESCRIPTORS,
            keep,
            completions,
            state: SessionState::new(queues),
            mapped: Mapped::default(),
            files: Descriptors::new(),
            distrust: Distrust::default(),
            kept: BTreeSet::new(),
            framer: Framer::default(),
            channel: None,
            changed: true,
            unsaved: false,
            retired: Vec::new(),
            phase: Phase::Idle,
            orderly: false,
            op: 0,
            stopped: None,
            refused: None,
        }
    }

    /// Lets front ends hold no more than so many descriptors.
    pub fn limit_descriptors(&mut self, most: usize) {
        self.descriptors = most;
    }

    /// What was negotiated.
    pub fn state(&self) -> &SessionState {
        &self.state
    }

    /// What the front end and its driver have settled.
    pub fn negotiated(&self) -> Negotiated {
        let tells = self.state.protocol & protocol::STATUS != 0;
        Negotiated {
            features: self.state.driver_features(),
            status: tells.then_some(self.state.status),
            queues: self.state.started().count() as u16,
        }
    }

    /// The device, when the sessions are over.
    pub fn into_device(self) -> Box<dyn VirtioDevice> {
        self.device
    }

    /// Why the last message was refused, if it was; then forgets it.
    pub fn take_refused(&mut self) -> Option<Error> {
        self.refused.take()
    }

    /// The message that is not whole yet.
    pub fn framer(&self) -> &Framer {
        &self.framer
    }

    /// Whether there is no front end.
    pub fn is_idle(&self) -> bool {
        matches!(self.phase, Phase::Idle)
    }

    /// Whether the next message may be read.
    pub fn is_ready(&self) -> bool {
        matches!(self.phase, Phase::Ready)
    }

    /// Whether the front end has shrunk its memory: its session is to be ended.
    pub fn is_poisoned(&self) -> bool {
        self.mapped.is_poisoned()
    }

    /// The channel for requests of the back end, once the front end has sent one.
    pub fn channel(&mut self) -> Option<&mut Channel> {
        self.channel.as_mut().map(|(_, c)| c)
    }

    /// Gives a broken channel up.
    pub fn drop_channel(&mut self) {
        if let Some((key, _)) = &self.channel {
            self.files.remove(key);
            if self.state.channel == Some(*key) {
                self.state.channel = None;
            }
        }
        self.retire_channel();
    }

    fn retire_channel(&mut self) {
        self.retired.extend(self.channel.take().map(|(_, c)| c));
    }

    /// Channels that were given up since the last call. Whoever waits for their descriptors forgets
    /// these first and then drops them: others may hold the same open file, and an epoll would go on
    /// reporting it.
    pub fn take_retired(&mut self) -> Vec<Channel> {
        std::mem::take(&mut self.retired)
    }

    /// A front end has connected.
    ///
    /// # Panics
    /// Where another is still there.
    pub fn connect(&mut self) {
        assert!(self.is_idle(), "a front end is connected");
        self.phase = Phase::Ready;
    }

    /// Goes on where another process ended: maps what the state names, starts the rings that were
    /// started. Requests in flight are done again out of their in-flight regions. A ring that cannot be
    /// started is a broken one.
    ///
    /// # Errors
    /// [`Error::Recorded`] where the state does not fit this device; whatever mapping says. Then call [`Session::end`].
    ///
    /// # Panics
    /// Where a front end is connected.
    pub fn resume(&mut self, state: SessionState, mut files: Descriptors) -> Result<(), Error> {
        assert!(self.is_idle(), "a front end is connected");
        if state.vrings.len() != self.state.vrings.len() {
            return Err(Error::Recorded("another number of queues"));
        }
        let unknown = state.features.unwrap_or(0) & !self.offer().features;
        if unknown != 0 {
            return Err(Error::Features(unknown));
        }
        self.phase = Phase::Ready;
        self.kept = state.keys();
        self.mapped = Mapped::of(&state, &mut files)?;
        self.files = files;
        self.state = state;
        self.mapped.forget(&mut self.state);
        let partial = std::mem::take(&mut self.state.partial);
        let mut taken = Vec::new();
        for key in &partial.files {
            let file = self.files.remove(key);
            taken.push(file.ok_or(Error::Recorded("a descriptor is missing"))?);
        }
        let whole = self.framer.push(&partial.bytes, taken, partial.truncated)?;
        if whole.is_some() {
            return Err(Error::Recorded("a whole message"));
        }
        self.state.partial = partial;
        if !self.state.device.is_empty() {
            self.device.load(&self.state.device)?;
        }
        if self.state.features.is_some() {
            self.device.set_features(self.state.driver_features());
        }
        let records = self.device.records_in_flight();
        for index in self.state.started().collect::<Vec<_>>() {
            if !records {
                self.take_used_index(index);
            }
            let setup = queue_setup(
                &self.state,
                &self.mapped,
                &self.files,
                &self.distrust,
                index,
            )?;
            if let Err(e) = self.device.start_queue(setup) {
                // It was broken before, in a way that the device sees only now: its memory has gone.
                self.state.status |= spec::STATUS_NEEDS_RESET;
                self.refused = Some(e.into());
            } else if !records {
                // Its driver may not have heard of what was used last.
                let call = self.state.vrings[usize::from(index)].call;
                let call = notifier(&self.files, call, &self.distrust)?;
                self.device.change_queue(index, QueueChange::Call(call));
            }
        }
        self.open_channel()?;
        // A change may have gone untold.
        self.config_changed();
        Ok(())
    }

    /// A ring without a record of what is in flight goes on where its used index stands (virtio 1.3 §2.7.8): what was taken and not used
    /// is taken again.
    fn take_used_index(&mut self, index: u16) {
        let ring = &self.state.vrings[usize::from(index)];
        let memory = &self.mapped.memory;
        let at = ring.addresses.and_then(|a| a.used.checked_add(2));
        let at = at.and_then(|at| memory.guest_of_user(at));
        let mut used = [0; 2];
        // Where it cannot be read, the ring cannot be started either.
        if at.is_some_and(|at| memory.read(at, &mut used).is_ok()) {
            self.state.ring(index).base = u16::from_le_bytes(used).into();
        }
    }

    fn offer(&self) -> Offer {
        let is_net = self.device.device_id() == spec::DEVICE_NET;
        let records = self.device.records_in_flight();
        let queues = self.state.vrings.len() as u16;
        // No message resets a ring alone. A front end can do it by stopping and starting the ring, but QEMU's block and network
        // devices pass the bit on and do nothing when a driver then resets one.
        let mut withheld = features::RING_RESET;
        let mut protocol = protocol::ANY;
        if records {
            protocol |= protocol::RECORDS;
        } else {
            // Nothing in memory says where such a ring stood when its device died.
            withheld |= features::RING_PACKED;
        }
        if is_net && self.net.is_some() {
            protocol |= protocol::NET;
        }
        Offer {
            features: self.device.features() & !withheld
                | features::LOG_ALL
                | spec::F_PROTOCOL_FEATURES,
            protocol,
            queues,
            // Front ends of network devices count pairs, and leave the control queue out.
            counted: if is_net { queues / 2 } else { queues },
            config_len: self.device.config_len(),
            descriptors: self.descriptors,
            keep: self.keep,
            keep_in_flight: self.keep && records,
        }
    }

    /// A piece of the next message. The commit that follows takes it off the socket where it is still
    /// there.
    ///
    /// # Panics
    /// Where the session is not ready.
    pub fn receive(&mut self, piece: Piece, now: Instant) -> Step {
        assert!(self.is_ready(), "one message at a time");
        let Piece {
            bytes,
            files,
            truncated,
            consume,
        } = piece;
        if self.is_poisoned() {
            return Step::Close(Error::Poisoned);
        }
        let mut next_partial = self.state.partial.clone();
        let mut kept = Vec::new();
        if self.keep {
            // Should the message not be whole, they have to be kept.
            next_partial.bytes.extend_from_slice(&bytes);
            next_partial.truncated |= truncated;
            for file in &files {
                match file.try_clone() {
                    Ok(file) => kept.push(file),
                    Err(e) => return Step::Close(e.into()),
                }
            }
        }
        match self.framer.push(&bytes, files, truncated) {
            Err(e) => Step::Close(e),
            Ok(Some(message)) => self.whole(message, consume, now),
            Ok(None) => {
                let mut next = self.state.clone();
                let mut files = Vec::new();
                for file in kept {
                    if next_partial.files.len() == unix::MAX_FILES {
                        next_partial.truncated = true;
                        break;
                    }
                    let key = next.new_key();
                    next_partial.files.push(key);
                    files.push((key, file));
                }
                next.partial = next_partial;
                self.commit(next, files, consume, Vec::new(), Vec::new())
            }
        }
    }

    fn whole(&mut self, message: Message, consume: usize, now: Instant) -> Step {
        let answer = Answer {
            request: message.header.request,
            need_reply: message.header.need_reply,
            consume,
        };
        let offer = self.offer();
        let partial = std::mem::take(&mut self.state.partial);
        let planned = Request::parse(message, offer.queues).and_then(|request| {
            let config = |offset, to: &mut [u8]| self.device.read_config(offset, to);
            plan::plan(request, offer, &self.state, &self.mapped, &config)
        });
        let mut plan = match planned {
            Ok(plan) => plan,
            Err(e) => return self.refuse(answer, e),
        };
        self.files.extend(plan.added.drain(..));
        let starts = plan.effects.iter().any(|e| matches!(e, Effect::Start(_)));
        let work = Box::new(Work {
            effects: std::mem::take(&mut plan.effects).into(),
            plan,
            waiting: 0,
            stops: None,
            answer,
        });
        if starts && self.keep {
            let mut work = work;
            let files = std::mem::take(&mut work.plan.kept);
            let mut next = work.plan.next.clone();
            // The rest of the message stays in the socket, so what was taken of it has to stay too.
            next.partial = partial;
            let step = self.record(next, files, 0, Vec::new(), Vec::new());
            self.phase = Phase::Preparing(work);
            return step;
        }
        self.op += 1;
        self.phase = Phase::Working(work);
        self.run(now)
    }

    /// The device has done something.
    pub fn done(&mut self, done: Done, now: Instant) -> Step {
        if done.op != self.op {
            return Step::Wait;
        }
        match &mut self.phase {
            Phase::Working(work) => {
                if let Some((index, stopped)) = done.stopped {
                    work.plan.next.set_position(index, stopped.position);
                }
                work.waiting -= 1;
                if work.waiting > 0 {
                    return Step::Wait;
                }
                self.run(now)
            }
            Phase::Draining(waiting, _) => {
                *waiting -= 1;
                if *waiting > 0 {
                    return Step::Wait;
                }
                self.stop_all()
            }
            Phase::Stopping(waiting) => {
                *waiting -= 1;
                if *waiting > 0 {
                    return Step::Wait;
                }
                self.forget()
            }
            _ => Step::Wait,
        }
    }

    /// The commit numbered `seq` is recorded, and its reply is sent or on its way. Of no effect for
    /// any but the last.
    pub fn committed(&mut self, seq: u64, now: Instant) -> Step {
        if seq != self.state.seq {
            return Step::Wait;
        }
        match std::mem::replace(&mut self.phase, Phase::Ready) {
            Phase::Committing => {
                self.mapped.forget(&mut self.state);
                match self.unsaved {
                    true => self.commit_unsaved(),
                    false => Step::Ready,
                }
            }
            Phase::Preparing(work) => {
                self.op += 1;
                self.phase = Phase::Working(work);
                self.run(now)
            }
            // The front end went away in the meantime, or this was said before.
            other => {
                self.phase = other;
                Step::Wait
            }
        }
    }

    /// The device says something. Whether the function needs a reset now, and did not before.
    pub fn device_event(&mut self, event: DeviceEvent) -> bool {
        match event {
            DeviceEvent::ConfigChanged => {
                self.config_changed();
                false
            }
            // It is the front end's own affair; the slot says so. What changed is recorded by [`Session::state_changed`].
            DeviceEvent::NotifierHung(_) | DeviceEvent::StateChanged => false,
            DeviceEvent::QueueBroken { .. } => {
                if matches!(
                    self.phase,
                    Phase::Idle | Phase::Draining(..) | Phase::Stopping(_)
                ) {
                    return false;
                }
                if let Phase::Working(work) | Phase::Preparing(work) = &mut self.phase {
                    work.plan.next.status |= spec::STATUS_NEEDS_RESET;
                }
                let before = self.state.status;
                self.state.status |= spec::STATUS_NEEDS_RESET;
                before != self.state.status
            }
        }
    }

    /// The device's state has changed by itself: it is recorded, at once or when the message is done that is being carried out.
    pub fn state_changed(&mut self) -> Step {
        if !self.keep {
            return Step::Wait;
        }
        if self.is_ready() {
            return self.commit_unsaved();
        }
        self.unsaved = true;
        Step::Wait
    }

    fn commit_unsaved(&mut self) -> Step {
        let next = self.state.clone();
        self.commit(next, Vec::new(), 0, Vec::new(), Vec::new())
    }

    fn config_changed(&mut self) {
        // QEMU 6.1 and later drops what it is told while no ring is started, and reads the space again neither when its
        // guest is reset nor when it connects again: so the first start tells it once more.
        self.changed = true;
        self.tell_changed();
    }

    fn tell_changed(&mut self) {
        if let Some((_, channel)) = &mut self.channel
            && let Err(e) = channel.config_changed()
        {
            self.refused = Some(e);
            self.drop_channel();
        }
    }
}
