//! Functions that come, grow and go while the guest runs.

use anyhow::{Result, ensure};

use super::{MIB, STEP, wait_until};
use crate::runner::Context;

/// A function is added to a running guest, grows under a mounted file system, and is taken away; twice, as what one life leaves behind
/// meets the next.
pub(super) fn hot_plug(context: &Context<'_>) -> Result<()> {
    let guest = context.guest()?.hotplug_ports(1).start()?;
    ensure!(
        guest.sh("lsblk -dn -o NAME | grep -c vd || true")? == "0",
        "a disk before there was one"
    );
    for round in 0..2 {
        let volume = context.volume(&format!("volume{round}.raw"), 64 * MIB, 1)?;
        let mut backend =
            context.start(&format!("backend{round}"), std::slice::from_ref(&volume))?;
        let function = context.function("blk0", &*backend, &volume).bus("hotplug0");
        guest.add_vhost_user_blk(&function)?;
        wait_until(&guest, "[ -b /dev/vda ]")?;
        guest.sh("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt && head -c 8M /dev/urandom >/mnt/data && sync")?;
        let sum = guest.sh("sha256sum /mnt/data")?;
        backend.resize(0, 128 * MIB)?;
        let grown = 128 * MIB;
        wait_until(
            &guest,
            &format!("[ $(blockdev --getsize64 /dev/vda) = {grown} ]"),
        )?;
        guest.sh("resize2fs /dev/vda && head -c 90M /dev/zero >/mnt/large && umount /mnt && e2fsck -fn /dev/vda")?;
        let found = guest.sh("mount /dev/vda /mnt && sha256sum /mnt/data && umount /mnt")?;
        ensure!(found == sum, "read {found}, wrote {sum}");
        guest.remove_vhost_user_blk(&function, STEP)?;
        wait_until(&guest, "[ ! -b /dev/vda ]")?;
        backend.check()?;
    }
    Ok(())
}
