//! What commands do, and what they are answered.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bluff_block::{Kind, ZeroLimits};
use zerocopy::IntoBytes;

use crate::fuzzing::host::{
    DATA, Host, LISTS, OK, Plan, Queues, blocks, code, read, slow, with_sgl, write,
};
use crate::fuzzing::slow::Desk;
use crate::namespace::Namespace;
use crate::spec::nvm::{Range, SourceRange, cdw12};
use crate::spec::{ALL_NAMESPACES, Command, Status, io};

const SIZE: u64 = 4 << 20;
const FUA: Kind = Kind::Write { fua: true };
const WRITE: Kind = Kind::Write { fua: false };

fn rig() -> (Host, Queues, Arc<Desk>) {
    rig_of(|_| {})
}

fn rig_of(change: impl FnOnce(&mut bluff_block::Geometry)) -> (Host, Queues, Arc<Desk>) {
    let (volume, desk) = slow(SIZE, change);
    let mut host = Host::new(vec![Namespace::new(1, volume, 9)]);
    let queues = host.create(1, &Plan::default());
    (host, queues, desk)
}

fn fill(host: &Host, at: u64, len: usize, seed: u8) -> Vec<u8> {
    let bytes: Vec<u8> = (0..len).map(|i| (i % 251) as u8 ^ seed).collect();
    host.memory.write(at, &bytes).unwrap();
    bytes
}

fn bytes(host: &Host, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    host.memory.read(at, &mut bytes).unwrap();
    bytes
}

#[test]
fn what_is_written_is_read() {
    let (mut host, mut queues, _) = rig();
    // Over both regions, up to MDTS.
    for (lba, count) in [(0, 1), (7, 8), (1, 777), (SIZE / 512 - 2048, 2048)] {
        let sent = fill(&host, DATA, count as usize * 512, lba as u8);
        assert_eq!(host.run(&mut queues, write(lba, count, DATA)), OK);
        fill(&host, DATA, count as usize * 512, 0xff);
        assert_eq!(host.run(&mut queues, read(lba, count, DATA)), OK);
        assert!(bytes(&host, DATA, sent.len()) == sent);
    }
    let c = &queues.sqs[0].counters;
    assert_eq!(c.reads.load(Ordering::Relaxed), 4);
    assert_eq!(
        c.bytes_written.load(Ordering::Relaxed),
        (1 + 8 + 777 + 2048) * 512
    );
    assert_eq!(c.errors.load(Ordering::Relaxed), 0);
    assert_eq!(c.in_flight.load(Ordering::Relaxed), 0);
}

#[test]
fn prps_and_lists_too() {
    let (mut host, mut queues, _) = rig();
    // Twelve pages, last page first, by a list that begins late in its page and goes on in another.
    let pages: Vec<u64> = (0..12).map(|i| DATA + (11 - i) * 0x1000).collect();
    let first = LISTS + 0xfe8;
    for (i, page) in pages[1..3].iter().enumerate() {
        host.memory
            .write(first + i as u64 * 8, &page.to_le_bytes())
            .unwrap();
    }
    let second = LISTS + 0x2000;
    host.memory
        .write(LISTS + 0xff8, &second.to_le_bytes())
        .unwrap();
    for (i, page) in pages[3..].iter().enumerate() {
        host.memory
            .write(second + i as u64 * 8, &page.to_le_bytes())
            .unwrap();
    }
    let mut command = blocks(io::WRITE, 1, 0, 95, pages[0] + 512);
    command.dptr[1] = first.into();
    let mut sent = Vec::new();
    for (i, page) in pages.iter().enumerate() {
        let page = fill(&host, *page, 4096, i as u8);
        sent.extend_from_slice(if i == 0 { &page[512..] } else { &page });
    }
    assert_eq!(host.run(&mut queues, command), OK);
    assert_eq!(host.run(&mut queues, read(0, 95, DATA)), OK);
    assert!(bytes(&host, DATA, sent.len()) == sent);
}

