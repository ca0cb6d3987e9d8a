//! Whole sessions, in the order in which real front ends send their messages.

mod support;

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bluff_vhost_user::{AttachmentEvent, Mode, NetControl, framing, unix};
use bluff_virtio::{DeviceError, DeviceEvent, Notice, Position, Stop, features};
use support::*;
use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{
    Frontend, FrontendReqHandler, HandlerResult, VhostUserFrontend, VhostUserFrontendReqHandler,
};
use vhost::{VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

/// The front end of the crate `vhost`, which Cloud Hypervisor and others use.
#[test]
fn the_vhost_crate_s_front_end() {
    let _alone = alone();
    let function = Function::new(4);
    for round in 1..=3 {
        let mut front = Frontend::connect(&function.path, 4).unwrap();
        front.set_owner().unwrap();
        let features = front.get_features().unwrap();
        front.set_features(features & !features::LOG_ALL).unwrap();
        let protocol = front.get_protocol_features().unwrap();
        assert!(protocol.contains(
            VhostUserProtocolFeatures::GET_VRING_BASE_INFLIGHT
                | VhostUserProtocolFeatures::STATUS
                | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        ));
        assert!(!protocol.intersects(
            VhostUserProtocolFeatures::MTU
                | VhostUserProtocolFeatures::RARP
                | VhostUserProtocolFeatures::PAGEFAULT
        ));
        front.set_protocol_features(protocol).unwrap();
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        assert_eq!(front.get_queue_num().unwrap(), 4);
        assert_eq!(front.get_max_mem_slots().unwrap(), 509);
        let (_, config) = front
            .get_config(4, 8, VhostUserConfigFlags::empty(), &[0; 8])
            .unwrap();
        assert!(config.iter().copied().eq(4..12));
        front
            .set_config(32, VhostUserConfigFlags::WRITABLE, &[1])
            .unwrap();
        front
            .set_config(0, VhostUserConfigFlags::WRITABLE, &[1])
            .unwrap_err();
        let info = VhostUserInflight {
            num_queues: 4,
            queue_size: 128,
            ..VhostUserInflight::default()
        };
        let (inflight, file) = front.get_inflight_fd(&info).unwrap();
        front.set_inflight_fd(&inflight, file.as_raw_fd()).unwrap();
        let guest = unix::sealed_memory(c"guest", MEMORY).unwrap();
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: guest.as_raw_fd(),
        };
        if round == 2 {
            front.add_mem_region(&region).unwrap();
        } else {
            front.set_mem_table(&[region]).unwrap();
        }
        let log = VhostUserDirtyLogRegion {
            mmap_size: 4096,
            mmap_offset: 0,
            mmap_handle: unix::sealed_memory(c"log", 4096).unwrap().as_raw_fd(),
        };
        assert!(log.mmap_handle >= 0);
        let log_file = unix::sealed_memory(c"log", 4096).unwrap();
        front
            .set_log_base(
                0,
                Some(VhostUserDirtyLogRegion {
                    mmap_handle: log_file.as_raw_fd(),
                    ..log
                }),
            )
            .unwrap();
        let (kick, call, err) = (event(), event(), event());
        for i in 0..4u16 {
            let at = USER + u64::from(i) * 0x1_0000;
            let data = VringConfigData {
                queue_max_size: 128,
                queue_size: 128,
                flags: 0,
                desc_table_addr: at,
                used_ring_addr: at + 0x8000,
                avail_ring_addr: at + 0x4000,
                log_addr: None,
            };
            let queue = usize::from(i);
            front.set_vring_num(queue, 128).unwrap();
            front.set_vring_addr(queue, &data).unwrap();
            front.set_vring_base(queue, 3).unwrap();
            front.set_vring_call(queue, &call).unwrap();
            front.set_vring_err(queue, &err).unwrap();
            front.set_vring_kick(queue, &kick).unwrap();
            front.set_vring_enable(queue, true).unwrap();
        }
        {
            let inner = function.control.lock();
            let setup = &inner.running[&3];
            assert_eq!((setup.size, setup.enabled), (128, true));
            assert_eq!(
                setup.features,
                features & !features::LOG_ALL & !F_PROTOCOL,
                "the driver's"
            );
            let part = setup.inflight.as_ref().unwrap();
            assert_eq!((part.offset, part.len), (3 * 4160, 4160));
            // The descriptors are the front end's.
            assert_eq!(setup.call.as_ref().unwrap().notify(), Notice::Given);
            assert_eq!(call.read().unwrap(), 1);
            kick.write(1).unwrap();
            assert_eq!(setup.kick.as_ref().unwrap().read().unwrap(), 1);
        }
        // A replaced descriptor of a running ring.
        let other = event();
        front.set_vring_call(0, &other).unwrap();
        front.set_vring_kick(0, &other).unwrap();
        let notice = function.control.lock().running[&0]
            .call
            .as_ref()
            .unwrap()
            .notify();
        assert_eq!((notice, other.read().unwrap()), (Notice::Given, 1));
        function.control.take_calls();
        // Packed: both positions come back.
        assert_eq!(front.get_vring_base(2).unwrap(), 0x0009_8009);
        let leave = Stop {
            bound: Duration::from_millis(300),
            leave: true,
            answer: true,
        };
        assert_eq!(function.control.take_calls(), [Call::Stop(2, leave)]);
        if round == 2 {
            front.reset_device().unwrap();
            assert!(function.control.lock().running.is_empty());
        } else {
            front.reset_owner().unwrap();
            assert!(function.control.lock().running.is_empty());
            assert_eq!(front.get_vring_base(1).unwrap(), 0x0008_8008);
        }
        drop(front);
        function.wait_gone(round);
    }
}

