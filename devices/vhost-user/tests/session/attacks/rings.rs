//! Rings: their indices, sizes, addresses, and the order in which they are set up.

use std::os::fd::AsFd;

use bluff_vhost_user::AttachmentEvent;

use super::{file, settled, still_serves};
use crate::support::*;

#[test]
fn b01_vring_index_out_of_range_in_every_message() {
    let _alone = alone();
    let function = Function::new(2);
    let before = open_files();
    let front = function.negotiated();
    let memory = front.memory();
    front.start(1);
    let calls = function.control.take_calls().len();
    assert!(calls > 0);
    for index in [2u32, 3, 255, 256, 0x1_0001, 0x8000_0000, u32::MAX] {
        for code in [
            SET_VRING_NUM,
            SET_VRING_BASE,
            SET_VRING_ENABLE,
            GET_VRING_BASE,
        ] {
            assert!(!front.ok(code, &words(&[index, 1]), &[]), "{code}");
        }
        assert!(!front.ok(SET_VRING_ADDR, &addr(index, 0), &[]));
    }
    for number in [2u64, 255, 0x102, 0x200, 0x1_0000_0000, 1 << 63, u64::MAX] {
        for code in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR] {
            let (kick, _event) = eventfd();
            assert!(!front.ok(code, &number.to_ne_bytes(), &[kick.as_fd()]));
        }
    }
    assert!(function.control.take_calls().is_empty());
    assert!(function.control.is_running(1), "the neighbour goes on");
    assert_eq!(front.base(1), 8);
    drop((front, memory));
    function.wait_gone(1);
    settled(before);
    still_serves(&function);
}

#[test]
fn b03_vring_num_again_and_against_in_flight_state() {
    let _alone = alone();
    let function = Function::new(2);
    let before = open_files();
    let front = function.negotiated();
    let memory = front.memory();
    for i in 0..times(100_000) as u32 {
        assert!(front.ok(SET_VRING_NUM, &words(&[0, 1 << (i % 8)]), &[]));
    }
    for size in [0u32, 32769, 0x1_0000, u32::MAX] {
        assert!(!front.ok(SET_VRING_NUM, &words(&[0, size]), &[]));
    }
    let (answer, mut files) = front
        .ask(GET_INFLIGHT_FD, &inflight(0, 0, 2, 128), &[])
        .unwrap();
    let region = files.pop().unwrap();
    assert!(front.ok(SET_INFLIGHT_FD, &answer, &[region.as_fd()]));
    assert!(!front.ok(SET_VRING_NUM, &words(&[0, 256]), &[]));
    front.start(0);
    assert!(!front.ok(SET_VRING_NUM, &words(&[0, 64]), &[]), "running");
    assert!(front.ok(SET_VRING_NUM, &words(&[0, 128]), &[]), "the same");
    assert!(
        !front.ok(SET_INFLIGHT_FD, &answer, &[region.as_fd()]),
        "running"
    );
    {
        let inner = function.control.lock();
        let part = inner.running[&0].inflight.as_ref().unwrap();
        assert_eq!((part.offset, part.len), (0, 4160));
    }
    drop((front, region, memory, files));
    function.wait_gone(1);
    settled(before);
    still_serves(&function);
}

