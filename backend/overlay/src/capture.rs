//! What a port, or a network's tunnel, carries, for whoever wants to see it.
//!
//! A port shows what the function sends before anything is checked, and what it is given after everything was. A tunnel shows frames
//! behind the outer headers that they travel with: written here from what is known of them, as the kernel or a NIC adds the real ones where nobody sees them. So a frame that is still to be
//! cut stands there whole, an outer packet's identification is 0, and so is the source port of what comes, which the card does not keep.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use bluff_net::capture::{Attached, Capture, Tap, Way};
use bluff_net::{Batch, Frame, HEADROOM};
use bluff_packet::build::{Ipv4Fields, Ipv6Fields, Writer};
use bluff_packet::flow::FlowHasher;
use bluff_packet::{IpProto, Vni};

use crate::network::{Network, NetworkPort};
use crate::udp::TunnelKind;

/// The headers that a network's frames travel with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outer {
    /// This card's VTEP.
    pub local: IpAddr,
    /// How frames are wrapped.
    pub kind: TunnelKind,
    /// The port of all VTEPs.
    pub port: u16,
}

/// Hops that outer packets begin with.
const HOPS: u8 = 64;

impl Outer {
    /// Writes the headers of a frame; gives their length, 0 where the addresses do not go together.
    fn write(
        &self,
        way: Way,
        vni: Vni,
        peer: IpAddr,
        frame: &Frame,
        room: &mut [u8; HEADROOM],
    ) -> usize {
        let (src, dst, source) = match way {
            Way::Out => {
                let port = FlowHasher::FIRST_PORT | (frame.hash >> 18) as u16;
                (self.local, peer, port)
            }
            Way::In => (peer, self.local, 0),
        };
        // One of 64 KiB, which is cut before it travels, has no length that IP could tell.
        let inner = (frame.len() + 8).min(usize::from(u16::MAX) - 60);
        let mut writer = Writer::new(room);
        let ip = match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => writer.ipv4(
                &Ipv4Fields {
                    src,
                    dst,
                    proto: IpProto::UDP,
                    tos: 0,
                    ttl: HOPS,
                    id: 0,
                    dont_fragment: true,
                },
                inner + 8,
            ),
            (IpAddr::V6(src), IpAddr::V6(dst)) => writer.ipv6(
                &Ipv6Fields {
                    src,
                    dst,
                    next: IpProto::UDP,
                    traffic_class: 0,
                    flow_label: 0,
                    hop_limit: HOPS,
                },
                inner + 8,
            ),
            _ => return 0,
        };
        let udp = ip.and_then(|w| w.udp(source, self.port, inner, 0));
        let all = udp.and_then(|w| match self.kind {
            TunnelKind::Vxlan => w.vxlan(vni),
            TunnelKind::Geneve => w.geneve(vni, &[], false),
        });
        all.map_or(0, |w| w.len())
    }
}

impl NetworkPort {
    /// Shows what it sends and receives, as Ethernet frames.
    pub fn capture(&self, capture: Arc<Capture>) -> Attached {
        self.member.tap.attach(capture)
    }
}

impl Network {
    /// Shows what goes to other cards and comes from them, behind outer headers. It is for networks that have a tunnel.
    pub fn capture(&self, outer: Outer, capture: Arc<Capture>) -> Attached {
        self.outer.store(Some(Arc::new(outer)));
        self.tap.attach(capture)
    }

    /// Shows frames that come from `peer`, or go there.
    #[cold]
    pub(crate) fn show(
        &self,
        now: Instant,
        way: Way,
        batch: &Batch,
        which: u32,
        vni: Vni,
        peer: IpAddr,
    ) {
        let outer = self.outer.load();
        let Some(outer) = outer.as_deref() else {
            return;
        };
        let mut write = |frame: &Frame, room: &mut _| outer.write(way, vni, peer, frame, room);
        self.tap.see_behind(now, way, batch, which, &mut write);
    }

    #[inline]
    pub(crate) fn is_shown(&self) -> bool {
        self.tap.is_on()
    }
}

/// The way of a port's frame, seen from its function.
#[inline]
pub(crate) fn show(tap: &Tap, now: Instant, way: Way, batch: &Batch, which: u32) {
    if tap.is_on() {
        tap.see(now, way, batch, which);
    }
}
