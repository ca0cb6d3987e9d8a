//! Queues and doorbells: rounds, full ones, hostile ones, shadows, interrupts.

use std::sync::atomic::Ordering;
use std::time::Duration;

use bluff_memory::GuestMemory;
use bluff_pci::config::{Identity, MsixPlace};
use bluff_pci::{
    Bar, ConfigSpace, Device, Dma, Done, Function, Interrupt, PciFunction, Resources, Vector,
};
use bluff_reactor::{Notifier, Poll};
use bluff_testing::{Chance, times};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::fuzzing::host::{
    BASE, DATA, Host, LONG, OK, Plan, Queues, REGION, SHADOW, read, region, slow, status, write,
};
use crate::interrupt::{Coalescing, Signal, Wire};
use crate::namespace::Namespace;
use crate::queue::{Shadow, Side};
use crate::report::QueueEvent;
use crate::worker::Message;

fn host() -> Host {
    let (volume, _) = slow(1 << 20, |_| {});
    Host::new(vec![Namespace::new(1, volume, 9)])
}

/// Puts so many reads into a queue.
fn put(host: &mut Host, queues: &mut Queues, sq: usize, n: usize) -> Vec<u16> {
    (0..n)
        .map(|_| host.put(queues, sq, read(0, 1, DATA)))
        .collect()
}

#[test]
fn round_and_round() {
    let mut chance = Chance::new(1);
    for (sq_size, cq_size) in [(2, 2), (3, 5), (64, 63), (7, 64), (128, 9)] {
        let mut host = host();
        let plan = Plan {
            sq_size,
            cq_size,
            sqs: 2,
            ..Plan::default()
        };
        let mut queues = host.create(1, &plan);
        let mut open: Vec<(u16, u16)> = Vec::new();
        let mut heads = [0; 2];
        let mut done = 0;
        while done < times(500, 20_000) {
            for (sq, head) in heads.into_iter().enumerate() {
                let used = (queues.sqs[sq].tail + sq_size - head) % sq_size;
                let n = chance.below(u64::from(sq_size - used)) as usize;
                let qid = queues.sqs[sq].qid;
                open.extend(put(&mut host, &mut queues, sq, n).iter().map(|c| (qid, *c)));
                host.tell_tail(&queues, sq);
            }
            host.turns(chance.below(5) as usize);
            for entry in host.reap(&mut queues) {
                assert_eq!(status(&entry), OK);
                let key = (entry.sq_id.get(), entry.cid.get());
                let at = open.iter().position(|o| *o == key);
                open.swap_remove(at.expect("asked for once, and answered once"));
                heads[usize::from(key.0) - 1] = u32::from(entry.sq_head.get());
                done += 1;
            }
        }
    }
}

#[test]
fn c09_tails_past_the_size_are_told_and_ignored() {
    let mut host = host();
    let plan = Plan {
        sq_size: 8,
        ..Plan::default()
    };
    let mut queues = host.create(1, &plan);
    for value in [8, 9, 0xffff] {
        host.ring(&queues, 2, value);
        host.turns(5);
        assert_eq!(
            host.told(),
            [QueueEvent::InvalidDoorbell {
                qid: 1,
                side: Side::Tail,
                value: value as u16
            }]
        );
        // The same again is not told again, also where others are.
        host.ring(&queues, 2, value);
        host.turns(5);
        assert_eq!(host.told(), []);
        // It goes on where it was.
        put(&mut host, &mut queues, 0, 3);
        host.tell_tail(&queues, 0);
        host.turns(10);
        assert_eq!(host.reap(&mut queues).len(), 3);
    }
    // There is no such doorbell.
    assert_eq!(host.doorbells.ring(16 * 8, 0), None);
    assert_eq!(host.doorbells.ring(2, 0), None);
    assert_eq!(host.doorbells.ring(u64::MAX - 3, 0), None);
}

#[test]
fn c09_heads_that_were_not_written_are_told_and_ignored() {
    let mut host = host();
    let plan = Plan {
        cq_size: 8,
        ..Plan::default()
    };
    let mut queues = host.create(1, &plan);
    put(&mut host, &mut queues, 0, 7);
    host.tell_tail(&queues, 0);
    host.turns(10);
    for value in [8, 0xffff] {
        host.ring(&queues, 3, value);
        put(&mut host, &mut queues, 0, 1);
        host.tell_tail(&queues, 0);
        host.turns(5);
        assert_eq!(
            host.told(),
            [QueueEvent::InvalidDoorbell {
                qid: 1,
                side: Side::Head,
                value: value as u16
            }]
        );
    }
    assert_eq!(host.reap(&mut queues).len(), 7);
    host.turns(10);
    assert_eq!(host.reap(&mut queues).len(), 2);
    // A head beyond what was written is a lie, of which nothing comes.
    put(&mut host, &mut queues, 0, 5);
    host.tell_tail(&queues, 0);
    host.turns(10);
    host.ring(&queues, 3, queues.head + 6);
    host.turns(10);
    assert_eq!(host.told().len(), 1);
    assert_eq!(host.reap(&mut queues).len(), 5);
    put(&mut host, &mut queues, 0, 7);
    host.tell_tail(&queues, 0);
    host.turns(20);
    assert_eq!(host.reap(&mut queues).len(), 7);
}

