//! Commands one by one, of both kinds, and what they leave in logs and counters.

use std::time::Duration;

use bluff_layers::fault::{Action, Kinds};
use bluff_layers::{Fault, FaultOptions};
use bluff_nvme_host::spec::{admin, feature, io, log, status};
use bluff_nvme_host::verify::Shape;
use bluff_nvme_host::{Buffer, Command, Setup, copy_ranges, dsm_ranges};
use bluff_reactor::Poll;

use crate::rig::*;

const SIZE: u64 = 1 << 20;

fn pattern(seed: u8, len: u64) -> Vec<u8> {
    (0..len).map(|i| (i / 512) as u8 ^ seed).collect()
}

#[test]
fn every_io_command_does_what_it_says() {
    for block in [512, 4096] {
        let card = Card::new(ADAPTIVE, 2);
        card.ram(block, SIZE);
        let port = card.port("port", 2);
        let mut host = port.host();
        host.enable();
        let mut queues = host.queues(1, 1, 16, true).remove(0);
        let len = 8 * u64::from(block);
        let data = pattern(3, len);
        let mut from = Buffer::holding(&host.memory, &data).unwrap();
        let mut to = Buffer::scattered(&host.memory, 0x40, len).unwrap();
        let (from, to_at) = (from.prp().unwrap(), to.prp().unwrap());
        let mut run = |command: &Command| queues.run(0, command, PATIENCE);
        let read = |run: &mut dyn FnMut(&Command) -> _, lba| -> Vec<u8> {
            let done: Result<_, bluff_nvme_host::Error> =
                run(&Command::read(1, lba, 8).data(to_at));
            done.unwrap();
            to.read()
        };
        run(&Command::write(1, 8, 8).data(from)).unwrap();
        assert_eq!(read(&mut run, 8), data);
        run(&Command::compare(1, 8, 8).data(from)).unwrap();
        let differs = run(&Command::compare(1, 9, 8).data(from));
        assert_eq!(refused(differs), status::COMPARE);
        run(&Command::verify(1, 0, 32)).unwrap();
        // Copied in two pieces, the second one before the first.
        let ranges = Buffer::holding(&host.memory, &copy_ranges(&[(12, 4), (8, 4)]));
        let ranges = ranges.unwrap().prp().unwrap();
        run(&Command::copy(1, 64, 2).data(ranges)).unwrap();
        let (first, second) = data.split_at(data.len() / 2);
        assert_eq!(read(&mut run, 64), [second, first].concat());
        run(&Command::write_zeroes(1, 10, 2, true)).unwrap();
        let mut zeroed = data.clone();
        zeroed[2 * block as usize..4 * block as usize].fill(0);
        assert_eq!(read(&mut run, 8), zeroed);
        let ranges = Buffer::holding(&host.memory, &dsm_ranges(&[(64, 8)]));
        let ranges = ranges.unwrap().prp().unwrap();
        run(&Command::deallocate(1, 1).data(ranges)).unwrap();
        run(&Command::flush(1)).unwrap();
        run(&Command::flush(u32::MAX)).unwrap();
        let last = SIZE / u64::from(block);
        let past = run(&Command::read(1, last - 7, 8).data(to_at));
        assert_eq!(refused(past), status::LBA_RANGE);
        let unknown = run(&Command::new(0x7f, 1));
        assert_eq!(refused(unknown), status::INVALID_OPCODE);
    }
}

