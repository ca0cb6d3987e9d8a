//! The switch: where each frame of a batch goes.
//!
//! It runs on the reactor of whoever sends, to the end: a frame for a port of this reactor is in that port's ring when the call returns.

use std::sync::Arc;
use std::time::Instant;

use bluff_net::capture::Way;
use bluff_net::{BATCH, Batch, Cause, Drops, Frame, HEAD, Lane, Lent, NetError, all_of, places};
use bluff_packet::flow::{FlowHasher, FlowKey};
use bluff_packet::{Frame as Packet, L3, icmp};
use bluff_reactor::Context;

use crate::bucket::{Bucket, Rate};
use crate::capture::show;
use crate::fdb::{Key, Place, View};
use crate::network::{Member, Network, Table, Tunnel};
use crate::underlay::Uplink;

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
    /// The way to other cards, and where it leads.
    uplink: Option<(Arc<Tunnel>, Box<dyn Uplink>)>,
}

impl Switch {
    pub(crate) fn new(
        cx: &mut Context<'_>,
        network: Arc<Network>,
        member: Arc<Member>,
    ) -> Result<Self, NetError> {
        let tunnel = network.table().tunnel.clone();
        let uplink = match tunnel {
            Some(tunnel) => {
                let uplink = tunnel.underlay.open(cx)?;
                Some((tunnel, uplink))
            }
            None => None,
        };
        Ok(Self {
            flood: Bucket::new(network.flood, cx.now()),
            answers: Bucket::new(ANSWERS, cx.now()),
            answer: None,
            uplink,
            network,
            member,
        })
    }

    /// Checks a frame, and finds where it goes; `None`: to everybody.
    ///
    /// # Errors
    /// Why it goes nowhere.
    #[inline]
    fn judge(
        &mut self,
        table: &Table,
        fdb: &mut View<'_>,
        tick: u32,
        now: Instant,
        frame: &mut Frame,
    ) -> Result<Option<Place>, Cause> {
        frame.parse().map_err(|_| Cause::Malformed)?;
        let packet = frame.packet.as_ref().expect("it was read");
        let rules = &self.member.rules;
        rules.check(packet, frame.head())?;
        if packet_len(frame, packet) > usize::from(table.mtu) {
            self.answer(table, now, frame, packet);
            return Err(Cause::TooLong);
        }
        let tagged = packet.l2.tags.as_slice().first();
        let (source, to) = (packet.l2.src(), packet.l2.dst());
        let mut vlan = tagged.map_or(0, |tag| tag.vlan());
        if let Some(own) = self.member.rules.vlan {
            let [a, b] = own.to_be_bytes();
            frame.insert(ADDRESSES, &[0x81, 0, a, b]);
            vlan = own;
        }
        let here = Place::Port(self.member.number);
        // What cannot be learnt is flooded later; it is no reason to drop a frame. But where an address is known to be elsewhere for
        // good, somebody takes it.
        if let Err(crate::Refused::Fixed) = fdb.see(Key::new(source.0, vlan), here, tick) {
            return Err(Cause::Spoofed);
        }
        if !to.is_multicast()
            && let Some(entry) = fdb.find(Key::new(to.0, vlan))
        {
            return match entry.place == here {
                true => Err(Cause::Nowhere),
                false => Ok(Some(entry.place)),
            };
        }
        match self.flood.admit(now, 1) {
            true => Ok(None),
            false => Err(Cause::Storm),
        }
    }

