//! A host that does what it likes. Neighbours notice nothing, and a reset brings the controller back.

use std::os::fd::AsFd;

use bluff_nvme_host::spec::{admin, log, register as reg, sgl, status};
use bluff_nvme_host::verify::{Shape, Traffic, Volume};
use bluff_nvme_host::{Bar, Buffer, Command, HostMemory, Pointer};
use bluff_reactor::Poll;
use bluff_testing::{Chance, times};
use bluff_vfio_client::{Client, DmaMap};

use crate::rig::*;

const SIZE: u64 = 1 << 20;

/// Takes the controller through a reset, formats all it has, and uses it.
fn bring_back(host: &mut Host, volumes: &[Volume]) {
    // Whatever it is doing.
    let bar = host.controller.bar().clone();
    until(|| {
        bar.write32(reg::CC, 0).unwrap();
        host.controller.status().unwrap() & (reg::RDY | reg::CFS) == 0
    });
    host.controller.forget();
    host.enable();
    let mut fresh = Vec::new();
    for volume in volumes {
        host.controller.format(volume.nsid, 0, 0).unwrap();
        fresh.push(Volume::new(volume.nsid, 512, SIZE));
    }
    let mut traffic = host.traffic(2, 1, false, &fresh, Shape::default());
    traffic.run(200, 16, PATIENCE).unwrap();
    traffic.verify(PATIENCE).unwrap();
}

/// Stands for a head that has not been reached.
const ELSEWHERE: u32 = u32::MAX;

#[test]
fn c09_doorbells() {
    for poll in POLLS {
        let card = Card::new(poll, 2);
        let volumes = [card.ram(512, SIZE)];
        let port = card.port("port", 4);
        let mut host = port.host();
        let bar = host.controller.bar().clone();
        // Before it is ready: nothing.
        for at in (0..0x1000).step_by(4) {
            bar.doorbell(reg::DOORBELLS + at, 3).unwrap();
        }
        host.enable();
        let mut traffic = host.traffic(1, 1, false, &volumes, Shape::default());
        traffic.run(100, 16, PATIENCE).unwrap();
        let queues = traffic.queues(0);
        let (sq, cq) = (queues.sqs[0].doorbell(), queues.cq.doorbell());
        traffic.settle(PATIENCE).unwrap();
        let mut cases = vec![(sq, 17, 1), (sq, 0xffff, 1)];
        // Of those that are mapped, some are looked at only where it matters, or by nobody.
        if poll != Poll::Always {
            let past = reg::DOORBELLS + 8 * 5;
            // All is read, so any other place is one that was not written. Which that is depends on how the load went.
            cases.extend([(cq, 0xfffe, 1), (cq, ELSEWHERE, 1)]);
            cases.extend([(sq + 16, 1, 0), (cq + 16, 1, 0), (past, 0, 0)]);
        }
        for (at, value, kind) in cases {
            host.controller.request_event().unwrap();
            let queue = &traffic.queues(0).cq;
            let value = match value {
                ELSEWHERE => (queue.head() + 5) % queue.entries(),
                value => value,
            };
            bar.doorbell(at, value).unwrap();
            let mut event = None;
            until(|| {
                event = host.controller.poll_event().unwrap();
                event.is_some()
            });
            assert_eq!(event, Some(1 << 16 | kind << 8), "{at:#x}: {value}");
            let entry = host.controller.log_page(log::ERROR, 0, 0, 64).unwrap();
            assert_ne!(entry[..8], [0; 8], "an entry says so");
            // It is as if it had not been written, and the next value counts.
            traffic.run(20, 4, PATIENCE).unwrap();
            traffic.settle(PATIENCE).unwrap();
        }
        // Of other widths, and between two.
        if poll != Poll::Always {
            for (at, len) in [(0, 1), (0, 2), (4, 8), (2, 2), (8, 8)] {
                let bytes = vec![0xff; len];
                let at = reg::DOORBELLS + 8 + at;
                let _ = host.client.region_write(0, at, &bytes);
            }
        }
        traffic.run(100, 16, PATIENCE).unwrap();
        traffic.verify(PATIENCE).unwrap();
    }
}

