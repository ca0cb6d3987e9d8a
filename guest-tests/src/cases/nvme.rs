//! NVMe, as guests see it.
//!
//! The specifications meant are NVMe Base 2.1, NVM Command Set 1.1, and PCIe Transport 1.1.

mod boot_sector;
mod change;
mod command;
mod firmware;
mod host;
mod identity;
mod io;
mod kill;
mod log;
mod slow;

use anyhow::Result;

use super::disk::Disk;
use super::{MIB, STEP, case, wait_until};
use crate::controller::{Ability, Controller, Function, Manner, Namespace, Served};
use crate::runner;
use host::Host;

type Context<'a> = runner::Context<'a, dyn Controller>;
type Case = runner::Case<dyn Controller>;

/// All of NVMe.
pub const NVME: &[Case] = &[
    case(
        "nvme_commands_agree_with_the_configuration",
        &[],
        identity::commands,
    ),
    case("nvme_does_verified_io_over_resets", &[], io::io_and_resets),
    case(
        "nvme_namespaces_come_and_go_under_io",
        &[],
        change::namespaces,
    ),
    case(
        "nvme_namespaces_grow_under_a_mounted_file_system",
        &[Ability::Resize],
        change::grow,
    ),
    case(
        "nvme_doorbells_cost_no_messages",
        &[Ability::Messages],
        io::doorbells,
    ),
    case("nvme_is_added_to_a_running_guest", &[], change::hot_plug),
    case(
        "nvme_is_formatted_to_other_blocks",
        &[Ability::Format],
        command::format,
    ),
    case("nvme_boots_by_firmware", &[], firmware::boot),
    case("nvme_boots_by_bios", &[], firmware::bios),
    case(
        "nvme_leaves_a_volume_that_never_answers",
        &[Ability::Silent],
        slow::silent,
    ),
    case(
        "nvme_outlives_the_hosts_own_time_out",
        &[Ability::Late],
        slow::late,
    ),
    case(
        "nvme_outlives_kills_of_the_data_half_under_io",
        &[Ability::DataHalf],
        kill::data_half,
    ),
];

/// The serial number of all functions here.
const SERIAL: &str = "DB0001";
/// I/O queue pairs that they offer; guests have as many processors.
const QUEUES: u16 = 2;

impl Context<'_> {
    /// A function without namespaces.
    fn nvme(&self) -> Function {
        Function {
            serial: SERIAL.into(),
            queues: QUEUES,
            poll: "adaptive",
            namespaces: Vec::new(),
        }
    }

    /// A namespace over a new sparse file.
    fn namespace(&self, nsid: u32, size: u64, block_size: u32) -> Result<Namespace> {
        let path = self.folder().join(format!("namespace{nsid}.raw"));
        bluff_qemu::kernel::sparse_file(&path, size)?;
        Ok(Namespace {
            path,
            nsid,
            size,
            block_size,
            manner: Manner::Prompt,
            spare: false,
        })
    }

    /// What serves this function.
    fn serve(&self, function: &Function) -> Result<Box<dyn Served>> {
        use anyhow::Context as _;
        let folder = self.peer_folder("controller")?;
        self.peer()
            .start(&folder, function)
            .with_context(|| format!("start {}", runner::Peer::name(self.peer())))
    }
}

impl Function {
    fn with(mut self, namespace: Namespace) -> Self {
        self.namespaces.push(namespace);
        self
    }
}

impl Namespace {
    fn manner(mut self, manner: Manner) -> Self {
        self.manner = manner;
        self
    }

    fn spare(mut self) -> Self {
        self.spare = true;
        self
    }

    /// The block that begins at this byte.
    fn block(&self, byte: u64) -> u64 {
        byte / u64::from(self.block_size)
    }
}
