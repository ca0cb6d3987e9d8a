//! Log pages, by the specification's offsets.

use std::sync::atomic::Ordering::Relaxed;

use super::*;

#[test]
fn which_pages_there_are() {
    for (mut rig, ana) in [(Rig::new(), false), (Rig::shared(), true)] {
        let (_, page) = rig.done(&log(0x00, 1024, 0, false), &[]);
        let there = |lid: u8| u32_at(&page, usize::from(lid) * 4);
        for lid in 0..=255 {
            let known = [0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x12, 0x13].contains(&lid)
                || lid == 0x0c && ana;
            assert_eq!(there(lid), u32::from(known), "{lid:#x}");
            match known {
                true => drop(rig.done(&log(lid, 64, 0, true), &[])),
                false => assert_eq!(
                    rig.failed(&log(lid, 64, 0, true), &[]),
                    Status::LOG_PAGE,
                    "{lid:#x}"
                ),
            }
        }
    }
}

/// C4: offsets past the end of a page.
#[test]
fn c04_log_page_offset_past_the_structure() {
    let mut rig = Rig::shared();
    for (lid, len) in [
        (0x00, 1024u64),
        (0x01, 4096),
        (0x02, 512),
        (0x03, 512),
        (0x04, 4096),
        (0x05, 4096),
        (0x0c, 16 + 32 + 8),
        (0x12, 1024),
        (0x13, 4096),
    ] {
        let (_, whole) = rig.done(&log(lid, len as u32, 0, true), &[]);
        for offset in (0..len).step_by(4) {
            let (_, part) = rig.done(&log(lid, 8, offset, true), &[]);
            let mut expected = whole[offset as usize..].to_vec();
            expected.resize(8.max(expected.len()), 0);
            assert_eq!(part, expected[..8], "{lid:#x} {offset}");
        }
        assert_eq!(
            rig.done(&log(lid, 64, len, true), &[]).1,
            [0; 64],
            "just at the end there is nothing"
        );
        for offset in [len + 4, 1 << 20, 1 << 32, 1 << 63, u64::MAX - 3] {
            assert_eq!(
                rig.failed(&log(lid, 64, offset, true), &[]),
                Status::INVALID_FIELD,
                "{lid:#x} {offset:#x}"
            );
        }
        for offset in [1, 2, 3, len - 1] {
            assert_eq!(
                rig.failed(&log(lid, 64, offset, true), &[]),
                Status::INVALID_FIELD,
                "not a dword"
            );
        }
        let mut by_index = log(lid, 64, 0, true);
        by_index.cdw14 = (1u32 << 23).into();
        assert_eq!(rig.failed(&by_index, &[]), Status::INVALID_FIELD);
        let mut of_a_namespace = log(lid, 64, 0, true);
        of_a_namespace.nsid = 1.into();
        assert_eq!(rig.failed(&of_a_namespace, &[]), Status::INVALID_FIELD);
        of_a_namespace.nsid = 0.into();
        let _ = rig.done(&of_a_namespace, &[]);
    }
}

#[test]
fn longer_than_a_command_may_be() {
    let mut rig = Rig::new();
    assert_eq!(
        rig.admin.transfer(&log(0x02, 1 << 20, 0, false)),
        Ok(Transfer::ToHost(1 << 20))
    );
    assert_eq!(
        rig.failed(&log(0x02, (1 << 20) + 4, 0, false), &[]),
        Status::INVALID_FIELD
    );
    let mut most = log(0x02, 4, 0, false);
    most.cdw10 = 0xffff_0002.into();
    most.cdw11 = 0xffff.into();
    assert_eq!(rig.failed(&most, &[]), Status::INVALID_FIELD);
}

