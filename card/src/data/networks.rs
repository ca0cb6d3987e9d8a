//! Networks, and the functions that are in them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bluff_attachment::keeper::Descriptors;
use bluff_net::capture::{Attached, Capture};
use bluff_net::{Cause, Counters, Drops};
use bluff_overlay::{
    FdbLimits, Key, Network, NetworkOptions, Outer, Place, PortOptions, PortRates, Rate, Rules,
};
use bluff_packet::flow::FlowHasher;
use bluff_packet::{Mac, Vni};
use bluff_vhost_user::NetControl;
use bluff_virtio::{DeviceError, LineCounters};
use bluff_virtio_net::{Cable, Net, NetOptions};

use super::underlays::{Carrier, Plug, tunnel_kind};
use super::{Data, Stands};
use crate::message::{AddressEntry, AddressPlace, NetworkInfo};
use crate::spec::{DeviceSpec, FunctionSpec, Id, NetworkSpec, PortSpec, Text};
use crate::stats::{FunctionStatistics, NetStatistics, NetworkStatistics, PairStatistics};

/// Addresses that a network learns in all, and of one port or VTEP.
const FDB: FdbLimits = FdbLimits {
    total: 65_536,
    each: 16_384,
};
/// An address that was not seen for so long is forgotten (IEEE 802.1Q-2022 table 8-6).
const AGE: Duration = Duration::from_secs(300);
/// How often that is looked after.
const HOUSEKEEPING: Duration = Duration::from_secs(5);
/// What a port may carry at once after a pause, as time at its rate.
const BURST: Duration = Duration::from_millis(10);

/// All networks.
#[derive(Default)]
pub(super) struct Networks {
    open: BTreeMap<Id, OpenNetwork>,
    /// There once a network is.
    secrets: Option<Secrets>,
    /// The thread that forgets old addresses; it ends with this.
    housekeeper: Option<Sender<Weak<Network>>>,
}

/// What tenants must not know: with it they could aim flows at a queue, and addresses at a place of the table.
struct Secrets {
    hasher: [u8; FlowHasher::KEY_LEN],
    seed: [u8; 8],
}

/// A network that functions can be in.
struct OpenNetwork {
    network: Arc<Network>,
    tunnel: Option<(Vni, Carrier)>,
    /// What its frames travel with.
    outer: Option<Outer>,
}

impl Networks {
    /// What those with a tunnel have dropped.
    pub(super) fn statistics(&self) -> Vec<NetworkStatistics> {
        let of = |(id, open): (&Id, &OpenNetwork)| {
            let underlay = open.network.underlay()?;
            let counted = underlay.counted();
            Some(NetworkStatistics {
                network: id.clone(),
                arrived_drops: by_cause(std::iter::once(open.network.arrived())),
                underlay_sent_drops: by_cause(counted.map(|drops| &drops.sent).into_iter()),
                underlay_received_drops: by_cause(counted.map(|drops| &drops.received).into_iter()),
            })
        };
        self.open.iter().filter_map(of).collect()
    }

    /// A network that has a tunnel.
    pub(super) fn tunnel(&self, id: &Id) -> Result<(&Network, Outer)> {
        let open = self.open.get(id).context("it is not open")?;
        let outer = open.outer.context("it has no tunnel")?;
        Ok((&open.network, outer))
    }
}

impl Drop for OpenNetwork {
    fn drop(&mut self) {
        // Each of them holds the other.
        if let Some((vni, carrier)) = &self.tunnel {
            carrier.set_network(*vni, None);
        }
    }
}

/// A virtio-net function.
pub(super) struct Nets {
    plug: Plug,
    /// Descriptors of a session that it will go on with.
    pub(super) restored: Descriptors,
    cable: Cable,
    counters: Vec<Arc<Counters>>,
    lines: Vec<Arc<LineCounters>>,
    /// The reactor of each pair.
    reactors: Vec<u16>,
}

/// What front ends ask network functions for.
struct Asked(Cable);

