//! Who does the work: starting a switch, and where its ports are.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use bluff_qemu::hostdir::HostDir;

use super::frames::{NEIGHBOUR, STATIONS, VNI, VTEPS, remote};
use super::hugepages::Hugepages;
use super::ovs::{self, Ovs};
use super::process::Process;
use super::rows::{Carrier, Path, Peer, Work};
use super::space::{CARD_END, GATEWAY, Space, Wire};
use super::testpmd;

/// The core of the switches.
pub const CORE: usize = 1;
/// MiB of hugepages that testpmd takes.
pub const TESTPMD: u64 = 256;
/// The tap device of our card.
const TAP: &str = "card0";
/// The longest packet of the wire, and of an uplink.
const MTU: u16 = 1600;
/// The function that sends, the one that receives, and the uplink.
pub const PORTS: [&str; 3] = ["net0", "net1", "up0"];

/// What all measurements need.
pub struct Lab {
    /// Folder of our programs.
    pub ours: PathBuf,
    /// Open vSwitch, testpmd, `ip`.
    pub tools: HostDir,
    /// For sockets and logs.
    pub folder: PathBuf,
    _pages: Option<Hugepages>,
}

impl Lab {
    /// Fetches what is not there, and reserves hugepages where `dpdk` says that they are needed.
    pub fn new(ours: PathBuf, folder: PathBuf, dpdk: bool) -> Result<Self> {
        let tools = HostDir::networks()?;
        // Both at once, where testpmd drives Open vSwitch, and some to spare: pages of the one that was ended a moment ago may not be back.
        let pages = dpdk.then(|| Hugepages::reserve(ovs::MEMORY + TESTPMD + 256));
        Ok(Self {
            ours,
            tools,
            folder,
            _pages: pages.transpose()?,
        })
    }
}

/// A switch that runs, in a network namespace.
pub struct Switch<'a> {
    kind: Kind<'a>,
    folder: PathBuf,
}

enum Kind<'a> {
    Ovs(Box<Ovs<'a>>),
    Other(Process),
}

/// Where a switch is: the namespace, and the wire that leads out of it where the row has one.
pub enum Place {
    /// No way out.
    Closed(Space),
    /// A wire to the neighbour.
    Wired(Wire),
}

impl Place {
    /// A place for `peer` in such a row.
    pub fn new(lab: &Lab, peer: &Peer, path: Path) -> Result<Self> {
        if !path.leaves_by_kernel() {
            return Ok(Self::Closed(Space::new()?));
        }
        // Open vSwitch has the address on its own bridge, and our card behind a tap is a station of its own.
        let assign = match peer {
            Peer::Ovs { .. } => false,
            Peer::Bluffd { carrier, .. } => *carrier != Carrier::Tap,
            Peer::Testpmd | Peer::Kernel => true,
        };
        Wire::new(&lab.tools, MTU, VTEPS, NEIGHBOUR, assign).map(Self::Wired)
    }

    /// The namespace.
    pub fn space(&self) -> &Space {
        match self {
            Self::Closed(space) => space,
            Self::Wired(wire) => &wire.card,
        }
    }
}

