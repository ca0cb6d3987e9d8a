//! Everything that a front end has negotiated, as one value that can be serialised.
//!
//! Descriptors are named by keys and live elsewhere: the state goes into a message, they go beside it.
//! What can be computed from both (mappings, queues) is in [`Mapped`] and in the device.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bluff_memory::{DirtyLog, GuestMemory, Mapping, Region, RegionSpec, Space};
use bluff_virtio::inflight::{self, InflightQueue};
use bluff_virtio::{Position, QueueLog, RingAddresses, features};
use serde::{Deserialize, Serialize};

use crate::message::RegionInfo;
use crate::{Error, spec};

/// The version of [`SessionState`] that this code writes, and the only one that it takes up.
pub const VERSION: u32 = 1;

pub use bluff_attachment::keeper::{Descriptors, Key};

/// A memory region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionState {
    /// Guest physical address.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// Front-end address.
    pub user: u64,
    /// Offset in the file.
    pub offset: u64,
    /// The file.
    pub file: Key,
}

impl RegionState {
    /// A region of `file`.
    pub fn new(info: &RegionInfo, file: Key) -> Self {
        Self {
            guest: info.guest,
            size: info.size,
            user: info.user,
            offset: info.offset,
            file,
        }
    }

    fn spec(&self, file: OwnedFd) -> RegionSpec {
        RegionSpec {
            guest: self.guest,
            len: self.size,
            user: self.user,
            offset: self.offset,
            file,
        }
    }
}

/// How a ring is kicked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kick {
    /// Not at all: the ring has to be polled.
    Polled,
    /// Through a descriptor.
    File(Key),
}

/// Where the parts of a ring are: front-end addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addresses {
    /// Descriptor area.
    pub desc: u64,
    /// Driver area.
    pub avail: u64,
    /// Device area.
    pub used: u64,
}

/// One vring.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VringState {
    /// Descriptors; 0 before `SET_VRING_NUM`.
    pub size: u16,
    /// Where it is.
    pub addresses: Option<Addresses>,
    /// Guest address of the used ring, where writes to it are to be logged.
    pub log: Option<u64>,
    /// Where to go on, in the form of `SET_VRING_BASE`.
    pub base: u32,
    /// The ring was stopped, and `base` is where it stood.
    #[serde(default)]
    pub stopped: bool,
    /// Set while the ring is started.
    pub kick: Option<Kick>,
    /// How the driver is notified.
    pub call: Option<Key>,
    /// How a broken ring is reported.
    pub err: Option<Key>,
    /// What the last `SET_VRING_ENABLE` said.
    pub enabled: bool,
    /// An in-flight region of our own, where the front end gave none: its file.
    pub own_inflight: Option<Key>,
}

/// The in-flight region of the front end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InflightState {
    /// The file.
    pub file: Key,
    /// Bytes.
    pub size: u64,
    /// Offset in the file.
    pub offset: u64,
    /// Queues.
    pub queues: u16,
    /// Descriptors of a queue.
    pub queue_size: u16,
}

/// Records of requests that their driver has given up.
///
/// They go only when it is recorded that the rings do not run any more: a process that took a running ring up without its
/// record would take what was completed out of order for what is to be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forget {
    /// The region.
    pub region: InflightState,
    /// The vrings.
    pub rings: BTreeSet<u16>,
}

/// The dirty log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogState {
    /// The file.
    pub file: Key,
    /// Bytes.
    pub size: u64,
    /// Offset in the file.
    pub offset: u64,
}

/// The part of a message that has been taken off the socket before the rest of it came.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Partial {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Its descriptors.
    pub files: Vec<Key>,
    /// There were more descriptors than are allowed.
    pub truncated: bool,
}

