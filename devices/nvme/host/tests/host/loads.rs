//! The benchmark's load.

use bluff_nvme_host::{Load, LoadConfig, Pattern};

use crate::bring_up::controller;
use crate::model::{BLOCK, BLOCKS};

const CONFIG: LoadConfig = LoadConfig {
    nsid: 1,
    capacity: BLOCKS,
    block: BLOCK as u32,
    len: 4096,
    depth: 10,
    pattern: Pattern::Sequential,
    write: false,
    seed: 1,
};

#[test]
fn as_many_as_asked_for_are_kept_in_flight_and_doorbells_are_rung_once() {
    let (model, mut controller) = controller();
    let memory = controller.memory().clone();
    let queues = controller.create_queues(1, 2, 16, None).unwrap();
    let mut load = Load::new(queues, &memory, CONFIG).unwrap();
    model.with(|s| s.hold = true);
    let step = load.step().unwrap();
    assert_eq!(
        (step.completed, step.submitted, load.in_flight()),
        (0, 10, 10)
    );
    let places: Vec<_> = model.with(|s| s.kept.iter().map(|(_, c)| c[10]).collect());
    let mut sorted = places.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, (0..10).map(|i| i * 8).collect::<Vec<_>>());
    model.with(|s| s.rung.clear());
    model.release(&[3, 1, 9]);
    let kept: Vec<_> = model.with(|s| std::mem::take(&mut s.kept));
    assert!(kept.is_empty());
    let step = load.step().unwrap();
    assert_eq!(
        (step.completed, step.submitted, load.in_flight()),
        (3, 3, 10)
    );
    // Two SQs and a CQ at most.
    assert!(model.with(|s| s.rung.len()) <= 3);
    let mut again: Vec<_> = model.with(|s| s.kept.iter().map(|(_, c)| c[10]).collect());
    again.sort_unstable();
    assert_eq!(again, [80, 88, 96]);
}

#[test]
fn failures_are_seen_and_loads_end() {
    let (_, mut controller) = controller();
    let memory = controller.memory().clone();
    let free = memory.free();
    let queues = controller.create_queues(1, 1, 16, None).unwrap();
    let config = LoadConfig {
        pattern: Pattern::Random,
        write: true,
        ..CONFIG
    };
    let mut load = Load::new(queues, &memory, config).unwrap();
    for _ in 0..100 {
        load.step().unwrap();
    }
    while load.in_flight() > 0 {
        load.drain().unwrap();
    }
    let queues = load.into_queues();
    controller.delete_queues(queues).unwrap();
    assert_eq!(memory.free(), free);
    let queues = controller.create_queues(1, 1, 16, None).unwrap();
    let config = LoadConfig {
        capacity: 2 * BLOCKS,
        ..config
    };
    let mut load = Load::new(queues, &memory, config).unwrap();
    let failed = (0..1000).find_map(|_| load.step().err()).unwrap();
    assert_eq!(
        failed.status(),
        Some(bluff_nvme_host::spec::status::LBA_RANGE)
    );
}

#[test]
fn loads_that_make_no_sense_are_refused() {
    let (_, mut controller) = controller();
    let memory = controller.memory().clone();
    let bad = [
        LoadConfig { depth: 0, ..CONFIG },
        LoadConfig {
            depth: 16,
            ..CONFIG
        },
        LoadConfig {
            len: 4097,
            ..CONFIG
        },
        LoadConfig { len: 0, ..CONFIG },
        LoadConfig {
            capacity: 7,
            ..CONFIG
        },
    ];
    for config in bad {
        let queues = controller.create_queues(1, 1, 16, None).unwrap();
        let doorbell = queues.cq.id();
        assert!(Load::new(queues, &memory, config).is_err(), "{config:?}");
        let delete = bluff_nvme_host::Command::delete_sq(doorbell);
        controller.admin(&delete).unwrap();
        let delete = bluff_nvme_host::Command::delete_cq(doorbell);
        controller.admin(&delete).unwrap();
    }
}
