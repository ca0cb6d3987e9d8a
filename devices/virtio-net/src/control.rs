//! The control queue without its ring (virtio 1.3 §5.1.6.5).

use bluff_packet::toeplitz::HashTypes;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::saved;
use crate::settings::{Coalescing, Hashing, MAC_TABLE, Mac, RxMode, Settings, Steer, Vlans};
use crate::spec::{command, feature};

/// The longest table of RSS.
pub const RSS_TABLE: usize = 128;
/// The longest command: two tables of addresses, far longer than any driver's. What is longer is refused.
pub const COMMAND_MAX: usize = 16 << 10;

/// Why a command was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Fewer bytes than its kind has, or more.
    #[error("a command of {0} bytes is too short or too long")]
    Length(usize),
    /// Of a class that was not negotiated, or that there is not.
    #[error("command {1} of class {0} is not offered, or was not negotiated")]
    Unknown(u8, u8),
    /// Its value makes no sense.
    #[error("the value of command {1} of class {0} is not allowed")]
    Value(u8, u8),
}

/// What the device has to do beside obeying the settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing more.
    Settings,
    /// The driver has announced itself: it is not to be asked any more.
    Announced,
    /// The answer of [`command::COAL_VQ_GET`] has this in place of the driver's bytes.
    Answer(Coalescing),
}

/// What the control queue has set, and may set.
#[derive(Debug)]
pub struct Control {
    /// What was negotiated.
    features: u64,
    /// The address that the device has at first.
    own: Mac,
    /// Pairs of queues that there are.
    pairs: u16,
    /// By queue: it was started, and not stopped since.
    running: Box<[bool]>,
    settings: Settings,
}