    /// Sends frames to other cards: those of `away` to the VTEP that `vteps` has by place, and those of `flooded` to all (head-end replication).
    #[inline]
    fn send_away(
        &mut self,
        table: &Table,
        now: Instant,
        batch: &mut Lent<'_>,
        away: u32,
        flooded: u32,
        vteps: &[u16; BATCH],
    ) {
        let count = |cause, set: u32| {
            let n = u64::from(set.count_ones());
            self.member.sent.add_shared(cause, n);
        };
        // One that was opened for another underlay is opened again with the queue.
        let is_it =
            |now: &Arc<Tunnel>, then: &Arc<Tunnel>| Arc::ptr_eq(&now.underlay, &then.underlay);
        let (tunnel, uplink) = match (&table.tunnel, &mut self.uplink) {
            (Some(tunnel), Some((then, uplink))) if is_it(tunnel, then) => (tunnel, uplink),
            _ => return count(Cause::Nowhere, away),
        };
        // A flow keeps its way through the underlay.
        hash(&self.network.hasher, batch, away | flooded);
        let mut left = away;
        while left != 0 {
            let vtep = vteps[left.trailing_zeros() as usize];
            let same = places(left).filter(|i| vteps[*i] == vtep);
            let same = same.fold(0u32, |set, i| set | 1 << i);
            left &= !same;
            match tunnel.vtep(vtep) {
                Some(to) => {
                    if self.network.is_shown() {
                        let network = &self.network;
                        network.show(now, Way::Out, batch, same, tunnel.vni, to);
                    }
                    uplink.send(now, batch, same, tunnel.vni, to);
                }
                None => count(Cause::Nowhere, same),
            }
        }
        if flooded != 0 {
            for to in tunnel.vteps.iter().flatten() {
                if self.network.is_shown() {
                    let network = &self.network;
                    network.show(now, Way::Out, batch, flooded, tunnel.vni, *to);
                }
                uplink.send(now, batch, flooded, tunnel.vni, *to);
            }
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
            show(&self.member.tap, now, Way::In, batch, 1);
            let receivers = self.member.receivers.load();
            receivers.deliver(batch, 1, |_, _| {});
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

/// Computes the hashes of those frames that have none: whoever asks for them pays for them.
fn hash(hasher: &FlowHasher, batch: &mut Lent<'_>, which: u32) {
    for i in places(which) {
        let frame = &mut batch.frames_mut()[i];
        if let (0, Some(packet)) = (frame.hash, &frame.packet) {
            frame.hash = hasher.hash(&FlowKey::new(packet).either_way());
        }
    }
}

/// Gives frames to a port of `network`, those of them that it may have.
fn deliver(network: &Network, to: &Member, now: Instant, batch: &mut Lent<'_>, mut which: u32) {
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
    if to.receive.is_limited() {
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
    }
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
    show(&to.tap, now, Way::In, batch, which);
    let receivers = to.receivers.load();
    if receivers.steering.by_flow() {
        hash(&network.hasher, batch, which);
    }
    receivers.deliver(batch, which, |frames, result| {
        if let Err(cause) = result {
            to.received.add_shared(cause, frames.len() as u64);
        }
    });
    if access {
        // As they were: others may get them too.
        for i in places(which) {
            batch.frames_mut()[i].insert(ADDRESSES, &tags[i]);
        }
    }
}

/// Gives frames to the ports of `network` that `ports` has by place. What is for one that has left is counted in `drops`.
pub(crate) fn deliver_to(
    network: &Network,
    table: &Table,
    now: Instant,
    batch: &mut Lent<'_>,
    mut which: u32,
    ports: &[u16; BATCH],
    drops: &Drops,
) {
    while which != 0 {
        let number = ports[which.trailing_zeros() as usize];
        let same = places(which).filter(|i| ports[*i] == number);
        let same = same.fold(0u32, |set, i| set | 1 << i);
        which &= !same;
        match table
            .members
            .get(usize::from(number))
            .and_then(Option::as_ref)
        {
            Some(member) => deliver(network, member, now, batch, same),
            None => drops.add_shared(Cause::Nowhere, u64::from(same.count_ones())),
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

/// Gives frames to all ports of `network` but one.
pub(crate) fn flood(
    network: &Network,
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
            deliver(network, member, now, batch, its);
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
        let mut fdb = network.fdb.view();
        let all = all_of(&batch);
        show(&self.member.tap, now, Way::Out, &batch, all);
        if !self.member.is_up() {
            let count = u64::from(all.count_ones());
            return self.member.sent.add_shared(Cause::LinkDown, count);
        }
        let (mut frames, mut bytes) = (0, 0);
        // By place: the number of a port, or of a VTEP.
        let mut ports = [u16::MAX; BATCH];
        let (mut here, mut away, mut flooded) = (0u32, 0u32, 0u32);
        for i in places(all) {
            let frame = &mut batch.frames_mut()[i];
            (frames, bytes) = (frames + frames_of(frame), bytes + frame.len() as u64);
            match self.judge(&table, &mut fdb, tick, now, frame) {
                Ok(Some(Place::Port(port))) => {
                    ports[i] = port;
                    here |= 1 << i;
                }
                Ok(Some(Place::Vtep(vtep))) => {
                    ports[i] = vtep;
                    away |= 1 << i;
                }
                Ok(None) => flooded |= 1 << i,
                Err(cause) => self.member.sent.add_shared(cause, 1),
            }
        }
        self.member.transmit.take(frames, bytes);
        // What the port sends by one of its queues is to come back to it.
        if self.member.receivers.load().steering.by_flow() {
            let good = here | away | flooded;
            hash(&network.hasher, &mut batch, good);
        }
        let sent = &self.member.sent;
        deliver_to(&network, &table, now, &mut batch, here, &ports, sent);
        if flooded != 0 {
            let but = Some(self.member.number);
            flood(&network, &table, but, now, &mut batch, flooded);
        }
        if away | flooded != 0 {
            self.send_away(&table, now, &mut batch, away, flooded, &ports);
        }
    }
}
