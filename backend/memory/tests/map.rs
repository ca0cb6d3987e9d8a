//! Memory tables that lie, and the map against one that was written down naively.
#![allow(unsafe_code)]

mod memfd;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use bluff_memory::{GuestMemory, Hint, IoVec, Mapping, MemoryError, Region, RegionSpec, Space};
use bluff_testing::{Chance, times};
use memfd::{memfd, region, spec};
use proptest::prelude::*;

const PAGE: u64 = 4096;

fn refused(spec: RegionSpec) -> MemoryError {
    Region::new(spec, &GuestMemory::empty()).expect_err("a lie was believed")
}

#[test]
fn b08_empty_and_wrapping_regions() {
    let file = memfd(PAGE);
    let bad = |e| assert!(matches!(e, MemoryError::BadRegion { .. }), "{e}");
    bad(refused(spec(&file, 0, 0, 0)));
    bad(refused(RegionSpec {
        guest: u64::MAX - PAGE + 1,
        ..spec(&file, 0, PAGE, 0)
    }));
    bad(refused(RegionSpec {
        user: u64::MAX - 10,
        ..spec(&file, 0, PAGE, 0)
    }));
    bad(refused(spec(&file, 0, PAGE, u64::MAX - 1)));
    bad(refused(spec(&file, 0, u64::MAX, PAGE)));
}

#[test]
fn b08_file_too_short() {
    let file = memfd(PAGE);
    for (len, offset) in [
        (PAGE + 1, 0),
        (PAGE, 1),
        (1, PAGE),
        (1 << 62, 0),
        (1, 1 << 62),
    ] {
        let e = refused(spec(&file, 0, len, offset));
        assert!(matches!(e, MemoryError::ShortFile { .. }), "{e}");
    }
}

/// A device says nothing of its length: no arithmetic may trust what the front end says of it.
#[test]
fn b08_a_device_in_the_place_of_a_file() {
    for path in ["/dev/zero", "/dev/null", "/", "/proc/self/maps"] {
        for (len, offset) in [
            (PAGE, 0),
            (PAGE, 1),
            (1 << 62, 0),
            ((1 << 63) - 1, 1),
            (u64::MAX - 5 - PAGE, 5),
            (u64::MAX - 5, 5),
            (1, u64::MAX - 5),
            (PAGE, 1 << 63),
        ] {
            let file = File::open(path).unwrap();
            let made = Region::new(
                RegionSpec {
                    user: 0,
                    ..spec(&file, 0, len, offset)
                },
                &GuestMemory::empty(),
            );
            assert!(made.is_err(), "opened for reading only: {path} {len:#x}");
        }
    }
    // What can be mapped is memory like any other.
    let zero = File::options()
        .read(true)
        .write(true)
        .open("/dev/zero")
        .unwrap();
    let memory = GuestMemory::new(vec![region(&zero, 0, PAGE, 0)]).unwrap();
    memory.write(10, &[1]).unwrap();
    let mut got = [0];
    memory.read(10, &mut got).unwrap();
    assert_eq!(got, [1]);
    let odd = Region::new(
        RegionSpec {
            user: 0,
            ..spec(&zero, 0, u64::MAX - PAGE, 1)
        },
        &GuestMemory::empty(),
    );
    assert!(odd.is_err());
}

#[test]
fn b08_read_only_and_sealed_files() {
    let file = memfd(PAGE);
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let read_only = File::open(path).unwrap();
    let e = refused(spec(&read_only, 0, PAGE, 0));
    assert!(matches!(e, MemoryError::Map(_)), "{e}");
    // SAFETY: no memory is involved.
    let rc = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE) };
    assert_eq!(rc, 0);
    let e = refused(spec(&file, 0, PAGE, 0));
    assert!(matches!(e, MemoryError::Map(_)), "{e}");
    // Sealed against shrinking is as it should be.
    let file = memfd(PAGE);
    // SAFETY: as above.
    let rc = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) };
    assert_eq!(rc, 0);
    region(&file, 0, PAGE, 0);
}

