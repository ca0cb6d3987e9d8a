//! All I/O that a guest does, and what interrupts it in a machine's daily life.

use std::time::Duration;

use anyhow::{Result, ensure};
use bluff_qemu::guest::Guest;
use bluff_qemu::image::Image;
use bluff_qemu::uml::Uml;

use super::disk::{Disk, VDA};
use super::{MIB, wait_until};
use crate::backend::{Ability, Volume};
use crate::runner::{Context, is_long};

pub(super) fn split(context: &Context<'_>) -> Result<()> {
    io_and_resets(context, false)
}

pub(super) fn packed(context: &Context<'_>) -> Result<()> {
    io_and_resets(context, true)
}

/// All I/O; then the driver is unbound and bound, and the guest reset and rebooted, each under I/O, and the data is there.
fn io_and_resets(context: &Context<'_>, packed: bool) -> Result<()> {
    let volume = context.volume("volume.raw", 256 * MIB, 2)?;
    let mut backend = context.start("backend", std::slice::from_ref(&volume))?;
    let function = context.function("blk0", &*backend, &volume).packed(packed);
    let guest = context.guest()?.vhost_user_blk(function).start()?;
    let disk = Disk::new(&guest, VDA);
    let sum = io(&disk, &volume, packed, context.has(Ability::WriteBack))?;
    bind_again(&disk)?;
    disk.read_file_system(&sum)?;
    // One of them each time, as each is a boot.
    if is_long() || !packed {
        disk.reads()?;
        guest.system_reset()?;
        guest.wait_for_boot()?;
        disk.read_file_system(&sum)?;
    }
    if is_long() || packed {
        disk.reads()?;
        guest.reboot()?;
        disk.read_file_system(&sum)?;
    }
    backend.check()
}

/// Takes the driver from the function under I/O, and gives it back.
fn bind_again(disk: &Disk<'_>) -> Result<()> {
    let guest = disk.guest;
    disk.reads()?;
    let device = guest.sh("basename $(readlink -f /sys/block/vda/device)")?;
    guest.sh(&format!(
        "echo {device} >/sys/bus/virtio/drivers/virtio_blk/unbind"
    ))?;
    wait_until(guest, "[ ! -e /sys/block/vda ]")?;
    // A job of fio ends where a read fails, but not where the disk has no size any more: it reads nothing, again and again.
    // While it has the old disk open, the new one gets another name.
    guest.sh("killall -9 fio || true")?;
    wait_until(guest, "! pidof fio")?;
    guest.sh(&format!(
        "echo {device} >/sys/bus/virtio/drivers/virtio_blk/bind"
    ))?;
    wait_until(guest, "[ -b /dev/vda ]")
}

/// All I/O under QEMU 7.2. Its emulation breaks a kernel now and then (see `Guest::was_broken_by_emulator`); where the kernel's own
/// console shows that, and there only, the case starts over.
pub(super) fn old_qemu(context: &Context<'_>) -> Result<()> {
    const ATTEMPTS: u32 = 4;
    for attempt in 1.. {
        let volume = context.volume(&format!("volume{attempt}.raw"), 256 * MIB, 2)?;
        let mut backend =
            context.start(&format!("backend{attempt}"), std::slice::from_ref(&volume))?;
        let function = context.function("blk0", &*backend, &volume);
        let guest = context.old_guest()?.vhost_user_blk(function).start()?;
        let disk = Disk::new(&guest, VDA);
        match io(&disk, &volume, false, context.has(Ability::WriteBack)) {
            Ok(_) => return backend.check(),
            Err(error) if attempt < ATTEMPTS && guest.was_broken_by_emulator() => {
                eprintln!(
                    "QEMU 7.2 broke the guest's kernel, attempt {attempt} of {ATTEMPTS} at most: {error}"
                );
                backend.check()?;
            }
            Err(error) => return Err(error),
        }
    }
    unreachable!("the last attempt returns")
}

