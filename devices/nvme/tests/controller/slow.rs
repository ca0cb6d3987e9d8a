//! Storage that is slower than its host has patience (Linux: 30 s, then Abort, then a reset): nothing of it lands in memory that the host uses for
//! something else by then.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bluff_layers::delay::When;
use bluff_layers::fault::Action;
use bluff_layers::{Delay, DelayOptions, Fault, FaultOptions};
use bluff_nvme_host::spec::status;
use bluff_nvme_host::verify::Shape;
use bluff_nvme_host::{Buffer, Command};
use bluff_testing::times;

use crate::rig::*;

const SIZE: u64 = 1 << 20;
const MARK: u8 = 0x5a;

/// Commands of 8 KiB each: reads and compares into memory, and a write of other data.
fn submit(queues: &mut HostQueues, buffers: &mut [Buffer]) -> Vec<u16> {
    let mut cids = Vec::new();
    for (i, buffer) in buffers.iter_mut().enumerate() {
        let at = buffer.prp().unwrap();
        let command = match i % 4 {
            0 => Command::write(1, 16 * i as u64, 16),
            1 => Command::compare(1, 16 * i as u64, 16),
            _ => Command::read(1, 16 * i as u64, 16),
        };
        cids.push(queues.submit(0, &command.data(at)).unwrap());
    }
    queues.ring().unwrap();
    cids
}

/// The host uses the memory for something else.
fn reuse(buffers: &[Buffer]) {
    buffers.iter().for_each(|b| b.fill(MARK));
}

#[track_caller]
fn assert_untouched(buffers: &[Buffer]) {
    for (i, buffer) in buffers.iter().enumerate() {
        let is_mark = buffer.read().iter().all(|b| *b == MARK);
        assert!(is_mark, "command {i} has written late");
    }
}

fn buffers(host: &Host) -> Vec<Buffer> {
    let one = |_| Buffer::new(&host.memory, 8192).unwrap();
    (0..8).map(one).collect()
}

/// Waits until the volume has answered whatever it has now: commands of after it are done, in order, on its one channel.
fn past(queues: &mut HostQueues, host: &Host, value: u8) {
    let mut data = Buffer::new(&host.memory, 8192).unwrap();
    data.fill(value);
    let at = data.prp().unwrap();
    for i in 0..8 {
        let write = Command::write(1, 16 * i, 16).data(at);
        queues.run(0, &write, PATIENCE).unwrap();
    }
    for i in 0..8 {
        data.fill(0);
        let read = Command::read(1, 16 * i, 16).data(at);
        queues.run(0, &read, PATIENCE).unwrap();
        assert!(data.read().iter().all(|b| *b == value), "an old write");
    }
}

#[test]
fn r13_aborts_of_what_is_too_slow() {
    for poll in POLLS {
        let card = Card::new(poll, 1);
        let stall = Fault::new(ram(512, SIZE), Vec::new());
        let handle = stall.handle();
        card.add(Arc::new(stall), 512);
        let beside = [card.ram(512, SIZE)];
        let port = card.port("port", 4);
        let mut host = port.host();
        host.enable_with_event();
        let mut neighbour = host.traffic(1, 1, true, &beside, Shape::default());
        let mut queues = host.controller.create_queues(2, 1, 16, None).unwrap();
        for round in 0..times(3, 50) as u8 {
            let mut buffers = buffers(&host);
            handle.set(vec![FaultOptions::all(Action::Stall)]);
            let before = handle.struck();
            let cids = submit(&mut queues, &mut buffers);
            until(|| handle.struck() == before + 8);
            for cid in cids {
                // Its host has lost patience.
                assert!(host.controller.abort(2, cid).unwrap());
                let done = queues.finish(0, cid, PATIENCE).unwrap();
                assert_eq!(refused(done.ok()), status::ABORT_REQUESTED);
            }
            reuse(&buffers);
            neighbour.run(50, 16, PATIENCE).unwrap();
            // The storage goes on, at last.
            handle.clear();
            handle.resume();
            past(&mut queues, &host, round);
            assert_untouched(&buffers);
        }
        neighbour.verify(PATIENCE).unwrap();
    }
}

#[test]
fn r13_a_reset_where_an_abort_does_not_help() {
    for poll in POLLS {
        for when in [When::Before, When::After] {
            let card = Card::new(poll, 1);
            let stall = Arc::new(Fault::new(ram(512, SIZE), Vec::new()));
            let handle = stall.handle();
            let late = DelayOptions {
                when,
                ..DelayOptions::all(Duration::from_millis(2))
            };
            card.add(Arc::new(Delay::new(stall, late)), 512);
            let port = card.port("port", 4);
            let mut host = port.host();
            for round in 0..times(3, 50) as u8 {
                host.enable_with_event();
                let mut queues = host.queues(1, 1, 16, true).remove(0);
                let mut buffers = buffers(&host);
                handle.set(vec![FaultOptions::all(Action::Stall)]);
                let before = handle.struck();
                let cids = submit(&mut queues, &mut buffers);
                until(|| handle.struck() > before);
                // Linux: one Abort, and where its command does not come back either, a reset.
                let _ = host.controller.abort(1, cids[7]).unwrap();
                let began = Instant::now();
                host.controller.disable().unwrap();
                assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
                reuse(&buffers);
                drop(queues);
                handle.clear();
                handle.resume();
                host.enable_with_event();
                let mut queues = host.queues(1, 1, 16, true).remove(0);
                past(&mut queues, &host, round);
                assert_untouched(&buffers);
                host.controller.disable().unwrap();
            }
        }
    }
}
