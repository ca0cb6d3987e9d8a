use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};

use super::*;
use crate::spec::{
    Attach, DeviceSpec, FdbSpec, LIST_MAX, SocketMode, Tunnel, TunnelSpec, VNI_MAX, VTEPS_MAX,
};
use crate::stats::{FunctionStatistics, QueueStatistics, ReactorStatistics};

type Control = Link<Numbered<ToData>, Numbered<FromData>>;
type Data = Link<Numbered<FromData>, Numbered<ToData>>;

fn halves() -> (Control, Data) {
    let (control, data) = pair().unwrap();
    (Link::new(control), Link::new(data))
}

fn id(text: &str) -> Id {
    text.parse().unwrap()
}

fn marked_file(mark: usize) -> OwnedFd {
    let mut file = tempfile::tempfile().unwrap();
    write!(file, "{mark}").unwrap();
    file.into()
}

fn mark_of(descriptor: OwnedFd) -> String {
    let mut file = File::from(descriptor);
    file.rewind().unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    text
}

fn function_spec() -> FunctionSpec {
    FunctionSpec {
        attach: Attach::VhostUser,
        socket: Some("/tmp/x.sock".into()),
        mode: SocketMode::Server,
        device: DeviceSpec::VirtioBlk {
            volume: id("disk0"),
            config_wce: false,
        },
        queues: 2,
        poll: None,
        stop_timeout_ms: 1000,
    }
}

/// As large as one may be.
fn network_spec() -> NetworkSpec {
    let vtep = |n: usize| {
        IpAddr::from([
            0xfd00, 0x1111, 0x2222, 0x3333, 0x4444, 0x5555, 0x6666, n as u16,
        ])
    };
    let entry = |n| FdbSpec {
        mac: Text(Mac([2, 0, 0, 0, 0, 1])),
        vtep: vtep(n),
        vlan: Some(4094),
    };
    NetworkSpec {
        vni: Some(VNI_MAX),
        mtu: 9216,
        tunnel: Some(TunnelSpec {
            kind: Tunnel::Geneve,
            vtep: vtep(0x1000),
            vteps: (0x1001..0x1001 + VTEPS_MAX).map(vtep).collect(),
            underlay: Underlay::Auto,
            gateway: None,
            port: Some(u16::MAX),
            fdb: (0x1001..0x1001 + LIST_MAX).map(entry).collect(),
        }),
    }
}

fn address(place: AddressPlace) -> AddressEntry {
    AddressEntry {
        mac: Text(Mac([2, 0, 0, 0, 0, 0xff])),
        vlan: 4094,
        place,
        fixed: false,
    }
}

#[test]
fn many_addresses_come_in_parts() {
    let network = id("blue");
    let vtep = "fd00:1111:2222:3333:4444:5555:6666:7777".parse().unwrap();
    let all = vec![address(AddressPlace::Vtep(vtep)); 2 * ADDRESSES_PER_PART + 1];
    let parts = address_parts(&network, &all);
    assert_eq!(parts.len(), 3);
    let more = |part: &FromData| matches!(part, FromData::Addresses { more: true, .. });
    assert_eq!(
        parts.iter().map(more).collect::<Vec<_>>(),
        [true, true, false]
    );
    exchange(parts);
    let none = address_parts(&network, &[]);
    assert!(
        matches!(&none[..], [FromData::Addresses { addresses, more: false, .. }] if addresses.is_empty())
    );
}

fn every_request() -> Vec<ToData> {
    let spec = VolumeSpec {
        uri: "null:?size=1TiB".to_owned(),
        layers: Vec::new(),
    };
    let connection = |recorded| ToData::Connection {
        function: id("blk0"),
        recorded,
    };
    vec![
        ToData::Start {
            card: CardSpec::default(),
        },
        ToData::OpenVolume {
            volume: id("disk0"),
            spec,
        },
        ToData::CloseVolume {
            volume: id("disk0"),
        },
        ToData::ResizeVolume {
            volume: id("disk0"),
            size: u64::MAX,
        },
        ToData::OpenNetwork {
            network: id("blue"),
            spec: network_spec(),
        },
        ToData::CloseNetwork {
            network: id("blue"),
        },
        ToData::ListAddresses {
            network: id("blue"),
        },
        ToData::SetLink {
            function: id("net0"),
            up: false,
        },
        ToData::Restore {
            function: id("blk0"),
            keys: (1..=DESCRIPTORS_MAX as u64).collect(),
        },
        ToData::AttachFunction {
            descriptors: u32::MAX,
            function: id("blk0"),
            spec: function_spec(),
            subsystem: None,
            files: FILES_MAX,
        },
        connection(false),
        connection(true),
        ToData::Committed {
            function: id("blk0"),
            seq: u64::MAX,
        },
        ToData::DetachFunction {
            function: id("blk0"),
        },
        ToData::Statistics { function: None },
        ToData::Drain { within_ms: 1000 },
    ]
}