/// A file system, checksums, verified random I/O on all queues, flush, discard, zeroes. Answers the checksum of a file that is on the disk.
fn io(disk: &Disk<'_>, volume: &Volume, packed: bool, flushes: bool) -> Result<String> {
    let guest = disk.guest;
    ensure!(disk.size()? == 256 * MIB, "the size is wrong");
    ensure!(
        guest.sh("ls /sys/block/vda/mq | wc -l")? == "2",
        "not two queues"
    );
    let features = guest.sh("cat /sys/block/vda/device/features")?;
    // VIRTIO_F_RING_PACKED is bit 34 (virtio 1.3 §6); the string's first character is bit 0.
    ensure!(
        (features.as_bytes().get(34) == Some(&b'1')) == packed,
        "packed is {packed}, features are {features}"
    );
    // The other half is for random I/O.
    let sum = disk.write_file_system("128M")?;
    if flushes {
        flushed(guest)?;
    }
    for engine in ["libaio", "io_uring"] {
        disk.verified_io(engine, "128M")?;
    }
    discard_and_zeroes(guest, volume)?;
    Ok(sum)
}

/// That the guest has flushed the cache that it was told of.
fn flushed(guest: &Guest) -> Result<()> {
    let cache = guest.sh("cat /sys/block/vda/queue/write_cache")?;
    ensure!(cache == "write back", "the cache is {cache}");
    // Linux counts flushes in the 16th field of a disk's statistics.
    let count: u64 = guest
        .sh("set -- $(cat /sys/block/vda/stat); shift 15; echo $1")?
        .parse()?;
    ensure!(count > 0, "nothing was flushed");
    Ok(())
}

fn discard_and_zeroes(guest: &Guest, volume: &Volume) -> Result<()> {
    guest.sh("dd if=/dev/urandom of=/dev/vda bs=1M seek=200 count=8 oflag=direct status=none")?;
    let before = blocks(volume)?;
    guest.sh("blkdiscard --offset 200M --length 4M /dev/vda")?;
    let after = blocks(volume)?;
    ensure!(
        after + 4 * MIB / 512 <= before,
        "the discard freed nothing: {before} blocks before, {after} after"
    );
    // Or else the kernel would write zeroes as data.
    let limit = guest.sh("cat /sys/block/vda/queue/write_zeroes_max_bytes")?;
    ensure!(limit != "0", "no VIRTIO_BLK_F_WRITE_ZEROES");
    guest.sh("blkdiscard --zeroout --offset 204M --length 2M /dev/vda")?;
    // With VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP (virtio 1.3 §5.2.6).
    guest.sh("fallocate --punch-hole --offset 206M --length 2M /dev/vda")?;
    let sum = guest.sh(
        "dd if=/dev/vda bs=1M skip=204 count=4 iflag=direct status=none | tr -d '\\0' | wc -c",
    )?;
    ensure!(sum == "0", "{sum} bytes are not zero");
    Ok(())
}

fn blocks(volume: &Volume) -> Result<u64> {
    Ok(std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(
        &volume.path,
    )?))
}

pub(super) fn user_mode_linux(context: &Context<'_>) -> Result<()> {
    let volume = context.volume("volume.raw", 64 * MIB, 1)?;
    let mut backend = context.start("backend", std::slice::from_ref(&volume))?;
    let uml = Uml::builder(&Image::user_mode_linux()?)
        .vhost_user_blk(&backend.socket(0))
        .start()?;
    ensure!(
        uml.sh("blockdev --getsize64 /dev/vda")? == (64 * MIB).to_string(),
        "the size is wrong"
    );
    uml.sh("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt && head -c 8M /dev/urandom >/mnt/data && sync")?;
    let sum = uml.sh("sha256sum /mnt/data && umount /mnt")?;
    let again = uml.sh(
        "mount /dev/vda /mnt && sha256sum /mnt/data && umount /mnt && e2fsck -fn /dev/vda >&2",
    )?;
    ensure!(again == sum, "read {again}, wrote {sum}");
    uml.sh(
        "fio --name=verify --filename=/dev/vda --ioengine=libaio --direct=1 --rw=randwrite --bs=4k --iodepth=16 --size=8M --offset=32M \
         --verify=crc32c --verify_fatal=1 --do_verify=1",
    )?;
    uml.power_off(Duration::from_secs(20))?;
    backend.check()
}