fn event() -> EventFd {
    EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap()
}

/// The order of vhost-user-blk in QEMU: start, pause, go on, reset, start, migrate.
#[test]
fn qemu_s_order() {
    let _alone = alone();
    let function = Function::new(2);
    let mut front = function.connect();
    front.ack = false;
    let offered = front.number(GET_FEATURES);
    let protocol = front.number(GET_PROTOCOL_FEATURES);
    front.send(SET_PROTOCOL_FEATURES, &protocol.to_ne_bytes(), &[]);
    assert_eq!(front.number(GET_QUEUE_NUM), 2);
    assert_eq!(front.number(GET_MAX_MEM_SLOTS), 509);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let acked = |code: u32, payload: &[u8], files: &[std::os::fd::BorrowedFd<'_>]| {
        front.bytes(&framing::request(code, true, payload), files);
        let (answer, _) = front.reply(code).expect("an answer");
        assert_eq!(answer, [0; 8], "request {code}");
    };
    acked(SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
    drop(theirs);
    front.send(SET_OWNER, &[], &[]);
    let (calls, _events): (Vec<_>, Vec<_>) = (0..2).map(|_| eventfd()).unzip();
    for i in 0..2u64 {
        front.send(
            SET_VRING_CALL,
            &i.to_ne_bytes(),
            &[calls[i as usize].as_fd()],
        );
    }
    let mut config = words(&[0, 60, 0]);
    config.resize(72, 0);
    assert_eq!(front.ask(GET_CONFIG, &config, &[]).unwrap().0.len(), 72);
    let guest = unix::sealed_memory(c"guest", MEMORY).unwrap();
    let bits = offered & !features::LOG_ALL & !features::RING_PACKED;
    let set_features = |bits: u64| {
        front.send(SET_FEATURES, &bits.to_ne_bytes(), &[]);
        let status = front.number(GET_STATUS);
        front.send(SET_STATUS, &(status | 8).to_ne_bytes(), &[]);
        assert_eq!(front.number(GET_STATUS), status | 8);
    };
    let mut region = None;
    let mut added = false;
    let log = unix::sealed_memory(c"log", 4096).unwrap();
    for (round, base) in [(0, 0u32), (1, 7), (2, 0)] {
        set_features(bits);
        let (answer, file) = region.get_or_insert_with(|| {
            let (answer, mut files) = front
                .ask(GET_INFLIGHT_FD, &inflight(0, 0, 2, 128), &[])
                .unwrap();
            (answer, files.pop().unwrap())
        });
        front.send(SET_INFLIGHT_FD, answer, &[file.as_fd()]);
        set_features(bits);
        if !added {
            acked(ADD_MEM_REG, &single((0, MEMORY, USER, 0)), &[guest.as_fd()]);
            added = true;
        }
        for i in 0..2u32 {
            // A guest may choose smaller rings than QEMU offers.
            front.send(SET_VRING_NUM, &words(&[i, 64 << i]), &[]);
            front.send(SET_VRING_BASE, &words(&[i, base + i]), &[]);
            front.send(SET_VRING_ADDR, &addr(i, 0), &[]);
            let (kick, _) = eventfd();
            front.send(SET_VRING_KICK, &u64::from(i).to_ne_bytes(), &[kick.as_fd()]);
            front.send(
                SET_VRING_CALL,
                &u64::from(i).to_ne_bytes(),
                &[calls[i as usize].as_fd()],
            );
        }
        for i in 0..2u32 {
            acked(SET_VRING_ENABLE, &words(&[i, 1]), &[]);
        }
        front.send(SET_STATUS, &15u64.to_ne_bytes(), &[]);
        assert_eq!(front.number(GET_STATUS), 15);
        {
            let inner = function.control.lock();
            assert_eq!(inner.running.len(), 2);
            assert_eq!(inner.running[&1].position.avail, base as u16 + 1);
            assert_eq!(inner.running[&1].size, 128);
            assert!(inner.running[&0].call.is_some());
        }
        if round == 2 {
            // A migration: the log, then its bit, then the used rings.
            front.send(SET_LOG_BASE, &longs(&[4096, 0]), &[log.as_fd()]);
            assert_eq!(front.reply(SET_LOG_BASE).unwrap().0.len(), 16);
            set_features(bits | features::LOG_ALL);
            function.control.take_calls();
            acked(SET_VRING_ADDR, &addr(0, 1), &[]);
            assert_eq!(function.control.take_calls(), [Call::Log(0, true)]);
        }
        function.control.take_calls();
        for i in 0..2u32 {
            acked(SET_VRING_ENABLE, &words(&[i, 0]), &[]);
        }
        let calls = function.control.take_calls();
        assert!(calls.contains(&Call::Enable(0, false)), "{calls:?}");
        for i in 0..2u32 {
            assert_eq!(front.base(i), 7 + i);
        }
        front.send(SET_STATUS, &0u64.to_ne_bytes(), &[]);
        assert_eq!(front.number(GET_STATUS), 0);
        assert!(function.control.take_calls().contains(&Call::Reset));
        if round == 1 {
            region = None;
        }
    }
    drop(ours);
    drop(front);
    function.wait_gone(1);
}

/// QEMU 7.2 pauses a VM by status 0 first, and asks for the positions then.
#[test]
fn qemu_7_s_order() {
    let _alone = alone();
    for packed in [false, true] {
        let function = Function::new(2);
        let front = function.connect();
        front.negotiate();
        let bits = features::VERSION_1 | F_PROTOCOL;
        let bits = bits | if packed { features::RING_PACKED } else { 0 };
        assert!(front.set(SET_FEATURES, bits));
        let _memory = front.memory();
        for round in 0..3 {
            front.start(0);
            front.start(1);
            function.control.take_calls();
            assert!(front.set(SET_STATUS, 0));
            let calls = function.control.take_calls();
            for index in 0..2 {
                let stop = calls.iter().find_map(|c| match c {
                    Call::Stop(i, stop) if *i == index => Some(*stop),
                    _ => None,
                });
                assert!(stop.unwrap().answer, "round {round}: {calls:?}");
            }
            let driver = Call::Features(bits & !F_PROTOCOL);
            assert_eq!(calls[calls.len() - 2..], [Call::Reset, driver]);
            for index in 0..2u32 {
                let want = 7 + index;
                let want = if packed {
                    want << 16 | 0x8000 | want
                } else {
                    want
                };
                assert_eq!(front.base(index), want);
            }
            assert!(front.set(SET_FEATURES, bits));
        }
    }
}

/// The order of User-Mode Linux: little is negotiated, and a driver that is bound again gives its
/// rings up by disabling them.
#[test]
fn user_mode_linux_s_order() {
    let _alone = alone();
    let function = Function::new(1);
    let front = function.connect();
    let quiet = |code: u32, payload: &[u8], files: &[std::os::fd::BorrowedFd<'_>]| {
        front.bytes(&framing::request(code, false, payload), files);
    };
    quiet(SET_OWNER, &[], &[]);
    let offered = front.number(GET_FEATURES);
    let protocol = front.number(GET_PROTOCOL_FEATURES);
    // REPLY_ACK, BACKEND_REQ, CONFIG; this message asks for the first acknowledgement itself.
    let protocol = protocol & (1 << 3 | 1 << 5 | 1 << 9);
    assert!(front.set(SET_PROTOCOL_FEATURES, protocol));
    let (_ours, theirs) = UnixStream::pair().unwrap();
    assert!(front.ok(SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]));
    let bits = offered & !features::LOG_ALL & !features::RING_PACKED;
    for round in 0..3 {
        assert!(front.set(SET_FEATURES, bits));
        let guest = unix::sealed_memory(c"guest", MEMORY).unwrap();
        let mut regions = table(&[(0, MEMORY, USER, 0)]);
        regions.resize(72, 0);
        assert!(front.ok(SET_MEM_TABLE, &regions, &[guest.as_fd()]));
        // Pipes and sockets instead of event descriptors.
        let (call, call_end) = UnixStream::pair().unwrap();
        assert!(front.ok(SET_VRING_CALL, &[0; 8], &[call.as_fd()]));
        front.ring(0, 128);
        front.kick(0);
        assert!(front.ok(SET_VRING_ENABLE, &words(&[0, 1]), &[]));
        {
            let inner = function.control.lock();
            let setup = &inner.running[&0];
            assert_eq!(setup.position.avail, 0, "round {round}");
            assert_eq!(setup.call.as_ref().unwrap().notify(), Notice::Given);
            let mut bytes = [0; 8];
            std::io::Read::read_exact(&mut &call_end, &mut bytes).unwrap();
            assert_eq!(bytes, 1u64.to_ne_bytes());
        }
        assert!(front.ok(SET_VRING_ENABLE, &words(&[0, 0]), &[]));
        // Its barrier.
        front.number(GET_FEATURES);
    }
    drop(front);
    function.wait_gone(1);
}