#[test]
fn b08_overlaps() {
    let file = memfd(16 * PAGE);
    let at = |guest, user| {
        let spec = RegionSpec {
            user,
            ..spec(&file, guest, 2 * PAGE, guest)
        };
        Region::new(spec, &GuestMemory::empty()).unwrap()
    };
    for (one, two) in [
        ((0, 0), (0, 8 * PAGE)),
        ((0, 0), (PAGE, 8 * PAGE)),
        ((0, 0), (2 * PAGE - 1, 8 * PAGE)),
        ((0, 0), (4 * PAGE, 0)),
        ((0, PAGE), (4 * PAGE, 0)),
    ] {
        for swap in [false, true] {
            let (a, b) = (at(one.0, one.1), at(two.0, two.1));
            let regions = if swap { vec![b, a] } else { vec![a, b] };
            assert!(matches!(
                GuestMemory::new(regions),
                Err(MemoryError::Overlap { .. })
            ));
        }
    }
    // They may touch.
    GuestMemory::new(vec![at(2 * PAGE, 2 * PAGE), at(0, 0)]).unwrap();
}

#[test]
fn offsets_inside_of_a_page() {
    let file = memfd(4 * PAGE);
    let whole = GuestMemory::new(vec![region(&file, 0, 4 * PAGE, 0)]).unwrap();
    for offset in [1, 8, 100, PAGE - 1, PAGE + 3, 3 * PAGE - 1] {
        let len = PAGE + 1;
        let part = GuestMemory::new(vec![region(&file, 0x1000_0000, len, offset)]).unwrap();
        let data: Vec<u8> = (0..len)
            .map(|i| (i as u8).wrapping_mul(31) ^ offset as u8)
            .collect();
        part.write(0x1000_0000, &data).unwrap();
        let mut got = vec![0; len as usize];
        whole.read(offset, &mut got).unwrap();
        assert_eq!(got, data);
        // The pages around it are mapped, and not handed out.
        assert!(part.read(0x1000_0000 + len, &mut [0]).is_err());
        assert!(part.read(0x1000_0000 - 1, &mut [0]).is_err());
        // Aligned for the guest, not for us.
        let odd = part.contiguous(Space::Guest, 0x1000_0000, 16, 16);
        assert_eq!(odd.is_ok(), offset % 16 == 0);
    }
}

/// What stays keeps its mapping; what is of another file does not.
#[test]
fn an_epoch_shares_what_stayed() {
    let (file, other) = (memfd(4 * PAGE), memfd(4 * PAGE));
    let old = GuestMemory::new(vec![region(&file, 0, 2 * PAGE, 0)]).unwrap();
    let piece = |memory: &GuestMemory, addr, len| {
        let mut pieces = Vec::new();
        memory.segments(addr, len, &mut pieces).unwrap();
        pieces[0]
    };
    let was = piece(&old, 0, 2 * PAGE as u32);
    // The same bytes at another guest address, through another descriptor.
    let same = Region::new(spec(&file, 8 * PAGE, 2 * PAGE, 0), &old).unwrap();
    let next = GuestMemory::new(vec![same]).unwrap();
    assert_eq!(piece(&next, 8 * PAGE, 1).ptr(), was.ptr());
    assert!(next.maps(was) && next.maps(IoVec::new(was.ptr(), 1)));
    for (f, offset) in [(&file, 2 * PAGE), (&other, 0)] {
        let next = Region::new(spec(f, 0, 2 * PAGE, offset), &old).unwrap();
        let next = GuestMemory::new(vec![next]).unwrap();
        assert!(!next.maps(was) && !next.maps(IoVec::new(was.ptr(), 1)));
        assert_ne!(piece(&next, 0, 1).ptr(), was.ptr());
    }
    assert!(!GuestMemory::empty().maps(was));
    // The whole of it, and not a byte more.
    let end = was.ptr().wrapping_add(2 * PAGE as usize);
    assert!(old.maps(IoVec::new(end.wrapping_sub(1), 1)));
    assert!(!old.maps(IoVec::new(end, 1)));
    assert!(!old.maps(IoVec::new(end.wrapping_sub(1), 2)));
    assert!(!old.maps(IoVec::new(was.ptr(), 2 * PAGE as usize + 1)));
    assert!(!old.maps(IoVec::new(was.ptr().wrapping_sub(1), 2)));
}

