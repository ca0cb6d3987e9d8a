//! What is shared: guest memory, in-flight regions, the dirty log.

use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use bluff_testing::is_emulated;
use bluff_vhost_user::{AttachmentEvent, unix};
use bluff_virtio::features;

use super::{file, settled, still_serves};
use crate::support::*;

#[test]
fn b04_get_inflight_fd_flood_and_odd_sizes() {
    let _alone = alone();
    let function = Function::new(256);
    let front = function.negotiated();
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
    settled(before);
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
        let front = function.negotiated();
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
    let front = function.negotiated();
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
    let front = function.negotiated();
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

#[test]
fn b08_memory_regions_that_are_not_valid() {
    let _alone = alone();
    let function = Function::new(1);
    let before = open_files();
    let front = function.negotiated();
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
    settled(before);
    still_serves(&function);
}

#[test]
fn b08_memory_slots_up_to_their_number() {
    let _alone = alone();
    let function = Function::new(1);
    let before = open_files();
    let front = function.negotiated();
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
    settled(before);
    still_serves(&function);
}

#[test]
fn b09_memory_changes_during_io_are_acknowledged_when_nothing_uses_it() {
    let _alone = alone();
    let function = Function::new(2);
    let front = function.negotiated();
    let guest = file(2 * MEMORY);
    let low = (0, MEMORY, USER, 0);
    let high = (MEMORY, MEMORY, USER + MEMORY, MEMORY);
    assert!(front.ok(SET_MEM_TABLE, &table(&[low]), &[guest.as_fd()]));
    front.start(0);
    front.start(1);
    let first = function.control.lock().running[&0].memory.clone();
    let mapping = first.regions().next().unwrap().file();
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
        let old = std::sync::Arc::downgrade(&function.control.lock().memory[&0]);
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
        assert_eq!(inner.running[&1].memory.len(), regions);
        // What stayed kept its mapping.
        assert_eq!(
            inner.running[&1].memory.regions().next().unwrap().file(),
            mapping
        );
        drop(inner);
        drop(old);
    }
    drop(front);
    still_serves(&function);
}

/// Marks past the end of a log would be lost without a word.
#[test]
fn b06_memory_does_not_outgrow_the_log() {
    let _alone = alone();
    let function = Function::new(1);
    let front = function.negotiated();
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

/// Sparse files cost a front end nothing, and each process has 47 bits of addresses.
#[test]
fn b08_a_front_end_maps_no_more_than_its_share_of_the_address_space() {
    if is_emulated() {
        // The emulator writes down every page, and has fewer addresses to give.
        return;
    }
    let _alone = alone();
    let function = Function::new(1);
    let front = function.negotiated();
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
    let front = function.negotiated();
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
    settled(before);
    still_serves(&function);
}
