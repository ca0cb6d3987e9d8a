//! virtio-blk and virtio-net over vhost-user, and NVMe, as guests see them.
//!
//! A boot costs more than most of what is shown, so a case takes many steps in one guest.

mod change;
mod disk;
mod io;
mod kill;
mod migration;
mod net;
mod nvme;
mod silence;

use std::time::Duration;

use anyhow::Result;
use bluff_qemu::guest::Guest;

use crate::backend::Ability;
use crate::runner::{Case, Context, Peer};

pub use net::VIRTIO_NET;
pub use nvme::NVME;

const MIB: u64 = 1 << 20;
/// What any step of a guest may take; under emulation, on a busy machine.
const STEP: Duration = Duration::from_secs(120);

/// All of virtio-blk.
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

const fn case<P: Peer + ?Sized>(
    name: &'static str,
    needs: &'static [P::Ability],
    run: fn(&Context<'_, P>) -> Result<()>,
) -> Case<P> {
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
