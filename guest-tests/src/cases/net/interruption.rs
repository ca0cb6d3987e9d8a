//! Cards that die and come back, and guests that do.

use std::time::Duration;

use anyhow::{Result, ensure};
use bluff_qemu::guest::Guest;

use super::underlay::{Family, Underlay};
use super::{ONE, TWO, boot, traffic};
use crate::card::{BluffdNet, NetCard};
use crate::cases::{MIB, STEP};
use crate::runner::{Context, is_long};

/// How long a guest may hear nothing when its card, or the other one, is killed and started again. It is the middle of several: what
/// a busy machine takes from one of them is not the card's.
const SILENCE: Duration = Duration::from_secs(1);
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
    for (side, whose) in ["its own card", "the other card"].into_iter().enumerate() {
        let kills = if is_long() { 25 } else { 3 };
        let mut silences = Vec::new();
        for _ in 0..kills {
            silences.push(silence(&mut cards[side], &guests[0])?);
        }
        println!("    a guest's longest silence at each kill of {whose}: {silences:?}");
        silences.sort();
        let middle = silences[kills / 2];
        ensure!(middle < SILENCE, "{middle:?} without an answer");
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

/// Kills a card, starts it again, and answers how long the guest heard nothing of the other.
fn silence(card: &mut NetCard, guest: &Guest) -> Result<Duration> {
    guest.sh(&format!("rm -f {ENOUGH}"))?;
    let job = guest.spawn(&traffic::beat(TWO, ENOUGH))?;
    job.wait_for("steady", STEP)?;
    card.kill()?;
    card.restart()?;
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
