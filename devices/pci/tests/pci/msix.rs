//! MSI-X: who masks, what is pending, and that nothing is lost between threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bluff_pci::{Error, Interrupt, PciEvent, PciFunction, Region};
use bluff_reactor::{Distrust, Notice, Notifier};
use vmm_sys_util::eventfd::EventFd;

use crate::rig::{
    ALL_MASKED, COMMAND, ENABLE, MASTER, MEMORY, MSIX_CONTROL, PENDING, PMCSR, Rig, TABLE, VECTORS,
    heard,
};

const V: Interrupt = Interrupt::Msix(3);
const CONTROL: u64 = TABLE + 3 * 16 + 12;

fn pending(rig: &mut Rig) -> u64 {
    u64::from_le_bytes(rig.read(Region::Bar(0), PENDING))
}

#[test]
fn a_descriptor_is_all_that_a_vmm_needs() {
    // The table as after a reset, since the VMM keeps its own.
    let mut rig = Rig::running();
    let event = rig.connect(V);
    assert_eq!(rig.bar_u32(0, CONTROL), 1);
    assert_eq!(rig.vector(3).signal(), Some(Notice::Given));
    assert_eq!((heard(&event), pending(&mut rig)), (1, 0));
    rig.set_u16(MSIX_CONTROL, ENABLE);
    assert_eq!(rig.vector(3).signal(), Some(Notice::Given));
    assert_eq!(heard(&event), 1);
}

#[test]
fn a_masked_vector_is_pending_until_it_is_not() {
    /// How it is masked, and how not.
    type Act = fn(&mut Rig, bool);
    let ways: &[(&str, Act)] = &[
        ("entry", |rig, on| {
            rig.bar_set_u32(0, CONTROL, u32::from(on));
        }),
        ("function mask", |rig, on| {
            rig.set_u16(MSIX_CONTROL, if on { ENABLE | ALL_MASKED } else { ENABLE });
        }),
        ("off", |rig, on| {
            rig.set_u16(MSIX_CONTROL, if on { 0 } else { ENABLE });
        }),
        ("the attachment", |rig, on| {
            rig.function.mask_interrupt(V, on).unwrap();
        }),
        ("no bus master", |rig, on| {
            rig.set_u16(COMMAND, if on { MEMORY } else { MEMORY | MASTER });
        }),
        ("D3hot", |rig, on| {
            rig.set_u16(PMCSR, if on { 3 } else { 0 });
        }),
    ];
    for (name, act) in ways {
        let mut rig = Rig::running();
        let event = rig.connect(V);
        act(&mut rig, true);
        for _ in 0..3 {
            assert_eq!(rig.vector(3).signal(), None, "{name}");
        }
        assert_eq!(heard(&event), 0, "{name}");
        if *name != "D3hot" {
            assert_eq!(pending(&mut rig), 1 << 3, "{name}");
        }
        assert!(rig.vector(3).is_pending());
        act(&mut rig, false);
        assert_eq!((heard(&event), pending(&mut rig)), (1, 0), "{name}: once");
        // A second mask on top: both have to go.
        rig.function.mask_interrupt(V, true).unwrap();
        act(&mut rig, true);
        assert_eq!(rig.vector(3).signal(), None);
        rig.function.mask_interrupt(V, false).unwrap();
        if *name != "the attachment" {
            assert_eq!(heard(&event), 0, "{name}");
            act(&mut rig, false);
        }
        assert_eq!(heard(&event), 1, "{name}");
        // What was seen to meanwhile is not given.
        act(&mut rig, true);
        assert_eq!(rig.vector(3).signal(), None);
        rig.vector(3).withdraw();
        act(&mut rig, false);
        assert_eq!(heard(&event), 0, "{name}");
    }
}

#[test]
fn without_a_descriptor_it_waits_for_one() {
    let mut rig = Rig::running();
    assert_eq!(rig.vector(3).signal(), None);
    assert_eq!(pending(&mut rig), 8);
    let first = rig.connect(V);
    assert_eq!(heard(&first), 1);
    // Another one takes its place, and hears what is new only.
    let second = rig.connect(V);
    assert_eq!(rig.vector(3).signal(), Some(Notice::Given));
    assert_eq!((heard(&first), heard(&second)), (0, 1));
    rig.function.set_interrupt(V, None).unwrap();
    assert_eq!(rig.vector(3).signal(), None);
    assert_eq!(heard(&second), 0);
}