/// A flood of doorbells that mean nothing, beside a neighbour.
#[test]
fn c09_a_flood_of_doorbells() {
    let card = Card::shared(Poll::Never, 1);
    let volumes = [card.ram(512, SIZE)];
    let ports = [card.port("bad", 4), card.port("good", 4)];
    let mut bad = ports[0].host();
    let mut good = ports[1].host();
    bad.enable();
    good.enable();
    let mut traffic = good.traffic(1, 1, true, &volumes, Shape::default());
    let queues = bad.controller.create_queues(1, 1, 16, None).unwrap();
    let bar = bad.controller.bar().clone();
    for i in 0..times(2000, 200_000) {
        let value = if i % 2 == 0 { 0xfff0 } else { 0xfff1 };
        bar.doorbell(queues.sqs[0].doorbell(), value).unwrap();
        bar.doorbell(queues.cq.doorbell(), value).unwrap();
        bar.doorbell(reg::DOORBELLS + 8 * 3, value).unwrap();
        bar.doorbell(reg::DOORBELLS, i % 2).unwrap();
        if i % 100 == 0 {
            traffic.run(32, 16, PATIENCE).unwrap();
        }
    }
    traffic.verify(PATIENCE).unwrap();
    let own = card.ram(512, SIZE);
    bring_back(&mut bad, &[own]);
}

/// A data pointer: to memory of the host that may be written to, or to none.
fn pointer(chance: &mut Chance, scratch: &mut Buffer) -> Pointer {
    let psdt = chance.below(3) as u32;
    let address = |chance: &mut Chance| match chance.below(6) {
        0 => chance.word() >> 33,
        1 => 0,
        2 => u64::MAX - chance.below(0x2000),
        3 => scratch.pages()[chance.below(4) as usize] + chance.below(4096),
        _ => scratch.pages()[chance.below(4) as usize],
    };
    let words = match psdt {
        0 => [address(chance), address(chance)],
        // The lower half of the second word is a length, the last byte a type.
        _ => {
            let kind = chance.one_of(&[0u64, 0x10, 0x20, 0x30, 0x40, 0xff]);
            [address(chance), chance.below(8192) | kind << 56]
        }
    };
    Pointer { psdt, words }
}

fn any_command(chance: &mut Chance, scratch: &mut Buffer) -> Command {
    const OPCODES: [u8; 12] = [
        admin::DELETE_SQ,
        admin::CREATE_SQ,
        admin::GET_LOG_PAGE,
        admin::DELETE_CQ,
        admin::CREATE_CQ,
        admin::IDENTIFY,
        admin::ABORT,
        admin::SET_FEATURES,
        admin::GET_FEATURES,
        admin::ASYNC_EVENT,
        admin::DOORBELL_BUFFER,
        admin::FORMAT,
    ];
    let opcode = match chance.percent(90) {
        true => chance.one_of(&OPCODES),
        false => chance.word() as u8,
    };
    let nsid = chance.one_of(&[0, 1, 2, 3, 33, u32::MAX]);
    let mut command = Command::new(opcode, nsid).data(pointer(chance, scratch));
    for dword in 10..16 {
        let value = match chance.below(6) {
            0 => chance.word() as u32,
            // Two small numbers: identifiers and sizes.
            1 | 2 => (chance.below(6) | chance.below(6) << 16) as u32,
            3 => chance.below(4) as u32,
            // Contiguous, with interrupts.
            4 => (3 | chance.below(6) << 16) as u32,
            _ => 0,
        };
        command = command.with(dword, value);
    }
    command
}

/// Admin commands of any bytes, while queues run; and a neighbour that goes on.
#[test]
fn admin_commands_of_any_bytes() {
    for seed in 0..times(24, 2000) {
        let poll = POLLS[seed as usize % 3];
        println!("seed {seed}, {poll:?}");
        let card = Card::shared(poll, 2);
        let volumes = [card.ram(512, SIZE), card.ram(512, SIZE)];
        let own = [card.ram(512, SIZE)];
        let ports = [card.port("bad", 4), card.port("good", 4)];
        for volume in &volumes {
            let nsid = volume.nsid;
            card.subsystem.attach(nsid, ports[1].id, false).unwrap();
        }
        card.subsystem.attach(3, ports[0].id, false).unwrap();
        let mut chance = Chance::new(seed);
        let mut bad = ports[0].host();
        let mut good = ports[1].host();
        bad.enable();
        good.enable();
        let mut beside = good.traffic(1, 1, false, &own, Shape::default());
        let shape = Shape {
            may_fail: true,
            seed,
            ..Shape::default()
        };
        let mut traffic = bad.traffic(2, 1, false, &volumes, shape);
        let mut scratch = Buffer::new(&bad.memory, 4 * 4096).unwrap();
        traffic.fill(16).unwrap();
        for _ in 0..times(100, 400) {
            let command = any_command(&mut chance, &mut scratch);
            let queue = bad.controller.admin_queue().unwrap();
            while queue.submit(0, &command).is_err() {
                let before = queue.in_flight();
                until(|| queue.poll().unwrap().is_some());
                queue.ring().unwrap();
                assert!(queue.in_flight() < before);
            }
            queue.ring().unwrap();
            // What its own queues do by now is their affair.
            traffic.fill(16).unwrap();
        }
        // All are answered but for event requests.
        let queue = bad.controller.admin_queue().unwrap();
        until(|| {
            while queue.poll().unwrap().is_some() {}
            queue.ring().unwrap();
            queue.in_flight() <= 8
        });
        beside.run(200, 16, PATIENCE).unwrap();
        drop(scratch);
        // Its judges do not know what was formatted.
        let began = std::time::Instant::now();
        bad.controller.disable().unwrap();
        assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
        traffic.abandon();
        bring_back(&mut bad, &volumes);
        beside.verify(PATIENCE).unwrap();
    }
}

