//! A live migration: every page that the device writes is marked in the front end's log, so that it is copied again.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::sync::Arc;

use bluff_memory::{DirtyLog, LOG_PAGE};
use bluff_net::{Cause, Pair};
use bluff_virtio::{QueueChange, QueueLog, VirtioDevice};
use bluff_virtio_driver::Memory;
use bluff_virtio_net::spec::feature;

use crate::rig::*;

const MEMORY: u64 = 64 << 20;
/// What of it is compared: rings and buffers are there.
const USED: u64 = 32 << 20;

/// The log of a front end.
struct Log {
    memory: Arc<Memory>,
    log: Arc<DirtyLog>,
}

impl Log {
    fn new() -> Self {
        let size = ((BASE + MEMORY) / LOG_PAGE / 8).next_multiple_of(LOG_PAGE);
        let memory = Memory::flat(0, size).unwrap();
        let file = memory.regions()[0].as_fd().try_clone_to_owned().unwrap();
        Self {
            log: Arc::new(DirtyLog::new(file, 0, size).unwrap()),
            memory,
        }
    }

    /// The pages that were marked since the last time, by guest address. The device is at rest meanwhile.
    fn take(&self) -> BTreeSet<u64> {
        let first = BASE / LOG_PAGE / 8;
        let mut bytes = vec![0; (MEMORY / LOG_PAGE / 8) as usize];
        self.memory.read(first, &mut bytes).unwrap();
        self.memory.write(first, &vec![0; bytes.len()]).unwrap();
        let set = |i: &u64| bytes[(i / 8) as usize] & 1 << (i % 8) != 0;
        let pages = (0..MEMORY / LOG_PAGE).filter(set);
        pages.map(|page| BASE + page * LOG_PAGE).collect()
    }
}

fn snapshot(guest: &Guest) -> Vec<u8> {
    let mut bytes = vec![0; USED as usize];
    guest.memory.read(BASE, &mut bytes).unwrap();
    bytes
}

/// The pages that differ.
fn changed(before: &[u8], after: &[u8]) -> BTreeSet<u64> {
    let page = LOG_PAGE as usize;
    let pairs = before.chunks(page).zip(after.chunks(page)).enumerate();
    let differ = pairs.filter(|(_, (before, after))| before != after);
    differ.map(|(i, _)| BASE + i as u64 * LOG_PAGE).collect()
}

fn log_queue(guest: &mut Guest, index: u16, log: Option<&Log>) {
    let used = guest.queues[usize::from(index)].layout().device;
    let log = log.map(|log| QueueLog {
        log: log.log.clone(),
        used: Some(used),
    });
    let done = Box::new(|| {});
    guest
        .device
        .change_queue(index, QueueChange::Log { log, done });
}

/// The page of a queue's used ring; of a packed one that of its descriptors.
fn ring(guest: &Guest, kind: Kind, index: u16) -> u64 {
    let layout = guest.queues[usize::from(index)].layout();
    let at = if kind.packed {
        layout.descriptors
    } else {
        layout.device
    };
    at & !(LOG_PAGE - 1)
}

