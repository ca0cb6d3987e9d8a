//! Get Features and Set Features.

use std::sync::atomic::Ordering::Relaxed;

use super::*;

const ALL: u32 = 0xffff_ffff;

fn select(fid: u8, select: u32, cdw11: u32) -> Command {
    dwords(0x0a, 0, [u32::from(fid) | select << 8, cdw11])
}

#[test]
fn what_is_set_is_what_is_got_until_a_reset() {
    let mut rig = Rig::new();
    // Feature, what is set, what is got, default.
    for (fid, value, now, default) in [
        (0x01, 0x1122_3303, 0x1122_3303, 7),
        (0x02, 3 << 5, 3 << 5, 0),
        (0x04, 300, 300, 343),
        (0x06, 0, 0, 1),
        (0x08, 0x6407, 0x6407, 0),
        (0x0a, 1, 1, 0),
        (0x0b, 0x1ff, 0x103, 0),
        (0x19, 0, 0, 0),
    ] {
        assert_eq!(rig.get(fid, 0), Ok((default, vec![])), "{fid:#x}");
        assert_eq!(rig.set(fid, value), Ok(0), "{fid:#x}");
        assert_eq!(rig.get(fid, 0), Ok((now, vec![])), "{fid:#x}");
        for which in [1, 2] {
            assert_eq!(
                rig.done(&select(fid, which, 0), &[]).0,
                default,
                "{fid:#x}, default and saved"
            );
        }
        assert_eq!(
            rig.done(&select(fid, 3, 0), &[]),
            (4, vec![]),
            "{fid:#x}: changeable"
        );
        for reserved in 4..8 {
            assert_eq!(
                rig.failed(&select(fid, reserved, 0), &[]),
                Status::INVALID_FIELD
            );
        }
    }
    let settings = rig.admin.settings.clone();
    assert!(!settings.write_cache.load(Relaxed));
    assert_eq!(settings.coalescing.load(Relaxed), 0x6407);
    rig.admin.reset(4096, rig.now);
    assert!(settings.write_cache.load(Relaxed));
    assert_eq!(
        (
            settings.coalescing.load(Relaxed),
            settings.arbitration.load(Relaxed)
        ),
        (0, 7)
    );
    assert_eq!(rig.get(0x0b, 0), Ok((0, vec![])));
}

#[test]
fn values_that_would_mean_nothing_are_refused() {
    let mut rig = Rig::new();
    for (fid, value, status) in [
        (0x02, 1, Status::INVALID_FIELD),
        (0x04, 1 << 16 | 300, Status::INVALID_FIELD),
        (0x04, 2 << 20 | 300, Status::INVALID_FIELD),
        (0x07, 0xffff, Status::INVALID_FIELD),
        (0x07, 0xffff << 16, Status::INVALID_FIELD),
        (0x09, 9, Status::INVALID_FIELD),
        (0x09, 0xffff, Status::INVALID_FIELD),
        (0x19, 1, Status::COMMAND_SET_COMBINATION),
    ] {
        assert_eq!(rig.set(fid, value), Err(status), "{fid:#x} {value:#x}");
    }
    let known = [1, 2, 4, 5, 6, 7, 8, 9, 0x0a, 0x0b, 0x0e, 0x16, 0x19, 0x81];
    for fid in (0..=255).filter(|fid| !known.contains(fid)) {
        assert_eq!(rig.set(fid, 0), Err(Status::INVALID_FIELD), "{fid:#x}");
        assert_eq!(rig.get(fid, 0), Err(Status::INVALID_FIELD), "{fid:#x}");
    }
    for fid in known {
        let command = dwords(0x09, 0, [u32::from(fid) | 1 << 31, 0]);
        assert_eq!(rig.failed(&command, &[]), Status::NOT_SAVEABLE, "{fid:#x}");
    }
}

