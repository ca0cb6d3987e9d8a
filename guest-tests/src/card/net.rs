//! `bluffd` with virtio-net functions in one network.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use bluff_qemu::device::VhostUserNet;
use bluff_qemu::namespace::Entrance;
use serde_json::Value;

use super::{Bluffd, Daemon};
use crate::runner::{Context, Peer};

/// The network's name on every card.
const NETWORK: &str = "blue";
/// Bytes of the longest IP packet in it: what an underlay of 1500 leaves, also where that is IPv6.
pub const MTU: u32 = 1430;

/// `bluffd` as a card of a network.
#[derive(Clone, Copy, Debug)]
pub struct BluffdNet(pub Bluffd);

impl Peer for BluffdNet {
    type Ability = ();

    fn name(&self) -> &'static str {
        self.0.name
    }

    fn has(&self, (): ()) -> bool {
        true
    }
}

/// How a card reaches others.
#[derive(Clone, Debug)]
pub struct Tunnel {
    /// `tunnel` of its configuration.
    pub kind: &'static str,
    /// The network's number.
    pub vni: u32,
    /// This card's address on the underlay.
    pub vtep: IpAddr,
    /// Those of the others.
    pub vteps: Vec<IpAddr>,
    /// The port of all, where it is not the kind's own.
    pub port: Option<u16>,
}

/// A function, and its guest's place in the network: function and guest of one number have one name and one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Station {
    /// 1 to 99.
    pub number: u8,
    /// Pairs of queues.
    pub pairs: u16,
}

impl Station {
    /// The function's id.
    pub fn id(self) -> String {
        format!("net{}", self.number)
    }

    /// Its address.
    pub fn mac(self) -> String {
        format!("02:00:00:00:00:{:02}", self.number)
    }

    /// The guest's address.
    pub fn ipv4(self) -> String {
        format!("192.168.7.{}", self.number)
    }

    /// Its other address.
    pub fn ipv6(self) -> String {
        format!("fd07::{}", self.number)
    }
}

/// What a pair of queues has counted. "Sent" is what the guest sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Frames; one that stands for several is one.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Frames.
    pub received: u64,
    /// Their bytes.
    pub received_bytes: u64,
}

impl Context<'_, BluffdNet> {
    /// A card with these functions in its network. `name` tells the cards of one case apart.
    pub fn card(
        &self,
        name: &str,
        place: Option<Entrance>,
        tunnel: Option<&Tunnel>,
        stations: &[Station],
    ) -> Result<NetCard> {
        let folder = self.peer_folder(name)?;
        let data = self.peer().0.data;
        let text = config(data, tunnel, stations);
        Ok(NetCard {
            data,
            stations: stations.into(),
            daemon: Daemon::start_in(place, &folder, &text)
                .with_context(|| format!("start {name}"))?,
        })
    }
}

fn config(data: &str, tunnel: Option<&Tunnel>, stations: &[Station]) -> String {
    let mut text = format!("[card]\ndata = \"{data}\"\n\n[network.{NETWORK}]\nmtu = {MTU}\n");
    if let Some(tunnel) = tunnel {
        let Tunnel {
            kind, vni, vtep, ..
        } = tunnel;
        let vteps = tunnel.vteps.iter().map(|vtep| format!("\"{vtep}\""));
        let vteps = vteps.collect::<Vec<_>>().join(", ");
        text +=
            &format!("vni = {vni}\ntunnel = \"{kind}\"\nvtep = \"{vtep}\"\nvteps = [{vteps}]\n");
        if let Some(port) = tunnel.port {
            text += &format!("port = {port}\n");
        }
    }
    for station in stations {
        text += &format!(
            "\n[function.{}]\nkind = \"virtio-net\"\nattach = \"vhost-user\"\nnetwork = \"{NETWORK}\"\nmac = \"{}\"\nqueues = {}\n",
            station.id(),
            station.mac(),
            station.pairs
        );
    }
    text
}

/// A card that runs. Dropping it ends it.
#[derive(Debug)]
pub struct NetCard {
    data: &'static str,
    stations: Vec<Station>,
    daemon: Daemon,
}

impl NetCard {
    /// The socket of a function.
    pub fn socket(&self, station: Station) -> PathBuf {
        self.daemon
            .folder
            .join(format!("run/{}.sock", station.id()))
    }

    /// A function as QEMU's device, with all that QEMU passes on, and connected again when the card comes back.
    pub fn function(&self, station: Station) -> VhostUserNet {
        VhostUserNet::new(&station.id(), &self.socket(station), &station.mac())
            .pairs(station.pairs)
            .reconnect_ms(100)
            .property("host_mtu", MTU.into())
    }

    /// Ends it without warning, as `kill -9` does.
    pub fn kill(&mut self) -> Result<()> {
        self.daemon.process()?.kill()
    }

    /// Whether what carries frames is a process of its own.
    pub fn has_data_half(&self) -> bool {
        self.data == "process"
    }

    /// Kills that process alone.
    pub fn kill_data_half(&mut self) -> Result<()> {
        let killed = self.daemon.process()?.kill_children()?;
        ensure!(killed > 0, "there is no data half");
        Ok(())
    }

    /// Starts it again, on the same sockets.
    pub fn restart(&mut self) -> Result<()> {
        self.daemon.restart()
    }

    /// Kills it, and starts it with another tunnel.
    pub fn change(&mut self, tunnel: &Tunnel) -> Result<()> {
        let text = config(self.data, Some(tunnel), &self.stations);
        self.daemon.configure(&text)?;
        self.daemon.restart()
    }

    /// An error where it has ended by itself.
    pub fn check(&mut self) -> Result<()> {
        self.daemon.process()?.check_alive()
    }

    /// Pulls the cable of a function out, or puts it in.
    pub fn set_link(&self, station: Station, up: bool) -> Result<()> {
        let link = if up { "link=up" } else { "link=down" };
        self.daemon.ctl(&["function", "set", &station.id(), link])
    }

    /// What the pairs of a function have counted since the card was started.
    pub fn pairs(&self, station: Station) -> Result<Vec<Pair>> {
        let text = self
            .daemon
            .ask(&["--json", "function", "show", &station.id()])?;
        let shown: Value = serde_json::from_str(&text)?;
        let pairs = shown["statistics"]["net"]["pairs"].as_array();
        let pairs = pairs.with_context(|| format!("no pairs: {text}"))?;
        let number = |pair: &Value, name: &str| {
            let number = pair[name].as_u64();
            number.with_context(|| format!("no {name}: {pair}"))
        };
        let pair = |pair: &Value| {
            Ok(Pair {
                sent: number(pair, "sent")?,
                sent_bytes: number(pair, "sent_bytes")?,
                received: number(pair, "received")?,
                received_bytes: number(pair, "received_bytes")?,
            })
        };
        pairs.iter().map(pair).collect()
    }

    /// The other cards that it knows stations behind: where, by station.
    pub fn elsewhere(&self) -> Result<BTreeMap<String, String>> {
        let text = self.daemon.ask(&["--json", "network", "fdb", NETWORK])?;
        let entries: Vec<Value> = serde_json::from_str(&text)?;
        let entry = |entry: &Value| {
            let text = |name: &str| Some(entry[name].as_str()?.to_owned());
            Some((text("mac")?, text("vtep")?))
        };
        Ok(entries.iter().filter_map(entry).collect())
    }
}
