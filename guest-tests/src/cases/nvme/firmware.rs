//! Firmware, boot loader, kernel and root file system, all from the namespace.

use anyhow::{Result, ensure};
use bluff_qemu::emulator::Qemu;
use bluff_qemu::firmware::{DISK_SIZE, Firmware};
use bluff_qemu::guest::Guest;
use bluff_qemu::image::Image;

use super::{Context, Host};

/// OVMF boots a system from the function; the system writes to its root file system, and boots again.
pub(super) fn boot(context: &Context<'_>) -> Result<()> {
    let image = Image::debian_13()?.without_tools();
    let firmware = Firmware::ovmf()?;
    let namespace = context.namespace(1, DISK_SIZE, 512)?;
    firmware.write_disk(&image, &namespace.path)?;
    let function = context.nvme().with(namespace);
    let mut served = context.serve(&function)?;
    let guest = Guest::builder(&Qemu::new()?, &image).firmware(&firmware);
    let guest = served.attach(guest).start()?;
    runs_from_it(&guest)?;
    let sum = guest
        .sh("dd if=/dev/urandom of=/kept bs=1M count=8 2>/dev/null && sync && sha256sum /kept")?;
    guest.reboot()?;
    runs_from_it(&guest)?;
    let found = guest.sh("sha256sum /kept")?;
    ensure!(found == sum, "the file is {found}, was {sum}");
    served.check()
}

fn runs_from_it(guest: &Guest) -> Result<()> {
    Host::new(guest)?;
    guest.sh("[ -d /sys/firmware/efi ]")?;
    let root = guest.sh(
        "d=$(awk '$5 == \"/\" { d = $3 } END { print d }' /proc/self/mountinfo) && readlink -f /sys/dev/block/$d",
    )?;
    ensure!(
        root.contains("/nvme") && root.ends_with("p2"),
        "the root file system is on {root}"
    );
    Ok(())
}
