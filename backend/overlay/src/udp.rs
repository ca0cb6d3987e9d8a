//! Tunnels over the kernel's UDP sockets: they work everywhere, and need no privileges.
//!
//! ```text
//!   Uplink (one for each port)  --+                                   +--> Arrival, by VNI
//!                                 v                                   |
//!     senders of a reactor: sockets with source ports of their own    receiver of a reactor: one socket at the tunnel's port
//! ```
//!
//! A flow has one source port, so that the underlay can spread flows, and the kernel takes and gives many datagrams of one flow at once (UDP_SEGMENT,
//! UDP_GRO). Datagrams are not fragmented: what the path does not take is refused, and counted.
//!
//! Follows RFC 7348 (VXLAN) and RFC 8926 (Geneve, without options of our own). Not here: discovery of the path's MTU, DSCP of the inner packet.

mod receive;
mod send;
mod socket;

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use bluff_net::{Drops, NetError};
use bluff_packet::Vni;
use bluff_reactor::{ActorId, Context, Handle, Poll};

use crate::arrival::Networks;
use crate::network::Network;
use crate::underlay::{Underlay, Uplink};
use receive::Receiver;
use send::{Senders, Way};

/// How frames are wrapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TunnelKind {
    /// RFC 7348.
    Vxlan,
    /// RFC 8926.
    Geneve,
}

impl TunnelKind {
    /// The port that is registered for it.
    pub fn port(self) -> u16 {
        match self {
            Self::Vxlan => 4789,
            Self::Geneve => 6081,
        }
    }

    /// The header of every frame of a network.
    fn header(self, vni: Vni) -> [u8; 8] {
        let [_, a, b, c] = vni.get().to_be_bytes();
        match self {
            Self::Vxlan => [0x08, 0, 0, 0, a, b, c, 0],
            Self::Geneve => [0, 0, 0x65, 0x58, a, b, c, 0],
        }
    }
}

/// What an underlay is made with.
#[derive(Clone, Debug)]
pub struct UdpOptions {
    /// This card's VTEP.
    pub local: IpAddr,
    /// How frames are wrapped.
    pub kind: TunnelKind,
    /// The port of all VTEPs; [`TunnelKind::port`] as a rule.
    pub port: u16,
    /// How it is polled.
    pub poll: Poll,
    /// Reactors that datagrams come to; at least one.
    pub reactors: Vec<Handle>,
}

/// What an underlay counts.
#[derive(Debug, Default)]
pub struct UdpDrops {
    /// Of what was to be sent.
    pub sent: Drops,
    /// Of what came.
    pub received: Drops,
}

/// The underlay of one local VTEP, of one kind. Dropped, it listens no more.
pub struct UdpUnderlay {
    shared: Arc<Shared>,
    /// Where it listens.
    receivers: Vec<(Handle, Arc<OnceLock<ActorId>>)>,
}

/// What all its sockets share.
struct Shared {
    local: IpAddr,
    kind: TunnelKind,
    port: u16,
    networks: Networks,
    drops: UdpDrops,
    /// Nobody listens any more.
    closed: AtomicBool,
}

impl fmt::Debug for UdpUnderlay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "UdpUnderlay({} {:?})",
            self.shared.local, self.shared.kind
        )
    }
}

fn system(what: &'static str) -> impl Fn(io::Error) -> NetError {
    move |source| NetError::System { what, source }
}

thread_local! {
    /// The senders of this thread's reactor, by the address of what they share.
    static SENDERS: RefCell<Vec<(usize, Weak<RefCell<Senders>>)>> = const { RefCell::new(Vec::new()) };
}

impl UdpUnderlay {
    /// Listens.
    ///
    /// # Errors
    /// Where a socket cannot be had: another program has the port, or the address is not one of this machine.
    pub fn new(options: UdpOptions) -> Result<Arc<Self>, NetError> {
        let shared = Arc::new(Shared {
            local: options.local,
            kind: options.kind,
            port: options.port,
            networks: Networks::default(),
            drops: UdpDrops::default(),
            closed: AtomicBool::new(false),
        });
        let at = SocketAddr::new(options.local, options.port);
        let sockets: Vec<_> = options
            .reactors
            .iter()
            .map(|_| socket::listen(at))
            .collect::<io::Result<_>>()
            .map_err(system("cannot listen for tunnelled frames"))?;
        let listen = |(reactor, socket): (&Handle, _)| {
            let (shared, poll) = (shared.clone(), options.poll);
            let place = Arc::<OnceLock<ActorId>>::default();
            let id = place.clone();
            reactor.send(move |cx| {
                let made = cx.insert(poll, |cx, _| Box::new(Receiver::new(cx, socket, shared)));
                let _ = id.set(made);
            });
            (reactor.clone(), place)
        };
        let receivers = options.reactors.iter().zip(sockets).map(listen).collect();
        Ok(Arc::new(Self { shared, receivers }))
    }

    /// Frames of `vni` go to this network from now on, or to none.
    pub fn set_network(&self, vni: Vni, network: Option<Arc<Network>>) {
        self.shared.networks.set(vni, network);
    }

    /// The port of all VTEPs.
    pub fn port(&self) -> u16 {
        self.shared.port
    }

    /// What it counts.
    pub fn drops(&self) -> &UdpDrops {
        &self.shared.drops
    }
}

impl Drop for UdpUnderlay {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Relaxed);
        for (reactor, receiver) in self.receivers.drain(..) {
            // Messages are in order: it is built by then.
            reactor.send(move |cx| {
                if let Some(id) = receiver.get() {
                    cx.wake(*id);
                }
            });
        }
    }
}

impl Underlay for UdpUnderlay {
    fn counted(&self) -> Option<&UdpDrops> {
        Some(&self.shared.drops)
    }

    fn open(&self, _: &mut Context<'_>) -> Result<Box<dyn Uplink>, NetError> {
        let key = Arc::as_ptr(&self.shared) as usize;
        let found = SENDERS.with_borrow_mut(|all| {
            all.retain(|(_, weak)| weak.strong_count() > 0);
            let found = all.iter().find(|(k, _)| *k == key);
            found.and_then(|(_, weak)| weak.upgrade())
        });
        let senders = match found {
            Some(senders) => senders,
            None => {
                let made = Senders::new(self.shared.clone())
                    .map_err(system("cannot make sockets for tunnelled frames"))?;
                let made = Rc::new(RefCell::new(made));
                SENDERS.with_borrow_mut(|all| all.push((key, Rc::downgrade(&made))));
                made
            }
        };
        Ok(Box::new(Way(senders)))
    }
}
