//! A guest moves from one card to another, and back; the rest of its network finds it.

use std::time::Instant;

use anyhow::{Result, ensure};
use bluff_qemu::device::VhostUserNet;
use bluff_qemu::guest::Guest;

use super::underlay::{Family, Underlay};
use super::{ONE, TWO, boot, traffic};
use crate::card::{BluffdNet, NetCard};
use crate::cases::STEP;
use crate::runner::Context;

/// The file that ends the load.
const ENOUGH: &str = "/run/enough";
/// Bytes of a round.
const ROUND: u64 = 256 << 10;

/// Its neighbour stays where it is. First nothing is sent, so that it is by QEMU's RARP that it is found; then it goes back under load.
pub(super) fn all(context: &Context<'_, BluffdNet>) -> Result<()> {
    let underlay = Underlay::new()?;
    let vtep = |card| underlay.vtep(Family::Ipv4, card).to_string();
    let mut cards = Vec::new();
    for (card, station) in [(0, ONE), (1, TWO), (2, TWO)] {
        let tunnel = underlay.tunnel("vxlan", Family::Ipv4, card, 3);
        let place = underlay.place(card);
        cards.push(context.card(&format!("card{card}"), place, Some(&tunnel), &[station])?);
    }
    let [neighbour] = boot(context, [(&cards[0], ONE)])?;
    let source = context.network_guest()?.vhost_user_net(moves(&cards[1]));
    let source = source.start()?;
    source.sh(&traffic::settle(TWO))?;
    neighbour.sh(&traffic::found(TWO))?;
    neighbour.sh(&traffic::all(TWO, ROUND))?;
    behind(&cards[0], &vtep(1))?;

    // It asks for nobody by itself now.
    source.sh("echo 1 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6")?;
    source.sh(&format!("arp -s {} {}", ONE.ipv4(), ONE.mac()))?;
    let target = arrives(context, &cards[2])?;
    let before = sent(&source)?;
    let down = source.migrate_to(&target, STEP)?["downtime"].clone();
    behind(&cards[0], &vtep(2))?;
    let after = sent(&target)?;
    ensure!(
        after == before,
        "it has sent something itself: {before} frames before, {after} after"
    );
    neighbour.sh(&traffic::found(TWO))?;
    source.quit(STEP)?;

    let back = arrives(context, &cards[1])?;
    let script = traffic::tcp(&ONE.ipv4(), ROUND, &format!("streams=2 until={ENOUGH}"));
    let load = target.detach("load", &script)?;
    let received =
        || Ok::<_, anyhow::Error>(cards[0].pairs(ONE)?.iter().map(|p| p.received).sum::<u64>());
    let (begin, end) = (received()?, Instant::now() + STEP);
    while received()? < begin + 100 {
        ensure!(Instant::now() < end, "the load does not begin");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let again = target.migrate_to(&back, STEP)?["downtime"].clone();
    target.quit(STEP)?;
    behind(&cards[0], &vtep(1))?;
    back.sh(&format!("touch {ENOUGH}"))?;
    let output = load.wait(&back, STEP)?;
    println!(
        "    down for {down} ms without load, {again} ms with: {}",
        output.check()?
    );
    neighbour.sh(&traffic::tcp(&TWO.ipv4(), ROUND, ""))?;
    cards.iter_mut().try_for_each(NetCard::check)
}

/// The function of the guest that moves. It does not announce itself: that is left to QEMU, which then asks the card (SEND_RARP).
fn moves(card: &NetCard) -> VhostUserNet {
    card.function(TWO).property("guest_announce", false.into())
}

/// A QEMU that waits for the guest.
fn arrives(context: &Context<'_, BluffdNet>, card: &NetCard) -> Result<Guest> {
    context
        .network_guest()?
        .vhost_user_net(moves(card))
        .incoming()
        .start()
}

/// Waits until a card knows the guest to be behind another.
fn behind(card: &NetCard, vtep: &str) -> Result<()> {
    let end = Instant::now() + STEP;
    loop {
        let known = card.elsewhere()?;
        if known.get(&TWO.mac()).is_some_and(|found| found == vtep) {
            return Ok(());
        }
        ensure!(
            Instant::now() < end,
            "the guest should be behind {vtep}: {known:?}"
        );
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// Frames that the guest itself has sent.
fn sent(guest: &Guest) -> Result<u64> {
    Ok(guest
        .sh("cat /sys/class/net/eth0/statistics/tx_packets")?
        .parse()?)
}