impl<'a> Switch<'a> {
    /// Starts what does this work.
    pub fn start(lab: &'a Lab, place: &'a Place, peer: &Peer, work: &Work) -> Result<Self> {
        let space = place.space();
        let ports = ports(work.path);
        match peer {
            Peer::Bluffd { carrier, .. } => {
                let folder = lab.folder.clone();
                let command = bluffd(lab, *carrier, work)?;
                let mut process = {
                    let _in = space.enter()?;
                    Process::start(&command, &CORE.to_string(), &folder.join("bluffd.log"))?
                };
                for port in ports {
                    process.listens(&folder.join(format!("{port}.sock")))?;
                }
                if *carrier == Carrier::Tap {
                    for words in [
                        "link add bridge0 type bridge".to_owned(),
                        "link set bridge0 up".to_owned(),
                        format!("link set {CARD_END} master bridge0"),
                        format!("link set {TAP} master bridge0"),
                    ] {
                        space.ip(&lab.tools, &words)?;
                    }
                }
                let kind = Kind::Other(process);
                Ok(Self { kind, folder })
            }
            Peer::Ovs { .. } => {
                let folder = lab.folder.join("ovs");
                let mut ovs = Ovs::start(&lab.tools, &folder, space, CORE)?;
                let uplink = (!work.path.leaves_by_kernel()).then_some(PORTS[2]);
                match work.path.tunnel() {
                    None => ovs.switch(ports),
                    Some(tunnel) => ovs.tunnel(tunnel, uplink),
                }
                .with_context(|| ovs.process().said())?;
                let kind = Kind::Ovs(Box::new(ovs));
                Ok(Self { kind, folder })
            }
            Peer::Testpmd => {
                let folder = lab.folder.join("testpmd");
                let _ = fs::remove_dir_all(&folder);
                fs::create_dir_all(&folder)?;
                let command = testpmd::forwarder(&lab.tools, &folder, ports, CORE, TESTPMD)?;
                let mut process =
                    Process::start(&command, &format!("0,{CORE}"), &folder.join("log"))?;
                for port in ports {
                    process.listens(&folder.join(format!("{port}.sock")))?;
                }
                let kind = Kind::Other(process);
                Ok(Self { kind, folder })
            }
            Peer::Kernel => unreachable!("it is no process"),
        }
    }

    /// The socket of a port.
    pub fn socket(&self, port: &str) -> PathBuf {
        match &self.kind {
            Kind::Ovs(ovs) => ovs.socket(port),
            Kind::Other(_) => self.folder.join(format!("{port}.sock")),
        }
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        match &mut self.kind {
            Kind::Ovs(ovs) => ovs.process(),
            Kind::Other(process) => process,
        }
    }
}

/// The ports of a row.
pub fn ports(path: Path) -> &'static [&'static str] {
    const UPLINK: [&str; 2] = [PORTS[0], PORTS[2]];
    match path {
        Path::Switch | Path::Across => &PORTS[..2],
        Path::Encapsulation(_) | Path::Decapsulation(_) => &UPLINK,
        Path::Kernel(_) | Path::Segments(_) => &PORTS[..1],
    }
}

/// bluffd with one network.
fn bluffd(lab: &Lab, carrier: Carrier, work: &Work) -> Result<Command> {
    let folder = &lab.folder;
    let mut text = format!("[card]\nreactors = [{CORE}]\npoll = \"always\"\n\n[network.blue]\n");
    if let Some(tunnel) = work.path.tunnel() {
        let [own, other] = VTEPS;
        let underlay = match carrier {
            Carrier::Port => "port:up0".to_owned(),
            Carrier::Udp => "udp".to_owned(),
            Carrier::Tap => format!("tap:{TAP}\"\ngateway = \"{GATEWAY}"),
        };
        text += &format!(
            "vni = {VNI}\ntunnel = \"{}\"\nvtep = \"{own}\"\nvteps = [\"{other}\"]\nunderlay = \"{underlay}\"\nmtu = 1450\n",
            tunnel.name()
        );
    }
    if work.path.leaves_by_kernel() {
        // Nothing comes back from which it could be learnt.
        let (mac, vtep) = (remote(0), VTEPS[1]);
        text += &format!("fdb = [{{ mac = \"{mac}\", vtep = \"{vtep}\" }}]\n");
    }
    for port in ports(work.path) {
        let keys = match *port {
            "up0" => format!("kind = \"uplink\"\nmac = \"{}\"\nmtu = {MTU}", ovs::CARD),
            net => {
                let mac = STATIONS[usize::from(net == PORTS[1])];
                format!("kind = \"virtio-net\"\nnetwork = \"blue\"\nmac = \"{mac}\"")
            }
        };
        text += &format!("\n[function.{port}]\nattach = \"vhost-user\"\n{keys}\n");
    }
    let config = folder.join("networks.toml");
    fs::write(&config, text)?;
    let mut command = Command::new(lab.ours.join("bluffd"));
    command.arg("--config").arg(config);
    command.arg("--runtime-dir").arg(folder);
    command.arg("--state-dir").arg(folder.join("state"));
    Ok(command)
}