/// The next epoch, of pieces of one file.
fn after(old: &GuestMemory, file: &File, pieces: &[(u64, u64)]) -> Arc<GuestMemory> {
    let regions = pieces.iter().map(|(offset, len)| {
        let spec = spec(file, *offset, *len, *offset);
        Region::new(spec, old).unwrap()
    });
    GuestMemory::new(regions.collect()).unwrap()
}

/// Where one byte of guest memory is.
fn host(memory: &GuestMemory, addr: u64) -> IoVec {
    let at = memory.contiguous(Space::Guest, addr, 1, 1).unwrap();
    IoVec::new(at, 1)
}

/// How many mappings of a file there are.
fn count(file: &File) -> usize {
    let inode = format!(" {} ", file.metadata().unwrap().ino());
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines()
        .filter(|l| format!("{l} ").contains(&inode))
        .count()
}

/// Requests keep their memory while regions are split and joined, as a VMM does around its holes.
#[test]
fn what_stays_of_a_region_that_is_split_keeps_its_mapping() {
    let file = memfd(64 * PAGE);
    let whole = after(&GuestMemory::empty(), &file, &[(0, 64 * PAGE)]);
    whole.write(0, &[1; 64 * PAGE as usize]).unwrap();
    let split = after(&whole, &file, &[(0, 10 * PAGE), (12 * PAGE, 52 * PAGE)]);
    assert_eq!(count(&file), 1);
    for page in 0..64 {
        let was = host(&whole, page * PAGE);
        let stays = !(10..12).contains(&page);
        assert_eq!(split.maps(was), stays, "page {page}");
        if stays {
            assert_eq!(host(&split, page * PAGE).ptr(), was.ptr());
        } else {
            assert!(split.read(page * PAGE, &mut [0]).is_err());
        }
    }
    // A request that reaches into the hole has to go.
    let edge = host(&whole, 10 * PAGE - 1).ptr();
    assert!(!split.maps(IoVec::new(edge, 2)));
    let regions = split.regions();
    let files: Vec<_> = regions.map(|r| (r.file().offset, r.size())).collect();
    assert_eq!(files, [(0, 10 * PAGE), (12 * PAGE, 52 * PAGE)]);
    let joined = after(&split, &file, &[(0, 64 * PAGE)]);
    assert_eq!(host(&joined, 0).ptr(), host(&whole, 0).ptr());
    assert!(joined.maps(IoVec::new(host(&whole, 0).ptr(), 64 * PAGE as usize)));
    drop((whole, split));
    assert_eq!(count(&file), 1);
    drop(joined);
    assert_eq!(count(&file), 0);
}

#[test]
fn what_was_in_a_region_that_grows_stays_mapped() {
    let file = memfd(64 * PAGE);
    let small = after(&GuestMemory::empty(), &file, &[(8 * PAGE, 8 * PAGE)]);
    let was = IoVec::new(host(&small, 8 * PAGE).ptr(), 8 * PAGE as usize);
    let large = after(&small, &file, &[(4 * PAGE, 16 * PAGE)]);
    drop(small);
    assert!(large.maps(was));
    // It is the same memory.
    large.write(8 * PAGE, &[7]).unwrap();
    // SAFETY: mapped, as was asked for just now.
    assert_eq!(unsafe { was.ptr().read_volatile() }, 7);
    // A table that only adds something keeps it too, one in which it has gone does not.
    let more = after(
        &large,
        &file,
        &[(4 * PAGE, 16 * PAGE), (32 * PAGE, 8 * PAGE)],
    );
    assert!(more.maps(was));
    let less = after(
        &more,
        &file,
        &[(9 * PAGE, 11 * PAGE), (32 * PAGE, 8 * PAGE)],
    );
    drop((large, more));
    assert!(!less.maps(was));
    let second = was.ptr().wrapping_add(PAGE as usize);
    assert!(less.maps(IoVec::new(second, was.len() - PAGE as usize)));
    // What shrinks under an old mapping is noticed.
    file.set_len(0).unwrap();
    // SAFETY: mapped, and repaired by the guard.
    unsafe { second.read_volatile() };
    assert!(less.is_poisoned());
}

