//! The rows of the attack list that concern messages, each against a device that only records.
//! Full counts with `BLUFF_TEST_LONG=1`.

mod support;

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bluff_vhost_user::framing;
use bluff_vhost_user::keeper::Ledger;
use bluff_vhost_user::{AttachmentEvent, unix};
use bluff_virtio::{Stop, features};
use support::*;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

fn file(len: u64) -> std::os::fd::OwnedFd {
    unix::sealed_memory(c"test", len).unwrap()
}

/// Every test ends with this: a well-behaved front end is served as if nothing had happened.
fn still_serves(function: &Function) {
    let front = function.connect();
    front.negotiate();
    let _memory = front.memory();
    front.start(0);
    assert!(function.control.is_running(0));
    assert_eq!(front.base(0), 7);
    assert!(!function.control.is_running(0));
}

/// Waits until as many descriptors are open as before.
fn settled(function: &Function, before: usize) {
    let end = Instant::now() + PATIENCE;
    while open_files() > before {
        assert!(
            Instant::now() < end,
            "{} descriptors, {before} before",
            open_files()
        );
        std::thread::yield_now();
    }
    let _ = function;
}

#[test]
fn b01_vring_index_out_of_range_in_every_message() {
    let _alone = alone();
    let function = Function::new(2);
    let before = open_files();
    let front = function.connect();
    front.negotiate();
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
    settled(&function, before);
    still_serves(&function);
}

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
    settled(&function, before);
    still_serves(&function);
}

#[test]
fn b03_vring_num_again_and_against_in_flight_state() {
    let _alone = alone();
    let function = Function::new(2);
    let before = open_files();
    let front = function.connect();
    front.negotiate();
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
    settled(&function, before);
    still_serves(&function);
}

#[test]
fn b04_get_inflight_fd_flood_and_odd_sizes() {
    let _alone = alone();
    let function = Function::new(256);
    let front = function.connect();
    front.negotiate();
    let before = open_files();
    for i in 0..times(10_000) as u16 {
        let queues = 1 + i % 256;
        let (answer, files) = front
            .ask(GET_INFLIGHT_FD, &inflight(0, 0, queues, 1 + i % 1000), &[])
            .unwrap();
        let size = u64::from_ne_bytes(answer[..8].try_into().unwrap());
        let per_queue = (32 + 32 * u64::from(1 + i % 1000)).next_multiple_of(64);
        assert_eq!(size, u64::from(queues) * per_queue);
        let region = std::fs::File::from(files.into_iter().next().unwrap());
        assert_eq!(region.metadata().unwrap().len(), size);
        assert!(region.set_len(0).is_err(), "sealed");
    }
    settled(&function, before);
    for (queues, size) in [(0, 1), (1, 0), (257, 1), (1, 32769), (u16::MAX, u16::MAX)] {
        assert!(!front.ok(GET_INFLIGHT_FD, &inflight(0, 0, queues, size), &[]));
    }
    assert!(
        front
            .ask(GET_INFLIGHT_FD, &inflight(0, 0, 256, 32768), &[])
            .is_some(),
        "268 MB are allowed, and cost nothing until they are used"
    );
    // Regions that are too small, too large for their file, misaligned, or that wrap.
    let small = file(8192);
    for (size, offset) in [
        (4159, 0),
        (0, 0),
        (u64::MAX, 0),
        (1 << 31, 0),
        (8192, 64),
        (4160, 1),
        (4160, u64::MAX - 63),
    ] {
        let ok = front.ok(
            SET_INFLIGHT_FD,
            &inflight(size, offset, 1, 128),
            &[small.as_fd()],
        );
        assert!(!ok, "{size:#x} {offset:#x}");
    }
    assert!(front.ok(
        SET_INFLIGHT_FD,
        &inflight(4160, 64, 1, 128),
        &[small.as_fd()]
    ));
    drop(front);
    still_serves(&function);
}

