//! Namespaces that come, go, grow, move and are formatted, under I/O; and what hosts hear of it.

use std::sync::Arc;
use std::time::Duration;

use bluff_block::Volume as _;
use bluff_block::ram::Ram;
use bluff_layers::fault::Action;
use bluff_layers::{Fault, FaultOptions};
use bluff_nvme::{AnaState, SubsystemOptions};
use bluff_nvme_host::spec::{feature, log, status};
use bluff_nvme_host::verify::{Shape, Traffic, Volume};
use bluff_nvme_host::{Buffer, Command, Status};
use bluff_reactor::Poll;
use bluff_testing::times;

use crate::rig::*;

const SIZE: u64 = 1 << 20;
/// Asynchronous event: notice, Namespace Attribute Changed, log page 4 (Base 2.1 §5.1.2).
const NAMESPACE_CHANGED: u32 = 0x04_00_02;

/// Has the host hear of namespaces (Base 2.1 §5.1.25.1.5).
pub fn listen(host: &mut Host) {
    host.enable_with_event();
    host.controller
        .set_feature(feature::EVENTS, 0, 1 << 8)
        .unwrap();
    host.controller.request_event().unwrap();
}

/// Waits for one event.
fn event(host: &mut Host) -> u32 {
    let mut event = None;
    until(|| {
        event = host.controller.poll_event().unwrap();
        event.is_some()
    });
    event.unwrap()
}

/// Waits until the host hears that this namespace has changed.
pub fn changed(host: &mut Host, nsid: u32) {
    assert_eq!(event(host), NAMESPACE_CHANGED);
    let page = host
        .controller
        .log_page(log::CHANGED_NAMESPACES, u32::MAX, 0, 4096);
    assert_eq!(page.unwrap()[..8], [nsid.to_le_bytes(), [0; 4]].concat());
    host.controller.request_event().unwrap();
}

#[test]
fn what_a_host_hears_of_it_can_use() {
    for poll in POLLS {
        let card = Card::new(poll, 2);
        card.ram(512, SIZE);
        let port = card.port("port", 2);
        let mut host = port.host();
        listen(&mut host);
        let mut queues = host.queues(2, 1, 16, true);
        let mut data = Buffer::new(&host.memory, 4096).unwrap();
        let at = data.prp().unwrap();
        for _ in 0..times(20, 2000) {
            let volume = Arc::new(Ram::new(512, SIZE).unwrap());
            let nsid = card.add(volume.clone(), 512);
            changed(&mut host, nsid);
            assert_eq!(host.controller.active_namespaces(0).unwrap(), [1, nsid]);
            for queues in &mut queues {
                let write = Command::write(nsid, 2040, 8).data(at);
                queues.run(0, &write, PATIENCE).unwrap();
            }
            volume.resize(2 * SIZE).unwrap();
            changed(&mut host, nsid);
            let identify = host.controller.identify_namespace(nsid).unwrap();
            assert_eq!(identify.nsze(), 4096);
            for queues in &mut queues {
                let write = Command::write(nsid, 4088, 8).data(at);
                queues.run(0, &write, PATIENCE).unwrap();
            }
            card.subsystem.remove(nsid).unwrap();
            changed(&mut host, nsid);
            for queues in &mut queues {
                let gone = queues.run(0, &Command::read(nsid, 0, 8).data(at), PATIENCE);
                assert_eq!(refused(gone), status::INVALID_FIELD);
            }
        }
    }
}