/// Registers of any value, in any order, while queues run.
#[test]
fn registers_of_any_value() {
    for seed in 0..times(12, 1000) {
        let poll = POLLS[seed as usize % 3];
        println!("seed {seed}, {poll:?}");
        let card = Card::new(poll, 2);
        let volumes = [card.ram(512, SIZE)];
        let port = card.port("port", 4);
        let mut chance = Chance::new(seed);
        let mut host = port.host();
        host.enable();
        let shape = Shape {
            may_fail: true,
            ..Shape::default()
        };
        let mut traffic = host.traffic(1, 1, false, &volumes, shape);
        traffic.fill(16).unwrap();
        let bar = host.controller.bar().clone();
        let mut cc = 0x0046_0001;
        for _ in 0..times(60, 500) {
            match chance.below(8) {
                0 => cc ^= 1,
                1 => cc ^= chance.one_of(&[0x4000, 0x8000]),
                2 => cc ^= 1 << chance.below(24),
                3 => bar.write32(reg::NSSR, reg::NSSR_RESET).unwrap(),
                4 => bar.write32(reg::AQA, chance.word() as u32).unwrap(),
                5 => {
                    // Nowhere, or where nobody minds.
                    let at = chance.one_of(&[0, BASE - 0x1000, !0xfff]);
                    let which = chance.one_of(&[reg::ASQ, reg::ACQ]);
                    bar.write64(which, at).unwrap();
                }
                6 => bar
                    .doorbell(
                        reg::DOORBELLS + 4 * chance.below(12),
                        chance.below(20) as u32,
                    )
                    .unwrap(),
                _ => drop(bar.read32(reg::CSTS).unwrap()),
            }
            bar.write32(reg::CC, cc).unwrap();
        }
        bring_back(&mut host, &volumes);
        traffic.abandon();
    }
}

/// A completion queue that is full, and whose host never reads: nobody else waits.
#[test]
fn c15_a_completion_queue_that_nobody_reads() {
    for poll in POLLS {
        let card = Card::new(poll, 1);
        let volumes = [card.ram(512, SIZE)];
        let port = card.port("port", 4);
        let mut host = port.host();
        host.enable();
        let mut traffic = host.traffic(1, 1, false, &volumes, Shape::default());
        let cq = host.controller.create_cq(3, 4, None).unwrap();
        let sq = host.controller.create_sq(3, 64, 3).unwrap();
        let bar = host.controller.bar().clone();
        let mut full = bluff_nvme_host::Queues::new(&bar, cq, vec![sq]);
        for _ in 0..50 {
            full.submit(0, &Command::flush(1)).unwrap();
        }
        full.ring().unwrap();
        traffic.run(times(1000, 100_000), 16, PATIENCE).unwrap();
        // Then it reads, and everything is there.
        let mut found = 0;
        until(|| {
            while full.poll().unwrap().is_some() {
                found += 1;
            }
            full.ring().unwrap();
            found == 50
        });
        // And is disabled with it full.
        for _ in 0..50 {
            full.submit(0, &Command::flush(1)).unwrap();
        }
        full.ring().unwrap();
        traffic.verify(PATIENCE).unwrap();
        host.controller.disable().unwrap();
    }
}

/// Where the host has put BAR 0.
const BAR: u64 = BASE + (1 << 32);
const PAGE: u64 = 4096;

/// Maps a function's own BAR back to it, as QEMU does: what can be mapped with its file, the rest without one.
fn map_back(client: &Client) -> bool {
    let info = client.region_info(0).unwrap();
    let both = |address, size, offset, file| DmaMap {
        address,
        size,
        offset,
        read: true,
        write: true,
        file,
    };
    let Some(file) = &info.file else {
        client.dma_map(both(BAR, info.size, 0, None)).unwrap();
        return false;
    };
    let area = info.areas[0];
    assert_eq!((area.offset, area.size), (reg::DOORBELLS, PAGE));
    client.dma_map(both(BAR, PAGE, 0, None)).unwrap();
    let at = info.offset + area.offset;
    client
        .dma_map(both(BAR + PAGE, PAGE, at, Some(file.as_fd())))
        .unwrap();
    true
}

