//! Get Features and Set Features (Base 2.1 §5.1.11, §5.1.25; NVM Command Set 1.1 §4.1.3).
//!
//! None is kept over a reset, so none can be saved. What cannot be done is not taken: a value that would mean nothing here is refused.

use std::sync::atomic::Ordering;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, IntoBytes};

use super::Admin;
use super::parse::feature_len;
use crate::spec::admin::RawFeature;
use crate::spec::feature::{HostBehavior, Select, Timestamp, capability, event, id};
use crate::spec::log::warning;
use crate::spec::{ALL_NAMESPACES, Status};

/// The default threshold for too hot, and WCTEMP of Identify: 70 °C.
pub(super) const WARNING_KELVINS: u16 = 343;
/// Arbitration burst: no limit.
const BURST: u32 = 7;
/// The features that there are, and whether they can be set.
pub(super) const FEATURES: [(u8, u32); 14] = [
    (id::ARBITRATION, capability::CHANGEABLE),
    (id::POWER, capability::CHANGEABLE),
    (id::TEMPERATURE, capability::CHANGEABLE),
    // There is nothing that a time limit could be passed on to, so it stays "none".
    (id::ERROR_RECOVERY, capability::NAMESPACE),
    (id::WRITE_CACHE, capability::CHANGEABLE),
    (id::QUEUES, capability::CHANGEABLE),
    (id::COALESCING, capability::CHANGEABLE),
    (id::VECTOR, capability::CHANGEABLE),
    (id::WRITE_ATOMICITY, capability::CHANGEABLE),
    (id::ASYNC_EVENTS, capability::CHANGEABLE),
    (id::TIMESTAMP, capability::CHANGEABLE),
    (id::HOST_BEHAVIOR, capability::CHANGEABLE),
    (id::COMMAND_SET_PROFILE, capability::CHANGEABLE),
    (id::HOST_ID, capability::CHANGEABLE),
];

/// Which of the two thresholds of the composite temperature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Threshold {
    Over,
    Under,
}

/// Those that are neither in [`crate::health::Settings`] nor about queues.
#[derive(Debug)]
pub(super) struct Features {
    power: u32,
    over: u16,
    under: u16,
    atomicity: u32,
    events: u32,
    /// Milliseconds, when they were set, and the origin.
    timestamp: (u64, Instant, u8),
    /// Advanced Command Retry Enable.
    retry: u8,
    host_id: [u8; 16],
}

/// [`Features`] for another process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedFeatures {
    power: u32,
    over: u16,
    under: u16,
    atomicity: u32,
    events: u32,
    /// Milliseconds, and the origin.
    timestamp: (u64, u8),
    /// When it was saved, in milliseconds of this machine's monotonic clock.
    saved_at: u64,
    retry: u8,
    host_id: [u8; 16],
}

/// The clock that all processes of a machine share.
fn monotonic_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    (now.tv_sec as u64)
        .saturating_mul(1000)
        .saturating_add(now.tv_nsec as u64 / 1_000_000)
}

impl Features {
    pub fn new(now: Instant) -> Self {
        Self {
            power: 0,
            over: WARNING_KELVINS,
            under: 0,
            atomicity: 0,
            events: 0,
            timestamp: (0, now, 0),
            retry: 0,
            host_id: [0; 16],
        }
    }

    pub fn reset(&mut self, now: Instant) {
        *self = Self::new(now);
    }

    /// As [`Features::restored`] takes it.
    pub fn save(&self, now: Instant) -> SavedFeatures {
        let (set, at, origin) = self.timestamp;
        let passed = now.saturating_duration_since(at).as_millis() as u64;
        SavedFeatures {
            power: self.power,
            over: self.over,
            under: self.under,
            atomicity: self.atomicity,
            events: self.events,
            timestamp: (set.wrapping_add(passed), origin),
            saved_at: monotonic_ms(),
            retry: self.retry,
            host_id: self.host_id,
        }
    }

    /// What another process of this machine has saved; the time stamp has gone on.
    pub fn restored(saved: &SavedFeatures, now: Instant) -> Self {
        let (set, origin) = saved.timestamp;
        let passed = monotonic_ms().saturating_sub(saved.saved_at);
        Self {
            power: saved.power,
            over: saved.over,
            under: saved.under,
            atomicity: saved.atomicity,
            events: saved.events,
            timestamp: (set.wrapping_add(passed), now, origin),
            retry: saved.retry,
            host_id: saved.host_id,
        }
    }

    pub fn events_enabled(&self) -> u32 {
        self.events
    }

    fn timestamp(&self, now: Instant) -> Timestamp {
        let (set, at, origin) = self.timestamp;
        let passed = now.saturating_duration_since(at).as_millis() as u64;
        let value = set.wrapping_add(passed).to_le_bytes();
        Timestamp {
            milliseconds: *value.first_chunk().expect("8 bytes"),
            attributes: origin << 1,
            reserved: 0,
        }
    }
}

