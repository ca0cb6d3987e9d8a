//! Asynchronous events (Base 2.1 §5.1.2): requests that the host has given, and events that wait for one.
//!
//! After an event of a type was told, that type is masked until the host has read the log page that the event named. Events that happen meanwhile wait, each once; those
//! whose log page is read are told by that, and do not wait any longer. So neither a host that never asks nor one that never reads makes anything grow.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::spec::feature::event as enable;
use crate::spec::log::id;
use crate::spec::{Status, log::warning};

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Event {
    /// Write to Invalid Doorbell Register.
    BadDoorbellQueue,
    /// Invalid Doorbell Write Value.
    BadDoorbellValue,
    /// NVM subsystem Reliability: reliability is degraded, or media is read-only.
    Reliability,
    /// Temperature Threshold.
    Temperature,
    /// Spare Below Threshold.
    Spare,
    /// Attached Namespace Attribute Changed.
    NamespaceChanged,
    /// Asymmetric Namespace Access Change.
    AnaChanged,
}

impl Event {
    /// Type, information, and the log page with more of it.
    fn parts(self) -> (u8, u8, u8) {
        match self {
            Self::BadDoorbellQueue => (0, 0, id::ERRORS),
            Self::BadDoorbellValue => (0, 1, id::ERRORS),
            Self::Reliability => (1, 0, id::HEALTH),
            Self::Temperature => (1, 1, id::HEALTH),
            Self::Spare => (1, 2, id::HEALTH),
            Self::NamespaceChanged => (2, 0, id::CHANGED),
            Self::AnaChanged => (2, 3, id::ANA),
        }
    }

    /// Dword 0 of the completion.
    fn dword(self) -> u32 {
        let (kind, info, log) = self.parts();
        u32::from(kind) | u32::from(info) << 8 | u32::from(log) << 16
    }

    /// The bits of the Asynchronous Event Configuration, of which one has to be set; 0: it cannot be turned off.
    fn enabled_by(self) -> u32 {
        match self {
            Self::BadDoorbellQueue | Self::BadDoorbellValue => 0,
            Self::Reliability => u32::from(warning::DEGRADED | warning::READ_ONLY),
            Self::Temperature => u32::from(warning::TEMPERATURE),
            Self::Spare => u32::from(warning::SPARE),
            Self::NamespaceChanged => enable::NAMESPACE,
            Self::AnaChanged => enable::ANA,
        }
    }
}

/// Types of events: error, SMART / health, notice.
const TYPES: usize = 3;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Events {
    /// Requests, the oldest first.
    requests: VecDeque<u16>,
    /// What has happened and was not told. Each event once.
    waiting: Vec<Event>,
    /// By type: the log page that has to be read.
    masked: [Option<u8>; TYPES],
    /// The critical warnings that were there when it was looked last.
    warning: u8,
}

impl Events {
    /// Keeps a request.
    pub fn request(&mut self, cid: u16, limit: usize) -> Result<(), Status> {
        if self.requests.len() >= limit {
            return Err(Status::ASYNC_EVENT_LIMIT);
        }
        if self.requests.contains(&cid) {
            return Err(Status::CID_CONFLICT);
        }
        self.requests.push_back(cid);
        Ok(())
    }

    /// Whether there are no more requests than a host can give.
    pub fn is_bounded(&self, limit: usize) -> bool {
        self.requests.len() <= limit
    }

    pub fn withdraw(&mut self, cid: u16) -> bool {
        let at = self.requests.iter().position(|c| *c == cid);
        at.and_then(|at| self.requests.remove(at)).is_some()
    }

    /// Something happened. What the host has not enabled is not told.
    pub fn report(&mut self, event: Event, enabled: u32) {
        let by = event.enabled_by();
        if (by == 0 || by & enabled != 0) && !self.waiting.contains(&event) {
            self.waiting.push(event);
        }
    }

    /// Looks at the critical warnings as they are: each that was not there before is an event.
    pub fn health(&mut self, now: u8, enabled: u32) {
        let new = now & !std::mem::replace(&mut self.warning, now);
        for (bits, event) in [
            (warning::DEGRADED | warning::READ_ONLY, Event::Reliability),
            (warning::TEMPERATURE, Event::Temperature),
            (warning::SPARE, Event::Spare),
        ] {
            if u32::from(new & bits) & enabled != 0 {
                self.report(event, enabled);
            }
        }
    }

    /// The thresholds have changed: warnings that hold now are events again.
    pub fn rearm_temperature(&mut self) {
        self.warning &= !warning::TEMPERATURE;
    }

    pub fn poll(&mut self) -> Option<(u16, u32)> {
        let masked = self.masked;
        let can = |event: &Event| masked[usize::from(event.parts().0)].is_none();
        let at = self.waiting.iter().position(can)?;
        let cid = self.requests.pop_front()?;
        let event = self.waiting.remove(at);
        let (kind, _, log) = event.parts();
        self.masked[usize::from(kind)] = Some(log);
        Some((cid, event.dword()))
    }

    /// The host has read a log page, and did not ask to keep its event.
    pub fn log_read(&mut self, log: u8) {
        self.waiting.retain(|event| event.parts().2 != log);
        for masked in &mut self.masked {
            if *masked == Some(log) {
                *masked = None;
            }
        }
    }
}