#[test]
fn c11_counts_that_are_zeros_based() {
    let (mut host, mut queues, _) = rig();
    let over = code(Status::INVALID_FIELD);
    assert_eq!(host.run(&mut queues, read(0, 0x1_0000, DATA)), over);
    // One more than 1 MiB.
    assert_eq!(host.run(&mut queues, read(0, 2049, DATA)), over);
    assert_eq!(
        host.run(&mut queues, blocks(io::COMPARE, 1, 0, 0x1_0000, DATA)),
        over
    );
    // What moves nothing has no such limit, but the namespace's.
    let range = code(Status::LBA_RANGE);
    for opcode in [io::VERIFY, io::WRITE_ZEROES] {
        assert_eq!(
            host.run(&mut queues, blocks(opcode, 1, 0, 0x1_0000, 0)),
            range
        );
    }
    let (volume, _) = slow(64 << 20, |_| {});
    host.namespaces = vec![Namespace::new(1, volume, 9)];
    let mut queues = host.create(5, &Plan::default());
    for opcode in [io::VERIFY, io::WRITE_ZEROES] {
        assert_eq!(host.run(&mut queues, blocks(opcode, 1, 0, 0x1_0000, 0)), OK);
        assert_eq!(
            host.run(&mut queues, blocks(opcode, 1, 0x1_0001, 0x1_0000, 0)),
            range
        );
    }
}

#[test]
fn blocks_that_are_not_there() {
    let (mut host, mut queues, desk) = rig();
    let last = SIZE / 512;
    let range = code(Status::LBA_RANGE);
    for lba in [
        last,
        last - 1,
        u64::MAX,
        u64::MAX - 1,
        u64::MAX / 512,
        1 << 55,
    ] {
        for opcode in [
            io::READ,
            io::WRITE,
            io::COMPARE,
            io::VERIFY,
            io::WRITE_ZEROES,
        ] {
            assert_eq!(
                host.run(&mut queues, blocks(opcode, 1, lba, 2, DATA)),
                range,
                "{lba:#x}"
            );
        }
    }
    assert_eq!(desk.take(), []);
    // It is resized.
    let namespace = host.namespaces[0].clone();
    namespace.volume().resize(2 * SIZE).unwrap();
    assert_eq!(host.run(&mut queues, read(last, 2, DATA)), range);
    namespace.resized();
    assert_eq!(host.run(&mut queues, read(last, 2, DATA)), OK);
}

#[test]
fn c14_reserved_psdt_fuse_and_opcode() {
    let (mut host, mut queues, desk) = rig();
    for flags in [1, 2, 3, 0xc0, 0x41] {
        let command = Command {
            flags,
            ..blocks(io::READ, 1, 0, 1, DATA)
        };
        assert_eq!(
            host.run(&mut queues, command),
            code(Status::INVALID_FIELD),
            "{flags:#x}"
        );
    }
    for opcode in (0..=0xff).filter(|o| ![0, 1, 2, 5, 8, 9, 0xc, 0x19].contains(o)) {
        let command = blocks(opcode, 1, 0, 1, DATA);
        assert_eq!(
            host.run(&mut queues, command),
            code(Status::INVALID_OPCODE),
            "{opcode:#x}"
        );
    }
    // Protection information, tags, directives.
    for bit in (16..30).filter(|b| *b != 25) {
        let mut command = blocks(io::WRITE, 1, 0, 1, DATA);
        command.cdw12 = (1 << bit).into();
        assert_eq!(
            host.run(&mut queues, command),
            code(Status::INVALID_FIELD),
            "{bit}"
        );
    }
    assert_eq!(desk.take(), []);
    assert_eq!(host.run(&mut queues, read(0, 1, DATA)), OK);
}

#[test]
fn namespaces_that_are_not_there() {
    let (mut host, mut queues, _) = rig();
    for (nsid, status) in [
        (0, Status::INVALID_NAMESPACE),
        (2, Status::INVALID_FIELD),
        (16, Status::INVALID_FIELD),
        (17, Status::INVALID_NAMESPACE),
        (0xffff_fffe, Status::INVALID_NAMESPACE),
        (ALL_NAMESPACES, Status::INVALID_NAMESPACE),
    ] {
        assert_eq!(
            host.run(&mut queues, blocks(io::READ, nsid, 0, 1, DATA)),
            code(status),
            "{nsid:#x}"
        );
        // Also when the last command had another one.
        assert_eq!(host.run(&mut queues, read(0, 1, DATA)), OK);
    }
    let log = host.shared.errors.take();
    assert_eq!(log.len(), 6);
    assert_eq!((log[1].nsid, log[1].sqid, log[1].lba), (2, 1, 0));
}

