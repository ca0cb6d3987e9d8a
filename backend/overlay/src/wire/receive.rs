//! The way in: what the link brings.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Weak};
use std::time::Instant;

use bluff_net::{BATCH, Batch, Cause, Csum, GsoKind, Lane, Lent, Offload, all_of, places};
use bluff_packet::build::{ArpFields, Writer};
use bluff_packet::tunnel::{Geneve, Vxlan};
use bluff_packet::{Fragment, Frame as Packet, L3, L4, Tags, Vni, ndp, parse};

use super::neighbours::neighbour_message;
use super::{Shared, WireOptions};
use crate::arrival::Arrival;
use crate::ecn;
use crate::network::Network;
use crate::udp::TunnelKind;

/// Takes what one transmit queue of the wire sends.
pub(super) struct Unwrapper {
    shared: Arc<Shared>,
    arrivals: HashMap<Vni, (Weak<Network>, Arrival)>,
    answer: Batch,
}

/// What a frame of the link is.
enum Kind {
    /// In a tunnel.
    Inner {
        vni: Vni,
        from: IpAddr,
        /// Where the inner frame begins.
        at: usize,
        /// The outer header's traffic class.
        class: u8,
    },
    /// For the station itself, or for nobody.
    Own,
}

impl Unwrapper {
    pub(super) fn new(shared: Arc<Shared>, _: Instant) -> Self {
        Self {
            shared,
            arrivals: HashMap::new(),
            answer: Batch::default(),
        }
    }

    fn judge(
        options: &WireOptions,
        packet: &Packet,
        head: &[u8],
        len: usize,
    ) -> Result<Kind, Cause> {
        let to_us = packet.l2.dst() == options.mac;
        if !to_us && !packet.l2.dst().is_multicast() {
            return Err(Cause::Filtered);
        }
        let (from, to, class) = match &packet.l3 {
            L3::Ipv4(ip) => (IpAddr::from(ip.src), IpAddr::from(ip.dst), ip.tos),
            L3::Ipv6(ip) => (ip.src.into(), ip.dst.into(), ip.traffic_class),
            L3::Arp(_) => return Ok(Kind::Own),
            L3::Malformed(_) => return Err(Cause::Malformed),
            L3::Other => return Err(Cause::Filtered),
        };
        let L4::Udp(udp) = &packet.l4 else {
            return match &packet.l4 {
                L4::Icmpv6(_) => Ok(Kind::Own),
                L4::Malformed(_) => Err(Cause::Malformed),
                _ => Err(Cause::Filtered),
            };
        };
        if !to_us || to != options.local || udp.dst != options.port {
            return Err(Cause::Filtered);
        }
        // A VTEP drops fragments (RFC 7348 §4.3).
        if packet.fragment() != Fragment::No {
            return Err(Cause::BadTunnel);
        }
        let at = packet.l4_offset().ok_or(Cause::Malformed)? + 8;
        let payload = usize::from(udp.len) - 8;
        let inside = head.get(at..).ok_or(Cause::Malformed)?;
        let inside = &inside[..inside.len().min(payload)];
        // What comes after the datagram is not the inner frame's.
        if at + payload != len {
            return Err(Cause::BadTunnel);
        }
        let parsed = match options.kind {
            TunnelKind::Vxlan => Vxlan::parse(inside, payload).map(|t| (t.vni, t.inner, false)),
            TunnelKind::Geneve => {
                Geneve::parse(inside, payload).map(|t| (t.vni, t.inner, t.control))
            }
        };
        match parsed {
            Ok((vni, inner, false)) => Ok(Kind::Inner {
                vni,
                from,
                at: at + inner,
                class,
            }),
            Ok((_, _, true)) | Err(_) => Err(Cause::BadTunnel),
        }
    }

