//! Every refusal, and random sequences against a naive model.

use std::collections::BTreeMap;

use bluff_testing::times;
use proptest::prelude::*;

use super::*;

/// Entry sizes as they should be, pages of 4096 bytes.
const CC: Cc = Cc(4 << 20 | 6 << 16 | 1);

fn table() -> QueueTable {
    QueueTable::new(8, 4095, 9)
}

fn cq(qid: u16) -> RawCreateCq {
    RawCreateCq {
        prp1: 0x1000,
        qid,
        size_z: 63,
        contiguous: true,
        interrupts: true,
        vector: 1,
    }
}

fn sq(qid: u16, cqid: u16) -> RawCreateSq {
    RawCreateSq {
        prp1: 0x1000,
        qid,
        size_z: 63,
        contiguous: true,
        priority: 3,
        cqid,
    }
}

#[test]
fn what_is_to_be_made() {
    let mut t = table();
    let made = CreateCq {
        qid: 8,
        entries: 64,
        base: 0x1000,
        vector: Some(1),
    };
    assert_eq!(t.create_cq(&cq(8), CC), Ok(made));
    let polled = RawCreateCq {
        interrupts: false,
        vector: 99,
        ..cq(1)
    };
    assert_eq!(
        t.create_cq(&polled, CC).map(|c| c.vector),
        Ok(None),
        "its vector means nothing"
    );
    let made = CreateSq {
        qid: 3,
        entries: 64,
        base: 0x1000,
        cqid: 8,
    };
    assert_eq!(t.create_sq(&sq(3, 8), CC), Ok(made));
    let largest = RawCreateSq {
        size_z: 4095,
        ..sq(4, 8)
    };
    assert_eq!(t.create_sq(&largest, CC).map(|s| s.entries), Ok(4096));
    let smallest = RawCreateSq {
        size_z: 1,
        ..sq(5, 8)
    };
    assert_eq!(t.create_sq(&smallest, CC).map(|s| s.entries), Ok(2));
}

#[test]
fn completion_queues_that_cannot_be() {
    let page64 = Cc(CC.0 | 4 << 7);
    for (what, raw, cc, status) in [
        (
            "of one entry",
            RawCreateCq { size_z: 0, ..cq(1) },
            CC,
            Status::QUEUE_SIZE,
        ),
        (
            "too large",
            RawCreateCq {
                size_z: 4096,
                ..cq(1)
            },
            CC,
            Status::QUEUE_SIZE,
        ),
        (
            "no entry size yet",
            cq(1),
            Cc(6 << 16 | 1),
            Status::QUEUE_SIZE,
        ),
        (
            "in pieces",
            RawCreateCq {
                contiguous: false,
                ..cq(1)
            },
            CC,
            Status::INVALID_FIELD,
        ),
        (
            "no whole page",
            RawCreateCq {
                prp1: 0x1010,
                ..cq(1)
            },
            CC,
            Status::PRP_OFFSET,
        ),
        ("no whole page of 64 KiB", cq(1), page64, Status::PRP_OFFSET),
        (
            "no such vector",
            RawCreateCq { vector: 9, ..cq(1) },
            CC,
            Status::INTERRUPT_VECTOR,
        ),
        (
            "no vector at all",
            RawCreateCq {
                vector: 0xffff,
                ..cq(1)
            },
            CC,
            Status::INTERRUPT_VECTOR,
        ),
    ] {
        let mut t = table();
        assert_eq!(t.create_cq(&raw, cc), Err(status), "{what}");
        assert!(t.is_empty(), "{what}");
    }
}

