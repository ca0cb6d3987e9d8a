//! Attack list B5: an in-flight region that lies. Errors, never a panic, never an endless loop.

use std::os::unix::fs::FileExt;

use bluff_testing::{Chance, times};

use super::rig::{Device, Ended, Shape, World, live};
use crate::RingError;
use crate::inflight::queue_len;

fn shape(packed: bool) -> Shape {
    Shape {
        packed,
        in_order: false,
        size: 8,
    }
}

/// A world in which requests are in flight and the process is gone.
fn orphaned(packed: bool) -> World {
    let mut world = World::new(shape(packed));
    // Chains of two descriptors.
    world.submit_chain(0, 1, false);
    world.submit_chain(0, 1, false);
    world.driver.publish();
    let ended = live(None, || {
        let mut device = Device::new(world.open()?);
        device.take(&mut world, 2)?;
        assert_eq!(device.busy(), 2);
        Ok(())
    });
    assert!(ended.is_ok());
    world
}

fn poke(world: &World, at: u64, bytes: &[u8]) {
    world.region.write_all_at(bytes, at).unwrap();
}

fn refused(world: &World) -> &'static str {
    match world.open() {
        Err(RingError::Inflight(why)) => why,
        Err(e) => panic!("another error: {e}"),
        Ok(_) => panic!("the lie was believed"),
    }
}

// Offsets of the standard layouts.
const VERSION: u64 = 8;
const DESC_NUM: u64 = 10;
const SPLIT_BATCH_HEAD: u64 = 12;
const SPLIT_USED: u64 = 14;
const PACKED_FREE: u64 = 12;
const PACKED_OLD_FREE: u64 = 14;
const PACKED_USED: u64 = 16;
const PACKED_OLD_USED: u64 = 18;

fn packed_entry(i: u64) -> u64 {
    32 + 32 * i
}

#[test]
fn b05_another_size_or_version() {
    for packed in [false, true] {
        let world = orphaned(packed);
        for lie in [0u16, 7, 9, 0xffff] {
            poke(&world, DESC_NUM, &lie.to_le_bytes());
            refused(&world);
        }
        let world = orphaned(packed);
        poke(&world, VERSION, &2u16.to_le_bytes());
        refused(&world);
    }
}

#[test]
fn b05_split_batch_head_and_counters() {
    let world = orphaned(false);
    // The ring's used index is 0: one less says that a batch of one was published.
    poke(&world, SPLIT_USED, &0xffffu16.to_le_bytes());
    for head in [8u16, 0xffff] {
        poke(&world, SPLIT_BATCH_HEAD, &head.to_le_bytes());
        refused(&world);
    }
    // Further away than the ring is long.
    poke(&world, SPLIT_USED, &100u16.to_le_bytes());
    refused(&world);
    // A batch whose list is a loop: it ends all the same.
    let world = orphaned(false);
    poke(&world, SPLIT_USED, &(0u16.wrapping_sub(8)).to_le_bytes());
    poke(&world, SPLIT_BATCH_HEAD, &0u16.to_le_bytes());
    poke(&world, 16 + 6, &0u16.to_le_bytes());
    world.open().map(drop).expect("harms only itself");
}

#[test]
fn b05_packed_lists() {
    // A free list that runs in a circle, or out of the table.
    for next in [4u16, 5, 9, 0xffff] {
        let world = orphaned(true);
        let free = free_head(&world);
        poke(&world, packed_entry(free) + 2, &next.to_le_bytes());
        if u64::from(next) != free + 1 {
            refused(&world);
        }
    }
    for at in [PACKED_USED, PACKED_OLD_USED] {
        let world = orphaned(true);
        poke(&world, at, &8u16.to_le_bytes());
        refused(&world);
    }
    // Free heads that name an entry in flight, or none at all.
    for lie in [1u16, 9, 0xffff] {
        let world = orphaned(true);
        poke(&world, PACKED_FREE, &lie.to_le_bytes());
        poke(&world, PACKED_OLD_FREE, &lie.to_le_bytes());
        refused(&world);
    }
    // Nothing is free, and yet most entries are in no chain.
    let world = orphaned(true);
    poke(&world, PACKED_OLD_FREE, &8u16.to_le_bytes());
    assert_eq!(refused(&world), "entries are missing");
}

fn free_head(world: &World) -> u64 {
    let mut bytes = [0; 2];
    world
        .region
        .read_exact_at(&mut bytes, PACKED_OLD_FREE)
        .unwrap();
    u64::from(u16::from_le_bytes(bytes))
}

