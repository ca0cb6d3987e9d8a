//! What a request asks for: the next state, what has to happen before it holds, and the reply.
//!
//! Nothing here changes anything. A request that is refused leaves no trace; one that is accepted
//! becomes a [`Plan`], which the [`session`](crate::session) carries out.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use bluff_memory::{DirtyLog, GuestMemory, Mapping, Region};
use bluff_virtio::{features, inflight};
use zerocopy::IntoBytes;

use crate::Error;
use crate::message::{InflightInfo, RegionInfo, Request};
use crate::spec::{self, RawConfig, RawLog, RawVringState, protocol};
use crate::state::{
    Addresses, Descriptors, Forget, InflightState, Key, LogState, Mapped, RegionState, SessionState,
};
use crate::unix;

mod rings;

/// What the device and this back end offer.
#[derive(Clone, Copy, Debug)]
pub struct Offer {
    /// Feature bits, those of the protocol included.
    pub features: u64,
    /// Protocol features.
    pub protocol: u64,
    /// Vrings.
    pub queues: u16,
    /// What `GET_QUEUE_NUM` answers.
    pub counted: u16,
    /// Bytes of configuration space.
    pub config_len: u32,
    /// Descriptors that the front end may hold.
    pub descriptors: usize,
    /// Whether the session is to survive this process.
    pub keep: bool,
    /// Whether every queue needs an in-flight region, also where the front end gives none, because of that.
    pub keep_in_flight: bool,
}

/// How a ring is stopped; the session adds the bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopKind {
    /// Finish and answer; what cannot be finished is answered with an error.
    Drain,
    /// Finish and answer; what cannot be finished stays recorded as in flight.
    Leave,
    /// Write nothing more to the ring.
    Drop,
}

/// One step of a plan. Steps up to the next [`Effect::Wait`] run at the same time.
#[derive(Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Effect {
    /// Stop a ring and record its position.
    Stop(u16, StopKind),
    /// Go on when everything before it is done.
    Wait,
    SetFeatures(u64),
    Reset,
    WriteConfig(u32, Vec<u8>),
    SetMtu(u16),
    Announce([u8; 6]),
    Start(u16),
    /// Bring a running ring to the next state's memory.
    Memory(u16),
    /// Bring a running ring to the next state's log; also a barrier for what was sent before.
    Log(u16),
    Kick(u16),
    Call(u16),
    Err(u16),
    Enable(u16, bool),
}

/// What the front end is answered when everything is done.
#[derive(Debug)]
pub enum Reply {
    /// Nothing, or an acknowledgement where it asks for one.
    Ack,
    /// These bytes, and perhaps a descriptor.
    Payload(Vec<u8>, Option<OwnedFd>),
    /// The position of a vring.
    Base(u16),
}

/// What follows from a request.
#[derive(Debug)]
pub struct Plan {
    /// The state when it is done.
    pub next: SessionState,
    /// The mappings when it is done.
    pub mapped: Mapped,
    /// Descriptors that this process goes on to use.
    pub added: Vec<(Key, OwnedFd)>,
    /// Every new descriptor, for whoever keeps the state; empty where nobody does.
    pub kept: Vec<(Key, OwnedFd)>,
    /// What has to happen, in order.
    pub effects: Vec<Effect>,
    /// The answer.
    pub reply: Reply,
}

/// A plan in the making.
struct Planner<'a> {
    offer: Offer,
    old: &'a SessionState,
    plan: Plan,
}

/// Plans a request. Configuration space is read through `config`.
///
/// # Errors
/// Why the request is refused. Its descriptors are closed.
pub fn plan(
    request: Request,
    offer: Offer,
    state: &SessionState,
    mapped: &Mapped,
    config: &dyn Fn(u32, &mut [u8]),
) -> Result<Plan, Error> {
    let mut planner = Planner {
        offer,
        old: state,
        plan: Plan {
            next: state.clone(),
            mapped: mapped.clone(),
            added: Vec::new(),
            kept: Vec::new(),
            effects: Vec::new(),
            reply: Reply::Ack,
        },
    };
    planner.request(request, config)?;
    let next = &planner.plan.next;
    if next.next_key != state.next_key && next.keys().len() > offer.descriptors {
        return Err(Error::State("more descriptors than a front end may hold"));
    }
    Ok(planner.plan)
}

