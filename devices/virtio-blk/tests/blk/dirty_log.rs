//! The dirty log of a migration: every page that the device writes is marked, after it was written.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::rig::log::Log;
use crate::rig::raw::{Attack, END, KINDS, SEAM, TURNS, WRITE, d};
use crate::rig::{BASE, FINISH, Kind, RESET, Rig, epoch, inflight, ram, stall, wait};
use bluff_memory::{DirtyLog, LOG_PAGE};
use bluff_reactor::Poll;
use bluff_testing::times;
use bluff_virtio::QueueLog;
use bluff_virtio_driver::{Blk, BlkConfig, DriverQueue, Memory, Request, Status};

/// The pages on which two snapshots differ.
fn changed(before: &[u8], after: &[u8]) -> BTreeSet<u64> {
    let pages = before.chunks(4096).zip(after.chunks(4096)).enumerate();
    pages
        .filter(|(_, (a, b))| a != b)
        .map(|(i, _)| BASE + i as u64 * LOG_PAGE)
        .collect()
}

/// Where a device with this ring writes besides its buffers.
fn used_ring(a: &Attack) -> u64 {
    a.raw.device
}

#[test]
fn every_page_that_is_written_is_marked() {
    for packed in KINDS {
        let mut a = Attack::new(packed, 16);
        let (c, _) = a.request(1, 0, 8192);
        a.memory.write(c[1].addr, &[3; 8192]).unwrap();
        a.raw.chain(&c);
        assert!(a.back().is_some());
        let log = Log::new(END);
        let used = used_ring(&a);
        a.set_log(log.queue(used));
        log.take();
        // Data over three pages and the seam, the status on a page of its own.
        let (mut c, _) = a.request(0, 0, 8192);
        (c[1].addr, c[2].addr) = (SEAM - 100, SEAM + 5 * 4096 + 7);
        a.memory.write_u8(c[2].addr, 0xff).unwrap();
        a.raw.chain(&c);
        let before = a.snapshot();
        assert!(a.back().is_some());
        let written = changed(&before, &a.snapshot());
        let marked: BTreeSet<u64> = log.take().into_iter().collect();
        assert!(written.is_subset(&marked), "{written:x?} {marked:x?}");
        assert!(written.len() >= 5, "{written:x?}");
        // And not simply everything.
        assert!(marked.len() <= written.len() + 1, "{marked:x?}");
        // A write changes its status and the ring.
        let (c, status) = a.request(1, 0, 4096);
        a.raw.chain(&c);
        let before = a.snapshot();
        assert!(a.back().is_some());
        let written = changed(&before, &a.snapshot());
        assert!(written.contains(&(status & !4095)));
        let marked: BTreeSet<u64> = log.take().into_iter().collect();
        assert!(written.is_subset(&marked), "{written:x?} {marked:x?}");
        // A request that fails, and a bad chain.
        for chain in [
            vec![c[0], d(SEAM, 13, WRITE), c[2]],
            vec![d(END, 16, 0), c[2]],
        ] {
            a.raw.chain(&chain);
            let before = a.snapshot();
            assert!(a.back().is_some());
            let written = changed(&before, &a.snapshot());
            let marked: BTreeSet<u64> = log.take().into_iter().collect();
            assert!(written.is_subset(&marked), "{written:x?} {marked:x?}");
        }
        // Logging ends.
        a.set_log(None);
        a.queue_lives();
        assert!(log.take().is_empty(), "nothing is marked any more");
    }
}

/// What a refused request names is not written, however long it is, and so not marked: a driver that has the device
/// refuse chains of many gigabytes would keep its reactor busy with the log.
#[test]
fn what_is_refused_is_not_marked() {
    for packed in KINDS {
        let mut a = Attack::new(packed, 16);
        let log = Log::new(END);
        a.set_log(log.queue(used_ring(&a)));
        let (c, status) = a.request(0, 0, 512);
        let large = d(BASE, (END - BASE) as u32, WRITE);
        for (what, chain) in [
            ("no sectors", vec![c[0], large, d(BASE, 7, WRITE), c[2]]),
            ("bad", vec![c[0], large, d(END, 1, WRITE), c[2]]),
            ("no request", vec![d(status, 16, 0), large, c[2]]),
        ] {
            log.take();
            a.raw.chain(&chain);
            assert!(a.back().is_some());
            let marked = log.take();
            assert!(marked.contains(&(status & !4095)), "{what}: {marked:x?}");
            assert!(marked.len() <= 2, "{what}: status and ring: {marked:x?}");
        }
    }
}