#[test]
fn b05_packed_chains() {
    let last = 4;
    let num = 6;
    // Chains without descriptors, too long, and with another end.
    for (field, lie) in [(num, 0u16), (num, 8), (num, 9), (num, 0xffff), (last, 7)] {
        let world = orphaned(true);
        poke(&world, packed_entry(0) + field, &lie.to_le_bytes());
        refused(&world);
    }
    // A chain that is a circle.
    let world = orphaned(true);
    poke(&world, packed_entry(0) + 2, &0u16.to_le_bytes());
    refused(&world);
    // Two chains with the same buffer ID: the second one breaks the ring.
    let world = orphaned(true);
    for i in 0..8 {
        poke(&world, packed_entry(i) + 16, &3u16.to_le_bytes());
    }
    let mut ring = world.open().expect("the lists are sound");
    let mut chain = crate::Chain::default();
    ring.pop(&mut chain).expect("the first one");
    assert!(matches!(ring.pop(&mut chain), Err(RingError::InUse(3))));
}

/// Counters are only an order.
#[test]
fn b05_counters_at_their_end() {
    for packed in [false, true] {
        let world = orphaned(packed);
        let (first, step) = if packed { (32 + 8, 32) } else { (16 + 8, 16) };
        for i in 0..8 {
            poke(&world, first + step * i, &u64::MAX.to_le_bytes());
        }
        let mut ring = world.open().expect("counters cannot be wrong");
        let mut chain = crate::Chain::default();
        for _ in 0..2 {
            assert_eq!(ring.pop(&mut chain).unwrap(), crate::Pop::Chain);
        }
    }
}

#[test]
fn b05_truncated_file() {
    for packed in [false, true] {
        let world = orphaned(packed);
        // Too short before it is mapped is the mapping's error; here it shrinks afterwards.
        let inflight = world.inflight();
        world.region.set_len(0).unwrap();
        match world.open_with(inflight.clone()) {
            Err(RingError::Inflight(_)) => {}
            Err(e) => panic!("another error: {e}"),
            Ok(_) => panic!("a region that is not there was believed"),
        }
        assert!(inflight.region.is_poisoned());
        // And while a ring is at work: it goes on, and only the record is lost.
        let mut world = World::new(shape(packed));
        let mut chance = Chance::new(3);
        let inflight = world.inflight();
        let mut device = Device::new(world.open_with(inflight.clone()).unwrap());
        world.region.set_len(0).unwrap();
        for _ in 0..20 {
            world.submit(&mut chance, 2);
            let _ = device.take(&mut world, 2);
            device.finish(&mut chance, 2);
            world.reap();
        }
        assert!(inflight.region.is_poisoned());
    }
}

#[test]
fn b05_parts_that_do_not_fit() {
    for packed in [false, true] {
        let world = World::new(shape(packed));
        let whole = world.inflight();
        for (offset, len) in [
            (0, 0),
            (0, 64),
            (4, whole.len),
            (whole.region.len(), whole.len),
            (u64::MAX - 63, whole.len),
            (whole.len - 64, whole.len),
        ] {
            let mut part = whole.clone();
            (part.offset, part.len) = (offset, len);
            assert!(
                matches!(world.open_with(part), Err(RingError::Inflight(_))),
                "{packed} {offset} {len}"
            );
        }
    }
}

/// Anything at all in the region, before the start and while it works: no panic, and an end.
#[test]
fn b05_noise() {
    for packed in [false, true] {
        for seed in 0..times(3000, 300_000) {
            let mut chance = Chance::new(seed);
            let mut world = orphaned(packed);
            let len = queue_len(8);
            let noise = |world: &World, chance: &mut Chance| {
                for _ in 0..1 + chance.below(4) {
                    let at = chance.below(len);
                    // Mostly small numbers: those are the ones that mean something.
                    let byte = match chance.below(3) {
                        0 => chance.below(256) as u8,
                        _ => chance.below(10) as u8,
                    };
                    poke(world, at, &[byte]);
                }
            };
            noise(&world, &mut chance);
            let ended = live(None, || {
                let mut ring = world.open()?;
                let mut chains = Vec::new();
                for _ in 0..32 {
                    noise(&world, &mut chance);
                    let mut chain = crate::Chain::default();
                    if ring.pop(&mut chain)? != crate::Pop::Empty {
                        chains.push(chain);
                    }
                    if chance.percent(50)
                        && let Some(chain) = chains.pop()
                    {
                        ring.complete(&chain, 0);
                    }
                    if chance.percent(50) {
                        ring.publish();
                    }
                    if chance.percent(10) {
                        world.submit(&mut chance, 1);
                    }
                }
                Ok(())
            });
            assert!(!matches!(ended, Err(Ended::Killed)));
        }
    }
}
