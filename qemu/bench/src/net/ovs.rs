//! Open vSwitch, from Debian's packages, in a folder of its own: with DPDK, and with AF_XDP.
//!
//! One thread forwards, on the core of the back ends; the rest of it is on the driver's, where it has next to nothing to do.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bluff_packet::Mac;
use bluff_qemu::hostdir::HostDir;

use super::frames::{NEIGHBOUR, STATIONS, Tunnel, VNI, VTEPS};
use super::process::Process;
use super::space::{CARD_END, Space, said};

/// MiB of hugepages that it takes.
pub const MEMORY: u64 = 512;
/// How long it may take to start.
const START: Duration = Duration::from_secs(60);
/// Its address on the link.
pub const CARD: Mac = Mac([2, 0, 0, 0, 1, 1]);

/// A switch that runs.
pub struct Ovs<'a> {
    tools: &'a HostDir,
    folder: PathBuf,
    space: &'a Space,
    switch: Process,
    // Ends after the switch.
    _database: Process,
}

impl<'a> Ovs<'a> {
    /// Starts one in `space`, with its files in `folder`, which is made anew. It forwards on `core`.
    pub fn start(tools: &'a HostDir, folder: &Path, space: &'a Space, core: usize) -> Result<Self> {
        let _ = fs::remove_dir_all(folder);
        fs::create_dir_all(folder)?;
        let _in = space.enter()?;
        let schema = tools.path().join("usr/share/openvswitch/vswitch.ovsschema");
        let (file, socket) = (folder.join("conf.db"), folder.join("db.sock"));
        said(
            command(tools, folder, "ovsdb-tool")?
                .arg("create")
                .args([&file, &schema]),
        )?;
        let mut server = command(tools, folder, "ovsdb-server")?;
        server
            .arg(&file)
            .arg(format!("--remote=punix:{}", socket.display()))
            .arg(format!("--unixctl={}", folder.join("db.ctl").display()))
            .arg("--log-file=/dev/null");
        let mut database = Process::start(&server, "0", &folder.join("db.log"))?;
        database.listens(&socket)?;
        let mut set = command(tools, folder, "ovs-vsctl")?;
        set.args(["--no-wait", "init", "--", "set", "Open_vSwitch", "."]);
        let mut extra =
            "--no-pci --in-memory --iova-mode=va --no-telemetry --file-prefix=bluff-ovs".to_owned();
        for driver in drivers(tools, &["mempool_ring"])? {
            extra += &format!(" -d {}", driver.display());
        }
        for (key, value) in [
            ("dpdk-init", "true".to_owned()),
            ("pmd-cpu-mask", format!("{:#x}", 1 << core)),
            ("dpdk-lcore-mask", "0x1".to_owned()),
            ("dpdk-alloc-mem", MEMORY.to_string()),
            ("dpdk-extra", extra),
        ] {
            set.arg(format!("other_config:{key}=\"{value}\""));
        }
        said(&mut set)?;
        let mut daemon = command(tools, folder, "ovs-vswitchd-dpdk")?;
        daemon
            .arg(format!("unix:{}", socket.display()))
            .arg(format!("--unixctl={}", folder.join("vs.ctl").display()))
            .args(["--disable-system", "--log-file=/dev/null"]);
        let cores = format!("0,{core}");
        let switch = Process::start(&daemon, &cores, &folder.join("switch.log"))?;
        Ok(Self {
            tools,
            folder: folder.into(),
            space,
            switch,
            _database: database,
        })
    }

    /// The process that forwards.
    pub fn process(&mut self) -> &mut Process {
        &mut self.switch
    }

    /// The socket of a port.
    pub fn socket(&self, port: &str) -> PathBuf {
        self.folder.join(port)
    }

    /// Tells the database, and waits until the switch has done it.
    fn vsctl(&self, words: &str) -> Result<()> {
        let mut command = command(self.tools, &self.folder, "ovs-vsctl")?;
        command.arg(format!("--timeout={}", START.as_secs()));
        said(command.args(words.split_whitespace())).context("ovs-vsctl")?;
        Ok(())
    }

    fn appctl(&self, words: &str) -> Result<String> {
        let mut command = command(self.tools, &self.folder, "ovs-appctl")?;
        command.arg("-t").arg(self.folder.join("vs.ctl"));
        said(command.args(words.split_whitespace())).context("ovs-appctl")
    }

