//! The stream of messages itself.

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bluff_testing::is_emulated;
use bluff_vhost_user::framing;
use bluff_vhost_user::keeper::{BOUNDS, Ledger};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::{file, settled, still_serves};
use crate::support::*;

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
            let more = if is_emulated() { 0 } else { i as usize % 90 };
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

/// Of what may come as a descriptor, some is ready for ever, and some is full one day.
#[test]
fn b02_descriptors_of_another_kind() {
    let _alone = alone();
    let function = Function::new(1);
    let front = function.negotiated();
    let memory = front.memory();
    let (stream, _stream) = UnixStream::pair().unwrap();
    let (datagram, _datagram) = std::os::unix::net::UnixDatagram::pair().unwrap();
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (event, _event) = eventfd();
    let odd = [datagram.as_fd(), udp.as_fd(), tcp.as_fd()];
    for file in odd.into_iter().chain([event.as_fd(), memory.as_fd()]) {
        assert!(!front.ok(SET_BACKEND_REQ_FD, &[], &[file]));
    }
    assert!(front.ok(SET_BACKEND_REQ_FD, &[], &[stream.as_fd()]));
    front.start(0);
    for file in odd.into_iter().chain([stream.as_fd(), memory.as_fd()]) {
        assert!(!front.ok(SET_VRING_KICK, &[0; 8], &[file]));
    }
    assert!(front.ok(SET_VRING_KICK, &[0; 8], &[event.as_fd()]));
    assert_eq!(front.base(0), 7);
    drop(front);
    function.wait_gone(1);
    still_serves(&function);
}

/// Each of these brings a descriptor, and a reactor may be slow.
#[test]
fn b16_changes_of_a_running_ring_do_not_pile_up() {
    let _alone = alone();
    for code in [SET_VRING_CALL, SET_VRING_KICK, SET_VRING_ERR] {
        let function = Function::new(1);
        let mut front = function.negotiated();
        let _memory = front.memory();
        front.start(0);
        front.ack = false;
        function.control.lock().pace = Pace::Held;
        function.control.take_calls();
        let before = open_files();
        let (event, _event) = eventfd();
        for _ in 0..100 {
            front.send(code, &[0; 8], &[event.as_fd()]);
        }
        drop(event);
        let changes = |calls: &[Call]| calls.iter().filter(|c| !matches!(c, Call::Log(..))).count();
        function.control.wait("the first", |i| !i.held.is_empty());
        // Those that follow stay in the socket until this one is done.
        for seen in 1..=100 {
            assert_eq!(changes(&function.control.lock().calls), seen, "{code}");
            assert!(open_files() < before + 12, "{} files", open_files());
            function.control.release();
            if seen < 100 {
                function.control.wait("the next", |i| !i.held.is_empty());
            }
        }
        function.control.lock().pace = Pace::Now;
        assert_ne!(front.number(GET_FEATURES), 0);
    }
}

/// Processor time of the loops of sessions, in about 10 ms.
fn ticks() -> u64 {
    let mut sum = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        // It may end at any time.
        let stat = std::fs::read_to_string(task.unwrap().path().join("stat"));
        let stat = stat.unwrap_or_default();
        if let Some((_, rest)) = stat.split_once("(vhost-user) ") {
            let times = rest.split_whitespace().skip(11).take(2);
            sum += times.map(|n| n.parse::<u64>().unwrap()).sum::<u64>();
        }
    }
    sum
}

/// Out-of-band data is not in the stream, and its socket is readable for ever.
#[test]
fn b16_data_that_cannot_be_read_keeps_nothing_busy() {
    let _alone = alone();
    let out_of_band = |socket: &UnixStream| {
        let flags = libc::MSG_OOB | libc::MSG_NOSIGNAL;
        // SAFETY: one byte that is ours.
        #[allow(unsafe_code)]
        let sent = unsafe { libc::send(socket.as_raw_fd(), [7u8].as_ptr().cast(), 1, flags) };
        sent == 1
    };
    let kept = Arc::new(Mutex::new(Ledger::new(BOUNDS)));
    let function = Function::with(device(2), Duration::from_millis(300), |o| {
        o.keeper = Box::new(kept);
    });
    let front = function.negotiated();
    if !out_of_band(&front.socket) {
        println!("this kernel has no such thing");
        return;
    }
    assert!(front.is_closed());
    function.wait_gone(1);
    // The back end's own channel.
    let front = function.negotiated();
    let (ours, theirs) = UnixStream::pair().unwrap();
    assert!(front.ok(SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]));
    drop(theirs);
    assert!(out_of_band(&ours));
    assert_ne!(front.number(GET_FEATURES), 0);
    // Where a read takes it away, the channel goes on.
    let before = ticks();
    std::thread::sleep(Duration::from_millis(500));
    assert!(ticks() - before < 25, "busy half of the time");
    drop((front, ours));
    function.wait_gone(2);
    still_serves(&function);
}