/// A session with a front end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionState {
    /// [`VERSION`].
    pub version: u32,
    /// The record that this state was in: they are numbered from 1.
    pub seq: u64,
    /// The next descriptor's key.
    pub next_key: Key,
    /// What `SET_FEATURES` accepted, the bits of the protocol included.
    pub features: Option<u64>,
    /// What `SET_PROTOCOL_FEATURES` accepted.
    pub protocol: u64,
    /// Device status.
    pub status: u8,
    /// Guest memory.
    pub regions: Vec<RegionState>,
    /// The vrings, one for each queue of the device that the protocol can name.
    pub vrings: Vec<VringState>,
    /// The front end's in-flight region.
    pub inflight: Option<InflightState>,
    /// Rings that were dropped, whose part of the front end's in-flight region is to be forgotten as soon as this state is
    /// recorded.
    #[serde(default)]
    pub forget: Option<Forget>,
    /// The dirty log.
    pub log: Option<LogState>,
    /// The channel for requests of the back end.
    pub channel: Option<Key>,
    /// A message that is not whole yet.
    pub partial: Partial,
    /// What the device has to remember.
    pub device: Vec<u8>,
}

impl SessionState {
    /// A fresh connection to a device with `queues` queues.
    pub fn new(queues: u16) -> Self {
        Self {
            version: VERSION,
            seq: 0,
            next_key: 1,
            features: None,
            protocol: 0,
            status: 0,
            regions: Vec::new(),
            vrings: vec![VringState::default(); queues.into()],
            inflight: None,
            forget: None,
            log: None,
            channel: None,
            partial: Partial::default(),
            device: Vec::new(),
        }
    }

    /// As bytes.
    ///
    /// # Panics
    /// Never: every part of it can be serialised.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain numbers and lists")
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`Error::Recorded`] where they are not of this version.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let state: Self =
            serde_json::from_slice(bytes).map_err(|_| Error::Recorded("it cannot be read"))?;
        if state.version != VERSION {
            return Err(Error::Recorded("another version"));
        }
        Ok(state)
    }

    /// Every descriptor that the state names.
    pub fn keys(&self) -> BTreeSet<Key> {
        let mut keys = BTreeSet::new();
        keys.extend(self.regions.iter().map(|r| r.file));
        for ring in &self.vrings {
            keys.extend(ring.call.iter().chain(&ring.err).chain(&ring.own_inflight));
            if let Some(Kick::File(key)) = ring.kick {
                keys.insert(key);
            }
        }
        keys.extend(self.inflight.map(|i| i.file));
        keys.extend(self.forget.as_ref().map(|f| f.region.file));
        keys.extend(self.log.map(|l| l.file));
        keys.extend(self.channel);
        keys.extend(&self.partial.files);
        keys
    }

    /// A key for another descriptor.
    pub fn new_key(&mut self) -> Key {
        self.next_key += 1;
        self.next_key - 1
    }

    /// The rings that are started.
    pub fn started(&self) -> impl Iterator<Item = u16> + '_ {
        let rings = self.vrings.iter().enumerate();
        rings.filter_map(|(i, ring)| ring.kick.map(|_| i as u16))
    }

    /// One vring.
    ///
    /// # Panics
    /// Where there is no such vring: indices are checked when a message is parsed.
    pub fn ring(&mut self, index: u16) -> &mut VringState {
        &mut self.vrings[usize::from(index)]
    }

    /// Whether every feature bit in `mask` was accepted.
    pub fn has(&self, mask: u64) -> bool {
        self.features.is_some_and(|f| f & mask == mask)
    }

    /// Whether a ring works once it is started. Without protocol features there is no way to say so,
    /// and it works at once (vhost-user, "Ring states").
    pub fn is_enabled(&self, index: u16) -> bool {
        self.vrings[usize::from(index)].enabled || !self.has(spec::F_PROTOCOL_FEATURES)
    }

    /// What the driver accepted: without the bits that are the front end's.
    pub fn driver_features(&self) -> u64 {
        self.features.unwrap_or(0) & !(features::LOG_ALL | spec::F_PROTOCOL_FEATURES)
    }

    /// Forgets what a reset forgets. Memory, the channel and how the driver is notified stay: the front
    /// end does not send these again.
    pub fn reset(&mut self) {
        self.features = None;
        self.status = 0;
        self.inflight = None;
        for ring in &mut self.vrings {
            *ring = VringState {
                call: ring.call,
                err: ring.err,
                ..VringState::default()
            };
        }
    }

    /// Forgets what status 0 forgets: as [`SessionState::reset`], but not the features and where rings
    /// would go on.
    pub fn reset_status(&mut self) {
        let before = self.clone();
        self.reset();
        self.features = before.features;
        for (ring, old) in self.vrings.iter_mut().zip(&before.vrings) {
            (ring.base, ring.stopped) = (old.base, old.stopped);
        }
    }

    /// Where a ring goes on.
    pub fn position(&self, index: u16) -> Position {
        let base = self.vrings[usize::from(index)].base;
        if self.has(features::RING_PACKED) {
            Position {
                avail: (base & 0x7fff) as u16,
                avail_wrap: base & 0x8000 != 0,
                used: ((base >> 16) & 0x7fff) as u16,
                used_wrap: base & 0x8000_0000 != 0,
            }
        } else {
            Position {
                avail: base as u16,
                ..Position::START
            }
        }
    }

    /// Records where a ring would go on.
    pub fn set_position(&mut self, index: u16, at: Position) {
        self.ring(index).stopped = true;
        let wrap = |idx: u16, wrap: bool| u32::from(idx & 0x7fff) | u32::from(wrap) << 15;
        self.ring(index).base = if self.has(features::RING_PACKED) {
            wrap(at.avail, at.avail_wrap) | wrap(at.used, at.used_wrap) << 16
        } else {
            u32::from(at.avail)
        };
    }

    /// The addresses of a ring as the device takes them; `None` before `SET_VRING_ADDR`.
    pub fn ring_addresses(&self, index: u16) -> Option<RingAddresses> {
        let a = self.vrings[usize::from(index)].addresses?;
        Some(RingAddresses {
            space: Space::User,
            desc: a.desc,
            driver: a.avail,
            device: a.used,
        })
    }
}