    /// What is for the station itself: who asks for it is answered, who answers is believed where it was asked.
    #[cold]
    fn own(&mut self, options: &WireOptions, now: Instant, packet: &Packet, head: &[u8]) {
        let (mac, asker) = (options.mac, packet.l2.src());
        if asker.is_multicast() || asker == mac {
            return;
        }
        self.answer.clear();
        let answer = match (&packet.l3, options.local) {
            (L3::Arp(arp), IpAddr::V4(local)) => {
                self.shared
                    .neighbours
                    .hear(arp.sender_ip.into(), arp.sender_mac, now);
                if arp.op != 1 || arp.target_ip != local {
                    return;
                }
                let fields = ArpFields {
                    sender_mac: mac,
                    sender_ip: local,
                    target_ip: arp.sender_ip,
                };
                self.answer.push_with(0, |room| {
                    let mut writer = Writer::new(room);
                    let written = writer.arp_reply(arp.sender_mac, Tags::NONE, &fields);
                    written.map_or(0, |w| w.len())
                })
            }
            (L3::Ipv6(ip), IpAddr::V6(local)) => {
                let Ok(Some(message)) = ndp::parse(packet, head) else {
                    return;
                };
                if message.advertisement {
                    if let Some(link) = message.link_layer {
                        self.shared
                            .neighbours
                            .hear(message.target.into(), link, now);
                    }
                    return;
                }
                // One that looks whether the address is free hears it by a group; the card has it, and does not give it up.
                if message.target != local || ip.src.is_unspecified() {
                    return;
                }
                let to = message.link_layer.unwrap_or(asker);
                self.answer.push_with(0, |room| {
                    neighbour_message(room, (to, mac), (local, ip.src), true, local, mac)
                })
            }
            _ => return,
        };
        if answer.is_some() {
            self.shared.say(&self.answer);
        }
    }

    fn arrive(&mut self, now: Instant, batch: &mut Lent<'_>, which: u32, vni: Vni, from: IpAddr) {
        let networks = self.shared.networks.load();
        let Some(network) = networks.get(&vni) else {
            // Not kept for a network that has gone.
            self.arrivals.remove(&vni);
            let n = u64::from(which.count_ones());
            return self.shared.drops.received.add_shared(Cause::Stranger, n);
        };
        let known = self.arrivals.get(&vni);
        if !known.is_some_and(|(weak, _)| std::ptr::eq(weak.as_ptr(), Arc::as_ptr(network))) {
            let arrival = Arrival::new(network.clone(), now);
            self.arrivals
                .insert(vni, (Arc::downgrade(network), arrival));
        }
        if let Some((_, arrival)) = self.arrivals.get_mut(&vni) {
            arrival.receive(now, batch, which, vni, from);
        }
    }
}

/// Takes the outer headers off, `at` bytes. What was left to do on the inner frame by its sender, who has the wire as a device and no network for its
/// driver, is left to the receiver where it is what the inner headers say, and is done or refused here where it is not: nothing is written later over what
/// is checked from now on.
#[inline]
fn uncover(batch: &mut Lent<'_>, i: usize, at: usize) -> Result<(), Cause> {
    let frame = &mut batch.frames_mut()[i];
    frame.packet = None;
    let begins = match frame.offload.csum {
        Csum::Partial { start, .. } => usize::from(start),
        Csum::Unknown | Csum::Valid => 0,
    };
    if begins < at {
        // Of the outer datagram: it has arrived, and nobody looks at it any more.
        if frame.offload.gso.is_some() {
            return Err(Cause::BadTunnel);
        }
        frame.offload = Offload::default();
        frame.strip(at);
        return Ok(());
    }
    left_undone(batch, i, at)
}