#[test]
fn smart_and_the_error_log_tell_what_was_done() {
    let card = Card::new(Poll::Never, 2);
    let fault = Fault::new(ram(512, SIZE), Vec::new());
    let handle = fault.handle();
    card.add(std::sync::Arc::new(fault), 512);
    let port = card.port("port", 2);
    let mut host = port.host();
    host.enable();
    let mut queues = host.queues(1, 1, 16, false).remove(0);
    let mut data = Buffer::new(&host.memory, 512_000).unwrap();
    let at = data.prp().unwrap();
    let smart = |host: &mut Host| {
        let page = host.controller.log_page(log::SMART, u32::MAX, 0, 512);
        let page = page.unwrap();
        move |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap())
    };
    // 3 writes and 2 reads of 512000 bytes each: one unit of 1000 blocks (Base 2.1 §5.1.12.1.3).
    for _ in 0..3 {
        let write = Command::write(1, 0, 1000).data(at);
        queues.run(0, &write, PATIENCE).unwrap();
    }
    for _ in 0..2 {
        let read = Command::read(1, 0, 1000).data(at);
        queues.run(0, &read, PATIENCE).unwrap();
    }
    let page = smart(&mut host);
    assert_eq!((page(32), page(48)), (2, 3), "units read, and written");
    assert_eq!((page(64), page(80)), (2, 3), "commands");
    assert_eq!((page(160), page(176)), (0, 0), "errors");
    // Storage fails.
    handle.set(vec![FaultOptions {
        kinds: Kinds {
            read: true,
            ..Kinds::NONE
        },
        ..FaultOptions::all(Action::Error(bluff_block::BlockError::Io))
    }]);
    let read = Command::read(1, 17, 8).data(at);
    let failed = queues.run(0, &read, PATIENCE);
    assert_eq!(refused(failed), status::READ_ERROR);
    assert_eq!(smart(&mut host)(160), 1, "media errors");
    let entry = host.controller.log_page(log::ERROR, 0, 0, 64).unwrap();
    let word = |at: usize| u16::from_le_bytes(entry[at..at + 2].try_into().unwrap());
    let count = u64::from_le_bytes(entry[..8].try_into().unwrap());
    assert_eq!((count, word(8)), (1, 1), "the first error, of SQ 1");
    assert_eq!(word(12) >> 1 & 0x7ff, 2 << 8 | 0x81, "its status");
    assert_eq!(u64::from_le_bytes(entry[16..24].try_into().unwrap()), 17);
    assert_eq!(u32::from_le_bytes(entry[24..28].try_into().unwrap()), 1);
}

#[test]
fn busy_time_is_that_with_commands_in_flight() {
    let card = Card::new(ADAPTIVE, 1);
    let stall = Fault::new(ram(512, SIZE), vec![FaultOptions::all(Action::Stall)]);
    let handle = stall.handle();
    card.add(std::sync::Arc::new(stall), 512);
    let port = card.port("port", 2);
    let mut host = port.host();
    host.enable();
    let mut queues = host.queues(1, 1, 16, false).remove(0);
    let cid = queues.submit(0, &Command::flush(1)).unwrap();
    let mut data = Buffer::new(&host.memory, 512).unwrap();
    let read = Command::read(1, 0, 1).data(data.prp().unwrap());
    let other = queues.submit(0, &read).unwrap();
    let began = std::time::Instant::now();
    queues.ring().unwrap();
    until(|| handle.struck() > 0);
    let in_flight = began.elapsed();
    std::thread::sleep(Duration::from_millis(20));
    handle.clear();
    handle.resume();
    for cid in [cid, other] {
        queues.finish(0, cid, PATIENCE).unwrap().ok().unwrap();
    }
    let most = began.elapsed() + in_flight;
    let busy = || {
        Duration::from_micros(
            port.counters
                .busy_us
                .load(std::sync::atomic::Ordering::Relaxed),
        )
    };
    until(|| busy() >= Duration::from_millis(19));
    assert!(busy() <= most, "{:?}", busy());
}

#[test]
fn features_hold_until_a_reset() {
    let card = Card::new(ADAPTIVE, 1);
    card.ram(512, SIZE);
    let port = card.port("port", 4);
    let mut host = port.host();
    host.enable();
    for (fid, value) in [
        (feature::COALESCING, 0x0a05),
        (feature::EVENTS, 0x103),
        (feature::ARBITRATION, 3),
    ] {
        let before = host.controller.feature(fid, 0).unwrap();
        host.controller.set_feature(fid, 0, value).unwrap();
        assert_eq!(host.controller.feature(fid, 0).unwrap(), value);
        assert_ne!(before, value);
        host.controller.disable().unwrap();
        host.enable();
        assert_eq!(host.controller.feature(fid, 0).unwrap(), before);
    }
    assert_eq!(host.controller.set_queue_count(100, 3).unwrap(), (4, 3));
}

