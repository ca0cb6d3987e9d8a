//! The daemon, or its data half, is killed under load (R1, R3), and so is the front end with it (R4).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bluff_testing::{Chance, times};

use crate::support::LIMIT;
use crate::support::checker::{BLOCK, Checker};
use crate::support::daemon::{Daemon, Place};
use crate::support::guest::{Guest, Shape};

/// Blocks of the volume.
const BLOCKS: u64 = 1024;
/// Completions come late, and not in order.
const OUT_OF_ORDER: &str = r#"[
    { kind = "delay", read = "100us", write = "200us", flush = "100us", write_zeroes = "100us", jitter = "3ms" },
]"#;

fn place(victim: Victim) -> Place {
    Place::with_disk_and_card(BLOCKS * BLOCK as u64, OUT_OF_ORDER, victim.card())
}

/// What is killed.
#[derive(Clone, Copy)]
enum Victim {
    /// All of the daemon: its socket closes, and the front end connects to the next one.
    Daemon,
    /// The process of its data half: another takes the session up, and the front end sees nothing.
    DataHalf,
}

impl Victim {
    /// How the card is told to run.
    fn card(self) -> &'static str {
        match self {
            Self::Daemon => "",
            Self::DataHalf => "data = \"process\"",
        }
    }

    /// Kills it at any moment of the load, and says when.
    fn kill_under_load(
        self,
        daemon: &mut Daemon,
        guest: &mut Guest,
        checker: &mut Checker,
        completions: u64,
        depth: u16,
    ) -> Instant {
        let over = AtomicBool::new(false);
        let victim = &*daemon;
        std::thread::scope(|s| {
            // It sleeps until then: one that looks all the time would slow the load down on a machine of few CPUs.
            let (now, when) = mpsc::channel::<()>();
            let (killed, over) = (s.spawn(|| self.kill_when(victim, when, &over)), &over);
            let mut now = Some(now);
            let (mut done, mut progress) = (0, Instant::now());
            while !over.load(Ordering::Acquire) {
                guest.fill(checker, depth);
                let taken = guest.take(checker);
                done += taken;
                if taken > 0 {
                    progress = Instant::now();
                }
                if done >= completions {
                    now = None;
                }
                guest.wait(Duration::from_millis(1));
                let hangs = now.is_some() && progress.elapsed() > LIMIT;
                assert!(
                    !hangs,
                    "{} requests are in flight, {} of them in the daemon, whose threads are\n{}",
                    guest.in_flight(),
                    victim.in_flight("blk0"),
                    victim.threads()
                );
            }
            killed.join().unwrap()
        })
    }

    /// Kills when the other end of the channel is dropped, for whatever reason, and says when that was.
    fn kill_when(self, daemon: &Daemon, when: mpsc::Receiver<()>, over: &AtomicBool) -> Instant {
        let _ = when.recv();
        let at = Instant::now();
        match self {
            Self::Daemon => daemon.kill_at_once(),
            Self::DataHalf => daemon.kill_data_half(),
        }
        over.store(true, Ordering::Release);
        at
    }

    /// Brings the guest back to where it can go on.
    fn recover(self, place: &Place, daemon: &mut Daemon, guest: &mut Guest, checker: &mut Checker) {
        match self {
            Self::Daemon => {
                daemon.kill();
                guest.take(checker);
                *daemon = place.start();
                guest.reconnect(&place.socket("blk0")).unwrap();
                guest.recover_queues().unwrap();
            }
            // Nothing to do, which is the point.
            Self::DataHalf => {}
        }
    }
}

/// How long the guest waited, each time.
struct Gaps(Vec<Duration>);

impl Gaps {
    fn print(mut self, what: &str) {
        self.0.sort_unstable();
        println!(
            "{what}: {} kills; from kill to first completion {:?} (median), {:?} (longest)",
            self.0.len(),
            self.0[self.0.len() / 2],
            self.0[self.0.len() - 1]
        );
    }
}

fn kill_again_and_again(victim: Victim, shape: Shape, kills: usize) {
    let place = place(victim);
    let mut daemon = place.start();
    let mut guest = Guest::start(&place.socket("blk0"), shape);
    let mut checker = Checker::new(BLOCKS);
    let mut chance = Chance::new(11);
    let (mut gaps, mut cut) = (Gaps(Vec::new()), 0);
    for _ in 0..kills {
        let depth = [1, 8, 32, 32, 32, 32, 128][chance.below(7) as usize];
        let completions = 20 + chance.below(400);
        let killed =
            victim.kill_under_load(&mut daemon, &mut guest, &mut checker, completions, depth);
        victim.recover(&place, &mut daemon, &mut guest, &mut checker);
        // What the driver could see already is no sign of life.
        cut += guest.in_flight();
        if guest.in_flight() == 0 {
            guest.fill(&mut checker, depth);
        }
        guest.take_some(&mut checker);
        gaps.0.push(killed.elapsed());
        if chance.below(8) == 0 {
            // Every one of them, without new ones that would wake the queue.
            guest.settle(&mut checker);
        }
    }
    assert!(
        cut >= kills,
        "only {cut} requests were in flight at all kills together"
    );
    guest.run(&mut checker, 200, 32);
    guest.verify(&mut checker);
    assert_eq!(checker.tally.errors, 0);
    println!("{:?}, {cut} of them in flight at a kill", checker.tally);
    gaps.print(if shape.packed {
        "packed ring"
    } else {
        "split ring"
    });
    drop(guest);
    daemon.terminate();
}

