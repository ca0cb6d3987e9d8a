//! Data pointers against a resolver that goes byte by byte, and hostile ones by hand.

use std::sync::Arc;

use bluff_memory::{Access, GuestMemory, IoVec};
use bluff_testing::{Chance, times};
use zerocopy::IntoBytes;

use super::{MOST_DESCRIPTORS, Resolver, sgl};
use crate::fuzzing::host::{BASE, DATA, LISTS, REGION, memory};
use crate::spec::{SglDescriptor, Status};

fn epoch() -> Arc<GuestMemory> {
    memory(&GuestMemory::empty(), 2)
}

const END: u64 = BASE + 2 * REGION;

/// Guest addresses of a command's bytes in runs, found in the plainest way, by the text of §4.3.1.
fn naive(
    memory: &GuestMemory,
    page: u64,
    prp1: u64,
    prp2: u64,
    len: u64,
) -> Result<Vec<(u64, u64)>, Status> {
    let word = |at: u64| {
        let mut bytes = [0; 8];
        let read = memory.read(at, &mut bytes);
        read.map_err(|_| Status::DATA_TRANSFER_ERROR)?;
        Ok::<u64, Status>(u64::from_le_bytes(bytes))
    };
    if !prp1.is_multiple_of(4) {
        return Err(Status::PRP_OFFSET);
    }
    let first = len.min(page - prp1 % page);
    let mut runs = vec![(prp1, first)];
    let mut left = len - first;
    let mut entries = Vec::new();
    let pages = left.div_ceil(page);
    if pages == 1 {
        entries.push(prp2);
    } else if pages > 1 {
        let mut at = prp2;
        if !at.is_multiple_of(8) {
            return Err(Status::PRP_OFFSET);
        }
        while (entries.len() as u64) < pages {
            let is_last_of_page = (at + 8).is_multiple_of(page);
            if is_last_of_page && entries.len() as u64 + 1 < pages {
                at = word(at)?;
                if !at.is_multiple_of(page) {
                    return Err(Status::PRP_OFFSET);
                }
                continue;
            }
            entries.push(word(at)?);
            at = at.wrapping_add(8);
        }
    }
    for entry in entries {
        if !entry.is_multiple_of(page) {
            return Err(Status::PRP_OFFSET);
        }
        runs.push((entry, left.min(page)));
        left -= left.min(page);
    }
    let inside = |&(at, n): &(u64, u64)| at >= BASE && at.checked_add(n).is_some_and(|e| e <= END);
    if !runs.iter().all(inside) {
        return Err(Status::DATA_TRANSFER_ERROR);
    }
    Ok(runs)
}

/// The host addresses of all bytes, in runs that are put together as far as can be.
fn host_runs(memory: &GuestMemory, runs: &[(u64, u64)]) -> Vec<(usize, usize)> {
    let mut out: Vec<(usize, usize)> = Vec::new();
    for &(at, n) in runs {
        let mut pieces = Vec::new();
        memory.segments(at, n as u32, &mut pieces).unwrap();
        for v in pieces {
            match out.last_mut() {
                Some((ptr, len)) if *ptr + *len == v.ptr() as usize => *len += v.len(),
                _ => out.push((v.ptr() as usize, v.len())),
            }
        }
    }
    out
}

fn runs_of(out: &[IoVec]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for v in out {
        match runs.last_mut() {
            Some((ptr, len)) if *ptr + *len == v.ptr() as usize => *len += v.len(),
            _ => runs.push((v.ptr() as usize, v.len())),
        }
    }
    runs
}

#[test]
fn prps_are_what_the_specification_says() {
    let memory = epoch();
    let mut chance = Chance::new(11);
    let (mut good, mut bad) = (0, 0);
    for page_shift in [12, 13, 16] {
        let page = 1u64 << page_shift;
        let mut resolver = Resolver::new(page_shift);
        for round in 0..times(3000, 100_000) {
            // Some rounds have no fault in them.
            let fault = |chance: &mut Chance| round % 2 == 0 && chance.percent(1);
            let entry = |chance: &mut Chance| {
                let n = 2 * REGION / page;
                let mut entry = BASE / page * page + page * chance.below(n);
                if entry < BASE {
                    entry += page;
                }
                match fault(chance) {
                    true => entry ^ 1 << chance.below(64),
                    false => entry,
                }
            };
            for i in 0..64 {
                let at = LISTS + i * 8;
                let list = LISTS.next_multiple_of(page) - 64 * 8 + i * 8;
                for at in [at, list] {
                    let value = entry(&mut chance);
                    memory.write(at, &value.to_le_bytes()).unwrap();
                }
            }
            let prp1 = entry(&mut chance) + chance.below(page / 4) * 4;
            let prp2 = match chance.below(4) {
                0 => entry(&mut chance),
                1 => LISTS + chance.below(20) * 8,
                2 => LISTS.next_multiple_of(page) - 8 * chance.below(60),
                _ => LISTS + u64::from(fault(&mut chance)),
            };
            let most = if chance.percent(50) {
                3 * page
            } else {
                40 * page
            };
            let len = 512 * (1 + chance.below(most.min(1 << 20) / 512));
            let wanted = naive(&memory, page, prp1, prp2, len);
            let mut out = Vec::new();
            let got = resolver.prp(&memory, Access::Both, prp1, prp2, len as u32, &mut out);
            match wanted {
                Ok(runs) => {
                    good += 1;
                    assert_eq!(got, Ok(()), "{prp1:#x} {prp2:#x} {len:#x}");
                    assert_eq!(runs_of(&out), host_runs(&memory, &runs));
                    assert_eq!(IoVec::total(&out), len);
                }
                Err(_) => {
                    bad += 1;
                    // Which of two faults is found first may differ.
                    assert!(got.is_err(), "{prp1:#x} {prp2:#x} {len:#x}");
                }
            }
        }
    }
    assert!(good > 500 && bad > 500, "{good} good, {bad} bad");
}