impl Planner<'_> {
    fn request(&mut self, request: Request, config: &dyn Fn(u32, &mut [u8])) -> Result<(), Error> {
        use Request as R;
        match request {
            R::GetFeatures => self.number(self.offer.features),
            R::SetFeatures(bits) => self.set_features(bits)?,
            R::SetOwner | R::SetLogFd => {}
            R::ResetOwner => self.reset_owner(),
            R::GetProtocolFeatures => self.number(self.offer.protocol),
            R::SetProtocolFeatures(bits) => {
                let unknown = bits & !self.offer.protocol;
                if unknown != 0 {
                    return Err(Error::Features(unknown));
                }
                self.plan.next.protocol = bits;
            }
            R::GetQueueNum => self.number(self.offer.counted.into()),
            R::SetMemTable(regions) => self.set_mem_table(regions)?,
            R::AddMemReg(info, file) => self.add_region(&info, file)?,
            R::RemMemReg(info) => self.remove_region(&info)?,
            R::GetMaxMemSlots => {
                self.needs(protocol::CONFIGURE_MEM_SLOTS)?;
                self.number(spec::MAX_SLOTS as u64);
            }
            R::SetLogBase { size, offset, file } => self.set_log(size, offset, file)?,
            R::SetVringNum { index, size } => self.set_size(index, size)?,
            R::SetVringAddr {
                index,
                log,
                desc,
                avail,
                used,
            } => self.set_addresses(index, log, Addresses { desc, avail, used })?,
            R::SetVringBase { index, base } => self.set_base(index, base)?,
            R::GetVringBase { index } => self.get_base(index),
            R::SetVringKick { index, file } => self.set_kick(index, file)?,
            R::SetVringCall { index, file } => {
                self.plan.next.ring(index).call = self.notifier("call", file)?;
                self.change(index, Effect::Call(index));
            }
            R::SetVringErr { index, file } => {
                self.plan.next.ring(index).err = self.notifier("error", file)?;
                self.change(index, Effect::Err(index));
            }
            R::SetVringEnable { index, on } => self.set_enable(index, on)?,
            R::SendRarp(mac) => {
                self.needs(protocol::RARP)?;
                self.plan.effects.push(Effect::Announce(mac));
            }
            R::NetSetMtu(mtu) => {
                self.needs(protocol::MTU)?;
                self.plan.effects.push(Effect::SetMtu(mtu));
            }
            R::SetBackendReqFd(file) => {
                self.needs(protocol::BACKEND_REQ)?;
                unix::set_channel(file.as_fd()).map_err(|e| bad_file("back-end channel", e))?;
                self.plan.next.channel = Some(self.add(file)?);
            }
            R::GetConfig {
                offset,
                size,
                flags,
            } => {
                self.needs(protocol::CONFIG)?;
                self.get_config(offset, size, flags, config);
            }
            R::SetConfig { offset, bytes, .. } => {
                self.needs(protocol::CONFIG)?;
                if offset as usize + bytes.len() > self.offer.config_len as usize {
                    return Err(value("configuration offset", offset.into()));
                }
                self.plan.effects.push(Effect::WriteConfig(offset, bytes));
            }
            R::GetInflightFd(info) => self.get_inflight(info)?,
            R::SetInflightFd(info, file) => self.set_inflight(&info, file)?,
            R::ResetDevice => {
                self.needs(protocol::RESET_DEVICE)?;
                self.reset();
            }
            R::SetStatus(status) => {
                self.needs(protocol::STATUS)?;
                if status == 0 {
                    self.reset_status();
                } else {
                    let broken = self.old.status & spec::STATUS_NEEDS_RESET;
                    self.plan.next.status = status | broken;
                }
            }
            R::GetStatus => {
                self.needs(protocol::STATUS)?;
                self.number(self.old.status.into());
            }
        }
        Ok(())
    }

    fn needs(&self, feature: u64) -> Result<(), Error> {
        if self.old.protocol & feature == 0 {
            return Err(Error::State("a protocol feature was not negotiated"));
        }
        Ok(())
    }

    fn number(&mut self, number: u64) {
        self.plan.reply = Reply::Payload(number.to_ne_bytes().to_vec(), None);
    }

    /// A descriptor that this process goes on to use.
    fn add(&mut self, file: OwnedFd) -> Result<Key, Error> {
        let key = self.keep(&file)?;
        self.plan.added.push((key, file));
        Ok(key)
    }

    /// A descriptor that is only mapped here.
    fn keep(&mut self, file: &OwnedFd) -> Result<Key, Error> {
        let key = self.plan.next.new_key();
        if self.offer.keep {
            self.plan.kept.push((key, file.try_clone()?));
        }
        Ok(key)
    }

    fn notifier(
        &mut self,
        what: &'static str,
        file: Option<OwnedFd>,
    ) -> Result<Option<Key>, Error> {
        let Some(file) = file else { return Ok(None) };
        unix::set_notifier(file.as_fd()).map_err(|e| bad_file(what, e))?;
        Ok(Some(self.add(file)?))
    }

    fn kick(&mut self, file: Option<OwnedFd>) -> Result<Option<Key>, Error> {
        let Some(file) = file else { return Ok(None) };
        unix::set_kick(file.as_fd()).map_err(|e| bad_file("kick", e))?;
        Ok(Some(self.add(file)?))
    }

    fn is_started(&self, index: u16) -> bool {
        self.old.vrings[usize::from(index)].kick.is_some()
    }

    /// Changes a running ring, and waits until its reactor has taken the change: what a front end can have under way, each
    /// with a descriptor, is one.
    fn change(&mut self, index: u16, effect: Effect) {
        if self.is_started(index) {
            let seen = [effect, Effect::Log(index), Effect::Wait];
            self.plan.effects.extend(seen);
        }
    }

    fn for_started(&mut self, effect: impl Fn(u16) -> Effect) {
        self.plan.effects.extend(self.old.started().map(effect));
        self.plan.effects.push(Effect::Wait);
    }

    /// Stops a ring as a part of the plan.
    fn stop(&mut self, index: u16, kind: StopKind) {
        self.plan.effects.push(Effect::Stop(index, kind));
        if let (StopKind::Drop, Some(region)) = (kind, self.old.inflight)
            && index < region.queues
        {
            let none = Forget {
                region,
                rings: BTreeSet::new(),
            };
            let forget = self.plan.next.forget.get_or_insert(none);
            forget.rings.insert(index);
            self.plan.mapped.forget = self.plan.mapped.inflight.clone();
        }
        let ring = self.plan.next.ring(index);
        ring.kick = None;
        ring.own_inflight = None;
        self.plan.mapped.own_inflight.remove(&index);
    }

    /// Makes sure that a ring does not run, because its geometry is to change. A front end that works
    /// on a running ring is wrong; but User-Mode Linux gives rings up by disabling them, and sets
    /// them up again when a driver is bound again.
    fn quiesce(&mut self, index: u16) -> Result<(), Error> {
        if !self.is_started(index) || self.plan.next.vrings[usize::from(index)].kick.is_none() {
            return Ok(());
        }
        if self.old.is_enabled(index) {
            return Err(Error::State("a ring that runs cannot be changed so"));
        }
        self.stop(index, StopKind::Drop);
        self.plan.effects.push(Effect::Wait);
        Ok(())
    }

    fn quiesce_all(&mut self) -> Result<(), Error> {
        for index in 0..self.offer.queues {
            self.quiesce(index)?;
        }
        Ok(())
    }

    fn set_features(&mut self, bits: u64) -> Result<(), Error> {
        let unknown = bits & !self.offer.features;
        if unknown != 0 {
            return Err(Error::Features(unknown));
        }
        let same_driver = self
            .old
            .features
            .is_some_and(|old| (old ^ bits) & !features::LOG_ALL == 0);
        if !same_driver {
            self.quiesce_all()?;
        }
        self.plan.next.features = Some(bits);
        // The end of a migration: the log is not written to any more. One that was set ahead of the feature stays, and so does one
        // that a reset finds, as QEMU sets features before it sends the log again.
        if self.old.has(features::LOG_ALL) && bits & features::LOG_ALL == 0 {
            self.plan.next.log = None;
            self.plan.mapped.log = None;
        }
        if !same_driver {
            let driver = self.plan.next.driver_features();
            self.plan.effects.push(Effect::SetFeatures(driver));
        } else if self.old.features != Some(bits) {
            // A migration starts or ends (vhost-user, "Migration").
            self.for_started(Effect::Log);
        }
        Ok(())
    }

    /// "It is recommended that back-ends either ignore this message, or use it to disable all rings."
    fn reset_owner(&mut self) {
        for index in self.old.started().collect::<Vec<_>>() {
            self.stop(index, StopKind::Drain);
        }
        self.plan.effects.push(Effect::Wait);
    }

    /// Status 0 (virtio 1.3 §2.4).
    ///
    /// Front ends that pause a VM send it too: QEMU 8 and later after `GET_VRING_BASE`, QEMU 7.2 before, so that
    /// rings still run. They are stopped as `GET_VRING_BASE` would stop them, and what that is to answer
    /// is kept, with the features that give it its form.
    fn reset_status(&mut self) {
        for index in self.old.started().collect::<Vec<_>>() {
            self.stop(index, StopKind::Drain);
        }
        self.plan.effects.extend([Effect::Wait, Effect::Reset]);
        if self.old.features.is_some() {
            let driver = self.old.driver_features();
            self.plan.effects.push(Effect::SetFeatures(driver));
        }
        self.plan.next.reset_status();
        self.plan.mapped.inflight = None;
    }

    /// `RESET_DEVICE`.
    fn reset(&mut self) {
        for index in self.old.started().collect::<Vec<_>>() {
            self.stop(index, StopKind::Drop);
        }
        self.plan.effects.extend([Effect::Wait, Effect::Reset]);
        self.plan.next.reset();
        self.plan.mapped.inflight = None;
    }

    fn set_memory(&mut self, regions: Vec<Region>) -> Result<(), Error> {
        let memory = GuestMemory::new(regions)?;
        if let Some(log) = &self.plan.mapped.log {
            // Marks past its end would be dropped without a word: a front end makes the log larger first, as QEMU does.
            log.covers(&memory)?;
        }
        self.plan.mapped.memory = memory;
        self.for_started(Effect::Memory);
        Ok(())
    }

    fn set_mem_table(&mut self, table: Vec<(RegionInfo, OwnedFd)>) -> Result<(), Error> {
        self.plan.next.regions.clear();
        let mut regions = Vec::with_capacity(table.len());
        for (info, file) in table {
            regions.push(self.map_region(&info, file)?);
        }
        self.set_memory(regions)
    }

    /// Whether so many bytes more can be mapped. Files are sparse: what is asked for costs a front end nothing.
    fn room_for(&self, bytes: u64) -> Result<(), Error> {
        let next = &self.plan.next;
        let regions = next.regions.iter().map(|r| r.size);
        let log = next.log.iter().map(|l| l.size);
        let inflight = next.inflight.iter().map(|i| i.size);
        let mapped = regions
            .chain(log)
            .chain(inflight)
            .fold(bytes, u64::saturating_add);
        if mapped > spec::MAX_MAPPED {
            return Err(Error::State("more memory than a front end may have mapped"));
        }
        Ok(())
    }

    fn map_region(&mut self, info: &RegionInfo, file: OwnedFd) -> Result<Region, Error> {
        self.room_for(info.size)?;
        let state = RegionState::new(info, self.keep(&file)?);
        let region = self.plan.mapped.region(&state, file)?;
        self.plan.next.regions.push(state);
        Ok(region)
    }

    fn add_region(&mut self, info: &RegionInfo, file: OwnedFd) -> Result<(), Error> {
        self.needs(protocol::CONFIGURE_MEM_SLOTS)?;
        if self.old.regions.len() >= spec::MAX_SLOTS {
            return Err(Error::State("all memory slots are taken"));
        }
        let region = self.map_region(info, file)?;
        let present = self.plan.mapped.memory.regions().cloned();
        self.set_memory(present.chain([region]).collect())
    }

    fn remove_region(&mut self, info: &RegionInfo) -> Result<(), Error> {
        self.needs(protocol::CONFIGURE_MEM_SLOTS)?;
        // The offset is of no matter: "identified by its guest address, user address and size".
        let at = self
            .old
            .regions
            .iter()
            .position(|r| (r.guest, r.user, r.size) == (info.guest, info.user, info.size));
        let at = at.ok_or(Error::State("no such memory region"))?;
        self.plan.next.regions.remove(at);
        let present = self.plan.mapped.memory.regions();
        let others = present.filter(|r| r.guest() != info.guest).cloned();
        self.set_memory(others.collect())
    }

    fn set_log(&mut self, size: u64, offset: u64, file: OwnedFd) -> Result<(), Error> {
        self.needs(protocol::LOG_SHMFD)?;
        self.plan.next.log = None;
        self.room_for(size)?;
        let key = self.keep(&file)?;
        let log = DirtyLog::new(file, offset, size)?;
        log.covers(&self.plan.mapped.memory)?;
        self.plan.mapped.log = Some(Arc::new(log));
        self.plan.next.log = Some(LogState {
            file: key,
            size,
            offset,
        });
        if self.old.has(features::LOG_ALL) {
            self.for_started(Effect::Log);
        }
        // Always answered. QEMU ignores what the answer holds, the crate `vhost` wants the request's.
        let raw = RawLog {
            size: size.into(),
            offset: offset.into(),
        };
        self.plan.reply = Reply::Payload(raw.as_bytes().to_vec(), None);
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, flags: u32, config: &dyn Fn(u32, &mut [u8])) {
        let head = RawConfig {
            offset: offset.into(),
            size: size.into(),
            flags: flags.into(),
        };
        let mut payload = head.as_bytes().to_vec();
        let at = payload.len();
        payload.resize(at + size as usize, 0);
        config(offset, &mut payload[at..]);
        self.plan.reply = Reply::Payload(payload, None);
    }

    fn get_inflight(&mut self, info: InflightInfo) -> Result<(), Error> {
        self.needs(protocol::INFLIGHT_SHMFD)?;
        let size = u64::from(info.queues) * inflight::queue_len(info.queue_size);
        if size > i32::MAX as u64 {
            return Err(value("in-flight region size", size));
        }
        // Not ours to keep: it is in use when the front end gives it back with SET_INFLIGHT_FD.
        let file = unix::sealed_memory(c"vhost-user-inflight", size)?;
        let answer = InflightInfo {
            size,
            offset: 0,
            ..info
        };
        self.plan.reply = Reply::Payload(answer.to_wire(), Some(file));
        Ok(())
    }

    fn set_inflight(&mut self, info: &InflightInfo, file: OwnedFd) -> Result<(), Error> {
        self.needs(protocol::INFLIGHT_SHMFD)?;
        self.quiesce_all()?;
        let needed = u64::from(info.queues) * inflight::queue_len(info.queue_size);
        if info.size < needed || info.size > i32::MAX as u64 {
            return Err(value("in-flight region size", info.size));
        }
        if !info.offset.is_multiple_of(64) {
            return Err(value("in-flight region offset", info.offset));
        }
        self.plan.next.inflight = None;
        self.room_for(info.size)?;
        let key = self.keep(&file)?;
        let region = Mapping::new(file, info.offset, info.size)?;
        self.plan.mapped.inflight = Some(Arc::new(region));
        self.plan.next.inflight = Some(InflightState {
            file: key,
            size: info.size,
            offset: info.offset,
            queues: info.queues,
            queue_size: info.queue_size,
        });
        Ok(())
    }
}

/// The payload of the answer to `GET_VRING_BASE`.
pub fn base_payload(state: &SessionState, index: u16) -> Vec<u8> {
    let raw = RawVringState {
        index: u32::from(index).into(),
        num: state.vrings[usize::from(index)].base.into(),
    };
    raw.as_bytes().to_vec()
}

/// The descriptors of `files` that `state` names.
pub fn retain(files: &mut Descriptors, state: &SessionState) {
    let keys = state.keys();
    files.retain(|key, _| keys.contains(key));
}

fn value(field: &'static str, value: u64) -> Error {
    Error::Value { field, value }
}

fn bad_file(what: &'static str, source: std::io::Error) -> Error {
    Error::Descriptor { what, source }
}
