//! Namespaces and functions that come, grow and go while the guest runs. Nobody tells the guest to look: it hears of it.

use anyhow::{Result, ensure};

use super::{Context, Host, MIB, wait_until};
use crate::controller::Ability;

/// A namespace is attached, taken away and attached again, while another one is under verified I/O.
pub(super) fn namespaces(context: &Context<'_>) -> Result<()> {
    let function = context
        .nvme()
        .with(context.namespace(1, 64 * MIB, 512)?)
        .with(context.namespace(7, 64 * MIB, 4096)?.spare());
    let mut served = context.serve(&function)?;
    let guest = served.attach(context.guest()?).start()?;
    let host = Host::new(&guest)?;
    host.wait_gone(7)?;
    let load = host.disk(1)?.load(2)?;
    served.add(&guest, 1)?;
    let disk = host.disk(7)?;
    ensure!(disk.size()? == 64 * MIB, "the size is wrong");
    let sum = disk.write_file_system("64M")?;
    served.remove(&guest, 1)?;
    host.wait_gone(7)?;
    host.disk(1)?.wait_progress()?;
    served.add(&guest, 1)?;
    let disk = host.disk(7)?;
    disk.read_file_system(&sum)?;
    // In the middle of I/O: that fails, and nothing else does.
    disk.reads()?;
    served.remove(&guest, 1)?;
    host.wait_gone(7)?;
    host.wait_live()?;
    host.disk(1)?.wait_progress()?;
    load.finish(&guest)?;
    served.check()
}

/// A namespace grows, and its file system with it.
pub(super) fn grow(context: &Context<'_>) -> Result<()> {
    const GROWN: u64 = 128 * MIB;
    let function = context
        .nvme()
        .with(context.namespace(1, 64 * MIB, 512)?)
        .with(context.namespace(2, 64 * MIB, 512)?);
    let mut served = context.serve(&function)?;
    let guest = served.attach(context.guest()?).start()?;
    let host = Host::new(&guest)?;
    let disk = host.disk(1)?;
    let path = disk.path();
    guest.sh(&format!(
        "mkfs.ext4 -q {path} && mount {path} /mnt && head -c 8M /dev/urandom >/mnt/data && sync"
    ))?;
    let sum = guest.sh("sha256sum /mnt/data")?;
    served.resize(0, GROWN)?;
    disk.wait_size(GROWN)?;
    guest.sh(&format!(
        "resize2fs {path} && head -c 90M /dev/zero >/mnt/large && umount /mnt"
    ))?;
    disk.read_file_system(&sum)?;
    ensure!(
        host.disk(2)?.size()? == 64 * MIB,
        "its neighbour has grown as well"
    );
    served.check()
}

/// A function with one queue is added to a guest without any, works, is there after a reset; and is taken away, where that can be.
pub(super) fn hot_plug(context: &Context<'_>) -> Result<()> {
    let mut function = context.nvme().with(context.namespace(1, 128 * MIB, 512)?);
    function.queues = 1;
    let mut served = context.serve(&function)?;
    let guest = context.guest()?.hotplug_ports(1).start()?;
    ensure!(
        guest.sh("ls /sys/class/nvme")?.is_empty(),
        "a controller before there was one"
    );
    served.plug(&guest, "hotplug0")?;
    let host = Host::new(&guest)?;
    ensure!(host.attribute("queue_count")? == "2", "not one I/O queue");
    let disk = host.disk(1)?;
    let sum = disk.write_file_system("64M")?;
    disk.verified_io("io_uring", "64M")?;
    disk.reads()?;
    guest.system_reset()?;
    guest.wait_for_boot()?;
    host.wait_live()?;
    host.disk(1)?.read_file_system(&sum)?;
    if context.has(Ability::Unplug) {
        served.unplug(&guest)?;
        wait_until(&guest, "[ -z \"$(ls /sys/class/nvme)\" ]")?;
        served.plug(&guest, "hotplug0")?;
        host.wait_live()?;
        host.disk(1)?.read_file_system(&sum)?;
    }
    served.check()
}