#[test]
fn a_volume_that_is_read_only() {
    let (mut host, mut queues, _) = rig_of(|g| g.read_only = true);
    for opcode in [io::WRITE, io::WRITE_ZEROES, io::COPY] {
        let command = blocks(opcode, 1, 0, 1, DATA);
        assert_eq!(
            host.run(&mut queues, command),
            code(Status::WRITE_PROTECTED)
        );
    }
    assert_eq!(
        host.run(&mut queues, dsm(&[(0, 1)], &host_free())),
        code(Status::WRITE_PROTECTED)
    );
    for opcode in [io::READ, io::VERIFY, io::FLUSH] {
        assert_eq!(host.run(&mut queues, blocks(opcode, 1, 0, 1, DATA)), OK);
    }
}

#[test]
fn fua_and_a_write_cache_that_is_off() {
    let (mut host, mut queues, desk) = rig();
    let mut fua = write(0, 1, DATA);
    fua.cdw12 = cdw12::FUA.into();
    assert_eq!(host.run(&mut queues, fua), OK);
    assert_eq!(host.run(&mut queues, write(0, 1, DATA)), OK);
    host.shared.write_through.store(true, Ordering::Relaxed);
    assert_eq!(host.run(&mut queues, write(0, 1, DATA)), OK);
    assert_eq!(
        host.run(&mut queues, blocks(io::WRITE_ZEROES, 1, 0, 1, 0)),
        OK
    );
    let kinds: Vec<_> = desk.take().iter().map(|a| a.0).collect();
    let zeroes = Kind::WriteZeroes {
        unmap: false,
        fua: true,
    };
    assert_eq!(kinds, [FUA, WRITE, FUA, zeroes]);
    // Where nothing is volatile nothing is asked for.
    let (mut host, mut queues, desk) = rig_of(|g| g.volatile_cache = false);
    assert_eq!(host.run(&mut queues, fua), OK);
    assert_eq!(host.run(&mut queues, blocks(io::FLUSH, 1, 0, 1, 0)), OK);
    assert_eq!(desk.take(), [(WRITE, 0, 512, 1)]);
}

#[test]
fn flushes_of_one_and_of_all() {
    let volumes: Vec<_> = (0..3)
        .map(|i| slow(SIZE, |g| g.volatile_cache = i != 1))
        .collect();
    let namespaces = volumes.iter().enumerate();
    let namespaces = namespaces.map(|(i, (v, _))| Namespace::new(i as u32 + 1, v.clone(), 9));
    let mut host = Host::new(namespaces.collect());
    let mut queues = host.create(1, &Plan::default());
    let asked = |i: usize| volumes[i].1.take().len();
    assert_eq!(host.run(&mut queues, blocks(io::FLUSH, 3, 0, 1, 0)), OK);
    assert_eq!([asked(0), asked(1), asked(2)], [0, 0, 1]);
    assert_eq!(
        host.run(&mut queues, blocks(io::FLUSH, ALL_NAMESPACES, 0, 1, 0)),
        OK
    );
    assert_eq!([asked(0), asked(1), asked(2)], [1, 0, 1]);
    // It ends when the last of them has.
    volumes[2].1.hold(true);
    host.put(&mut queues, 0, blocks(io::FLUSH, ALL_NAMESPACES, 0, 1, 0));
    host.tell_tail(&queues, 0);
    host.turns(20);
    assert_eq!(host.reap(&mut queues), []);
    volumes[2].1.hold(false);
    queues.worker.ring();
    host.until(|host| host.reap(&mut queues).pop());
    host.namespaces[0].block(true);
    let busy = code(Status::FORMAT_IN_PROGRESS);
    assert_eq!(
        host.run(&mut queues, blocks(io::FLUSH, ALL_NAMESPACES, 0, 1, 0)),
        busy
    );
    assert_eq!(host.run(&mut queues, read(0, 1, DATA)), busy);
    assert_eq!(host.run(&mut queues, blocks(io::READ, 2, 0, 1, DATA)), OK);
}

