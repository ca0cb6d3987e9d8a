//! What serves NVMe functions to guests.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use bluff_qemu::device::{self, Nvme};
use bluff_qemu::guest::{Builder, Guest};
use serde_json::json;

use crate::runner::Peer;

/// What a guest may take to let a function or a namespace go.
const PATIENCE: Duration = Duration::from_secs(120);

/// How a namespace's storage answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// As it can.
    Prompt,
    /// After some milliseconds, and not in the order in which it was asked: so that something is always in flight.
    Slow,
    /// Some of it after 5 s; see [`Served::delay`]. It must be claimed: [`Ability::Late`].
    Late,
    /// Reads and writes within the bytes of [`SILENT`] are never answered. It must be claimed: [`Ability::Silent`].
    Silent,
}

/// The range of a [`Manner::Silent`] namespace, in bytes. Partition tables, which a kernel reads when it boots, are elsewhere.
pub const SILENT: std::ops::Range<u64> = 32 << 20..48 << 20;

/// A namespace over a raw file, which is there already and has its size.
#[derive(Clone, Debug)]
pub struct Namespace {
    /// The file.
    pub path: PathBuf,
    /// Its id.
    pub nsid: u32,
    /// Bytes in the file when the function starts.
    pub size: u64,
    /// Bytes of a block.
    pub block_size: u32,
    /// How its storage answers.
    pub manner: Manner,
    /// Not the function's at first: [`Served::add`] attaches it.
    pub spare: bool,
}

/// An NVMe function.
#[derive(Clone, Debug)]
pub struct Function {
    /// The controller's serial number.
    pub serial: String,
    /// I/O queue pairs that it offers.
    pub queues: u16,
    /// How its queues are polled, as `poll` of `bluffd`'s configuration.
    pub poll: &'static str,
    /// Its namespaces, in the order of their ids.
    pub namespaces: Vec<Namespace>,
}

/// What not every peer can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ability {
    /// It says in ONCS that it has Verify (NVM Command Set 1.1 §4.1.5.1). QEMU has the command, and does not say so.
    Verify,
    /// Refused commands have entries in the error log that name them (NVMe 2.1 §5.1.12.1.2).
    ErrorLog,
    /// The log page of supported log pages (NVMe 2.1 §5.1.12.1.1).
    SupportedLogPages,
    /// A reset of the controller gives features their defaults, where they are not saved (NVMe 2.1 §4.4).
    FeatureReset,
    /// CAP.NSSRS (NVMe 2.1 §3.1.4.1).
    SubsystemReset,
    /// Format NVM between blocks of 512 and 4096 bytes.
    Format,
    /// A guest sees that a namespace has grown.
    Resize,
    /// Functions can be taken from a running guest.
    Unplug,
    /// [`Manner::Late`].
    Late,
    /// [`Manner::Silent`].
    Silent,
    /// The data half is a process, and its death is survived.
    DataHalf,
    /// [`Served::messages`].
    Messages,
}

/// A kind of peer.
pub trait Controller: Peer<Ability = Ability> {
    /// The model number of its functions.
    fn model(&self) -> &'static str;

    /// Starts what serves this function, with its sockets and logs in `folder`. It can be attached when this returns.
    fn start(&self, folder: &Path, function: &Function) -> Result<Box<dyn Served>>;
}

/// A function that is served. Dropping it ends that; its guests go first.
pub trait Served: Send {
    /// A guest that has the function from its start; it boots from the first namespace where it boots by firmware.
    fn attach(&self, guest: Builder) -> Builder;

    /// Adds the function to a running guest, on this PCI bus. It has one namespace, with id 1.
    fn plug(&mut self, guest: &Guest, bus: &str) -> Result<()>;

    /// Takes it away; [`Ability::Unplug`].
    fn unplug(&mut self, guest: &Guest) -> Result<()>;

    /// Attaches a namespace, by its index.
    fn add(&mut self, guest: &Guest, namespace: usize) -> Result<()>;

    /// Detaches a namespace.
    fn remove(&mut self, guest: &Guest, namespace: usize) -> Result<()>;

    /// Grows a namespace; [`Ability::Resize`].
    fn resize(&mut self, namespace: usize, bytes: u64) -> Result<()>;

    /// Has something that [`Manner::Late`] namespaces are asked now answered after 5 s. Nothing is to be done where that happens by itself.
    fn delay(&mut self, guest: &Guest) -> Result<()>;

    /// Kills the data half, as `kill -9` does; [`Ability::DataHalf`].
    fn kill_data_half(&mut self) -> Result<()>;