impl NetControl for Asked {
    fn set_mtu(&mut self, mtu: u16) -> Result<(), DeviceError> {
        let most = self.0.mtu();
        match mtu <= most {
            true => Ok(()),
            false => Err(DeviceError::Backend(format!(
                "an MTU of {mtu} is more than the network's {most}"
            ))),
        }
    }

    fn announce(&mut self, mac: [u8; 6]) -> Result<(), DeviceError> {
        self.0.announce(mac);
        Ok(())
    }
}

impl Secrets {
    fn new() -> Result<Self> {
        let mut secrets = Self {
            hasher: [0; FlowHasher::KEY_LEN],
            seed: [0; 8],
        };
        let mut source = File::open("/dev/urandom").context("/dev/urandom")?;
        source.read_exact(&mut secrets.hasher)?;
        source.read_exact(&mut secrets.seed)?;
        Ok(secrets)
    }
}

/// Forgets old addresses, until the sender is gone.
fn keep_house(networks: &Receiver<Weak<Network>>) {
    let mut all: Vec<Weak<Network>> = Vec::new();
    let mut next = Instant::now() + HOUSEKEEPING;
    loop {
        let wait = next.saturating_duration_since(Instant::now());
        match networks.recv_timeout(wait) {
            Ok(network) => all.push(network),
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {
                let now = Instant::now();
                all.retain(|network| {
                    let network = network.upgrade();
                    network.map(|network| network.forget_old(now)).is_some()
                });
                next = now + HOUSEKEEPING;
            }
        }
    }
}

impl Data {
    pub(super) fn open_network(&mut self, id: &Id, spec: &NetworkSpec) -> Result<NetworkInfo> {
        ensure!(!self.networks.open.contains_key(id), "it is open already");
        ensure!(!self.reactors.is_empty(), "there are no reactors");
        if self.networks.secrets.is_none() {
            self.networks.secrets = Some(Secrets::new()?);
        }
        let secrets = self.networks.secrets.as_ref().expect("made above");
        let options = NetworkOptions {
            name: id.as_str().into(),
            mtu: spec.mtu,
            fdb: FDB,
            age: AGE,
            flood: None,
        };
        let hasher = FlowHasher::new(&secrets.hasher);
        let network = Network::new(options, hasher, u64::from_ne_bytes(secrets.seed));
        let tunnel = match &spec.tunnel {
            Some(tunnel) => {
                let vni = spec.vni.and_then(Vni::new).context("it has no VNI")?;
                Some((vni, self.carrier(id, tunnel, spec.mtu)?))
            }
            None => None,
        };
        let info = NetworkInfo {
            underlay: tunnel.as_ref().map(|(_, carrier)| carrier.spec()),
        };
        let outer = spec.tunnel.as_ref().map(|tunnel| Outer {
            local: tunnel.vtep,
            kind: tunnel_kind(tunnel.kind),
            port: tunnel.port(),
        });
        let open = OpenNetwork {
            network,
            tunnel,
            outer,
        };
        match self.join_tunnel(&open, spec) {
            Ok(()) => {
                self.networks.open.insert(id.clone(), open);
                Ok(info)
            }
            Err(error) => {
                self.let_go(&open);
                Err(error)
            }
        }
    }

    /// Everything about opening a network that can fail.
    fn join_tunnel(&mut self, open: &OpenNetwork, spec: &NetworkSpec) -> Result<()> {
        if let (Some((vni, carrier)), Some(spec)) = (&open.tunnel, &spec.tunnel) {
            let network = &open.network;
            network.set_tunnel(*vni, &spec.vteps, carrier.underlay())?;
            for entry in &spec.fdb {
                let key = Key::new(entry.mac.0.0, entry.vlan.unwrap_or(0));
                network.fix(key, entry.vtep)?;
            }
            carrier.set_network(*vni, Some(network.clone()));
        }
        self.housekeeper()?
            .send(Arc::downgrade(&open.network))
            .context("the thread that forgets addresses")
    }

    fn let_go(&mut self, open: &OpenNetwork) {
        if let Some((_, carrier)) = &open.tunnel {
            self.underlays.let_go(carrier);
        }
    }

