use super::*;
use crate::message::{SessionInfo, VolumeInfo};
use crate::spec::{Attach, FunctionKind};

const INFO: VolumeInfo = VolumeInfo {
    size: 1 << 30,
    block_size: 512,
    read_only: false,
    channels: None,
};

fn id(text: &str) -> Id {
    text.parse().unwrap()
}

fn volume(uri: &str) -> VolumeSpec {
    VolumeSpec {
        uri: uri.to_owned(),
        layers: Vec::new(),
    }
}

fn function(volume: &str) -> FunctionSpec {
    FunctionSpec {
        kind: FunctionKind::VirtioBlk,
        attach: Attach::VhostUser,
        socket: None,
        mode: SocketMode::Server,
        volume: id(volume),
        queues: 1,
        poll: None,
        config_wce: false,
        stop_timeout_ms: 1000,
    }
}

fn opened(volume: &str) -> FromData {
    FromData::VolumeOpened {
        volume: id(volume),
        info: INFO,
    }
}

/// A card with disk0 open and blk0 on it idle.
fn running() -> Registry {
    let mut registry = Registry::new(Path::new("/run/x"));
    registry
        .create_volume(id("disk0"), volume("ram:?size=1GiB"))
        .unwrap();
    registry
        .create_function(id("blk0"), function("disk0"))
        .unwrap();
    registry.report(&opened("disk0")).unwrap();
    registry
        .report(&FromData::FunctionAttached {
            function: id("blk0"),
        })
        .unwrap();
    registry.take_actions();
    registry
}

fn state(registry: &Registry) -> &FunctionState {
    &registry.functions()[&id("blk0")].state
}

#[test]
fn a_function_is_attached_when_its_volume_is_open() {
    let mut registry = Registry::new(Path::new("/run/x"));
    registry
        .create_volume(id("disk0"), volume("ram:?size=1GiB"))
        .unwrap();
    registry
        .create_function(id("blk0"), function("disk0"))
        .unwrap();
    assert_eq!(registry.take_actions(), [Action::OpenVolume(id("disk0"))]);
    assert_eq!(*state(&registry), FunctionState::Waiting);
    registry.report(&opened("disk0")).unwrap();
    assert_eq!(
        registry.take_actions(),
        [Action::AttachFunction(id("blk0"))]
    );
    registry
        .report(&FromData::FunctionAttached {
            function: id("blk0"),
        })
        .unwrap();
    assert_eq!(*state(&registry), FunctionState::Idle);
}

#[test]
fn a_function_that_is_created_later_is_attached_at_once() {
    let mut registry = running();
    registry
        .create_volume(id("disk1"), volume("null:?size=1GiB"))
        .unwrap();
    registry.report(&opened("disk1")).unwrap();
    registry.take_actions();
    registry
        .create_function(id("blk1"), function("disk1"))
        .unwrap();
    assert_eq!(
        registry.take_actions(),
        [Action::AttachFunction(id("blk1"))]
    );
}

#[test]
fn front_ends_come_and_go() {
    let mut registry = running();
    let session = SessionInfo {
        features: 1,
        status: None,
        queues: 1,
    };
    for _ in 0..3 {
        registry
            .report(&FromData::FrontEnd {
                function: id("blk0"),
                session,
            })
            .unwrap();
        assert_eq!(*state(&registry), FunctionState::Connected(session));
        registry
            .report(&FromData::FrontEndGone {
                function: id("blk0"),
                reason: None,
            })
            .unwrap();
        assert_eq!(*state(&registry), FunctionState::Idle);
    }
}

#[test]
fn what_is_deleted_is_let_go_of_first() {
    let mut registry = running();
    let in_use = RegistryError::InUse {
        volume: id("disk0"),
        function: id("blk0"),
    };
    assert_eq!(registry.delete_volume(&id("disk0")), Err(in_use));
    registry.delete_function(&id("blk0")).unwrap();
    assert_eq!(
        registry.take_actions(),
        [Action::DetachFunction(id("blk0"))]
    );
    assert!(matches!(
        registry.delete_function(&id("blk0")),
        Err(RegistryError::State(_))
    ));
    registry
        .report(&FromData::FunctionDetached {
            function: id("blk0"),
        })
        .unwrap();
    assert!(registry.functions().is_empty());
    registry.delete_volume(&id("disk0")).unwrap();
    assert_eq!(registry.take_actions(), [Action::CloseVolume(id("disk0"))]);
    registry
        .report(&FromData::VolumeClosed {
            volume: id("disk0"),
        })
        .unwrap();
    assert!(registry.volumes().is_empty());
}

#[test]
fn a_change_detaches_and_attaches() {
    let mut registry = running();
    let changed = FunctionSpec {
        queues: 4,
        ..function("disk0")
    };
    registry
        .change_function(&id("blk0"), function("disk0"))
        .unwrap();
    assert!(registry.take_actions().is_empty(), "nothing was changed");
    registry
        .change_function(&id("blk0"), changed.clone())
        .unwrap();
    assert_eq!(
        registry.take_actions(),
        [Action::DetachFunction(id("blk0"))]
    );
    registry
        .report(&FromData::FunctionDetached {
            function: id("blk0"),
        })
        .unwrap();
    assert_eq!(
        registry.take_actions(),
        [Action::AttachFunction(id("blk0"))]
    );
    assert_eq!(registry.functions()[&id("blk0")].spec, changed);
}

#[test]
fn a_volume_that_a_change_will_need_is_not_deleted() {
    let mut registry = running();
    registry
        .create_volume(id("disk1"), volume("ram:?size=1GiB"))
        .unwrap();
    registry.report(&opened("disk1")).unwrap();
    registry
        .change_function(&id("blk0"), function("disk1"))
        .unwrap();
    assert!(matches!(
        registry.delete_volume(&id("disk1")),
        Err(RegistryError::InUse { .. })
    ));
    assert!(matches!(
        registry.delete_volume(&id("disk0")),
        Err(RegistryError::InUse { .. })
    ));
}