#[test]
fn errors_newest_first() {
    let mut rig = Rig::new();
    let mut command = dwords(0x02, 1, [0; 2]);
    command.cid = 0x1234.into();
    let report = ErrorReport {
        location: Some((40, 3)),
        lba: 0x1_0000_0001,
        ..ErrorReport::of(5, &command, Status::LBA_RANGE)
    };
    rig.admin.report_error(&report);
    rig.admin.report_doorbell(BadDoorbell::Value, Some(7));
    rig.admin.report_doorbell(BadDoorbell::Queue, None);
    let (_, page) = rig.done(&log(0x01, 256, 0, true), &[]);
    assert_eq!([0, 64, 128, 192].map(|at| u64_at(&page, at)), [3, 2, 1, 0]);
    assert_eq!([8, 10, 14].map(|at| u16_at(&page, at)), [0xffff; 3]);
    assert_eq!(u16_at(&page, 64 + 8), 7, "SQID");
    let one = &page[128..192];
    assert_eq!((u16_at(one, 8), u16_at(one, 10)), (5, 0x1234), "SQID, CID");
    assert_eq!(u16_at(one, 12), Status::LBA_RANGE.bits() << 1);
    assert_eq!(u16_at(one, 14), 40 | 3 << 8, "location");
    assert_eq!(
        (u64_at(one, 16), u32_at(one, 24)),
        (0x1_0000_0001, 1),
        "LBA, NSID"
    );
    assert_eq!((one[31], one[63]), (2, 1), "opcode, version");
    for _ in 0..100 {
        rig.admin.report_error(&report);
    }
    let (_, page) = rig.done(&log(0x01, 4096, 0, true), &[]);
    assert_eq!(
        (u64_at(&page, 0), u64_at(&page, 63 * 64)),
        (103, 40),
        "the last 64"
    );
    rig.admin.reset(4096, rig.now);
    assert_eq!(rig.done(&log(0x01, 64, 0, true), &[]).1, [0; 64]);
    rig.admin.report_error(&report);
    let (_, page) = rig.done(&log(0x01, 64, 0, true), &[]);
    assert_eq!(u64_at(&page, 0), 104, "the count goes on");
    let (_, health) = rig.done(&log(0x02, 512, 0, true), &[]);
    assert_eq!(u64_at(&health, 176), 104);
}

#[test]
fn health() {
    let mut rig = Rig::new();
    let counters = rig.admin.counters.clone();
    let queue = counters.queue(1);
    crate::counters::add(&queue.bytes_read, 512_000);
    crate::counters::add(&queue.bytes_written, 512_001);
    crate::counters::add(&queue.reads, 3);
    crate::counters::add(&queue.writes, 4);
    counters.busy_us.store(119_999_999, Relaxed);
    crate::counters::add(&queue.media_errors, 5);
    counters.unsafe_shutdowns.store(6, Relaxed);
    counters.kelvins.store(300, Relaxed);
    rig.wait(Duration::from_secs(7200));
    let (_, page) = rig.done(&log(0x02, 512, 0, true), &[]);
    assert_eq!(
        (page[0], u16_at(&page, 1), page[3], page[4], page[5]),
        (0, 300, 100, 0, 0)
    );
    let counts = [32, 48, 64, 80, 96, 112, 128, 144, 160, 176].map(|at| u64_at(&page, at));
    assert_eq!(counts, [1, 2, 3, 4, 1, 1, 2, 6, 5, 0]);
    assert!(page[192..].iter().all(|b| *b == 0));
    counters.kelvins.store(343, Relaxed);
    counters.spare_threshold.store(20, Relaxed);
    counters.spare.store(19, Relaxed);
    let (_, page) = rig.done(&log(0x02, 512, 0, true), &[]);
    assert_eq!((page[0], page[3], page[4]), (0b11, 19, 20));
}

#[test]
fn firmware() {
    let (_, page) = Rig::new().done(&log(0x03, 512, 0, true), &[]);
    assert_eq!(page[0], 1);
    assert_eq!(
        &page[8..16],
        format!("{:8}", env!("CARGO_PKG_VERSION")).as_bytes()
    );
    assert!(page[16..].iter().all(|b| *b == 0), "no other slot");
}

#[test]
fn changed_namespaces() {
    let mut rig = Rig::shared();
    let id = rig.member.id();
    rig.subsystem.attach(3, id, false).unwrap();
    rig.subsystem.attach(3, id, true).unwrap();
    let added = NamespaceOptions::new(Identity::hashed("new"));
    rig.subsystem
        .add(Arc::new(Null::new(512, 1 << 20)), added)
        .unwrap();
    let nsids = |page: &[u8]| [0, 4, 8, 12].map(|at| u32_at(page, at));
    let (_, page) = rig.done(&log(0x04, 4096, 0, true), &[]);
    assert_eq!(nsids(&page), [2, 3, 0, 0]);
    let (_, page) = rig.done(&log(0x04, 16, 0, false), &[]);
    assert_eq!(nsids(&page), [2, 3, 0, 0], "retained");
    let (_, page) = rig.done(&log(0x04, 16, 0, false), &[]);
    assert_eq!(nsids(&page), [0; 4], "read");
}