/// Old mappings do not pile up: never more than twice what the table asks for.
#[test]
fn what_a_table_leaves_behind_is_bounded() {
    let file = memfd(1 << 30);
    let mapped = || {
        let inode = format!(" {} ", file.metadata().unwrap().ino());
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let lines = maps.lines().filter(|l| format!("{l} ").contains(&inode));
        let sizes = lines.map(|l| {
            let (start, rest) = l.split_once('-').unwrap();
            let (end, _) = rest.split_once(' ').unwrap();
            u64::from_str_radix(end, 16).unwrap() - u64::from_str_radix(start, 16).unwrap()
        });
        sizes.sum::<u64>()
    };
    // It shrinks again and again: in the end a small part of it is a mapping of its own.
    let mut memory = after(&GuestMemory::empty(), &file, &[(0, 1 << 30)]);
    let was = host(&memory, 0);
    for len in [1 << 29, 1 << 28, 1 << 20, PAGE] {
        memory = after(&memory, &file, &[(0, len)]);
        assert!(mapped() <= 2 * len, "{len:#x}: {:#x}", mapped());
        assert_eq!(memory.maps(was), len == 1 << 29);
    }
    // It grows again and again.
    for pages in 2..200 {
        let len = pages * PAGE;
        let was = host(&memory, 0);
        memory = after(&memory, &file, &[(0, len)]);
        assert!(mapped() <= 2 * len, "{len:#x}: {:#x}", mapped());
        assert!(memory.maps(was));
    }
    // Many small pieces of one large mapping, each in a table with others.
    let whole = after(&GuestMemory::empty(), &file, &[(0, 1 << 30)]);
    let pieces: Vec<_> = (0..500).map(|i| (i << 20, PAGE)).collect();
    let next = after(&whole, &file, &pieces);
    drop((whole, memory));
    assert!(mapped() <= 1000 * PAGE);
    drop(next);
    assert_eq!(mapped(), 0);
}

/// Against a look at every region, for as many as a front end may have.
#[test]
fn what_is_mapped_among_many_regions() {
    let files: Vec<_> = (0..4).map(|_| memfd(1024 * PAGE)).collect();
    let pieces = (0..509u64).map(|i| {
        let len = (1 + i % 3) * PAGE - i % 2;
        region(
            &files[(i % 4) as usize],
            i * 8 * PAGE,
            len,
            (i * 2) % 1000 * PAGE,
        )
    });
    let memory = GuestMemory::new(pieces.collect()).unwrap();
    let hosts = memory.regions().map(|r| {
        let at = memory.contiguous(Space::Guest, r.guest(), r.size(), 1);
        (at.unwrap(), r.size() as usize)
    });
    let hosts: Vec<_> = hosts.collect();
    let is_byte = |at: *mut u8| {
        let inside = |h: &(*mut u8, usize)| at >= h.0 && at < h.0.wrapping_add(h.1);
        hosts.iter().any(inside)
    };
    for (start, len) in &hosts {
        let end = start.wrapping_add(*len);
        assert!(memory.maps(IoVec::new(*start, *len)));
        assert!(memory.maps(IoVec::new(end.wrapping_sub(1), 1)));
        for (at, len) in [
            (start.wrapping_sub(1), 1),
            (start.wrapping_sub(1), 2),
            (end, 1),
            (end.wrapping_sub(1), 2),
            (start.wrapping_sub(1), len + 2),
        ] {
            let want = (0..len).all(|i| is_byte(at.wrapping_add(i)));
            assert_eq!(memory.maps(IoVec::new(at, len)), want, "{at:?}+{len}");
        }
    }
    assert!(!memory.maps(IoVec::new(hosts[0].0, usize::MAX)));
    assert!(!memory.maps(IoVec::new(std::ptr::null_mut(), 1)));
}

#[test]
fn files_and_mappings_are_given_back() {
    let file = memfd(4 * PAGE);
    for _ in 0..times(20, 1000) {
        let old = GuestMemory::new(vec![region(&file, 0, 2 * PAGE, 0)]).unwrap();
        let kept = Region::new(spec(&file, 0, 2 * PAGE, 0), &old).unwrap();
        let new = GuestMemory::new(vec![kept]).unwrap();
        drop(old);
        assert_eq!(count(&file), 1, "kept by the new epoch");
        drop(new);
        assert_eq!(count(&file), 0);
        // A mapping that is refused leaves nothing.
        assert!(Mapping::new(OwnedFd::from(file.try_clone().unwrap()), 0, 5 * PAGE).is_err());
        assert_eq!(count(&file), 0);
    }
}