/// A front end without protocol features, and one that polls.
#[test]
fn rings_without_protocol_features_work_at_once() {
    let _alone = alone();
    let function = Function::new(1);
    let mut front = function.connect();
    front.ack = false;
    front.number(GET_FEATURES);
    front.send(SET_FEATURES, &features::VERSION_1.to_ne_bytes(), &[]);
    let guest = unix::sealed_memory(c"guest", MEMORY).unwrap();
    front.send(
        SET_MEM_TABLE,
        &table(&[(0, MEMORY, USER, 0)]),
        &[guest.as_fd()],
    );
    front.send(SET_VRING_NUM, &words(&[0, 16]), &[]);
    front.send(SET_VRING_ADDR, &addr(0, 0), &[]);
    front.send(SET_VRING_CALL, &0x100u64.to_ne_bytes(), &[]);
    front.send(SET_VRING_KICK, &0x100u64.to_ne_bytes(), &[]);
    front.number(GET_FEATURES);
    {
        let inner = function.control.lock();
        let setup = &inner.running[&0];
        assert!(setup.enabled && setup.kick.is_none() && setup.call.is_none());
    }
    front.send(SET_VRING_ENABLE, &words(&[0, 0]), &[]);
    assert!(front.is_closed(), "that message is not for this front end");
    function.wait_gone(1);
}