/// Reads a value off the front.
fn take<T: FromBytes + KnownLayout + Immutable + Unaligned>(bytes: &[u8]) -> Option<(T, &[u8])> {
    T::read_from_prefix(bytes).ok()
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Coal {
    max_packets: U32,
    max_usecs: U32,
}

/// The class of commands that set what is received.
const RX: u8 = command::RX_PROMISC.0;

/// The kinds of frames that each feature has the driver take.
const OFFLOADS: u64 = feature::GUEST_CSUM
    | feature::GUEST_TSO4
    | feature::GUEST_TSO6
    | feature::GUEST_ECN
    | feature::GUEST_USO4
    | feature::GUEST_USO6;

impl Control {
    /// Of a device with an address and so many pairs of queues, at least 1, before anything is negotiated.
    pub fn new(own: Mac, pairs: u16) -> Self {
        let mut this = Self {
            features: 0,
            own,
            pairs,
            running: vec![false; 2 * usize::from(pairs)].into(),
            settings: fresh(own, pairs, 0),
        };
        this.reset(0);
        this
    }

    /// A receive or transmit queue was started, or was stopped: then it begins anew with what is set for all (§5.1.6.5.6.3).
    pub fn set_running(&mut self, queue: u16, running: bool) {
        let at = usize::from(queue);
        let place = self.running.get_mut(at);
        let set = self.settings.coalescing.get_mut(at);
        if let (Some(place), Some(set)) = (place, set) {
            *place = running;
            if !running {
                *set = self.settings.coalescing_first[at % 2];
            }
        }
    }

    /// Whether the settings say which receive queues are used. Where another one has the control queue, or there is none, they do not.
    pub fn steers(&self) -> bool {
        self.has(feature::CTRL_VQ) && self.features & (feature::MQ | feature::RSS) != 0
    }

    /// Whether the driver can be asked to announce itself: it sees the wish, and can say that it was heard.
    pub fn may_be_asked(&self) -> bool {
        self.has(feature::CTRL_VQ | feature::GUEST_ANNOUNCE | feature::STATUS)
    }

    /// The device was reset, or its features were negotiated: what was set before is forgotten.
    pub fn reset(&mut self, features: u64) {
        self.features = features;
        self.settings = fresh(self.own, self.pairs, features);
    }

    /// What is set, as bytes for the process that goes on.
    pub(crate) fn save(&self) -> Vec<u8> {
        saved::write(self.features, &self.settings)
    }

    /// Reads what [`Control::save`] gave; `None` where it is not of such a device.
    pub(crate) fn read(&self, saved: &[u8]) -> Option<(u64, Settings)> {
        saved::read(saved, self.pairs)
    }

    /// Takes up settings that were made with what is negotiated now.
    pub(crate) fn take_up(&mut self, settings: Settings) {
        self.settings = settings;
    }

    /// What is set.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    fn has(&self, features: u64) -> bool {
        self.features & features == features
    }

    /// Obeys a command: a copy of everything that the driver gave to be read. What is refused changes nothing.
    ///
    /// # Errors
    /// Why it was refused; the answer is then [`crate::spec::ACK_ERR`].
    pub fn command(&mut self, bytes: &[u8]) -> Result<Effect, Refused> {
        let length = Refused::Length(bytes.len());
        let [class, number, data @ ..] = bytes else {
            return Err(length);
        };
        if bytes.len() > COMMAND_MAX {
            return Err(length);
        }
        let which = (*class, *number);
        let value = Refused::Value(which.0, which.1);
        let needed = feature_of(which).ok_or(Refused::Unknown(which.0, which.1))?;
        if !self.has(needed | feature::CTRL_VQ) {
            return Err(Refused::Unknown(which.0, which.1));
        }
        match which {
            (RX, _) => {
                let on = match data {
                    [0] => false,
                    [1] => true,
                    [_] => return Err(value),
                    _ => return Err(length),
                };
                let mode = &mut self.settings.mode;
                let place = match which {
                    command::RX_PROMISC => &mut mode.promisc,
                    command::RX_ALLMULTI => &mut mode.allmulti,
                    command::RX_ALLUNI => &mut mode.alluni,
                    command::RX_NOMULTI => &mut mode.nomulti,
                    command::RX_NOUNI => &mut mode.nouni,
                    _ => &mut mode.nobcast,
                };
                *place = on;
            }
            command::MAC_TABLE_SET => {
                let (unicast, rest) = table(data).ok_or(length)?;
                let (multicast, rest) = table(rest).ok_or(length)?;
                if !rest.is_empty() {
                    return Err(length);
                }
                (self.settings.unicast, self.settings.multicast) = (unicast, multicast);
            }
            command::MAC_ADDR_SET => {
                let mac: Mac = data.try_into().map_err(|_| length)?;
                if mac[0] & 1 != 0 || mac == [0; 6] {
                    return Err(value);
                }
                self.settings.mac = mac;
            }
            command::VLAN_ADD | command::VLAN_DEL => {
                let vlan = U16::read_from_bytes(data).map_err(|_| length)?.get();
                if vlan > 4095 {
                    return Err(value);
                }
                self.settings.vlans.set(vlan, which == command::VLAN_ADD);
            }
            command::ANNOUNCE_ACK => {
                return match data {
                    [] => Ok(Effect::Announced),
                    _ => Err(length),
                };
            }
            command::MQ_PAIRS_SET => {
                let pairs = U16::read_from_bytes(data).map_err(|_| length)?.get();
                if !(1..=self.pairs).contains(&pairs) {
                    return Err(value);
                }
                // It also ends RSS (§5.1.6.5.5).
                self.settings.steer = Steer::Auto { pairs };
            }
            command::MQ_RSS_CONFIG => self.settings.steer = self.rss(data, length, value)?,
            command::MQ_HASH_CONFIG => self.settings.report = hash_config(data, length, value)?,
            command::GUEST_OFFLOADS_SET => {
                let offloads = U64::read_from_bytes(data).map_err(|_| length)?.get();
                if offloads & !(self.features & OFFLOADS) != 0 {
                    return Err(value);
                }
                // Segments have checksums that have to be completed (§5.1.3.1).
                if offloads != 0 && offloads & feature::GUEST_CSUM == 0 {
                    return Err(value);
                }
                self.settings.offloads = offloads;
            }
            command::COAL_TX_SET | command::COAL_RX_SET => {
                let new = coalescing(&Coal::read_from_bytes(data).map_err(|_| length)?);
                let transmit = usize::from(which == command::COAL_TX_SET);
                self.settings.coalescing_first[transmit] = new;
                let all = self.settings.coalescing.iter_mut();
                all.skip(transmit).step_by(2).for_each(|c| *c = new);
            }
            command::COAL_VQ_SET => {
                let (queue, rest) = take::<U16>(data).ok_or(length)?;
                let (_reserved, rest) = take::<U16>(rest).ok_or(length)?;
                let new = Coal::read_from_bytes(rest).map_err(|_| length)?;
                let at = self.started(queue.get()).ok_or(value)?;
                self.settings.coalescing[at] = coalescing(&new);
            }
            command::COAL_VQ_GET => {
                // The place for the answer is writable: it is not among these bytes. Drivers send the queue alone, or the whole
                // structure with what they do not know yet.
                let (queue, _) = take::<U16>(data).ok_or(length)?;
                let at = self.started(queue.get()).ok_or(value)?;
                return Ok(Effect::Answer(self.settings.coalescing[at]));
            }
            _ => unreachable!("it has a feature"),
        }
        Ok(Effect::Settings)
    }

    /// A receive or transmit queue that is there for the driver, and started (§5.1.6.5.6.3).
    fn started(&self, queue: u16) -> Option<usize> {
        let several = self.features & (feature::MQ | feature::RSS) != 0;
        let there = if several { 2 * self.pairs } else { 2 };
        let at = usize::from(queue);
        (queue < there && self.running[at]).then_some(at)
    }

    /// §5.1.6.5.7.1
    fn rss(&self, data: &[u8], length: Refused, value: Refused) -> Result<Steer, Refused> {
        let (types, rest) = take::<U32>(data).ok_or(length)?;
        let (mask, rest) = take::<U16>(rest).ok_or(length)?;
        let (unclassified, rest) = take::<U16>(rest).ok_or(length)?;
        let entries = usize::from(mask.get()) + 1;
        if !entries.is_power_of_two() || entries > RSS_TABLE {
            return Err(value);
        }
        let table = rest.get(..2 * entries).ok_or(length)?;
        let (transmit, rest) = take::<U16>(&rest[2 * entries..]).ok_or(length)?;
        let (key_len, key) = take::<u8>(rest).ok_or(length)?;
        let table: Box<[u16]> = table
            .as_chunks()
            .0
            .iter()
            .map(|b| u16::from_le_bytes(*b))
            .collect();
        // Entries are numbers of receive queues (§5.1.6.5.7.1), which must be there.
        let there = |queue: &u16| *queue < self.pairs;
        if !table.iter().all(there) || !there(&unclassified.get()) {
            return Err(value);
        }
        if !(1..=self.pairs).contains(&transmit.get()) {
            return Err(value);
        }
        Ok(Steer::Rss {
            hashing: hashing(types.get(), key_len, key, length, value)?,
            table,
            unclassified: unclassified.get(),
            transmit: transmit.get(),
        })
    }
}