    /// How many messages there were between it and QEMU, and how many requests it has done; [`Ability::Messages`].
    fn messages(&mut self) -> Result<(u64, u64)> {
        bail!("there are no messages")
    }

    /// An error where what serves it has ended by itself. (QEMU's own function ends with its guest.)
    fn check(&mut self) -> Result<()>;
}

/// The controller that QEMU itself has.
#[derive(Clone, Copy, Debug, Default)]
pub struct QemuNvme;

impl Peer for QemuNvme {
    type Ability = Ability;

    fn name(&self) -> &'static str {
        "qemu"
    }

    fn has(&self, ability: Ability) -> bool {
        matches!(ability, Ability::Format | Ability::Unplug | Ability::Late)
    }
}

impl Controller for QemuNvme {
    fn model(&self) -> &'static str {
        "QEMU NVMe Ctrl"
    }

    fn start(&self, _: &Path, function: &Function) -> Result<Box<dyn Served>> {
        ensure!(
            function
                .namespaces
                .iter()
                .all(|namespace| namespace.manner != Manner::Silent),
            "QEMU's own controller would wait for silent storage without end"
        );
        Ok(Box::new(ServedByQemu {
            function: function.clone(),
            plugged: AtomicU32::new(0),
        }))
    }
}

/// The throttle group of namespaces that answer late.
const THROTTLE: &str = "late";

struct ServedByQemu {
    function: Function,
    /// How often it was plugged: QEMU forgets a name some time after the device has gone.
    plugged: AtomicU32,
}

impl ServedByQemu {
    /// The controller, with what its namespaces have beside their geometry.
    fn device(&self, id: &str, more: fn(device::Namespace) -> device::Namespace) -> Nvme {
        let function = &self.function;
        let controller = Nvme::new(id, &function.serial, function.queues)
            // What its firmware log says in any case.
            .property("firmware-version", json!("1.0"));
        function
            .namespaces
            .iter()
            .fold(controller, |controller, namespace| {
                let mut device = device::Namespace::raw(&namespace.path, namespace.nsid)
                    .block_size(namespace.block_size);
                if namespace.manner == Manner::Late {
                    device = device.throttle(THROTTLE);
                }
                if namespace.spare {
                    device = device.detached();
                }
                controller.namespace(more(device))
            })
    }

    fn plugged(&self) -> Nvme {
        let id = format!("nvme{}", self.plugged.load(Ordering::Relaxed));
        // A controller's own drive can be given no identifier.
        self.device(&id, |namespace| namespace)
    }

    /// QEMU has no face for an administrator who attaches namespaces, but the guest can do that itself, and gets the same event.
    fn namespace(&self, guest: &Guest, verb: &str, namespace: usize) -> Result<()> {
        let nsid = self.function.namespaces[namespace].nsid;
        guest
            .sh(&format!(
                "c=$(ls -d /dev/nvme[0-9]) && id=$(cat /sys/class/nvme/${{c##*/}}/cntlid) && \
                 nvme {verb} $c --namespace-id={nsid} --controllers=$id"
            ))
            .map(drop)
    }
}

impl Served for ServedByQemu {
    fn attach(&self, guest: Builder) -> Builder {
        // Without being told QEMU gives a namespace no identifier at all.
        let identified = |namespace: device::Namespace| namespace.property("nguid", json!("auto"));
        guest.nvme(&self.device("nvme0", identified).boot_index(1))
    }

    fn plug(&mut self, guest: &Guest, bus: &str) -> Result<()> {
        self.plugged.fetch_add(1, Ordering::Relaxed);
        guest.add_nvme(&self.plugged().bus(bus))
    }

    fn unplug(&mut self, guest: &Guest) -> Result<()> {
        guest.remove_nvme(&self.plugged(), PATIENCE)
    }

    fn add(&mut self, guest: &Guest, namespace: usize) -> Result<()> {
        self.namespace(guest, "attach-ns", namespace)
    }

    fn remove(&mut self, guest: &Guest, namespace: usize) -> Result<()> {
        self.namespace(guest, "detach-ns", namespace)
    }

    fn resize(&mut self, _: usize, _: u64) -> Result<()> {
        bail!("QEMU's own controller does not grow")
    }

    fn delay(&mut self, guest: &Guest) -> Result<()> {
        // One operation in a second is none that matters; what has waited is let through when the limit goes.
        guest.throttle(THROTTLE, 1)?;
        std::thread::sleep(Duration::from_secs(5));
        guest.throttle(THROTTLE, 0)
    }

    fn kill_data_half(&mut self) -> Result<()> {
        bail!("QEMU's own controller is in its process")
    }

    fn check(&mut self) -> Result<()> {
        Ok(())
    }
}
