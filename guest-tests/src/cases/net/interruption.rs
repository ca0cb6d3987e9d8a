//! Cards that die and come back, and guests that do.

use std::time::Duration;

use anyhow::{Result, ensure};
use bluff_qemu::guest::Guest;

use super::underlay::{Family, Underlay};
use super::{ONE, TWO, boot, traffic};
use crate::card::{BluffdNet, NetCard};
use crate::cases::{MIB, STEP};
use crate::runner::{Context, is_long};

/// How long a guest may hear nothing when its card, or the other one, is killed and started again. It is among the shorter ones of several:
/// what a busy machine adds to the others is not the card's.
const SILENCE: Duration = Duration::from_secs(1);
/// When QEMU loses its back end, its guest loses its link. Linux forgets its neighbours then, asks for them while there is no link, and
/// asks again after this (`retrans_time_ms` of its neighbours).
const ASKS_AGAIN: Duration = Duration::from_secs(1);
/// The file that ends what asks for an answer again and again.
const ENOUGH: &str = "/run/enough";

pub(super) fn all(context: &Context<'_, BluffdNet>) -> Result<()> {
    let underlay = Underlay::new()?;
    let mut cards = Vec::new();
    for (card, station) in [(0, ONE), (1, TWO)] {
        let tunnel = underlay.tunnel("vxlan", Family::Ipv4, card, 2);
        let place = underlay.place(card);
        cards.push(context.card(&format!("card{card}"), place, Some(&tunnel), &[station])?);
    }
    let guests = boot(context, [(&cards[0], ONE), (&cards[1], TWO)])?;
    guests[0].sh(&traffic::found(TWO))?;
    let guest = &guests[0];
    // As Linux is; then with a neighbour that it does not forget, so that what is left is the card's.
    let forgets = SILENCE + ASKS_AGAIN;
    silent(&mut cards[0], guest, "its own card", End::Daemon, forgets)?;
    guest.sh(&format!("arp -s {} {}", TWO.ipv4(), TWO.mac()))?;
    let what = "its own card, with a lasting neighbour";
    silent(&mut cards[0], guest, what, End::Daemon, SILENCE)?;
    silent(&mut cards[1], guest, "the other card", End::Daemon, SILENCE)?;
    if cards[0].has_data_half() {
        let what = "its own card's data half";
        silent(&mut cards[0], guest, what, End::DataHalf, SILENCE)?;
    }
    guests[0].sh(&traffic::all(TWO, MIB))?;
    guests[0].system_reset()?;
    guests[0].wait_for_boot()?;
    again(&guests)?;
    if is_long() {
        guests[1].reboot()?;
        guests[1].sh(&traffic::settle(TWO))?;
        guests[0].sh(&traffic::found(TWO))?;
        guests[0].sh(&traffic::all(TWO, MIB))?;
    }
    cards.iter_mut().try_for_each(NetCard::check)
}

/// What is killed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// All of a card; it is started again.
    Daemon,
    /// What its daemon starts again by itself.
    DataHalf,
}

/// Kills it again and again: the first quarter of the guest's silences is bounded.
fn silent(card: &mut NetCard, guest: &Guest, what: &str, end: End, bound: Duration) -> Result<()> {
    let kills = if is_long() { 25 } else { 3 };
    let silences = (0..kills).map(|_| silence(card, guest, end));
    let mut silences: Vec<_> = silences.collect::<Result<_>>()?;
    println!("    how long a guest heard nothing at each kill of {what}: {silences:?}");
    silences.sort();
    let shorter = silences[kills / 4];
    ensure!(shorter < bound, "{what}: {shorter:?} without an answer");
    Ok(())
}

/// Kills, and answers how long the guest heard nothing of the other.
fn silence(card: &mut NetCard, guest: &Guest, end: End) -> Result<Duration> {
    guest.sh(&format!("rm -f {ENOUGH}"))?;
    let job = guest.spawn(&traffic::beat(TWO, ENOUGH))?;
    job.wait_for("steady", STEP)?;
    match end {
        End::Daemon => {
            card.kill()?;
            card.restart()?;
        }
        End::DataHalf => card.kill_data_half()?,
    }
    guest.sh(&format!("touch {ENOUGH}"))?;
    let text = job.wait(STEP)?.check()?;
    Ok(Duration::from_millis(traffic::said(&text, "silence_ms")?))
}

/// After a boot of the first.
fn again(guests: &[Guest]) -> Result<()> {
    guests[0].sh(&traffic::settle(ONE))?;
    guests[0].sh(&traffic::found(TWO))?;
    guests[0].sh(&traffic::all(TWO, MIB))?;
    guests[1].sh(&traffic::all(ONE, MIB)).map(drop)
}
