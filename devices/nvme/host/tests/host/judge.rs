//! What a controller does wrong is found.

use std::time::Duration;

use bluff_nvme_host::verify::{Shape, Traffic, Volume};
use bluff_nvme_host::{Command, Error, Violation};

use crate::bring_up::controller;
use crate::model::{BLOCK, BLOCKS, Lie};

const LIMIT: Duration = Duration::from_secs(10);

fn after(lie: Lie) -> Error {
    let (model, mut controller) = controller();
    let mut queues = controller.create_queues(1, 1, 8, None).unwrap();
    queues.run(0, &Command::flush(1), LIMIT).unwrap();
    model.with(|s| s.lie = Some(lie));
    queues.submit(0, &Command::flush(1)).unwrap();
    queues.ring().unwrap();
    loop {
        if let Err(error) = queues.poll() {
            return error;
        }
    }
}

#[test]
fn completions_that_break_the_rules() {
    let is = |lie, want: fn(&Violation) -> bool| match after(lie) {
        Error::Violation(found) => assert!(want(&found), "{lie:?}: {found}"),
        other => panic!("{lie:?}: {other}"),
    };
    is(Lie::Cid(1), |v| matches!(v, Violation::Stray { sq: 1, .. }));
    is(Lie::Cid(0x100), |v| matches!(v, Violation::Stray { .. }));
    is(Lie::Twice, |v| matches!(v, Violation::Stray { .. }));
    is(Lie::Sq(1), |v| {
        matches!(v, Violation::ForeignQueue { sq: 2, cq: 1 })
    });
    is(Lie::Head(1), |v| {
        matches!(v, Violation::Head { head: 3, .. })
    });
    is(Lie::Head(0xffff - 1), |v| {
        matches!(v, Violation::Head { .. })
    });
    is(Lie::Head(100), |v| matches!(v, Violation::Head { .. }));
}

fn traffic(lie: Option<Lie>) -> Result<u64, Error> {
    let (model, mut controller) = controller();
    let memory = controller.memory().clone();
    let mut queues = Vec::new();
    for i in 0..3 {
        let event = model.with(|s| s.events[i].clone());
        let vector = Some((i as u16, event));
        queues.push(controller.create_queues(1 + 2 * i as u16, 2, 16, vector)?);
    }
    let volumes = [Volume::new(1, BLOCK as u32, BLOCK * BLOCKS)];
    let shape = Shape {
        sgls: true,
        ..Shape::default()
    };
    let mut traffic = Traffic::new(queues, &volumes, &memory, shape)?;
    traffic.run(2000, 16, LIMIT)?;
    traffic.verify(LIMIT)?;
    traffic.fill(16)?;
    traffic.settle(LIMIT)?;
    if lie.is_some() {
        model.with(|s| s.lie = lie);
        // Not so much that what is wrong is written over.
        traffic.run(50, 16, LIMIT)?;
        traffic.verify(LIMIT)?;
    }
    for queues in traffic.into_queues() {
        controller.delete_queues(queues)?;
    }
    let tally = volumes[0].judge().tally;
    assert!(tally.flushes > 10 && tally.errors == 0);
    Ok(tally.reads.min(tally.writes))
}

#[test]
fn verified_load_finds_nothing_where_nothing_is_wrong() {
    assert!(traffic(None).unwrap() > 500);
}

#[test]
fn verified_load_finds_data_that_is_wrong() {
    for lie in [Lie::Lost, Lie::Misplaced] {
        let found = std::panic::catch_unwind(|| traffic(Some(lie)));
        assert!(found.is_err(), "{lie:?}: {found:?}");
    }
}

#[test]
fn an_interrupt_that_is_lost_is_missed() {
    let (model, mut controller) = controller();
    let memory = controller.memory().clone();
    let event = model.with(|s| s.events[1].clone());
    let queues = controller.create_queues(1, 1, 8, Some((1, event))).unwrap();
    let volumes = [Volume::new(1, BLOCK as u32, BLOCK * BLOCKS)];
    let mut traffic = Traffic::new(vec![queues], &volumes, &memory, Shape::default()).unwrap();
    traffic.run(100, 4, LIMIT).unwrap();
    traffic.settle(LIMIT).unwrap();
    model.with(|s| s.hold = true);
    // As `take_some` does it: nothing has come back when the host begins to sleep.
    let mut sleep_after = |lie| {
        traffic.fill(1).unwrap();
        assert_eq!(traffic.take().unwrap(), 0);
        model.with(|s| s.lie = lie);
        model.release(&[0]);
        let woken = traffic.wait(Duration::ZERO);
        assert_eq!(traffic.take().unwrap(), 1);
        woken
    };
    assert!(sleep_after(None));
    assert!(!sleep_after(Some(Lie::NoEvent)));
    assert!(sleep_after(None));
}

#[test]
fn what_a_reset_cuts_off_may_have_been_done_or_not() {
    let (model, mut controller) = controller();
    let memory = controller.memory().clone();
    let volumes = [Volume::new(1, BLOCK as u32, BLOCK * BLOCKS)];
    for round in 0..5 {
        let queues = vec![controller.create_queues(1, 1, 32, None).unwrap()];
        let shape = Shape {
            seed: round,
            ..Shape::default()
        };
        let mut traffic = Traffic::new(queues, &volumes, &memory, shape).unwrap();
        traffic.run(100, 8, LIMIT).unwrap();
        traffic.settle(LIMIT).unwrap();
        model.with(|s| s.hold = true);
        traffic.fill(16).unwrap();
        assert_eq!(traffic.in_flight(), 16);
        model.release(&[0, 2, 4, 15]);
        controller.disable().unwrap();
        traffic.abandon();
        model.with(|s| s.hold = false);
        controller
            .enable(&bluff_nvme_host::Setup::default())
            .unwrap();
    }
    assert_eq!(volumes[0].judge().in_flight(), 0);
    let queues = vec![controller.create_queues(1, 1, 32, None).unwrap()];
    let mut traffic = Traffic::new(queues, &volumes, &memory, Shape::default()).unwrap();
    traffic.verify(LIMIT).unwrap();
}