#[test]
fn b05_memory_and_in_flight_files_that_shrink() {
    let _alone = alone();
    let function = Function::new(1);
    for in_flight in [false, true] {
        let front = function.connect();
        front.negotiate();
        let guest = std::fs::File::from({
            let dir = tempfile::tempfile().unwrap();
            dir.set_len(MEMORY).unwrap();
            std::os::fd::OwnedFd::from(dir)
        });
        assert!(front.ok(
            SET_MEM_TABLE,
            &table(&[(0, MEMORY, USER, 0)]),
            &[guest.as_fd()]
        ));
        let region = tempfile::tempfile().unwrap();
        region.set_len(8192).unwrap();
        if in_flight {
            let info = inflight(8192, 0, 1, 128);
            assert!(front.ok(SET_INFLIGHT_FD, &info, &[region.as_fd()]));
        }
        front.start(0);
        let gone = function.count(|e| matches!(e, AttachmentEvent::Disconnected(_)));
        {
            let inner = function.control.lock();
            let setup = &inner.running[&0];
            if in_flight {
                region.set_len(0).unwrap();
                let part = setup.inflight.as_ref().unwrap();
                // SAFETY: inside of the mapping; the guard repairs the missing page.
                #[allow(unsafe_code)]
                unsafe {
                    part.region.ptr().write_volatile(1);
                }
            } else {
                guest.set_len(0).unwrap();
                assert_eq!(touch(&setup.memory), 0);
            }
        }
        assert!(front.is_closed());
        function.wait_gone(gone + 1);
        let poisoned = function.count(
            |e| matches!(e, AttachmentEvent::Disconnected(Some(why)) if why.contains("shrunk")),
        );
        assert_eq!(poisoned, 1 + usize::from(in_flight));
    }
    still_serves(&function);
}

#[test]
fn b06_log_base_overflow_and_offset() {
    let _alone = alone();
    let function = Function::new(1);
    let front = function.connect();
    front.negotiate();
    let _memory = front.memory();
    front.start(0);
    // 1 MiB of guest memory needs 32 bytes.
    let log = file(8192);
    for (size, offset) in [
        (0, 0),
        (31, 0),
        (8193, 0),
        (8192, 1),
        (32, 8161),
        (u64::MAX, 0),
        (32, u64::MAX),
        (u64::MAX, u64::MAX),
    ] {
        let ok = front.ok(SET_LOG_BASE, &longs(&[size, offset]), &[log.as_fd()]);
        assert!(!ok, "{size:#x} {offset:#x}");
    }
    let bits = features::VERSION_1 | F_PROTOCOL | features::EVENT_IDX | features::INDIRECT_DESC;
    let (mirror, _) = front
        .ask(SET_LOG_BASE, &longs(&[32, 4096]), &[log.as_fd()])
        .unwrap();
    assert_eq!(mirror, longs(&[32, 4096]));
    function.control.take_calls();
    assert!(front.set(SET_FEATURES, bits | features::LOG_ALL));
    assert_eq!(function.control.take_calls(), [Call::Log(0, true)]);
    assert!(front.ok(SET_VRING_ADDR, &addr(0, 1), &[]));
    assert_eq!(function.control.take_calls(), [Call::Log(0, true)]);
    assert!(front.set(SET_FEATURES, bits));
    assert_eq!(function.control.take_calls(), [Call::Log(0, false)]);
    drop(front);
    function.wait_gone(1);

    // The offset counts once: a bit for the first page is in the byte at the offset.
    let front = function.connect();
    front.negotiate();
    let _memory = front.memory();
    assert!(
        front
            .ask(SET_LOG_BASE, &longs(&[32, 4096]), &[log.as_fd()])
            .is_some()
    );
    assert!(front.set(SET_FEATURES, bits | features::LOG_ALL));
    assert!(front.ok(SET_VRING_NUM, &words(&[0, 128]), &[]));
    assert!(front.ok(SET_VRING_ADDR, &addr(0, 1), &[]));
    front.kick(0);
    {
        let inner = function.control.lock();
        let to = inner.running[&0].log.as_ref().unwrap();
        assert_eq!(to.used, Some(0x8000));
        to.log.mark(0, 1);
    }
    let mut byte = [0];
    let log = std::fs::File::from(log);
    std::os::unix::fs::FileExt::read_at(&log, &mut byte, 4096).unwrap();
    assert_eq!(byte, [1]);
    drop(front);
    still_serves(&function);
}

