//! What a guest is made of, and QEMU's command line for it.

use std::path::Path;
use std::process::Stdio;
use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::agent::{Agent, Link};
use crate::device::{Disk, Nvme, VfioUserPci, VhostUserBlk, VhostUserNet};
use crate::emulator::{Accel, Qemu};
use crate::firmware::Firmware;
use crate::guest::{Guest, QMP_BOUND};
use crate::image::Image;
use crate::process::Process;
use crate::qmp::Qmp;

/// Skips what costs time in emulation and tests nothing of ours.
pub(crate) const KERNEL_PARAMETERS: &str = "console=ttyS0 quiet nokaslr mitigations=off no_timer_check cryptomgr.notests tsc=reliable panic=0";

/// What a guest boots by.
#[derive(Clone, Debug)]
enum Boot {
    /// The image's kernel, which QEMU loads.
    Kernel,
    Firmware(Firmware),
    /// QEMU's own firmware, from a disk that has no agent.
    Bios,
}

/// What a guest is to be.
#[derive(Clone, Debug)]
pub struct Builder {
    qemu: Qemu,
    image: Image,
    accel: Option<Accel>,
    memory_mib: u32,
    cpus: u32,
    hotplug_ports: u32,
    memory_slots: u32,
    append: Vec<String>,
    arguments: Vec<String>,
    functions: Vec<VhostUserBlk>,
    networks: Vec<VhostUserNet>,
    /// Other devices, as arguments.
    devices: Vec<String>,
    disks: Vec<Disk>,
    boot: Boot,
    incoming: bool,
    boot_timeout: Duration,
    script_timeout: Duration,
}

impl Builder {
    pub(crate) fn new(qemu: &Qemu, image: &Image) -> Self {
        Self {
            qemu: qemu.clone(),
            image: image.clone(),
            accel: None,
            memory_mib: 512,
            cpus: 2,
            hotplug_ports: 0,
            memory_slots: 0,
            append: Vec::new(),
            arguments: Vec::new(),
            functions: Vec::new(),
            networks: Vec::new(),
            devices: Vec::new(),
            disks: Vec::new(),
            boot: Boot::Kernel,
            incoming: false,
            boot_timeout: Duration::from_secs(120),
            script_timeout: Duration::from_secs(120),
        }
    }

    /// Without trying which accelerator works.
    pub fn accel(mut self, accel: Accel) -> Self {
        self.accel = Some(accel);
        self
    }

    /// RAM in MiB (512). It is a memfd that back ends map.
    pub fn memory_mib(mut self, size: u32) -> Self {
        self.memory_mib = size;
        self
    }

    /// Processors (2).
    pub fn cpus(mut self, count: u32) -> Self {
        self.cpus = count;
        self
    }

    /// PCIe root ports `hotplug0`, `hotplug1`, … for functions that come and go (none).
    pub fn hotplug_ports(mut self, count: u32) -> Self {
        self.hotplug_ports = count;
        self
    }

    /// Slots for [`Guest::add_memory`], of up to 1 GiB in all (none).
    pub fn memory_slots(mut self, count: u32) -> Self {
        self.memory_slots = count;
        self
    }

    /// Another kernel parameter. Firmware that boots from a disk does not see it: there the disk says which there are.
    pub fn append(mut self, parameter: &str) -> Self {
        self.append.push(parameter.into());
        self
    }

    /// Another argument of QEMU.
    pub fn argument(mut self, argument: &str) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// A vhost-user-blk function. Its back end must listen by now.
    pub fn vhost_user_blk(mut self, function: VhostUserBlk) -> Self {
        self.functions.push(function);
        self
    }

    /// A vhost-user-net function. Its back end must listen by now.
    pub fn vhost_user_net(mut self, function: VhostUserNet) -> Self {
        self.networks.push(function);
        self
    }

    /// A vfio-user function. Its server must listen by now.
    pub fn vfio_user(mut self, function: &VfioUserPci) -> Self {
        self.devices.extend(function.arguments());
        self
    }

    /// QEMU's own NVMe controller.
    pub fn nvme(mut self, controller: &Nvme) -> Self {
        self.devices.extend(controller.arguments());
        self
    }

    /// Boots by this firmware from a disk (see [`crate::firmware`]), and not the image's kernel.
    pub fn firmware(mut self, firmware: &Firmware) -> Self {
        self.boot = Boot::Firmware(firmware.clone());
        self
    }

    /// Boots by QEMU's own firmware, SeaBIOS, whatever the first of its disks has: something without an agent. So nothing is waited for, and nothing can be
    /// run in it; see [`Guest::wait_console`].
    pub fn bios(mut self) -> Self {
        self.boot = Boot::Bios;
        self
    }

    /// A disk that QEMU serves.
    pub fn disk(mut self, disk: Disk) -> Self {
        self.disks.push(disk);
        self
    }

    /// Waits for a migration instead of booting; see [`Guest::migrate_to`].
    pub fn incoming(mut self) -> Self {
        self.incoming = true;
        self
    }

    /// How long a boot may take (120 s).
    pub fn boot_timeout(mut self, bound: Duration) -> Self {
        self.boot_timeout = bound;
        self
    }

    /// How long a script may take (120 s).
    pub fn script_timeout(mut self, bound: Duration) -> Self {
        self.script_timeout = bound;
        self
    }