/// Every command that reaches the last block or one behind it, and its status.
fn reach(queues: &mut HostQueues, nsid: u32, data: &mut Buffer, last: u64) -> Vec<Status> {
    let at = data.prp().unwrap();
    let mut found = Vec::new();
    let mut run = |queues: &mut HostQueues, command: &Command| {
        let done = queues.run(0, command, PATIENCE);
        found.push(done.map_or_else(|e| e.status().unwrap(), |c| c.status));
    };
    for command in [
        Command::write(nsid, last, 1),
        Command::read(nsid, last, 1),
        Command::compare(nsid, last, 1),
    ] {
        run(queues, &command.data(at));
    }
    run(queues, &Command::verify(nsid, last, 1));
    run(queues, &Command::write_zeroes(nsid, last, 1, false));
    data.write(&bluff_nvme_host::copy_ranges(&[(last, 1)]));
    run(queues, &Command::copy(nsid, SIZE / 2 / 512, 1).data(at));
    data.write(&bluff_nvme_host::copy_ranges(&[(0, 1)]));
    run(queues, &Command::copy(nsid, last, 1).data(at));
    data.write(&bluff_nvme_host::dsm_ranges(&[(last, 1)]));
    run(queues, &Command::deallocate(nsid, 1).data(at));
    found
}

/// A volume that grows and shrinks under I/O: the host hears of it, has the new size at once, and nothing behind it; not with commands that were on their way, either.
#[test]
fn r17_a_volume_resized_online() {
    for poll in POLLS {
        let card = Card::new(poll, 2);
        let inner = Arc::new(crate::whole::Whole::new(512, SIZE));
        let stall = Fault::new(inner.clone(), Vec::new());
        let handle = stall.handle();
        let nsid = card.add(Arc::new(stall), 512);
        // Verified load on what is there always.
        let kept = [Volume::new(nsid, 512, SIZE / 2)];
        let port = card.port("port", 4);
        let mut host = port.host();
        listen(&mut host);
        let mut beside = host.traffic(1, 1, true, &kept, Shape::default());
        let mut queues = host.controller.create_queues(3, 1, 64, None).unwrap();
        let mut data = Buffer::new(&host.memory, 512).unwrap();
        let block = |bytes: u64| bytes / 512;
        for round in 0..times(6, 300) {
            for size in [2 * SIZE, SIZE / 2 + 4096, SIZE] {
                // Commands for the end of the larger one, which the volume has and the worker has checked, or are about to.
                let is_held = round % 2 == 0;
                if is_held {
                    handle.set(vec![FaultOptions::all(Action::Stall)]);
                }
                let before = handle.struck();
                let at = data.prp().unwrap();
                let was = host.controller.identify_namespace(nsid).unwrap().nsze();
                let cids: Vec<_> = (0..32)
                    .map(|i| {
                        let write = Command::write(nsid, was - 1 - i % 8, 1).data(at);
                        queues.submit(0, &write).unwrap()
                    })
                    .collect();
                queues.ring().unwrap();
                if is_held {
                    until(|| handle.struck() == before + 32);
                } else {
                    beside.fill(16).unwrap();
                }
                inner.resize(size).unwrap();
                handle.clear();
                handle.resume();
                changed(&mut host, nsid);
                let identify = host.controller.identify_namespace(nsid).unwrap();
                assert_eq!(identify.nsze(), block(size));
                for cid in cids {
                    let done = queues.finish(0, cid, PATIENCE).unwrap();
                    let found = done.completion.status;
                    let may = size < was * 512 && found == status::LBA_RANGE;
                    assert!(found.is_ok() || may, "{found}, {was} to {}", block(size));
                    let shrunk = is_held && size < was * 512;
                    assert!(!shrunk || !found.is_ok(), "written behind the end");
                }
                let last = block(size) - 1;
                if size > was * 512 {
                    // What has come back holds nothing of before.
                    data.fill(0xff);
                    let read = Command::read(nsid, last, 1).data(data.prp().unwrap());
                    queues.run(0, &read, PATIENCE).unwrap();
                    assert_eq!(data.read(), [0; 512], "{round} {size}");
                }
                let there = reach(&mut queues, nsid, &mut data, last);
                assert!(
                    there.iter().all(|s| s.is_ok() || *s == status::COMPARE),
                    "{there:?}"
                );
                let behind = reach(&mut queues, nsid, &mut data, last + 1);
                assert!(behind.iter().all(|s| *s == status::LBA_RANGE), "{behind:?}");
                let far = reach(&mut queues, nsid, &mut data, u64::MAX);
                assert!(far.iter().all(|s| *s == status::LBA_RANGE), "{far:?}");
                beside.run(100, 16, PATIENCE).unwrap();
            }
        }
        beside.verify(PATIENCE).unwrap();
    }
}