#[test]
fn vectors_are_apart() {
    let mut rig = Rig::running();
    let last = VECTORS - 1;
    let _ = rig.vector(63).signal();
    assert_eq!(pending(&mut rig), 1 << 63);
    rig.vector(63).withdraw();
    let events = [2, 3, last].map(|v| rig.connect(Interrupt::Msix(v)));
    rig.bar_set_u32(0, CONTROL, 1);
    for v in [2, 3, last] {
        let _ = rig.vector(v).signal();
    }
    assert_eq!(events.each_ref().map(heard), [1, 0, 1]);
    rig.function
        .set_interrupt(Interrupt::Msix(last), None)
        .unwrap();
    let _ = rig.vector(last).signal();
    assert_eq!(pending(&mut rig), 8);
    assert_eq!(
        rig.read::<8>(Region::Bar(0), PENDING + 8),
        (1u64 << (last - 64)).to_le_bytes()
    );
    assert_eq!(rig.bar_u32(0, PENDING + 12), 0);
}

#[test]
fn a_test_of_the_way() {
    let mut rig = Rig::running();
    let event = rig.connect(V);
    rig.function.trigger_interrupt(V).unwrap();
    assert_eq!(heard(&event), 1);
    rig.function.mask_interrupt(V, true).unwrap();
    rig.function.trigger_interrupt(V).unwrap();
    assert_eq!((heard(&event), pending(&mut rig)), (0, 8));
}

#[test]
fn vectors_that_are_not_there() {
    let mut rig = Rig::running();
    for v in [VECTORS, u16::MAX] {
        let v = Interrupt::Msix(v);
        let error = Err(Error::NoInterrupt(v));
        assert_eq!(rig.function.set_interrupt(v, None), error);
        assert_eq!(rig.function.mask_interrupt(v, true), error);
        assert_eq!(rig.function.trigger_interrupt(v), error);
    }
}

/// A hostile client's descriptor costs a bounded time, and is told of.
#[test]
fn a_descriptor_that_blocks() {
    let mut rig = Rig::running();
    let event = EventFd::new(0).unwrap();
    event.write(u64::MAX - 1).unwrap();
    let distrust = Distrust::default();
    let notifier = Notifier::of(event.try_clone().unwrap(), &distrust).unwrap();
    rig.function.set_interrupt(V, Some(notifier)).unwrap();
    let start = Instant::now();
    assert_eq!(rig.vector(3).signal(), Some(Notice::Hung));
    assert_eq!(rig.vector(3).signal(), Some(Notice::Dropped));
    assert!(start.elapsed() < Duration::from_secs(1));
    assert!(distrust.is_earned());
    assert_eq!(*rig.events.lock().unwrap(), [PciEvent::NotifierHung(V)]);
    // On the session's thread too: what was pending is given by who unmasks.
    let mut rig = Rig::running();
    let _ = rig.vector(3).signal();
    let notifier = Notifier::new(event.try_clone().unwrap()).unwrap();
    rig.function.set_interrupt(V, Some(notifier)).unwrap();
    assert_eq!(*rig.events.lock().unwrap(), [PciEvent::NotifierHung(V)]);
}

/// Signals of two threads against a session that masks and unmasks by all means: each signal is followed by a notification,
/// and between the end of a mask and the next unmasking there is none.
#[test]
fn nothing_is_lost_and_nothing_is_late() {
    const ROUNDS: u64 = 600;
    let mut rig = Rig::running();
    let event = rig.connect(V);
    let stop = Arc::new(AtomicBool::new(false));
    let signalled = Arc::new(AtomicU64::new(0));
    let threads: Vec<_> = (0..2)
        .map(|_| {
            let (vector, stop, signalled) = (rig.vector(3), stop.clone(), signalled.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    signalled.fetch_add(1, Ordering::SeqCst);
                    let _ = vector.signal();
                }
            })
        })
        .collect();
    for round in 0..ROUNDS {
        match round % 3 {
            0 => rig.function.mask_interrupt(V, true).unwrap(),
            1 => rig.bar_set_u32(0, CONTROL, 1),
            _ => rig.set_u16(MSIX_CONTROL, ENABLE | ALL_MASKED),
        }
        heard(&event);
        // One signal at least that is wholly within the mask: of three that begin, one of the two threads ends one.
        let now = signalled.load(Ordering::SeqCst);
        while signalled.load(Ordering::SeqCst) < now + 3 {
            std::thread::yield_now();
        }
        assert_eq!(heard(&event), 0, "round {round}: late");
        match round % 3 {
            0 => rig.function.mask_interrupt(V, false).unwrap(),
            1 => rig.bar_set_u32(0, CONTROL, 0),
            _ => rig.set_u16(MSIX_CONTROL, ENABLE),
        }
        assert!(heard(&event) > 0, "round {round}: lost");
    }
    stop.store(true, Ordering::Relaxed);
    threads.into_iter().for_each(|t| t.join().unwrap());
    assert!(!rig.vector(3).is_pending());
}