/// Guest memory written down byte by byte: which byte of which region an address is.
fn naive(table: &[(u64, u64)]) -> BTreeMap<u64, (usize, u64)> {
    let mut bytes = BTreeMap::new();
    for (i, (start, len)) in table.iter().enumerate() {
        bytes.extend((0..*len).map(|o| (start + o, (i, o))));
    }
    bytes
}

fn cases() -> ProptestConfig {
    ProptestConfig {
        cases: times(64, 2000),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(cases())]

    /// Regions of 1 to 64 bytes with gaps of 0 to 3 between them, near 0 or near the end of addresses: every
    /// look-up agrees with the naive map, byte by byte.
    #[test]
    fn look_ups_agree_with_a_naive_map(
        shape in prop::collection::vec((0u64..4, 1u64..64), 1..6),
        high in any::<bool>(),
        asks in prop::collection::vec((0u64..300, 0u32..200), 1..40),
    ) {
        let total: u64 = shape.iter().map(|(gap, len)| gap + len).sum();
        let base = if high { u64::MAX - total } else { 0 };
        let (mut at, mut table) = (base, Vec::new());
        for (gap, len) in &shape {
            table.push((at + gap, *len));
            at += gap + len;
        }
        let files: Vec<_> = table.iter().map(|_| memfd(PAGE)).collect();
        let regions = table.iter().zip(&files).rev().map(|((start, len), file)| {
            let spec = RegionSpec { user: *start, ..spec(file, 0, *len, 64) };
            let spec = RegionSpec { guest: *start, ..spec };
            Region::new(spec, &GuestMemory::empty()).unwrap()
        });
        let memory = GuestMemory::new(regions.collect()).unwrap();
        prop_assert_eq!(memory.end(), at);
        let bytes = naive(&table);
        let hosts: Vec<_> = memory.regions().map(|r| {
            memory.contiguous(Space::Guest, r.guest(), r.size(), 1).unwrap()
        }).collect();
        let mut hint = Hint::default();
        for (addr, len) in asks {
            let addr = base.wrapping_add(addr).wrapping_sub(10);
            // What each byte should be, where all of them are there.
            let want: Option<Vec<*mut u8>> = (0..u64::from(len)).map(|i| {
                let (region, offset) = bytes.get(&addr.checked_add(i)?)?;
                Some(hosts[*region].wrapping_add(*offset as usize))
            }).collect();
            let mut pieces = vec![IoVec::default()];
            let got = memory.segments(addr, len, &mut pieces);
            prop_assert_eq!(pieces[0].len(), 0);
            match (&want, got) {
                (Some(want), Ok(())) => {
                    let got: Vec<_> = pieces[1..].iter().flat_map(|p| {
                        (0..p.len()).map(|i| p.ptr().wrapping_add(i))
                    }).collect();
                    prop_assert_eq!(&got, want);
                    prop_assert!(pieces[1..].iter().all(|p| !p.is_empty()));
                }
                (None, Err(_)) => prop_assert_eq!(pieces.len(), 1),
                (want, got) => prop_assert!(false, "{addr:#x}+{len}: {want:?} {got:?}"),
            }
            if len == 0 {
                continue;
            }
            let in_one = want.as_ref().filter(|w| {
                let of = |i: usize| bytes[&(addr + i as u64)].0;
                of(0) == of(w.len() - 1)
            });
            prop_assert_eq!(memory.one(&mut hint, addr, len), in_one.map(|w| w[0]));
            let user = memory.contiguous(Space::User, addr, u64::from(len), 1);
            prop_assert_eq!(user.ok(), in_one.map(|w| w[0]));
            prop_assert_eq!(memory.guest_of_user(addr), bytes.contains_key(&addr).then_some(addr));
            // Written and read back, in whole or not at all.
            let data: Vec<u8> = (0..len).map(|i| i as u8 ^ addr as u8).collect();
            prop_assert_eq!(memory.write(addr, &data).is_ok(), want.is_some());
            let mut back = vec![0xee; len as usize];
            let read = memory.read(addr, &mut back).is_ok();
            prop_assert_eq!(read, want.is_some());
            prop_assert_eq!(back, if read { data } else { vec![0xee; len as usize] });
        }
    }
}