#[test]
fn a_namespace_that_goes_takes_its_commands_with_it() {
    let card = Card::new(ADAPTIVE, 2);
    let volumes = [card.ram(512, SIZE)];
    let stall = Fault::new(ram(512, SIZE), vec![FaultOptions::all(Action::Stall)]);
    let handle = stall.handle();
    let silent = card.add(Arc::new(stall), 512);
    let port = card.port("port", 4);
    let mut host = port.host();
    host.enable_with_event();
    let mut traffic = host.traffic(1, 1, true, &volumes, Shape::default());
    let mut queues = host.controller.create_queues(3, 1, 16, None).unwrap();
    let mut data = Buffer::new(&host.memory, 4096).unwrap();
    let read = Command::read(silent, 0, 8).data(data.prp().unwrap());
    let cids: Vec<_> = (0..4).map(|_| queues.submit(0, &read).unwrap()).collect();
    queues.ring().unwrap();
    until(|| handle.struck() == 4);
    card.subsystem.remove(silent).unwrap();
    // Neighbours go on meanwhile.
    traffic.run(500, 16, PATIENCE).unwrap();
    for cid in cids {
        let done = queues.finish(0, cid, PATIENCE).unwrap();
        assert_eq!(refused(done.ok()), status::INVALID_NAMESPACE);
    }
    traffic.verify(PATIENCE).unwrap();
}

/// Another block size, and the data gone, while others are in use; on all controllers.
#[test]
fn c08_formats() {
    for poll in POLLS {
        let card = Card::shared(poll, 2);
        let formatted = card.ram(512, SIZE);
        let other = [card.ram(512, SIZE)];
        let ports = [card.port("a", 4), card.port("b", 4)];
        let mut hosts = ports.each_ref().map(Port::host);
        for host in &mut hosts {
            listen(host);
        }
        let [one, two] = &mut hosts;
        let shape = Shape::default();
        let mut beside = two.traffic(1, 2, true, &other, shape);
        let mut on_it = one.traffic(1, 1, true, std::slice::from_ref(&formatted), shape);
        for (format, block) in [(1, 4096), (0, 512), (0, 512), (1, 4096)] {
            on_it.run(200, 16, PATIENCE).unwrap();
            // Under I/O: what comes while it goes on is refused.
            on_it.set_may_fail(true);
            on_it.fill(16).unwrap();
            one.controller.format(1, format, 0).unwrap();
            beside.run(200, 16, PATIENCE).unwrap();
            on_it.settle(PATIENCE).unwrap();
            let queues = on_it.into_queues();
            let identify = one.controller.identify_namespace(1).unwrap();
            assert_eq!(identify.block(), block);
            assert_eq!(identify.nsze(), SIZE / block);
            // It reads as zeroes, at once.
            let fresh = Volume::new(1, block as u32, SIZE);
            on_it = Traffic::new(queues, &[fresh], &one.memory, shape).unwrap();
            on_it.verify(PATIENCE).unwrap();
            changed(two, 1);
            let identify = two.controller.identify_namespace(1).unwrap();
            assert_eq!(identify.block(), block);
        }
        beside.verify(PATIENCE).unwrap();
        // Whoever has formatted it does not hear of it as of news.
        assert_eq!(one.controller.requests(), 1);
        let unknown = refused(one.controller.format(1, 2, 0));
        assert_eq!(unknown, status::FORMAT);
    }
}