#[test]
fn submission_queues_that_cannot_be() {
    for (what, raw, cc, status) in [
        (
            "of one entry",
            RawCreateSq {
                size_z: 0,
                ..sq(1, 1)
            },
            CC,
            Status::QUEUE_SIZE,
        ),
        (
            "no entry size yet",
            sq(1, 1),
            Cc(4 << 20 | 1),
            Status::QUEUE_SIZE,
        ),
        (
            "in pieces",
            RawCreateSq {
                contiguous: false,
                ..sq(1, 1)
            },
            CC,
            Status::INVALID_FIELD,
        ),
        (
            "no whole page",
            RawCreateSq {
                prp1: 0x1fff,
                ..sq(1, 1)
            },
            CC,
            Status::PRP_OFFSET,
        ),
        ("to the admin queue", sq(1, 0), CC, Status::QUEUE_ID),
        ("to one that cannot be", sq(1, 9), CC, Status::QUEUE_ID),
        ("to one that is not", sq(1, 2), CC, Status::CQ_INVALID),
    ] {
        let mut t = table();
        t.create_cq(&cq(1), CC).unwrap();
        assert_eq!(t.create_sq(&raw, cc), Err(status), "{what}");
        assert_eq!(t.delete_cq(1), Ok(()), "{what}: nobody posts to it");
    }
}

/// C11: zero's based 0xffff, and what is next to the limit.
#[test]
fn c11_queue_size_of_all_ones() {
    let mut t = table();
    for size_z in [0xffff, 0x8000, 4096, 0] {
        assert_eq!(
            t.create_cq(&RawCreateCq { size_z, ..cq(1) }, CC),
            Err(Status::QUEUE_SIZE),
            "{size_z:#x}"
        );
    }
    // Where it is allowed it is 65536, and not 0.
    let mut t = QueueTable::new(1, 0xffff, 1);
    let most = RawCreateCq {
        size_z: 0xffff,
        vector: 0,
        ..cq(1)
    };
    assert_eq!(t.create_cq(&most, CC).map(|c| c.entries), Ok(65536));
    let most = RawCreateSq {
        size_z: 0xffff,
        ..sq(1, 1)
    };
    assert_eq!(t.create_sq(&most, CC).map(|s| s.entries), Ok(65536));
}

/// C13: a CQ deleted before its SQ, queue 0, a queue created twice, a CQ that is shared.
#[test]
fn c13_queues_in_the_wrong_order() {
    let mut t = table();
    t.create_cq(&cq(2), CC).unwrap();
    assert_eq!(t.create_cq(&cq(2), CC), Err(Status::QUEUE_ID), "twice");
    t.create_sq(&sq(1, 2), CC).unwrap();
    t.create_sq(&sq(2, 2), CC).unwrap();
    assert_eq!(t.create_sq(&sq(1, 2), CC), Err(Status::QUEUE_ID), "twice");
    for qid in [0, 9, 0xffff] {
        assert_eq!(t.create_cq(&cq(qid), CC), Err(Status::QUEUE_ID), "{qid}");
        assert_eq!(t.create_sq(&sq(qid, 2), CC), Err(Status::QUEUE_ID), "{qid}");
        assert_eq!(t.delete_cq(qid), Err(Status::QUEUE_ID), "{qid}");
        assert_eq!(t.delete_sq(qid), Err(Status::QUEUE_ID), "{qid}");
    }
    assert_eq!(t.delete_cq(2), Err(Status::QUEUE_DELETION));
    assert_eq!(t.delete_sq(1), Ok(2));
    assert_eq!(
        t.delete_sq(1),
        Err(Status::QUEUE_ID),
        "while it is being deleted"
    );
    assert_eq!(
        t.create_sq(&sq(1, 2), CC),
        Err(Status::QUEUE_ID),
        "while it is being deleted"
    );
    assert_eq!(
        t.delete_cq(2),
        Err(Status::QUEUE_DELETION),
        "its commands still post"
    );
    t.deleted_sq(1);
    assert_eq!(t.delete_cq(2), Err(Status::QUEUE_DELETION), "the other one");
    assert_eq!(t.delete_sq(2), Ok(2));
    t.deleted_sq(2);
    assert_eq!(t.delete_cq(2), Ok(()));
    assert_eq!(
        t.delete_cq(2),
        Err(Status::QUEUE_ID),
        "while it is being deleted"
    );
    assert_eq!(
        t.create_sq(&sq(1, 2), CC),
        Err(Status::CQ_INVALID),
        "while it is being deleted"
    );
    assert!(!t.is_empty());
    t.deleted_cq(2);
    assert!(t.is_empty());
    assert_eq!(t.create_cq(&cq(2), CC).map(|c| c.qid), Ok(2), "again");
}