fn every_report() -> Vec<FromData> {
    let info = VolumeInfo {
        size: 1 << 40,
        block_size: 512,
        read_only: false,
        channels: Some(1),
    };
    let session = SessionInfo {
        features: u64::MAX,
        status: Some(15),
        queues: 2,
    };
    vec![
        FromData::Started { reactors: 1 },
        FromData::VolumeOpened {
            volume: id("disk0"),
            info,
        },
        FromData::VolumeClosed {
            volume: id("disk0"),
        },
        FromData::VolumeResized {
            volume: id("disk0"),
            size: 4096,
        },
        FromData::NetworkOpened {
            network: id("blue"),
            info: NetworkInfo {
                underlay: Some(Underlay::Udp),
            },
        },
        FromData::NetworkClosed {
            network: id("blue"),
        },
        FromData::Addresses {
            network: id("blue"),
            addresses: vec![
                address(AddressPlace::Function(id("net0"))),
                address(AddressPlace::Vtep("fd00::2".parse().unwrap())),
            ],
            more: true,
        },
        FromData::LinkSet {
            function: id("net0"),
            up: true,
        },
        FromData::FunctionAttached {
            function: id("blk0"),
            files: FILES_MAX,
        },
        FromData::FunctionDetached {
            function: id("blk0"),
        },
        FromData::FrontEnd {
            function: id("blk0"),
            session,
        },
        FromData::FrontEndGone {
            function: id("blk0"),
            reason: Some("it sent nonsense".to_owned()),
        },
        FromData::Commit {
            function: id("blk0"),
            files: 9,
        },
        FromData::Statistics {
            statistics: Statistics::default(),
            more: false,
        },
        FromData::Failed {
            about: Subject::Volume(id("disk0")),
            error: "no such file".to_owned(),
        },
        FromData::Drained,
    ]
}

fn exchange<M: Message + Clone + PartialEq + std::fmt::Debug>(messages: Vec<M>) {
    let (sender, receiver) = pair().unwrap();
    let sender: Link<Numbered<M>, Numbered<M>> = Link::new(sender);
    let mut receiver: Link<Numbered<M>, Numbered<M>> = Link::new(receiver);
    for (number, message) in (1..).zip(messages) {
        let sent = Numbered { number, message };
        let files: Vec<OwnedFd> = (0..sent.descriptors()).map(marked_file).collect();
        let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        assert!(sender.send(&sent, &borrowed).unwrap());
        let (received, descriptors) = receiver.receive().unwrap().unwrap();
        assert_eq!(received, sent);
        assert_eq!(descriptors.len(), files.len());
        for (mark, descriptor) in descriptors.into_iter().enumerate() {
            assert_eq!(
                mark_of(descriptor),
                mark.to_string(),
                "descriptors keep their order"
            );
        }
    }
}

#[test]
fn every_message_arrives_with_its_descriptors() {
    exchange(every_request());
    exchange(every_report());
}

#[test]
fn the_end_of_the_other_half_is_told() {
    let (mut control, data) = halves();
    drop(data);
    assert!(matches!(control.receive(), Err(LinkError::Closed)));
    let message = Numbered {
        number: 1,
        message: ToData::Statistics { function: None },
    };
    assert!(matches!(
        control.send(&message, &[]),
        Err(LinkError::Closed)
    ));
}

#[test]
fn what_the_other_half_said_before_it_died_is_read_first() {
    let (mut control, data) = halves();
    let unread = ToData::Statistics { function: None };
    let unread = Numbered {
        number: 1,
        message: unread,
    };
    assert!(control.send(&unread, &[]).unwrap());
    let said = Numbered {
        number: 0,
        message: FromData::Drained,
    };
    assert!(data.send(&said, &[]).unwrap());
    // With something unread its end is a reset.
    drop(data);
    assert_eq!(control.receive().unwrap().unwrap().0, said);
    assert!(matches!(control.receive(), Err(LinkError::Closed)));
}

fn send_raw(data: &Data, bytes: &[u8]) {
    rustix::net::send(data.as_fd(), bytes, rustix::net::SendFlags::empty()).unwrap();
}

#[test]
fn what_is_no_message_is_refused() {
    let (mut control, data) = halves();
    send_raw(&data, b"{}");
    assert!(matches!(control.receive(), Err(LinkError::Malformed(_))));
    send_raw(
        &data,
        br#"{"number":0,"message":{"volume_closed":{"volume":"../x"}}}"#,
    );
    assert!(matches!(control.receive(), Err(LinkError::Malformed(_))));
    send_raw(
        &data,
        br#"{"number":0,"message":{"commit":{"function":"blk0","files":18446744073709551615}}}"#,
    );
    assert!(matches!(
        control.receive(),
        Err(LinkError::Descriptors {
            stated: usize::MAX,
            found: 0
        })
    ));
    send_raw(&data, &vec![b' '; MESSAGE_MAX + 1]);
    assert!(matches!(control.receive(), Err(LinkError::Incomplete)));
    // The socket itself is whole: the next message is read as if nothing had been.
    assert!(
        data.send(
            &Numbered {
                number: 0,
                message: FromData::Drained
            },
            &[]
        )
        .unwrap()
    );
    assert_eq!(
        control.receive().unwrap().unwrap().0.message,
        FromData::Drained
    );
}