/// Data, lists, queues and shadow doorbells in the function's own BAR.
#[test]
fn c01_pointers_into_the_own_bar() {
    for poll in POLLS {
        let card = Card::shared(poll, 1);
        let volumes = [card.ram(512, SIZE)];
        let own = [card.ram(512, SIZE)];
        let ports = [card.port("bad", 4), card.port("good", 4)];
        let mut bad = ports[0].host();
        let mut good = ports[1].host();
        good.enable();
        let mut beside = good.traffic(1, 1, false, &volumes, Shape::default());
        let is_mapped = map_back(&bad.client);
        assert_eq!(is_mapped, poll == Poll::Always);
        bad.enable();
        let mut queues = bad.queues(2, 1, 64, false);
        let mut good_data = Buffer::new(&bad.memory, 4 * PAGE).unwrap();
        let first = good_data.pages()[0];
        // A list of which an entry is in the BAR.
        let list = Buffer::new(&bad.memory, PAGE).unwrap();
        let places = |at: u64| {
            list.write(&at.to_le_bytes());
            let prp = |one, two| Pointer {
                psdt: 0,
                words: [one, two],
            };
            let of = |kind: u8| Pointer {
                psdt: 1,
                words: [at, 4096 | u64::from(kind) << 56],
            };
            [
                (prp(at, 0), 8),
                (prp(first, at), 16),
                (prp(first, at), 24),
                (prp(first, list.pages()[0]), 24),
                (of(sgl::DATA), 8),
                (of(sgl::SEGMENT), 8),
                (of(sgl::LAST_SEGMENT), 8),
            ]
        };
        // Registers are no memory: nothing is read or written there.
        let before = bad.controller.bar().read32(reg::CC).unwrap();
        let unmapped = match is_mapped {
            true => vec![BAR],
            false => vec![BAR, BAR + PAGE],
        };
        for at in unmapped {
            for (pointer, blocks) in places(at) {
                for command in [
                    Command::read(own[0].nsid, 0, blocks),
                    Command::write(own[0].nsid, 0, blocks),
                    Command::compare(own[0].nsid, 0, blocks),
                ] {
                    let done = queues[0].run(0, &command.data(pointer), PATIENCE);
                    assert_eq!(refused(done), status::TRANSFER_ERROR, "{pointer:?}");
                }
            }
            let identify = Command::identify(1, 0).data(Pointer {
                psdt: 0,
                words: [at, 0],
            });
            let done = bad.controller.admin(&identify);
            assert_eq!(refused(done), status::TRANSFER_ERROR);
            for command in [
                Command::create_sq(4, 16, at, 1),
                Command::create_cq(4, 16, at, None),
            ] {
                let done = bad.controller.admin(&command);
                assert_eq!(refused(done), status::INVALID_FIELD);
            }
        }
        assert_eq!(bad.controller.bar().read32(reg::CC).unwrap(), before);
        beside.run(100, 16, PATIENCE).unwrap();
        if is_mapped {
            // Doorbells are memory like any other. What commands write there are values, of any kind, for queues whose entries are there, too; what
            // becomes of it is their host's affair.
            let mut chance = Chance::new(7);
            let bytes: Vec<u8> = (0..4 * PAGE).map(|_| chance.word() as u8).collect();
            good_data.write(&bytes);
            let fill = Command::write(own[0].nsid, 0, 32).data(good_data.prp().unwrap());
            queues[0].run(0, &fill, PATIENCE).unwrap();
            let admin = bad.controller.admin_queue().unwrap();
            for command in [
                Command::create_cq(3, 16, BAR + PAGE, None),
                Command::create_sq(3, 16, BAR + PAGE, 3),
                Command::create_sq(4, 16, BAR + PAGE, 2),
            ] {
                admin.run(0, &command, PATIENCE).unwrap();
            }
            for round in 0..times(50, 2000) {
                for (pointer, blocks) in places(BAR + PAGE) {
                    let slba = chance.below(8);
                    let command = match round % 3 {
                        0 => Command::write(own[0].nsid, slba, blocks),
                        _ => Command::read(own[0].nsid, slba, blocks),
                    };
                    // What is answered is not looked at, so it is not waited for either.
                    for queue in &mut queues {
                        queue.sqs[0].push(&command.data(pointer));
                        let tail = chance.below(64) as u32;
                        queue.bar().doorbell(queue.sqs[0].doorbell(), tail).unwrap();
                    }
                }
                beside.run(16, 16, PATIENCE).unwrap();
            }
        }
        beside.verify(PATIENCE).unwrap();
        drop(queues);
        bring_back(&mut bad, &own);
        beside.run(100, 16, PATIENCE).unwrap();
        beside.verify(PATIENCE).unwrap();
    }
}