/// What the state's descriptors are mapped to.
#[derive(Clone, Debug, Default)]
pub struct Mapped {
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// The dirty log.
    pub log: Option<Arc<DirtyLog>>,
    /// The front end's in-flight region.
    pub inflight: Option<Arc<Mapping>>,
    /// In-flight regions of our own, by vring.
    pub own_inflight: BTreeMap<u16, Arc<Mapping>>,
    /// The region of [`SessionState::forget`].
    pub forget: Option<Arc<Mapping>>,
}

impl Mapped {
    /// Maps everything that `state` names. The descriptors that only mappings need are taken out of `files`.
    ///
    /// # Errors
    /// [`Error::Recorded`] where one is missing, [`Error::Memory`] where one cannot be mapped.
    pub fn of(state: &SessionState, files: &mut Descriptors) -> Result<Self, Error> {
        let mut take = |key: Key| {
            files
                .remove(&key)
                .ok_or(Error::Recorded("a descriptor is missing"))
        };
        let none = GuestMemory::empty();
        let mut regions = Vec::new();
        for region in &state.regions {
            regions.push(Region::new(region.spec(take(region.file)?), &none)?);
        }
        let mut mapped = Self {
            memory: GuestMemory::new(regions)?,
            ..Self::default()
        };
        if let Some(l) = &state.log {
            mapped.log = Some(Arc::new(DirtyLog::new(take(l.file)?, l.offset, l.size)?));
        }
        if let Some(i) = &state.inflight {
            mapped.inflight = Some(Arc::new(Mapping::new(take(i.file)?, i.offset, i.size)?));
        }
        if let Some(Forget { region, .. }) = &state.forget {
            mapped.forget = match state.inflight {
                Some(i) if i.file == region.file => mapped.inflight.clone(),
                _ => {
                    let file = take(region.file)?;
                    let mapping = Mapping::new(file, region.offset, region.size)?;
                    Some(Arc::new(mapping))
                }
            };
        }
        for (index, ring) in state.vrings.iter().enumerate() {
            if let Some(key) = ring.own_inflight {
                let region = Mapping::new(take(key)?, 0, inflight::queue_len(ring.size))?;
                mapped.own_inflight.insert(index as u16, Arc::new(region));
            }
        }
        Ok(mapped)
    }

