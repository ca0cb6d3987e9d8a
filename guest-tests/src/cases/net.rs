//! virtio-net over vhost-user, and the networks behind it, as guests see them.
//!
//! The guests of a case are booted together, and take all its steps.

mod features;
mod interruption;
mod migration;
mod traffic;
mod tunnels;
mod underlay;
mod user_mode_linux;

use anyhow::Result;
use bluff_qemu::guest::Guest;

use super::{case, wait_until};
use crate::card::{BluffdNet, NetCard, Station};
use crate::runner::{Case, Context};

/// All of virtio-net.
pub const VIRTIO_NET: &[Case<BluffdNet>] = &[
    case(
        "net_two_cards_carry_a_segment_over_each_tunnel",
        &[],
        tunnels::each,
    ),
    case(
        "net_ethtool_shows_and_changes_what_qemu_passes_on",
        &[],
        features::all,
    ),
    case(
        "net_guests_outlive_kills_of_a_card_and_resets",
        &[],
        interruption::all,
    ),
    case("net_a_guest_migrates_between_cards", &[], migration::all),
    case(
        "net_user_mode_linux_reaches_its_neighbour",
        &[],
        user_mode_linux::all,
    ),
];

/// The first of two stations; each with as many pairs of queues as its guest has processors.
const ONE: Station = Station {
    number: 1,
    pairs: 2,
};
/// The other.
const TWO: Station = Station {
    number: 2,
    pairs: 2,
};

/// Boots a guest at each of these places, all at the same time.
fn boot<const N: usize>(
    context: &Context<'_, BluffdNet>,
    places: [(&NetCard, Station); N],
) -> Result<[Guest; N]> {
    let mut booting = Vec::new();
    for (card, station) in places {
        let guest = context
            .network_guest()?
            .vhost_user_net(card.function(station));
        booting.push(std::thread::spawn(move || {
            let guest = guest.start()?;
            guest.sh(&traffic::settle(station))?;
            Ok(guest)
        }));
    }
    let guests = booting.into_iter().map(|guest| guest.join());
    let guests = guests.map(|guest| guest.expect("a boot does not panic"));
    let guests: Vec<Guest> = guests.collect::<Result<_>>()?;
    Ok(guests.try_into().ok().expect("one for each place"))
}

/// Waits until the guest sees that its cable is in (or that it is out).
fn wait_carrier(guest: &Guest, carrier: bool) -> Result<()> {
    let carrier = u8::from(carrier);
    wait_until(
        guest,
        &format!("[ $(cat /sys/class/net/eth0/carrier) = {carrier} ]"),
    )
}
