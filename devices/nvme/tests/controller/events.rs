//! Doorbells by descriptor: the value is stored in shared memory, and an event signalled, as a hypervisor's kernel does.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd};

use bluff_nvme_host::spec::register as reg;
use bluff_nvme_host::verify::{Shape, Traffic};
use bluff_nvme_host::{Bar, Command};
use bluff_reactor::Poll;
use bluff_testing::{Chance, times};
use bluff_vfio_client::{Event, IoEventFd, Mapped};

use crate::rig::*;

const SIZE: u64 = 1 << 20;
/// Those whose queues sleep.
const SLEEPERS: [Poll; 2] = [ADAPTIVE, Poll::Never];

/// Verified traffic, also with shadow doorbells, and not one message.
#[test]
fn doorbells_by_descriptor_are_no_messages() {
    for poll in SLEEPERS {
        for (reactors, queues) in [(1, 1), (2, 2), (2, 20)] {
            let card = Card::new(poll, reactors);
            let volumes = [card.ram(512, SIZE)];
            let port = card.port("port", 2 * queues);
            let mut host = port.host().by_events();
            host.enable_with_event();
            // Submission queues whose worker is on another reactor than their event, too.
            let mut traffic = host.traffic(queues, 2, true, &volumes, Shape::default());
            for shadow in [false, true] {
                if shadow {
                    let mut queues = traffic.into_queues();
                    let mut all: Vec<_> = queues.iter_mut().collect();
                    host.controller.shadow_doorbells(&mut all).unwrap();
                    traffic =
                        Traffic::new(queues, &volumes, &host.memory, Shape::default()).unwrap();
                }
                let before = host.client.sent();
                traffic.run(times(1000, 50_000), 16, PATIENCE).unwrap();
                traffic.verify(PATIENCE).unwrap();
                assert_eq!(host.client.sent(), before, "{poll:?} {queues} {shadow}");
            }
            for queues in traffic.into_queues() {
                host.controller.delete_queues(queues).unwrap();
            }
            host.controller.shut_down(false).unwrap();
        }
    }
}

/// One command at a time, with everything asleep before it, and in the moment in which it goes to sleep.
#[test]
fn no_wake_up_is_lost() {
    for poll in SLEEPERS {
        for shadow in [false, true] {
            let card = Card::new(poll, 2);
            card.ram(512, SIZE);
            let port = card.port("port", 4);
            let mut host = port.host().by_events();
            host.enable_with_event();
            let mut queues = host.queues(2, 2, 3, true);
            if shadow {
                let mut all: Vec<_> = queues.iter_mut().collect();
                host.controller.shadow_doorbells(&mut all).unwrap();
            }
            let before = host.client.sent();
            for round in 0..times(600, 100_000) {
                // Entries are taken again at once, so the head's doorbell matters as well.
                let (queue, sq) = (round as usize % 2, round as usize / 2 % 2);
                if round % 3 == 0 {
                    card.sleep();
                }
                let command = Command::flush(1);
                queues[queue].run(sq, &command, PATIENCE).unwrap();
            }
            assert_eq!(host.client.sent(), before);
        }
    }
}

/// A completion queue that is full, until its host reads on: that is told by an event, too.
#[test]
fn a_full_completion_queue_goes_on() {
    for poll in SLEEPERS {
        let card = Card::new(poll, 1);
        card.ram(512, SIZE);
        let port = card.port("port", 2);
        let mut host = port.host().by_events();
        host.enable();
        // Of two numbers, which have two events: the head's is not the tail's.
        let cq = host.controller.create_cq(2, 4, None).unwrap();
        let sq = host.controller.create_sq(1, 64, 2).unwrap();
        let bar = host.controller.bar().clone();
        let mut queues = bluff_nvme_host::Queues::new(&bar, cq, vec![sq]);
        for _ in 0..50 {
            queues.submit(0, &Command::flush(1)).unwrap();
        }
        queues.ring().unwrap();
        let mut found = 0;
        while found < 50 {
            card.sleep();
            until(|| queues.cq.is_ready());
            while queues.poll().unwrap().is_some() {
                found += 1;
            }
            queues.ring().unwrap();
        }
    }
}

