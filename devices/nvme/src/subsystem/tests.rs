//! Who is told what, and what cannot be.

use bluff_block::null::Null;

use super::*;
use crate::admin::tests::subsystem;

/// What a controller hears, in a few words.
fn join(s: &Arc<Subsystem>) -> (Membership, Arc<Mutex<Vec<String>>>) {
    let heard = Arc::<Mutex<Vec<String>>>::default();
    let listener = heard.clone();
    let member = s.join(move |event| {
        listener.lock().unwrap().push(match event {
            SubsystemEvent::Table(table) => {
                format!("{:?}", table.iter().map(|n| n.nsid()).collect::<Vec<_>>())
            }
            SubsystemEvent::NamespaceChanged(nsid) => format!("changed {nsid}"),
            SubsystemEvent::AnaChanged => "ana".into(),
            SubsystemEvent::Drain(nsid, _) => format!("drain {nsid}"),
            SubsystemEvent::Reset => "reset".into(),
        });
    });
    (member.unwrap(), heard)
}

fn take(heard: &Mutex<Vec<String>>) -> Vec<String> {
    std::mem::take(&mut *heard.lock().unwrap())
}

fn volume() -> Arc<dyn Volume> {
    Arc::new(Null::new(512, 1 << 20))
}

fn options(text: &str) -> NamespaceOptions {
    NamespaceOptions::new(Identity::hashed(text))
}

#[test]
fn names_and_limits() {
    for nqn in ["", "nqn", "iqn.2026-11.example:s", "nqn.2026-11.example:\0"] {
        let refused = Subsystem::new(SubsystemOptions::new(nqn));
        assert_eq!(refused.err(), Some(SubsystemError::Nqn(nqn.into())));
    }
    let longest = format!("nqn.{}", "x".repeat(219));
    assert!(Subsystem::new(SubsystemOptions::new(&*longest)).is_ok());
    assert!(Subsystem::new(SubsystemOptions::new(longest + "x")).is_err());
    for (max_namespaces, fits) in [(0, false), (1, true), (65536, true), (65537, false)] {
        let options = SubsystemOptions {
            max_namespaces,
            ..SubsystemOptions::new("nqn.x")
        };
        assert_eq!(Subsystem::new(options).is_ok(), fits, "{max_namespaces}");
    }
}

#[test]
fn namespaces_that_cannot_be() {
    let s = subsystem(false);
    let with = |nsid| NamespaceOptions {
        nsid: Some(nsid),
        ..options("n")
    };
    for nsid in [0, 33, u32::MAX] {
        assert_eq!(
            s.add(volume(), with(nsid)),
            Err(SubsystemError::Nsid(nsid, 32))
        );
    }
    assert_eq!(s.add(volume(), with(2)), Ok(2));
    assert_eq!(s.add(volume(), with(2)), Err(SubsystemError::Taken(2)));
    let free: Vec<_> = (0..31)
        .map(|_| s.add(volume(), options("n")).unwrap())
        .collect();
    assert_eq!(free[..3], [1, 3, 4], "the lowest that is free");
    assert_eq!(s.add(volume(), options("n")), Err(SubsystemError::Full));
    s.remove(7).unwrap();
    assert_eq!(s.remove(7), Err(SubsystemError::NoNamespace(7)));
    for (block, of, fits) in [
        (512, 512, true),
        (4096, 512, true),
        (4096, 4096, true),
        (512, 4096, false),
        (1024, 512, false),
        (0, 512, false),
    ] {
        let wanted = NamespaceOptions {
            nsid: Some(7),
            block_size: Some(block),
            ..options("n")
        };
        let added = s.add(Arc::new(Null::new(of, 1 << 20)), wanted);
        let expected = if fits {
            Ok(7)
        } else {
            Err(SubsystemError::BlockSize(block, of))
        };
        assert_eq!(added, expected);
        let _ = s.remove(7);
    }
    for group in [0, 33] {
        let wanted = NamespaceOptions {
            group,
            ..options("n")
        };
        assert_eq!(s.add(volume(), wanted), Err(SubsystemError::Group(group)));
    }
}

