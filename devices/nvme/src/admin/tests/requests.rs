//! Opcodes, flags, event requests and aborts.

use std::sync::atomic::Ordering::Relaxed;

use bluff_testing::times;
use proptest::prelude::*;

use super::*;

const NAMESPACE: u32 = 0x0004_0002;
const ANA: u32 = 0x000c_0302;

/// C14: reserved PSDT, fused operations, opcodes that are none.
#[test]
fn c14_reserved_psdt_fuse_and_opcode() {
    let mut rig = Rig::new();
    let known = [0, 1, 2, 4, 5, 6, 8, 9, 0x0a, 0x0c, 0x7c, 0x80];
    for opcode in 0..=255u8 {
        for flags in [0b01, 0b10, 0b11, 1 << 6, 2 << 6, 3 << 6, 0xc1] {
            let mut command = dwords(opcode, 1, [0; 2]);
            command.flags = flags;
            let status = match known.contains(&opcode) {
                true => Status::INVALID_FIELD,
                false => Status::INVALID_OPCODE,
            };
            assert_eq!(
                rig.admin.transfer(&command),
                Err(status),
                "{opcode:#x} {flags:#x}"
            );
            assert_eq!(rig.failed(&command, &[]), status);
        }
        if !known.contains(&opcode) {
            assert_eq!(
                rig.failed(&dwords(opcode, 0, [0; 2]), &[]),
                Status::INVALID_OPCODE,
                "{opcode:#x}"
            );
        }
    }
    // What is reserved in between is ignored.
    let mut command = identify(0x01, 0);
    command.flags = 0b0011_1100;
    let _ = rig.done(&command, &[]);
}

/// C5: directives, with and without an endurance group, and what else names one.
#[test]
fn c05_directive_without_an_endurance_group() {
    let mut rig = Rig::new();
    for opcode in [0x19, 0x1a] {
        for cdw11 in [0, 1, 0x0100, 0x0101, 0x0200, 0x0201, 0xffff_ffff] {
            for nsid in [0, 1, 2, 0xffff_ffff] {
                assert_eq!(
                    rig.failed(&dwords(opcode, nsid, [0x3ff, cdw11]), &[]),
                    Status::INVALID_OPCODE
                );
            }
        }
    }
    // Endurance groups, flexible data placement and NVM sets: log pages, features, structures.
    for lid in [0x09, 0x0a, 0x0b, 0x0f, 0x20, 0x21, 0x22, 0x23] {
        for lsi in [0u32, 1, 0xffff] {
            let mut command = log(lid, 512, 0, true);
            command.cdw11 = (lsi << 16).into();
            assert_eq!(rig.failed(&command, &[]), Status::LOG_PAGE, "{lid:#x}");
        }
    }
    for fid in [0x1d, 0x1e, 0x18, 0x13] {
        assert_eq!(rig.get(fid, 1), Err(Status::INVALID_FIELD));
        assert_eq!(rig.set(fid, 1), Err(Status::INVALID_FIELD));
    }
    for cns in [0x04, 0x19] {
        assert_eq!(rig.failed(&identify(cns, 0), &[]), Status::INVALID_FIELD);
    }
}

/// C6: Abort of submission queue 65535, and of others that are not there.
#[test]
fn c06_abort_of_a_queue_that_is_not_there() {
    let mut rig = Rig::new();
    for sqid in [0xffffu16, 1, 8, 9, 0x8000] {
        let command = dwords(0x08, 0, [u32::from(sqid) | 7 << 16, 0]);
        let raw = RawAbort { sqid, cid: 7 };
        assert_eq!(
            rig.execute(&command, &[]),
            Outcome::Queue(QueueCommand::Abort(raw))
        );
        assert_eq!(
            rig.admin.queues.abort(raw),
            Err(Status::INVALID_FIELD),
            "{sqid}"
        );
        rig.admin.abort_done();
    }
}

#[test]
fn so_many_aborts_at_a_time() {
    let mut rig = Rig::new();
    let abort = dwords(0x08, 0, [5 << 16, 0]);
    for _ in 0..4 {
        assert!(matches!(rig.execute(&abort, &[]), Outcome::Queue(_)));
    }
    assert_eq!(rig.failed(&abort, &[]), Status::ABORT_LIMIT);
    rig.admin.abort_done();
    assert!(matches!(rig.execute(&abort, &[]), Outcome::Queue(_)));
    rig.admin.reset(4096, rig.now);
    assert!(
        matches!(rig.execute(&abort, &[]), Outcome::Queue(_)),
        "a reset forgets them"
    );
}

