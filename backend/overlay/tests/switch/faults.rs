//! What an underlay does to a tunnel (row R23 of the list of faults): it loses, reorders, has another MTU, goes away, and the other card starts anew. Two stations talk all the while, on a clock of the
//! test's own, and each test states how long it takes until they are back.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use bluff_net::Cause;
use bluff_overlay::udp::TunnelKind;
use bluff_testing::Chance;

use crate::rig::*;
use crate::wire::{Card, addresses, card, pair};

/// After so long without an answer a station sends again.
const AGAIN: Duration = Duration::from_millis(50);
/// What a frame takes at least.
const FLIGHT: Duration = Duration::from_millis(1);
/// Frames that a station has under way.
const WINDOW: usize = 16;
/// Longer than anything takes.
const NEVER: Duration = Duration::from_secs(1000);

/// The link between two cards.
struct Line {
    chance: Chance,
    /// Of a hundred frames.
    loss: u64,
    /// By how much more than [`FLIGHT`] a frame may take, in microseconds.
    spread: u64,
    /// Bytes of the longest frame.
    longest: usize,
    /// By time and number: whether it goes to the second card, and its bytes.
    under_way: BTreeMap<(Duration, u64), (bool, Vec<u8>)>,
    number: u64,
    /// Frames that were lost, and those that came before one that was sent earlier.
    lost: u64,
    overtaken: u64,
}

struct World {
    a: Card,
    b: Card,
    one: Station,
    two: Station,
    line: Line,
    start: Instant,
    now: Duration,
    latest: u64,
}

fn message(word: &[u8; 4], number: u32, len: usize) -> Vec<u8> {
    let mut bytes = [&word[..], &number.to_be_bytes()].concat();
    bytes.extend((0..len).map(|i| (i as u32 * 7 + number) as u8));
    bytes
}

impl World {
    fn new(v6: bool, seed: u64) -> Self {
        let (mut a, mut b) = pair(TunnelKind::Vxlan, v6);
        let (one, two) = (a.rig.station(1), b.rig.station(2));
        Self {
            line: Line {
                chance: Chance::new(seed),
                loss: 0,
                spread: 0,
                longest: usize::MAX,
                under_way: BTreeMap::new(),
                number: 0,
                lost: 0,
                overtaken: 0,
            },
            start: a.rig.now,
            now: Duration::ZERO,
            latest: 0,
            a,
            b,
            one,
            two,
        }
    }

    /// Puts what the cards have sent on the line.
    fn load(&mut self) {
        for (to_b, card) in [(true, &self.a), (false, &self.b)] {
            for frame in card.out.try_iter() {
                let line = &mut self.line;
                line.number += 1;
                if line.chance.percent(line.loss) || frame.len() > line.longest {
                    line.lost += 1;
                    continue;
                }
                let more = match line.spread {
                    0 => 0,
                    spread => line.chance.below(spread),
                };
                let at = self.now + FLIGHT + Duration::from_micros(more);
                line.under_way.insert((at, line.number), (to_b, frame));
            }
        }
    }

    /// Lets time pass up to `until`, or to what arrives before.
    fn pass(&mut self, until: Duration) {
        self.load();
        let next = self.line.under_way.first_key_value().map(|(at, _)| at.0);
        self.now = next.map_or(until, |at| at.min(until));
        while let Some(entry) = self.line.under_way.first_entry()
            && entry.key().0 <= self.now
        {
            let ((_, number), (to_b, frame)) = entry.remove_entry();
            self.line.overtaken += u64::from(number < self.latest);
            self.latest = self.latest.max(number);
            let to = if to_b { &mut self.b } else { &mut self.a };
            send(&mut *to.lane, self.start + self.now, &[&frame], None);
        }
    }

    /// The first station sends so many messages to the second, which answers each; what is not answered is sent again. Says how long it took.
    fn transfer(&mut self, count: u32, len: usize) -> Duration {
        let begin = self.now;
        let mut left: BTreeSet<u32> = (0..count).collect();
        let mut sent: BTreeMap<u32, Duration> = BTreeMap::new();
        while !left.is_empty() {
            assert!(
                self.now - begin < NEVER,
                "{} of {count} are left",
                left.len()
            );
            (self.one.now, self.two.now) = (self.start + self.now, self.start + self.now);
            for number in left.iter().copied().take(WINDOW) {
                let due = sent.get(&number).is_none_or(|at| *at + AGAIN <= self.now);
                if due {
                    sent.insert(number, self.now);
                    let bytes = message(b"\x88\xb5to", number, len);
                    let frame = [&mac(2).0[..], &mac(1).0, &bytes].concat();
                    self.one.send(&frame);
                }
            }
            let next = left
                .iter()
                .filter_map(|n| Some(*sent.get(n)? + AGAIN))
                .min();
            self.pass(next.unwrap_or(self.now + AGAIN));
            (self.one.now, self.two.now) = (self.start + self.now, self.start + self.now);
            for frame in self.two.got() {
                let number = number_of(&frame);
                assert_eq!(frame[12..], message(b"\x88\xb5to", number, len), "whole");
                let bytes = message(b"\x88\xb5ok", number, 0);
                let answer = [&mac(1).0[..], &mac(2).0, &bytes].concat();
                self.two.send(&answer);
            }
            for frame in self.one.got() {
                let number = number_of(&frame);
                assert_eq!(frame[12..], message(b"\x88\xb5ok", number, 0));
                left.remove(&number);
            }
        }
        self.now - begin
    }

