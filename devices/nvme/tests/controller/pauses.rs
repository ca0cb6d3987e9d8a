//! The host takes memory away and gives it back: one mapping, bus mastering, power.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bluff_layers::fault::Action;
use bluff_layers::{Delay, DelayOptions, Fault, FaultOptions};
use bluff_nvme_host::spec::{register as reg, status};
use bluff_nvme_host::verify::{Shape, Volume};
use bluff_nvme_host::{Buffer, Command, HostMemory, Pointer};
use bluff_testing::times;
use bluff_vfio_client::DmaMap;

use crate::rig::*;

const SIZE: u64 = 1 << 20;
const OTHER: u64 = BASE + (1 << 32);
const LEN: u64 = 1 << 20;

/// Memory that is unmapped while storage has it: the reply comes when nobody uses it any more, and what is read later lands nowhere.
#[test]
fn d01_unmap_with_io_in_flight() {
    for poll in POLLS {
        for silent in [true, false] {
            let card = Card::new(poll, 2);
            let stall = Fault::new(ram(512, SIZE), Vec::new());
            let handle = stall.handle();
            let delay = DelayOptions {
                when: bluff_layers::delay::When::Before,
                ..DelayOptions::all(Duration::from_millis(5))
            };
            let late = Delay::new(Arc::new(stall), delay);
            card.add(Arc::new(late), 512);
            let volumes = [card.ram(512, SIZE)];
            let port = card.port("port", 4);
            let mut host = port.host();
            host.enable_with_event();
            let mut beside = host.traffic(1, 1, true, &volumes, Shape::default());
            let mut queues = host.controller.create_queues(2, 1, 64, None).unwrap();
            for _ in 0..times(3, 50) {
                let other = HostMemory::flat(OTHER, LEN).unwrap();
                other.share(&host.client).unwrap();
                let mut buffers = Vec::new();
                if silent {
                    handle.set(vec![FaultOptions::all(Action::Stall)]);
                }
                for i in 0..16 {
                    let mut buffer = Buffer::new(&other, 8192).unwrap();
                    let at = buffer.prp().unwrap();
                    buffers.push(buffer);
                    let command = match i % 3 {
                        0 => Command::write(1, 16 * i, 16),
                        1 => Command::compare(1, 16 * i, 16),
                        _ => Command::read(1, 16 * i, 16),
                    };
                    queues.submit(0, &command.data(at)).unwrap();
                }
                queues.ring().unwrap();
                beside.run(50, 16, PATIENCE).unwrap();
                let began = Instant::now();
                host.client.dma_unmap(OTHER, LEN).unwrap();
                assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
                for buffer in &buffers {
                    buffer.fill(0x5a);
                }
                handle.clear();
                handle.resume();
                while queues.in_flight() > 0 {
                    until(|| queues.cq.is_ready());
                    let done = queues.poll().unwrap().unwrap();
                    queues.ring().unwrap();
                    let found = done.completion.status;
                    assert!(
                        found.is_ok() || found == status::TRANSFER_ERROR,
                        "{found}, {poll:?}, {silent}"
                    );
                }
                // What begins now cannot be.
                let read = Command::read(1, 0, 8).data(Pointer {
                    psdt: 0,
                    words: [OTHER, 0],
                });
                let unmapped = queues.run(0, &read, PATIENCE);
                assert_eq!(refused(unmapped), status::TRANSFER_ERROR);
                beside.run(50, 16, PATIENCE).unwrap();
                for buffer in &buffers {
                    assert!(buffer.read().iter().all(|b| *b == 0x5a), "written to");
                }
            }
            beside.verify(PATIENCE).unwrap();
        }
    }
}

/// Bus mastering off and on, and D3hot and back: I/O waits, or is to be done again; nothing moves meanwhile.
#[test]
fn c09_pauses_under_io() {
    for poll in POLLS {
        for silent in [false, true] {
            let card = Card::new(poll, 2);
            let stall = Fault::new(ram(512, SIZE), Vec::new());
            let handle = stall.handle();
            let nsid = card.add(Arc::new(stall), 512);
            let volumes = [Volume::new(nsid, 512, SIZE)];
            let port = card.port("port", 4);
            let mut host = port.host();
            host.enable_with_event();
            let shape = Shape {
                may_fail: silent,
                ..Shape::default()
            };
            let mut traffic = host.traffic(2, 2, true, &volumes, shape);
            for round in 0..times(4, 100) {
                traffic.run(100, 16, PATIENCE).unwrap();
                if silent {
                    handle.set(vec![FaultOptions::all(Action::Stall)]);
                }
                traffic.fill(16).unwrap();
                let began = Instant::now();
                match round % 2 {
                    0 => host.pci.change_command(0, 4).unwrap(),
                    _ => host.pci.set_power(3).unwrap(),
                }
                assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
                let mut before = vec![0; 64 << 20];
                host.memory.memory().read(BASE, &mut before).unwrap();
                handle.clear();
                handle.resume();
                // Doorbells are rung, and mean nothing yet; in D3 they are not even heard.
                if round % 2 == 0 {
                    traffic.fill(16).unwrap();
                }
                let mut after = vec![0; 64 << 20];
                host.memory.memory().read(BASE, &mut after).unwrap();
                if round % 2 == 1 {
                    assert!(before == after, "memory is written to");
                }
                match round % 2 {
                    0 => host.pci.change_command(4, 0).unwrap(),
                    _ => host.pci.set_power(0).unwrap(),
                }
                traffic.settle(PATIENCE).unwrap();
            }
            traffic.set_may_fail(false);
            traffic.run(100, 16, PATIENCE).unwrap();
            traffic.verify(PATIENCE).unwrap();
        }
    }
}