    fn housekeeper(&mut self) -> Result<&Sender<Weak<Network>>> {
        if self.networks.housekeeper.is_none() {
            let (sender, networks) = channel();
            std::thread::Builder::new()
                .name("networks".to_owned())
                .spawn(move || keep_house(&networks))
                .context("the thread that forgets addresses")?;
            self.networks.housekeeper = Some(sender);
        }
        Ok(self.networks.housekeeper.as_ref().expect("made above"))
    }

    pub(super) fn close_network(&mut self, id: &Id) -> Result<()> {
        let is_in = |f: &Stands| matches!(f, Stands::Net(net) if net.plug.number_in(id).is_some());
        ensure!(!self.functions.values().any(is_in), "a function is in it");
        let open = self.networks.open.remove(id);
        self.let_go(&open.context("it is not open")?);
        Ok(())
    }

    /// The addresses that a network knows.
    pub(super) fn addresses(&self, id: &Id) -> Result<Vec<AddressEntry>> {
        let open = self.networks.open.get(id).context("it is not open")?;
        let functions: BTreeMap<u16, &Id> = self
            .functions
            .iter()
            .filter_map(|(function, stands)| match stands {
                Stands::Net(net) => Some((net.plug.number_in(id)?, function)),
                _ => None,
            })
            .collect();
        let entry = |(key, entry): (Key, bluff_overlay::Entry)| {
            let place = match entry.place {
                Place::Port(number) => AddressPlace::Function((*functions.get(&number)?).clone()),
                Place::Vtep(number) => AddressPlace::Vtep(open.network.vtep(number)?),
            };
            Some(AddressEntry {
                mac: Text(Mac(key.mac())),
                vlan: key.vlan(),
                place,
                fixed: entry.fixed,
            })
        };
        let entries = open.network.fdb().entries();
        let mut all: Vec<_> = entries.into_iter().filter_map(entry).collect();
        all.sort_by_key(|entry| (entry.vlan, entry.mac));
        Ok(all)
    }

    pub(super) fn attach_net(
        &mut self,
        id: &Id,
        spec: FunctionSpec,
        order: &[usize],
        descriptors: u32,
    ) -> Result<()> {
        let stop_timeout = Duration::from_millis(spec.stop_timeout_ms.into());
        let poll = self.poll(spec.poll);
        let no_mac = "it has no address";
        let (plug, mac, link, control_queue) = match spec.device {
            DeviceSpec::VirtioNet { network, port } => {
                let mac = port.mac.context(no_mac)?.0;
                let open = self.networks.open.get(&network);
                let open = open.context("its network is not open")?;
                let joined = Arc::new(open.network.join(port_options(&port, mac))?);
                let plug = Plug::Network(network, joined);
                (plug, mac, !port.unplugged, port.control_queue)
            }
            DeviceSpec::Uplink(uplink) => {
                let Mac([a, b, c, d, e, f]) = uplink.mac.context(no_mac)?.0;
                let wire = self.underlays.plug_in(id, &uplink);
                // The driver is the other end of the wire: another station.
                (Plug::Wire(wire), Mac([a, b, c, d, e, f ^ 1]), true, false)
            }
            DeviceSpec::VirtioBlk { .. } | DeviceSpec::Nvme { .. } => {
                unreachable!("asked for by its kind")
            }
        };
        let options = NetOptions {
            pairs: spec.queues,
            mac: mac.0,
            speed: None,
            control_queue,
            poll,
            reactors: order
                .iter()
                .map(|&i| self.reactors[i].handle.clone())
                .collect(),
        };
        let device = Net::new(plug.port(), options);
        let cable = device.cable();
        cable.set_link(link);
        let nets = Nets {
            plug,
            restored: Descriptors::new(),
            counters: device.counters().to_vec(),
            lines: device.lines().to_vec(),
            reactors: (0..usize::from(spec.queues))
                .map(|pair| order[pair % order.len()] as u16)
                .collect(),
            cable: cable.clone(),
        };
        let control = Box::new(Asked(cable));
        let presented = self.present(
            id,
            Box::new(device),
            Some(control),
            stop_timeout,
            descriptors,
        );
        if presented.is_err() {
            self.underlays.unplug(id);
        }
        presented?;
        self.functions.insert(id.clone(), Stands::Net(nets));
        Ok(())
    }

