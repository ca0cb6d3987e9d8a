//! The way out: outer headers.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bluff_net::{Batch, Cause, Csum, Frame, Gso, Lent, Offload, Offloads, all_of, places};
use bluff_packet::flow::FlowHasher;
use bluff_packet::{L3, Mac, Vni};

use super::Shared;
use super::outer::Outer;
use crate::underlay::Uplink;

/// Bytes of the longest inner frame that one outer packet of 65,535 bytes takes, with headers of IPv6, UDP and the tunnel.
const WHOLE_MAX: usize = 65_535 - 40 - 8 - 8;

/// The way out of one port of a network.
pub(super) struct Wrapper {
    shared: Arc<Shared>,
    scratch: Batch,
    /// Numbers IPv4 packets; they are never fragmented, so it only tells them apart.
    id: u16,
}

impl Wrapper {
    pub(super) fn new(shared: Arc<Shared>, _: Instant) -> Self {
        Self {
            shared,
            scratch: Batch::default(),
            id: 0,
        }
    }

    /// Wraps frames that are one datagram each, sends them, and unwraps them again.
    fn send_whole(&mut self, batch: &mut Lent<'_>, mut which: u32, vni: Vni, to: IpAddr, mac: Mac) {
        let mut offloads = [Offload::default(); bluff_net::BATCH];
        let shared = self.shared.clone();
        let options = shared.options.load();
        let Some(outer) = Outer::new(&options, vni, to, mac) else {
            // It has become another station meanwhile.
            let n = u64::from(which.count_ones());
            return shared.drops.sent.add_shared(Cause::Nowhere, n);
        };
        for i in places(which) {
            let frame = &mut batch.frames_mut()[i];
            offloads[i] = frame.offload;
            if !matches!(frame.offload.csum, Csum::Partial { .. }) {
                // What is known of the inner checksum says nothing of the outer one.
                frame.offload = Offload::default();
            }
            if !self.wrap(options.mtu, &outer, frame) {
                frame.offload = offloads[i];
                which &= !(1 << i);
                self.shared.drops.sent.add_shared(Cause::TooLong, 1);
            }
        }
        let receivers = self.shared.receivers.load();
        receivers.deliver(batch, which, |frames, result| {
            if let Err(cause) = result {
                let n = frames.len() as u64;
                self.shared.drops.sent.add_shared(cause, n);
            }
        });
        for i in places(which) {
            let frame = &mut batch.frames_mut()[i];
            frame.strip(outer.len());
            frame.offload = offloads[i];
        }
    }

    /// Puts the outer headers in front; `false`: it would be longer than the link takes.
    #[inline]
    fn wrap(&mut self, mtu: u16, outer: &Outer, frame: &mut Frame) -> bool {
        let inner = frame.len();
        // Of one that whoever is plugged in cuts, each segment has to fit.
        let longest = match frame.offload.gso {
            Some(gso) => (usize::from(gso.headers) + usize::from(gso.size)).min(inner),
            None => inner,
        };
        if outer.ip_len() + longest > usize::from(mtu) {
            return false;
        }
        // The tenant's congestion marks go with it, its priorities stay its own (RFC 6040 §4.1, RFC 2983 §3).
        let marks = match frame.packet.as_ref().map(|p| &p.l3) {
            Some(L3::Ipv4(ip)) => ip.tos & 3,
            Some(L3::Ipv6(ip)) => ip.traffic_class & 3,
            _ => 0,
        };
        let source = FlowHasher::FIRST_PORT | (frame.hash >> 18) as u16;
        self.id = self.id.wrapping_add(1);
        let to = frame.prepend(outer.len());
        outer.write(to, inner, source, marks, self.id);
        true
    }
}

impl Uplink for Wrapper {
    fn send(&mut self, now: Instant, batch: &mut Lent<'_>, which: u32, vni: Vni, to: IpAddr) {
        let shared = self.shared.clone();
        let count = |n: u32| shared.drops.sent.add_shared(Cause::Nowhere, u64::from(n));
        if to.is_ipv4() != shared.options.load().local.is_ipv4() {
            return count(which.count_ones());
        }
        let Some(mac) = shared.way(to, now, &mut self.scratch) else {
            // Nobody has answered yet; the question is on its way.
            return count(which.count_ones());
        };
        let mut whole = which;
        let completes = Offloads::from_bits_retain(shared.completes.load(Ordering::Relaxed));
        for i in places(which) {
            let frame = &batch.frames()[i];
            let offload = frame.offload;
            if offload.gso.is_none() {
                if !completes.contains(Offloads::CSUM) {
                    // Nobody behind the tunnel's header looks for it.
                    batch.complete_checksum(i);
                }
                continue;
            }
            let ipv4 = matches!(frame.packet.as_ref().map(|p| &p.l3), Some(L3::Ipv4(_)));
            // An outer packet is no longer than another, also before it is cut.
            let cut_behind = completes.contains(offload.needs(ipv4));
            if cut_behind && frame.len() <= WHOLE_MAX {
                continue;
            }
            whole &= !(1 << i);
            let mut scratch = std::mem::take(&mut self.scratch);
            let packet = batch.frames()[i].packet;
            if let (true, Some(gso)) = (cut_behind, offload.gso) {
                // Too long for one outer packet: two are as many frames less.
                let half = gso.segments(batch.frames()[i].len()).div_ceil(2);
                let size = usize::from(gso.size) * half;
                let frame = &mut batch.frames_mut()[i];
                frame.offload.gso = Some(Gso {
                    size: u16::try_from(size).unwrap_or(gso.size),
                    ..gso
                });
            }
            batch.segment(i, &mut scratch, |mut segments| {
                for k in 0..segments.frames().len() {
                    let segment = &mut segments.frames_mut()[k];
                    segment.packet = packet;
                    match offload.gso {
                        Some(gso) if cut_behind && gso.segments(segment.len()) > 1 => {
                            segment.offload.gso = Some(gso);
                        }
                        _ if completes.contains(Offloads::CSUM) => {}
                        _ => segments.complete_checksum(k),
                    }
                }
                let all = all_of(&segments);
                self.send_whole(&mut segments, all, vni, to, mac);
            });
            batch.frames_mut()[i].offload = offload;
            self.scratch = scratch;
        }
        self.send_whole(batch, whole, vni, to, mac);
    }
}