#[test]
fn c15_a_full_completion_queue_stalls_nobody_else() {
    let mut host = host();
    let plan = Plan {
        cq_size: 4,
        ..Plan::default()
    };
    let mut queues = host.create(1, &plan);
    let mut neighbour = host.create(4, &Plan::default());
    let cids = put(&mut host, &mut queues, 0, 20);
    host.tell_tail(&queues, 0);
    host.turns(50);
    let (first, head) = host.reap_quietly(&mut queues);
    assert_eq!(first.len(), 3);
    // Only what has its place was taken.
    let read: u64 = queues.sqs[0].counters.reads.load(Ordering::Relaxed);
    assert_eq!(read, 3);
    for _ in 0..10 {
        assert_eq!(host.run(&mut neighbour, read_one()), OK);
    }
    assert_eq!(host.reap_quietly(&mut queues).0, []);
    assert_eq!(head, queues.head);
    host.tell_head(&queues);
    let mut seen: Vec<u16> = first.iter().map(|e| e.cid.get()).collect();
    while seen.len() < 20 {
        let found = host.until(|host| Some(host.reap(&mut queues)).filter(|f| !f.is_empty()));
        assert!(found.len() <= 3);
        seen.extend(found.iter().map(|e| e.cid.get()));
    }
    seen.sort_unstable();
    assert_eq!(seen, cids);
}

fn read_one() -> crate::spec::Command {
    read(0, 1, DATA)
}

/// Behind a vIOMMU each page of a queue may be a region, and they are nowhere near each other.
#[test]
fn queues_whose_pages_are_apart() {
    let mut host = host();
    let mut regions: Vec<_> = (0..REGION / 4096)
        .map(|i| region(BASE + i * 4096, 4096))
        .collect();
    regions.push(region(BASE + REGION, REGION));
    Chance::new(7).shuffle(&mut regions);
    host.memory = GuestMemory::new(regions).unwrap();
    let plan = Plan {
        cq_size: 512,
        sq_size: 128,
        ..Plan::default()
    };
    let mut queues = host.create(1, &plan);
    let mut seen = 0;
    for _ in 0..50 {
        put(&mut host, &mut queues, 0, 100);
        host.tell_tail(&queues, 0);
        host.turns(20);
        let found = host.reap(&mut queues);
        assert!(found.iter().all(|e| status(e) == OK));
        seen += found.len();
    }
    assert_eq!(seen, 5000);
}

#[test]
fn c10_shadow_doorbells_given_twice_and_badly() {
    let mut host = host();
    let mut queues = host.create(1, &Plan::default());
    for _ in 0..3 {
        assert_eq!(host.run(&mut queues, read_one()), OK);
    }
    // In the middle of work: what the host's buffers begin with is where the queues stand.
    host.give_shadow(&queues);
    assert_eq!(host.word(SHADOW.doorbells + 8), 3);
    for _ in 0..100 {
        assert_eq!(host.run(&mut queues, read_one()), OK);
    }
    host.give_shadow(&queues);
    for _ in 0..100 {
        assert_eq!(host.run(&mut queues, read_one()), OK);
    }
    let bad = [
        (SHADOW.doorbells + 4, SHADOW.events),
        (SHADOW.doorbells, BASE + 2 * REGION),
        (u64::MAX - 4095, SHADOW.events),
        (BASE - 4096, SHADOW.events),
    ];
    for (doorbells, events) in bad {
        let shadow = Shadow {
            doorbells,
            events,
            page: 4096,
        };
        assert!(!shadow.is_in(&host.memory), "{doorbells:#x} {events:#x}");
    }
    assert!(SHADOW.is_in(&host.memory));
    // A value that makes no sense is no worse in a shadow.
    host.set_word(SHADOW.doorbells + 8, 0xffff);
    host.ring(&queues, 2, 5);
    host.turns(20);
    assert_eq!(host.told().len(), 1);
    host.set_word(SHADOW.doorbells + 8, queues.sqs[0].tail);
    assert_eq!(host.run(&mut queues, read_one()), OK);
}