    pub(super) fn set_link(&mut self, function: &Id, up: bool) -> Result<()> {
        match self.functions.get(function).context("it is not attached")? {
            Stands::Net(net) => {
                net.cable.set_link(up);
                Ok(())
            }
            Stands::Blk(_) | Stands::Nvme(_) => anyhow::bail!("it is of a kind without a link"),
        }
    }
}

fn port_options(port: &PortSpec, mac: Mac) -> PortOptions {
    let rate = |per_second: Option<u64>| per_second.map(|n| Rate::new(n, BURST));
    let limit = &port.limit;
    let allowed = port.allowed.as_ref();
    PortOptions {
        rules: Rules {
            mac: Some(mac),
            allowed: allowed.map(|all| all.iter().map(|prefix| prefix.0).collect()),
            vlan: port.vlan,
        },
        transmit: PortRates {
            bits: rate(limit.tx),
            frames: rate(limit.tx_pps),
        },
        receive: PortRates {
            bits: rate(limit.rx),
            frames: rate(limit.rx_pps),
        },
    }
}

impl Nets {
    /// Shows what goes through its port.
    pub(super) fn capture(&self, capture: Arc<Capture>) -> Result<Attached> {
        match &self.plug {
            Plug::Network(_, port) => Ok(port.capture(capture)),
            Plug::Wire(_) => bail!("it carries tunnels: each network that it carries has its own"),
        }
    }

    pub(super) fn statistics(&self, id: &Id) -> FunctionStatistics {
        let get = |cell: &AtomicU64| cell.load(Ordering::Relaxed);
        let pair = |(i, counters): (usize, &Arc<Counters>)| {
            let lines = &self.lines[2 * i..2 * i + 2];
            let of_lines = |what: fn(&LineCounters) -> &AtomicU64| {
                lines.iter().map(|line| get(what(line))).sum()
            };
            PairStatistics {
                pair: i as u16,
                reactor: self.reactors[i],
                sent: get(&counters.sent.frames),
                sent_bytes: get(&counters.sent.bytes),
                received: get(&counters.received.frames),
                received_bytes: get(&counters.received.bytes),
                kicks: of_lines(|line| &line.kicks),
                interrupts: of_lines(|line| &line.interrupts),
                hung: of_lines(|line| &line.hung),
            }
        };
        let sent = self.counters.iter().map(|c| &c.sent.drops);
        let received = self.counters.iter().map(|c| &c.received.drops);
        let (sent_behind, received_behind) = self.plug.drops();
        FunctionStatistics {
            function: id.clone(),
            messages: None,
            queues: Vec::new(),
            net: Some(NetStatistics {
                pairs: self.counters.iter().enumerate().map(pair).collect(),
                sent_drops: by_cause(sent.chain([sent_behind])),
                received_drops: by_cause(received.chain([received_behind])),
            }),
        }
    }
}

/// What was dropped in several places, by cause.
fn by_cause<'a>(places: impl Iterator<Item = &'a Drops>) -> BTreeMap<String, u64> {
    let places: Vec<_> = places.collect();
    let count = |cause: &Cause| places.iter().map(|drops| drops.get(*cause)).sum();
    let all = Cause::ALL.iter().map(|c| (c.name().to_owned(), count(c)));
    all.filter(|(_, n)| *n > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_without_drops_are_left_out() {
        let (one, two) = (Drops::default(), Drops::default());
        one.add(Cause::Spoofed, 2);
        two.add(Cause::Spoofed, 3);
        two.add(Cause::Storm, 1);
        let found = by_cause([&one, &two].into_iter());
        let wanted = [("spoofed".to_owned(), 5), ("storm".to_owned(), 1)];
        assert_eq!(found, wanted.into());
    }

    #[test]
    fn the_housekeeper_ends_with_its_networks() {
        let (sender, networks) = channel();
        let thread = std::thread::spawn(move || keep_house(&networks));
        sender.send(Weak::new()).unwrap();
        drop(sender);
        thread.join().unwrap();
    }
}
