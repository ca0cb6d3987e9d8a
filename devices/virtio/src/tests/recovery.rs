//! Fault list R2, R3: the process is killed at any step of tracking, and the next one goes on from the region.

use bluff_testing::{Chance, times};

use super::rig::{Device, Ended, Shape, World, live};
use crate::inflight::Step;

const STEPS: [Step; 5] = [
    Step::BeforeEntry,
    Step::AfterEntry,
    Step::BeforeUsed,
    Step::AfterUsed,
    Step::Settled,
];

/// One life of a device, of up to `turns` turns; the driver works beside it.
fn life(world: &mut World, chance: &mut Chance, turns: u64) -> Result<(), crate::RingError> {
    let mut device = Device::new(world.open()?);
    for _ in 0..turns {
        let n = chance.below(4);
        world.submit(chance, n);
        device.take(world, chance.below(4))?;
        let n = chance.below(4);
        device.finish(chance, n);
        if chance.percent(60) {
            world.reap();
        }
    }
    Ok(())
}

/// The last life: it finishes whatever is there.
fn last_life(world: &mut World, chance: &mut Chance) {
    let mut device = Device::new(world.open().expect("the region is sound"));
    for _ in 0..10_000 {
        if world.waiting.is_empty() {
            return;
        }
        device.take(world, 3).expect("the ring is sound");
        device.finish(chance, 2);
        world.reap();
    }
    panic!(
        "{} requests were never completed: {:?}",
        world.waiting.len(),
        world.waiting
    );
}

fn killed(result: Result<(), Ended>) -> bool {
    match result {
        Ok(()) => false,
        Err(Ended::Killed) => true,
        Err(Ended::Broken(e)) => panic!("the ring is sound, and was called broken: {e}"),
    }
}

/// Many lives on one ring, each ended at some step, some of them while it recovers.
fn many_lives(packed: bool, in_order: bool, seed: u64, pick: impl Fn(&mut Chance) -> (Step, u32)) {
    let mut chance = Chance::new(seed);
    // Packed rings have any size.
    let size = match packed {
        true => 3 + chance.below(14) as u16,
        false => 4 << chance.below(3),
    };
    let shape = Shape {
        packed,
        in_order,
        size,
    };
    let mut world = World::new(shape);
    for _ in 0..times(10, 200) {
        let end = pick(&mut chance);
        killed(live(Some(end), || life(&mut world, &mut chance, 20)));
        // The driver goes on while there is no device.
        if chance.percent(50) {
            world.reap();
        }
        if chance.percent(50) {
            let n = chance.below(4);
            world.submit(&mut chance, n);
        }
        while chance.percent(30) {
            let end = (Step::Store, chance.below(u64::from(size) * 2) as u32);
            killed(live(Some(end), || world.open().map(drop)));
        }
    }
    last_life(&mut world, &mut chance);
    assert!(world.begun > 0);
}

fn named_steps(packed: bool) {
    for (s, &step) in STEPS.iter().enumerate() {
        for in_order in [false, true] {
            for seed in 0..times(20, 500) {
                many_lives(packed, in_order, seed << 8 | s as u64, |chance| {
                    (step, chance.below(12) as u32)
                });
            }
        }
    }
}

fn any_store(packed: bool) {
    for in_order in [false, true] {
        for seed in 0..times(100, 3000) {
            many_lives(packed, in_order, seed, |chance| {
                (Step::Store, chance.below(300) as u32)
            });
        }
    }
}

#[test]
fn r02_split_killed_at_each_step() {
    named_steps(false);
}

#[test]
fn r02_packed_killed_at_each_step() {
    named_steps(true);
}

#[test]
fn r02_split_killed_before_any_store() {
    any_store(false);
}

#[test]
fn r02_packed_killed_before_any_store() {
    any_store(true);
}

/// Every store of a short life, and every store of the recovery that follows: killed at each pair of them.
fn every_store_and_recovery(packed: bool) {
    for seed in 0..times(3, 40) {
        let in_order = seed % 4 == 3;
        // Short rings, so that they wrap and that a batch can be all of it.
        let size = if packed { 5 + (seed % 3) as u16 } else { 8 };
        let shape = Shape {
            packed,
            in_order,
            size,
        };
        let mut first = 0;
        loop {
            let mut second = 0;
            let mut reached = true;
            loop {
                let mut chance = Chance::new(seed);
                let mut world = World::new(shape);
                let end = Some((Step::Store, first));
                reached &= killed(live(end, || life(&mut world, &mut chance, 6)));
                let end = Some((Step::Store, second));
                let again = killed(live(end, || world.open().map(drop)));
                last_life(&mut world, &mut chance);
                // In CI not every pair, but each first and each second one.
                second += times(1 + first % 5, 1);
                if !again {
                    break;
                }
            }
            if !reached {
                break;
            }
            first += 1;
        }
        assert!(first > 20, "a life of {first} stores tests little");
    }
}

#[test]
fn r03_split_killed_again_during_recovery() {
    every_store_and_recovery(false);
}

#[test]
fn r03_packed_killed_again_during_recovery() {
    every_store_and_recovery(true);
}

/// What was completed before the death is not done again, whatever the order: checked here without
/// chance, with everything in flight and only the middle completed.
#[test]
fn r02_only_what_is_unfinished_is_done_again_in_order() {
    for packed in [false, true] {
        let shape = Shape {
            packed,
            in_order: false,
            size: 16,
        };
        let mut chance = Chance::new(1);
        let mut world = World::new(shape);
        let mut submitted = 0;
        while submitted == world.waiting.len() {
            world.submit(&mut chance, 1);
            submitted += 1;
        }
        let all = world.waiting.len() as u64;
        let result = live(None, || {
            let mut device = Device::new(world.open()?);
            device.take(&mut world, all)?;
            assert_eq!(device.busy() as u64, all);
            device.finish(&mut chance, all / 2);
            Ok(())
        });
        assert!(!killed(result));
        let done = world.reap();
        assert_eq!(done, all / 2);
        // The order itself is asserted by `take`.
        let begun = world.begun;
        last_life(&mut world, &mut chance);
        assert_eq!(world.begun - begun, all - done);
    }
}