impl Admin {
    /// Critical warnings as they are now.
    pub(super) fn warning(&self) -> u8 {
        let kelvins = self.counters.kelvins.load(Ordering::Relaxed);
        let Features { over, under, .. } = self.features;
        let spare = self.counters.spare.load(Ordering::Relaxed);
        let least = self.counters.spare_threshold.load(Ordering::Relaxed);
        let mut warnings = 0;
        if kelvins != 0 && (kelvins >= over || kelvins <= under) {
            warnings |= warning::TEMPERATURE;
        }
        if spare < least {
            warnings |= warning::SPARE;
        }
        warnings
    }

    fn capabilities(&self, fid: u8) -> Result<u32, Status> {
        // Without a volatile cache there is no such feature (§5.1.25, Volatile Write Cache).
        if fid == id::WRITE_CACHE && !self.has_cache {
            return Err(Status::INVALID_FIELD);
        }
        let known = FEATURES.iter().find(|(known, _)| *known == fid);
        known.map(|(_, able)| *able).ok_or(Status::INVALID_FIELD)
    }

    /// Whether the NSID fits a feature of these capabilities.
    fn check_scope(&self, raw: &RawFeature, able: u32, set: bool) -> Result<(), Status> {
        let by_namespace = able & capability::NAMESPACE != 0;
        let known = |nsid| {
            let limit = self.subsystem.options().max_namespaces;
            self.table.get(nsid, limit).map(|_| ())
        };
        match raw.nsid {
            // All at once can be set, but they have no one value to get.
            ALL_NAMESPACES if by_namespace && set => Ok(()),
            nsid if by_namespace => known(nsid),
            0 | ALL_NAMESPACES => Ok(()),
            nsid => {
                known(nsid)?;
                match set {
                    true => Err(Status::NOT_NAMESPACE_SPECIFIC),
                    false => Ok(()),
                }
            }
        }
    }

    /// Dword 0, and the data.
    pub(super) fn get_feature(
        &self,
        raw: &RawFeature,
        select: Select,
        now: Instant,
    ) -> Result<(u32, Vec<u8>), Status> {
        let able = self.capabilities(raw.fid)?;
        self.check_scope(raw, able, false)?;
        match select {
            Select::Capabilities => Ok((able, Vec::new())),
            Select::Current => self.current(raw, now),
            Select::Default | Select::Saved => self.default(raw),
        }
    }

    fn current(&self, raw: &RawFeature, now: Instant) -> Result<(u32, Vec<u8>), Status> {
        let (features, settings) = (&self.features, &self.settings);
        let dword = match raw.fid {
            id::ARBITRATION => settings.arbitration.load(Ordering::Relaxed),
            id::POWER => features.power,
            id::TEMPERATURE => u32::from(match threshold(raw.cdw11, false)? {
                Threshold::Over => features.over,
                Threshold::Under => features.under,
            }),
            id::WRITE_CACHE => u32::from(settings.write_cache.load(Ordering::Relaxed)),
            id::QUEUES => counts(self.queues.granted()),
            id::COALESCING => settings.coalescing.load(Ordering::Relaxed).into(),
            id::VECTOR => {
                let cell = self.vector(raw.cdw11)?;
                raw.cdw11 & 0xffff | u32::from(cell.load(Ordering::Relaxed)) << 16
            }
            id::WRITE_ATOMICITY => features.atomicity,
            id::ASYNC_EVENTS => features.events,
            id::TIMESTAMP => {
                return Ok((0, features.timestamp(now).as_bytes().to_vec()));
            }
            id::HOST_BEHAVIOR => {
                let mut data = vec![0; feature_len(raw)];
                data[0] = features.retry;
                return Ok((0, data));
            }
            id::HOST_ID => return Ok((0, features.host_id[..feature_len(raw)].to_vec())),
            // Error recovery: no time limit, no error for deallocated blocks. I/O command sets: the first, and only, combination.
            _ => 0,
        };
        Ok((dword, Vec::new()))
    }

    fn default(&self, raw: &RawFeature) -> Result<(u32, Vec<u8>), Status> {
        let dword = match raw.fid {
            id::ARBITRATION => BURST,
            id::TEMPERATURE => match threshold(raw.cdw11, false)? {
                Threshold::Over => WARNING_KELVINS.into(),
                Threshold::Under => 0,
            },
            id::WRITE_CACHE => 1,
            id::QUEUES => counts((self.queues.limit(), self.queues.limit())),
            id::VECTOR => {
                self.vector(raw.cdw11)?;
                raw.cdw11 & 0xffff
            }
            _ => 0,
        };
        Ok((dword, vec![0; feature_len(raw)]))
    }

