//! A tap device: an Ethernet port between the card and the kernel of the machine that it runs on.
//!
//! ```text
//!   kernel --> queue (an actor on a reactor): reads a batch --> Lane of the port that it is plugged into
//!   kernel <-- queue: a write for each frame <-- receivers of that port
//! ```
//!
//! Frames cross with their offloads in the header of virtio (`IFF_VNET_HDR`), so that the kernel gets a frame of 64 KiB with one write. Where the kernel knows tunnels
//! (Linux 6.17), so does one that is in a tunnel: [`Carries::Tunnels`].
//!
//! Every frame is a system call, which is what limits small ones. Follows `linux/if_tun.h` and `linux/virtio_net.h` of Linux 6.18.

mod device;
mod header;
mod queue;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use bluff_reactor::{ActorId, Handle, Poll};

use crate::{Counters, NetError, Offloads, Outlet, Port, Receivers, Steering};
use device::Queue;

/// The most bytes of a device's name.
pub const NAME_MAX: usize = 15;

/// What the frames of a device are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carries {
    /// Frames of stations.
    Frames,
    /// Frames of a tunnel's underlay: one that is to be cut is a tunnelled one, and is cut behind the tunnel's header.
    Tunnels,
}

/// What a device is made with.
#[derive(Clone, Debug)]
pub struct TapOptions {
    /// Its name, of at most [`NAME_MAX`] bytes; one that is there is used, if nobody else does. With `%d` the kernel counts.
    pub name: String,
    /// What its frames are.
    pub carries: Carries,
    /// Reactors that frames come to: it has a queue for each. At least one.
    pub reactors: Vec<Handle>,
    /// How they are polled.
    pub poll: Poll,
}

/// A tap device that is open. Dropped, it is gone, unless somebody else made it.
pub struct Tap {
    name: String,
    completes: Offloads,
    shared: Arc<Shared>,
    queues: Vec<Queue>,
    places: Vec<(Handle, Arc<OnceLock<ActorId>>)>,
    options: TapOptions,
    port: Option<Arc<dyn Port>>,
}

/// What a device's queues share.
struct Shared {
    closed: AtomicBool,
    /// By queue.
    outlets: Mutex<Vec<Option<Outlet>>>,
    counters: Vec<Arc<Counters>>,
    /// Frames that the kernel had for the card and that made no sense.
    malformed: AtomicU64,
}

impl std::fmt::Debug for Tap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tap({} {:?})", self.name, self.completes)
    }
}

impl Tap {
    /// Makes a device, or takes one that is there, and sets it up.
    ///
    /// # Errors
    /// Without CAP_NET_ADMIN, or where somebody uses it.
    ///
    /// # Panics
    /// Where the options name no reactor.
    pub fn open(options: TapOptions) -> Result<Self, NetError> {
        assert!(!options.reactors.is_empty());
        let opened = device::open(&options)?;
        let counters = options.reactors.iter().map(|_| Arc::default()).collect();
        Ok(Self {
            name: opened.name,
            completes: opened.completes,
            shared: Arc::new(Shared {
                closed: AtomicBool::new(false),
                outlets: Mutex::new(vec![None; opened.queues.len()]),
                counters,
                malformed: AtomicU64::new(0),
            }),
            queues: opened.queues,
            places: Vec::new(),
            options,
            port: None,
        })
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the kernel does on frames that it is given, behind a tunnel's headers too where it [`Carries::Tunnels`].
    pub fn completes(&self) -> Offloads {
        self.completes
    }

    /// What its queues count: `sent` is what came from the kernel.
    pub fn counters(&self) -> &[Arc<Counters>] {
        &self.shared.counters
    }

    /// Frames that came from the kernel and made no sense.
    pub fn malformed(&self) -> u64 {
        self.shared.malformed.load(Ordering::Relaxed)
    }

    /// Sees to it that the device takes IP packets of `mtu` bytes; gives the length of the longest that it takes.
    ///
    /// # Errors
    /// Without CAP_NET_ADMIN, or where the device has gone.
    pub fn raise_mtu(&self, mtu: u16) -> Result<u16, NetError> {
        device::raise_mtu(&self.name, mtu)
    }

    /// Plugs it into a port: what the kernel sends goes there, and what is for the port's function goes to the kernel.
    ///
    /// # Panics
    /// Where it is plugged in already.
    pub fn plug_in(&mut self, port: &Arc<dyn Port>) {
        assert!(self.port.is_none(), "it has one plug");
        self.port = Some(port.clone());
        let queues = std::mem::take(&mut self.queues);
        for (index, queue) in queues.into_iter().enumerate() {
            let (shared, port, poll) = (self.shared.clone(), port.clone(), self.options.poll);
            let place = Arc::<OnceLock<ActorId>>::default();
            let id = place.clone();
            let (carries, completes) = (self.options.carries, self.completes);
            let reactor = &self.options.reactors[index];
            reactor.send(move |cx| {
                let made = cx.insert(poll, |cx, _| {
                    let worker =
                        queue::Worker::new(cx, queue, index, carries, completes, &port, shared);
                    Box::new(worker)
                });
                let _ = id.set(made);
            });
            self.places.push((reactor.clone(), place));
        }
    }
}

impl Shared {
    /// A queue takes frames from now on, or does not.
    fn set_outlet(&self, index: usize, outlet: Option<Outlet>, port: &Arc<dyn Port>) {
        let mut outlets = self.outlets.lock().expect("nothing panics with it");
        outlets[index] = outlet;
        let queues = outlets.clone();
        let steering = Steering::Spread(queues.len() as u16);
        port.set_receivers(Arc::new(Receivers { queues, steering }));
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Relaxed);
        if let Some(port) = &self.port {
            port.set_receivers(Arc::new(Receivers::none()));
        }
        for (reactor, place) in self.places.drain(..) {
            // Messages are in order: it is built by then.
            reactor.send(move |cx| {
                if let Some(id) = place.get() {
                    cx.wake(*id);
                }
            });
        }
    }
}