    /// A learning switch between these ports, which a front end connects to.
    pub fn switch(&mut self, ports: &[&str]) -> Result<()> {
        self.bridge("br-int", STATIONS[0], "")?;
        for port in ports {
            self.port("br-int", port)?;
        }
        self.ready(ports)
    }

    /// A port `net0` in a tunnel to the neighbour. What carries it is the port `up0`, or the card's end of the wire.
    pub fn tunnel(&mut self, tunnel: Tunnel, uplink: Option<&str>) -> Result<()> {
        let [own, other] = VTEPS;
        self.bridge("br-phy", CARD, "")?;
        // More addresses than a bridge keeps by itself.
        self.bridge("br-int", STATIONS[0], "other_config:mac-table-size=20000")?;
        self.port("br-int", "net0")?;
        self.vsctl(&format!(
            "add-port br-int tun0 -- set Interface tun0 type={} options:remote_ip={other} options:local_ip={own} options:key={VNI}",
            tunnel.name()
        ))?;
        match uplink {
            Some(port) => self.port("br-phy", port)?,
            None => self.vsctl(&format!(
                "add-port br-phy {CARD_END} -- set Interface {CARD_END} type=afxdp options:n_rxq=1 options:xdp-mode=native"
            ))?,
        }
        self.space
            .ip(self.tools, &format!("address add {own}/24 dev br-phy"))?;
        self.space.ip(self.tools, "link set br-phy up")?;
        let start = Instant::now();
        // It hears of the address a little later.
        while !self.appctl("ovs/route/show")?.contains(&own.to_string()) {
            ensure!(start.elapsed() < START, "it does not hear of its address");
            std::thread::sleep(Duration::from_millis(10));
        }
        self.appctl(&format!("tnl/neigh/set br-phy {other} {NEIGHBOUR}"))?;
        let mut ports = vec!["net0"];
        ports.extend(uplink);
        self.ready(&ports)
    }

    fn bridge(&self, name: &str, mac: Mac, more: &str) -> Result<()> {
        self.vsctl(&format!(
            "add-br {name} -- set bridge {name} datapath_type=netdev fail-mode=standalone other_config:hwaddr=\"{mac}\" {more}"
        ))
    }

    /// A port that listens for a front end.
    fn port(&self, bridge: &str, port: &str) -> Result<()> {
        self.vsctl(&format!(
            "add-port {bridge} {port} -- set Interface {port} type=dpdkvhostuser"
        ))
    }

    fn ready(&mut self, ports: &[&str]) -> Result<()> {
        for port in ports {
            let socket = self.socket(port);
            self.switch.listens(&socket)?;
        }
        Ok(())
    }
}

/// One of its programs, which looks for everything in `folder`.
fn command(tools: &HostDir, folder: &Path, tool: &str) -> Result<Command> {
    let mut command = tools.command(tool)?;
    for variable in ["OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "OVS_SYSCONFDIR"] {
        command.env(variable, folder);
    }
    command.env("OVS_PKGDATADIR", tools.path().join("usr/share/openvswitch"));
    // Where libxdp looks for what it loads into the kernel.
    let tuple = format!("usr/lib/{}-linux-gnu/bpf", std::env::consts::ARCH);
    command.env("LIBXDP_OBJECT_PATH", tools.path().join(tuple));
    if tool == "ovs-vsctl" {
        command.arg(format!("--db=unix:{}", folder.join("db.sock").display()));
    }
    Ok(command)
}

/// Files of these drivers of DPDK, which it would look for where they are not.
pub fn drivers(tools: &HostDir, names: &[&str]) -> Result<Vec<PathBuf>> {
    let tuple = format!("usr/lib/{}-linux-gnu/dpdk", std::env::consts::ARCH);
    let folder = tools.path().join(tuple);
    // A folder below has DPDK's version in its name.
    let entries = fs::read_dir(&folder).with_context(|| folder.display().to_string())?;
    let folders: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    let find = |name: &&str| {
        let paths = folders.iter().map(|f| f.join(format!("librte_{name}.so")));
        let mut there = paths.filter(|path| path.exists());
        there
            .next()
            .with_context(|| format!("DPDK's {name} is not there"))
    };
    names.iter().map(find).collect()
}
