use super::*;
use crate::message::{SessionInfo, VolumeInfo};
use crate::spec::{Attach, DeviceSpec, NamespaceSpec};

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
        attach: Attach::VhostUser,
        socket: None,
        mode: SocketMode::Server,
        device: DeviceSpec::VirtioBlk {
            volume: id(volume),
            config_wce: false,
        },
        queues: 1,
        poll: None,
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
            files: 0,
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
            files: 0,
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
        user: Subject::Function(id("blk0")),
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
            files: 0,
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
            files: 0,
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

fn namespace(volume: &str, nsid: u32) -> NamespaceSpec {
    NamespaceSpec::new(id(volume), nsid)
}

fn nvme(subsystem: SubsystemUse) -> FunctionSpec {
    FunctionSpec {
        device: DeviceSpec::Nvme {
            subsystem,
            serial: None,
        },
        attach: Attach::VfioUser,
        ..function("disk0")
    }
}

/// disk0 to disk2, of which the first two are open; s0 with the first two; nvme0 and nvme1 share it.
fn sharing() -> Registry {
    let mut registry = Registry::new(Path::new("/run/x"));
    for disk in ["disk0", "disk1", "disk2"] {
        let spec = volume(&format!("file:/srv/{disk}"));
        registry.create_volume(id(disk), spec).unwrap();
    }
    let spec = SubsystemSpec {
        nqn: None,
        namespaces: vec![namespace("disk0", 1), namespace("disk1", 5)],
    };
    registry.create_subsystem(id("s0"), spec).unwrap();
    for name in ["nvme0", "nvme1"] {
        let subsystem = id("s0");
        let spec = nvme(SubsystemUse::Shared { subsystem });
        registry.create_function(id(name), spec).unwrap();
    }
    registry.take_actions();
    registry
}

#[test]
fn a_function_waits_for_all_volumes_of_its_subsystem() {
    let mut registry = sharing();
    registry.report(&opened("disk0")).unwrap();
    assert_eq!(registry.take_actions(), []);
    registry.report(&opened("disk1")).unwrap();
    let attach = |name| Action::AttachFunction(id(name));
    assert_eq!(
        registry.take_actions(),
        [attach("nvme0"), attach("nvme1")],
        "the third is not theirs"
    );
}

#[test]
fn a_volume_of_a_subsystem_is_taken() {
    let mut registry = sharing();
    let taken = RegistryError::InUse {
        volume: id("disk0"),
        user: Subject::Subsystem(id("s0")),
    };
    assert_eq!(registry.delete_volume(&id("disk0")), Err(taken));
    let own = |namespaces| {
        nvme(SubsystemUse::Own(SubsystemSpec {
            nqn: None,
            namespaces,
        }))
    };
    for refused in [
        function("disk0"),
        own(vec![namespace("disk0", 1)]),
        own(vec![namespace("disk2", 0)]),
        own(vec![namespace("disk2", 1), namespace("disk2", 2)]),
        nvme(SubsystemUse::Shared {
            subsystem: id("s1"),
        }),
        FunctionSpec {
            attach: Attach::VhostUser,
            ..own(vec![namespace("disk2", 1)])
        },
    ] {
        let result = registry.create_function(id("other"), refused.clone());
        assert!(result.is_err(), "{refused:?}");
    }
    let fine = own(vec![namespace("disk2", 1)]);
    registry.create_function(id("other"), fine).unwrap();
    assert!(registry.delete_volume(&id("disk2")).is_err());
    let second = registry.create_subsystem(id("s0"), SubsystemSpec::default());
    assert_eq!(second, Err(RegistryError::Exists(id("s0"))));
}

#[test]
fn namespaces_come_and_go_for_all_who_share_them() {
    let mut registry = sharing();
    let (nvme0, disk2) = (id("nvme0"), id("disk2"));
    assert!(
        registry.check_namespace(&nvme0, &disk2, None).is_err(),
        "it is not open"
    );
    registry.report(&opened("disk2")).unwrap();
    assert!(registry.check_namespace(&nvme0, &disk2, Some(5)).is_err());
    assert!(
        registry
            .check_namespace(&nvme0, &id("disk1"), None)
            .is_err()
    );
    let new = registry.check_namespace(&nvme0, &disk2, None).unwrap();
    assert_eq!(new, namespace("disk2", 2));
    registry
        .report(&FromData::NamespaceAdded {
            function: nvme0.clone(),
            // Which it was formatted to is not the data half's to say.
            namespace: NamespaceSpec {
                block_size: Some(4096),
                ..new
            },
        })
        .unwrap();
    let numbers = |registry: &Registry| -> Vec<u32> {
        let namespaces = &registry.subsystems()[&id("s0")].namespaces;
        namespaces.iter().map(|n| n.nsid).collect()
    };
    assert_eq!(numbers(&registry), [1, 2, 5]);
    let subsystem = &registry.subsystems()[&id("s0")];
    assert!(subsystem.namespaces.iter().all(|n| n.block_size.is_none()));
    let users: Vec<_> = registry.users(&disk2).cloned().collect();
    assert_eq!(users, [nvme0, id("nvme1")]);
    assert!(registry.delete_volume(&disk2).is_err());
    let gone = registry.check_removal(&id("nvme1"), &disk2).unwrap();
    registry
        .report(&FromData::NamespaceRemoved {
            function: id("nvme1"),
            nsid: gone.nsid,
        })
        .unwrap();
    assert_eq!(numbers(&registry), [1, 5]);
    registry.delete_volume(&disk2).unwrap();
    assert!(registry.check_removal(&id("nvme1"), &disk2).is_err());
}