#[test]
fn doorbells_by_descriptor_go_through_resets() {
    for poll in SLEEPERS {
        let card = Card::new(poll, 2);
        let volumes = [card.ram(512, SIZE)];
        let port = card.port("port", 4);
        let mut host = port.host().by_events();
        for reset in 0..5 {
            host.enable_with_event();
            let mut traffic = host.traffic(2, 2, true, &volumes, Shape::default());
            let before = host.client.sent();
            traffic.run(200, 16, PATIENCE).unwrap();
            traffic.settle(PATIENCE).unwrap();
            assert_eq!(host.client.sent(), before, "{poll:?}, {reset}");
            match reset {
                0 => host.controller.disable().unwrap(),
                1 => host.controller.subsystem_reset().unwrap(),
                2 => host.pci.function_level_reset().unwrap(),
                3 => host.client.reset().unwrap(),
                _ => {
                    traffic.verify(PATIENCE).unwrap();
                    break;
                }
            }
            if reset == 1 {
                host.controller
                    .bar()
                    .write32(reg::CSTS, reg::NSSRO)
                    .unwrap();
            }
            traffic.abandon();
            host.controller.forget();
            // What was asked for before goes on: a hypervisor does not ask again. Values of before mean nothing.
            if reset >= 2 {
                host.pci.enable().unwrap();
                host.vectors = host.msix.enable(host.vectors.len() as u16).unwrap();
            }
        }
    }
}

/// The events' numbers in the kernel.
fn numbers(all: &[IoEventFd]) -> BTreeSet<u64> {
    let of = |io: &IoEventFd| number(&io.file.as_raw_fd().to_string()).expect("an eventfd");
    all.iter().map(of).collect()
}

fn number(fd: &str) -> Option<u64> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?;
    let line = info.lines().find_map(|l| l.strip_prefix("eventfd-id:"))?;
    line.trim().parse().ok()
}

fn is_open(numbers: &BTreeSet<u64>) -> bool {
    let all = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let mut all = all.filter_map(|fd| number(&fd.file_name().to_string_lossy()));
    all.any(|n| numbers.contains(&n))
}

#[test]
fn events_are_few_and_go_with_the_session() {
    let card = Card::shared(Poll::Never, 2);
    for (queues, events, offered) in [(1, 1, 1), (15, 14, 15), (64, 14, 64), (1023, 14, 256)] {
        let port = card.port(&format!("port{queues}"), queues);
        let client = port.host().client;
        let all = client.io_event_fds(0).unwrap();
        let mut places: Vec<_> = all.iter().map(|io| io.offset).collect();
        places.sort_unstable();
        // I/O queues' alone, of both kinds.
        let want: Vec<_> = (0..2 * offered).map(|i| 0x1008 + 4 * i).collect();
        assert_eq!(places, want);
        assert!(all.iter().all(|io| io.size == 4 && io.value.is_none()));
        // None loses its value.
        assert!(all.iter().all(|io| io.store.is_some()));
        let found = numbers(&all);
        assert_eq!(found.len(), events);
        for _ in 0..100 {
            let again = client.io_event_fds(0).unwrap();
            assert_eq!(numbers(&again), found, "no others");
        }
        assert!(client.io_event_fds(4).unwrap().is_empty());
        drop((all, client));
        port.gone();
        until(|| !is_open(&found));
    }
}

#[test]
fn doorbells_that_are_polled_have_no_events() {
    let card = Card::new(Poll::Always, 1);
    let port = card.port("port", 4);
    assert!(port.host().client.io_event_fds(0).unwrap().is_empty());
}