#[test]
fn received_frames_and_used_rings_are_marked() {
    for kind in [Kind::SPLIT, Kind::PACKED] {
        for mergeable in [true, false] {
            let features = match mergeable {
                true => ALL,
                false => ALL & !feature::MRG_RXBUF,
            };
            let mut reactor = reactor();
            let (a, b) = Pair::new();
            let mut a = Guest::new(&mut reactor, Arc::new(a), kind, ALL, 64);
            let mut b = Guest::new(&mut reactor, Arc::new(b), kind, features, 64);
            let log = Log::new();
            for index in 0..2 {
                log_queue(&mut b, index, Some(&log));
            }
            turns(&mut reactor, 20);
            let buffers = match mergeable {
                // Buffers of no whole pages, so that frames end and begin within them.
                true => vec![5000; 8],
                false => vec![ROOM as u32],
            };
            // Buffers that wait for a frame, and a frame that waits for buffers.
            for late in [false, true] {
                // Places are used again: other bytes show.
                let long = frame(false, true, 30_000, 1 + u8::from(late));
                if !late {
                    b.offer(0, &buffers);
                }
                turns(&mut reactor, 20);
                log.take();
                let before = snapshot(&b);
                a.send(0, &header(false, true, 1400), &long);
                turns(&mut reactor, 20);
                if late {
                    // Not long after: a frame does not wait for ever.
                    b.offer(0, &buffers);
                }
                let got = until(&mut reactor, || b.receive(0));
                let mut written = changed(&before, &snapshot(&b));
                // What the driver wrote to make them available is not the device's.
                let own = b.queues[0].layout();
                for page in [own.descriptors, own.driver].map(|at| at & !(LOG_PAGE - 1)) {
                    if late && page != ring(&b, kind, 0) {
                        written.remove(&page);
                    }
                }
                let marked = log.take();
                let what = format!("{kind:?} {mergeable} {late}");
                assert!(
                    written.len() >= 8,
                    "{what}: the frame and the ring: {written:x?}"
                );
                assert!(written.contains(&ring(&b, kind, 0)), "{what}");
                assert!(
                    written.is_subset(&marked),
                    "{what}: {written:x?} {marked:x?}"
                );
                // Not everything: what a frame did not reach is not copied again.
                assert!(marked.len() <= written.len() + 16, "{what}: {marked:x?}");
                assert!(got.bytes == long, "{what}");
            }
            // What it sends is only read; its used ring is written.
            turns(&mut reactor, 20);
            log.take();
            b.send(0, &header(false, true, 0), &frame(false, true, 9000, 3));
            let before = snapshot(&b);
            turns(&mut reactor, 20);
            let written = changed(&before, &snapshot(&b));
            let marked = log.take();
            assert!(written.contains(&ring(&b, kind, 1)) && written.is_subset(&marked));
            assert!(marked.len() <= 2, "the ring alone: {marked:x?}");
            assert_eq!(
                b.device.counters()[0].received.drops.get(Cause::NoBuffers),
                0
            );
        }
    }
}

/// Logging begins while buffers are held: what was written of the ring before may not have been copied.
#[test]
fn logging_that_begins_later_marks_the_ring_and_what_follows() {
    for kind in [Kind::SPLIT, Kind::PACKED] {
        let mut reactor = reactor();
        let (a, b) = Pair::new();
        let mut a = Guest::new(&mut reactor, Arc::new(a), kind, ALL, 64);
        let mut b = Guest::new(&mut reactor, Arc::new(b), kind, ALL, 64);
        // Three buffers of a frame that needs more: they are popped, and wait.
        b.offer(0, &[2048; 3]);
        let long = frame(false, true, 20_000, 1);
        a.send(0, &header(false, true, 1400), &long);
        turns(&mut reactor, 20);
        let log = Log::new();
        log_queue(&mut b, 0, Some(&log));
        turns(&mut reactor, 20);
        assert!(log.take().contains(&ring(&b, kind, 0)));
        b.offer(0, &[2048; 10]);
        let before = snapshot(&b);
        a.send(0, &header(false, true, 0), &frame(false, true, 100, 2));
        let got = until(&mut reactor, || b.receive(0));
        assert!(got.bytes == long);
        let written = changed(&before, &snapshot(&b));
        assert!(written.len() > 5 && written.is_subset(&log.take()));
        // It ends, and nothing is marked any more.
        log_queue(&mut b, 0, None);
        turns(&mut reactor, 20);
        log.take();
        b.offer(0, &[2048; 2]);
        a.send(0, &header(false, true, 0), &frame(false, true, 100, 3));
        until(&mut reactor, || b.receive(0));
        assert!(log.take().is_empty());
    }
}
