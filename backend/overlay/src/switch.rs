//! The switch: where each frame of a batch goes.
//!
//! It runs on the reactor of whoever sends, to the end: a frame for a port of this reactor is in that port's ring when the call returns.

use std::sync::Arc;
use std::time::Instant;

use bluff_net::{BATCH, Batch, Cause, Frame, HEAD, Lane, Lent, all_of, distribute, places};
use bluff_packet::flow::FlowKey;
use bluff_packet::{Frame as Packet, L3, icmp, parse};

use crate::bucket::{Bucket, Rate};
use crate::fdb::{Key, Place};
use crate::network::{Member, Network, Table};

/// "Too big" messages a second that a port is sent.
const ANSWERS: Rate = Rate {
    per_second: 100,
    burst: 20,
};
/// Bytes of a frame's addresses: a tag stands behind them.
const ADDRESSES: usize = 12;
const TAG: usize = 4;
/// Bytes of headers before what an ICMP error quotes: Ethernet with two tags, IPv6, ICMP.
const BEFORE_QUOTE: usize = 14 + 8 + 40 + 8;

/// The way out of a port.
pub(crate) struct Switch {
    network: Arc<Network>,
    member: Arc<Member>,
    flood: Bucket,
    answers: Bucket,
    answer: Option<Box<Batch>>,
}

/// Where a frame goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Dropped,
    To(Place),
    Flood,
}

impl Switch {
    pub(crate) fn new(network: Arc<Network>, member: Arc<Member>, now: Instant) -> Self {
        Self {
            flood: Bucket::new(network.flood, now),
            answers: Bucket::new(ANSWERS, now),
            answer: None,
            network,
            member,
        }
    }

    /// Checks a frame, and finds where it goes.
    ///
    /// # Errors
    /// Why it goes nowhere.
    #[inline]
    fn judge(
        &mut self,
        table: &Table,
        tick: u32,
        now: Instant,
        frame: &mut Frame,
    ) -> Result<Way, Cause> {
        let packet = match frame.packet {
            Some(packet) => packet,
            None => parse(frame.head(), frame.len()).map_err(|_| Cause::Malformed)?,
        };
        let rules = &self.member.rules;
        rules.check(&packet, frame.head())?;
        if packet_len(frame, &packet) > usize::from(table.mtu) {
            self.answer(table, now, frame, &packet);
            return Err(Cause::TooLong);
        }
        let vlan = match rules.vlan {
            Some(vlan) => {
                let [a, b] = vlan.to_be_bytes();
                frame.insert(ADDRESSES, &[0x81, 0, a, b]);
                vlan
            }
            None => packet
                .l2
                .tags
                .as_slice()
                .first()
                .map_or(0, |tag| tag.vlan()),
        };
        frame.hash = self.network.hasher.hash(&FlowKey::new(&packet));
        let (source, to) = (packet.l2.src(), packet.l2.dst());
        let here = Place::Port(self.member.number);
        // What cannot be learnt is flooded later; it is no reason to drop a frame. But where an address is known to be elsewhere for
        // good, somebody takes it.
        if let Err(crate::Refused::Fixed) =
            self.network.fdb.see(Key::new(source.0, vlan), here, tick)
        {
            return Err(Cause::Spoofed);
        }
        if !to.is_multicast()
            && let Some(entry) = self.network.fdb.find(Key::new(to.0, vlan))
        {
            return match entry.place == here {
                true => Err(Cause::Nowhere),
                false => Ok(Way::To(entry.place)),
            };
        }
        match self.flood.admit(now, 1) {
            true => Ok(Way::Flood),
            false => Err(Cause::Storm),
        }
    }

    /// Tells the sender that its packet is too long (RFC 1191, RFC 4443): nothing vanishes silently.
    #[cold]
    fn answer(&mut self, table: &Table, now: Instant, frame: &Frame, packet: &Packet) {
        if !self.answers.admit(now, 1) {
            return;
        }
        let quoted = (HEAD - BEFORE_QUOTE + packet.l3_offset()).min(frame.head().len());
        let (head, mac) = (&frame.head()[..quoted], packet.l2.dst());
        let batch = self.answer.get_or_insert_default();
        batch.clear();
        let written = batch.push_with(0, |room| {
            let room = &mut room[..HEAD];
            // It comes from whom the packet was for: the sender has no other address that must know.
            match &packet.l3 {
                L3::Ipv4(ip) if ip.dont_fragment => {
                    icmp::fragmentation_needed(room, packet, head, mac, ip.dst, table.mtu)
                }
                L3::Ipv6(ip) => {
                    icmp::packet_too_big(room, packet, head, mac, ip.dst, table.mtu.into())
                }
                _ => return 0,
            }
            .unwrap_or(0)
        });
        if written.is_some() {
            let receivers = self.member.receivers.load();
            distribute(batch, 1, |_, frame| receivers.outlet(frame), |_, _| {});
        }
    }
}

/// Bytes of the longest packet that a frame stands for, without what stands before IP.
fn packet_len(frame: &Frame, packet: &Packet) -> usize {
    let len = match frame.offload.gso {
        Some(gso) => usize::from(gso.headers) + usize::from(gso.size),
        None => frame.len(),
    };
    len.min(frame.len()) - packet.l3_offset()
}

