//! Two guests on two cards.

use anyhow::{Result, ensure};
use bluff_qemu::guest::Guest;
use bluff_qemu::namespace::Capture;

use super::underlay::{Family, Underlay, VNI};
use super::{ONE, TWO, boot, traffic, wait_carrier};
use crate::card::{BluffdNet, MTU, NetCard, Station};
use crate::cases::{MIB, STEP};
use crate::runner::{Context, is_long};

/// Bytes before an IP packet in a frame.
const ETHERNET: u64 = 14;
/// Bytes of an echo that is seen on the cable: more than guests send there by themselves.
const ECHO: u32 = 500;

/// One pair of guests: the cards are killed and come back with the next tunnel.
pub(super) fn each(context: &Context<'_, BluffdNet>) -> Result<()> {
    let underlay = Underlay::new()?;
    let tunnel = |kind, family, card| underlay.tunnel(kind, family, card, 2);
    let mut cards = Vec::new();
    for (card, station) in [(0, ONE), (1, TWO)] {
        let first = tunnel("vxlan", Family::Ipv4, card);
        let place = underlay.place(card);
        cards.push(context.card(&format!("card{card}"), place, Some(&first), &[station])?);
    }
    let guests = boot(context, [(&cards[0], ONE), (&cards[1], TWO)])?;
    let families = [Family::Ipv4, Family::Ipv6];
    for (round, (kind, family)) in ["vxlan", "geneve"]
        .into_iter()
        .flat_map(|kind| families.map(|family| (kind, family)))
        .filter(|(_, family)| underlay.has(*family))
        .enumerate()
    {
        if round > 0 {
            for (i, card) in cards.iter_mut().enumerate() {
                card.change(&tunnel(kind, family, i as u8))?;
            }
        }
        guests
            .iter()
            .try_for_each(|guest| wait_carrier(guest, true))?;
        guests[0].sh(&traffic::found(TWO))?;
        let capture = capture(context, &underlay, kind, family)?;
        guests[0].sh(&traffic::echo(TWO, ECHO))?;
        if let Some(capture) = capture {
            seen(&capture.wait(STEP)?, kind)?;
        }
        crosses(&cards, &guests)?;
        cards.iter_mut().try_for_each(NetCard::check)?;
    }
    Ok(())
}

/// Looks at the cable until there was an echo and its answer.
fn capture(
    context: &Context<'_, BluffdNet>,
    underlay: &Underlay,
    kind: &str,
    family: Family,
) -> Result<Option<Capture>> {
    let Underlay::Cable(cable) = underlay else {
        return Ok(None);
    };
    let port = if kind == "vxlan" { 4789 } else { 6081 };
    let protocol = match family {
        Family::Ipv4 => "ip",
        Family::Ipv6 => "ip6",
    };
    let filter = format!("{protocol} and udp dst port {port} and greater {ECHO}");
    let log = context.folder().join(format!("{kind}-{protocol}.log"));
    Ok(Some(cable.ends[0].capture(&filter, 2, &log)?))
}

/// That a stranger to the card reads there what should be there.
fn seen(text: &str, kind: &str) -> Result<()> {
    let (name, vni) = match kind {
        "vxlan" => ("VXLAN, flags [I]", format!("vni {VNI}")),
        _ => ("Geneve, Flags [none]", format!("vni {VNI:#x}")),
    };
    let (one, two) = (ONE.ipv4(), TWO.ipv4());
    for wanted in [
        name,
        &vni,
        &format!("{} > {}", ONE.mac(), TWO.mac()),
        &format!("{one} > {two}: ICMP echo request"),
        &format!("{two} > {one}: ICMP echo reply"),
    ] {
        ensure!(text.contains(wanted), "no {wanted} in:\n{text}");
    }
    Ok(())
}

/// All kinds of traffic, from both sides; TCP in frames that are longer than the network's packets may be.
fn crosses(cards: &[NetCard], guests: &[Guest]) -> Result<()> {
    let bytes = if is_long() { 64 * MIB } else { 2 * MIB };
    for (side, (station, other)) in [(ONE, TWO), (TWO, ONE)].into_iter().enumerate() {
        let before = sent(&cards[side], station)?;
        let said = guests[side].sh(&traffic::all(other, bytes))?;
        log::info!("{said}");
        let after = sent(&cards[side], station)?;
        let mean = (after.1 - before.1) / (after.0 - before.0);
        ensure!(
            mean > u64::from(MTU) + ETHERNET,
            "frames of {mean} bytes are sent: none stands for several"
        );
    }
    Ok(())
}

/// Frames and bytes.
fn sent(card: &NetCard, station: Station) -> Result<(u64, u64)> {
    let pairs = card.pairs(station)?;
    let sum =
        |(frames, bytes), pair: &crate::card::Pair| (frames + pair.sent, bytes + pair.sent_bytes);
    Ok(pairs.iter().fold((0, 0), sum))
}