#[test]
fn r01_kill_minus_9_under_load_split() {
    kill_again_and_again(Victim::Daemon, Shape::SPLIT, times(10, 200));
}

#[test]
fn r01_kill_minus_9_under_load_packed() {
    kill_again_and_again(Victim::Daemon, Shape::PACKED, times(10, 200));
}

#[test]
fn r01_kill_minus_9_under_load_with_indirect_descriptors_and_flags_only() {
    for shape in Shape::BOTH {
        let shape = Shape {
            event_idx: false,
            indirect: true,
            queues: 1,
            ..shape
        };
        kill_again_and_again(Victim::Daemon, shape, times(3, 100));
    }
}

#[test]
fn r01_kill_minus_9_of_the_data_half_under_load_split() {
    kill_again_and_again(Victim::DataHalf, Shape::SPLIT, times(10, 200));
}

#[test]
fn r01_kill_minus_9_of_the_data_half_under_load_packed_unrecorded() {
    let shape = Shape::PACKED.without_inflight();
    kill_again_and_again(Victim::DataHalf, shape, times(10, 200));
}

/// Where a recovery is cut short.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// As soon as it can be connected to.
    Listens,
    /// Somewhere in the setup.
    SetsUp,
    /// When the memory is shared.
    Connected,
    /// When the queues have just been started.
    Started,
    /// When so many requests have come back.
    Completed(u64),
}

impl Moment {
    fn any(chance: &mut Chance) -> Self {
        match chance.below(5) {
            0 => Self::Listens,
            1 => Self::SetsUp,
            2 => Self::Connected,
            3 => Self::Started,
            _ => Self::Completed(1 + chance.below(20)),
        }
    }

    /// Recovers as far as this moment, and kills.
    fn cut(self, place: &Place, guest: &mut Guest, checker: &mut Checker, chance: &mut Chance) {
        let socket = place.socket("blk0");
        let mut daemon = place.start();
        match self {
            Self::Listens => {}
            Self::SetsUp => {
                let spins = chance.below(1 << 16);
                let started = AtomicBool::new(false);
                std::thread::scope(|s| {
                    s.spawn(|| {
                        while !started.load(Ordering::Acquire) {
                            std::hint::spin_loop();
                        }
                        (0..spins).for_each(|_| std::hint::spin_loop());
                        daemon.kill();
                    });
                    started.store(true, Ordering::Release);
                    // It fails at some message, unless it was faster.
                    let _ = guest
                        .reconnect(&socket)
                        .and_then(|()| guest.recover_queues());
                });
            }
            Self::Connected => guest.reconnect(&socket).unwrap(),
            Self::Started | Self::Completed(_) => {
                guest.reconnect(&socket).unwrap();
                guest.recover_queues().unwrap();
            }
        }
        if let Self::Completed(count) = self {
            guest.run(checker, count, 16);
        }
        daemon.kill();
        guest.take(checker);
    }
}

fn killed_during_recovery(shape: Shape, kills: usize) {
    let place = place(Victim::Daemon);
    let mut daemon = place.start();
    let mut guest = Guest::start(&place.socket("blk0"), shape);
    let mut checker = Checker::new(BLOCKS);
    let mut chance = Chance::new(23);
    for _ in 0..kills {
        Victim::Daemon.kill_under_load(&mut daemon, &mut guest, &mut checker, 50, 32);
        daemon.kill();
        guest.take(&mut checker);
        for _ in 0..1 + chance.below(3) {
            let moment = Moment::any(&mut chance);
            moment.cut(&place, &mut guest, &mut checker, &mut chance);
        }
        Victim::Daemon.recover(&place, &mut daemon, &mut guest, &mut checker);
        guest.run(&mut checker, 50, 32);
    }
    guest.verify(&mut checker);
    assert_eq!(checker.tally.errors, 0);
}

#[test]
fn r03_killed_again_during_recovery_split() {
    killed_during_recovery(Shape::SPLIT, times(5, 60));
}

#[test]
fn r03_killed_again_during_recovery_packed() {
    killed_during_recovery(Shape::PACKED, times(5, 60));
}

#[test]
fn r04_front_end_and_daemon_both_die() {
    let place = place(Victim::Daemon);
    let mut checker = Checker::new(BLOCKS);
    for round in 0..times(4, 50) {
        let mut daemon = place.start();
        let mut guest = Guest::start(&place.socket("blk0"), Shape::BOTH[round % 2]);
        guest.verify(&mut checker);
        guest.run(&mut checker, 200, 32);
        if round % 2 == 0 {
            drop(guest);
            daemon.kill();
        } else {
            daemon.kill();
            drop(guest);
        }
        checker.abandon();
    }
    let daemon = place.start();
    let mut guest = Guest::start(&place.socket("blk0"), Shape::SPLIT);
    guest.verify(&mut checker);
    drop(guest);
    daemon.terminate();
}