/// Gives frames to a port, those of them that it may have.
pub(crate) fn deliver(to: &Member, now: Instant, batch: &mut Lent<'_>, mut which: u32) {
    let count = |cause, set: u32| {
        if set != 0 {
            to.received.add_shared(cause, u64::from(set.count_ones()));
        }
    };
    if !to.is_up() {
        return count(Cause::LinkDown, which);
    }
    if let Some(vlan) = to.rules.vlan {
        let others = places(which).filter(|i| tag_of(&batch.frames()[*i]) != Some(vlan));
        let others = others.fold(0, |set, i| set | 1 << i);
        count(Cause::Vlan, others);
        which &= !others;
    }
    let over = places(which).filter(|i| {
        let over = to.receive.ready(now).is_err();
        if !over {
            let frame = &batch.frames()[*i];
            to.receive.take(frames_of(frame), frame.len() as u64);
        }
        over
    });
    let over = over.fold(0, |set, i| set | 1 << i);
    count(Cause::Limited, over);
    which &= !over;
    if which == 0 {
        return;
    }
    let mut tags = [[0; TAG]; BATCH];
    let access = to.rules.vlan.is_some();
    if access {
        for i in places(which) {
            let frame = &mut batch.frames_mut()[i];
            tags[i].copy_from_slice(&frame.head()[ADDRESSES..ADDRESSES + TAG]);
            frame.remove(ADDRESSES, TAG);
        }
    }
    let receivers = to.receivers.load();
    distribute(
        batch,
        which,
        |_, frame| receivers.outlet(frame),
        |frames, result| {
            if let Err(cause) = result {
                to.received.add_shared(cause, frames.len() as u64);
            }
        },
    );
    if access {
        // As they were: others may get them too.
        for i in places(which) {
            batch.frames_mut()[i].insert(ADDRESSES, &tags[i]);
        }
    }
}

/// The VLAN of a frame's first tag.
fn tag_of(frame: &Frame) -> Option<u16> {
    let head = frame.head();
    let [0x81, 0, a, b] = *head.get(ADDRESSES..ADDRESSES + TAG)? else {
        return None;
    };
    Some(u16::from_be_bytes([a, b]) & 0xfff)
}

/// How many frames a frame stands for.
fn frames_of(frame: &Frame) -> u64 {
    frame
        .offload
        .gso
        .map_or(1, |gso| gso.segments(frame.len()) as u64)
}

/// Gives frames to all ports but one.
pub(crate) fn flood(
    table: &Table,
    but: Option<u16>,
    now: Instant,
    batch: &mut Lent<'_>,
    which: u32,
) {
    let members = table.members.iter().flatten();
    for member in members.filter(|m| Some(m.number) != but) {
        // A port of another VLAN has nothing to do with them.
        let its = match member.rules.vlan {
            None => which,
            Some(vlan) => places(which)
                .filter(|i| tag_of(&batch.frames()[*i]) == Some(vlan))
                .fold(0, |set, i| set | 1 << i),
        };
        if its != 0 {
            deliver(member, now, batch, its);
        }
    }
}

impl Lane for Switch {
    fn ready(&mut self, now: Instant) -> Result<(), Instant> {
        self.member.transmit.ready(now)
    }

    fn send(&mut self, now: Instant, mut batch: Lent<'_>) {
        let network = self.network.clone();
        let table = network.table();
        let tick = network.tick(now);
        let all = all_of(&batch);
        if !self.member.is_up() {
            let count = u64::from(all.count_ones());
            return self.member.sent.add_shared(Cause::LinkDown, count);
        }
        let (mut frames, mut bytes) = (0, 0);
        let mut ways = [Way::Dropped; BATCH];
        let (mut here, mut flooded) = (0u32, 0u32);
        for i in places(all) {
            let frame = &mut batch.frames_mut()[i];
            (frames, bytes) = (frames + frames_of(frame), bytes + frame.len() as u64);
            match self.judge(&table, tick, now, frame) {
                Ok(way) => {
                    ways[i] = way;
                    match way {
                        Way::To(Place::Port(_)) => here |= 1 << i,
                        Way::To(Place::Vtep(_)) => {}
                        Way::Flood => flooded |= 1 << i,
                        Way::Dropped => {}
                    }
                }
                Err(cause) => self.member.sent.add_shared(cause, 1),
            }
        }
        self.member.transmit.take(frames, bytes);
        while here != 0 {
            let first = ways[here.trailing_zeros() as usize];
            let same = places(here).filter(|i| ways[*i] == first);
            let same = same.fold(0u32, |set, i| set | 1 << i);
            here &= !same;
            let Way::To(Place::Port(number)) = first else {
                unreachable!("one of these")
            };
            let member = table.members.get(usize::from(number));
            match member.and_then(Option::as_ref) {
                Some(member) => deliver(member, now, &mut batch, same),
                // It has left meanwhile.
                None => {
                    let count = u64::from(same.count_ones());
                    self.member.sent.add_shared(Cause::Nowhere, count);
                }
            }
        }
        if flooded != 0 {
            flood(&table, Some(self.member.number), now, &mut batch, flooded);
        }
    }
}