#[test]
fn more_changes_than_the_list_has_room_for() {
    let mut rig = Rig::new();
    for nsid in 1..=1024 {
        rig.admin
            .handle_event(&SubsystemEvent::NamespaceChanged(nsid));
    }
    let (_, page) = rig.done(&log(0x04, 4096, 0, true), &[]);
    assert_eq!((u32_at(&page, 0), u32_at(&page, 4092)), (1, 1024));
    for nsid in 1025..5000 {
        rig.admin
            .handle_event(&SubsystemEvent::NamespaceChanged(nsid));
    }
    let (_, page) = rig.done(&log(0x04, 4096, 0, false), &[]);
    assert_eq!(u32_at(&page, 0), 0xffff_ffff);
    assert!(page[4..].iter().all(|b| *b == 0));
}

#[test]
fn commands_and_their_effects() {
    let (_, page) = Rig::new().done(&log(0x05, 4096, 0, true), &[]);
    let supported = |from: usize| -> Vec<usize> {
        (0..256)
            .filter(|o| u32_at(&page, from + o * 4) & 1 != 0)
            .collect()
    };
    assert_eq!(
        supported(0),
        [0, 1, 2, 4, 5, 6, 8, 9, 0x0a, 0x0c, 0x7c, 0x80]
    );
    assert_eq!(supported(1024), [0, 1, 2, 5, 8, 9, 0x0c, 0x19]);
    assert_eq!(
        u32_at(&page, 0x80 * 4),
        1 | 1 << 1 | 1 << 2 | 2 << 16 | 1 << 20,
        "Format NVM"
    );
    assert_eq!(u32_at(&page, 1024 + 4), 1 | 1 << 1 | 1 << 20, "Write");
    assert_eq!(u32_at(&page, 1024 + 8), 1 | 1 << 20, "Read");
    let mut other = log(0x05, 4096, 0, true);
    other.cdw14 = (1u32 << 24).into();
    let other = Rig::new().done(&other, &[]).1;
    assert_eq!(other[..1024], page[..1024], "admin commands are the same");
    assert!(other[1024..].iter().all(|byte| *byte == 0));
}

/// What the page says, and what the commands say, is the same.
#[test]
fn features_and_their_effects() {
    for with_cache in [true, false] {
        let mut rig = match with_cache {
            true => Rig::new(),
            false => Rig::on(subsystem(false), ControllerOptions::new("x")),
        };
        let (_, page) = rig.done(&log(0x12, 1024, 0, true), &[]);
        for fid in 0..=255u8 {
            let said = u32_at(&page, usize::from(fid) * 4) & 1 != 0;
            let nsid = u32::from(fid == 5);
            let command = dwords(0x0a, nsid, [u32::from(fid) | 3 << 8, 0]);
            match rig.execute(&command, &[]) {
                Outcome::Done { .. } => assert!(said, "{fid:#x}"),
                // Without a namespace there is none to ask for.
                Outcome::Failed(_) => assert!(!said || fid == 5 && !with_cache, "{fid:#x}"),
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn ana() {
    let mut rig = Rig::shared();
    let two = NamespaceOptions {
        group: 7,
        ..NamespaceOptions::new(Identity::hashed("two"))
    };
    rig.subsystem
        .add(Arc::new(Null::new(512, 1 << 20)), two)
        .unwrap();
    rig.subsystem
        .set_ana(7, Some(rig.member.id()), crate::AnaState::NonOptimized)
        .unwrap();
    rig.subsystem
        .set_ana(7, Some(rig.member.id()), crate::AnaState::Inaccessible)
        .unwrap();
    let (_, page) = rig.done(&log(0x0c, 256, 0, true), &[]);
    assert_eq!(
        (u64_at(&page, 0), u16_at(&page, 8)),
        (2, 2),
        "changes, groups"
    );
    assert_eq!(
        (
            u32_at(&page, 16),
            u32_at(&page, 20),
            u64_at(&page, 24),
            page[32]
        ),
        (1, 2, 0, 1)
    );
    assert_eq!((u32_at(&page, 48), u32_at(&page, 52)), (1, 3), "NSIDs");
    let seven = &page[56..];
    assert_eq!(
        (
            u32_at(seven, 0),
            u32_at(seven, 4),
            u64_at(seven, 8),
            seven[16]
        ),
        (7, 1, 2, 3)
    );
    assert_eq!(u32_at(seven, 32), 2);
    assert!(page[56 + 36..].iter().all(|b| *b == 0));
    // Groups only.
    let mut short = log(0x0c, 256, 0, true);
    short.cdw10 = (short.cdw10.get() | 1 << 8).into();
    let (_, page) = rig.done(&short, &[]);
    assert_eq!(
        (
            u32_at(&page, 16),
            u32_at(&page, 20),
            u32_at(&page, 48),
            u32_at(&page, 52)
        ),
        (1, 0, 7, 0)
    );
}
