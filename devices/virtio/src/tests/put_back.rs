//! Chains that are put back: the ring is as if they had never been popped.

use bluff_testing::{Chance, times};

use super::rig::{Shape, World};
use crate::{Chain, Pop, Position, Ring};

/// The request that a chain stands for.
fn token(chain: &mut Chain) -> u64 {
    let mut bytes = [0; 8];
    // Its first descriptor, or a part of it: what is taken off comes back with the chain.
    assert_eq!(chain.read_front(&mut bytes), 8);
    u64::from_le_bytes(bytes)
}

fn pop(ring: &mut dyn Ring) -> Option<(u64, Chain)> {
    let mut chain = Chain::default();
    match ring.pop(&mut chain).expect("the driver breaks no rule") {
        Pop::Chain => Some((token(&mut chain), chain)),
        Pop::Empty => None,
        Pop::Bad(e) => panic!("a good chain was called bad: {e}"),
    }
}

#[test]
fn chains_are_put_back_and_popped_again() {
    for seed in 0..times(60, 3000) as u64 {
        for (packed, sizes) in [(false, [1, 8, 64]), (true, [1, 7, 64])] {
            for in_order in [false, true] {
                let size = sizes[seed as usize % 3];
                script(
                    &mut Chance::new(seed),
                    Shape {
                        packed,
                        in_order,
                        size,
                    },
                );
            }
        }
    }
}

fn script(chance: &mut Chance, shape: Shape) {
    let mut world = World::new(shape);
    let mut ring = world.open_at(Position::START, None).unwrap();
    let mut done = 0;
    for _ in 0..40 {
        // One that fits into any ring.
        let n = 1 + chance.below(6);
        for _ in 0..n {
            if !world.submit_chain(0, 1, true) {
                break;
            }
        }
        world.driver.publish();
        let most = 1 + chance.below(8);
        let mut held: Vec<_> = std::iter::from_fn(|| pop(&mut *ring))
            .take(most as usize)
            .collect();
        let mut back = Vec::new();
        for _ in 0..chance.below(held.len() as u64 + 1) {
            let (token, chain) = held.pop().expect("so many");
            ring.put_back(&chain);
            back.push(token);
        }
        if held.is_empty() && chance.percent(50) {
            // A stop, and another life: nothing is in flight, and nothing is lost.
            assert_eq!(ring.position().in_flight, 0);
            let position = ring.position().position;
            ring = world.open_at(position, None).unwrap();
        }
        while let Some(token) = back.pop() {
            let (again, chain) = pop(&mut *ring).expect("it is there again");
            assert_eq!(again, token, "in the same order");
            held.push((again, chain));
        }
        for (_, mut chain) in held {
            assert!(chain.take_status());
            chain.set_status(0);
            ring.complete(&chain, 1);
        }
        ring.publish();
        done += world.reap();
    }
    assert!(done > 0);
    assert_eq!(ring.position().in_flight, 0);
}

/// Fronts of any length, over any pieces, and what is left after them.
#[test]
fn fronts_are_read_in_portions() {
    let mut world = World::new(Shape {
        packed: false,
        in_order: false,
        size: 16,
    });
    let mut ring = world.open_at(Position::START, None).unwrap();
    for portion in 1..14 {
        // Eight bytes, and then four descriptors of one each.
        assert!(world.submit_chain(4, 1, false));
        world.driver.publish();
        let mut chain = Chain::default();
        assert_eq!(ring.pop(&mut chain).unwrap(), Pop::Chain);
        let mut all = Vec::new();
        loop {
            let mut bytes = vec![0; portion];
            let n = chain.read_front(&mut bytes);
            all.extend_from_slice(&bytes[..n]);
            let left: usize = chain.readable().iter().map(|v| v.len()).sum();
            assert_eq!(all.len() + left, 12);
            if n < portion {
                break;
            }
        }
        assert_eq!(all.len(), 12);
        assert_eq!(all[..8], (portion as u64 - 1).to_le_bytes());
        assert!(chain.take_status());
        chain.set_status(0);
        ring.complete(&chain, 1);
        ring.publish();
        assert_eq!(world.reap(), 1);
    }
}
