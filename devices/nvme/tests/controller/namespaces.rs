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
