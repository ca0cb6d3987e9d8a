//! The stream of messages itself.

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};

use bluff_vhost_user::framing;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::{file, settled, still_serves};
use crate::support::*;

/// Whether `cargo xtask test` runs this for another machine than it is on.
fn emulated() -> bool {
    std::env::var_os("BLUFF_EMULATED").is_some()
}

#[test]
fn b02_extra_descriptors_on_any_message() {
    let _alone = alone();
    let function = Function::new(2);
    still_serves(&function);
    function.wait_gone(1);
    let before = open_files();
    let spare = file(1);
    let eight: Vec<_> = (0..8).map(|_| spare.as_fd()).collect();
    let mut front = function.connect();
    let mut connections = 1;
    for i in 0..times(100_000) as u32 {
        let code = i % 50;
        let payload = [&[][..], &[0; 8], &[0; 16], &[0; 24], &[0; 40]][i as usize / 50 % 5];
        let count = 2 + i as usize % 7;
        // Without acknowledgements each one costs the connection; with them, the message.
        // A failed GET_CONFIG is answered in any case.
        if i.is_multiple_of(7) && code != GET_CONFIG {
            front.ack = false;
        }
        let sent = if i.is_multiple_of(11) {
            // More than a message may have at all. An emulator of another machine keeps those open that do
            // not fit, so there it is only one more.
            let more = if emulated() { 0 } else { i as usize % 90 };
            let many = vec![spare.as_raw_fd(); 9 + more];
            let bytes = framing::request(code, front.ack, payload);
            front.socket.send_with_fds(&[&bytes[..]], &many).is_ok()
        } else {
            front.send(code, payload, &eight[..count])
        };
        if !sent || !front.ack {
            assert!(front.is_closed());
            front = function.connect();
            connections += 1;
            let protocol = front.number(GET_PROTOCOL_FEATURES);
            front.set(SET_PROTOCOL_FEATURES, protocol);
        } else if front.reply(code).is_none() {
            front = function.connect();
            connections += 1;
            let protocol = front.number(GET_PROTOCOL_FEATURES);
            front.set(SET_PROTOCOL_FEATURES, protocol);
        }
    }
    drop(front);
    function.wait_gone(connections + 1);
    drop(eight);
    drop(spare);
    settled(before);
    still_serves(&function);
}

#[test]
fn b11_truncated_oversized_unknown_and_reply() {
    let _alone = alone();
    let function = Function::new(2);
    let before = open_files();
    let head = |request: u32, flags: u32, size: u32| words(&[request, flags, size]);
    let mut gone = 0;
    // What makes the stream untrustworthy ends the connection, whatever was negotiated.
    for bytes in [
        head(GET_FEATURES, 1, u32::MAX),
        head(GET_FEATURES, 1, 0x8000_0000),
        head(GET_FEATURES, 1, 5000),
        head(GET_FEATURES, 5, 0),
        head(GET_FEATURES, 13, 0),
        head(GET_FEATURES, 0, 0),
        head(GET_FEATURES, 2, 0),
        head(GET_FEATURES, 3, 0),
    ] {
        let front = function.negotiated();
        front.bytes(&bytes, &[]);
        assert!(front.is_closed());
        gone += 1;
        function.wait_gone(gone);
    }
    // A connection that ends within a message.
    for cut in [1, 11, 12, 19] {
        let front = function.negotiated();
        let spare = file(1);
        let bytes = framing::request(SET_FEATURES, true, &[0; 8]);
        front.bytes(&bytes[..cut], &[spare.as_fd()]);
        front.socket.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(front.is_closed());
        gone += 1;
        function.wait_gone(gone);
    }
    // Requests that are unknown, not offered, or of a wrong length.
    let front = function.negotiated();
    for request in [
        0,
        22,
        23,
        26,
        27,
        28,
        29,
        30,
        33,
        35,
        41,
        42,
        43,
        44,
        99,
        u32::MAX,
    ] {
        assert!(!front.ok(request, &[], &[]), "{request}");
    }
    for request in 1..=40 {
        // 13 bytes are no payload of any request.
        if request != GET_CONFIG {
            assert!(!front.ok(request, &[0; 13], &[]), "{request}");
        }
    }
    assert_ne!(front.number(GET_FEATURES), 0, "the session goes on");
    drop(front);
    function.wait_gone(gone + 1);
    // The same without acknowledgements.
    let mut front = function.negotiated();
    front.ack = false;
    front.send(99, &[], &[]);
    assert!(front.is_closed());
    function.wait_gone(gone + 2);
    drop(front);
    settled(before);
    still_serves(&function);
}

#[test]
fn b16_flood_one_byte_at_a_time() {
    let _alone = alone();
    let function = Function::new(2);
    let neighbour = Function::new(2);
    let before = open_files();
    let front = function.negotiated();
    let guest = file(MEMORY);
    for _ in 0..times(2000) {
        let bytes = framing::request(SET_MEM_TABLE, true, &table(&[(0, MEMORY, USER, 0)]));
        // The descriptor with the first byte; then with the last.
        for at in [0, bytes.len() - 1] {
            for (i, byte) in bytes.iter().enumerate() {
                let files = [guest.as_fd()];
                front.bytes(&[*byte], if i == at { &files } else { &[] });
            }
            assert_eq!(front.reply(SET_MEM_TABLE).unwrap().0, [0; 8]);
        }
    }
    // A flood of whole messages whose answers nobody reads, while a neighbour is served.
    let flood = neighbour.stream();
    flood.set_nonblocking(true).unwrap();
    let request = framing::request(GET_FEATURES, false, &[]).repeat(1000);
    let mut sent = 0;
    loop {
        match (&flood).write(&request) {
            Ok(n) => sent += n,
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                // Stuck: the back end waits for us to read.
                if sent > 100_000 {
                    break;
                }
                std::thread::yield_now();
            }
            Err(e) => panic!("{e}"),
        }
    }
    assert!(front.number(GET_FEATURES) != 0);
    drop((front, flood, guest));
    function.wait_gone(1);
    neighbour.wait_gone(1);
    settled(before);
    still_serves(&function);
    still_serves(&neighbour);
}