/// While a queue is polled its host is asked for nothing; when it sleeps, to ring once.
#[test]
fn a_shadow_saves_the_rings() {
    for (sq_size, cq_size) in [(64, 64), (33, 20), (1024 / 8, 128)] {
        let mut host = host();
        let plan = Plan {
            poll: Poll::Always,
            sq_size,
            cq_size,
            ..Plan::default()
        };
        let mut queues = host.create(1, &plan);
        host.give_shadow(&queues);
        let mut rings = [0, 0];
        for _ in 0..2000 {
            put(&mut host, &mut queues, 0, 5);
            rings[0] += u32::from(host.tell_tail(&queues, 0));
            host.until(|host| {
                let (found, _) = host.reap_quietly(&mut queues);
                (!found.is_empty()).then_some(())
            });
            host.turns(2);
            host.reap_quietly(&mut queues);
            rings[1] += u32::from(host.tell_head(&queues));
        }
        // At the start, and never again.
        assert!(rings[0] <= 2 && rings[1] <= 2, "{rings:?} rings");
    }
    let mut host = host();
    let mut queues = host.create(1, &Plan::default());
    host.give_shadow(&queues);
    for _ in 0..200 {
        put(&mut host, &mut queues, 0, 1);
        // It sleeps: it has asked for this one.
        host.turns(10);
        host.reactor.step(Some(Duration::from_millis(1)));
        assert!(host.tell_tail(&queues, 0));
        host.until(|host| host.reap(&mut queues).pop());
        // Idle moments before a sleep have their time.
        host.until(|host| {
            host.reactor.step(Some(Duration::from_micros(100)));
            (host.word(SHADOW.events + 8) == queues.sqs[0].tail).then_some(())
        });
    }
}

/// A queue that sleeps because its host does not read is woken by the head.
#[test]
fn c15_a_shadowed_head_wakes() {
    let mut host = host();
    let plan = Plan {
        cq_size: 4,
        ..Plan::default()
    };
    let mut queues = host.create(1, &plan);
    host.give_shadow(&queues);
    put(&mut host, &mut queues, 0, 9);
    host.tell_tail(&queues, 0);
    let mut seen = 0;
    while seen < 9 {
        host.until(|host| {
            host.reactor.step(Some(Duration::from_micros(100)));
            (host.word(SHADOW.events + 12) == queues.head).then_some(())
        });
        host.turns(100);
        let (found, _) = host.reap_quietly(&mut queues);
        seen += found.len();
        assert!(found.len() == 3 && host.tell_head(&queues), "{seen}");
        host.turns(100);
    }
}

/// A device that only has resources.
struct Holder;

impl Device for Holder {
    fn read(&mut self, _: u8, _: u64, _: &mut [u8]) {}
    fn write(&mut self, _: u8, _: u64, _: &[u8]) {}
    fn set_dma(&mut self, _: Dma, _: Duration, done: Done) {
        done();
    }
    fn reset(&mut self, _: Duration, done: Done) {
        done();
    }
}

/// A function with two vectors, and their notifiers.
fn function() -> (Function<Holder>, Resources) {
    let identity = Identity {
        vendor: 0x1b36,
        device: 0x0010,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
        class: 0x01_08_02,
        revision: 0,
    };
    let space = ConfigSpace::builder(identity)
        .bar(0, Bar::memory_64(0x8000))
        .power_management(true)
        .msix(2, MsixPlace::in_bar(0, 0x4000, 2))
        .build();
    let mut kept = None;
    let mut function = Function::new(space, |resources| {
        kept = Some(resources);
        Holder
    });
    // Memory space and bus master.
    let _ = function
        .write(bluff_pci::Region::Config, 4, &6u16.to_le_bytes())
        .unwrap();
    (function, kept.expect("made at once"))
}

fn connect(function: &mut Function<Holder>, interrupt: Interrupt) -> EventFd {
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let notifier = Notifier::new(event.try_clone().unwrap()).unwrap();
    function.set_interrupt(interrupt, Some(notifier)).unwrap();
    event
}

fn with_vector(vector: &Vector, coalescing: Coalescing) -> Plan {
    Plan {
        signal: Signal::Vector(Wire::new(vector.clone())),
        coalescing,
        ..Plan::default()
    }
}

#[test]
fn an_interrupt_for_a_batch() {
    let (mut function, resources) = function();
    let event = connect(&mut function, Interrupt::Msix(0));
    let mut host = host();
    let plan = with_vector(&resources.vectors[0], Coalescing::default());
    let mut queues = host.create(1, &plan);
    put(&mut host, &mut queues, 0, 8);
    host.tell_tail(&queues, 0);
    host.until(|host| {
        let (found, _) = host.reap_quietly(&mut queues);
        (!found.is_empty()).then_some(())
    });
    assert_eq!(event.read().unwrap(), 1);
    assert_eq!(queues.interrupts.load(Ordering::Relaxed), 1);
    host.tell_head(&queues);
    // Masked, it is pending; and no longer when the host has read by itself.
    function.mask_interrupt(Interrupt::Msix(0), true).unwrap();
    put(&mut host, &mut queues, 0, 1);
    host.tell_tail(&queues, 0);
    host.turns(20);
    assert!(resources.vectors[0].is_pending());
    assert_eq!(host.reap(&mut queues).len(), 1);
    host.turns(20);
    assert!(!resources.vectors[0].is_pending());
    function.mask_interrupt(Interrupt::Msix(0), false).unwrap();
    assert!(event.read().is_err());
}