#[test]
fn interrupts_are_put_together_as_the_host_wants() {
    let card = Card::new(ADAPTIVE, 1);
    card.ram(512, SIZE);
    let port = card.port("port", 2);
    let mut host = port.host();
    host.enable();
    let mut queues = host.queues(1, 1, 16, true).remove(0);
    // Eight, or 25 ms: an interrupt for less than eight is late, and comes.
    host.controller
        .set_feature(feature::COALESCING, 0, 250 << 8 | 7)
        .unwrap();
    let command = Command::flush(1);
    for _ in 0..3 {
        for _ in 0..7 {
            queues.submit(0, &command).unwrap();
        }
        queues.ring().unwrap();
        assert!(queues.wait_for_event(PATIENCE), "after its time");
        let mut found = 0;
        while queues.poll().unwrap().is_some() {
            found += 1;
        }
        assert_eq!(found, 7, "one interrupt for all");
        queues.ring().unwrap();
        // At once, for as many as are asked for.
        for _ in 0..8 {
            queues.submit(0, &command).unwrap();
        }
        queues.ring().unwrap();
        assert!(queues.wait_for_event(PATIENCE));
        until(|| queues.poll().unwrap().is_some());
        queues.ring().unwrap();
        until(|| {
            while queues.poll().unwrap().is_some() {}
            queues.in_flight() == 0
        });
        queues.ring().unwrap();
        queues.cq.event().unwrap().take();
    }
}

#[test]
fn many_vectors_and_one_for_all() {
    let card = Card::new(ADAPTIVE, 2);
    let volumes = [card.ram(512, SIZE)];
    let port = card.port("port", 63);
    let mut host = port.host();
    host.enable_with_event();
    let mut traffic = host.traffic(63, 1, true, &volumes, Shape::default());
    traffic.run(2000, 4, PATIENCE).unwrap();
    traffic.verify(PATIENCE).unwrap();
    for queues in traffic.into_queues() {
        host.controller.delete_queues(queues).unwrap();
    }
    // All on the vector of the admin queue: whoever is told looks at all of them. With a mask that comes and goes.
    let event = host.vectors[0].clone();
    let mut all = Vec::new();
    for id in 1..=8 {
        let vector = Some((0, event.clone()));
        all.push(host.controller.create_queues(id, 1, 16, vector).unwrap());
    }
    for round in 0..200 {
        host.msix.set_masked(0, true).unwrap();
        let (some, others) = all.split_at_mut(4);
        for queues in others.iter_mut().chain(some.iter_mut()) {
            queues.submit(0, &Command::flush(1)).unwrap();
            queues.ring().unwrap();
        }
        // What a host polls by itself takes nothing from the others.
        for queues in some {
            until(|| queues.poll().unwrap().is_some());
            queues.ring().unwrap();
        }
        event.take();
        host.msix.set_masked(0, false).unwrap();
        for queues in others {
            if !queues.cq.is_ready() {
                assert!(event.wait(PATIENCE), "an interrupt is lost, {round}");
                event.take();
            }
            until(|| queues.poll().unwrap().is_some());
            queues.ring().unwrap();
        }
    }
}

#[test]
fn c06_aborts() {
    let card = Card::new(Poll::Never, 1);
    let stall = Fault::new(ram(512, SIZE), vec![FaultOptions::all(Action::Stall)]);
    let handle = stall.handle();
    card.add(std::sync::Arc::new(stall), 512);
    let port = card.port("port", 2);
    let mut host = port.host();
    host.enable();
    let mut queues = host.queues(1, 1, 16, true).remove(0);
    let mut data = Buffer::new(&host.memory, 512).unwrap();
    data.fill(0x77);
    let read = Command::read(1, 0, 1).data(data.prp().unwrap());
    let cids: Vec<_> = (0..3).map(|_| queues.submit(0, &read).unwrap()).collect();
    queues.ring().unwrap();
    until(|| handle.struck() == 3);
    assert!(host.controller.abort(1, cids[1]).unwrap());
    let done = queues.finish(0, cids[1], PATIENCE).unwrap();
    assert_eq!(refused(done.ok()), status::ABORT_REQUESTED);
    assert_eq!(data.read(), [0x77; 512]);
    assert!(!host.controller.abort(1, 999).unwrap());
    for sq in [2, 3, 0xffff] {
        let refusal = refused(host.controller.abort(sq, 0));
        assert_eq!(refusal, status::INVALID_FIELD);
    }
    handle.clear();
    handle.resume();
    for cid in [cids[0], cids[2]] {
        queues.finish(0, cid, PATIENCE).unwrap().ok().unwrap();
    }
    assert_eq!(queues.in_flight(), 0);
    let write = Command::new(io::WRITE, 1).data(data.prp().unwrap());
    queues.run(0, &write, PATIENCE).unwrap();
}