/// A format over storage that does not answer ends with a reset, and nothing of it comes later.
#[test]
fn c07_a_reset_in_the_middle_of_a_format() {
    let card = Card::new(ADAPTIVE, 1);
    let stall = Fault::new(ram(512, SIZE), Vec::new());
    let handle = stall.handle();
    let nsid = card.add(Arc::new(stall), 512);
    let port = card.port("port", 2);
    let mut host = port.host();
    for _ in 0..3 {
        host.enable();
        handle.set(vec![FaultOptions::all(Action::Stall)]);
        let before = handle.struck();
        let format = Command::format(nsid, 0, 0);
        let admin = host.controller.admin_queue().unwrap();
        admin.submit(0, &format).unwrap();
        admin.ring().unwrap();
        until(|| handle.struck() > before);
        let began = std::time::Instant::now();
        host.controller.disable().unwrap();
        assert!(began.elapsed() < SOON);
        handle.clear();
        host.enable();
        let mut queues = host.queues(1, 1, 16, false).remove(0);
        let mut data = Buffer::holding(&host.memory, &[0x33; 4096]).unwrap();
        let at = data.prp().unwrap();
        let write = Command::write(nsid, 0, 8).data(at);
        queues.run(0, &write, PATIENCE).unwrap();
        // If anything of it were left, it would go on now.
        handle.resume();
        data.fill(0);
        let read = Command::read(nsid, 0, 8).data(at);
        queues.run(0, &read, PATIENCE).unwrap();
        assert_eq!(data.read(), [0x33; 4096]);
        host.controller.disable().unwrap();
    }
}

#[test]
fn a_way_that_is_no_way_is_refused() {
    let card = Card::shared(Poll::Never, 2);
    let volume = card.ram(512, SIZE);
    let ports = [card.port("a", 2), card.port("b", 2)];
    let mut hosts = ports.each_ref().map(Port::host);
    let mut queues = Vec::new();
    for host in &mut hosts {
        host.enable_with_event();
        // ANA changes, too.
        host.controller
            .set_feature(feature::EVENTS, 0, 1 << 11)
            .unwrap();
        host.controller.request_event().unwrap();
        queues.push(host.queues(1, 1, 16, true).remove(0));
    }
    let mut data = Buffer::new(&hosts[0].memory, 4096).unwrap();
    let commands = [
        Command::read(volume.nsid, 0, 8).data(data.prp().unwrap()),
        Command::flush(volume.nsid),
        Command::write_zeroes(volume.nsid, 0, 8, false),
    ];
    let path = |code| Status::new(3, code);
    for (ana, refusal) in [
        (AnaState::Inaccessible, Some(path(2))),
        (AnaState::Change, Some(path(3))),
        (AnaState::NonOptimized, None),
        (AnaState::PersistentLoss, Some(path(1))),
        (AnaState::Optimized, None),
    ] {
        card.subsystem.set_ana(1, Some(ports[0].id), ana).unwrap();
        assert_eq!(event(&mut hosts[0]), 0x0c_03_02);
        hosts[0]
            .controller
            .log_page(log::ANA, u32::MAX, 0, 16)
            .unwrap();
        hosts[0].controller.request_event().unwrap();
        for command in &commands {
            let done = queues[0].run(0, command, PATIENCE);
            match refusal {
                Some(status) => assert_eq!(refused(done), status, "{ana:?}"),
                None => drop(done.unwrap()),
            }
            queues[1].run(0, command, PATIENCE).unwrap();
        }
    }
}

#[test]
fn thirty_two_namespaces_and_a_namespace_above_them() {
    let mut options = SubsystemOptions::new("nqn.2025-01.test:many");
    options.max_namespaces = 32;
    let card = Card::with(ADAPTIVE, 2, options);
    let volumes: Vec<_> = (0..32)
        .map(|i| card.ram(if i % 2 == 0 { 512 } else { 4096 }, 256 << 10))
        .collect();
    let port = card.port("port", 4);
    let mut host = port.host();
    host.enable_with_event();
    assert_eq!(host.controller.active_namespaces(0).unwrap().len(), 32);
    let mut traffic = host.traffic(4, 1, true, &volumes, Shape::default());
    traffic.run(times(2000, 100_000), 16, PATIENCE).unwrap();
    traffic.verify(PATIENCE).unwrap();
    let mut queues = traffic.into_queues();
    let above = queues[0].run(0, &Command::flush(33), Duration::from_secs(10));
    assert_eq!(refused(above), status::INVALID_NAMESPACE);
}
