//! Frames that come from other cards.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use arc_swap::{ArcSwap, Guard};
use bluff_net::capture::Way;
use bluff_net::{BATCH, Cause, Frame, Lent, places};
use bluff_packet::Vni;

use crate::bucket::Bucket;
use crate::fdb::{Key, Place, Refused, View};
use crate::network::{Network, Tunnel};
use crate::switch::{deliver_to, flood};

/// The networks of an underlay, by VNI.
#[derive(Debug, Default)]
pub(crate) struct Networks {
    all: ArcSwap<HashMap<Vni, Arc<Network>>>,
    /// Taken by whoever changes them.
    editing: Mutex<()>,
}

impl Networks {
    /// Frames of `vni` go to this network from now on, or to none.
    pub(crate) fn set(&self, vni: Vni, network: Option<Arc<Network>>) {
        let _editing = self.editing.lock().expect("nothing panics with it");
        let mut all = HashMap::clone(&self.all.load());
        match network {
            Some(network) => all.insert(vni, network),
            None => all.remove(&vni),
        };
        self.all.store(Arc::new(all));
    }

    /// As they are now.
    pub(crate) fn load(&self) -> Guard<Arc<HashMap<Vni, Arc<Network>>>> {
        self.all.load()
    }
}

/// The way in from other cards to one network, on a reactor.
#[derive(Debug)]
pub struct Arrival {
    network: Arc<Network>,
    flood: Bucket,
}

impl Arrival {
    /// To `network`.
    pub fn new(network: Arc<Network>, now: Instant) -> Self {
        Self {
            flood: Bucket::new(network.flood, now),
            network,
        }
    }

    /// Takes the frames whose bits are set in `which`, without their tunnel's headers, of `vni` and from the VTEP `from`. They go to ports of this card, never on to another.
    pub fn receive(
        &mut self,
        now: Instant,
        batch: &mut Lent<'_>,
        which: u32,
        vni: Vni,
        from: IpAddr,
    ) {
        let network = self.network.clone();
        let table = network.table();
        let tick = network.tick(now);
        let mut fdb = network.fdb.view();
        let count = |cause, n: u32| network.arrived.add_shared(cause, u64::from(n));
        if network.is_shown() {
            network.show(now, Way::In, batch, which, vni, from);
        }
        // A stranger may know a VNI; what it sends is not looked at.
        let tunnel = table.tunnel.as_deref().filter(|t| t.vni == vni);
        let Some(from) = tunnel.and_then(|t: &Tunnel| t.number(from)) else {
            return count(Cause::Stranger, which.count_ones());
        };
        let mut ports = [u16::MAX; BATCH];
        let (mut here, mut flooded) = (0, 0);
        for i in places(which) {
            match self.judge(&mut fdb, tick, now, &mut batch.frames_mut()[i], from) {
                Ok(Some(port)) => {
                    ports[i] = port;
                    here |= 1 << i;
                }
                Ok(None) => flooded |= 1 << i,
                Err(cause) => count(cause, 1),
            }
        }
        let arrived = &network.arrived;
        deliver_to(&network, &table, now, batch, here, &ports, arrived);
        if flooded != 0 {
            flood(&network, &table, None, now, batch, flooded);
        }
    }

    /// The port that a frame is for; `None`: all of them.
    fn judge(
        &mut self,
        fdb: &mut View<'_>,
        tick: u32,
        now: Instant,
        frame: &mut Frame,
        from: u16,
    ) -> Result<Option<u16>, Cause> {
        let packet = frame.parse().map_err(|_| Cause::Malformed)?;
        let (source, to) = (packet.l2.src(), packet.l2.dst());
        if source.is_multicast() {
            return Err(Cause::Malformed);
        }
        let vlan = packet
            .l2
            .tags
            .as_slice()
            .first()
            .map_or(0, |tag| tag.vlan());
        // An address of this card does not come from another.
        if let Err(Refused::Fixed) = fdb.see(Key::new(source.0, vlan), Place::Vtep(from), tick) {
            return Err(Cause::Spoofed);
        }
        if !to.is_multicast()
            && let Some(entry) = fdb.find(Key::new(to.0, vlan))
        {
            return match entry.place {
                Place::Port(port) => Ok(Some(port)),
                // All cards have their own way to each other.
                Place::Vtep(_) => Err(Cause::Nowhere),
            };
        }
        match self.flood.admit(now, 1) {
            true => Ok(None),
            false => Err(Cause::Storm),
        }
    }
}