/// What the controller tells is as long as was asked for, in however many pieces the buffer is; the rest of the page is zero, and the rest of memory as it was.
#[test]
fn c03_answers_over_several_pages() {
    let card = Card::new(Poll::Never, 1);
    card.ram(512, SIZE);
    let port = card.port("port", 2);
    let mut host = port.host();
    host.enable();
    let smart = host.controller.log_page(log::SMART, u32::MAX, 0, 512);
    let health = smart.unwrap();
    for (offset, asked) in [
        (0, 16 << 10),
        (0xffc, 512),
        (0xe00, 4096),
        (0x10, 200 << 10),
    ] {
        let mut buffer = Buffer::scattered(&host.memory, offset, asked).unwrap();
        let pages = buffer.pages().to_vec();
        // All of its pages, and what comes of a command for it: before it, in it, behind it.
        let mut run = |command: Command| {
            for page in &pages {
                let at = page & !0xfff;
                host.memory.memory().write(at, &[0x5a; 4096]).unwrap();
            }
            let pointer = buffer.prp().unwrap();
            host.controller.admin(&command.data(pointer)).unwrap();
            let mut all = vec![0; 4096 * pages.len()];
            for (page, to) in pages.iter().zip(all.chunks_mut(4096)) {
                host.memory.memory().read(page & !0xfff, to).unwrap();
            }
            let told = all.split_off(offset as usize);
            assert!(all.iter().all(|b| *b == 0x5a), "{offset:#x} {asked}");
            told
        };
        let found = run(Command::log_page(log::SMART, u32::MAX, 0, asked as u32));
        let (told, rest) = found.split_at(asked as usize);
        // But for how long the controller has been in use.
        assert_eq!(told[..32], health[..32], "{offset:#x} {asked}");
        assert!(told[512..].iter().all(|b| *b == 0), "{offset:#x} {asked}");
        assert!(rest.iter().all(|b| *b == 0x5a), "{offset:#x} {asked}");
        if asked == 4096 {
            // Of Identify there is always a page.
            let found = run(Command::identify(2, 0));
            assert_eq!(found[..4], [1, 0, 0, 0]);
            assert!(found[4..4096].iter().all(|b| *b == 0));
            assert!(found[4096..].iter().all(|b| *b == 0x5a));
        }
    }
}

/// An event request can be given back; one that there is no room to complete stays, and is not forgotten.
#[test]
fn event_requests_are_aborted_or_stay() {
    let card = Card::new(Poll::Never, 1);
    card.ram(512, SIZE);
    let port = card.port("port", 2);
    let mut host = port.host();
    // Three completions have a place.
    let setup = Setup {
        admin_cq: 4,
        ..Setup::default()
    };
    host.controller.enable(&setup).unwrap();
    let queue = host.controller.admin_queue().unwrap();
    let event = Command::new(admin::ASYNC_EVENT, 0);
    let request = queue.submit(0, &event).unwrap();
    for _ in 0..2 {
        let get = Command::get_features(feature::ARBITRATION, 0);
        queue.submit(0, &get).unwrap();
    }
    let abort = Command::abort(0, request);
    queue.submit(0, &abort).unwrap();
    queue.ring().unwrap();
    // Read without a word, so that no place is given back.
    let mut done = Vec::new();
    until(|| {
        done.extend(queue.poll().unwrap());
        done.len() == 3
    });
    let last = done[2];
    assert_eq!((last.opcode, last.completion.dw0()), (admin::ABORT, 1));
    queue.ring().unwrap();
    let again = queue.run(0, &abort, PATIENCE).unwrap();
    assert_eq!(again.dw0(), 0, "it was there still");
    let back = queue.finish(0, request, PATIENCE).unwrap();
    assert_eq!(refused(back.ok()), status::ABORT_REQUESTED);
    // And what was given back makes room for as many as there were.
    for _ in 0..8 {
        queue.submit(0, &event).unwrap();
    }
    queue.ring().unwrap();
    queue
        .run(0, &Command::get_features(feature::ARBITRATION, 0), PATIENCE)
        .unwrap();
    assert_eq!(queue.in_flight(), 8);
}