/// C6: as far as it is about the table.
#[test]
fn c06_abort_finds_queues_that_are_there() {
    let mut t = table();
    t.create_cq(&cq(2), CC).unwrap();
    t.create_sq(&sq(7, 2), CC).unwrap();
    assert_eq!(
        t.abort(RawAbort { sqid: 0, cid: 5 }),
        Ok(Abort::Admin { cid: 5 })
    );
    let found = Abort::Io {
        cqid: 2,
        sqid: 7,
        cid: 5,
    };
    assert_eq!(t.abort(RawAbort { sqid: 7, cid: 5 }), Ok(found));
    for sqid in [1, 2, 8, 9, 0xfffe, 0xffff] {
        assert_eq!(
            t.abort(RawAbort { sqid, cid: 5 }),
            Err(Status::INVALID_FIELD),
            "{sqid}"
        );
    }
}

#[test]
fn what_was_granted_is_the_limit() {
    let mut t = table();
    assert_eq!(t.grant(2, 3), Ok((2, 3)));
    assert_eq!(t.create_cq(&cq(4), CC), Err(Status::QUEUE_ID));
    t.create_cq(&cq(3), CC).unwrap();
    assert_eq!(t.create_sq(&sq(3, 3), CC), Err(Status::QUEUE_ID));
    t.create_sq(&sq(2, 3), CC).unwrap();
    assert_eq!(t.grant(8, 8), Err(Status::SEQUENCE_ERROR));
    t.reset();
    assert_eq!((t.granted(), t.is_empty()), ((8, 8), true));
    assert_eq!(t.grant(u16::MAX, 1), Ok((8, 1)));
}

/// What a test knows: which queues there are.
#[derive(Default)]
struct Model {
    cqs: BTreeMap<u16, bool>,
    sqs: BTreeMap<u16, (u16, bool)>,
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(times(500, 20_000)) })]

    #[test]
    fn it_is_as_a_naive_model_says(steps in prop::collection::vec((0..7u8, 0..6u16, 0..6u16), 0..200)) {
        let mut t = QueueTable::new(4, 63, 1);
        let mut m = Model::default();
        let inside = |qid: u16| (1..=4).contains(&qid);
        for (step, a, b) in steps {
            match step {
                0 => {
                    let raw = RawCreateCq { vector: 0, ..cq(a) };
                    let fits = inside(a) && !m.cqs.contains_key(&a);
                    prop_assert_eq!(t.create_cq(&raw, CC).is_ok(), fits);
                    if fits {
                        m.cqs.insert(a, false);
                    }
                }
                1 | 2 => {
                    let fits = inside(a) && !m.sqs.contains_key(&a) && m.cqs.get(&b) == Some(&false);
                    prop_assert_eq!(t.create_sq(&sq(a, b), CC).is_ok(), fits);
                    if fits {
                        m.sqs.insert(a, (b, false));
                    }
                }
                3 => {
                    let there = m.sqs.get_mut(&a).filter(|sq| !sq.1);
                    prop_assert_eq!(t.delete_sq(a).ok(), there.as_ref().map(|sq| sq.0));
                    if let Some(sq) = there {
                        sq.1 = true;
                    }
                }
                4 => if m.sqs.get(&a).is_some_and(|sq| sq.1) {
                    m.sqs.remove(&a);
                    t.deleted_sq(a);
                },
                5 => {
                    let used = m.sqs.values().any(|sq| sq.0 == a);
                    let fits = !used && m.cqs.get(&a) == Some(&false);
                    prop_assert_eq!(t.delete_cq(a).is_ok(), fits);
                    if fits {
                        m.cqs.insert(a, true);
                    }
                }
                _ => if m.cqs.get(&a) == Some(&true) {
                    m.cqs.remove(&a);
                    t.deleted_cq(a);
                },
            }
            prop_assert_eq!(t.is_empty(), m.cqs.is_empty() && m.sqs.is_empty());
            for sqid in 1..6 {
                let found = t.abort(RawAbort { sqid, cid: 0 }).is_ok();
                prop_assert_eq!(found, m.sqs.contains_key(&sqid));
            }
        }
    }
}
