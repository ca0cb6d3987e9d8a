//! Settings as bytes, for the process that goes on with a session.
//!
//! ```text
//!   features u64 | mac 6 | mode u8 | unicast table | multicast table | VLANs 64 x u64 | offloads u64
//!   | 0, pairs u16  or  1, hashing, u8 log2 of the table's length, table u16 ..., unclassified u16, transmit u16
//!   | hashing | coalescing: receive, transmit | u16 count, (queue u16, coalescing) ...
//! ```
//! Little-endian. A table is a `u8` count, 255 for "all", and addresses; hashing is types `u32` and a key of 40 bytes; coalescing is two `u32`. Queues that have
//! what is set for all are not there.
//!
//! They come from a process of the same card, and are checked all the same as a driver's commands are: nothing that could not have been set is taken up.

use bluff_packet::toeplitz::HashTypes;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::control::RSS_TABLE;
use crate::settings::{Coalescing, Hashing, MAC_TABLE, Mac, RxMode, Settings, Steer, Vlans};

/// The count of a table that stands for all addresses.
const ALL: u8 = u8::MAX;

const _: () = assert!(MAC_TABLE < ALL as usize);

/// As bytes, with what was negotiated.
pub(crate) fn write(features: u64, settings: &Settings) -> Vec<u8> {
    let mut to = Vec::new();
    to.extend(features.to_le_bytes());
    to.extend(settings.mac);
    to.push(mode_bits(&settings.mode));
    for table in [&settings.unicast, &settings.multicast] {
        match table {
            None => to.push(ALL),
            Some(macs) => {
                to.push(macs.len() as u8);
                to.extend(macs.iter().flatten());
            }
        }
    }
    to.extend(settings.vlans.words().iter().flat_map(|w| w.to_le_bytes()));
    to.extend(settings.offloads.to_le_bytes());
    match &settings.steer {
        Steer::Auto { pairs } => {
            to.push(0);
            to.extend(pairs.to_le_bytes());
        }
        Steer::Rss {
            hashing,
            table,
            unclassified,
            transmit,
        } => {
            to.push(1);
            write_hashing(&mut to, hashing);
            to.push(table.len().trailing_zeros() as u8);
            let rest = [*unclassified, *transmit];
            to.extend(table.iter().chain(&rest).flat_map(|n| n.to_le_bytes()));
        }
    }
    write_hashing(&mut to, &settings.report);
    let pair = |c: &Coalescing| {
        let words = [c.max_packets, c.max_usecs];
        words.into_iter().flat_map(u32::to_le_bytes)
    };
    to.extend(settings.coalescing_first.iter().flat_map(pair));
    let queues = settings.coalescing.iter().enumerate();
    let others: Vec<_> = queues
        .filter(|(queue, c)| **c != settings.coalescing_first[queue % 2])
        .collect();
    to.extend((others.len() as u16).to_le_bytes());
    for (queue, c) in others {
        to.extend((queue as u16).to_le_bytes());
        to.extend(pair(c));
    }
    to
}

fn mode_bits(mode: &RxMode) -> u8 {
    let all = [
        mode.promisc,
        mode.allmulti,
        mode.alluni,
        mode.nomulti,
        mode.nouni,
        mode.nobcast,
    ];
    let bits = all.iter().enumerate();
    bits.fold(0, |bits, (i, on)| bits | u8::from(*on) << i)
}

fn write_hashing(to: &mut Vec<u8>, hashing: &Hashing) {
    to.extend(hashing.types.to_le_bytes());
    to.extend(hashing.key);
}

/// What is left to be read.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn take<T: FromBytes + KnownLayout + Immutable + Unaligned>(&mut self) -> Option<T> {
        let (value, rest) = T::read_from_prefix(self.0).ok()?;
        self.0 = rest;
        Some(value)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(U16::get)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(U64::get)
    }

    fn macs(&mut self) -> Option<Option<Vec<Mac>>> {
        match self.take::<u8>()? {
            ALL => Some(None),
            n if usize::from(n) > MAC_TABLE => None,
            n => (0..n).map(|_| self.take()).collect::<Option<_>>().map(Some),
        }
    }

    fn hashing(&mut self) -> Option<Hashing> {
        let (types, key) = (self.take::<U32>()?.get(), self.take()?);
        (types & !HashTypes::ALL.0 == 0).then_some(Hashing { types, key })
    }

    fn coalescing(&mut self) -> Option<Coalescing> {
        let [max_packets, max_usecs] = self.take::<[U32; 2]>()?.map(U32::get);
        Some(Coalescing {
            max_packets,
            max_usecs,
        })
    }

    fn mode(&mut self) -> Option<RxMode> {
        let bits = self.take::<u8>()?;
        let on = |i: u8| bits >> i & 1 != 0;
        (bits >> 6 == 0).then(|| RxMode {
            promisc: on(0),
            allmulti: on(1),
            alluni: on(2),
            nomulti: on(3),
            nouni: on(4),
            nobcast: on(5),
        })
    }

    fn steer(&mut self, pairs: u16) -> Option<Steer> {
        let used = |n: &u16| (1..=pairs).contains(n);
        match self.take::<u8>()? {
            0 => self.u16().filter(used).map(|pairs| Steer::Auto { pairs }),
            1 => {
                let hashing = self.hashing()?;
                let log = self.take::<u8>()?;
                let len = 1usize.checked_shl(log.into()).filter(|n| *n <= RSS_TABLE)?;
                let mut queue = || self.u16().filter(|queue| *queue < pairs);
                let table = (0..len).map(|_| queue()).collect::<Option<_>>()?;
                let unclassified = queue()?;
                Some(Steer::Rss {
                    hashing,
                    table,
                    unclassified,
                    transmit: self.u16().filter(used)?,
                })
            }
            _ => None,
        }
    }
}

/// What was negotiated, and what was set, of a device with so many pairs; `None` where the bytes make no sense.
pub(crate) fn read(bytes: &[u8], pairs: u16) -> Option<(u64, Settings)> {
    let mut from = Bytes(bytes);
    let features = from.u64()?;
    let mut settings = Settings {
        mac: from.take().filter(|mac: &Mac| mac[0] & 1 == 0)?,
        mode: from.mode()?,
        unicast: from.macs()?,
        multicast: from.macs()?,
        vlans: Vlans::of(from.take::<[U64; 64]>()?.map(U64::get)),
        offloads: from.u64()?,
        steer: from.steer(pairs)?,
        report: from.hashing()?,
        coalescing_first: [from.coalescing()?, from.coalescing()?],
        coalescing: Box::default(),
    };
    if settings.offloads & !features != 0 {
        return None;
    }
    let [receive, transmit] = settings.coalescing_first;
    settings.coalescing = [receive, transmit].repeat(pairs.into()).into();
    for _ in 0..from.u16()? {
        let queue = usize::from(from.u16()?);
        *settings.coalescing.get_mut(queue)? = from.coalescing()?;
    }
    from.0.is_empty().then_some((features, settings))
}