/// Marks past the end of a log would be lost without a word.
#[test]
fn b06_memory_does_not_outgrow_the_log() {
    let _alone = alone();
    let function = Function::new(1);
    let front = function.connect();
    front.negotiate();
    let memory = front.memory();
    front.start(0);
    let bits = front.number(GET_FEATURES) & !features::RING_PACKED;
    let log = |bytes: u64| {
        let file = unix::sealed_memory(c"a-dirty-log", bytes).unwrap();
        let answer = front.ask(SET_LOG_BASE, &longs(&[bytes, 0]), &[file.as_fd()]);
        answer.unwrap().0.len() == 16
    };
    let is_mapped = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.contains("a-dirty-log")
    };
    // A byte of the log is for eight pages.
    let far = 1 << 30;
    let region = single((far, MEMORY, USER + far, 0));
    let near = table(&[(0, MEMORY, USER, 0)]);
    let both = table(&[(0, MEMORY, USER, 0), (far, MEMORY, USER + far, 0)]);
    let two = [memory.as_fd(), memory.as_fd()];
    assert!(log(4096));
    assert!(front.set(SET_FEATURES, bits));
    assert!(!front.ok(ADD_MEM_REG, &region, &[memory.as_fd()]));
    assert!(!front.ok(SET_MEM_TABLE, &both, &two));
    // The log first, then the memory, as QEMU does.
    assert!(log(1 << 16));
    assert!(front.ok(ADD_MEM_REG, &region, &[memory.as_fd()]));
    assert!(!log(4096));
    assert!(front.ok(SET_MEM_TABLE, &near, &two[..1]));
    assert!(is_mapped());
    // It goes with the migration, and bars nothing then.
    assert!(front.set(SET_FEATURES, bits & !features::LOG_ALL));
    assert!(!is_mapped());
    assert!(front.ok(ADD_MEM_REG, &region, &[memory.as_fd()]));
    drop((front, memory));
    function.wait_gone(1);
    still_serves(&function);
}

#[test]
fn b08_memory_regions_that_are_not_valid() {
    let _alone = alone();
    let function = Function::new(1);
    let before = open_files();
    let front = function.connect();
    front.negotiate();
    let guest = file(MEMORY);
    let read_only = {
        let path = format!("/proc/self/fd/{}", guest.as_raw_fd());
        std::fs::File::open(path).unwrap()
    };
    let half = MEMORY / 2;
    let bad: &[&[RegionRow]] = &[
        &[(0, 0, USER, 0)],
        &[(u64::MAX - 10, 4096, USER, 0)],
        &[(0, 4096, u64::MAX - 10, 0)],
        &[(0, 4096, USER, u64::MAX - 10)],
        &[(0, MEMORY + 1, USER, 0)],
        &[(0, MEMORY, USER, 1)],
        &[(0, u64::MAX, USER, 0)],
        &[(0, half, USER, 0), (half - 1, half, USER + half, half)],
        &[(0, half, USER, 0), (half, half, USER + half - 1, half)],
    ];
    for regions in bad {
        let files: Vec<_> = regions.iter().map(|_| guest.as_fd()).collect();
        assert!(
            !front.ok(SET_MEM_TABLE, &table(regions), &files),
            "{regions:?}"
        );
        if let [one] = regions {
            assert!(!front.ok(ADD_MEM_REG, &single(*one), &[guest.as_fd()]));
        }
    }
    let one = [(0, MEMORY, USER, 0)];
    assert!(!front.ok(SET_MEM_TABLE, &table(&one), &[read_only.as_fd()]));
    let event = eventfd().0;
    assert!(!front.ok(SET_MEM_TABLE, &table(&one), &[event.as_fd()]));
    assert!(!front.ok(SET_MEM_TABLE, &table(&[]), &[]));
    // What is there stays when something is refused.
    assert!(front.ok(SET_MEM_TABLE, &table(&one), &[guest.as_fd()]));
    front.start(0);
    assert!(!front.ok(ADD_MEM_REG, &single((half, 4096, 0, 0)), &[guest.as_fd()]));
    assert!(!front.ok(REM_MEM_REG, &single((0, MEMORY, USER + 1, 0)), &[]));
    assert!(function.control.is_running(0));
    drop((front, guest, read_only, event));
    function.wait_gone(1);
    settled(&function, before);
    still_serves(&function);
}