#[test]
fn interrupts_that_are_put_together() {
    let (mut function, resources) = function();
    let event = connect(&mut function, Interrupt::Msix(1));
    let mut host = host();
    let four = |time| Coalescing {
        threshold_z: 3,
        time,
    };
    let long = Duration::from_secs(100);
    let mut queues = host.create(1, &with_vector(&resources.vectors[1], four(long)));
    for i in 1..=8 {
        put(&mut host, &mut queues, 0, 1);
        host.tell_tail(&queues, 0);
        host.until(|host| host.reap_quietly(&mut queues).0.pop());
        assert_eq!(event.read().is_ok(), i % 4 == 0, "{i}");
    }
    // One that no other comes to has its time.
    let short = Duration::from_millis(1);
    queues.worker.send(Message::Coalesce(four(short)));
    put(&mut host, &mut queues, 0, 1);
    host.tell_tail(&queues, 0);
    host.until(|host| host.reap_quietly(&mut queues).0.pop());
    host.until(|host| {
        host.reactor.step(Some(Duration::from_millis(1)));
        event.read().ok()
    });
}

#[test]
fn a_vector_of_two_queues_is_not_taken_back_by_one() {
    let (mut function, resources) = function();
    let event = connect(&mut function, Interrupt::Msix(0));
    let wire = Wire::new(resources.vectors[0].clone());
    let plan = Plan {
        signal: Signal::Vector(wire.clone()),
        ..Plan::default()
    };
    let mut host = host();
    let mut one = host.create(1, &plan);
    wire.set_shared(true);
    let mut other = host.create(3, &plan);
    function.mask_interrupt(Interrupt::Msix(0), true).unwrap();
    for queues in [&mut one, &mut other] {
        put(&mut host, queues, 0, 1);
        host.tell_tail(queues, 0);
        host.turns(20);
    }
    // The host reads one of them; the other one waits for its interrupt.
    assert_eq!(host.reap(&mut one).len(), 1);
    host.turns(20);
    // And that one ends.
    host.send(&one, |done| Message::Stop {
        bound: LONG,
        answer: false,
        done,
    });
    host.turns(20);
    function.mask_interrupt(Interrupt::Msix(0), false).unwrap();
    assert_eq!(event.read().unwrap(), 1);
    assert_eq!(host.reap(&mut other).len(), 1);
}

/// A queue that fills whole turns leaves others their turn.
#[test]
fn queues_take_turns() {
    let mut host = host();
    let plan = Plan {
        cq_size: 256,
        sq_size: 100,
        sqs: 2,
        ..Plan::default()
    };
    let mut queues = host.create(1, &plan);
    put(&mut host, &mut queues, 0, 99);
    put(&mut host, &mut queues, 1, 20);
    host.tell_tail(&queues, 0);
    host.tell_tail(&queues, 1);
    let mut found = Vec::new();
    while found.len() < 119 {
        host.turns(1);
        found.extend(host.reap(&mut queues));
    }
    let last = found.iter().rposition(|e| e.sq_id.get() == 2);
    assert!(last.expect("all came") < 64);
}

#[test]
fn writes_of_many_queues_do_not_mix() {
    let mut host = host();
    let plan = Plan {
        sqs: 3,
        ..Plan::default()
    };
    let mut queues = host.create(1, &plan);
    let mut chance = Chance::new(3);
    let mut model = vec![0u8; 64 * 512];
    for _ in 0..times(200, 5000) {
        let mut lbas: Vec<u64> = (0..64).collect();
        chance.shuffle(&mut lbas);
        for (i, lba) in lbas[..12].iter().enumerate() {
            let bytes = chance.bytes(512);
            let at = DATA + i as u64 * 512;
            host.memory.write(at, &bytes).unwrap();
            model[*lba as usize * 512..][..512].copy_from_slice(&bytes);
            host.put(&mut queues, i % 3, write(*lba, 1, at));
        }
        for sq in 0..3 {
            host.tell_tail(&queues, sq);
        }
        let mut left = 12;
        while left > 0 {
            host.turns(1);
            left -= host.reap(&mut queues).len();
        }
        assert_eq!(host.run(&mut queues, read(0, 64, DATA)), OK);
        let mut now = vec![0; 64 * 512];
        host.memory.read(DATA, &mut now).unwrap();
        assert!(now == model);
    }
}