fn prp(memory: &GuestMemory, prp1: u64, prp2: u64, len: u32) -> Result<(), Status> {
    let mut out = Vec::new();
    let result = Resolver::new(12).prp(memory, Access::Both, prp1, prp2, len, &mut out);
    assert!(result.is_err() || IoVec::total(&out) == u64::from(len));
    result
}

/// What is no memory of the host's is not mapped, and the function's own BAR is not.
#[test]
fn c01_prps_and_sgls_into_a_bar() {
    let memory = epoch();
    let mut resolver = Resolver::new(12);
    for bar in [0xfe00_0000, 0xfe00_1000, 0x38_0000_0000, 0, !0xfff] {
        let missing = Err(Status::DATA_TRANSFER_ERROR);
        assert_eq!(prp(&memory, bar, 0, 512), missing);
        assert_eq!(prp(&memory, DATA, bar, 8192), missing);
        assert_eq!(prp(&memory, DATA, bar, 16384), missing);
        memory.write(LISTS + 8, &bar.to_le_bytes()).unwrap();
        memory.write(LISTS, &DATA.to_le_bytes()).unwrap();
        assert_eq!(prp(&memory, DATA, LISTS, 12288), missing);
        for kind in [sgl::DATA, sgl::SEGMENT, sgl::LAST] {
            let first = descriptor(kind, bar, 512);
            let got = resolver.sgl(&memory, Access::Both, &first, 512, &mut Vec::new());
            assert_eq!(got, missing);
        }
    }
}

#[test]
fn c02_lists_that_loop_or_are_misaligned() {
    let memory = epoch();
    // The last entry of a page leads to that page.
    let list = LISTS.next_multiple_of(4096);
    for i in 0..512u64 {
        memory.write(list + i * 8, &list.to_le_bytes()).unwrap();
    }
    // All of them are pages too, so this is served, however long it is.
    for len in [1 << 20, 8 << 20, 64 << 20] {
        assert_eq!(prp(&memory, DATA, list, len), Ok(()));
        assert_eq!(prp(&memory, DATA, list + 4088, len), Ok(()));
    }
    for (prp1, prp2, len) in [
        (DATA + 1, 0, 512),
        (DATA + 2, 0, 512),
        (DATA, DATA + 4, 8192),
        (DATA, DATA + 4095, 8192),
        (DATA, list + 4, 12288),
        (DATA, list + 1, 12288),
    ] {
        assert_eq!(prp(&memory, prp1, prp2, len), Err(Status::PRP_OFFSET));
    }
    memory.write(list + 8, &(DATA + 8).to_le_bytes()).unwrap();
    assert_eq!(prp(&memory, DATA, list, 12288), Err(Status::PRP_OFFSET));
    // A list that goes on in the middle of a page.
    memory
        .write(list + 4088, &(list + 16).to_le_bytes())
        .unwrap();
    assert_eq!(
        prp(&memory, DATA, list + 4088, 1 << 20),
        Err(Status::PRP_OFFSET)
    );
    // An address at the very end.
    assert_eq!(
        prp(&memory, DATA, u64::MAX - 7, 12288),
        Err(Status::DATA_TRANSFER_ERROR)
    );
    assert_eq!(
        prp(&memory, u64::MAX - 3, 0, 512),
        Err(Status::DATA_TRANSFER_ERROR)
    );
}

fn descriptor(identifier: u8, address: u64, length: u32) -> SglDescriptor {
    SglDescriptor {
        address: address.into(),
        length: length.into(),
        reserved: [0; 3],
        identifier,
    }
}

fn put(memory: &GuestMemory, at: u64, all: &[SglDescriptor]) {
    memory.write(at, all.as_bytes()).unwrap();
}

fn resolve_sgl(memory: &GuestMemory, first: SglDescriptor, len: u32) -> Result<Vec<IoVec>, Status> {
    let mut out = Vec::new();
    Resolver::new(12).sgl(memory, Access::Both, &first, len, &mut out)?;
    assert_eq!(IoVec::total(&out), u64::from(len));
    Ok(out)
}