#[test]
fn compare_says_whether_it_is_the_same() {
    let (mut host, mut queues, _) = rig();
    // Over three bounce buffers, in pieces of any length.
    let count = 600;
    fill(&host, DATA, count as usize * 512, 1);
    assert_eq!(host.run(&mut queues, write(3, count, DATA)), OK);
    let compare = with_sgl(blocks(io::COMPARE, 1, 3, count, 0), DATA, count * 512);
    assert_eq!(host.run(&mut queues, compare), OK);
    for at in [
        0,
        511,
        128 * 1024 - 1,
        128 * 1024,
        300_000,
        u64::from(count) * 512 - 1,
    ] {
        let mut byte = [0];
        host.memory.read(DATA + at, &mut byte).unwrap();
        host.memory.write(DATA + at, &[!byte[0]]).unwrap();
        assert_eq!(
            host.run(&mut queues, compare),
            code(Status::COMPARE_FAILURE),
            "{at}"
        );
        host.memory.write(DATA + at, &byte).unwrap();
    }
    assert_eq!(host.run(&mut queues, compare), OK);
}

#[test]
fn verify_reads_and_tells_what_cannot_be() {
    let (mut host, mut queues, desk) = rig();
    let verify = blocks(io::VERIFY, 1, 0, 8192, 0);
    assert_eq!(host.run(&mut queues, verify), OK);
    let read: u64 = desk.take().iter().map(|a| a.2).sum();
    assert_eq!(read, SIZE);
    desk.fail.store(5, Ordering::Relaxed);
    assert_eq!(host.run(&mut queues, verify), code(Status::READ_ERROR));
    let c = &queues.sqs[0].counters;
    assert_eq!(c.media_errors.load(Ordering::Relaxed), 1);
}

#[test]
fn zeroes_with_and_without_a_volume_that_can() {
    for can in [true, false] {
        let limits = ZeroLimits {
            max: 64 << 10,
            unmap: true,
        };
        let (mut host, mut queues, desk) = rig_of(|g| g.write_zeroes = can.then_some(limits));
        for lba in (0..SIZE / 512).step_by(1024) {
            fill(&host, DATA, 1024 * 512, 0x33);
            assert_eq!(host.run(&mut queues, write(lba, 1024, DATA)), OK);
        }
        desk.take();
        let mut zeroes = blocks(io::WRITE_ZEROES, 1, 5, 5001, 0);
        zeroes.cdw12 = (cdw12::DEAC | 5000).into();
        assert_eq!(host.run(&mut queues, zeroes), OK);
        let asked = desk.take();
        assert_eq!(asked.iter().map(|a| a.2).sum::<u64>(), 5001 * 512);
        let unmaps = |a: &(Kind, u64, u64, usize)| {
            a.0 == Kind::WriteZeroes {
                unmap: true,
                fua: false,
            }
        };
        assert_eq!(asked.iter().all(unmaps), can);
        assert_eq!(host.run(&mut queues, read(4, 1, DATA)), OK);
        assert!(bytes(&host, DATA, 512).iter().any(|b| *b != 0));
        for lba in (5..5006).step_by(500) {
            let count = 500.min(5006 - lba);
            assert_eq!(host.run(&mut queues, read(lba, count as u32, DATA)), OK);
            assert!(
                bytes(&host, DATA, count as usize * 512)
                    .iter()
                    .all(|b| *b == 0),
                "{lba}"
            );
        }
        assert_eq!(host.run(&mut queues, read(5006, 1, DATA)), OK);
        assert!(bytes(&host, DATA, 512).iter().any(|b| *b != 0));
    }
}

/// Where ranges are put.
fn host_free() -> u64 {
    LISTS + 0x4000
}

/// Dataset Management of these ranges, as the host has them at `at`.
fn dsm(ranges: &[(u64, u32)], at: &u64) -> Command {
    let mut command = blocks(io::DATASET_MANAGEMENT, 1, 0, 1, *at);
    command.cdw10 = (ranges.len() as u32 - 1).into();
    command.cdw11 = 4.into();
    command.cdw12 = 0.into();
    command
}