    /// Dword 0.
    pub(super) fn set_feature(
        &mut self,
        raw: &RawFeature,
        data: &[u8],
        now: Instant,
    ) -> Result<u32, Status> {
        let able = self.capabilities(raw.fid)?;
        self.check_scope(raw, able, true)?;
        let value = raw.cdw11;
        let event_bits = self.event_bits();
        let (features, settings) = (&mut self.features, &self.settings);
        match raw.fid {
            // Weights are for an arbitration that is not offered.
            id::ARBITRATION => settings.arbitration.store(value, Ordering::Relaxed),
            // There is one power state; the workload hint is kept.
            id::POWER if value & 0x1f != 0 => return Err(Status::INVALID_FIELD),
            id::POWER => features.power = value & 0xe0,
            id::TEMPERATURE => {
                let kelvins = value as u16;
                match threshold(value, true)? {
                    Threshold::Over => features.over = kelvins,
                    Threshold::Under => features.under = kelvins,
                }
                self.events.rearm_temperature();
            }
            id::ERROR_RECOVERY if value & 1 << 16 != 0 => return Err(Status::INVALID_FIELD),
            id::ERROR_RECOVERY if value & 0xffff != 0 => return Err(Status::NOT_CHANGEABLE),
            id::WRITE_CACHE => settings
                .write_cache
                .store(value & 1 != 0, Ordering::Relaxed),
            id::QUEUES => {
                // Zero's based, and 0xffff is none that can be asked for (§5.1.25, Number of Queues).
                let (sqs_z, cqs_z) = (value as u16, (value >> 16) as u16);
                let (Some(sqs), Some(cqs)) = (sqs_z.checked_add(1), cqs_z.checked_add(1)) else {
                    return Err(Status::INVALID_FIELD);
                };
                return self.queues.grant(sqs, cqs).map(counts);
            }
            id::COALESCING => settings.coalescing.store(value as u16, Ordering::Relaxed),
            id::VECTOR => {
                let on = value & 1 << 16 != 0;
                self.vector(value)?.store(on, Ordering::Relaxed);
            }
            id::WRITE_ATOMICITY => features.atomicity = value & 1,
            id::ASYNC_EVENTS => features.events = value & event_bits,
            id::TIMESTAMP => {
                let raw = Timestamp::read_from_bytes(data).map_err(|_| Status::INVALID_FIELD)?;
                let mut bytes = [0; 8];
                bytes[..6].copy_from_slice(&raw.milliseconds);
                features.timestamp = (u64::from_le_bytes(bytes), now, 1);
            }
            id::HOST_BEHAVIOR => {
                let raw = HostBehavior::ref_from_bytes(data).map_err(|_| Status::INVALID_FIELD)?;
                let others = [raw.telemetry, raw.formats, raw.dispersed];
                // Nothing of these is offered, so they cannot be turned on.
                if raw.retry > 1 || others != [0; 3] || raw.copy_formats.get() != 0 {
                    return Err(Status::INVALID_FIELD);
                }
                features.retry = raw.retry;
            }
            id::COMMAND_SET_PROFILE if value & 0x1ff != 0 => {
                return Err(Status::COMMAND_SET_COMBINATION);
            }
            id::HOST_ID => {
                features.host_id = [0; 16];
                features.host_id[..data.len()].copy_from_slice(data);
            }
            _ => {}
        }
        Ok(0)
    }

    fn vector(&self, value: u32) -> Result<&std::sync::atomic::AtomicBool, Status> {
        let at = usize::from(value as u16);
        self.settings
            .uncoalesced
            .get(at)
            .ok_or(Status::INVALID_FIELD)
    }

    /// The events that a host can enable: critical warnings that there are, and notices of OAES.
    fn event_bits(&self) -> u32 {
        self.optional_events() | u32::from(warning::SPARE | warning::TEMPERATURE) & event::HEALTH
    }

    /// OAES of Identify Controller.
    pub(super) fn optional_events(&self) -> u32 {
        match self.subsystem.options().shared {
            true => event::NAMESPACE | event::ANA,
            false => event::NAMESPACE,
        }
    }
}

/// Number of Queues as dword 0: zero's based.
fn counts((sqs, cqs): (u16, u16)) -> u32 {
    u32::from(sqs - 1) | u32::from(cqs - 1) << 16
}

/// Which threshold a dword names: of the composite temperature, as there is no other sensor. `all`: "all sensors" may be named.
fn threshold(value: u32, all: bool) -> Result<Threshold, Status> {
    let sensor = value >> 16 & 0xf;
    if sensor != 0 && !(all && sensor == 0xf) {
        return Err(Status::INVALID_FIELD);
    }
    match value >> 20 & 0b11 {
        0 => Ok(Threshold::Over),
        1 => Ok(Threshold::Under),
        _ => Err(Status::INVALID_FIELD),
    }
}