#[test]
fn sgls_in_segments() {
    let memory = epoch();
    let data = |i: u64, len| descriptor(sgl::DATA, DATA + i * 10_000 + i, len);
    // A segment, one that is longer than what is copied at once, and the last one; blocks of any length, over the border too.
    let one = [
        data(0, 100),
        data(1, 0),
        descriptor(sgl::SEGMENT, LISTS + 0x1000, 300 * 16),
    ];
    let mut two: Vec<_> = (0..299).map(|i| data(i % 40, 7)).collect();
    two.push(descriptor(sgl::LAST, LISTS + 0x4008, 2 * 16));
    let three = [
        descriptor(sgl::DATA, BASE + REGION - 1, 2),
        descriptor(sgl::DATA, DATA, 319),
    ];
    put(&memory, LISTS, &one);
    put(&memory, LISTS + 0x1000, &two);
    put(&memory, LISTS + 0x4008, &three);
    let len = 100 + 299 * 7 + 2 + 319;
    let first = descriptor(sgl::SEGMENT, LISTS, 3 * 16);
    let got = resolve_sgl(&memory, first, len).unwrap();
    let wanted: Vec<_> = one[..2]
        .iter()
        .chain(&two[..299])
        .chain(&three)
        .filter(|d| d.length.get() > 0)
        .map(|d| (d.address.get(), u64::from(d.length.get())))
        .collect();
    assert_eq!(runs_of(&got), host_runs(&memory, &wanted));
    // Neither more nor less.
    for len in [len - 1, len + 1, 512] {
        assert_eq!(
            resolve_sgl(&memory, first, len).unwrap_err(),
            Status::SGL_DATA_LENGTH
        );
    }
}

#[test]
fn c02_sgls_that_loop_are_short_or_make_no_sense() {
    let memory = epoch();
    let got = |first| resolve_sgl(&memory, first, 512).unwrap_err();
    let data = descriptor(sgl::DATA, DATA, 512);
    // To itself.
    put(&memory, LISTS, &[descriptor(sgl::SEGMENT, LISTS, 16)]);
    assert_eq!(
        got(descriptor(sgl::SEGMENT, LISTS, 16)),
        Status::INVALID_SGL_COUNT
    );
    let empty = descriptor(sgl::DATA, DATA, 0);
    put(
        &memory,
        LISTS,
        &[empty, descriptor(sgl::SEGMENT, LISTS, 32)],
    );
    assert_eq!(
        got(descriptor(sgl::SEGMENT, LISTS, 32)),
        Status::INVALID_SGL_COUNT
    );
    // Too long to be looked at.
    for length in [16 * MOST_DESCRIPTORS as u32, !15] {
        assert_eq!(
            got(descriptor(sgl::LAST, LISTS, length)),
            Status::INVALID_SGL_COUNT
        );
    }
    for length in [0, 1, 15, 17, u32::MAX] {
        let segment = descriptor(sgl::LAST, LISTS, length);
        assert_eq!(got(segment), Status::INVALID_SGL_SEGMENT);
    }
    // A segment in a last segment; one that is not the last descriptor; a segment that leads nowhere.
    put(&memory, LISTS, &[data, descriptor(sgl::LAST, LISTS, 16)]);
    assert_eq!(
        got(descriptor(sgl::LAST, LISTS, 32)),
        Status::INVALID_SGL_SEGMENT
    );
    put(&memory, LISTS, &[descriptor(sgl::LAST, LISTS, 16), data]);
    assert_eq!(
        got(descriptor(sgl::SEGMENT, LISTS, 32)),
        Status::INVALID_SGL_COUNT
    );
    put(&memory, LISTS, &[data, empty]);
    assert_eq!(
        got(descriptor(sgl::SEGMENT, LISTS, 32)),
        Status::INVALID_SGL_SEGMENT
    );
    // Bit buckets, keys, offsets, and what nobody knows.
    for identifier in (0..=0xff).filter(|i| ![sgl::DATA, sgl::SEGMENT, sgl::LAST].contains(i)) {
        assert_eq!(got(descriptor(identifier, DATA, 512)), Status::SGL_TYPE);
        put(&memory, LISTS, &[descriptor(identifier, DATA, 512)]);
        assert_eq!(got(descriptor(sgl::LAST, LISTS, 16)), Status::SGL_TYPE);
    }
    // Lengths that wrap.
    for length in [511, 513, u32::MAX] {
        assert_eq!(
            got(descriptor(sgl::DATA, DATA, length)),
            Status::SGL_DATA_LENGTH
        );
    }
    let far = descriptor(sgl::DATA, u64::MAX - 10, 512);
    assert_eq!(got(far), Status::DATA_TRANSFER_ERROR);
    let far = descriptor(sgl::LAST, u64::MAX - 4095, 0x3000);
    assert_eq!(got(far), Status::DATA_TRANSFER_ERROR);
}
