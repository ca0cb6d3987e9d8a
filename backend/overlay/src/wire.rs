//! Tunnels over an Ethernet port of the card's own: a vhost-user function that somebody else forwards (a switch of DPDK, an uplink of the machine), or a wire in a test.
//!
//! The card is a station of that Ethernet: it has an address there, answers who asks for it, and asks who has the addresses of the other VTEPs. Nothing else of what comes
//! is looked at, and nothing of it reaches a tenant but what is in a tunnel.
//!
//! ```text
//!   networks --> Uplink: outer headers --> receivers of the port
//!   networks <-- Arrival, by VNI <-- outer headers <-- Lane of the port
//! ```
//!
//! Follows RFC 7348 (VXLAN), RFC 8926 (Geneve), RFC 826 (ARP), RFC 4861 §7 (neighbour discovery), RFC 6040 (congestion marks through tunnels, both ways). All VTEPs are on the link, or behind one gateway.
//! Not here: fragments of outer packets (RFC 7348 §4.3 has VTEPs drop them), MLD.

mod neighbours;
mod outer;
mod receive;
mod send;

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Instant;

use arc_swap::ArcSwap;
use bluff_net::{Attributes, Batch, Lane, NetError, Offloads, Port, Receivers};
use bluff_packet::{Mac, Vni};
use bluff_reactor::Context;

use crate::arrival::Networks;
use crate::network::Network;
use crate::udp::{TunnelKind, UdpDrops};
use crate::underlay::{Underlay, Uplink};
use neighbours::Neighbours;
use receive::Unwrapper;
use send::Wrapper;

/// What an underlay is made with.
#[derive(Clone, Debug)]
pub struct WireOptions {
    /// This card's VTEP.
    pub local: IpAddr,
    /// Its address on the link.
    pub mac: Mac,
    /// Who leads to VTEPs; `None`: they are on the link.
    pub gateway: Option<IpAddr>,
    /// How frames are wrapped.
    pub kind: TunnelKind,
    /// The port of all VTEPs.
    pub port: u16,
    /// Bytes of the longest outer IP packet.
    pub mtu: u16,
}

/// The underlay, and the port that carries it.
pub struct WireUnderlay {
    shared: Arc<Shared>,
}

struct Shared {
    options: ArcSwap<WireOptions>,
    /// What whoever is plugged in completes behind the tunnel's headers, as [`Offloads`].
    completes: AtomicU8,
    networks: Networks,
    receivers: ArcSwap<Receivers>,
    neighbours: Neighbours,
    drops: UdpDrops,
}

impl fmt::Debug for WireUnderlay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let WireOptions { local, kind, .. } = **self.shared.options.load();
        write!(f, "WireUnderlay({local} {kind:?})")
    }
}

impl WireUnderlay {
    /// A station that nobody has plugged in yet.
    pub fn new(options: WireOptions) -> Arc<Self> {
        Arc::new(Self {
            shared: Arc::new(Shared {
                options: ArcSwap::from_pointee(options),
                completes: AtomicU8::new(0),
                networks: Networks::default(),
                receivers: ArcSwap::from_pointee(Receivers::none()),
                neighbours: Neighbours::default(),
                drops: UdpDrops::default(),
            }),
        })
    }

    /// Frames of `vni` go to this network from now on, or to none.
    pub fn set_network(&self, vni: Vni, network: Option<Arc<Network>>) {
        self.shared.networks.set(vni, network);
    }

    /// It is another station from now on: what was known of others on the link is forgotten, and what is under way goes where it went.
    pub fn set_options(&self, options: WireOptions) {
        self.shared.options.store(Arc::new(options));
        self.shared.neighbours.forget();
    }

    /// What may be left undone on inner frames, as whoever is plugged in does it behind the tunnel's headers: a checksum, with [`Offloads::CSUM`]; segmentation
    /// of the tunnelled frame as a whole, with its kinds. Nothing at first.
    pub fn set_completes(&self, completes: Offloads) {
        self.shared
            .completes
            .store(completes.bits(), Ordering::Relaxed);
    }

    /// What it counts.
    pub fn drops(&self) -> &UdpDrops {
        &self.shared.drops
    }
}

impl Underlay for WireUnderlay {
    fn counted(&self) -> Option<&UdpDrops> {
        Some(&self.shared.drops)
    }

    fn open(&self, cx: &mut Context<'_>) -> Result<Box<dyn Uplink>, NetError> {
        Ok(Box::new(Wrapper::new(self.shared.clone(), cx.now())))
    }
}

/// Whoever is plugged in here is the wire: what it sends comes from the underlay.
impl Port for WireUnderlay {
    fn attributes(&self) -> Attributes {
        Attributes {
            mtu: self.shared.options.load().mtu,
            // Tunnelled frames come whole, with their checksums.
            takes: Offloads::empty(),
            link: true,
        }
    }

    fn open(&self, cx: &mut Context<'_>, _: u16) -> Result<Box<dyn Lane>, NetError> {
        Ok(Box::new(Unwrapper::new(self.shared.clone(), cx.now())))
    }

    fn set_receivers(&self, receivers: Arc<Receivers>) {
        self.shared.receivers.store(receivers);
    }
}

impl Shared {
    /// Sends a frame of the station's own; `batch` has it alone.
    fn say(&self, batch: &Batch) {
        let receivers = self.receivers.load();
        receivers.deliver(batch, 1, |_, _| {});
    }

    /// Who leads to a VTEP, where it is known. If it is not, or was not heard of for some time, it is asked for.
    fn way(&self, to: IpAddr, now: Instant, batch: &mut Batch) -> Option<Mac> {
        let next = self.options.load().gateway.unwrap_or(to);
        let (known, ask) = self.neighbours.find(next, now);
        if ask {
            neighbours::ask(self, next, batch);
        }
        known
    }
}