/// Shadow doorbells that cannot be, that are given again in the middle of work, and whose memory goes.
#[test]
fn c10_shadow_doorbells_over_the_socket() {
    for poll in [ADAPTIVE, Poll::Never] {
        let card = Card::new(poll, 2);
        let volumes = [card.ram(512, SIZE)];
        let port = card.port("port", 4);
        let mut host = port.host();
        host.enable_with_event();
        map_back(&host.client);
        // Memory that the controller may read and not write.
        let readable = HostMemory::flat(2 * BAR, 16 * PAGE).unwrap();
        let file = readable.memory().regions()[0].as_fd();
        let map = DmaMap {
            address: 2 * BAR,
            size: 16 * PAGE,
            offset: 0,
            read: true,
            write: false,
            file: Some(file),
        };
        host.client.dma_map(map).unwrap();
        let two = Buffer::new(&host.memory, 2 * PAGE).unwrap();
        let (one, other) = (two.pages()[0], two.pages()[1]);
        let mut traffic = host.traffic(2, 2, true, &volumes, Shape::default());
        for (doorbells, events) in [
            (one + 4, other),
            (one, other + 0x800),
            (0, other),
            (one, 0),
            (BAR, other),
            (one, BAR + PAGE),
            (u64::MAX - 4095, other),
            (one, !0xfff),
            (BASE + (64 << 20), other),
            (2 * BAR, 2 * BAR + PAGE),
            (one, 2 * BAR),
        ] {
            traffic.run(50, 16, PATIENCE).unwrap();
            let command = Command::doorbell_buffers(doorbells, events);
            let done = host.controller.admin(&command);
            let found = refused(done);
            assert_eq!(found, status::INVALID_FIELD, "{doorbells:#x} {events:#x}");
            // It is as if it had not been asked for.
            traffic.run(50, 16, PATIENCE).unwrap();
        }
        traffic.settle(PATIENCE).unwrap();
        let mut queues = traffic.into_queues();
        // Again and again, with commands on their way. The pages of before are the host's again.
        let mut before = None;
        for _ in 0..times(20, 1000) {
            for queues in &mut queues {
                for i in 0..8 {
                    queues.submit(i % 2, &Command::flush(1)).unwrap();
                }
                queues.ring().unwrap();
            }
            let mut all: Vec<_> = queues.iter_mut().collect();
            host.controller.shadow_doorbells(&mut all).unwrap();
            let now = host.controller.shadow_pages().unwrap();
            let old: Option<(u64, u64)> = before.replace(now);
            let is_reused = |page| page == now.0 || page == now.1;
            let old = old.map_or(Vec::new(), |(a, b)| vec![a, b]);
            let old: Vec<_> = old.into_iter().filter(|page| !is_reused(*page)).collect();
            let mark = [0x5a; PAGE as usize];
            for page in &old {
                host.memory.memory().write(*page, &mark).unwrap();
            }
            for queues in &mut queues {
                until(|| {
                    while queues.poll().unwrap().is_some() {}
                    queues.ring().unwrap();
                    queues.in_flight() == 0
                });
            }
            for page in old {
                let mut bytes = [0; PAGE as usize];
                host.memory.memory().read(page, &mut bytes).unwrap();
                assert!(bytes == mark, "written to after it was given up");
            }
        }
        let mut traffic = Traffic::new(queues, &volumes, &host.memory, Shape::default()).unwrap();
        traffic.run(200, 16, PATIENCE).unwrap();
        traffic.verify(PATIENCE).unwrap();
        // Both in one page: an event index is a value, then, and sense cannot be had of that. Then their memory goes.
        let away = HostMemory::flat(3 * BAR, 16 * PAGE).unwrap();
        away.share(&host.client).unwrap();
        for (doorbells, events) in [(one, one), (3 * BAR, 3 * BAR + PAGE)] {
            let command = Command::doorbell_buffers(doorbells, events);
            host.controller.admin(&command).unwrap();
        }
        host.client.dma_unmap(3 * BAR, 16 * PAGE).unwrap();
        host.controller
            .wait_status(reg::CFS, reg::CFS, "CFS")
            .unwrap();
        traffic.abandon();
        bring_back(&mut host, &volumes);
    }
}
