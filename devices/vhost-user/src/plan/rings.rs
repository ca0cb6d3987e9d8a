//! Requests that concern one vring.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use bluff_memory::Mapping;
use bluff_virtio::{features, inflight};

use super::{Effect, Planner, Reply, StopKind, value};
use crate::spec::{self, protocol};
use crate::state::{Addresses, Kick};
use crate::{Error, unix};

/// The base of a packed ring that was never used: both positions 0, both wrap counters 1 (virtio 1.3
/// §2.8.1).
const FRESH_PACKED: u32 = 0x8000_8000;

impl Planner<'_> {
    pub(super) fn set_size(&mut self, index: u16, size: u16) -> Result<(), Error> {
        if self.plan.next.ring(index).size == size {
            return Ok(());
        }
        self.quiesce(index)?;
        // QEMU sets the in-flight region first, so the size is checked against it.
        if self.old.inflight.is_some_and(|i| size > i.queue_size) {
            return Err(value("vring size", size.into()));
        }
        self.plan.next.ring(index).size = size;
        Ok(())
    }

    pub(super) fn set_addresses(
        &mut self,
        index: u16,
        log: Option<u64>,
        at: Addresses,
    ) -> Result<(), Error> {
        for (field, addr, align) in [
            ("descriptor area", at.desc, 16),
            ("driver area", at.avail, 2),
            ("device area", at.used, 4),
        ] {
            if !addr.is_multiple_of(align) {
                return Err(value(field, addr));
            }
        }
        if self.plan.next.ring(index).addresses != Some(at) {
            self.quiesce(index)?;
        }
        let ring = self.plan.next.ring(index);
        ring.addresses = Some(at);
        ring.log = log;
        // Still running: only the log flag can have changed, at the start or the end of a migration.
        if ring.kick.is_some() {
            self.plan.effects.extend([Effect::Log(index), Effect::Wait]);
        }
        Ok(())
    }

    pub(super) fn set_base(&mut self, index: u16, base: u32) -> Result<(), Error> {
        let packed = self.old.has(features::RING_PACKED);
        if self.old.features.is_some() && !packed && base > 0xffff {
            return Err(value("vring base", base.into()));
        }
        self.quiesce(index)?;
        // User-Mode Linux begins a packed ring with base 0, which has both wrap counters wrong. A front end
        // that cannot migrate has no other ring to go on with than a fresh one, or one that we stopped.
        let migrates = self.old.protocol & protocol::LOG_SHMFD != 0;
        let stopped = self.old.vrings[usize::from(index)].stopped;
        let base = match base {
            0 if packed && !migrates && !stopped => FRESH_PACKED,
            base => base,
        };
        self.plan.next.ring(index).base = base;
        Ok(())
    }

    pub(super) fn get_base(&mut self, index: u16) {
        if self.is_started(index) {
            let leave = self.old.protocol & protocol::GET_VRING_BASE_INFLIGHT != 0
                && self.old.inflight.is_some();
            self.stop(
                index,
                if leave {
                    StopKind::Leave
                } else {
                    StopKind::Drain
                },
            );
            self.plan.effects.push(Effect::Wait);
        }
        self.plan.reply = Reply::Base(index);
    }

    pub(super) fn set_kick(&mut self, index: u16, file: Option<OwnedFd>) -> Result<(), Error> {
        let started = self.is_started(index);
        if !started {
            self.check_start(index)?;
        }
        let kick = self.kick(file)?;
        self.plan.next.ring(index).kick = Some(kick.map_or(Kick::Polled, Kick::File));
        if started {
            self.change(index, Effect::Kick(index));
            return Ok(());
        }
        if self.offer.keep_in_flight && self.old.inflight.is_none() {
            // A fresh region at each start: nothing is in flight then.
            let len = inflight::queue_len(self.old.vrings[usize::from(index)].size);
            let file = unix::sealed_memory(c"bluff-inflight", len)?;
            let key = self.keep(&file)?;
            self.plan.next.ring(index).own_inflight = Some(key);
            let region = Arc::new(Mapping::new(file, 0, len)?);
            self.plan.mapped.own_inflight.insert(index, region);
        }
        self.plan.effects.push(Effect::Start(index));
        Ok(())
    }

    /// Whether everything is there that a ring needs to start.
    fn check_start(&self, index: u16) -> Result<(), Error> {
        let ring = &self.old.vrings[usize::from(index)];
        let Some(bits) = self.old.features else {
            return Err(Error::State("kick before features"));
        };
        let (Some(at), 1..) = (ring.addresses, ring.size) else {
            return Err(Error::State("kick before size and addresses"));
        };
        let packed = bits & features::RING_PACKED != 0;
        if !packed && !ring.size.is_power_of_two() {
            return Err(value("split vring size", ring.size.into()));
        }
        if !packed && ring.base > 0xffff {
            return Err(value("vring base", ring.base.into()));
        }
        if let Some(i) = &self.old.inflight
            && (index >= i.queues || ring.size > i.queue_size)
        {
            return Err(Error::State("the in-flight region does not hold this ring"));
        }
        // Lengths of virtio 1.3 §2.7 and §2.8.
        let n = u64::from(ring.size);
        let event = if bits & features::EVENT_IDX != 0 {
            2
        } else {
            0
        };
        let (avail, used, align) = if packed {
            (4, 4, 4)
        } else {
            (4 + 2 * n + event, 4 + 8 * n + event, 2)
        };
        let memory = &self.plan.mapped.memory;
        let space = bluff_memory::Space::User;
        memory.contiguous(space, at.desc, 16 * n, 16)?;
        memory.contiguous(space, at.avail, avail, align)?;
        memory.contiguous(space, at.used, used, 4)?;
        Ok(())
    }

    pub(super) fn set_enable(&mut self, index: u16, on: bool) -> Result<(), Error> {
        // QEMU's network devices enable rings before SET_FEATURES, but never without having set
        // protocol features.
        if !self.old.has(spec::F_PROTOCOL_FEATURES) && self.old.protocol == 0 {
            return Err(Error::State("enable before protocol features"));
        }
        let was = self.old.is_enabled(index);
        self.plan.next.ring(index).enabled = on;
        let is = self.plan.next.is_enabled(index);
        if was != is {
            self.change(index, Effect::Enable(index, is));
        }
        Ok(())
    }
}
