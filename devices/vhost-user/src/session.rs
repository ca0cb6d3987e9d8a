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
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bluff_virtio::{
    DeviceError, DeviceEvent, QueueChange, QueueSetup, Stop, StoppedQueue, VirtioDevice, features,
};
use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::eventfd::EventFd;

use crate::attachment::Negotiated;
use crate::channel::Channel;
use crate::framing::{self, Framer, Message};
use crate::keeper::Commit;
use crate::message::Request;
use crate::plan::{self, Effect, Offer, Plan, Reply, StopKind};
use crate::spec::{self, protocol};
use crate::state::{Descriptors, Key, Kick, Mapped, SessionState};
use crate::{Error, unix};

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
    since: Instant,
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
    keep: bool,
    completions: Completions,
    state: SessionState,
    mapped: Mapped,
    files: Descriptors,
    /// What the keeper holds.
    kept: BTreeSet<Key>,
    framer: Framer,
    channel: Option<(Key, Channel)>,
    /// Channels that were given up, until the loop has forgotten them.
    retired: Vec<Channel>,
    phase: Phase,
    op: u64,
    /// How long stopping rings has taken since one was last started.
    spent: Duration,
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
            keep,
            completions,
            state: SessionState::new(queues),
            mapped: Mapped::default(),
            files: Descriptors::new(),
            kept: BTreeSet::new(),
            framer: Framer::default(),
            channel: None,
            retired: Vec::new(),
            phase: Phase::Idle,
            op: 0,
            spent: Duration::ZERO,
            refused: None,
        }
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
    /// started. Requests in flight are done again out of their in-flight regions.
    ///
    /// # Errors
    /// [`Error::Recorded`] where the state does not fit this device; whatever mapping or starting says.
    /// Then call [`Session::end`].
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
        for index in self.state.started().collect::<Vec<_>>() {
            let setup = queue_setup(&self.state, &self.mapped, &self.files, index)?;
            self.device.start_queue(setup)?;
        }
        self.open_channel()?;
        // A change may have gone untold.
        self.config_changed();
        Ok(())
    }

    fn offer(&self) -> Offer {
        let is_net = self.net.is_some() && self.device.device_id() == spec::DEVICE_NET;
        Offer {
            features: self.device.features() | features::LOG_ALL | spec::F_PROTOCOL_FEATURES,
            protocol: protocol::ANY | if is_net { protocol::NET } else { 0 },
            queues: self.state.vrings.len() as u16,
            config_len: self.device.config_len(),
            keep: self.keep,
        }
    }

    /// Bytes of the next message, with the descriptors that came with them: never more than
    /// [`Framer::missing`] says. They are still in the socket; the commit that follows takes them off.
    ///
    /// # Panics
    /// Where the session is not ready.
    pub fn receive(
        &mut self,
        bytes: &[u8],
        files: Vec<OwnedFd>,
        truncated: bool,
        now: Instant,
    ) -> Step {
        assert!(self.is_ready(), "one message at a time");
        if self.is_poisoned() {
            return Step::Close(Error::Poisoned);
        }
        let mut next_partial = self.state.partial.clone();
        let mut kept = Vec::new();
        if self.keep {
            // Should the message not be whole, they have to be kept.
            next_partial.bytes.extend_from_slice(bytes);
            next_partial.truncated |= truncated;
            for file in &files {
                match file.try_clone() {
                    Ok(file) => kept.push(file),
                    Err(e) => return Step::Close(e.into()),
                }
            }
        }
        match self.framer.push(bytes, files, truncated) {
            Err(e) => Step::Close(e),
            Ok(Some(message)) => self.whole(message, bytes.len(), now),
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
                self.commit(next, files, bytes.len(), Vec::new(), Vec::new())
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
            since: now,
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
            Phase::Committing => Step::Ready,
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

    /// Carries effects out until some have to be waited for.
    fn run(&mut self, now: Instant) -> Step {
        let Phase::Working(mut work) = std::mem::replace(&mut self.phase, Phase::Ready) else {
            panic!("no work");
        };
        while let Some(effect) = work.effects.pop_front() {
            if effect == Effect::Wait {
                if work.waiting > 0 {
                    self.phase = Phase::Working(work);
                    return Step::Wait;
                }
                continue;
            }
            if let Err(e) = self.effect(effect, &mut work, now) {
                // Effects that can fail stand alone in their plan: nothing is half done.
                assert_eq!(work.waiting, 0, "an effect failed in the middle of a plan");
                plan::retain(&mut self.files, &self.state);
                return self.refuse(work.answer, e);
            }
        }
        if work.waiting > 0 {
            self.phase = Phase::Working(work);
            return Step::Wait;
        }
        self.finish(*work, now)
    }

    fn effect(&mut self, effect: Effect, work: &mut Work, now: Instant) -> Result<(), Error> {
        let (next, mapped) = (&work.plan.next, &work.plan.mapped);
        let op = self.op;
        match effect {
            Effect::Wait => {}
            Effect::SetFeatures(bits) => self.device.set_features(bits),
            Effect::Reset => self.device.reset(),
            Effect::WriteConfig(offset, bytes) => self.device.write_config(offset, &bytes)?,
            Effect::SetMtu(mtu) => self.net()?.set_mtu(mtu)?,
            Effect::Announce(mac) => self.net()?.announce(mac)?,
            Effect::Start(index) => {
                let setup = queue_setup(next, mapped, &self.files, index)?;
                self.device.start_queue(setup)?;
                self.spent = Duration::ZERO;
            }
            Effect::Stop(index, kind) => {
                let stop = Stop {
                    // Front ends stop one ring after another, each time waiting for the reply: the
                    // bound is for all of them.
                    bound: self.bound.saturating_sub(self.spent),
                    leave: kind == StopKind::Leave,
                    answer: kind != StopKind::Drop,
                };
                work.waiting += 1;
                work.since = now;
                self.stop_queue(index, stop, op);
            }
            Effect::Memory(index) => {
                work.waiting += 1;
                let change = QueueChange::Memory {
                    memory: mapped.memory.clone(),
                    bound: self.bound,
                    done: changed(&self.completions, op),
                };
                self.device.change_queue(index, change);
            }
            Effect::Log(index) => {
                work.waiting += 1;
                let change = QueueChange::Log {
                    log: mapped.queue_log(next, index),
                    done: changed(&self.completions, op),
                };
                self.device.change_queue(index, change);
            }
            Effect::Kick(index) => {
                let kick = match next.vrings[usize::from(index)].kick {
                    Some(Kick::File(key)) => event(&self.files, Some(key))?,
                    _ => None,
                };
                self.device.change_queue(index, QueueChange::Kick(kick));
            }
            Effect::Call(index) => {
                let call = event(&self.files, next.vrings[usize::from(index)].call)?;
                self.device.change_queue(index, QueueChange::Call(call));
            }
            Effect::Err(index) => {
                let err = event(&self.files, next.vrings[usize::from(index)].err)?;
                self.device.change_queue(index, QueueChange::Error(err));
            }
            Effect::Enable(index, on) => {
                self.device.change_queue(index, QueueChange::Enable(on));
            }
        }
        Ok(())
    }

    fn net(&mut self) -> Result<&mut Box<dyn NetControl>, Error> {
        self.net
            .as_mut()
            .ok_or(Error::State("not a network device"))
    }

    fn stop_queue(&mut self, index: u16, stop: Stop, op: u64) {
        let completions = self.completions.clone();
        let done = Box::new(move |stopped| {
            // After a reset the position is the front end's to set.
            let stopped: Option<StoppedQueue> = stopped;
            completions(Done {
                op,
                stopped: stopped.filter(|_| stop.answer).map(|s| (index, s)),
            });
        });
        self.device.stop_queue(index, stop, done);
    }

    /// Everything that a message asked for has happened.
    fn finish(&mut self, mut work: Work, now: Instant) -> Step {
        // Only stops and changes take time.
        self.spent += now.saturating_duration_since(work.since);
        let answer = work.answer;
        // The old epoch goes here, when nothing uses it any more.
        self.mapped = std::mem::take(&mut work.plan.mapped);
        let next = work.plan.next;
        let mut reply_files = Vec::new();
        let payload = match work.plan.reply {
            Reply::Payload(payload, file) => {
                reply_files.extend(file);
                Some(payload)
            }
            Reply::Base(index) => Some(plan::base_payload(&next, index)),
            // SET_PROTOCOL_FEATURES itself may ask for an acknowledgement (User-Mode Linux does).
            Reply::Ack => {
                let wanted = answer.need_reply && next.protocol & protocol::REPLY_ACK != 0;
                wanted.then(|| 0u64.to_ne_bytes().to_vec())
            }
        };
        let reply = payload.map_or_else(Vec::new, |p| framing::reply(answer.request, &p));
        let kept = work.plan.kept;
        plan::retain(&mut self.files, &next);
        let step = self.commit(next, kept, answer.consume, reply, reply_files);
        if let Err(e) = self.open_channel() {
            return Step::Close(e);
        }
        step
    }

    /// Answers a message that is not served, or gives the connection up where it cannot be answered.
    fn refuse(&mut self, answer: Answer, error: Error) -> Step {
        let acks = answer.need_reply && self.state.protocol & protocol::REPLY_ACK != 0;
        let payload = if answer.request == u32::from(FrontendReq::GET_CONFIG) {
            // "back-end uses zero length of payload to indicate an error".
            Vec::new()
        } else if acks {
            1u64.to_ne_bytes().to_vec()
        } else {
            return Step::Close(error);
        };
        if error.ends_session() {
            return Step::Close(error);
        }
        self.refused = Some(error);
        let reply = framing::reply(answer.request, &payload);
        let next = self.state.clone();
        self.commit(next, Vec::new(), answer.consume, reply, Vec::new())
    }

    fn commit(
        &mut self,
        mut next: SessionState,
        files: Vec<(Key, OwnedFd)>,
        consume: usize,
        reply: Vec<u8>,
        reply_files: Vec<OwnedFd>,
    ) -> Step {
        next.seq = self.state.seq;
        next.next_key = next.next_key.max(self.state.next_key);
        self.state = next;
        self.phase = Phase::Committing;
        self.record(self.state.clone(), files, consume, reply, reply_files)
    }

    /// The record of a state, which becomes the present one only through [`Session::commit`].
    fn record(
        &mut self,
        mut next: SessionState,
        files: Vec<(Key, OwnedFd)>,
        consume: usize,
        reply: Vec<u8>,
        reply_files: Vec<OwnedFd>,
    ) -> Step {
        self.state.seq += 1;
        next.seq = self.state.seq;
        let mut commit = Commit {
            seq: next.seq,
            consume,
            reply,
            reply_files,
            ..Commit::default()
        };
        if self.keep {
            next.device = self.device.save();
            // Keys are never used twice, also if the plan that made them is dropped.
            self.state.next_key = self.state.next_key.max(next.next_key);
            let keys = next.keys();
            let gone = self.kept.difference(&keys);
            commit.dropped = gone.copied().collect();
            commit.files = files;
            commit.state = next.to_bytes();
            self.kept = keys;
        }
        Step::Commit(commit)
    }

    fn open_channel(&mut self) -> Result<(), Error> {
        let now = self.channel.as_ref().map(|(key, _)| *key);
        match self.state.channel {
            Some(key) if now != Some(key) => {
                if let Some(file) = self.files.get(&key) {
                    let file = file.try_clone()?;
                    let ack = self.state.protocol & protocol::REPLY_ACK != 0;
                    self.drop_channel();
                    self.channel = Some((key, Channel::new(file, ack)));
                }
            }
            None => self.drop_channel(),
            _ => {}
        }
        Ok(())
    }

    /// The device says something. Whether the function needs a reset now, and did not before.
    pub fn device_event(&mut self, event: DeviceEvent) -> bool {
        match event {
            DeviceEvent::ConfigChanged => {
                self.config_changed();
                false
            }
            DeviceEvent::QueueBroken(_) => {
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

    fn config_changed(&mut self) {
        if let Some((_, channel)) = &mut self.channel
            && let Err(e) = channel.config_changed()
        {
            self.refused = Some(e);
            self.drop_channel();
        }
    }

    /// The front end has gone, or has to go: stops what runs, within the bound.
    pub fn end(&mut self) -> Step {
        match std::mem::replace(&mut self.phase, Phase::Ready) {
            Phase::Idle => {
                // Also after a resumption that failed half-way.
                self.phase = Phase::Idle;
                self.forget()
            }
            Phase::Working(work) if work.waiting > 0 => {
                // What is under way ends first, within its own bound; then nothing is asked twice.
                let rings = self.state.started().chain(work.plan.next.started());
                self.phase = Phase::Draining(work.waiting, rings.collect());
                Step::Wait
            }
            phase @ (Phase::Draining(..) | Phase::Stopping(_)) => {
                self.phase = phase;
                Step::Wait
            }
            Phase::Ready | Phase::Preparing(_) | Phase::Working(_) | Phase::Committing => {
                self.phase = Phase::Draining(0, self.state.started().collect());
                self.stop_all()
            }
        }
    }

    fn stop_all(&mut self) -> Step {
        let Phase::Draining(0, rings) = std::mem::replace(&mut self.phase, Phase::Ready) else {
            panic!("completions are to come");
        };
        if rings.is_empty() {
            return self.forget();
        }
        // Where the front end keeps what is in flight, it may come back and have it done again: what ends
        // within the bound is answered, as it would be if the front end were there.
        let recorded = self.state.inflight.is_some();
        let stop = Stop {
            bound: self.bound,
            leave: recorded,
            answer: recorded,
        };
        self.op += 1;
        self.phase = Phase::Stopping(rings.len());
        for index in rings {
            self.stop_queue(index, stop, self.op);
        }
        Step::Wait
    }

    fn forget(&mut self) -> Step {
        self.device.reset();
        self.op += 1;
        // Records are numbered through, so that a late word of the keeper is not taken for another.
        self.state = SessionState {
            seq: self.state.seq,
            ..SessionState::new(self.state.vrings.len() as u16)
        };
        self.mapped = Mapped::default();
        self.files.clear();
        self.kept.clear();
        self.framer = Framer::default();
        self.drop_channel();
        self.spent = Duration::ZERO;
        self.phase = Phase::Idle;
        Step::Ended
    }
}

fn changed(completions: &Completions, op: u64) -> Box<dyn FnOnce() + Send> {
    let completions = completions.clone();
    Box::new(move || completions(Done { op, stopped: None }))
}

/// A duplicate of a notifier, as the device takes it.
fn event(files: &Descriptors, key: Option<Key>) -> Result<Option<EventFd>, Error> {
    let Some(key) = key else { return Ok(None) };
    let file = files
        .get(&key)
        .ok_or(Error::Recorded("a descriptor is missing"))?;
    Ok(Some(unix::event_fd(file.try_clone()?)))
}

fn queue_setup(
    state: &SessionState,
    mapped: &Mapped,
    files: &Descriptors,
    index: u16,
) -> Result<QueueSetup, Error> {
    let ring = &state.vrings[usize::from(index)];
    let kick = match ring.kick {
        Some(Kick::File(key)) => Some(key),
        _ => None,
    };
    Ok(QueueSetup {
        index,
        size: ring.size,
        features: state.driver_features(),
        addresses: state
            .ring_addresses(index)
            .ok_or(Error::Recorded("a ring without addresses"))?,
        position: state.position(index),
        memory: mapped.memory.clone(),
        kick: event(files, kick)?,
        call: event(files, ring.call)?,
        error: event(files, ring.err)?,
        inflight: mapped.inflight_queue(state, index),
        log: mapped.queue_log(state, index),
        enabled: state.is_enabled(index),
    })
}