fn map(host: &Host, memory: &HostMemory) {
    memory.share(&host.client).unwrap();
}

/// The admin queues' memory goes: soon the controller cannot go on; or it goes on, when it comes back before that.
#[test]
fn admin_queues_without_memory() {
    for poll in POLLS {
        let card = Card::new(poll, 2);
        let volumes = [card.ram(512, SIZE)];
        let port = card.port("port", 4);
        let mut host = port.host();
        host.enable_with_event();
        for _ in 0..3 {
            host.client.dma_unmap(BASE, 64 << 20).unwrap();
            map(&host, &host.memory);
            host.controller.identify_controller().unwrap();
        }
        let traffic = host.traffic(1, 1, true, &volumes, Shape::default());
        host.client.dma_unmap(BASE, 64 << 20).unwrap();
        host.controller
            .wait_status(reg::CFS, reg::CFS, "CFS")
            .unwrap();
        traffic.abandon();
        // It stays so when it comes back, until a reset.
        map(&host, &host.memory);
        assert_ne!(host.controller.status().unwrap() & reg::CFS, 0);
        host.controller.disable().unwrap();
        host.enable();
        let mut traffic = host.traffic(1, 1, true, &volumes, Shape::default());
        traffic.run(100, 16, PATIENCE).unwrap();
        traffic.verify(PATIENCE).unwrap();
    }
}

/// Behind the host's IOMMU a buffer has the rights that its command needs, and no others.
#[test]
fn buffers_with_one_right() {
    let card = Card::new(ADAPTIVE, 1);
    card.ram(512, SIZE);
    let port = card.port("port", 2);
    let mut host = port.host();
    host.enable();
    let mut queues = host.queues(1, 1, 16, true).remove(0);
    let share = |at: u64, read, write| {
        let memory = HostMemory::flat(at, LEN).unwrap();
        let file = memory.memory().regions()[0]
            .as_fd()
            .try_clone_to_owned()
            .unwrap();
        let map = DmaMap {
            address: at,
            size: LEN,
            offset: 0,
            read,
            write,
            file: Some(file.as_fd()),
        };
        host.client.dma_map(map).unwrap();
        memory
    };
    let (readable, writable) = (share(OTHER, true, false), share(2 * OTHER, false, true));
    let data = vec![0x42; 16384];
    let mut source = Buffer::holding(&readable, &data).unwrap();
    let mut sink = Buffer::new(&writable, 16384).unwrap();
    // With a list, which is read in either case.
    let lists = [source.prp().unwrap(), source.sgl(1000, 8).unwrap()];
    for from in lists {
        queues
            .run(0, &Command::write(1, 0, 32).data(from), PATIENCE)
            .unwrap();
        queues
            .run(0, &Command::compare(1, 0, 32).data(from), PATIENCE)
            .unwrap();
        let wrong = queues.run(0, &Command::read(1, 0, 32).data(from), PATIENCE);
        assert_eq!(refused(wrong), status::TRANSFER_ERROR);
    }
    assert_eq!(source.read(), data);
    // Two pages without a list, as that is not readable there.
    let pointer = Pointer {
        psdt: 0,
        words: [sink.pages()[0], sink.pages()[1]],
    };
    queues
        .run(0, &Command::read(1, 0, 16).data(pointer), PATIENCE)
        .unwrap();
    assert_eq!(sink.read()[..8192], data[..8192]);
    let wrong = queues.run(0, &Command::write(1, 0, 16).data(pointer), PATIENCE);
    assert_eq!(refused(wrong), status::TRANSFER_ERROR);
    let list = sink.prp().unwrap();
    let wrong = queues.run(0, &Command::read(1, 0, 32).data(list), PATIENCE);
    assert_eq!(refused(wrong), status::TRANSFER_ERROR);
    let identify = Command::identify(1, 0);
    host.controller.admin(&identify.data(pointer)).unwrap();
    let forbidden = host.controller.admin(&identify.data(lists[0]));
    assert_eq!(refused(forbidden), status::TRANSFER_ERROR);
}
