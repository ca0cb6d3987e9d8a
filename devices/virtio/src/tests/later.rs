//! Completions that are published at once, and told of later.

use bluff_testing::{Chance, times};

use super::rig::{Shape, World};
use crate::{Chain, Pop, Position, Ring};

/// A ring with a driver whose wishes are the same for the same seed.
struct Side {
    world: World,
    ring: Box<dyn Ring>,
    held: Vec<Chain>,
}

impl Side {
    fn new(shape: Shape) -> Self {
        let world = World::new(shape);
        let ring = world.open_at(Position::START, None).expect("a good ring");
        Self {
            world,
            ring,
            held: Vec::new(),
        }
    }

    fn submit(&mut self, n: u64) {
        for _ in 0..n {
            if !self.world.submit_chain(0, 1, true) {
                break;
            }
        }
        self.world.driver.publish();
        loop {
            let mut chain = Chain::default();
            match self.ring.pop(&mut chain).expect("a good driver") {
                Pop::Chain => self.held.push(chain),
                Pop::Empty => break,
                Pop::Bad(e) => panic!("a good chain was called bad: {e}"),
            }
        }
    }

    fn complete(&mut self) {
        let chain = self.held.remove(0);
        self.ring.complete(&chain, 1);
    }

    /// What the driver wishes from now on.
    fn wish(&mut self, wish: u64) {
        match wish {
            0 => self.world.driver.disable_interrupts(),
            n => drop(self.world.driver.enable_interrupts_after(n as u16)),
        }
    }
}

/// Whether the driver is told does not depend on how what was used was published, but on what it wishes when it is asked.
#[test]
fn one_answer_for_several_publications() {
    let (mut told, mut asked) = (0, 0);
    for seed in 0..times(200, 5000) as u64 {
        for packed in [false, true] {
            let mut chance = Chance::new(seed);
            let shape = Shape {
                packed,
                in_order: false,
                size: 16,
            };
            let (mut once, mut often) = (Side::new(shape), Side::new(shape));
            for _ in 0..20 {
                let (n, early, late) = (chance.below(6), chance.below(8), chance.below(8));
                for side in [&mut once, &mut often] {
                    side.submit(n);
                    side.wish(early);
                }
                let n = chance.below(1 + once.held.len() as u64);
                for _ in 0..n {
                    once.complete();
                    often.complete();
                    assert!(often.ring.publish_quietly());
                }
                assert!(!often.ring.publish_quietly(), "nothing more");
                for side in [&mut once, &mut often] {
                    side.wish(late);
                }
                if n > 0 {
                    let wanted = once.ring.publish();
                    assert_eq!(often.ring.wants_notification(), wanted, "seed {seed}");
                    (told, asked) = (told + u64::from(wanted), asked + 1);
                }
                for side in [&mut once, &mut often] {
                    while side
                        .world
                        .driver
                        .pop_used()
                        .expect("a good device")
                        .is_some()
                    {}
                }
            }
        }
    }
    assert!(told > asked / 10 && told < asked, "{told} of {asked}");
}