#[test]
fn packed_rings_start_where_they_are() {
    let _alone = alone();
    let function = Function::new(1);
    let front = function.connect();
    front.negotiate();
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
        let mut front = function.connect();
        front.negotiate();
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

/// The crate's own receiver of back-end requests.
#[test]
fn config_changes_reach_the_vhost_crate() {
    let _alone = alone();
    struct Handler(AtomicU64);
    impl VhostUserFrontendReqHandler for Handler {
        fn handle_config_change(&self) -> HandlerResult<u64> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(0)
        }
    }
    let function = Function::new(1);
    let mut front = Frontend::connect(&function.path, 1).unwrap();
    let features = front.get_features().unwrap();
    front.set_features(features).unwrap();
    let protocol = front.get_protocol_features().unwrap();
    front.set_protocol_features(protocol).unwrap();
    front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    let handler = Arc::new(Handler(AtomicU64::new(0)));
    let mut receiver = FrontendReqHandler::new(handler.clone()).unwrap();
    receiver.set_reply_ack_flag(true);
    // SAFETY: the receiver lives until the end of the test.
    #[allow(unsafe_code)]
    let end = unsafe { std::os::fd::BorrowedFd::borrow_raw(receiver.get_tx_raw_fd()) };
    front.set_backend_request_fd(&end).unwrap();
    for n in 1..=3 {
        function.control.event(DeviceEvent::ConfigChanged);
        receiver.handle_request().unwrap();
        assert_eq!(handler.0.load(Ordering::SeqCst), n);
    }
}