#[test]
fn what_concerns_queues_is_passed_on() {
    let mut rig = Rig::new();
    let mut command = dwords(0x05, 0, [0x00ff_0003, 0x0004_0003]);
    command.dptr[0] = 0x8000.into();
    let cq = RawCreateCq {
        prp1: 0x8000,
        qid: 3,
        size_z: 255,
        contiguous: true,
        interrupts: true,
        vector: 4,
    };
    assert_eq!(
        rig.execute(&command, &[]),
        Outcome::Queue(QueueCommand::CreateCq(cq))
    );
    command.opcode = 0x01;
    let sq = RawCreateSq {
        prp1: 0x8000,
        qid: 3,
        size_z: 255,
        contiguous: true,
        priority: 1,
        cqid: 4,
    };
    assert_eq!(
        rig.execute(&command, &[]),
        Outcome::Queue(QueueCommand::CreateSq(sq))
    );
    assert_eq!(
        rig.execute(&dwords(0x00, 0, [9, 0]), &[]),
        Outcome::Queue(QueueCommand::DeleteSq(9))
    );
    assert_eq!(
        rig.execute(&dwords(0x04, 0, [9, 0]), &[]),
        Outcome::Queue(QueueCommand::DeleteCq(9))
    );
}

#[test]
fn shadow_doorbells_are_two_pages() {
    let mut rig = Rig::new();
    let buffers = |shadow: u64, event: u64| {
        let mut command = dwords(0x7c, 0, [0; 2]);
        command.dptr = [shadow.into(), event.into()];
        command
    };
    let outcome = rig.execute(&buffers(0x1000, 0x2000), &[]);
    let expected = QueueCommand::DoorbellBuffer {
        shadow: 0x1000,
        event: 0x2000,
    };
    assert_eq!(outcome, Outcome::Queue(expected));
    for (shadow, event) in [(0x1004, 0x2000), (0x1000, 0x2800)] {
        assert_eq!(
            rig.failed(&buffers(shadow, event), &[]),
            Status::INVALID_FIELD
        );
    }
    rig.admin.reset(8192, rig.now);
    assert_eq!(
        rig.failed(&buffers(0x1000, 0x2000), &[]),
        Status::INVALID_FIELD,
        "a page is larger"
    );
    let options = ControllerOptions {
        shadow_doorbells: false,
        ..ControllerOptions::new("x")
    };
    let mut polled = Rig::on(subsystem(false), options);
    assert_eq!(
        polled.failed(&buffers(0x1000, 0x2000), &[]),
        Status::INVALID_OPCODE
    );
}

#[test]
fn event_requests_have_a_limit() {
    let mut rig = Rig::new();
    for cid in 0..8 {
        assert_eq!(rig.request(cid), Outcome::Held);
    }
    assert_eq!(rig.request(8), Outcome::Failed(Status::ASYNC_EVENT_LIMIT));
    assert!(!rig.admin.abort_event(8));
    assert!(rig.admin.abort_event(3));
    assert!(!rig.admin.abort_event(3));
    assert_eq!(rig.request(4), Outcome::Failed(Status::CID_CONFLICT));
    assert_eq!(rig.request(3), Outcome::Held);
    rig.admin.reset(4096, rig.now);
    assert!(!rig.admin.abort_event(0), "a reset forgets them");
    assert_eq!(rig.admin.poll_event(), None);
}

