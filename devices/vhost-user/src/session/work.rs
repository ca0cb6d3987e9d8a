//! Carries plans out on the device, and records what came of them.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use bluff_virtio::{Distrust, Notifier, QueueChange, QueueSetup, Stop, StoppedQueue};
use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::eventfd::EventFd;

use super::{Answer, Completions, Done, NetControl, Phase, Session, Step, Work};
use crate::channel::Channel;
use crate::keeper::Commit;
use crate::plan::{self, Effect, Reply, StopKind};
use crate::spec::protocol;
use crate::state::{Descriptors, Key, Kick, Mapped, SessionState};
use crate::{Error, framing, unix};

impl Session {
    /// Carries effects out until some have to be waited for.
    pub(super) fn run(&mut self, now: Instant) -> Step {
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
                let setup = queue_setup(next, mapped, &self.files, &self.distrust, index)?;
                self.device.start_queue(setup)?;
                self.stopped = None;
            }
            Effect::Stop(index, kind) => {
                let stop = Stop {
                    // Front ends stop one ring after another, each time waiting for the reply: the
                    // bound is for all of them.
                    bound: self.bound.saturating_sub(self.spent(now)),
                    leave: match kind {
                        StopKind::Drain => false,
                        StopKind::Leave => true,
                        StopKind::Drop => self.is_recorded(),
                    },
                    answer: kind != StopKind::Drop,
                };
                work.waiting += 1;
                work.stops = Some(now);
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
                let call = next.vrings[usize::from(index)].call;
                let call = notifier(&self.files, call, &self.distrust)?;
                self.device.change_queue(index, QueueChange::Call(call));
            }
            Effect::Err(index) => {
                let err = next.vrings[usize::from(index)].err;
                let err = notifier(&self.files, err, &self.distrust)?;
                self.device.change_queue(index, QueueChange::Error(err));
            }
            Effect::Enable(index, on) => {
                self.device.change_queue(index, QueueChange::Enable(on));
            }
        }
        Ok(())
    }

    /// Whether rings have records of what is in flight. These are never the device's to forget: while the last state that
    /// was recorded has a ring running, the next process may go on with it.
    pub(super) fn is_recorded(&self) -> bool {
        self.keep && self.device.records_in_flight() || self.state.inflight.is_some()
    }

    /// How much of the bound is used up by stops that ended shortly before. A front end that waits for the answer to one sends
    /// the next at once, so what comes later is not in a row with them.
    fn spent(&self, now: Instant) -> Duration {
        let in_a_row = |ended| now.saturating_duration_since(ended) < self.bound;
        let last = self.stopped.filter(|(ended, _)| in_a_row(*ended));
        last.map_or(Duration::ZERO, |(_, spent)| spent)
    }

    fn net(&mut self) -> Result<&mut Box<dyn NetControl>, Error> {
        self.net
            .as_mut()
            .ok_or(Error::State("not a network device"))
    }

    pub(super) fn stop_queue(&mut self, index: u16, stop: Stop, op: u64) {
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
    pub(super) fn finish(&mut self, mut work: Work, now: Instant) -> Step {
        if let Some(since) = work.stops {
            let took = now.saturating_duration_since(since);
            self.stopped = Some((now, self.spent(since) + took));
        }
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
        let begins = self.state.started().next().is_none() && next.started().next().is_some();
        let step = self.commit(next, kept, answer.consume, reply, reply_files);
        if let Err(e) = self.open_channel() {
            return Step::Close(e);
        }
        if begins && self.channel.is_some() && std::mem::take(&mut self.changed) {
            self.tell_changed();
        }
        step
    }

    /// Answers a message that is not served, or gives the connection up where it cannot be answered.
    pub(super) fn refuse(&mut self, answer: Answer, error: Error) -> Step {
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

    pub(super) fn commit(
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
    pub(super) fn record(
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
            // First: what changes after this is told again.
            self.unsaved = false;
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

    pub(super) fn open_channel(&mut self) -> Result<(), Error> {
        let now = self.channel.as_ref().map(|(key, _)| *key);
        match self.state.channel {
            Some(key) if now != Some(key) => {
                if let Some(file) = self.files.get(&key) {
                    let file = file.try_clone()?;
                    let ack = self.state.protocol & protocol::REPLY_ACK != 0;
                    self.retire_channel();
                    self.channel = Some((key, Channel::new(file, ack)));
                }
            }
            None => self.retire_channel(),
            _ => {}
        }
        Ok(())
    }
}

fn changed(completions: &Completions, op: u64) -> Box<dyn FnOnce() + Send> {
    let completions = completions.clone();
    Box::new(move || completions(Done { op, stopped: None }))
}

/// A duplicate of a descriptor for notifications, as the device takes it.
fn event(files: &Descriptors, key: Option<Key>) -> Result<Option<EventFd>, Error> {
    let Some(key) = key else { return Ok(None) };
    let file = files
        .get(&key)
        .ok_or(Error::Recorded("a descriptor is missing"))?;
    Ok(Some(unix::event_fd(file.try_clone()?)))
}

pub(super) fn notifier(
    files: &Descriptors,
    key: Option<Key>,
    distrust: &Distrust,
) -> Result<Option<Notifier>, Error> {
    let event = event(files, key)?;
    Ok(event.map(|e| Notifier::of(e, distrust)).transpose()?)
}

pub(super) fn queue_setup(
    state: &SessionState,
    mapped: &Mapped,
    files: &Descriptors,
    distrust: &Distrust,
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
        call: notifier(files, ring.call, distrust)?,
        error: notifier(files, ring.err, distrust)?,
        inflight: mapped.inflight_queue(state, index),
        log: mapped.queue_log(state, index),
        enabled: state.is_enabled(index),
    })
}
