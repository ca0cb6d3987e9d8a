//! Who has which address on the link.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bluff_net::Batch;
use bluff_packet::build::{ArpFields, Ipv6Fields, Writer};
use bluff_packet::checksum::Sum;
use bluff_packet::{EtherType, IpProto, L2, Mac, Macs, Tags};

use super::Shared;

/// After so long it is asked again, and used meanwhile.
const FRESH: Duration = Duration::from_secs(30);
/// After so long without an answer it is not used any more.
const STALE: Duration = Duration::from_secs(120);
/// Between two questions.
const PAUSE: Duration = Duration::from_millis(500);
/// Addresses that are kept: only those that were asked for are.
const MOST: usize = 4096;

#[derive(Clone, Copy, Debug)]
struct Neighbour {
    mac: Mac,
    heard: Instant,
}

/// Who has which address on the link. Only answers to questions are believed.
#[derive(Default)]
pub(super) struct Neighbours {
    known: ArcSwap<HashMap<IpAddr, Neighbour>>,
    /// What was asked for, and when.
    asked: Mutex<HashMap<IpAddr, Instant>>,
}

impl Neighbours {
    /// Where an address is, and whether to ask for it.
    #[inline]
    pub(super) fn find(&self, address: IpAddr, now: Instant) -> (Option<Mac>, bool) {
        let known = self.known.load();
        let found = known.get(&address);
        let age = found.map(|n| now.saturating_duration_since(n.heard));
        if age.is_some_and(|age| age < FRESH) {
            return (found.map(|n| n.mac), false);
        }
        let used = found.filter(|_| age.is_some_and(|age| age < STALE));
        (used.map(|n| n.mac), self.may_ask(address, now))
    }

    #[cold]
    fn may_ask(&self, address: IpAddr, now: Instant) -> bool {
        let mut asked = self.asked.lock().expect("nothing panics with it");
        let lately = |at: &Instant| now.saturating_duration_since(*at) < PAUSE;
        if asked.get(&address).is_some_and(lately) {
            return false;
        }
        if asked.len() >= MOST {
            asked.retain(|_, at| now.saturating_duration_since(*at) < STALE);
        }
        let room = asked.len() < MOST;
        if room {
            asked.insert(address, now);
        }
        room
    }

    /// Another station knows nobody.
    pub(super) fn forget(&self) {
        let mut asked = self.asked.lock().expect("nothing panics with it");
        asked.clear();
        self.known.store(Arc::default());
    }

    /// Somebody says that `address` is at `mac`.
    pub(super) fn hear(&self, address: IpAddr, mac: Mac, now: Instant) {
        if mac.is_multicast() || mac == Mac::ZERO {
            return;
        }
        let asked = self.asked.lock().expect("nothing panics with it");
        if !asked.contains_key(&address) {
            return;
        }
        let mut known = HashMap::clone(&self.known.load());
        known.insert(address, Neighbour { mac, heard: now });
        self.known.store(Arc::new(known));
    }
}

/// The solicited-node group of an address (RFC 4291 §2.7.1), and its address on the link (RFC 2464 §7).
fn group_of(address: Ipv6Addr) -> (Ipv6Addr, Mac) {
    let [.., a, b, c] = address.octets();
    let group = Ipv6Addr::new(
        0xff02,
        0,
        0,
        0,
        0,
        1,
        0xff00 | u16::from(a),
        u16::from_be_bytes([b, c]),
    );
    (group, Mac([0x33, 0x33, 0xff, a, b, c]))
}

/// Asks who has `address`.
#[cold]
pub(super) fn ask(shared: &Shared, address: IpAddr, batch: &mut Batch) {
    let (mac, local) = {
        let options = shared.options.load();
        (options.mac, options.local)
    };
    batch.clear();
    let pushed = batch.push_with(0, |room| {
        let mut writer = Writer::new(room);
        let written = match (local, address) {
            (IpAddr::V4(sender_ip), IpAddr::V4(target_ip)) => {
                let fields = ArpFields {
                    sender_mac: mac,
                    sender_ip,
                    target_ip,
                };
                writer.arp_request(Tags::NONE, &fields).map(|w| w.len())
            }
            (IpAddr::V6(local), IpAddr::V6(target)) => {
                let (group, group_mac) = group_of(target);
                return neighbour_message(
                    room,
                    (group_mac, mac),
                    (local, group),
                    false,
                    target,
                    mac,
                );
            }
            // Of different families: there is no way.
            _ => return 0,
        };
        written.unwrap_or(0)
    });
    if pushed.is_some() {
        shared.say(batch);
    }
}

/// Writes a neighbour solicitation or advertisement (RFC 4861 §4.3, §4.4); gives its length, 0 where there is no room. `link` and `ip`: destination and source on the link,
/// source and destination of the packet.
pub(super) fn neighbour_message(
    room: &mut [u8],
    link: (Mac, Mac),
    ip: (Ipv6Addr, Ipv6Addr),
    advertisement: bool,
    target: Ipv6Addr,
    mac: Mac,
) -> usize {
    const LEN: usize = 32;
    let mut message = [0; LEN];
    // Advertisements: solicited, and to override what was known.
    (message[0], message[4]) = if advertisement { (136, 0x60) } else { (135, 0) };
    message[8..24].copy_from_slice(&target.octets());
    (message[24], message[25]) = (if advertisement { 2 } else { 1 }, 1);
    message[26..].copy_from_slice(&mac.0);
    let mut sum = Sum::pseudo_v6(ip.0, ip.1, IpProto::ICMPV6, LEN as u32);
    sum.add(&message);
    message[2..4].copy_from_slice(&sum.finish().to_be_bytes());
    let fields = Ipv6Fields {
        src: ip.0,
        dst: ip.1,
        next: IpProto::ICMPV6,
        traffic_class: 0,
        flow_label: 0,
        hop_limit: 255,
    };
    let l2 = L2 {
        macs: Macs {
            dst: link.0,
            src: link.1,
        },
        tags: Tags::NONE,
        ethertype: EtherType::IPV6,
    };
    let mut writer = Writer::new(room);
    let written = writer
        .ethernet(&l2)
        .and_then(|w| w.ipv6(&fields, LEN))
        .and_then(|w| w.bytes(&message));
    written.map_or(0, |w| w.len())
}
