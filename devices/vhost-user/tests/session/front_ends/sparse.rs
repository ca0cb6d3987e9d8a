//! Front ends that negotiate little.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use bluff_vhost_user::{framing, unix};
use bluff_virtio::{Notice, features};

use crate::support::*;

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