/// As [`uncover`], of a frame with something left to do behind its outer headers.
#[cold]
fn left_undone(batch: &mut Lent<'_>, i: usize, at: usize) -> Result<(), Cause> {
    let frame = &batch.frames()[i];
    let inside = frame.head().get(at..).ok_or(Cause::Malformed)?;
    let packet = parse(inside, frame.len() - at).map_err(|_| Cause::Malformed)?;
    let transport = packet.l4_offset().map(|place| at + place);
    let (own, headers) = match packet.l4 {
        L4::Tcp(tcp) => (16, usize::from(tcp.header_len)),
        L4::Udp(_) => (6, 8),
        _ => (0, 0),
    };
    let is_own = |start, offset| {
        own > 0 && transport == Some(usize::from(start)) && usize::from(offset) == own
    };
    let sound = match frame.offload {
        Offload {
            csum: Csum::Partial { start, offset },
            gso: None,
        } => {
            if !is_own(start, offset) {
                // Behind a tunnel of the tenant's own, perhaps. It is written before anything is read.
                if usize::from(start) + usize::from(offset) + 2 > frame.head().len() {
                    return Err(Cause::BadTunnel);
                }
                batch.complete_checksum(i);
            }
            true
        }
        Offload {
            csum: Csum::Partial { start, offset },
            gso: Some(gso),
        } => {
            let kind = match (&packet.l3, &packet.l4) {
                (L3::Ipv4(_), L4::Tcp(_)) => gso.kind == GsoKind::Tcp4,
                (L3::Ipv6(ip), L4::Tcp(_)) => gso.kind == GsoKind::Tcp6 && ip.addresses_are_final(),
                (L3::Ipv4(_), L4::Udp(_)) => gso.kind == GsoKind::Udp,
                (L3::Ipv6(ip), L4::Udp(_)) => gso.kind == GsoKind::Udp && ip.addresses_are_final(),
                _ => false,
            };
            let places = [gso.network, gso.transport, gso.headers].map(usize::from);
            let found = transport.map(|t| [at + packet.l3_offset(), t, t + headers]);
            kind && is_own(start, offset)
                && gso.size > 0
                && found == Some(places)
                && places[2] <= frame.head().len()
                && places[2] < frame.len()
                && packet.fragment() == Fragment::No
                && packet.l3_end() == Some(frame.len() - at)
        }
        Offload { gso, .. } => gso.is_none(),
    };
    if !sound {
        return Err(Cause::BadTunnel);
    }
    batch.frames_mut()[i].strip(at);
    Ok(())
}

impl Lane for Unwrapper {
    fn send(&mut self, now: Instant, mut batch: Lent<'_>) {
        let mut inner = [None; BATCH];
        let mut left = 0u32;
        let shared = self.shared.clone();
        let options = shared.options.load();
        for i in places(all_of(&batch)) {
            let drop = |cause| shared.drops.received.add_shared(cause, 1);
            let frame = &mut batch.frames_mut()[i];
            if frame.parse().is_err() {
                drop(Cause::Malformed);
                continue;
            }
            let (head, len) = (frame.head(), frame.len());
            let packet = frame.packet.as_ref().expect("it was read");
            match Self::judge(&options, packet, head, len) {
                Ok(Kind::Inner {
                    vni,
                    from,
                    at,
                    class,
                }) => {
                    let uncovered = uncover(&mut batch, i, at);
                    let marked =
                        uncovered.and_then(|()| ecn::carry_over(&mut batch.frames_mut()[i], class));
                    match marked {
                        Ok(()) => {
                            inner[i] = Some((vni, from));
                            left |= 1 << i;
                        }
                        Err(cause) => drop(cause),
                    }
                }
                Ok(Kind::Own) => self.own(&options, now, packet, head),
                Err(cause) => drop(cause),
            }
        }
        while left != 0 {
            let of = inner[left.trailing_zeros() as usize];
            let same = places(left).filter(|i| inner[*i] == of);
            let same = same.fold(0u32, |set, i| set | 1 << i);
            left &= !same;
            if let Some((vni, from)) = of {
                self.arrive(now, &mut batch, same, vni, from);
            }
        }
    }
}