#[test]
fn who_is_told_of_what() {
    let s = subsystem(true);
    s.add(volume(), options("a")).unwrap();
    let (one, heard) = join(&s);
    let (two, other) = join(&s);
    assert_eq!((one.id(), two.id()), (0, 1));
    assert_eq!(
        (take(&heard), take(&other)),
        (vec!["[1]".into()], vec!["[1]".into()])
    );
    let only = NamespaceOptions {
        attached: Some([1].into()),
        ..options("b")
    };
    s.add(volume(), only).unwrap();
    assert_eq!(
        (take(&heard), take(&other)),
        (vec![], vec!["[1, 2]".into(), "changed 2".into()])
    );
    s.attach(2, 0, true).unwrap();
    s.attach(2, 0, true).unwrap();
    assert_eq!(
        (take(&heard), take(&other)),
        (vec!["[1, 2]".into(), "changed 2".into()], vec![])
    );
    s.attach(1, 1, false).unwrap();
    assert_eq!(
        (take(&heard), take(&other)),
        (vec![], vec!["[2]".into(), "changed 1".into()])
    );
    assert_eq!(s.attached_controllers(1), Some(vec![0]));
    assert_eq!(s.attached_controllers(3), None);
    s.remove(1).unwrap();
    assert_eq!(
        (take(&heard), take(&other)),
        (vec!["[2]".into(), "changed 1".into()], vec![])
    );
    assert_eq!(s.attach(2, 9, true), Err(SubsystemError::NoController(9)));
    assert_eq!(s.attach(1, 0, true), Err(SubsystemError::NoNamespace(1)));
    s.reset();
    assert_eq!(
        (take(&heard), take(&other)),
        (vec!["reset".into()], vec!["reset".into()])
    );
    drop(two);
    s.reset();
    assert_eq!((take(&heard), take(&other)), (vec!["reset".into()], vec![]));
    assert_eq!(s.controllers(), [0]);
    let (three, _) = join(&s);
    assert_eq!(three.id(), 2, "not the one that has just gone");
    assert_eq!(
        s.attached_controllers(2),
        Some(vec![0]),
        "attached to some, not to all"
    );
}

#[test]
fn one_that_is_not_shared_has_one_controller() {
    let s = subsystem(false);
    let (one, _) = join(&s);
    assert_eq!(s.join(|_| ()).err(), Some(SubsystemError::NotShared));
    assert_eq!(
        s.set_ana(1, None, AnaState::Change),
        Err(SubsystemError::NotShared)
    );
    drop(one);
    assert!(s.join(|_| ()).is_ok());
}

#[test]
fn ana_states_are_by_controller_and_group() {
    let s = subsystem(true);
    s.add(volume(), options("a")).unwrap();
    s.add(
        volume(),
        NamespaceOptions {
            group: 2,
            ..options("b")
        },
    )
    .unwrap();
    let (one, heard) = join(&s);
    let (_two, other) = join(&s);
    take(&heard);
    take(&other);
    s.set_ana(2, Some(0), AnaState::Inaccessible).unwrap();
    assert_eq!(
        (take(&heard), take(&other)),
        (vec!["[1, 2]".into(), "ana".into()], vec![])
    );
    let state = |controller| s.allocated(controller).get(2, 32).unwrap().ana;
    assert_eq!(
        (state(0), state(1)),
        (AnaState::Inaccessible, AnaState::Optimized)
    );
    assert_eq!(
        (
            s.ana_changes(0, 2),
            s.ana_changes(1, 2),
            s.ana_changes(0, 1)
        ),
        (1, 0, 0)
    );
    s.set_ana(2, None, AnaState::Optimized).unwrap();
    assert_eq!(
        (take(&heard), take(&other)),
        (vec!["[1, 2]".into(), "ana".into()], vec![]),
        "only whom it changes"
    );
    for (group, controller, error) in [
        (0, None, SubsystemError::Group(0)),
        (33, None, SubsystemError::Group(33)),
        (1, Some(9), SubsystemError::NoController(9)),
    ] {
        assert_eq!(s.set_ana(group, controller, AnaState::Change), Err(error));
    }
    drop(one);
    assert_eq!(s.ana_changes(0, 2), 0);
}