    /// Nobody says anything for so long.
    fn rest(&mut self, span: Duration) {
        let end = self.now + span;
        while self.now < end {
            self.pass(end);
        }
        self.one.got();
        self.two.got();
    }
}

fn number_of(frame: &[u8]) -> u32 {
    u32::from_be_bytes(frame[16..20].try_into().unwrap())
}

/// A message and its answer, once the cards know each other's addresses.
const ROUND: Duration = Duration::from_millis(2);
/// The cards ask for each other's address first: a message and an answer are lost, and sent again.
const FIND: Duration = Duration::from_millis(2 * 50 + 6);

#[test]
fn r23_loss_and_reordering() {
    for v6 in [false, true] {
        for (loss, spread, within_ms) in [
            (0, 0, 150),
            (0, 20_000, 1000),
            (5, 5000, 2000),
            (30, 20_000, 8000),
        ] {
            let mut world = World::new(v6, loss + spread);
            assert!(world.transfer(1, 100) <= FIND);
            (world.line.loss, world.line.spread) = (loss, spread);
            let took = world.transfer(300, 900);
            let what = format!("{v6} {loss} {spread}: {took:?}");
            assert!(took <= Duration::from_millis(within_ms), "{what}");
            assert_eq!(world.line.lost > 0, loss > 0, "{what}");
            assert_eq!(world.line.overtaken > 0, spread > 0, "{what}");
            // As soon as the line is good again, so are they.
            (world.line.loss, world.line.spread) = (0, 0);
            world.rest(Duration::from_secs(1));
            assert_eq!(world.transfer(1, 900), ROUND, "{what}");
        }
    }
}

/// For seconds nobody notices afterwards; after minutes the cards find each other again.
#[test]
fn r23_the_link_is_away() {
    let second = Duration::from_secs(1);
    for (away, back) in [
        (second, ROUND),
        (20 * second, ROUND),
        (100 * second, ROUND),
        (200 * second, FIND),
    ] {
        let mut world = World::new(false, 1);
        world.transfer(1, 100);
        world.line.loss = 100;
        let frame = plain(mac(2), mac(1), b"into nothing");
        let end = world.now + away;
        while world.now < end {
            world.one.now = world.start + world.now;
            world.one.send(&frame);
            world.rest(second);
        }
        world.line.loss = 0;
        // Questions are half a second apart, and the last one was lost.
        let back = if away > 30 * second {
            back + second / 2
        } else {
            back
        };
        let took = world.transfer(1, 100);
        assert!(took <= back, "{away:?}: {took:?}");
    }
}

#[test]
fn r23_frames_that_the_path_does_not_take() {
    let mut world = World::new(false, 2);
    world.transfer(1, 100);
    // The path takes 200 bytes less than the cards were told. What is longer vanishes on it, and nothing else does.
    world.line.longest = 1400;
    let long = plain(mac(2), mac(1), &[1; 1400]);
    for _ in 0..20 {
        world.one.send(&long);
    }
    assert_eq!(world.transfer(20, 1000), 2 * ROUND);
    assert_eq!(world.line.lost, 20);
    world.line.longest = usize::MAX;
    assert_eq!(world.transfer(1, 1400), ROUND);
    // What the network was told is not sent at all, and counted; of IP packets the sender is told, which has tests of its own.
    let dropped = |world: &World| world.one.port.sent().get(Cause::TooLong);
    let before = dropped(&world);
    world.one.send(&plain(mac(2), mac(1), &[1; 1451]));
    assert_eq!(dropped(&world), before + 1);
    assert_eq!(world.transfer(1, 1400), ROUND);
}

/// The other card starts anew, and knows nothing.
#[test]
fn r23_the_peer_restarts() {
    let [here, there] = addresses(false);
    let restart = |world: &mut World, n: u8| {
        world.b = card(n, there, &[here], TunnelKind::Vxlan, 1600);
        world.two = world.b.rig.station(2);
    };
    let mut world = World::new(false, 3);
    world.transfer(1, 100);
    for _ in 0..3 {
        restart(&mut world, 2);
        // It has to find the first card, which knows it still.
        assert!(world.transfer(1, 100) <= FIND);
        assert_eq!(world.transfer(1, 100), ROUND);
    }
    // With another address on the link, it is found when it asks, which it does when it has something to say.
    restart(&mut world, 3);
    world.two.now = world.start + world.now;
    world.two.send(&plain(mac(1), mac(2), b"hello"));
    world.rest(4 * FLIGHT);
    assert!(world.transfer(1, 100) <= FIND);
    // If it is silent, when the first card asks again: 30 s after it last did.
    restart(&mut world, 4);
    let took = world.transfer(1, 100);
    let asked_again = Duration::from_secs(30) + FIND + AGAIN;
    assert!(
        took > Duration::from_secs(20) && took <= asked_again,
        "{took:?}"
    );
    assert_eq!(world.transfer(1, 100), ROUND);
}