/// What a host does that maps by the page: one region comes or goes at a time, in any order.
#[test]
fn regions_come_and_go_one_by_one() {
    const PAGES: u64 = 64;
    let file = memfd(PAGES * PAGE);
    // Of one mapping, so that regions that adjoin for the guest adjoin in our addresses too.
    let whole = after(&GuestMemory::empty(), &file, &[(0, PAGES * PAGE)]);
    let page = |i: u64| Region::new(spec(&file, i * PAGE, PAGE, i * PAGE), &whole).unwrap();
    let mut chance = Chance::new(7);
    let mut memory = GuestMemory::empty();
    let mut there = [false; PAGES as usize];
    for _ in 0..times(500, 20_000) {
        let i = chance.below(PAGES);
        let before = memory.clone();
        let (at, was) = (i * PAGE, there[i as usize]);
        if was {
            assert!(matches!(
                memory.with(page(i)),
                Err(MemoryError::Overlap { .. })
            ));
            memory = memory.without(at).unwrap();
        } else {
            assert!(memory.without(at).is_none());
            memory = memory.with(page(i)).unwrap();
        }
        there[i as usize] = !was;
        assert_eq!(memory.len(), there.iter().filter(|t| **t).count());
        assert_eq!(
            before.maps(host(&whole, at)),
            was,
            "what was stays as it was"
        );
        // Anything that lies in pages that are there, and nothing else, is mapped.
        let first = chance.below(PAGES);
        let len = 1 + chance
            .below((PAGES - first) * PAGE)
            .min(chance.below(4 * PAGE));
        let last = (first * PAGE + len - 1) / PAGE;
        let all = there[first as usize..=last as usize].iter().all(|t| *t);
        let buffer = IoVec::new(host(&whole, first * PAGE).ptr(), len as usize);
        assert_eq!(memory.maps(buffer), all, "{len} bytes from page {first}");
        let mut pieces = Vec::new();
        let resolved = memory.segments(first * PAGE, len as u32, &mut pieces);
        assert_eq!(resolved.is_ok(), all);
    }
}

/// The bytes of one page at two guest addresses: where one of the two goes, the other one stays.
#[test]
fn the_same_bytes_at_two_addresses() {
    let file = memfd(4 * PAGE);
    let one = after(&GuestMemory::empty(), &file, &[(0, 4 * PAGE)]);
    let at = |guest: u64| Region::new(spec(&file, guest, 4 * PAGE, 0), &one).unwrap();
    let both = one.with(at(16 * PAGE)).unwrap();
    let was = host(&both, 16 * PAGE);
    assert_eq!(was.ptr(), host(&one, 0).ptr());
    for left in [both.without(0).unwrap(), both.without(16 * PAGE).unwrap()] {
        assert_eq!(left.len(), 1);
        assert!(left.maps(was));
        let none = left
            .without(left.regions().next().unwrap().guest())
            .unwrap();
        assert!(none.is_empty() && !none.maps(was));
    }
}

/// As many as a host may have; a change takes microseconds, and so it does where there are few.
#[test]
fn sixty_five_thousand_regions() {
    const PAGES: u64 = 65_000;
    let file = memfd(PAGES * PAGE);
    let whole = after(&GuestMemory::empty(), &file, &[(0, PAGES * PAGE)]);
    let mut memory = GuestMemory::empty();
    // Backwards, and every second one: nothing adjoins.
    for i in (0..PAGES).rev().step_by(2) {
        let region = Region::new(spec(&file, i * PAGE, PAGE, i * PAGE), &whole).unwrap();
        memory = memory.with(region).unwrap();
    }
    assert_eq!(memory.len() as u64, PAGES / 2);
    assert_eq!(memory.end(), PAGES * PAGE);
    for i in (0..PAGES).rev() {
        let there = memory.maps(host(&whole, i * PAGE));
        assert_eq!(there, i % 2 == 1);
        match memory.without(i * PAGE) {
            Some(less) => memory = less,
            None => assert!(!there),
        }
    }
    assert!(memory.is_empty());
}
