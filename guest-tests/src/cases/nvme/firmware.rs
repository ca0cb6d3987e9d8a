//! Firmware that boots from the namespace: OVMF a whole system, SeaBIOS a sector of ours.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use bluff_qemu::emulator::Qemu;
use bluff_qemu::firmware::{DISK_SIZE, Firmware};
use bluff_qemu::guest::Guest;
use bluff_qemu::image::Image;

use super::{Context, Host, boot_sector};

/// What SeaBIOS and the sector may take; under emulation, on a busy machine.
const BIOS_BOUND: Duration = Duration::from_secs(60);

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

/// SeaBIOS boots from the function, reads and writes through its own driver, which has one queue and looks at it instead of waiting for interrupts; and does
/// so again after a reset.
pub(super) fn bios(context: &Context<'_>) -> Result<()> {
    for poll in ["adaptive", "always"] {
        let size = (u64::from(boot_sector::LAST) + 1) * boot_sector::BLOCK as u64;
        let namespace = context.namespace(1, size, boot_sector::BLOCK as u32)?;
        let path = namespace.path.clone();
        let mut disk = disk()?;
        fs::write(&path, &disk)?;
        let mut function = context.nvme().with(namespace);
        function.poll = poll;
        let mut served = context.serve(&function)?;
        let guest = Guest::builder(&Qemu::new()?, &Image::debian_13()?).bios();
        let guest = served.attach(guest).start()?;
        let expected = boot_sector::says(&disk);
        guest.wait_console(|said| boot_sector::ended(said, 1), BIOS_BOUND)?;
        guest.system_reset()?;
        let said = guest.wait_console(|said| boot_sector::ended(said, 2), BIOS_BOUND)?;
        ensure!(
            said == expected.repeat(2),
            "poll = {poll:?}: the boot sector says\n{said}not twice\n{expected}"
        );
        guest.quit(BIOS_BOUND)?;
        served.check()?;
        boot_sector::write(&mut disk);
        let found = fs::read(&path)?;
        ensure!(found.len() == disk.len(), "the volume has another size");
        let differs = found.iter().zip(&disk).position(|(a, b)| a != b);
        ensure!(
            differs.is_none(),
            "poll = {poll:?}: the volume differs at byte {differs:?}"
        );
    }
    Ok(())
}

/// The boot sector, and behind it data that are nowhere the same.
fn disk() -> Result<Vec<u8>> {
    let blocks = boot_sector::LAST as usize + 1;
    let mut word = 1u32;
    let words = (0..blocks * boot_sector::BLOCK / 4).flat_map(|_| {
        // All 32-bit numbers but 0, each once (Marsaglia's xorshift).
        word ^= word << 13;
        word ^= word >> 17;
        word ^= word << 5;
        word.to_le_bytes()
    });
    let mut disk: Vec<u8> = words.collect();
    disk[..boot_sector::BLOCK].copy_from_slice(&boot_sector::sector()?);
    Ok(disk)
}