#[test]
fn b10_vring_addresses_unmapped_misaligned_or_over_two_regions() {
    let _alone = alone();
    let function = Function::new(1);
    let guest = file(2 * MEMORY);
    let top = USER + MEMORY;
    // Two regions that adjoin for the front end, but not in our address space.
    let regions = [(0, MEMORY, USER, MEMORY), (MEMORY, MEMORY, top, 0)];
    for (desc, used, avail, at_once) in [
        (USER + 8, USER + 0x8000, USER + 0x4000, true),
        (USER, USER + 0x8002, USER + 0x4000, true),
        (USER, USER + 0x8000, USER + 0x4001, true),
        (0, USER + 0x8000, USER + 0x4000, false),
        (USER, 0, USER + 0x4000, false),
        (USER, USER + 0x8000, 0, false),
        (top - 16, USER + 0x8000, USER + 0x4000, false),
        (USER, top - 4, USER + 0x4000, false),
        (USER, USER + 0x8000, top - 2, false),
        (u64::MAX - 15, USER + 0x8000, USER + 0x4000, false),
        (USER, u64::MAX - 3, USER + 0x4000, false),
    ] {
        let front = function.negotiated();
        let files = [guest.as_fd(), guest.as_fd()];
        assert!(front.ok(SET_MEM_TABLE, &table(&regions), &files));
        assert!(front.ok(SET_VRING_NUM, &words(&[0, 128]), &[]));
        let payload = addr_at(0, 0, desc, used, avail);
        assert_eq!(front.ok(SET_VRING_ADDR, &payload, &[]), !at_once);
        let (kick, _event) = eventfd();
        assert!(!front.ok(SET_VRING_KICK, &[0; 8], &[kick.as_fd()]));
        assert!(!function.control.is_running(0));
        // The session goes on, and a right address is served.
        assert!(front.ok(SET_VRING_ADDR, &addr(0, 0), &[]));
        front.kick(0);
        assert!(function.control.is_running(0));
        drop(front);
        let n = function.count(|e| *e == AttachmentEvent::Connected);
        function.wait_gone(n);
    }
    let front = function.negotiated();
    assert!(!front.ok(SET_VRING_ADDR, &addr(0, 2), &[]), "unknown flag");
    drop(front);
    still_serves(&function);
}

#[test]
fn b14_messages_in_the_wrong_order() {
    let _alone = alone();
    let function = Function::new(2);
    let (kick, _event) = eventfd();
    // Nothing is negotiated: neither ring nor enable.
    let mut front = function.connect();
    front.ack = false;
    front.send(SET_VRING_ENABLE, &words(&[0, 1]), &[]);
    assert!(front.is_closed());
    function.wait_gone(1);
    let mut front = function.connect();
    front.ack = false;
    front.send(SET_VRING_KICK, &[0; 8], &[kick.as_fd()]);
    assert!(front.is_closed());
    function.wait_gone(2);

    let front = function.negotiated();
    let no_kick = |why: &str| {
        assert!(!front.ok(SET_VRING_KICK, &[0; 8], &[kick.as_fd()]), "{why}");
    };
    no_kick("nothing is set");
    assert!(front.ok(SET_VRING_NUM, &words(&[0, 100]), &[]));
    no_kick("no address");
    assert!(front.ok(SET_VRING_ADDR, &addr(0, 0), &[]));
    no_kick("no memory");
    let _memory = front.memory();
    no_kick("a split ring of 100");
    // QEMU's order: the in-flight region first.
    let (answer, files) = front
        .ask(GET_INFLIGHT_FD, &inflight(0, 0, 1, 64), &[])
        .unwrap();
    assert!(front.ok(SET_INFLIGHT_FD, &answer, &[files[0].as_fd()]));
    assert!(!front.ok(SET_VRING_NUM, &words(&[0, 128]), &[]));
    no_kick("a ring that is larger than its in-flight region");
    assert!(front.ok(SET_VRING_NUM, &words(&[0, 64]), &[]));
    front.kick(0);
    front.ring(1, 64);
    assert!(
        !front.ok(SET_VRING_KICK, &1u64.to_ne_bytes(), &[kick.as_fd()]),
        "a ring that the region does not hold"
    );
    assert!(!function.control.lock().running[&0].enabled);
    assert!(front.ok(SET_VRING_ENABLE, &words(&[0, 1]), &[]));
    assert!(function.control.lock().running[&0].enabled);
    assert!(!front.ok(SET_VRING_ENABLE, &words(&[0, 2]), &[]));
    // Geometry of a ring that runs.
    assert!(!front.ok(SET_VRING_BASE, &words(&[0, 5]), &[]));
    let elsewhere = addr_at(0, 0, USER + 0x2_0000, USER + 0x8000, USER + 0x4000);
    assert!(!front.ok(SET_VRING_ADDR, &elsewhere, &[]));
    assert_eq!(front.base(0), 7);
    assert_eq!(front.base(0), 7, "a ring that is stopped answers the same");
    assert!(!front.ok(SET_VRING_BASE, &words(&[0, 0x1_0000]), &[]));
    drop(front);
    still_serves(&function);
}