#[test]
fn a_notice_is_told_once_until_its_log_is_read() {
    let mut rig = Rig::shared();
    let id = rig.member.id();
    let change = |rig: &mut Rig| {
        rig.subsystem.attach(3, id, false).unwrap();
        rig.subsystem.attach(3, id, true).unwrap();
        rig.hear();
    };
    for cid in 0..4 {
        rig.request(cid);
    }
    change(&mut rig);
    assert_eq!(rig.admin.poll_event(), None, "not enabled");
    rig.set(0x0b, 1 << 8 | 1 << 11).unwrap();
    change(&mut rig);
    assert_eq!(rig.admin.poll_event(), Some((0, NAMESPACE)));
    change(&mut rig);
    assert_eq!(rig.admin.poll_event(), None, "masked");
    rig.subsystem
        .set_ana(1, None, crate::AnaState::Change)
        .unwrap();
    rig.hear();
    assert_eq!(rig.admin.poll_event(), None, "of the same type");
    rig.done(&log(0x04, 16, 0, true), &[]);
    assert_eq!(rig.admin.poll_event(), None, "read, but retained");
    rig.done(&log(0x0c, 16, 0, true), &[]);
    rig.done(&log(0x02, 16, 0, false), &[]);
    assert_eq!(rig.admin.poll_event(), None, "another page");
    rig.done(&log(0x04, 16, 0, false), &[]);
    assert_eq!(
        rig.admin.poll_event(),
        Some((1, ANA)),
        "the change of before was in the list that was read"
    );
    change(&mut rig);
    rig.done(&log(0x0c, 16, 0, false), &[]);
    assert_eq!(rig.admin.poll_event(), Some((2, NAMESPACE)));
    assert_eq!(rig.admin.poll_event(), None);
}

#[test]
fn an_event_waits_for_a_request() {
    let mut rig = Rig::new();
    for _ in 0..1000 {
        rig.admin.report_doorbell(BadDoorbell::Value, Some(1));
        rig.admin.report_doorbell(BadDoorbell::Queue, None);
    }
    assert_eq!(rig.admin.poll_event(), None);
    rig.request(77);
    rig.request(78);
    assert_eq!(
        rig.admin.poll_event(),
        Some((77, 0x0001_0100)),
        "invalid doorbell value"
    );
    rig.done(&log(0x01, 64, 0, false), &[]);
    assert_eq!(rig.admin.poll_event(), None, "the log has said it all");
    rig.admin.report_doorbell(BadDoorbell::Queue, None);
    assert_eq!(
        rig.admin.poll_event(),
        Some((78, 0x0001_0000)),
        "invalid doorbell"
    );
}

#[test]
fn a_warning_is_told_when_it_begins() {
    let mut rig = Rig::new();
    (0..8).for_each(|cid| drop(rig.request(cid)));
    let counters = rig.admin.counters.clone();
    counters.kelvins.store(400, Relaxed);
    assert_eq!(rig.admin.poll_event(), None, "not enabled");
    rig.set(0x0b, 3).unwrap();
    assert_eq!(rig.admin.poll_event(), None, "it began before");
    rig.set(4, 340).unwrap();
    assert_eq!(
        rig.admin.poll_event(),
        Some((0, 0x0002_0101)),
        "the threshold is another one"
    );
    counters.spare_threshold.store(50, Relaxed);
    counters.spare.store(10, Relaxed);
    assert_eq!(rig.admin.poll_event(), None, "masked");
    rig.done(&log(0x02, 512, 0, false), &[]);
    assert_eq!(rig.admin.poll_event(), None, "the page has said it");
    counters.spare.store(100, Relaxed);
    assert_eq!(rig.admin.poll_event(), None);
    counters.spare.store(10, Relaxed);
    assert_eq!(rig.admin.poll_event(), Some((1, 0x0002_0201)));
}

#[test]
fn a_resized_volume_is_another_namespace() {
    let s = subsystem(false);
    let volume = Shape::new(Geometry::new(512, 1 << 20));
    s.add(volume.clone(), NamespaceOptions::new(Identity::hashed("v")))
        .unwrap();
    let mut rig = Rig::on(s, ControllerOptions::new("x"));
    rig.set(0x0b, 1 << 8).unwrap();
    rig.request(5);
    let before = rig.admin.table().get(1, 32).unwrap().clone();
    volume.resize(2 << 20).unwrap();
    rig.hear();
    assert_eq!(rig.admin.poll_event(), Some((5, NAMESPACE)));
    let after = rig.admin.table().get(1, 32).unwrap().clone();
    assert_eq!((before.blocks(), after.blocks()), (2048, 4096));
    assert!(after.generation > before.generation);
    assert_eq!(u64_at(&rig.done(&identify(0x00, 1), &[]).1, 0), 4096);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(times(300, 20_000)) })]

    /// The same program as the fuzz target's.
    #[test]
    fn any_commands_are_survived(data in prop::collection::vec(any::<u8>(), 0..1500)) {
        crate::fuzzing::fuzz_admin(&data);
    }

    #[test]
    fn sensible_commands_are_survived(data in prop::collection::vec(0..40u8, 0..1500)) {
        crate::fuzzing::fuzz_admin(&data);
    }
}
