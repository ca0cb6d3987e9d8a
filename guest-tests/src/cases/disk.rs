//! A block device of a guest, as cases watch and use it.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bluff_qemu::guest::{Detached, Guest};

use super::{STEP, wait_until};

/// The first virtio disk.
pub(super) const VDA: &str = "vda";

/// A disk of a guest, by the kernel's name for it.
#[derive(Clone)]
pub(super) struct Disk<'a> {
    pub(super) guest: &'a Guest,
    name: String,
}

impl<'a> Disk<'a> {
    pub(super) fn new(guest: &'a Guest, name: &str) -> Self {
        Self {
            guest,
            name: name.into(),
        }
    }

    /// `/dev/vda`.
    pub(super) fn path(&self) -> String {
        format!("/dev/{}", self.name)
    }

    /// `/sys/block/vda`.
    pub(super) fn sys(&self) -> String {
        format!("/sys/block/{}", self.name)
    }

    /// Its size in bytes.
    pub(super) fn size(&self) -> Result<u64> {
        let path = self.path();
        Ok(self
            .guest
            .sh(&format!("blockdev --getsize64 {path}"))?
            .parse()?)
    }

    /// Waits until it has this size.
    pub(super) fn wait_size(&self, bytes: u64) -> Result<()> {
        let path = self.path();
        wait_until(
            self.guest,
            &format!("[ $(blockdev --getsize64 {path}) = {bytes} ]"),
        )
    }

    /// How many requests the guest has given to it and not got back.
    pub(super) fn in_flight(&self) -> Result<u32> {
        let counts = self.guest.sh(&format!("cat {}/inflight", self.sys()))?;
        let counts: Result<Vec<u32>, _> = counts.split_whitespace().map(str::parse).collect();
        Ok(counts?.iter().sum())
    }

    /// Waits until at least so many requests are in flight.
    pub(super) fn wait_in_flight(&self, count: u32) -> Result<()> {
        let file = format!("{}/inflight", self.sys());
        let sum = format!("$(( $(tr -s \" \" + <{file} | sed \"s/^+//\") ))");
        wait_until(self.guest, &format!("[ {sum} -ge {count} ]"))
    }

    /// Waits until it has completed something, and answers how long that took.
    pub(super) fn wait_progress(&self) -> Result<Duration> {
        let began = Instant::now();
        let file = format!("{}/stat", self.sys());
        self.guest.sh(&format!(
            "ended() {{ set -- $(cat {file}); echo $(( $1 + $5 )); }}; before=$(ended); \
             for i in $(seq 1200); do [ $(ended) = $before ] || exit 0; sleep 0.05; done; exit 1"
        ))?;
        Ok(began.elapsed())
    }

    /// Starts reads that do not end: what interrupts them must not find them written into memory later on.
    pub(super) fn reads(&self) -> Result<()> {
        self.guest.detach(
            "reads",
            &format!(
                "fio --name=read --filename={} --ioengine=libaio --direct=1 --rw=randread --bs=64k --iodepth=32 --numjobs=2 \
                 --time_based --runtime=600",
                self.path()
            ),
        )?;
        self.wait_in_flight(1)
    }

    /// Makes a file system on its first `size` (as mkfs takes it), and answers the checksum of a file in it.
    pub(super) fn write_file_system(&self, size: &str) -> Result<String> {
        let path = self.path();
        self.guest.sh(&format!(
            "mkfs.ext4 -q {path} {size} && mount {path} /mnt && head -c 8M /dev/urandom >/mnt/data && sync && umount /mnt"
        ))?;
        // From the disk, not from the cache: the mount is new.
        self.sum()
    }

    /// That the file system and its file are as they were made.
    pub(super) fn read_file_system(&self, sum: &str) -> Result<()> {
        self.guest.sh(&format!("e2fsck -fn {}", self.path()))?;
        let found = self.sum()?;
        ensure!(found == sum, "the file is {found}, was {sum}");
        Ok(())
    }

    fn sum(&self) -> Result<String> {
        let path = self.path();
        self.guest.sh(&format!(
            "mount {path} /mnt && sha256sum /mnt/data && umount /mnt"
        ))
    }

    /// Random writes in the 48 MiB from byte `offset` (as fio takes it) on, verified, one job for each of the two processors.
    pub(super) fn verified_io(&self, engine: &str, offset: &str) -> Result<()> {
        let report = self.guest.sh(&format!(
            "fio --name=verify --filename={} --ioengine={engine} --direct=1 --rw=randwrite --bs=4k --iodepth=32 --offset={offset} \
             --size=16M --numjobs=2 --offset_increment=32M --cpus_allowed=0-1 --cpus_allowed_policy=split --verify=crc32c \
             --verify_fatal=1 --do_verify=1 --group_reporting --minimal >/tmp/fio && tail -n 1 /tmp/fio | cut -d';' -f5,6,47",
            self.path()
        ))?;
        // Terse format 3: field 5 is the error count, 6 the KiB that were read (the verification), 47 those that were written.
        let expected = format!("0;{0};{0}", 32 * 1024);
        ensure!(
            report == expected,
            "fio with {engine}: {report}, expected {expected}"
        );
        Ok(())
    }

    /// Starts verified I/O on as many queues as there are jobs; see [`Load`].
    pub(super) fn load(&self, jobs: u16) -> Result<Load> {
        Load::start(self, jobs)
    }
}

/// Verified random reads and writes in the guest, over and over, until they are told to stop.
pub(super) struct Load {
    work: Detached,
}

impl Load {
    /// Passes over the first 8 MiB for each job. Blocks are written more than once in a pass, so that an old write over a newer one is seen,
    /// and read again while others are written.
    fn start(disk: &Disk<'_>, jobs: u16) -> Result<Self> {
        let path = disk.path();
        let script = format!(
            "pass=0\n\
             while [ ! -e /run/stop ]; do\n\
               pass=$((pass + 1))\n\
               fio --name=verify --filename={path} --ioengine=libaio --direct=1 --rw=randwrite --bs=4k --iodepth=32 --size=8M \
             --io_size=8M --numjobs={jobs} --offset_increment=8M --norandommap --serialize_overlap=1 --randseed=$pass \
             --verify=crc32c --verify_fatal=1 --do_verify=1 --verify_backlog=256 --group_reporting || exit 1\n\
               echo $pass >/run/passes\n\
             done"
        );
        let work = disk.guest.detach("load", &script)?;
        disk.wait_in_flight(1)?;
        Ok(Self { work })
    }

    /// Ends it after the pass that is under way; an error where anything that was read was not what was written last.
    pub(super) fn finish(self, guest: &Guest) -> Result<()> {
        guest.sh("touch /run/stop")?;
        self.work.wait(guest, STEP)?.check()?;
        let passes: u32 = guest.sh("cat /run/passes")?.parse()?;
        ensure!(passes > 0, "no pass ended");
        Ok(())
    }
}