fn coalescing(from: &Coal) -> Coalescing {
    Coalescing {
        max_packets: from.max_packets.get(),
        max_usecs: from.max_usecs.get(),
    }
}

/// §5.1.6.5.7.4
fn hash_config(data: &[u8], length: Refused, value: Refused) -> Result<Hashing, Refused> {
    let (types, rest) = take::<U32>(data).ok_or(length)?;
    let (_reserved, rest) = take::<[U16; 4]>(rest).ok_or(length)?;
    let (key_len, key) = take::<u8>(rest).ok_or(length)?;
    hashing(types.get(), key_len, key, length, value)
}

fn hashing(
    types: u32,
    key_len: u8,
    key: &[u8],
    length: Refused,
    value: Refused,
) -> Result<Hashing, Refused> {
    if key.len() != usize::from(key_len) {
        return Err(length);
    }
    let mut this = Hashing {
        types,
        ..Hashing::NONE
    };
    let place = this.key.get_mut(..key.len()).ok_or(value)?;
    place.copy_from_slice(key);
    match types & !HashTypes::ALL.0 {
        0 => Ok(this),
        _ => Err(value),
    }
}

/// A table of addresses, and what follows it. `None` inside: more than are kept.
fn table(bytes: &[u8]) -> Option<(Option<Vec<Mac>>, &[u8])> {
    let (count, rest) = take::<U32>(bytes)?;
    let len = (count.get() as usize).checked_mul(6)?;
    let (macs, rest) = rest.split_at_checked(len)?;
    let macs = macs.as_chunks::<6>().0;
    let kept = (macs.len() <= MAC_TABLE).then(|| macs.to_vec());
    Some((kept, rest))
}

/// What has to be negotiated for a command.
fn feature_of(which: (u8, u8)) -> Option<u64> {
    Some(match which {
        command::RX_PROMISC | command::RX_ALLMULTI | command::MAC_TABLE_SET => feature::CTRL_RX,
        (RX, 2..=5) => feature::CTRL_RX_EXTRA,
        command::MAC_ADDR_SET => feature::CTRL_MAC_ADDR,
        command::VLAN_ADD | command::VLAN_DEL => feature::CTRL_VLAN,
        command::ANNOUNCE_ACK => feature::GUEST_ANNOUNCE,
        command::MQ_PAIRS_SET => feature::MQ,
        command::MQ_RSS_CONFIG => feature::RSS,
        command::MQ_HASH_CONFIG => feature::HASH_REPORT,
        command::GUEST_OFFLOADS_SET => feature::CTRL_GUEST_OFFLOADS,
        command::COAL_TX_SET | command::COAL_RX_SET => feature::NOTF_COAL,
        command::COAL_VQ_SET | command::COAL_VQ_GET => feature::VQ_NOTF_COAL,
        _ => return None,
    })
}

/// What is set before the driver sets anything.
fn fresh(own: Mac, pairs: u16, features: u64) -> Settings {
    // What was negotiated with another's control queue is that one's to do: here nobody would ever say what is to be received.
    let has = |bit: u64| features & (bit | feature::CTRL_VQ) == bit | feature::CTRL_VQ;
    // A driver that does not filter takes everything, and one that does says so.
    let promisc = has(feature::CTRL_RX) || !has(feature::CTRL_VLAN);
    Settings {
        mac: own,
        mode: RxMode {
            promisc,
            allmulti: !promisc,
            alluni: !promisc,
            nomulti: false,
            nouni: false,
            nobcast: false,
        },
        unicast: Some(Vec::new()),
        multicast: Some(Vec::new()),
        vlans: Vlans::new(!has(feature::CTRL_VLAN)),
        offloads: features & OFFLOADS,
        // One pair until the driver asks for more (§5.1.5).
        steer: Steer::Auto { pairs: 1 },
        report: Hashing::NONE,
        coalescing_first: Default::default(),
        coalescing: vec![Coalescing::default(); 2 * usize::from(pairs)].into(),
    }
}

#[cfg(test)]
mod tests;