/// A device that sleeps writes its wishes: the event index, flags, the event structure.
#[test]
fn event_fields_are_marked() {
    for kind in Kind::all() {
        let memory = Memory::flat(BASE, 4 << 20).unwrap();
        let mut rig = Rig::new(ram("size=1MiB"), 1, Poll::Never);
        let queue = kind.driver(&memory, 64);
        let device = queue.layout().device;
        let mut setup = rig.setup(0, kind, &*queue, &epoch(&memory));
        let log = Log::new(BASE + (4 << 20));
        // A used ring of 64 entries lies on one page; only the wishes are of interest here.
        setup.log = log.queue(device);
        rig.start(setup);
        let config = BlkConfig {
            depth: 8,
            capacity: 1 << 10,
            indirect: kind.indirect,
            ..BlkConfig::default()
        };
        let mut blk = Blk::new(&memory, queue, config).unwrap();
        for _ in 0..times(10, 100) {
            // It sleeps after this one.
            blk.submit(Request::In { sector: 0 }).unwrap();
            blk.publish();
            rig.kick();
            wait(|| blk.poll().unwrap());
            // Only what follows counts.
            log.take();
            rig.kick();
            let page = device & !4095;
            wait(|| log.marked(page).then_some(()));
        }
        rig.stop(0, FINISH);
    }
}

/// I/O that was cut short has written some of its buffers, and nobody is told; but the pages are marked.
#[test]
fn io_cut_short_is_marked() {
    for packed in KINDS {
        for how in [
            RESET,
            bluff_virtio::Stop {
                leave: true,
                answer: true,
                ..RESET
            },
            bluff_virtio::Stop {
                answer: true,
                ..RESET
            },
        ] {
            let log = Log::new(END);
            let (_region, record) = inflight(16);
            let mut a = Attack::with(packed, 16, stall::volume(true), |s| {
                s.inflight = Some(record);
                s.log = log.queue(s.addresses.device);
            });
            log.take();
            let (mut c, _) = a.request(0, 0, 16384);
            c[1].addr = SEAM + 4096;
            a.raw.chain(&c);
            let before = a.snapshot();
            a.turns(TURNS);
            a.stop(how);
            let written = changed(&before, &a.snapshot());
            assert!(
                written.contains(&(SEAM + 4096)),
                "the volume tears its reads"
            );
            let marked: BTreeSet<u64> = log.take().into_iter().collect();
            assert!(written.is_subset(&marked), "{written:x?} {marked:x?}");
        }
    }
}

/// A process that died may have written to the ring and not have marked it: the next one does.
#[test]
fn a_restart_marks_the_ring() {
    for packed in KINDS {
        let (_region, record) = inflight(16);
        let set = record.clone();
        let mut a = Attack::with(packed, 16, ram("size=1MiB"), |s| {
            s.inflight = Some(set);
        });
        a.queue_lives();
        a.stop(FINISH);
        let log = Log::new(END);
        let mut setup = a.setup();
        setup.inflight = Some(record);
        setup.log = log.queue(a.raw.device);
        a.start(setup);
        let ring = if packed { a.raw.desc } else { a.raw.device };
        assert!(log.marked(ring));
    }
}