    /// Maps one region, or shares the mapping of the same bytes in the present epoch.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn region(&self, state: &RegionState, file: OwnedFd) -> Result<Region, Error> {
        Ok(Region::new(state.spec(file), &self.memory)?)
    }

    /// Where a queue records its requests in flight.
    pub fn inflight_queue(&self, state: &SessionState, index: u16) -> Option<InflightQueue> {
        if let (Some(region), Some(i)) = (&self.inflight, &state.inflight) {
            return Some(part(region, i, index));
        }
        let region = self.own_inflight.get(&index)?;
        Some(InflightQueue {
            region: region.clone(),
            offset: 0,
            len: region.len(),
        })
    }

    /// Forgets what `state` says is to be forgotten.
    pub fn forget(&mut self, state: &mut SessionState) {
        if let (Some(region), Some(Forget { region: at, rings })) =
            (self.forget.take(), state.forget.take())
        {
            for index in rings {
                part(&region, &at, index).forget();
            }
        }
    }

    /// Where a queue logs its writes, if it has to.
    pub fn queue_log(&self, state: &SessionState, index: u16) -> Option<QueueLog> {
        if !state.has(features::LOG_ALL) {
            return None;
        }
        Some(QueueLog {
            log: self.log.clone()?,
            used: state.vrings[usize::from(index)].log,
        })
    }

    /// Whether the front end has shrunk a file under any of it.
    pub fn is_poisoned(&self) -> bool {
        // The log and our own regions are only written to, or sealed.
        self.memory.is_poisoned() || self.inflight.as_ref().is_some_and(|i| i.is_poisoned())
    }
}

/// A vring's part of the front end's region.
fn part(region: &Arc<Mapping>, at: &InflightState, index: u16) -> InflightQueue {
    let len = inflight::queue_len(at.queue_size);
    InflightQueue {
        region: region.clone(),
        offset: u64::from(index) * len,
        len,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_survives_its_bytes_and_other_versions_are_refused() {
        let mut state = SessionState::new(3);
        state.ring(1).kick = Some(Kick::File(7));
        state.ring(2).addresses = Some(Addresses {
            desc: u64::MAX,
            avail: 1,
            used: 2,
        });
        state.partial.bytes = vec![1, 2, 3];
        let bytes = state.to_bytes();
        assert_eq!(SessionState::from_bytes(&bytes).unwrap(), state);
        state.version = 2;
        assert!(SessionState::from_bytes(&state.to_bytes()).is_err());
        assert!(SessionState::from_bytes(&bytes[..bytes.len() - 1]).is_err());
    }

    #[test]
    fn positions_of_both_kinds_of_ring_survive() {
        let mut state = SessionState::new(1);
        let at = Position {
            avail: 0x1234,
            avail_wrap: false,
            used: 0x0777,
            used_wrap: true,
        };
        state.features = Some(features::RING_PACKED);
        state.set_position(0, at);
        assert_eq!(state.ring(0).base, 0x8777_1234);
        assert_eq!(state.position(0), at);
        // A fresh packed ring as QEMU sends it.
        state.ring(0).base = 0x8000_8000;
        assert_eq!(state.position(0), Position::START);
        state.features = Some(0);
        state.set_position(
            0,
            Position {
                avail: 0xfedc,
                ..at
            },
        );
        assert_eq!(state.ring(0).base, 0xfedc);
        assert_eq!(state.position(0).avail, 0xfedc);
    }

    #[test]
    fn every_descriptor_is_named() {
        let mut state = SessionState::new(2);
        state.ring(0).kick = Some(Kick::File(1));
        state.ring(0).call = Some(2);
        state.ring(1).err = Some(3);
        state.ring(1).own_inflight = Some(4);
        state.channel = Some(5);
        state.partial.files = vec![6];
        state.log = Some(LogState {
            file: 7,
            size: 1,
            offset: 0,
        });
        state.inflight = Some(InflightState {
            file: 8,
            size: 1,
            offset: 0,
            queues: 1,
            queue_size: 1,
        });
        state.regions = vec![RegionState {
            guest: 0,
            size: 1,
            user: 0,
            offset: 0,
            file: 9,
        }];
        assert!(state.keys().into_iter().eq(1..=9));
    }
}
