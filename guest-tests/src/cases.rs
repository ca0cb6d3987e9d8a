//! virtio-blk over vhost-user, as guests see it.
//!
//! A boot costs more than most of what is shown, so a case takes many steps in one guest.

mod change;
mod io;
mod kill;
mod migration;
mod silence;

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bluff_qemu::guest::{Detached, Guest};

use crate::backend::Ability;
use crate::runner::{Case, Context};

const MIB: u64 = 1 << 20;
/// What any step of a guest may take; under emulation, on a busy machine.
const STEP: Duration = Duration::from_secs(120);

/// All of them.
pub const VIRTIO_BLK: &[Case] = &[
    case("qemu_11_split_rings_do_io", &[], io::split),
    case("qemu_11_packed_rings_do_io", &[Ability::Packed], io::packed),
    case(
        "qemu_11_adds_resizes_and_removes_a_running_function",
        &[Ability::Resize],
        change::hot_plug,
    ),
    case(
        "qemu_11_guest_outlives_a_restarted_back_end",
        &[],
        kill::idle,
    ),
    case(
        "qemu_11_split_rings_outlive_kills_under_io",
        &[Ability::Inflight, Ability::Layers],
        kill::split,
    ),
    case(
        "qemu_11_packed_rings_outlive_kills_under_io",
        &[Ability::Inflight, Ability::Layers, Ability::Packed],
        kill::packed,
    ),
    case(
        "qemu_11_split_rings_migrate_under_io",
        &[Ability::Migration],
        migration::split,
    ),
    case(
        "qemu_11_packed_rings_migrate_under_io",
        &[Ability::Migration, Ability::Packed],
        migration::packed,
    ),
    case(
        "qemu_11_split_rings_leave_a_volume_that_never_answers",
        &[Ability::Layers],
        silence::split,
    ),
    case(
        "qemu_11_packed_rings_leave_a_volume_that_never_answers",
        &[Ability::Layers, Ability::Packed],
        silence::packed,
    ),
    case("qemu_7_2_does_io", &[], io::old_qemu),
    case(
        "user_mode_linux_does_io",
        &[Ability::BackendRequests],
        io::user_mode_linux,
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
        // Far above what one takes, for it must hold for full counts as well.
        bound: Duration::from_secs(900),
        run,
    }
}

/// Waits in the guest until a shell condition holds.
fn wait_until(guest: &Guest, condition: &str) -> Result<()> {
    guest
        .sh(&format!(
            "timeout 60 sh -c 'until {condition}; do sleep 0.05; done'"
        ))
        .map(drop)
}

/// How many requests the guest has given to /dev/vda and not got back.
fn in_flight(guest: &Guest) -> Result<u32> {
    let counts = guest.sh("cat /sys/block/vda/inflight")?;
    let counts: Result<Vec<u32>, _> = counts.split_whitespace().map(str::parse).collect();
    Ok(counts?.iter().sum())
}

/// Waits until at least so many requests are in flight.
fn wait_in_flight(guest: &Guest, count: u32) -> Result<()> {
    let sum = "$(( $(tr -s \" \" + </sys/block/vda/inflight | sed \"s/^+//\") ))";
    wait_until(guest, &format!("[ {sum} -ge {count} ]"))
}

/// Waits until /dev/vda has completed something, and answers how long that took.
fn wait_progress(guest: &Guest) -> Result<Duration> {
    let began = Instant::now();
    guest.sh(
        "ended() { set -- $(cat /sys/block/vda/stat); echo $(( $1 + $5 )); }; before=$(ended); \
         for i in $(seq 1200); do [ $(ended) = $before ] || exit 0; sleep 0.05; done; exit 1",
    )?;
    Ok(began.elapsed())
}

/// Verified random reads and writes in the guest, over and over, on as many queues as there are jobs, until they are told to stop.
struct Load {
    work: Detached,
}

impl Load {
    /// Passes over the first 8 MiB for each job. Blocks are written more than once in a pass, so that an old write over a newer one is seen,
    /// and read again while others are written.
    fn start(guest: &Guest, jobs: u16) -> Result<Self> {
        let script = format!(
            "pass=0\n\
             while [ ! -e /run/stop ]; do\n\
               pass=$((pass + 1))\n\
               fio --name=verify --filename=/dev/vda --ioengine=libaio --direct=1 --rw=randwrite --bs=4k --iodepth=32 --size=8M \
             --io_size=8M --numjobs={jobs} --offset_increment=8M --norandommap --serialize_overlap=1 --randseed=$pass \
             --verify=crc32c --verify_fatal=1 --do_verify=1 --verify_backlog=256 --group_reporting || exit 1\n\
               echo $pass >/run/passes\n\
             done"
        );
        let work = guest.detach("load", &script)?;
        wait_in_flight(guest, 1)?;
        Ok(Self { work })
    }

    /// Ends it after the pass that is under way; an error where anything that was read was not what was written last.
    fn finish(self, guest: &Guest) -> Result<()> {
        guest.sh("touch /run/stop")?;
        self.work.wait(guest, STEP)?.check()?;
        let passes: u32 = guest.sh("cat /run/passes")?.parse()?;
        ensure!(passes > 0, "no pass ended");
        Ok(())
    }
}
