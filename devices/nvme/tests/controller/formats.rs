//! Formats that somebody has to record before they hold: late, never, or not at all.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use bluff_layers::fault::{Action, Kinds};
use bluff_layers::{Fault, FaultOptions};
use bluff_nvme::{FormatKeeper, Kept, NamespaceFormat, NotKept, SubsystemError, SubsystemOptions};
use bluff_nvme_host::spec::status;
use bluff_nvme_host::{Buffer, Command};

use crate::namespaces::{changed, listen};
use crate::rig::*;
use crate::whole::Whole;

const SIZE: u64 = 1 << 20;

/// What was asked for, until the test answers.
#[derive(Debug, Default)]
struct Desk(Mutex<Vec<(Vec<NamespaceFormat>, Kept)>>);

impl FormatKeeper for Desk {
    fn keep(&self, formats: &[NamespaceFormat], kept: Kept) {
        self.0.lock().unwrap().push((formats.to_vec(), kept));
    }
}

impl Desk {
    fn asked(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    /// Waits until something is asked for.
    fn take(&self) -> (Vec<(u32, u32)>, Kept) {
        until(|| self.asked() > 0);
        let (formats, kept) = self.0.lock().unwrap().remove(0);
        let formats = formats.iter().map(|f| (f.nsid, f.block_size));
        (formats.collect(), kept)
    }
}

fn card() -> (Card, Arc<Desk>) {
    let desk = Arc::new(Desk::default());
    let options = SubsystemOptions {
        shared: true,
        keeper: Some(desk.clone()),
        ..SubsystemOptions::new("nqn.2025-01.test:kept")
    };
    (Card::with(ADAPTIVE, 2, options), desk)
}

/// Sends a format, and does not wait for its end.
fn begin(host: &mut Host, nsid: u32, format: u8) -> u16 {
    let command = Command::format(nsid, format, 0);
    let admin = host.controller.admin_queue().unwrap();
    let cid = admin.submit(0, &command).unwrap();
    admin.ring().unwrap();
    cid
}

fn block(host: &mut Host, nsid: u32) -> u64 {
    host.controller.identify_namespace(nsid).unwrap().block()
}

/// It reads as zeroes.
fn is_erased(host: &Host, queues: &mut HostQueues, nsid: u32, block: u64) {
    let mut data = Buffer::holding(&host.memory, &[0x55; 4096]).unwrap();
    let blocks = 4096 / block as u32;
    let read = Command::read(nsid, 0, blocks).data(data.prp().unwrap());
    queues.run(0, &read, PATIENCE).unwrap();
    assert!(data.read().iter().all(|byte| *byte == 0));
    // And it can be used.
    data.fill(0x33);
    let write = Command::write(nsid, 0, blocks).data(data.prp().unwrap());
    queues.run(0, &write, PATIENCE).unwrap();
}

#[test]
fn a_format_holds_when_it_is_recorded_and_not_before() {
    let (card, desk) = card();
    for _ in 0..2 {
        card.ram(512, SIZE);
    }
    let ports = [card.port("a", 2), card.port("b", 2)];
    let mut hosts = ports.each_ref().map(Port::host);
    hosts.iter_mut().for_each(listen);
    let [one, two] = &mut hosts;
    let mut queues = one.queues(1, 1, 16, false).remove(0);
    for (format, before, after) in [(1, 512, 4096), (1, 4096, 4096), (0, 4096, 512)] {
        let cid = begin(one, 1, format);
        let (asked, kept) = desk.take();
        assert_eq!(asked, [(1, after as u32)]);
        for host in [&mut *one, &mut *two] {
            assert_eq!(block(host, 1), before);
        }
        let read = Command::read(1, 0, 1);
        let done = queues.run(0, &read, PATIENCE);
        assert_eq!(refused(done), status::FORMAT_IN_PROGRESS);
        let again = two.controller.format(1, 0, 0);
        assert_eq!(refused(again), status::FORMAT_IN_PROGRESS);
        assert_eq!(card.subsystem.remove(1), Err(SubsystemError::Busy(1)));
        // Its neighbour is no worse off, and can be formatted meanwhile.
        is_usable(one, &mut queues, 2);
        let other = begin(two, 2, 0);
        desk.take().1.answer(Ok(()));
        let admin = two.controller.admin_queue().unwrap();
        admin.finish(0, other, PATIENCE).unwrap().ok().unwrap();
        changed(one, 2);

        kept.answer(Ok(()));
        let admin = one.controller.admin_queue().unwrap();
        admin.finish(0, cid, PATIENCE).unwrap().ok().unwrap();
        changed(two, 1);
        for host in [&mut *one, &mut *two] {
            assert_eq!(block(host, 1), after);
        }
        is_erased(one, &mut queues, 1, after);
    }
    // All at once are recorded at once.
    let cid = begin(one, u32::MAX, 1);
    let (asked, kept) = desk.take();
    assert_eq!(asked, [(1, 4096), (2, 4096)]);
    kept.answer(Ok(()));
    let admin = one.controller.admin_queue().unwrap();
    admin.finish(0, cid, PATIENCE).unwrap().ok().unwrap();
    assert_eq!([block(two, 1), block(two, 2)], [4096, 4096]);
}

/// A write of one block.
fn is_usable(host: &Host, queues: &mut HostQueues, nsid: u32) {
    let mut data = Buffer::new(&host.memory, 4096).unwrap();
    let write = Command::write(nsid, 0, 1).data(data.prp().unwrap());
    queues.run(0, &write, PATIENCE).unwrap();
}

#[test]
fn a_format_that_is_not_recorded_fails() {
    let (card, desk) = card();
    card.ram(512, SIZE);
    let port = card.port("port", 2);
    let mut host = port.host();
    host.enable();
    let mut queues = host.queues(1, 1, 16, false).remove(0);
    for format in [1, 0] {
        is_usable(&host, &mut queues, 1);
        let cid = begin(&mut host, 1, format);
        desk.take().1.answer(Err(NotKept));
        let admin = host.controller.admin_queue().unwrap();
        let done = admin.finish(0, cid, PATIENCE).unwrap();
        assert_eq!(refused(done.ok()), status::INTERNAL_ERROR);
        assert_eq!(block(&mut host, 1), 512);
        is_erased(&host, &mut queues, 1, 512);
    }
}

#[derive(Clone, Copy, Debug)]
enum Outcome {
    Kept,
    NotKept,
    Unknown,
}

/// The answer comes to a controller that has been reset since, or shut down, or has another host.
#[test]
fn a_reset_does_not_wait_for_the_record_nor_undo_it() {
    for outcome in [Outcome::Kept, Outcome::NotKept, Outcome::Unknown] {
        for way in 0..3 {
            let (card, desk) = card();
            card.ram(512, SIZE);
            let port = card.port("port", 2);
            let mut host = port.host();
            host.enable();
            let mut queues = host.queues(1, 1, 16, false).remove(0);
            is_usable(&host, &mut queues, 1);
            begin(&mut host, 1, 1);
            let (asked, kept) = desk.take();
            assert_eq!(asked, [(1, 4096)]);
            let began = Instant::now();
            match way {
                0 => host.controller.disable().unwrap(),
                1 => {
                    host.controller.shut_down(false).unwrap();
                    host.controller.disable().unwrap();
                }
                _ => {
                    drop((queues, host));
                    port.gone();
                    host = port.host();
                }
            }
            assert!(began.elapsed() < SOON, "{outcome:?} {way}");
            listen(&mut host);
            let mut queues = host.queues(1, 1, 16, false).remove(0);
            // As it was, and of no use to anybody, since nobody knows yet what it will be.
            assert_eq!(block(&mut host, 1), 512);
            let read = Command::read(1, 0, 1);
            for refusal in [
                queues.run(0, &read, PATIENCE),
                host.controller.admin(&Command::format(1, 0, 0)),
            ] {
                assert_eq!(refused(refusal), status::FORMAT_IN_PROGRESS);
            }
            match outcome {
                Outcome::Kept => {
                    kept.answer(Ok(()));
                    changed(&mut host, 1);
                    assert_eq!(block(&mut host, 1), 4096);
                    is_erased(&host, &mut queues, 1, 4096);
                }
                Outcome::NotKept => {
                    kept.answer(Err(NotKept));
                    assert_eq!(block(&mut host, 1), 512);
                    is_erased(&host, &mut queues, 1, 512);
                }
                Outcome::Unknown => {
                    drop(kept);
                    let done = queues.run(0, &read, PATIENCE);
                    assert_eq!(refused(done), status::FORMAT_IN_PROGRESS);
                }
            }
            assert_eq!(desk.asked(), 0, "nobody has asked again");
        }
    }
}

/// What is recorded has been erased, and has left the cache.
#[test]
fn a_format_is_recorded_after_the_flush() {
    let (card, desk) = card();
    let flushes = Kinds {
        read: false,
        write: false,
        flush: true,
        discard: false,
        write_zeroes: false,
    };
    for action in [Action::Stall, Action::Error(bluff_block::BlockError::Io)] {
        let volume = Whole::with_cache(512, SIZE);
        let fault = FaultOptions {
            kinds: flushes,
            ..FaultOptions::all(action)
        };
        let fault = Fault::new(Arc::new(volume), vec![fault]);
        let handle = fault.handle();
        let nsid = card.add(Arc::new(fault), 512);
        let port = card.port(&format!("port{nsid}"), 2);
        let mut host = port.host();
        host.enable();
        let cid = begin(&mut host, nsid, 1);
        until(|| handle.struck() == 1);
        assert_eq!(desk.asked(), 0);
        let admin = host.controller.admin_queue().unwrap();
        if action == Action::Stall {
            handle.clear();
            handle.resume();
            desk.take().1.answer(Ok(()));
            admin.finish(0, cid, PATIENCE).unwrap().ok().unwrap();
        } else {
            let done = admin.finish(0, cid, PATIENCE).unwrap();
            refused(done.ok());
            assert_eq!(desk.asked(), 0, "there is nothing to be recorded");
        }
        let expected = if action == Action::Stall { 4096 } else { 512 };
        assert_eq!(block(&mut host, nsid), expected);
    }
}