    /// Starts QEMU, and waits until the guest answers (unless it is [`incoming`](Self::incoming), or has no agent: [`bios`](Self::bios)).
    pub fn start(self) -> Result<Guest> {
        let accel = match self.accel {
            Some(accel) => accel,
            None => Accel::choose(&self.qemu, &self.image)?,
        };
        let folder = tempfile::Builder::new().prefix("bluff-guest.").tempdir()?;
        let file = |name: &str| folder.path().join(name);
        let boot = match &self.boot {
            Boot::Kernel => self.kernel(folder.path())?,
            Boot::Firmware(firmware) => firmware.arguments(folder.path())?,
            Boot::Bios => bios_log(&file("bios.log")),
        };
        let mut command = self.qemu.command()?;
        command
            .args(boot)
            .args(self.arguments(accel, folder.path()))
            .stdin(Stdio::null());
        log::debug!("{command:?}");
        let mut process = Process::spawn(&mut command, "QEMU", &file("qemu.log"))?;
        let qmp = connect_qmp(&file("qmp.sock"), &mut process)?;
        let guest = Guest {
            process: Mutex::new(process),
            qmp: Mutex::new(qmp),
            agent: Agent::new(Link::Path(file("agent.sock"))),
            boot_id: Mutex::new(None),
            console_before: AtomicUsize::new(0),
            version: self.qemu.version(),
            accel,
            boot_timeout: self.boot_timeout,
            script_timeout: self.script_timeout,
            folder,
        };
        if !self.incoming && !matches!(self.boot, Boot::Bios) {
            guest.wait_for_boot()?;
        }
        Ok(guest)
    }

    /// What boots the image's kernel directly. Writes its initial RAM file system.
    fn kernel(&self, folder: &Path) -> Result<Vec<String>> {
        let initrd = folder.join("initrd");
        self.image.write_initrd(&initrd)?;
        let parameters = [&[KERNEL_PARAMETERS.to_string()], &self.append[..]].concat();
        Ok(vec![
            "-kernel".into(),
            self.image.kernel().image.to_string_lossy().into_owned(),
            "-initrd".into(),
            initrd.to_string_lossy().into_owned(),
            "-append".into(),
            parameters.join(" "),
        ])
    }

    fn arguments(&self, accel: Accel, folder: &Path) -> Vec<String> {
        let file = |name: &str| folder.join(name).to_string_lossy().replace(',', ",,");
        let mut arguments: Vec<String> = Vec::new();
        let mut add = |words: &[&str]| arguments.extend(words.iter().map(|word| word.to_string()));
        add(&[
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-vga",
            "none",
        ]);
        add(&[
            "-machine",
            "q35,memory-backend=ram",
            "-smp",
            &self.cpus.to_string(),
        ]);
        add(&accel.arguments(self.qemu.version()));
        let slots = match self.memory_slots {
            0 => String::new(),
            count => format!(",slots={count},maxmem={}M", self.memory_mib + 1024),
        };
        add(&["-m", &format!("size={}M{slots}", self.memory_mib)]);
        add(&[
            "-object",
            &format!(
                "memory-backend-memfd,id=ram,size={}M,share=on",
                self.memory_mib
            ),
        ]);
        add(&["-serial", &format!("file:{}", file("console.log"))]);
        add(&[
            "-qmp",
            &format!("unix:{},server=on,wait=off", file("qmp.sock")),
        ]);
        add(&[
            "-chardev",
            &format!(
                "socket,id=agent,path={},server=on,wait=off",
                file("agent.sock")
            ),
        ]);
        add(&["-device", "virtio-serial-pci,disable-legacy=on,max_ports=2"]);
        add(&[
            "-device",
            &format!(
                "virtserialport,chardev=agent,name={}",
                guest_agent::PORT_NAME
            ),
        ]);
        for port in 0..self.hotplug_ports {
            add(&[
                "-device",
                &format!("pcie-root-port,id=hotplug{port},chassis={}", port + 1),
            ]);
        }
        if self.incoming {
            add(&["-incoming", "defer"]);
        }
        arguments.extend(
            self.functions
                .iter()
                .flat_map(|function| function.arguments(self.qemu.version())),
        );
        arguments.extend(
            self.networks
                .iter()
                .flat_map(|function| function.arguments(self.qemu.version())),
        );
        arguments.extend(self.devices.iter().cloned());
        arguments.extend(self.disks.iter().flat_map(Disk::arguments));
        arguments.extend(self.arguments.iter().cloned());
        arguments
    }
}

/// Where SeaBIOS says what it misses: its debug port, which is not the guest's console.
fn bios_log(path: &Path) -> Vec<String> {
    let path = path.to_string_lossy().replace(',', ",,");
    vec![
        "-chardev".into(),
        format!("file,id=bios,path={path}"),
        "-device".into(),
        "isa-debugcon,iobase=0x402,chardev=bios".into(),
    ]
}

/// QEMU makes the socket before it realises its devices, and answers only after: so the connection comes early, the greeting late.
fn connect_qmp(path: &Path, process: &mut Process) -> Result<Qmp> {
    let end = Instant::now() + QMP_BOUND;
    loop {
        process.check_alive()?;
        match Qmp::connect(path, Duration::from_secs(60)) {
            Ok(qmp) => return Ok(qmp),
            // A socket that is not there yet cannot be waited for by other means than looking again.
            Err(_) if Instant::now() < end && process.ended()?.is_none() => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => {
                process.check_alive()?;
                return Err(error);
            }
        }
    }
}
