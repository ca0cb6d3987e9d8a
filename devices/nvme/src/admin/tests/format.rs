//! Format NVM.

use super::*;

fn format(nsid: u32, cdw10: u32) -> Command {
    dwords(0x80, nsid, [cdw10, 0])
}

#[test]
fn what_can_be_formatted() {
    let mut rig = Rig::new();
    for (command, nsids, lbaf, erase) in [
        (format(1, 0), vec![1], 0, Erase::None),
        (format(1, 1), vec![1], 1, Erase::None),
        (format(1, 1 << 9), vec![1], 0, Erase::UserData),
        (format(3, 0), vec![3], 0, Erase::None),
        (format(0xffff_ffff, 1 << 9), vec![1, 3], 0, Erase::UserData),
        // Without metadata its place means nothing.
        (format(1, 1 << 4 | 1 << 8), vec![1], 0, Erase::None),
    ] {
        let expected = FormatCommand {
            nsids,
            format: lbaf,
            erase,
        };
        assert_eq!(rig.admin.transfer(&command), Ok(Transfer::None));
        assert_eq!(rig.execute(&command, &[]), Outcome::Format(expected));
    }
}

#[test]
fn what_cannot() {
    let mut rig = Rig::new();
    for (command, status) in [
        (format(0, 0), Status::INVALID_NAMESPACE),
        (format(2, 0), Status::INVALID_FIELD),
        (format(33, 0), Status::INVALID_NAMESPACE),
        (format(1, 2), Status::FORMAT),
        (format(1, 15), Status::FORMAT),
        (format(3, 1), Status::FORMAT),
        (format(0xffff_ffff, 1), Status::FORMAT),
        (format(1, 1 << 12), Status::FORMAT),
        (format(1, 1 << 5), Status::FORMAT),
        (format(1, 2 << 9), Status::INVALID_FIELD),
        (format(1, 3 << 9), Status::INVALID_FIELD),
        (format(1, 7 << 9), Status::INVALID_FIELD),
    ] {
        assert_eq!(
            rig.failed(&command, &[]),
            status,
            "{:#x} {:#x}",
            command.nsid,
            command.cdw10
        );
    }
}

#[test]
fn one_that_is_read_only_or_not_to_be_reached_or_nothing_at_all() {
    let s = subsystem(true);
    let mut rig = Rig::on(s.clone(), ControllerOptions::new("x"));
    assert_eq!(
        rig.failed(&format(0xffff_ffff, 0), &[]),
        Status::INVALID_NAMESPACE
    );
    let mut geometry = Geometry::new(512, 1 << 20);
    geometry.read_only = true;
    s.add(
        Shape::new(geometry),
        NamespaceOptions::new(Identity::hashed("ro")),
    )
    .unwrap();
    assert_eq!(rig.failed(&format(1, 0), &[]), Status::WRITE_PROTECTED);
    s.set_ana(1, None, crate::AnaState::Inaccessible).unwrap();
    assert_eq!(rig.failed(&format(1, 0), &[]), Status::ANA_INACCESSIBLE);
}

/// C8, as far as it is about the admin side: the gate is closed for all controllers, a second format is refused, and the new format holds when it is over.
#[test]
fn c08_format_during_io() {
    let mut rig = Rig::shared();
    let mut other = Rig::on(rig.subsystem.clone(), ControllerOptions::new("other"));
    let before = other.admin.table().clone();
    let id = rig.member.id();
    let drained = Arc::new(Mutex::new(0));
    let count = drained.clone();
    let formatting = rig
        .subsystem
        .begin_format(id, &[1], 1, move || *count.lock().unwrap() += 1);
    let formatting = formatting.unwrap();
    assert_eq!(
        before.get(1, 32).unwrap().check(),
        Err(Status::FORMAT_IN_PROGRESS),
        "also for a worker with an old table"
    );
    assert_eq!(
        before.get(3, 32).unwrap().check(),
        Ok(()),
        "not its neighbour"
    );
    assert_eq!(rig.failed(&format(1, 0), &[]), Status::FORMAT_IN_PROGRESS);
    assert_eq!(
        other.failed(&format(0xffff_ffff, 0), &[]),
        Status::FORMAT_IN_PROGRESS
    );
    let again = rig
        .subsystem
        .begin_format(id, &[3, 1], 0, || panic!("nothing has begun"));
    assert_eq!(again.unwrap_err(), Status::FORMAT_IN_PROGRESS);
    assert_eq!(
        before.get(3, 32).unwrap().check(),
        Ok(()),
        "a refused format leaves no gate closed"
    );
    assert_eq!(rig.subsystem.remove(1), Err(crate::SubsystemError::Busy(1)));
    // `failed` has dropped one controller's token with its events, and the other's too.
    assert_eq!(*drained.lock().unwrap(), 1, "when the last has let go");
    assert_eq!(
        formatting
            .namespaces()
            .iter()
            .map(|n| n.nsid())
            .collect::<Vec<_>>(),
        [1]
    );
    other.heard.lock().unwrap().clear();
    formatting.finish(|kept| assert!(kept.is_ok()));
    let told = other
        .heard
        .lock()
        .unwrap()
        .iter()
        .any(|e| matches!(e, SubsystemEvent::NamespaceChanged(1)));
    assert!(told, "another host has to hear of it");
    let told = rig
        .heard
        .lock()
        .unwrap()
        .iter()
        .any(|e| matches!(e, SubsystemEvent::NamespaceChanged(1)));
    assert!(!told, "the one that did it knows");
    for rig in [&mut rig, &mut other] {
        let (_, n) = rig.done(&identify(0x00, 1), &[]);
        assert_eq!((n[26], u64_at(&n, 0)), (1, (64 << 20) / 4096));
        assert_eq!(rig.admin.table().get(1, 32).unwrap().check(), Ok(()));
    }
}

#[test]
fn a_format_that_fails_leaves_the_format_as_it_was() {
    let mut rig = Rig::new();
    let id = rig.member.id();
    let formatting = rig.subsystem.begin_format(id, &[1], 1, || ()).unwrap();
    drop(formatting);
    let (_, n) = rig.done(&identify(0x00, 1), &[]);
    assert_eq!((n[26], u64_at(&n, 0)), (0, (64 << 20) / 512));
    assert_eq!(rig.admin.table().get(1, 32).unwrap().check(), Ok(()));
    for (nsids, lbaf, status) in [
        (&[9][..], 0, Status::INVALID_NAMESPACE),
        (&[1, 3][..], 1, Status::FORMAT),
    ] {
        let refused = rig.subsystem.begin_format(id, nsids, lbaf, || ());
        assert_eq!(refused.unwrap_err(), status);
    }
}