#[test]
fn a_namespace_where_there_should_be_none_and_none_where_there_should_be() {
    let mut rig = Rig::new();
    let set = |fid: u32, nsid| dwords(0x09, nsid, [fid, 0]);
    let get = |fid: u32, nsid| dwords(0x0a, nsid, [fid, 0]);
    for fid in [0x01, 0x06, 0x0b] {
        for nsid in [0, ALL] {
            rig.done(&set(fid, nsid), &[]);
            rig.done(&get(fid, nsid), &[]);
        }
        assert_eq!(
            rig.failed(&set(fid, 1), &[]),
            Status::NOT_NAMESPACE_SPECIFIC
        );
        rig.done(&get(fid, 1), &[]);
        for (nsid, status) in [(2, Status::INVALID_FIELD), (33, Status::INVALID_NAMESPACE)] {
            assert_eq!(rig.failed(&set(fid, nsid), &[]), status);
            assert_eq!(rig.failed(&get(fid, nsid), &[]), status);
        }
    }
    // Error recovery is a namespace's.
    rig.done(&set(5, 1), &[]);
    rig.done(&set(5, ALL), &[]);
    assert_eq!(rig.done(&get(5, 3), &[]).0, 0);
    assert_eq!(
        rig.done(&dwords(0x0a, 1, [5 | 3 << 8, 0]), &[]).0,
        2,
        "by namespace, and not changeable"
    );
    for (nsid, status) in [
        (0, Status::INVALID_NAMESPACE),
        (2, Status::INVALID_FIELD),
        (33, Status::INVALID_NAMESPACE),
    ] {
        assert_eq!(rig.failed(&set(5, nsid), &[]), status);
        assert_eq!(rig.failed(&get(5, nsid), &[]), status);
    }
    assert_eq!(
        rig.failed(&get(5, ALL), &[]),
        Status::INVALID_NAMESPACE,
        "all have no one value"
    );
    assert_eq!(
        rig.failed(&dwords(0x09, 1, [5, 10]), &[]),
        Status::NOT_CHANGEABLE,
        "a time limit"
    );
    assert_eq!(
        rig.failed(&dwords(0x09, 1, [5, 1 << 16]), &[]),
        Status::INVALID_FIELD,
        "DULBE"
    );
}

#[test]
fn queues_are_granted_before_there_are_any() {
    let mut rig = Rig::new();
    assert_eq!(rig.get(7, 0), Ok((7 | 7 << 16, vec![])));
    assert_eq!(rig.set(7, 0xfffe_fffe), Ok(7 | 7 << 16));
    assert_eq!(
        rig.set(7, 2 | 4 << 16),
        Ok(2 | 4 << 16),
        "submission, completion"
    );
    assert_eq!(rig.get(7, 0), Ok((2 | 4 << 16, vec![])));
    assert_eq!(rig.done(&select(7, 1, 0), &[]).0, 7 | 7 << 16);
    let cq = RawCreateCq {
        prp1: 0x1000,
        qid: 5,
        size_z: 7,
        contiguous: true,
        interrupts: false,
        vector: 0,
    };
    let cc = crate::spec::registers::Cc(4 << 20 | 6 << 16 | 1);
    rig.admin.queues.create_cq(&cq, cc).unwrap();
    assert_eq!(rig.set(7, 0), Err(Status::SEQUENCE_ERROR));
    rig.admin.reset(4096, rig.now);
    assert_eq!(rig.get(7, 0), Ok((7 | 7 << 16, vec![])));
}

#[test]
fn without_a_volatile_cache_there_is_no_such_feature() {
    let s = subsystem(false);
    let mut rig = Rig::on(s.clone(), ControllerOptions::new("x"));
    assert_eq!(rig.set(6, 1), Err(Status::INVALID_FIELD));
    assert_eq!(rig.get(6, 0), Err(Status::INVALID_FIELD));
    // One that comes later is written through: the host was told that it need not flush.
    s.add(
        Shape::new(Geometry::new(512, 1 << 20)),
        NamespaceOptions::new(Identity::hashed("c")),
    )
    .unwrap();
    assert_eq!(rig.set(6, 1), Err(Status::INVALID_FIELD));
    assert_eq!(rig.done(&identify(0x01, 0), &[]).1[525] & 1, 0);
    assert!(!rig.admin.settings.write_cache.load(Relaxed));
    rig.admin.reset(4096, rig.now);
    assert_eq!(rig.get(6, 0), Ok((1, vec![])));
    assert_eq!(rig.done(&identify(0x01, 0), &[]).1[525] & 1, 1);
}

#[test]
fn vectors_without_coalescing() {
    let mut rig = Rig::new();
    assert_eq!(rig.set(9, 8 | 1 << 16), Ok(0));
    assert_eq!(rig.get(9, 8), Ok((8 | 1 << 16, vec![])));
    assert_eq!(rig.get(9, 7), Ok((7, vec![])));
    assert_eq!(rig.get(9, 9), Err(Status::INVALID_FIELD));
    assert_eq!(rig.done(&select(9, 1, 8), &[]).0, 8);
    assert!(rig.admin.settings.uncoalesced[8].load(Relaxed));
    assert_eq!(rig.set(9, 8), Ok(0));
    assert!(!rig.admin.settings.uncoalesced[8].load(Relaxed));
}