/// Addresses and lengths at the end of everything: no panic, and nothing is marked that is not there.
#[test]
fn b06_b07_log_arithmetic() {
    let log = Log::new(64 * LOG_PAGE);
    let l: &DirtyLog = &log.log;
    for (addr, len) in [
        (u64::MAX, 1),
        (u64::MAX, u64::MAX),
        (u64::MAX - 4095, 4096),
        (64 * LOG_PAGE, 1),
        (64 * LOG_PAGE, u64::MAX),
        (0, 0),
        (u64::MAX, 0),
    ] {
        l.mark(addr, len);
        assert!(log.take().is_empty(), "{addr:#x}+{len:#x}");
    }
    for (addr, len, pages) in [
        (0, 1, vec![0]),
        (4095, 1, vec![0]),
        (4095, 2, vec![0, 1]),
        (4096, 4096, vec![1]),
        (63 * LOG_PAGE, u64::MAX, vec![63]),
        (63 * LOG_PAGE + 4095, 2, vec![63]),
    ] {
        l.mark(addr, len);
        let pages: Vec<u64> = pages.into_iter().map(|p| p * LOG_PAGE).collect();
        assert_eq!(log.take(), pages, "{addr:#x}+{len:#x}");
    }
    l.mark(0, u64::MAX);
    assert_eq!(log.take().len(), 64);
    // Used rings that the front end places anywhere.
    for used in [0, END, u64::MAX, u64::MAX - 3, u64::MAX - 64] {
        let log = Log::new(END);
        let mut a = Attack::new(false, 16);
        a.set_log(log.queue(used));
        a.queue_lives();
        a.neighbour_lives();
    }
}

/// How many pages are marked depends on what is written, not on how many descriptors say so: there is no
/// list of what is to be logged that a driver could have grow past its end (CVE-2019-14835).
#[test]
fn b07_more_descriptors_than_there_is_to_log() {
    // SEG_MAX + 2, the header and the status among them.
    const MOST: usize = 256;
    const TABLE: u64 = BASE + (900 << 10);
    for packed in KINDS {
        for full in [1, 2, 126, 127, 253, 254] {
            let mut a = Attack::new(packed, MOST as u16);
            let log = Log::new(END);
            a.set_log(log.queue(a.raw.device));
            let (c, status) = a.request(0, 0, 512);
            // Of 254 buffers so many have bytes, each on a page of its own; the others are empty, and are everywhere.
            let nowhere = [SEAM, END, u64::MAX];
            let data: Vec<_> = (0..MOST - 2)
                .map(|i| match i < full {
                    true => d(SEAM + 4096 * i as u64, 512, WRITE),
                    false => d(nowhere[i % 3], 0, WRITE),
                })
                .collect();
            let chain = [vec![c[0]], data, vec![c[2]]].concat();
            let mut pages: BTreeSet<u64> = (0..full as u64).map(|i| SEAM + 4096 * i).collect();
            pages.insert(status & !4095);
            let (start, len) = a.raw.writable()[0];
            let ring = (start & !4095..start + len).step_by(4096);
            let most: BTreeSet<u64> = pages.iter().copied().chain(ring).collect();
            for indirect in [false, true] {
                // What is read are zeroes.
                a.memory.write(SEAM, &[3; 254 * 4096]).unwrap();
                let id = match indirect {
                    true => {
                        let table = a.table(TABLE, &chain);
                        a.raw.chain(&[table])
                    }
                    false => a.raw.chain(&chain),
                };
                log.take();
                let before = a.snapshot();
                assert_eq!(a.back(), Some((id, 512 * full as u32 + 1)));
                assert_eq!(a.status(status), 0);
                let marked: BTreeSet<u64> = log.take().into_iter().collect();
                assert!(pages.is_subset(&marked), "{full} of {MOST}");
                assert!(marked.is_subset(&most), "{marked:x?} for {full} of {MOST}");
                assert!(changed(&before, &a.snapshot()).is_subset(&marked));
            }
            // One descriptor more, and nothing is done; what it named may be marked, and nothing else.
            let long = [&chain[..1], &[d(SEAM, 0, WRITE)], &chain[1..]].concat();
            let table = a.table(TABLE, &long);
            let id = a.raw.chain(&[table]);
            let before = a.snapshot();
            assert_eq!(a.back(), Some((id, 0)));
            a.unchanged(&before, &[]);
            assert!(log.take().iter().all(|page| most.contains(page)));
            a.neighbour_lives();
        }
    }
}

/// A log whose file shrinks while it is used harms only itself.
#[test]
fn b06_log_file_truncated_under_load() {
    let mut a = Attack::new(false, 16);
    let other = Memory::flat(0, 1 << 20).unwrap();
    let fd: OwnedFd = other.regions()[0].as_fd().try_clone_to_owned().unwrap();
    let log = Arc::new(DirtyLog::new(fd, 0, 1 << 20).unwrap());
    let queue = Some(QueueLog {
        log: log.clone(),
        used: Some(a.raw.device),
    });
    a.set_log(queue);
    a.queue_lives();
    let fd: OwnedFd = other.regions()[0].as_fd().try_clone_to_owned().unwrap();
    std::fs::File::from(fd).set_len(0).unwrap();
    a.queue_lives();
    a.neighbour_lives();
}

