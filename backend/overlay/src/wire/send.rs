//! The way out: outer headers.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use bluff_net::{Batch, Cause, Csum, Frame, Lent, Offload, all_of, distribute, places};
use bluff_packet::build::{Ipv4Fields, Ipv6Fields, Writer};
use bluff_packet::flow::FlowHasher;
use bluff_packet::{EtherType, IpProto, L2, L3, Mac, Macs, Tags, Vni};

use super::Shared;
use crate::udp::TunnelKind;
use crate::underlay::Uplink;

const HOPS: u8 = 64;
/// Bytes of Ethernet, UDP, and a tunnel's header.
const BESIDE_IP: usize = 14 + 8 + 8;

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
        let mut lens = [0u8; bluff_net::BATCH];
        for i in places(which) {
            let frame = &mut batch.frames_mut()[i];
            // What is known of the inner checksum says nothing of the outer one.
            offloads[i] = std::mem::take(&mut frame.offload);
            match self.wrap(frame, vni, to, mac) {
                Some(len) => lens[i] = len,
                None => {
                    frame.offload = offloads[i];
                    which &= !(1 << i);
                    self.shared.drops.sent.add_shared(Cause::TooLong, 1);
                }
            }
        }
        let receivers = self.shared.receivers.load();
        distribute(
            batch,
            which,
            |_, frame| receivers.outlet(frame),
            |frames, result| {
                if let Err(cause) = result {
                    self.shared
                        .drops
                        .sent
                        .add_shared(cause, frames.len() as u64);
                }
            },
        );
        for i in places(which) {
            let frame = &mut batch.frames_mut()[i];
            frame.strip(usize::from(lens[i]));
            frame.offload = offloads[i];
        }
    }

    /// Puts the outer headers in front; gives their length. `None`: it would be longer than the link takes.
    #[inline]
    fn wrap(&mut self, frame: &mut Frame, vni: Vni, to: IpAddr, mac: Mac) -> Option<u8> {
        let options = &self.shared.options;
        let payload = frame.len() + 8;
        let ip_len = if to.is_ipv4() { 20 } else { 40 };
        if ip_len + 8 + payload > usize::from(options.mtu) {
            return None;
        }
        // The tenant's congestion marks go with it, its priorities stay its own (RFC 6040 §4.1, RFC 2983 §3).
        let marks = match frame.packet.map(|p| p.l3) {
            Some(L3::Ipv4(ip)) => ip.tos & 3,
            Some(L3::Ipv6(ip)) => ip.traffic_class & 3,
            _ => 0,
        };
        let source = FlowHasher::FIRST_PORT | (frame.hash >> 18) as u16;
        self.id = self.id.wrapping_add(1);
        let len = BESIDE_IP + ip_len;
        let mut writer = Writer::new(frame.prepend(len));
        let l2 = L2 {
            macs: Macs {
                dst: mac,
                src: options.mac,
            },
            tags: Tags::NONE,
            ethertype: if to.is_ipv4() {
                EtherType::IPV4
            } else {
                EtherType::IPV6
            },
        };
        let ip = writer
            .ethernet(&l2)
            .and_then(|w| match (options.local, to) {
                (IpAddr::V4(src), IpAddr::V4(dst)) => w.ipv4(
                    &Ipv4Fields {
                        src,
                        dst,
                        proto: IpProto::UDP,
                        tos: marks,
                        ttl: HOPS,
                        id: self.id,
                        dont_fragment: true,
                    },
                    payload + 8,
                ),
                (IpAddr::V6(src), IpAddr::V6(dst)) => w.ipv6(
                    &Ipv6Fields {
                        src,
                        dst,
                        next: IpProto::UDP,
                        traffic_class: marks,
                        flow_label: 0,
                        hop_limit: HOPS,
                    },
                    payload + 8,
                ),
                _ => Ok(w),
            });
        // Without a checksum: legal for tunnels over both (RFC 7348 §5, RFC 8926 §3.3, RFC 6935 §5); what is inside has its own.
        let udp = ip.and_then(|w| w.udp(source, options.port, payload, 0));
        let done = udp.and_then(|w| match options.kind {
            TunnelKind::Vxlan => w.vxlan(vni),
            TunnelKind::Geneve => w.geneve(vni, &[], false),
        });
        debug_assert_eq!(done.map_or(0, |w| w.len()), len);
        Some(len as u8)
    }
}

impl Uplink for Wrapper {
    fn send(&mut self, now: Instant, batch: &mut Lent<'_>, which: u32, vni: Vni, to: IpAddr) {
        let shared = self.shared.clone();
        let count = |n: u32| shared.drops.sent.add_shared(Cause::Nowhere, u64::from(n));
        if to.is_ipv4() != shared.options.local.is_ipv4() {
            return count(which.count_ones());
        }
        let Some(mac) = shared.way(to, now, &mut self.scratch) else {
            // Nobody has answered yet; the question is on its way.
            return count(which.count_ones());
        };
        let mut whole = which;
        for i in places(which) {
            let offload = batch.frames()[i].offload;
            if offload.gso.is_none() {
                if matches!(offload.csum, Csum::Partial { .. }) {
                    // Nobody behind the tunnel's header looks for it.
                    batch.complete_checksum(i);
                }
                continue;
            }
            whole &= !(1 << i);
            let mut scratch = std::mem::take(&mut self.scratch);
            let packet = batch.frames()[i].packet;
            batch.segment(i, &mut scratch, |mut segments| {
                for k in 0..segments.frames().len() {
                    segments.complete_checksum(k);
                    segments.frames_mut()[k].packet = packet;
                }
                let all = all_of(&segments);
                self.send_whole(&mut segments, all, vni, to, mac);
            });
            self.scratch = scratch;
        }
        self.send_whole(batch, whole, vni, to, mac);
    }
}