#[test]
fn a_second_front_end_is_turned_away() {
    let _alone = alone();
    let function = Function::new(1);
    let first = function.connect();
    first.negotiate();
    let second = function.connect();
    assert!(second.is_closed());
    function.wait_events(1, |e| *e == AttachmentEvent::Refused);
    assert_ne!(first.number(GET_FEATURES), 0);
    drop(first);
    function.wait_gone(1);
    function.connect().negotiate();
}

#[test]
fn a_broken_ring_asks_for_a_reset() {
    let _alone = alone();
    let function = Function::new(2);
    let front = function.connect();
    front.negotiate();
    let _memory = front.memory();
    front.start(0);
    assert!(front.set(SET_STATUS, 15));
    function.control.event(DeviceEvent::QueueBroken(0));
    function.control.event(DeviceEvent::QueueBroken(0));
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
    let front = function.connect();
    front.negotiate();
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
    let front = function.connect();
    front.negotiate();
    assert!(front.set(NET_SET_MTU, 9000));
    assert!(!front.set(NET_SET_MTU, 60), "the device's answer");
    assert!(!front.set(NET_SET_MTU, 70_000));
    let mac = [2, 0, 0, 1, 2, 3, 0, 0];
    assert!(front.ok(SEND_RARP, &mac, &[]));
    let want = [(9000, [0; 6]), (0, [2, 0, 0, 1, 2, 3])];
    assert_eq!(*seen.lock().unwrap(), want);
    let block = Function::new(1);
    let front = block.connect();
    front.negotiate();
    assert!(!front.set(NET_SET_MTU, 9000));
    assert!(!front.ok(SEND_RARP, &mac, &[]));
}

#[test]
fn client_mode_finds_its_front_end_again_and_again() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("front.sock");
    let to = path.clone();
    let function = Function::with(device(1), Duration::from_millis(300), move |options| {
        options.mode = Mode::Client(to);
    });
    for round in 1..=3 {
        // Nobody listens for a while: the socket is there, or not.
        let listener = UnixListener::bind(&path).unwrap();
        let (socket, _) = listener.accept().unwrap();
        drop(listener);
        let front = Raw::new(socket);
        front.negotiate();
        let _memory = front.memory();
        front.start(0);
        if round != 2 {
            std::fs::remove_file(&path).unwrap();
        }
        drop(front);
        function.wait_gone(round);
        if round == 2 {
            std::fs::remove_file(&path).unwrap();
        }
    }
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
    let front = function.connect();
    front.negotiate();
    let _memory = front.memory();
    front.start(0);
    function.control.lock().pace = Pace::AtBound;
    let (tx, rx) = std::sync::mpsc::channel();
    handle.remove("f", move |device| tx.send(device.queues()).unwrap());
    assert_eq!(rx.recv_timeout(PATIENCE).unwrap(), 1);
    assert!(front.is_closed());
    assert!(
        UnixStream::connect(&function.path).is_err(),
        "nobody listens"
    );
    assert!(!function.control.is_running(0));
}