#[test]
fn b08_memory_slots_up_to_their_number() {
    let _alone = alone();
    let function = Function::new(1);
    let before = open_files();
    let front = function.connect();
    front.negotiate();
    assert_eq!(front.number(GET_MAX_MEM_SLOTS), 509);
    let guest = file(509 * 4096);
    let row = |i: u64| (i * 4096, 4096, USER + i * 4096, i * 4096);
    for i in 0..509 {
        assert!(front.ok(ADD_MEM_REG, &single(row(i)), &[guest.as_fd()]));
    }
    assert!(!front.ok(ADD_MEM_REG, &single(row(509)), &[guest.as_fd()]));
    // An old front end sends a descriptor with a removal: it is closed.
    assert!(front.ok(REM_MEM_REG, &single(row(508)), &[guest.as_fd()]));
    assert!(!front.ok(REM_MEM_REG, &single(row(508)), &[]));
    assert!(front.ok(ADD_MEM_REG, &single(row(508)), &[guest.as_fd()]));
    drop((front, guest));
    function.wait_gone(1);
    settled(&function, before);
    still_serves(&function);
}

/// Sparse files cost a front end nothing, and each process has 47 bits of addresses.
#[test]
fn b08_a_front_end_maps_no_more_than_its_share_of_the_address_space() {
    let _alone = alone();
    let function = Function::new(1);
    let front = function.connect();
    front.negotiate();
    let half = 8u64 << 40;
    let huge = file(2 * half);
    let region = |i: u64, size| single((i * half, size, USER + i * half, 0));
    assert!(front.ok(ADD_MEM_REG, &region(0, half), &[huge.as_fd()]));
    let least = single((half, 4096, USER + half, 0));
    let least_log = longs(&[4096, 0]);
    assert!(front.ok(ADD_MEM_REG, &region(1, half), &[huge.as_fd()]));
    assert!(!front.ok(ADD_MEM_REG, &region(2, 4096), &[huge.as_fd()]));
    assert!(!front.ok(SET_LOG_BASE, &least_log, &[huge.as_fd()]));
    let queues = inflight(4160, 0, 1, 128);
    assert!(!front.ok(SET_INFLIGHT_FD, &queues, &[huge.as_fd()]));
    // A table is counted as a whole; what it replaces is not.
    let two = table(&[(0, half, USER, 0), (half, half, USER + half, 0)]);
    let over = table(&[(0, half, USER, 0), (half, half + 4096, USER + half, 0)]);
    let files = [huge.as_fd(), huge.as_fd()];
    assert!(front.ok(SET_MEM_TABLE, &two, &files));
    assert!(!front.ok(SET_MEM_TABLE, &over, &files));
    assert!(front.ok(REM_MEM_REG, &region(1, half), &[]));
    assert!(front.ok(ADD_MEM_REG, &least, &[huge.as_fd()]));
    drop(front);
    function.wait_gone(1);
    still_serves(&function);
}

#[test]
fn b08_a_front_end_holds_no_more_descriptors_than_its_share() {
    let _alone = alone();
    let function = Function::with(device(2), Duration::from_millis(300), |o| {
        o.descriptors = 20;
    });
    let before = open_files();
    let front = function.connect();
    front.negotiate();
    let spare = file(MEMORY);
    let region = |i: u64| single((i * MEMORY, MEMORY, USER + i * MEMORY, 0));
    let added = |i| front.ok(ADD_MEM_REG, &region(i), &[spare.as_fd()]);
    assert_eq!((0..40).filter(|&i| added(i)).count(), 20);
    // What is replaced makes room, and what it has goes on.
    assert!(!front.ok(SET_VRING_CALL, &[0; 8], &[eventfd().0.as_fd()]));
    assert!(front.ok(REM_MEM_REG, &region(7), &[]));
    for _ in 0..3 {
        assert!(front.ok(SET_VRING_CALL, &[0; 8], &[eventfd().0.as_fd()]));
    }
    drop((front, spare));
    function.wait_gone(1);
    settled(&function, before);
    still_serves(&function);
}

