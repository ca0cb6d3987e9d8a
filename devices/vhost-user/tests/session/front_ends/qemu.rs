//! QEMU's order.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use bluff_vhost_user::{framing, unix};
use bluff_virtio::features;

use crate::support::*;

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
        let front = function.negotiated();
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
