//! What a function does for whichever front end it has, and how it comes and goes.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bluff_vhost_user::{AttachmentEvent, NetControl, framing, unix};
use bluff_virtio::{DeviceError, DeviceEvent, Position, features};

use crate::support::*;

#[test]
fn packed_rings_start_where_they_are() {
    let _alone = alone();
    let function = Function::new(1);
    let front = function.negotiated();
    let bits = features::VERSION_1 | features::RING_PACKED | F_PROTOCOL;
    assert!(front.set(SET_FEATURES, bits));
    let _memory = front.memory();
    assert!(front.ok(SET_VRING_NUM, &words(&[0, 100]), &[]), "any size");
    assert!(front.ok(SET_VRING_BASE, &words(&[0, 0x8005_0063]), &[]));
    assert!(front.ok(SET_VRING_ADDR, &addr(0, 0), &[]));
    front.kick(0);
    let at = function.control.lock().running[&0].position;
    let want = Position {
        avail: 0x63,
        avail_wrap: false,
        used: 5,
        used_wrap: true,
    };
    assert_eq!(at, want);
    assert_eq!(front.base(0), 0x0007_8007);
}

#[test]
fn config_changes_reach_the_front_end() {
    let _alone = alone();
    for ack in [true, false] {
        let function = Function::new(1);
        let mut front = function.negotiated();
        let (ours, theirs) = UnixStream::pair().unwrap();
        if !ack {
            let protocol = front.number(GET_PROTOCOL_FEATURES);
            assert!(front.set(SET_PROTOCOL_FEATURES, protocol));
            front.ack = false;
            front.send(SET_PROTOCOL_FEATURES, &(protocol & !8).to_ne_bytes(), &[]);
        }
        front.send(SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
        if ack {
            front.reply(SET_BACKEND_REQ_FD).unwrap();
        }
        front.number(GET_FEATURES);
        drop(theirs);
        let channel = Raw::new(ours);
        for _ in 0..3 {
            function.control.event(DeviceEvent::ConfigChanged);
            assert!(wait_readable(channel.socket.as_fd()));
            let mut head = [0; 64];
            let got = unix::take(channel.socket.as_fd(), &mut head).unwrap();
            let want = framing::request(2, ack, &[]);
            assert_eq!(&head[..got.len], want);
            if ack {
                channel.bytes(&framing::reply(2, &[0; 8]), &[]);
            }
        }
        // Anything else on it costs the channel, not the session.
        channel.bytes(&[0xff; 20], &[]);
        assert!(channel.is_closed());
        function.control.event(DeviceEvent::ConfigChanged);
        assert_ne!(front.number(GET_FEATURES), 0);
    }
}

#[test]
fn a_second_front_end_is_turned_away() {
    let _alone = alone();
    let function = Function::new(1);
    let first = function.negotiated();
    let second = function.connect();
    assert!(second.is_closed());
    function.wait_events(1, |e| *e == AttachmentEvent::Refused);
    assert_ne!(first.number(GET_FEATURES), 0);
    drop(first);
    function.wait_gone(1);
    function.negotiated();
}

#[test]
fn a_broken_ring_asks_for_a_reset() {
    let _alone = alone();
    let function = Function::new(2);
    let front = function.negotiated();
    let _memory = front.memory();
    front.start(0);
    assert!(front.set(SET_STATUS, 15));
    for _ in 0..2 {
        function.control.event(DeviceEvent::QueueBroken {
            queue: 0,
            cause: "tested".into(),
        });
    }
    function.wait_events(1, |e| *e == AttachmentEvent::NeedsReset);
    assert_eq!(front.number(GET_STATUS), 15 | 0x40);
    assert!(front.set(SET_STATUS, 15));
    assert_eq!(front.number(GET_STATUS), 15 | 0x40, "until it is reset");
    assert!(front.set(SET_STATUS, 0));
    assert_eq!(front.number(GET_STATUS), 0);
    assert_eq!(function.count(|e| *e == AttachmentEvent::NeedsReset), 1);
}

#[test]
fn a_ring_that_cannot_start_leaves_nothing() {
    let _alone = alone();
    let function = Function::new(1);
    let front = function.negotiated();
    let _memory = front.memory();
    front.ring(0, 128);
    let before = open_files();
    function.control.lock().refuse_start = true;
    for _ in 0..10 {
        let (kick, _event) = eventfd();
        assert!(!front.ok(SET_VRING_KICK, &[0; 8], &[kick.as_fd()]));
    }
    assert_eq!(open_files(), before);
    function.control.lock().refuse_start = false;
    front.kick(0);
    assert!(function.control.is_running(0));
}

type Asked = Vec<(u16, [u8; 6])>;

struct Net(Arc<Mutex<Asked>>);

impl NetControl for Net {
    fn set_mtu(&mut self, mtu: u16) -> Result<(), DeviceError> {
        if mtu < 68 {
            return Err(DeviceError::Backend("too small".into()));
        }
        self.0.lock().unwrap().push((mtu, [0; 6]));
        Ok(())
    }
    fn announce(&mut self, mac: [u8; 6]) -> Result<(), DeviceError> {
        self.0.lock().unwrap().push((0, mac));
        Ok(())
    }
}

#[test]
fn network_messages_reach_network_devices_only() {
    let _alone = alone();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let net = Net(seen.clone());
    let function = Function::with(net_device(2), Duration::from_millis(300), |o| {
        o.net = Some(Box::new(net));
    });
    let front = function.negotiated();
    assert!(front.set(NET_SET_MTU, 9000));
    assert!(!front.set(NET_SET_MTU, 60), "the device's answer");
    assert!(!front.set(NET_SET_MTU, 70_000));
    let mac = [2, 0, 0, 1, 2, 3, 0, 0];
    assert!(front.ok(SEND_RARP, &mac, &[]));
    let want = [(9000, [0; 6]), (0, [2, 0, 0, 1, 2, 3])];
    assert_eq!(*seen.lock().unwrap(), want);
    let block = Function::new(1);
    let front = block.negotiated();
    assert!(!front.set(NET_SET_MTU, 9000));
    assert!(!front.ok(SEND_RARP, &mac, &[]));
}

/// Nothing says where a packed ring stood when its device died, and front ends count the pairs of network devices.
#[test]
fn what_a_device_is_offered_that_records_nothing() {
    let _alone = alone();
    let function = Function::with(net_device(5), Duration::from_millis(300), |_| {});
    let front = function.connect();
    let offered = front.number(GET_FEATURES);
    assert_eq!(offered & features::RING_PACKED, 0);
    assert_ne!(offered & features::EVENT_IDX, 0);
    const INFLIGHT_SHMFD: u64 = 1 << 12;
    const GET_VRING_BASE_INFLIGHT: u64 = 1 << 20;
    let records = INFLIGHT_SHMFD | GET_VRING_BASE_INFLIGHT;
    assert_eq!(front.number(GET_PROTOCOL_FEATURES) & records, 0);
    front.negotiate();
    assert_eq!(
        front.number(GET_QUEUE_NUM),
        2,
        "pairs, without the control queue"
    );
    let block = Function::new(5);
    let front = block.negotiated();
    assert_eq!(front.number(GET_PROTOCOL_FEATURES) & records, records);
    assert_eq!(front.number(GET_QUEUE_NUM), 5);
}

#[test]
fn attachments_come_and_go_at_run_time() {
    let _alone = alone();
    // What the first one opens once and for all is not counted.
    come_and_go();
    let before = open_files();
    come_and_go();
    assert_eq!(open_files(), before);
}

fn come_and_go() {
    let function = Function::new(1);
    let handle = function.sessions.as_ref().unwrap().handle();
    let front = function.negotiated();
    let _memory = front.memory();
    front.start(0);
    function.control.lock().pace = Pace::AtBound;
    let (tx, rx) = std::sync::mpsc::channel();
    handle.remove("f", move |device| tx.send(device.queues()).unwrap());
    assert_eq!(rx.recv_timeout(PATIENCE).unwrap(), 1);
    assert!(front.is_closed());
    assert!(function.connect().is_closed(), "nobody takes it");
    assert!(!function.control.is_running(0));
}

/// QEMU takes no notice of a change while no ring is started, and looks at configuration space again neither after a reset nor
/// when it has connected again.
#[test]
fn a_config_change_is_told_again_when_a_ring_has_started() {
    let _alone = alone();
    let function = Function::new(2);
    for _ in 0..2 {
        let front = function.negotiated();
        let (ours, theirs) = UnixStream::pair().unwrap();
        assert!(front.ok(SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]));
        drop(theirs);
        let channel = Raw::new(ours);
        let told = || {
            assert!(wait_readable(channel.socket.as_fd()));
            let mut head = [0; 64];
            let got = unix::take(channel.socket.as_fd(), &mut head).unwrap();
            assert_eq!(&head[..got.len], framing::request(2, true, &[]));
            channel.bytes(&framing::reply(2, &[0; 8]), &[]);
        };
        let quiet = || {
            front.number(GET_FEATURES);
            assert!(channel.is_quiet());
        };
        let _memory = front.memory();
        quiet();
        // The front end may be one that has connected again.
        front.start(0);
        told();
        front.start(1);
        quiet();
        front.base(0);
        front.base(1);
        front.start(0);
        quiet();
        // In the middle of a reset.
        front.base(0);
        function.control.event(DeviceEvent::ConfigChanged);
        told();
        quiet();
        front.start(0);
        told();
        quiet();
        drop(front);
        function.wait_gone(function.count(|e| *e == AttachmentEvent::Connected));
    }
}