#[test]
fn b09_memory_changes_during_io_are_acknowledged_when_nothing_uses_it() {
    let _alone = alone();
    let function = Function::new(2);
    let front = function.connect();
    front.negotiate();
    let guest = file(2 * MEMORY);
    let low = (0, MEMORY, USER, 0);
    let high = (MEMORY, MEMORY, USER + MEMORY, MEMORY);
    assert!(front.ok(SET_MEM_TABLE, &table(&[low]), &[guest.as_fd()]));
    front.start(0);
    front.start(1);
    let first = function.control.lock().running[&0].memory.clone();
    let mapping = first.regions()[0].file();
    for (code, payload, files, regions) in [
        (ADD_MEM_REG, single(high), &[guest.as_fd()][..], 2),
        (REM_MEM_REG, single(high), &[], 1),
        (
            SET_MEM_TABLE,
            table(&[low, high]),
            &[guest.as_fd(), guest.as_fd()],
            2,
        ),
        (SET_MEM_TABLE, table(&[low]), &[guest.as_fd()], 1),
    ] {
        function.control.lock().pace = Pace::Held;
        let old = Arc::downgrade(&function.control.lock().memory[&0]);
        assert!(front.send(code, &payload, files));
        function
            .control
            .wait("both queues", |inner| inner.held.len() == 2);
        assert!(front.is_quiet(), "no answer before the queues let go");
        function.control.lock().pace = Pace::Now;
        let one = function.control.lock().held.pop_front().unwrap();
        one();
        assert!(front.is_quiet(), "nor after the first");
        function.control.release();
        assert_eq!(front.reply(code).unwrap().0, [0; 8]);
        let inner = function.control.lock();
        assert_eq!(inner.running[&1].memory.regions().len(), regions);
        // What stayed kept its mapping.
        assert_eq!(inner.running[&1].memory.regions()[0].file(), mapping);
        drop(inner);
        drop(old);
    }
    drop(front);
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
        let front = function.connect();
        front.negotiate();
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
    let front = function.connect();
    front.negotiate();
    assert!(!front.ok(SET_VRING_ADDR, &addr(0, 2), &[]), "unknown flag");
    drop(front);
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
        let front = function.connect();
        front.negotiate();
        front.bytes(&bytes, &[]);
        assert!(front.is_closed());
        gone += 1;
        function.wait_gone(gone);
    }
    // A connection that ends within a message.
    for cut in [1, 11, 12, 19] {
        let front = function.connect();
        front.negotiate();
        let spare = file(1);
        let bytes = framing::request(SET_FEATURES, true, &[0; 8]);
        front.bytes(&bytes[..cut], &[spare.as_fd()]);
        front.socket.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(front.is_closed());
        gone += 1;
        function.wait_gone(gone);
    }
    // Requests that are unknown, not offered, or of a wrong length.
    let front = function.connect();
    front.negotiate();
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
    let mut front = function.connect();
    front.negotiate();
    front.ack = false;
    front.send(99, &[], &[]);
    assert!(front.is_closed());
    function.wait_gone(gone + 2);
    drop(front);
    settled(&function, before);
    still_serves(&function);
}

