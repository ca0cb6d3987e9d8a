//! Queues that come and go in any order, phase tags, shared CQs, interrupts.

use std::time::Duration;

use bluff_nvme_host::spec::status;
use bluff_nvme_host::{Command, Error, Queues, Setup};

use crate::bring_up::controller;

const LIMIT: Duration = Duration::from_secs(10);

#[test]
fn queues_come_and_go_in_any_order() {
    let (_, mut controller) = controller();
    let free = controller.memory().free();
    let cq = controller.create_cq(7, 32, None).unwrap();
    let sq = controller.create_sq(3, 16, 7).unwrap();
    let status = |r: Result<_, Error>| r.err().and_then(|e| e.status());
    let twice = controller.create_cq(7, 32, None).map(drop);
    assert_eq!(status(twice), Some(status::QUEUE_IDENTIFIER));
    let orphan = controller.create_sq(4, 16, 8).map(drop);
    assert_eq!(status(orphan), Some(status::CQ_INVALID));
    let large = controller.create_cq(9, 1025, None).map(drop);
    assert_eq!(status(large), Some(status::QUEUE_SIZE));
    let used = controller.admin(&Command::delete_cq(7)).map(drop);
    assert_eq!(status(used), Some(status::QUEUE_DELETION));
    let mut queues = Queues::new(controller.bar(), cq, vec![sq]);
    queues.run(0, &Command::flush(1), LIMIT).unwrap();
    // Another SQ on the same CQ, and the first one goes.
    queues.sqs.push(controller.create_sq(4, 4, 7).unwrap());
    queues.run(1, &Command::flush(1), LIMIT).unwrap();
    controller.admin(&Command::delete_sq(3)).unwrap();
    queues.sqs.remove(0);
    for _ in 0..100 {
        queues.run(0, &Command::flush(1), LIMIT).unwrap();
    }
    controller.delete_queues(queues).unwrap();
    assert_eq!(controller.memory().free(), free);
}

#[test]
fn rings_go_around_with_any_depth_and_their_phase_tags() {
    let (model, mut controller) = controller();
    for (entries, depth) in [(2, 1), (3, 2), (8, 7), (5, 3)] {
        let mut queues = controller.create_queues(1, 1, entries, None).unwrap();
        for round in 0..50 {
            for _ in 0..depth {
                queues.submit(0, &Command::flush(1)).unwrap();
            }
            if depth + 1 == entries {
                assert_eq!(queues.sqs[0].room(), 0);
                let full = queues.submit(0, &Command::flush(1));
                assert!(matches!(full, Err(Error::Full)), "{round}");
            }
            assert!(!queues.cq.is_ready());
            let before = model.with(|s| s.rung.len());
            queues.ring().unwrap();
            assert_eq!(model.with(|s| s.rung.len()), before + 1, "once for all");
            for _ in 0..depth {
                queues.poll().unwrap().unwrap().ok().unwrap();
            }
            assert!(queues.poll().unwrap().is_none() && queues.in_flight() == 0);
            queues.ring().unwrap();
        }
        controller.delete_queues(queues).unwrap();
    }
}

#[test]
fn commands_of_a_shared_cq_come_back_in_any_order() {
    let (model, mut controller) = controller();
    let mut queues = controller.create_queues(2, 3, 16, None).unwrap();
    model.with(|s| s.hold = true);
    let mut cids = Vec::new();
    for i in 0..9 {
        cids.push(queues.submit(i % 3, &Command::flush(1)).unwrap());
    }
    queues.ring().unwrap();
    assert!(!queues.wait(Duration::ZERO));
    // Kept by SQ: of each three commands.
    model.release(&[8, 1, 5, 0, 7, 3, 2, 6, 4]);
    assert!(queues.wait(Duration::ZERO));
    // One is waited for; the others are not lost.
    let last = queues.finish(1, cids[7], LIMIT).unwrap();
    assert_eq!((last.completion.sq, last.completion.cid), (3, cids[7]));
    let mut taken = 0;
    while queues.poll().unwrap().is_some() {
        taken += 1;
    }
    assert_eq!((taken, queues.in_flight()), (8, 0));
}

#[test]
fn interrupts_wake_the_host_and_nothing_else_does() {
    let (model, mut controller) = controller();
    let event = model.with(|s| s.events[2].clone());
    let vector = Some((2, event.clone()));
    let mut queues = controller.create_queues(1, 1, 8, vector).unwrap();
    queues.run(0, &Command::flush(1), LIMIT).unwrap();
    // What was signalled for commands that were polled is no harm.
    event.signal();
    assert!(!queues.wait(Duration::from_millis(1)));
    model.with(|s| s.hold = true);
    queues.submit(0, &Command::flush(1)).unwrap();
    queues.ring().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| model.release(&[0]));
        assert!(queues.wait(LIMIT));
    });
    queues.poll().unwrap().unwrap();
    event.take();
    model.with(|s| s.hold = false);
    // What is polled before its interrupt is looked at leaves one behind.
    queues.submit(0, &Command::flush(1)).unwrap();
    queues.ring().unwrap();
    queues.poll().unwrap().unwrap();
    assert!(queues.wait_for_event(Duration::ZERO));
    assert!(!queues.wait_for_event(Duration::ZERO));
}

#[test]
fn the_admin_queue_can_have_an_interrupt() {
    let (model, mut controller) = controller();
    controller.disable().unwrap();
    let event = model.with(|s| s.events[0].clone());
    event.take();
    let setup = Setup {
        event: Some(event.clone()),
        admin_sq: 2,
        admin_cq: 2,
        ..Setup::default()
    };
    controller.enable(&setup).unwrap();
    for _ in 0..10 {
        controller.identify(1, 0).unwrap();
    }
    assert!(event.take() > 0);
}