/// A host that keeps its events and the memory beyond its end is nobody to the next one.
#[test]
fn d02_events_of_a_host_that_has_gone() {
    let card = Card::new(Poll::Never, 1);
    let volumes = [card.ram(512, SIZE)];
    let port = card.port("port", 4);
    let mut host = port.host().by_events();
    host.enable();
    let mut traffic = host.traffic(1, 1, true, &volumes, Shape::default());
    traffic.run(100, 16, PATIENCE).unwrap();
    traffic.settle(PATIENCE).unwrap();
    let kept = host.client.io_event_fds(0).unwrap();
    traffic.abandon();
    drop(host);
    port.gone();

    let mut host = port.host().by_events();
    host.enable();
    // Two submission queues of one completion queue: one has an entry that was not rung.
    let bar = host.controller.bar().clone();
    let vector = Some((1, host.vectors[1].clone()));
    let cq = host.controller.create_cq(1, 16, vector).unwrap();
    let mut unrung = host.controller.create_sq(1, 16, 1).unwrap();
    let sq = host.controller.create_sq(2, 16, 1).unwrap();
    let mut queues = bluff_nvme_host::Queues::new(&bar, cq, vec![sq]);
    unrung.push(&Command::flush(1).cid(7));
    let store = kept[0].store.as_ref().unwrap();
    let memory = Mapped::new(store.file.as_fd(), 0, 8192, true).unwrap();
    for at in (4096..8192).step_by(4) {
        memory.store32(at, 1);
    }
    for io in &kept {
        Event::from(io.file.try_clone().unwrap()).signal();
    }
    for _ in 0..20 {
        let done = queues.run(0, &Command::flush(1), PATIENCE).unwrap();
        assert_eq!(done.sq, 2, "the entry was taken that was not rung");
    }
    // Now it is.
    bar.doorbell(unrung.doorbell(), 1).unwrap();
    until(|| queues.cq.is_ready());
    let entry = queues.cq.pop().unwrap();
    assert_eq!((entry.sq, entry.cid), (1, 7));
}

/// Signals and values at will, before there are queues and while they run, by a host that blocks and drains what it was given.
#[test]
fn d02_events_at_will() {
    for poll in SLEEPERS {
        let card = Card::shared(poll, 1);
        let volumes = [card.ram(512, SIZE)];
        let own = [card.ram(512, SIZE)];
        let ports = [card.port("bad", 40), card.port("good", 4)];
        let mut bad = ports[0].host().by_events();
        let mut good = ports[1].host().by_events();
        good.enable();
        let mut beside = good.traffic(1, 1, true, &volumes, Shape::default());
        let all = bad.client.io_event_fds(0).unwrap();
        let store = all[0].store.as_ref().unwrap();
        let memory = Mapped::new(store.file.as_fd(), 0, 8192, true).unwrap();
        let mut chance = Chance::new(1);
        for stage in 0..3 {
            let queues = (stage > 0).then(|| {
                bad.enable();
                bad.queues(2, 1, 16, false)
            });
            let events: Vec<_> = all
                .iter()
                .map(|io| Event::from(io.file.try_clone().unwrap()))
                .collect();
            for i in 0..times(3000, 200_000) {
                let at = 4096 + 4 * chance.below(1024) as usize;
                memory.store32(at, chance.word() as u32);
                events[chance.below(events.len() as u64) as usize].signal();
                if i % 7 == 0 {
                    events[chance.below(events.len() as u64) as usize].take();
                }
                if i % 100 == 0 {
                    beside.run(16, 16, PATIENCE).unwrap();
                }
            }
            if queues.is_some() {
                bad.controller.disable().unwrap();
                bad.controller.forget();
            }
        }
        beside.verify(PATIENCE).unwrap();
        // It can be used again as if nothing had been.
        bad.enable();
        let mut traffic = bad.traffic(2, 1, true, &own, Shape::default());
        traffic.run(200, 16, PATIENCE).unwrap();
        traffic.verify(PATIENCE).unwrap();
    }
}