#[test]
fn lost_descriptors_concern_their_message_only() {
    let (mut control, data) = halves();
    // More than the reader has room for: it is told in the same way as that its process has too many open.
    let most = 2 * DESCRIPTORS_MAX;
    let message = FromData::Commit {
        function: id("blk0"),
        files: most - 1,
    };
    let lost = Numbered { number: 0, message };
    let file = marked_file(0);
    let files = vec![file.as_fd(); most];
    let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut rights = rustix::net::SendAncillaryBuffer::new(&mut space);
    assert!(rights.push(rustix::net::SendAncillaryMessage::ScmRights(&files)));
    let bytes = serde_json::to_vec(&lost).unwrap();
    let io = [std::io::IoSlice::new(&bytes)];
    let flags = rustix::net::SendFlags::empty();
    rustix::net::sendmsg(data.as_fd(), &io, &mut rights, flags).unwrap();
    let (message, files) = control.receive().unwrap().unwrap();
    assert_eq!((message, files.len()), (lost, 0));
    let message = FromData::Drained;
    let next = Numbered { number: 0, message };
    assert!(data.send(&next, &[]).unwrap());
    assert_eq!(control.receive().unwrap().unwrap().0, next);
}

#[test]
fn a_message_that_is_too_long_is_not_sent() {
    let (_control, data) = halves();
    let message = FromData::Failed {
        about: Subject::Card,
        error: "x".repeat(MESSAGE_MAX),
    };
    assert!(matches!(
        data.send(&Numbered { number: 0, message }, &[]),
        Err(LinkError::TooLong(_))
    ));
}

#[test]
fn an_outbox_keeps_order_when_the_other_half_is_slow() {
    let (control, data) = pair().unwrap();
    let mut control: Outbox<Numbered<ToData>, Numbered<FromData>> = Outbox::new(control).unwrap();
    let mut data: Data = Link::new(data);
    const COUNT: u64 = 5000;
    for number in 1..=COUNT {
        let message = ToData::Connection {
            function: id("blk0"),
            recorded: false,
        };
        control
            .send(&Numbered { number, message }, vec![marked_file(0)])
            .unwrap();
    }
    assert!(control.wants_to_write(), "the socket's buffer bears fewer");
    for number in 1..=COUNT {
        control.flush().unwrap();
        let (message, descriptors) = data.receive().unwrap().unwrap();
        assert_eq!((message.number, descriptors.len()), (number, 1));
    }
    assert!(!control.wants_to_write());
}

#[test]
fn large_statistics_come_in_parts_that_fit() {
    let queue = QueueStatistics {
        reads: u64::MAX,
        writes: u64::MAX,
        kicks: u64::MAX,
        ..Default::default()
    };
    let full = QueueStatistics {
        flushes: u64::MAX,
        discards: u64::MAX,
        read_bytes: u64::MAX,
        written_bytes: u64::MAX,
        errors: u64::MAX,
        interrupts: u64::MAX,
        hung: u64::MAX,
        in_flight: u32::MAX,
        queue: u16::MAX,
        reactor: u16::MAX,
        ..queue
    };
    let function = |n: usize, queues| FunctionStatistics {
        function: id(&format!("blk{n}")),
        messages: None,
        queues: vec![full; queues],
        net: None,
    };
    let mut functions: Vec<_> = (0..1000).map(|n| function(n, 2)).collect();
    functions.push(function(1000, usize::from(crate::config::QUEUES_MAX)));
    let reactors = vec![ReactorStatistics::default(); 64];
    let parts = statistics_parts(Statistics {
        at_ns: 7,
        functions: functions.clone(),
        reactors: reactors.clone(),
    });

    let (mut control, data) = halves();
    let mut together = Statistics::default();
    let count = parts.len();
    for (index, message) in parts.into_iter().enumerate() {
        data.send(&Numbered { number: 3, message }, &[]).unwrap();
        let (received, _) = control.receive().unwrap().unwrap();
        let FromData::Statistics { statistics, more } = received.message else {
            panic!("{received:?}")
        };
        assert_eq!(more, index + 1 < count);
        together.functions.extend(statistics.functions);
        together.reactors.extend(statistics.reactors);
    }
    assert_eq!(
        (together.functions, together.reactors),
        (functions, reactors)
    );
}