#[test]
fn b12_features_not_offered_and_negotiation_in_mid_io() {
    let _alone = alone();
    let function = Function::new(1);
    let front = function.connect();
    let offered = front.number(GET_FEATURES);
    let protocol = front.number(GET_PROTOCOL_FEATURES);
    front.negotiate();
    for bit in 0..64 {
        if offered & (1 << bit) == 0 {
            assert!(!front.set(SET_FEATURES, 1 << bit), "{bit}");
        }
        if protocol & (1 << bit) == 0 {
            assert!(!front.set(SET_PROTOCOL_FEATURES, 1 << bit | 8), "{bit}");
        }
    }
    let _memory = front.memory();
    front.start(0);
    function.control.take_calls();
    let bits = offered & !features::LOG_ALL & !features::RING_PACKED;
    for other in [
        0,
        bits ^ features::EVENT_IDX,
        bits | features::RING_PACKED,
        bits ^ F_PROTOCOL,
    ] {
        assert!(!front.set(SET_FEATURES, other));
    }
    assert!(front.set(SET_FEATURES, bits), "the same again");
    assert!(function.control.take_calls().is_empty());
    let log = file(4096);
    for _ in 0..times(1000) {
        // Each migration brings its log.
        let answer = front.ask(SET_LOG_BASE, &longs(&[4096, 0]), &[log.as_fd()]);
        assert!(answer.is_some());
        assert!(front.set(SET_FEATURES, bits | features::LOG_ALL));
        assert!(front.set(SET_FEATURES, bits));
        assert_eq!(
            function.control.take_calls(),
            [Call::Log(0, true), Call::Log(0, false)]
        );
    }
    drop(front);
    still_serves(&function);
}

