//! virtio-blk over vhost-user, as guests see it.

use std::time::Duration;

use anyhow::{Result, ensure};
use bluff_qemu::guest::Guest;
use bluff_qemu::image::Image;
use bluff_qemu::uml::Uml;

use crate::backend::{Ability, Volume};
use crate::runner::{Case, Context};

const MIB: u64 = 1 << 20;
const LONG: Duration = Duration::from_secs(300);

/// All of them.
pub const VIRTIO_BLK: &[Case] = &[
    case("qemu_11_split_rings_do_io", &[], split),
    case("qemu_11_packed_rings_do_io", &[Ability::Packed], packed),
    case("qemu_11_adds_and_removes_a_running_function", &[], hot_plug),
    case("qemu_11_guest_sees_a_resize", &[Ability::Resize], resize),
    case("qemu_11_guest_outlives_a_restarted_back_end", &[], restart),
    case("qemu_11_migrates_under_io", &[Ability::Migration], migrate),
    case("qemu_7_2_does_io", &[], old_qemu),
    case(
        "user_mode_linux_does_io",
        &[Ability::BackendRequests],
        user_mode_linux,
    ),
];

const fn case(
    name: &'static str,
    needs: &'static [Ability],
    run: fn(&Context<'_>) -> Result<()>,
) -> Case {
    Case {
        name,
        needs,
        bound: LONG,
        run,
    }
}

fn split(context: &Context<'_>) -> Result<()> {
    io_and_resets(context, false)
}

fn packed(context: &Context<'_>) -> Result<()> {
    io_and_resets(context, true)
}

/// All I/O; then a reset and a reboot, after which the data is there.
fn io_and_resets(context: &Context<'_>, packed: bool) -> Result<()> {
    let volume = context.volume("volume.raw", 256 * MIB, 2)?;
    let mut backend = context.start("backend", std::slice::from_ref(&volume))?;
    let function = context.function("blk0", &*backend, &volume).packed(packed);
    let guest = context.guest()?.vhost_user_blk(function).start()?;
    let sum = io(&guest, &volume, packed)?;
    guest.system_reset()?;
    guest.wait_for_boot()?;
    read_file_system(&guest, &sum)?;
    guest.reboot()?;
    read_file_system(&guest, &sum)?;
    backend.check()
}

/// All I/O under QEMU 7.2. Its emulation breaks a kernel now and then (see `Guest::was_broken_by_emulator`); where the kernel's own
/// console shows that, and there only, the case starts over.
fn old_qemu(context: &Context<'_>) -> Result<()> {
    const ATTEMPTS: u32 = 4;
    for attempt in 1.. {
        let volume = context.volume(&format!("volume{attempt}.raw"), 256 * MIB, 2)?;
        let mut backend =
            context.start(&format!("backend{attempt}"), std::slice::from_ref(&volume))?;
        let function = context.function("blk0", &*backend, &volume);
        let guest = context.old_guest()?.vhost_user_blk(function).start()?;
        match io(&guest, &volume, false) {
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

/// A file system, checksums, verified random I/O on all queues, discard, zeroes. Answers the checksum of a file that is on the disk.
fn io(guest: &Guest, volume: &Volume, packed: bool) -> Result<String> {
    ensure!(
        guest.sh("blockdev --getsize64 /dev/vda")? == (256 * MIB).to_string(),
        "the size is wrong"
    );
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
    let sum = write_file_system(guest)?;
    for engine in ["libaio", "io_uring"] {
        verified_io(guest, engine)?;
    }
    discard_and_zeroes(guest, volume)?;
    Ok(sum)
}

/// Makes a file system on the first half of /dev/vda, and answers the checksum of a file in it.
fn write_file_system(guest: &Guest) -> Result<String> {
    guest.sh("mkfs.ext4 -q /dev/vda 128M && mount /dev/vda /mnt && head -c 8M /dev/urandom >/mnt/data && sync && umount /mnt")?;
    // From the disk, not from the cache: the mount is new.
    guest.sh("mount /dev/vda /mnt && sha256sum /mnt/data && umount /mnt")
}

fn read_file_system(guest: &Guest, sum: &str) -> Result<()> {
    guest.sh("e2fsck -fn /dev/vda")?;
    let found = guest.sh("mount /dev/vda /mnt && sha256sum /mnt/data && umount /mnt")?;
    ensure!(found == sum, "the file is {found}, was {sum}");
    Ok(())
}

/// Random writes in the second half, verified, one job for each queue.
fn verified_io(guest: &Guest, engine: &str) -> Result<()> {
    let report = guest.sh(&format!(
        "fio --name=verify --filename=/dev/vda --ioengine={engine} --direct=1 --rw=randwrite --bs=4k --iodepth=32 --offset=128M \
         --size=16M --numjobs=2 --offset_increment=32M --cpus_allowed=0-1 --cpus_allowed_policy=split --verify=crc32c \
         --verify_fatal=1 --do_verify=1 --group_reporting --minimal >/tmp/fio && tail -n 1 /tmp/fio | cut -d';' -f5,6,47"
    ))?;
    // Terse format 3: field 5 is the error count, 6 the KiB that were read (the verification), 47 those that were written.
    let expected = format!("0;{0};{0}", 32 * 1024);
    ensure!(
        report == expected,
        "fio with {engine}: {report}, expected {expected}"
    );
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
    guest.sh("blkdiscard --zeroout --offset 204M --length 4M /dev/vda")?;
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

fn hot_plug(context: &Context<'_>) -> Result<()> {
    let volume = context.volume("volume.raw", 64 * MIB, 1)?;
    let guest = context.guest()?.hotplug_ports(1).start()?;
    ensure!(
        guest.sh("lsblk -dn -o NAME | grep -c vd || true")? == "0",
        "a disk before there was one"
    );
    for round in 0..2 {
        let mut backend = context.start("backend", std::slice::from_ref(&volume))?;
        let function = context.function("blk0", &*backend, &volume).bus("hotplug0");
        guest.add_vhost_user_blk(&function)?;
        guest.sh("timeout 30 sh -c 'until [ -b /dev/vda ]; do sleep 0.1; done'")?;
        guest.sh(&format!("dd if=/dev/urandom of=/dev/vda bs=1M count=8 seek={round} oflag=direct status=none && sha256sum /dev/vda"))?;
        guest.remove_vhost_user_blk(&function, Duration::from_secs(30))?;
        guest.sh("timeout 30 sh -c 'while [ -b /dev/vda ]; do sleep 0.1; done'")?;
        backend.check()?;
    }
    Ok(())
}

fn resize(context: &Context<'_>) -> Result<()> {
    let volume = context.volume("volume.raw", 64 * MIB, 1)?;
    let mut backend = context.start("backend", std::slice::from_ref(&volume))?;
    let guest = context
        .guest()?
        .vhost_user_blk(context.function("blk0", &*backend, &volume))
        .start()?;
    guest.sh("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt")?;
    backend.resize(0, 128 * MIB)?;
    guest.sh(&format!(
        "timeout 30 sh -c 'until [ $(blockdev --getsize64 /dev/vda) = {} ]; do sleep 0.1; done'",
        128 * MIB
    ))?;
    guest.sh("resize2fs /dev/vda && head -c 90M /dev/zero >/mnt/large && umount /mnt && e2fsck -fn /dev/vda")?;
    backend.check()
}

/// The back end is killed while no request is in flight, and comes back: the guest notices nothing but a pause.
fn restart(context: &Context<'_>) -> Result<()> {
    let volume = context.volume("volume.raw", 64 * MIB, 1)?;
    let mut backend = context.start("backend", std::slice::from_ref(&volume))?;
    let function = context
        .function("blk0", &*backend, &volume)
        .reconnect_ms(100);
    let guest = context.guest()?.vhost_user_blk(function).start()?;
    let sum = guest.sh("dd if=/dev/urandom of=/dev/vda bs=1M count=16 oflag=direct status=none && sha256sum /dev/vda")?;
    for _ in 0..3 {
        backend.kill()?;
        backend.restart()?;
        let found = guest.sh("echo 3 >/proc/sys/vm/drop_caches; sha256sum /dev/vda")?;
        ensure!(found == sum, "read {found} after the restart, {sum} before");
    }
    backend.check()
}

/// Two QEMU and two back ends on one file, with verified writes under way.
fn migrate(context: &Context<'_>) -> Result<()> {
    let volume = context.volume("volume.raw", 128 * MIB, 1)?;
    let mut source_backend = context.start("source", std::slice::from_ref(&volume))?;
    let mut target_backend = context.start("target", std::slice::from_ref(&volume))?;
    let source = context
        .guest()?
        .vhost_user_blk(context.function("blk0", &*source_backend, &volume))
        .start()?;
    let target = context
        .guest()?
        .vhost_user_blk(context.function("blk0", &*target_backend, &volume))
        .incoming()
        .start()?;
    let work = source.detach(
        "fio",
        "fio --name=verify --filename=/dev/vda --ioengine=libaio --direct=1 --rw=randwrite --bs=4k --iodepth=16 --size=64M \
         --rate=4m --verify=crc32c --verify_fatal=1 --do_verify=1",
    )?;
    source.migrate_to(&target, Duration::from_secs(120))?;
    source_backend.check()?;
    source.quit(Duration::from_secs(20))?;
    work.wait(&target, Duration::from_secs(120))?.check()?;
    target_backend.check()
}

fn user_mode_linux(context: &Context<'_>) -> Result<()> {
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