#[test]
fn a_disk_of_a_kind_without_namespaces_has_none() {
    let registry = running();
    let (blk0, disk0) = (id("blk0"), id("disk0"));
    assert!(registry.check_namespace(&blk0, &disk0, None).is_err());
    assert!(registry.check_removal(&blk0, &disk0).is_err());
}

fn net(mac: &str) -> FunctionSpec {
    let port = crate::spec::PortSpec {
        mac: Some(crate::spec::Text(mac.parse().unwrap())),
        ..Default::default()
    };
    FunctionSpec {
        device: DeviceSpec::VirtioNet {
            network: id("blue"),
            port: Box::new(port),
        },
        ..function("disk0")
    }
}

fn network_opened() -> FromData {
    FromData::NetworkOpened {
        network: id("blue"),
        info: crate::message::NetworkInfo { underlay: None },
    }
}

/// A card with a network, and net0 in it idle.
fn with_network() -> Registry {
    let mut registry = Registry::new(Path::new("/run/x"));
    let spec = crate::spec::NetworkSpec {
        vni: None,
        mtu: 1500,
        tunnel: None,
    };
    registry.create_network(id("blue"), spec).unwrap();
    registry
        .create_function(id("net0"), net("02:00:00:00:00:01"))
        .unwrap();
    assert_eq!(registry.take_actions(), [Action::OpenNetwork(id("blue"))]);
    registry.report(&network_opened()).unwrap();
    let attach = Action::AttachFunction(id("net0"));
    assert_eq!(registry.take_actions(), [attach]);
    let function = id("net0");
    let attached = FromData::FunctionAttached { function, files: 0 };
    registry.report(&attached).unwrap();
    registry
}

#[test]
fn a_network_function_waits_for_its_network_and_holds_it() {
    let mut registry = with_network();
    let error = registry.delete_network(&id("blue")).unwrap_err();
    assert_eq!(error.to_string(), "function net0 is in network blue");
    let error = registry
        .create_function(id("net1"), net("02:00:00:00:00:01"))
        .unwrap_err();
    let wanted = "function net0 has the same address in network blue";
    assert_eq!(error.to_string(), wanted);
    // Another data half is told all of it again.
    registry.start_over();
    assert_eq!(registry.take_actions(), [Action::OpenNetwork(id("blue"))]);
    registry.report(&network_opened()).unwrap();
    let attach = Action::AttachFunction(id("net0"));
    assert_eq!(registry.take_actions(), [attach]);
    let function = id("net0");
    let attached = FromData::FunctionAttached { function, files: 0 };
    registry.report(&attached).unwrap();
    registry.delete_function(&id("net0")).unwrap();
    let detached = FromData::FunctionDetached {
        function: id("net0"),
    };
    registry.report(&detached).unwrap();
    registry.delete_network(&id("blue")).unwrap();
    registry.take_actions();
    let closed = FromData::NetworkClosed {
        network: id("blue"),
    };
    registry.report(&closed).unwrap();
    assert!(registry.networks().is_empty());
}

#[test]
fn a_cable_stays_as_it_is_over_data_halves() {
    let mut registry = with_network();
    registry.check_link(&id("net0")).unwrap();
    let pulled = FromData::LinkSet {
        function: id("net0"),
        up: false,
    };
    registry.report(&pulled).unwrap();
    registry.start_over();
    let (_, port) = registry.functions()[&id("net0")].spec.port().unwrap();
    assert!(port.unplugged);
    assert!(registry.check_link(&id("net0")).is_err(), "it waits");
    assert!(running().check_link(&id("blk0")).is_err(), "it has none");
}

#[test]
fn a_network_that_failed_is_tried_again() {
    let mut registry = with_network();
    registry.start_over();
    registry.take_actions();
    let failed = FromData::Failed {
        about: Failing::Network(id("blue")),
        error: "the address is in use".to_owned(),
    };
    registry.report(&failed).unwrap();
    let state = &registry.networks()[&id("blue")].state;
    assert!(matches!(state, NetworkState::Failed { .. }));
    registry.reopen_network(&id("blue"));
    assert_eq!(registry.take_actions(), [Action::OpenNetwork(id("blue"))]);
}

/// It stands on nothing, so nothing that is opened again brings it back.
#[test]
fn an_uplink_is_attached_to_another_data_half() {
    let mut registry = Registry::new(Path::new("/run/x"));
    let uplink = crate::spec::UplinkSpec {
        mac: Some(crate::spec::Text("02:00:00:00:00:f0".parse().unwrap())),
        mtu: 1600,
    };
    let spec = FunctionSpec {
        device: DeviceSpec::Uplink(uplink),
        ..function("disk0")
    };
    registry.create_function(id("up0"), spec).unwrap();
    let attach = [Action::AttachFunction(id("up0"))];
    assert_eq!(registry.take_actions(), attach);
    let function = id("up0");
    let attached = FromData::FunctionAttached { function, files: 0 };
    registry.report(&attached).unwrap();
    registry.start_over();
    assert_eq!(registry.take_actions(), attach);
}
