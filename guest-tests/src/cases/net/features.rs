//! Queues, offloads, MTU and link, as far as QEMU carries them between a guest and its card.

use anyhow::{Result, ensure};
use bluff_qemu::guest::Guest;

use super::{ONE, TWO, boot, traffic, wait_carrier};
use crate::card::{BluffdNet, MTU, NetCard, Pair};
use crate::cases::MIB;
use crate::runner::Context;

/// Bytes of TCP in each direction.
const BYTES: u64 = MIB;
/// Bytes before an IP packet in a frame.
const ETHERNET: u64 = 14;

/// Two guests on one card.
pub(super) fn all(context: &Context<'_, BluffdNet>) -> Result<()> {
    let mut card = context.card("card", None, None, &[ONE, TWO])?;
    let guests = boot(context, [(&card, ONE), (&card, TWO)])?;
    let guest = &guests[0];
    guest.sh(&traffic::found(TWO))?;
    let mtu = guest.sh("cat /sys/class/net/eth0/mtu")?;
    ensure!(mtu == MTU.to_string(), "the MTU is {mtu}");
    let driver = guest.sh("ethtool -i eth0")?;
    ensure!(driver.contains("driver: virtio_net"), "{driver}");
    offloads(&card, guest)?;
    queues(&card, guest)?;
    links(&card, guest)?;
    card.check()
}

/// Whether a feature is on, as ethtool has it.
fn is_on(guest: &Guest, feature: &str) -> Result<bool> {
    let line = guest.sh(&format!("ethtool -k eth0 | grep '{feature}: '"))?;
    Ok(line.contains(": on"))
}

/// What is switched off in the guest is not left to the card any more; content is right either way.
fn offloads(card: &NetCard, guest: &Guest) -> Result<()> {
    for feature in [
        "tx-checksum-ip-generic",
        "tx-tcp-segmentation",
        "tx-tcp6-segmentation",
        "rx-checksumming",
    ] {
        ensure!(is_on(guest, feature)?, "{feature} is off");
    }
    // QEMU takes it from every vhost-user function.
    ensure!(!is_on(guest, "tx-udp-segmentation")?, "USO is on");
    for (switch, large) in [
        ("tso on", true),
        ("tso off", false),
        // The kernel switches segmentation off with it.
        ("tx off", false),
        // The card is not told of this: what it has learnt to give to the guest in one piece, it still does.
        ("rx-gro-hw off", false),
        ("rx-gro-hw on tx on tso on", true),
    ] {
        guest.sh(&format!("ethtool -K eth0 {switch}"))?;
        let on = is_on(guest, "tx-tcp-segmentation")?;
        ensure!(on == large, "after {switch} segmentation is {on}");
        let before = total(&card.pairs(ONE)?);
        for to in [TWO.ipv4(), TWO.ipv6()] {
            guest.sh(&traffic::tcp(&to, BYTES, ""))?;
        }
        let after = total(&card.pairs(ONE)?);
        let mean = (after.sent_bytes - before.sent_bytes) / (after.sent - before.sent);
        let most = u64::from(MTU) + ETHERNET;
        ensure!(
            (mean > most) == large,
            "after {switch} frames of {mean} bytes are sent"
        );
    }
    Ok(())
}

/// Both pairs of queues are used, and the second one is not where the guest gave it up.
fn queues(card: &NetCard, guest: &Guest) -> Result<()> {
    let shown = guest.sh("ethtool -l eth0 | grep Combined")?;
    let shown: Vec<_> = shown.split_whitespace().collect();
    ensure!(shown == ["Combined:", "2", "Combined:", "2"], "{shown:?}");
    let streams = traffic::tcp(&TWO.ipv4(), BYTES / 4, "streams=8");
    for used in [1, 2, 1, 2] {
        guest.sh(&format!("ethtool -L eth0 combined {used}"))?;
        let before = card.pairs(ONE)?;
        // Which queue a connection takes is chance: one of its port, or of the processor that its thread is on.
        let mut attempts = 0;
        let moved = loop {
            guest.sh(&streams)?;
            let after = card.pairs(ONE)?;
            let moved = after.iter().zip(&before).map(|(after, before)| {
                [after.sent > before.sent, after.received > before.received]
            });
            let moved: Vec<_> = moved.collect();
            attempts += 1;
            if used == 1 || attempts == 10 || moved.iter().flatten().all(|moved| *moved) {
                break moved;
            }
        };
        let second = [used == 2; 2];
        ensure!(
            moved == [[true; 2], second],
            "with {used} in use, sent and received by each: {moved:?}"
        );
    }
    let kicks = guest.sh("ethtool -S eth0 | grep -c 'tx[01]_kicks: [1-9]'")?;
    ensure!(kicks == "2", "the guest has rung for {kicks} queues");
    Ok(())
}

/// A cable that QEMU pulls out is seen by the guest; one that the card pulls out carries nothing, and the guest is not told.
fn links(card: &NetCard, guest: &Guest) -> Result<()> {
    guest.set_link(&ONE.id(), false)?;
    wait_carrier(guest, false)?;
    guest.sh(&traffic::lost(TWO))?;
    guest.set_link(&ONE.id(), true)?;
    wait_carrier(guest, true)?;
    guest.sh(&traffic::found(TWO))?;
    card.set_link(ONE, false)?;
    guest.sh(&traffic::lost(TWO))?;
    let carrier = guest.sh("cat /sys/class/net/eth0/carrier")?;
    ensure!(carrier == "1", "QEMU has told the guest");
    card.set_link(ONE, true)?;
    guest.sh(&traffic::found(TWO))?;
    guest.sh(&traffic::all(TWO, BYTES)).map(drop)
}

fn total(pairs: &[Pair]) -> Pair {
    let zero = Pair {
        sent: 0,
        sent_bytes: 0,
        received: 0,
        received_bytes: 0,
    };
    pairs.iter().fold(zero, |sum, pair| Pair {
        sent: sum.sent + pair.sent,
        sent_bytes: sum.sent_bytes + pair.sent_bytes,
        received: sum.received + pair.received,
        received_bytes: sum.received_bytes + pair.received_bytes,
    })
}