fn put_ranges(host: &Host, ranges: &[(u64, u32)]) -> Command {
    let at = host_free();
    for (i, &(slba, blocks)) in ranges.iter().enumerate() {
        let range = Range {
            attributes: 0.into(),
            blocks: blocks.into(),
            slba: slba.into(),
        };
        host.memory
            .write(at + 16 * i as u64, range.as_bytes())
            .unwrap();
    }
    dsm(ranges, &at)
}

#[test]
fn c16_many_ranges_and_one_that_fails_in_the_middle() {
    let (mut host, mut queues, desk) = rig_of(|g| {
        let limits = g.discard.as_mut().expect("ram has it");
        limits.max = 8192;
    });
    let ranges: Vec<_> = (0..256).map(|i| (i * 30, (i % 20) as u32)).collect();
    let command = put_ranges(&host, &ranges);
    assert_eq!(host.run(&mut queues, command), OK);
    let asked = desk.take();
    assert!(
        asked
            .iter()
            .all(|a| a.0 == Kind::Discard && a.2 <= 8192 && a.2 > 0)
    );
    let wanted: u64 = ranges.iter().map(|r| u64::from(r.1) * 512).sum();
    assert_eq!(asked.iter().map(|a| a.2).sum::<u64>(), wanted);
    // One is wrong: none is done.
    let mut wrong = ranges.clone();
    wrong[255] = (SIZE / 512 - 1, 2);
    let command = put_ranges(&host, &wrong);
    assert_eq!(host.run(&mut queues, command), code(Status::LBA_RANGE));
    assert_eq!(desk.take(), []);
    wrong[255] = (u64::MAX, u32::MAX);
    let command = put_ranges(&host, &wrong);
    assert_eq!(host.run(&mut queues, command), code(Status::LBA_RANGE));
    // Storage fails in the middle: what has not begun does not begin, and the answer comes once.
    let command = put_ranges(&host, &ranges);
    desk.fail.store(40, Ordering::Relaxed);
    assert_eq!(host.run(&mut queues, command), code(Status::WRITE_FAULT));
    assert!(desk.take().len() <= 64);
    desk.fail.store(0, Ordering::Relaxed);
    // The ranges are not in memory.
    let mut command = dsm(&ranges, &host_free());
    command.dptr[0] = (u64::MAX - 0xfff).into();
    assert_eq!(
        host.run(&mut queues, command),
        code(Status::DATA_TRANSFER_ERROR)
    );
    // Hints alone: nothing is read.
    command.cdw11 = 3.into();
    assert_eq!(host.run(&mut queues, command), OK);
    assert_eq!(desk.take(), []);
}

fn copy(host: &Host, to: u64, ranges: &[(u64, u32)]) -> Command {
    let at = host_free();
    for (i, &(slba, blocks)) in ranges.iter().enumerate() {
        let range = SourceRange {
            slba: slba.into(),
            blocks_z: ((blocks - 1) as u16).into(),
            ..SourceRange::default()
        };
        host.memory
            .write(at + 32 * i as u64, range.as_bytes())
            .unwrap();
    }
    blocks(io::COPY, 1, to, ranges.len() as u32, at)
}

