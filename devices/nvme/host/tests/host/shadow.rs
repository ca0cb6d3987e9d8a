//! Shadow doorbells: rung only where the controller asks for it.

use std::time::Duration;

use bluff_nvme_host::Command;

use crate::bring_up::controller;

const LIMIT: Duration = Duration::from_secs(10);

#[test]
fn doorbells_are_rung_when_the_event_index_is_passed() {
    let (model, mut controller) = controller();
    controller.shadow_doorbells(&mut []).unwrap();
    assert_eq!(controller.shadow_pages(), model.with(|s| s.shadow));
    let mut queues = controller.create_queues(1, 1, 8, None).unwrap();
    let mut rung = 0;
    for round in 0..40 {
        let before = model.with(|s| s.rung.len());
        queues.submit(0, &Command::flush(1)).unwrap();
        queues.ring().unwrap();
        // A controller that polls finds it without; one that is asleep has left an event index, and is rung.
        model.work();
        assert!(queues.wait(Duration::ZERO), "{round}");
        queues.poll().unwrap().unwrap().ok().unwrap();
        queues.ring().unwrap();
        rung += model.with(|s| s.rung.len()) - before;
    }
    assert_eq!(queues.sqs[0].rings() + queues.cq.rings(), rung as u64);
    assert_eq!(
        queues.sqs[0].rings(),
        40,
        "the model always wants to be rung"
    );
}

#[test]
fn a_controller_that_does_not_want_it_is_not_rung() {
    let (model, mut controller) = controller();
    controller.shadow_doorbells(&mut []).unwrap();
    let mut queues = controller.create_queues(1, 1, 64, None).unwrap();
    let (_, events) = controller.shadow_pages().unwrap();
    // As if it had asked for the doorbell long ago, and polled since.
    let far = |at: u64| {
        let memory = controller.memory().memory();
        memory.write(events + at, &60u32.to_le_bytes()).unwrap();
    };
    model.with(|s| s.rung.clear());
    for _ in 0..50 {
        far(8);
        far(12);
        queues.submit(0, &Command::flush(1)).unwrap();
        queues.ring().unwrap();
        model.work();
        queues.poll().unwrap().unwrap().ok().unwrap();
    }
    assert_eq!(model.with(|s| s.rung.clone()), []);
    assert_eq!((queues.sqs[0].rings(), queues.cq.rings()), (0, 0));
}

#[test]
fn queues_that_were_there_before_can_use_them_too() {
    let (model, mut controller) = controller();
    let mut queues = controller.create_queues(1, 1, 8, None).unwrap();
    for _ in 0..10 {
        queues.run(0, &Command::flush(1), LIMIT).unwrap();
    }
    controller.shadow_doorbells(&mut [&mut queues]).unwrap();
    let (shadow, _) = controller.shadow_pages().unwrap();
    queues.submit(0, &Command::flush(1)).unwrap();
    queues.ring().unwrap();
    let mut tail = [0; 4];
    controller
        .memory()
        .memory()
        .read(shadow + 8, &mut tail)
        .unwrap();
    assert_eq!(
        u32::from_le_bytes(tail),
        3,
        "eleven commands in a ring of eight"
    );
    model.work();
    queues.poll().unwrap().unwrap().ok().unwrap();
}

#[test]
fn a_queue_is_not_troubled_by_what_one_before_it_has_left() {
    let (model, mut controller) = controller();
    controller.shadow_doorbells(&mut []).unwrap();
    for commands in [5, 3, 7] {
        let mut queues = controller.create_queues(1, 1, 8, None).unwrap();
        for _ in 0..commands {
            queues.submit(0, &Command::flush(1)).unwrap();
        }
        queues.ring().unwrap();
        model.work();
        for _ in 0..commands {
            queues.poll().unwrap().unwrap().ok().unwrap();
        }
        queues.ring().unwrap();
        controller.delete_queues(queues).unwrap();
    }
}