#[test]
fn b13_config_out_of_range() {
    let _alone = alone();
    let function = Function::new(1);
    let front = function.connect();
    front.negotiate();
    let config = |offset: u32, size: u32, flags: u32, bytes: usize| {
        let mut payload = words(&[offset, size, flags]);
        payload.resize(12 + bytes, 0x5a);
        payload
    };
    // QEMU asks for the structure that it knows, which may be longer than ours.
    let (got, _) = front.ask(GET_CONFIG, &config(0, 256, 0, 256), &[]).unwrap();
    assert_eq!(got.len(), 12 + 256);
    assert!(got[12..72].iter().copied().eq(0..60));
    assert!(got[72..].iter().all(|b| *b == 0));
    for (offset, size, bytes) in [
        (0, 0, 0),
        (0, 4097, 4096),
        (4096, 1, 1),
        (u32::MAX, 1, 1),
        (1, u32::MAX, 1),
        (0, 8, 7),
        (0, 7, 8),
    ] {
        let (got, _) = front
            .ask(GET_CONFIG, &config(offset, size, 0, bytes), &[])
            .unwrap();
        assert!(got.is_empty(), "no payload says that it failed");
        assert!(!front.ok(SET_CONFIG, &config(offset, size, 0, bytes), &[]));
    }
    for (offset, size, flags, good) in [
        (32, 1, 0, true),
        (59, 1, 0, true),
        (59, 2, 0, false),
        (60, 1, 0, false),
        (0, 1, 0, false),
        (32, 1, 1, true),
        (32, 1, 4, false),
        (32, 1, u32::MAX, false),
    ] {
        let payload = config(offset, size, flags, size as usize);
        assert_eq!(front.ok(SET_CONFIG, &payload, &[]), good, "{offset}+{size}");
    }
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

    let front = function.connect();
    front.negotiate();
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

#[test]
fn b15_disconnect_with_io_that_never_completes() {
    let _alone = alone();
    let function = Function::new(4);
    let before = open_files();
    for round in 1..=times(1000) / 10 + 1 {
        let front = function.connect();
        front.negotiate();
        let _memory = front.memory();
        for i in 0..4 {
            front.start(i);
        }
        function.control.lock().pace = Pace::AtBound;
        function.control.take_calls();
        let start = Instant::now();
        drop(front);
        // Comes back at once: served when the old session is over, not turned away.
        let front = function.connect();
        front.negotiate();
        assert!(start.elapsed() < Duration::from_secs(2));
        let stop = Stop {
            bound: Duration::from_millis(300),
            leave: false,
            answer: false,
        };
        let calls = function.control.take_calls();
        let stops = calls
            .iter()
            .filter(|c| matches!(c, Call::Stop(_, s) if *s == stop));
        assert_eq!(stops.count(), 4, "{calls:?}");
        assert!(calls.contains(&Call::Reset));
        function.control.lock().pace = Pace::Now;
        drop(front);
        function.wait_gone(2 * round);
    }
    settled(&function, before);
    still_serves(&function);
}

#[test]
fn b15_every_way_to_stop_ends_within_the_bound() {
    let _alone = alone();
    let function = Function::new(4);
    for way in ["base", "reset", "status"] {
        function.control.lock().pace = Pace::Now;
        let front = function.connect();
        front.negotiate();
        let _memory = front.memory();
        for i in 0..4 {
            front.start(i);
        }
        function.control.lock().pace = Pace::AtBound;
        let start = Instant::now();
        match way {
            // One after the other, as QEMU does: the bound is for all of them.
            "base" => (0..4).for_each(|i| assert_eq!(front.base(i), 7 + i)),
            "reset" => assert!(front.ok(RESET_DEVICE, &[], &[])),
            _ => assert!(front.set(SET_STATUS, 0)),
        }
        let took = start.elapsed();
        assert!(took >= Duration::from_millis(290), "{way}: {took:?}");
        assert!(took < Duration::from_millis(900), "{way}: {took:?}");
        assert!((0..4).all(|i| !function.control.is_running(i)));
        // And the function can be set up again, by the same front end.
        function.control.lock().pace = Pace::Now;
        front.negotiate();
        front.start(0);
        let n = function.count(|e| *e == AttachmentEvent::Connected);
        drop(front);
        function.wait_gone(n);
    }
}

/// The next pause would answer requests with errors that there was time for.
#[test]
fn b15_what_is_no_stop_uses_up_nothing_of_the_bound() {
    let _alone = alone();
    let function = Function::new(3);
    let bound = Duration::from_millis(300);
    let front = function.connect();
    front.negotiate();
    let memory = front.memory();
    (0..3).for_each(|i| front.start(i));
    function.control.lock().pace = Pace::AtBound;
    let given = |ring: u16| {
        front.base(ring.into());
        let calls = function.control.take_calls();
        let mut stops = calls.iter().filter_map(|call| match call {
            Call::Stop(index, stop) if *index == ring => Some(stop.bound),
            _ => None,
        });
        stops.next().expect("a stop")
    };
    // Each takes the bound, as requests are still under way.
    let region = |i: u64| single((i * MEMORY, MEMORY, USER + i * MEMORY, 0));
    for i in 1..3 {
        assert!(front.ok(ADD_MEM_REG, &region(i), &[memory.as_fd()]));
    }
    assert_eq!(given(0), bound);
    // In a row with the one before, and then not.
    assert!(given(1) < bound / 2);
    assert!(front.ok(REM_MEM_REG, &region(1), &[]));
    assert_eq!(given(2), bound);
}

/// Each of these brings a descriptor, and a reactor may be slow.
#[test]
fn b16_changes_of_a_running_ring_do_not_pile_up() {
    let _alone = alone();
    for code in [SET_VRING_CALL, SET_VRING_KICK, SET_VRING_ERR] {
        let function = Function::new(1);
        let mut front = function.connect();
        front.negotiate();
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
    let kept = Arc::new(Mutex::new(Ledger::new()));
    let function = Function::with(device(2), Duration::from_millis(300), |o| {
        o.keeper = Box::new(kept);
    });
    let front = function.connect();
    front.negotiate();
    if !out_of_band(&front.socket) {
        println!("this kernel has no such thing");
        return;
    }
    assert!(front.is_closed());
    function.wait_gone(1);
    // The back end's own channel.
    let front = function.connect();
    front.negotiate();
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

/// Of what may come as a descriptor, some is ready for ever, and some is full one day.
#[test]
fn b02_descriptors_of_another_kind() {
    let _alone = alone();
    let function = Function::new(1);
    let front = function.connect();
    front.negotiate();
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

#[test]
fn b16_flood_one_byte_at_a_time() {
    let _alone = alone();
    let function = Function::new(2);
    let neighbour = Function::new(2);
    let before = open_files();
    let front = function.connect();
    front.negotiate();
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
    let flood = UnixStream::connect(&neighbour.path).unwrap();
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
    settled(&function, before);
    still_serves(&function);
    still_serves(&neighbour);
}