#[test]
fn a_format_is_told_to_all_that_have_the_namespace() {
    let s = subsystem(true);
    s.add(volume(), options("a")).unwrap();
    s.add(volume(), options("b")).unwrap();
    let (_one, heard) = join(&s);
    let (_two, other) = join(&s);
    s.attach(2, 1, false).unwrap();
    take(&heard);
    take(&other);
    let formatting = s.begin_format(0, &[1, 2], 0, || ()).unwrap();
    assert_eq!(
        (take(&heard), take(&other)),
        (
            vec!["drain 1".into(), "drain 2".into()],
            vec!["drain 1".into()]
        )
    );
    formatting.finish(|kept| assert!(kept.is_ok()));
    assert_eq!(take(&heard), ["[1, 2]", "[1, 2]"]);
    assert_eq!(take(&other), ["[1]", "changed 1"]);
}

#[test]
fn drained_is_called_when_the_last_token_goes() {
    let s = subsystem(false);
    s.add(volume(), options("a")).unwrap();
    let kept = Arc::<Mutex<Vec<Token>>>::default();
    let keeper = kept.clone();
    let _member = s
        .join(move |event| {
            if let SubsystemEvent::Drain(_, token) = event {
                keeper.lock().unwrap().extend([token.clone(), token]);
            }
        })
        .unwrap();
    let drained = Arc::new(Mutex::new(false));
    let flag = drained.clone();
    let formatting = s
        .begin_format(0, &[1], 1, move || *flag.lock().unwrap() = true)
        .unwrap();
    kept.lock().unwrap().pop();
    assert!(!*drained.lock().unwrap());
    kept.lock().unwrap().pop();
    assert!(*drained.lock().unwrap());
    formatting.finish(|kept| assert!(kept.is_ok()));
    assert_eq!(s.allocated(0).get(1, 32).unwrap().shift(), 12);
}

#[test]
fn a_volume_that_is_resized_after_its_namespace_has_gone() {
    let s = subsystem(false);
    let volume = volume();
    s.add(volume.clone(), options("a")).unwrap();
    let (_member, heard) = join(&s);
    volume.resize(2 << 20).unwrap();
    assert_eq!(take(&heard), ["[1]", "[1]", "changed 1"]);
    s.remove(1).unwrap();
    take(&heard);
    volume.resize(1 << 20).unwrap();
    assert_eq!(take(&heard), [""; 0]);
}

#[test]
fn formats_are_what_the_volumes_blocks_divide() {
    for (block, keeps, formats) in [
        (512, true, vec![9, 12]),
        (4096, true, vec![12]),
        (512, false, vec![9]),
        (4096, false, vec![12]),
    ] {
        let options = SubsystemOptions {
            keeper: keeps.then(|| Arc::new(Transient) as _),
            ..SubsystemOptions::new("nqn.x")
        };
        let geometry = Geometry::new(block, 1 << 20);
        assert_eq!(options.formats(&geometry).collect::<Vec<_>>(), formats);
    }
}

#[test]
fn without_a_keeper_a_format_erases_and_no_more() {
    let s = Subsystem::new(SubsystemOptions {
        keeper: None,
        ..SubsystemOptions::new("nqn.x")
    });
    let s = s.unwrap();
    s.add(volume(), options("a")).unwrap();
    assert!(s.begin_format(0, &[1], 1, || ()).is_err());
    let ended = Arc::new(Mutex::new(None));
    let end = ended.clone();
    let formatting = s.begin_format(0, &[1], 0, || ()).unwrap();
    formatting.finish(move |kept| *end.lock().unwrap() = Some(kept));
    assert_eq!(*ended.lock().unwrap(), Some(Ok(())));
    let table = s.allocated(0);
    let namespace = table.get(1, 32).unwrap();
    assert_eq!((namespace.shift(), namespace.check()), (9, Ok(())));
}