const DISK: u64 = 1 << 20;
const GUEST: u64 = 4 << 20;

/// A migration: whatever the device wrote is in the copy, however often logging begins and ends under
/// load.
#[test]
fn a_copy_that_follows_the_log_loses_nothing() {
    for kind in [Kind::SPLIT, Kind::PACKED] {
        let memory = Memory::flat(BASE, GUEST).unwrap();
        let mut rig = Rig::new(ram("size=1MiB"), 1, Poll::Always);
        let queue = kind.driver(&memory, 256);
        let layout = queue.layout();
        let setup = rig.setup(0, kind, &*queue, &epoch(&memory));
        rig.start(setup);
        let config = BlkConfig {
            depth: 32,
            request_len: 4096,
            segments: 1,
            capacity: DISK / 512,
            ..BlkConfig::default()
        };
        let mut blk = Blk::new(&memory, queue, config).unwrap();
        // Every block of the disk is different, so that a lost page shows.
        for block in 0..DISK / 4096 {
            let slot = blk.next_slot().unwrap();
            let fill = [block as u8 ^ (block >> 3) as u8; 4096];
            memory.write(blk.data_addr(slot), &fill).unwrap();
            blk.submit(Request::Out { sector: block * 8 }).unwrap();
            blk.publish();
            let done = wait(|| blk.poll().unwrap());
            assert_eq!(done.status, Status::Ok);
        }
        let data = blk.data_addr(0);
        let quit = AtomicBool::new(false);
        let log = Log::new(BASE + GUEST);
        let mut copy = vec![0u8; GUEST as usize];
        let take = |page: u64, copy: &mut [u8]| {
            let to = &mut copy[(page - BASE) as usize..][..4096];
            memory.read(page, to).unwrap();
        };
        std::thread::scope(|scope| {
            let (rig, copy, quit, log) = (&mut rig, &mut copy, &quit, &log);
            let migration = scope.spawn(move || {
                let all = |copy: &mut [u8]| {
                    for page in (BASE..BASE + GUEST).step_by(4096) {
                        take(page, copy);
                    }
                };
                let pass = |copy: &mut [u8]| {
                    for page in log.take() {
                        take(page, copy);
                    }
                };
                // The last time it stays on until everything has stopped.
                for cycle in (0..times(10, 200)).rev() {
                    rig.set_log(0, log.queue(layout.device));
                    log.take();
                    all(copy);
                    for _ in 0..times(300, 3000) {
                        pass(copy);
                    }
                    if cycle % 3 == 1 {
                        rig.set_log(0, None);
                    }
                }
                quit.store(true, Ordering::SeqCst);
            });
            // The guest at work.
            while !quit.load(Ordering::Relaxed) && !migration.is_finished() {
                blk.step().unwrap();
            }
            wait(|| {
                blk.drain().unwrap();
                (blk.in_flight() == 0).then_some(())
            });
        });
        rig.stop(0, FINISH);
        for page in log.take() {
            take(page, &mut copy);
        }
        // What the device writes: data, and its part of the ring.
        let same = |addr: u64, len: u64| {
            let mut now = vec![0; len as usize];
            memory.read(addr, &mut now).unwrap();
            let then = &copy[(addr - BASE) as usize..][..len as usize];
            assert!(
                now == then,
                "{kind:?}: a write at {addr:#x}+{len:#x} is lost"
            );
        };
        same(data, 32 * 4096);
        match kind.packed {
            false => same(layout.device, 6 + 8 * 256),
            true => {
                same(layout.device, 4);
                for slot in 0..256 {
                    let at = layout.descriptors + 16 * slot;
                    let flags = memory.read_u16(at + 14).unwrap();
                    // Used: both bits are the same. The rest is the driver's, and not logged.
                    if (flags >> 7 ^ flags >> 15) & 1 == 0 && flags != 0 {
                        same(at, 16);
                    }
                }
            }
        }
    }
}