#[test]
fn what_is_taken_is_refused() {
    let mut registry = running();
    let exists = |name| Err(RegistryError::Exists(id(name)));
    assert_eq!(
        registry.create_volume(id("disk0"), volume("null:?size=1GiB")),
        exists("disk0")
    );
    assert_eq!(
        registry.create_function(id("blk0"), function("disk0")),
        exists("blk0")
    );
    let none = Err(RegistryError::NoVolume(id("disk9")));
    assert_eq!(
        registry.create_function(id("blk1"), function("disk9")),
        none
    );
    let second = registry.create_function(id("blk1"), function("disk0"));
    assert!(
        matches!(second, Err(RegistryError::InUse { .. })),
        "a writable volume has one user"
    );
    registry
        .create_volume(id("disk1"), volume("null:?size=1GiB"))
        .unwrap();
    let spec = FunctionSpec {
        socket: Some("/run/x/blk0.sock".into()),
        ..function("disk1")
    };
    assert_eq!(
        registry.create_function(id("blk1"), spec),
        Err(RegistryError::SocketTaken(id("blk0")))
    );
    assert!(matches!(
        registry.create_volume(id("disk2"), volume("nfs:/x")),
        Err(RegistryError::Invalid(_))
    ));
}

#[test]
fn a_resize_is_checked_and_then_told() {
    let mut registry = running();
    assert!(registry.check_resize(&id("disk0"), 1 << 31).is_ok());
    assert!(registry.check_resize(&id("disk0"), 1000).is_err());
    assert!(registry.check_resize(&id("disk0"), 0).is_err());
    assert!(registry.check_resize(&id("disk9"), 512).is_err());
    registry
        .report(&FromData::VolumeResized {
            volume: id("disk0"),
            size: 1 << 31,
        })
        .unwrap();
    let expected = VolumeState::Open(VolumeInfo {
        size: 1 << 31,
        ..INFO
    });
    assert_eq!(registry.volumes()[&id("disk0")].state, expected);
}

#[test]
fn what_failed_can_be_deleted_and_created_again() {
    let mut registry = Registry::new(Path::new("/run/x"));
    registry
        .create_volume(id("disk0"), volume("file:/x"))
        .unwrap();
    registry
        .create_function(id("blk0"), function("disk0"))
        .unwrap();
    let failed = FromData::Failed {
        about: Failing::Volume(id("disk0")),
        error: "no such file".to_owned(),
    };
    registry.report(&failed).unwrap();
    assert_eq!(*state(&registry), FunctionState::Waiting);
    registry.delete_function(&id("blk0")).unwrap();
    registry.delete_volume(&id("disk0")).unwrap();
    registry.take_actions();
    registry
        .create_volume(id("disk0"), volume("file:/y"))
        .unwrap();
    assert_eq!(registry.take_actions(), [Action::OpenVolume(id("disk0"))]);
}

#[test]
fn reports_that_do_not_fit_change_nothing() {
    let mut registry = running();
    let before = (registry.volumes().clone(), registry.functions().clone());
    for report in [
        opened("disk0"),
        opened("disk9"),
        FromData::VolumeClosed {
            volume: id("disk0"),
        },
        FromData::FunctionAttached {
            function: id("blk0"),
        },
        FromData::FunctionDetached {
            function: id("blk0"),
        },
        FromData::FunctionDetached {
            function: id("blk9"),
        },
    ] {
        assert!(registry.report(&report).is_err(), "{report:?}");
    }
    assert_eq!(
        (registry.volumes().clone(), registry.functions().clone()),
        before
    );
    assert!(registry.take_actions().is_empty());
}

#[test]
fn another_data_half_is_told_everything_again() {
    let mut registry = running();
    registry.start_over();
    assert_eq!(registry.take_actions(), [Action::OpenVolume(id("disk0"))]);
    registry.report(&opened("disk0")).unwrap();
    assert_eq!(
        registry.take_actions(),
        [Action::AttachFunction(id("blk0"))]
    );
    // One that was being deleted is gone with the old one.
    registry
        .report(&FromData::FunctionAttached {
            function: id("blk0"),
        })
        .unwrap();
    registry.delete_function(&id("blk0")).unwrap();
    registry.start_over();
    assert!(registry.functions().is_empty());
}

#[test]
fn subscribers_see_what_happens_and_slow_ones_lose_their_place() {
    let mut registry = running();
    let (quick, slow) = (registry.subscribe(), registry.subscribe());
    registry
        .create_volume(id("disk1"), volume("null:?size=1GiB"))
        .unwrap();
    registry.report(&opened("disk1")).unwrap();
    registry.delete_volume(&id("disk1")).unwrap();
    registry
        .report(&FromData::VolumeClosed {
            volume: id("disk1"),
        })
        .unwrap();
    let event = |change| Event {
        subject: Subject::Volume(id("disk1")),
        change,
    };
    let seen: Vec<Event> = quick.try_iter().collect();
    assert_eq!(
        seen,
        [
            event(Change::Created),
            event(Change::Changed),
            event(Change::Changed),
            event(Change::Deleted)
        ]
    );
    for round in 0..BACKLOG {
        registry
            .report(&FromData::VolumeResized {
                volume: id("disk0"),
                size: (round as u64 + 1) * 512,
            })
            .unwrap();
        assert_eq!(quick.try_iter().count(), 1);
    }
    assert_eq!(
        slow.iter().count(),
        BACKLOG,
        "it ends instead of skipping in silence"
    );
}