#[test]
fn time_goes_on_from_where_it_was_set() {
    let mut rig = Rig::new();
    rig.wait(Duration::from_millis(5));
    assert_eq!(
        rig.get(0x0e, 0).unwrap().1,
        [5, 0, 0, 0, 0, 0, 0, 0],
        "since the reset"
    );
    let mut data = 0x1234_5678_9abcu64.to_le_bytes();
    data[6..].fill(0xff);
    let command = set_feature(0x0e, 0);
    assert_eq!(rig.admin.transfer(&command), Ok(Transfer::FromHost(8)));
    rig.done(&command, &data);
    rig.wait(Duration::from_millis(4));
    let (_, got) = rig.get(0x0e, 0).unwrap();
    assert_eq!(
        (u64_at(&got, 0) & 0xffff_ffff_ffff, got[6], got[7]),
        (0x1234_5678_9ac0, 1 << 1, 0)
    );
    assert_eq!(rig.done(&select(0x0e, 1, 0), &[]).1, [0; 8]);
}

#[test]
fn host_identifiers_of_both_sizes() {
    let mut rig = Rig::new();
    assert_eq!(
        rig.admin.transfer(&set_feature(0x81, 0)),
        Ok(Transfer::FromHost(8))
    );
    assert_eq!(
        rig.admin.transfer(&set_feature(0x81, 1)),
        Ok(Transfer::FromHost(16))
    );
    let id: Vec<u8> = (1..=16).collect();
    rig.done(&set_feature(0x81, 1), &id);
    assert_eq!(rig.get(0x81, 1).unwrap().1, id);
    assert_eq!(rig.get(0x81, 0).unwrap().1, id[..8]);
    rig.done(&set_feature(0x81, 0), &[9; 8]);
    assert_eq!(rig.get(0x81, 1).unwrap().1, [[9; 8], [0; 8]].concat());
    assert_eq!(
        rig.failed(&set_feature(0x81, 1), &[9; 8]),
        Status::DATA_TRANSFER_ERROR,
        "a worker that forgot"
    );
}

#[test]
fn host_behaviour_takes_what_there_is() {
    let mut rig = Rig::new();
    let behaviour = |at: usize, value: u8| {
        let mut data = vec![0; 512];
        data[at] = value;
        data
    };
    let command = set_feature(0x16, 0);
    assert_eq!(rig.admin.transfer(&command), Ok(Transfer::FromHost(512)));
    rig.done(&command, &behaviour(0, 1));
    assert_eq!(rig.get(0x16, 0).unwrap().1, behaviour(0, 1));
    for (at, value) in [(0, 2), (1, 1), (2, 1), (3, 1), (4, 4), (5, 1)] {
        assert_eq!(
            rig.failed(&command, &behaviour(at, value)),
            Status::INVALID_FIELD,
            "{at}"
        );
    }
    rig.done(&command, &behaviour(6, 1));
    assert_eq!(
        rig.get(0x16, 0).unwrap().1,
        vec![0; 512],
        "what is reserved is ignored"
    );
}

#[test]
fn temperature_thresholds() {
    let mut rig = Rig::new();
    assert_eq!(rig.set(4, 1 << 20 | 280), Ok(0));
    assert_eq!(rig.get(4, 1 << 20), Ok((280, vec![])));
    assert_eq!(rig.set(4, 0xf << 16 | 330), Ok(0), "all sensors");
    assert_eq!(rig.get(4, 0), Ok((330, vec![])));
    assert_eq!(
        rig.get(4, 0xf << 16),
        Err(Status::INVALID_FIELD),
        "all have no one value"
    );
    assert_eq!(rig.get(4, 3 << 20), Err(Status::INVALID_FIELD));
    assert_eq!(rig.done(&select(4, 1, 1 << 20), &[]).0, 0);
    assert_eq!(rig.admin.warning(), 0, "nobody knows how warm it is");
    for (kelvins, warm) in [(281, 0), (280, 2), (279, 2), (329, 0), (330, 2)] {
        rig.admin.counters.kelvins.store(kelvins, Relaxed);
        assert_eq!(rig.admin.warning(), warm, "{kelvins}");
    }
}