#[test]
fn copy_moves_blocks() {
    let (mut host, mut queues, desk) = rig();
    let mut all = Vec::new();
    for lba in (0..2048).step_by(512) {
        all.extend(fill(&host, DATA, 512 * 512, lba as u8 ^ 7));
        assert_eq!(host.run(&mut queues, write(lba, 512, DATA)), OK);
    }
    let ranges = [(3, 5), (0, 1), (100, 600), (1024, 1024)];
    let mut command = copy(&host, 3000, &ranges);
    command.cdw12 = (cdw12::FUA | 3).into();
    desk.take();
    assert_eq!(host.run(&mut queues, command), OK);
    let written = desk.take().into_iter().filter(|a| a.0 == FUA).map(|a| a.2);
    assert_eq!(written.sum::<u64>(), 1630 * 512);
    let mut wanted = Vec::new();
    for (lba, count) in ranges {
        wanted.extend_from_slice(&all[lba as usize * 512..][..count as usize * 512]);
    }
    assert_eq!(host.run(&mut queues, read(3000, 1630, DATA)), OK);
    assert!(bytes(&host, DATA, wanted.len()) == wanted);
    desk.take();
    let mut refused = |command, status: Status| {
        assert_eq!(host.run(&mut queues, command), code(status));
        assert_eq!(desk.take(), []);
    };
    let mut format = command;
    format.cdw12 = (1 << 8).into();
    refused(format, Status::INVALID_FIELD);
    let mut many = command;
    many.cdw12 = 128.into();
    refused(many, Status::SIZE_LIMIT);
    for (to, ranges, status) in [
        (0, vec![(5000, 4097)], Status::SIZE_LIMIT),
        (0, vec![(8190, 3)], Status::LBA_RANGE),
        (8190, vec![(0, 3)], Status::LBA_RANGE),
        (8192, vec![(0, 1)], Status::LBA_RANGE),
        (100, vec![(0, 101)], Status::OVERLAPPING_RANGE),
        (0, vec![(u64::MAX, 2)], Status::LBA_RANGE),
        (0, vec![(5000, 3000); 11], Status::SIZE_LIMIT),
    ] {
        let command = copy(&host, to, &ranges);
        assert_eq!(
            host.run(&mut queues, command),
            code(status),
            "{to} {ranges:?}"
        );
        assert_eq!(desk.take(), []);
    }
}

#[test]
fn a_volume_that_wants_small_operations() {
    let (mut host, mut queues, desk) = rig_of(|g| g.max_transfer = 16 << 10);
    let sent = fill(&host, DATA, 300 * 512, 9);
    assert_eq!(host.run(&mut queues, write(1, 300, DATA)), OK);
    let asked = desk.take();
    assert!(asked.len() == 10 && asked.iter().all(|a| a.2 <= 16 << 10));
    fill(&host, DATA, 300 * 512, 10);
    assert_eq!(host.run(&mut queues, read(1, 300, DATA)), OK);
    assert!(bytes(&host, DATA, sent.len()) == sent);
    let compare = with_sgl(blocks(io::COMPARE, 1, 1, 300, 0), DATA, 300 * 512);
    assert_eq!(host.run(&mut queues, compare), OK);
    // One part of many fails.
    desk.fail.store(4, Ordering::Relaxed);
    assert_eq!(
        host.run(&mut queues, read(1, 300, DATA)),
        code(Status::READ_ERROR)
    );
}

#[test]
fn blocks_of_another_size_than_the_volumes() {
    let (volume, desk) = slow(SIZE, |_| {});
    let mut host = Host::new(vec![Namespace::new(1, volume, 12)]);
    let mut queues = host.create(1, &Plan::default());
    let command = with_sgl(blocks(io::WRITE, 1, 3, 2, 0), DATA, 8192);
    assert_eq!(host.run(&mut queues, command), OK);
    assert_eq!(desk.take(), [(WRITE, 3 * 4096, 8192, 1)]);
    let last = blocks(io::READ, 1, SIZE / 4096, 1, DATA);
    assert_eq!(host.run(&mut queues, last), code(Status::LBA_RANGE));
}

#[test]
fn a_volume_that_somebody_else_holds() {
    let (mut host, mut queues, desk) = rig();
    desk.locked.store(true, Ordering::Relaxed);
    host.put(&mut queues, 0, read(0, 1, DATA));
    host.tell_tail(&queues, 0);
    host.turns(50);
    assert_eq!((host.reap(&mut queues), desk.take()), (vec![], vec![]));
    desk.locked.store(false, Ordering::Relaxed);
    // It is tried again by and by.
    let patience = std::time::Instant::now() + crate::fuzzing::host::LONG;
    while host.reap(&mut queues).is_empty() {
        assert!(std::time::Instant::now() < patience);
        host.reactor
            .step(Some(std::time::Duration::from_millis(50)));
    }
    assert_eq!(desk.locks.load(Ordering::Relaxed), 1);
    host.stop(&queues, true, std::time::Duration::ZERO);
    assert_eq!(desk.locks.load(Ordering::Relaxed), 0);
}
