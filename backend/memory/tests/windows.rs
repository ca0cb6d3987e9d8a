//! Many regions of one file: what is mapped for them, and what the device may do with each.

mod memfd;

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use bluff_memory::{
    Access, GuestMemory, Hint, MemoryError, Region, RegionSpec, Rights, Space, Windows,
};
use memfd::{memfd, spec};

const PAGE: u64 = 4096;
const GIB: u64 = 1 << 30;
const READ: Rights = Rights {
    read: true,
    write: false,
};
const WRITE: Rights = Rights {
    read: false,
    write: true,
};

fn windows() -> Windows {
    Windows::new(64, 1 << 40)
}

/// The mappings of a file, as the kernel has them: their permissions.
fn mapped(file: &File) -> Vec<String> {
    let inode = format!(" {} ", file.metadata().unwrap().ino());
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let lines = maps.lines().filter(|l| format!("{l} ").contains(&inode));
    lines
        .map(|l| l.split(' ').nth(1).unwrap().to_owned())
        .collect()
}

fn add(
    memory: &GuestMemory,
    spec: RegionSpec,
    rights: Rights,
    windows: &mut Windows,
) -> Arc<GuestMemory> {
    let region = Region::within(spec, rights, windows).unwrap();
    memory.with(region).unwrap()
}

/// The file, opened again for reading only.
fn read_only(file: &File) -> OwnedFd {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    File::open(path).unwrap().into()
}

#[test]
fn many_pages_of_a_file_are_one_mapping() {
    const PAGES: u64 = 65_535;
    let file = memfd(2 * PAGES * PAGE);
    let (mut windows, mut memory) = (windows(), GuestMemory::empty());
    for i in 0..PAGES {
        // Neither in the file nor for the guest do they adjoin.
        let spec = spec(&file, i * 2 * PAGE, PAGE, 2 * (PAGES - 1 - i) * PAGE);
        memory = add(&memory, spec, Rights::ALL, &mut windows);
    }
    assert_eq!((memory.len() as u64, windows.len()), (PAGES, 1));
    assert_eq!(mapped(&file).len(), 1);
    memory.write(7 * 2 * PAGE, b"seven").unwrap();
    let mut back = [0; 5];
    std::os::unix::fs::FileExt::read_at(&file, &mut back, 2 * (PAGES - 8) * PAGE).unwrap();
    assert_eq!(&back, b"seven");
    assert!(memory.write(PAGE, &[1]).is_err(), "mapped, and not given");
    // All but the first and the last go at once.
    let few = memory.without_range(1, (PAGES - 2) * 2 * PAGE);
    let left: Vec<_> = few.regions().map(Region::guest).collect();
    assert_eq!(left, [0, (PAGES - 1) * 2 * PAGE]);
    let gone = memory.contiguous(Space::Guest, 2 * PAGE, 1, 1).unwrap();
    let stays = memory.contiguous(Space::Guest, 0, 1, 1).unwrap();
    let piece = |at| bluff_memory::IoVec::new(at, 1);
    assert!(few.maps(piece(stays)) && !few.maps(piece(gone)));
    assert_eq!(few.without_range(0, u64::MAX).len(), 0);
    drop((memory, few));
    assert!(windows.is_empty() && mapped(&file).is_empty());
}

#[test]
fn what_lies_across_the_end_of_a_window_is_mapped_by_itself() {
    let file = memfd(40 * GIB);
    let (mut windows, mut memory) = (windows(), GuestMemory::empty());
    for (offset, len, mappings) in [
        (16 * GIB - PAGE, PAGE, 1),
        (16 * GIB - PAGE, 2 * PAGE, 2),
        (16 * GIB, PAGE, 3),
        // The same bytes, at another address.
        (16 * GIB - PAGE, 2 * PAGE, 3),
        // The last one is shorter.
        (40 * GIB - PAGE, PAGE, 4),
        (PAGE, 39 * GIB, 5),
        (0, GIB, 5),
    ] {
        let at = memory.end();
        memory = add(
            &memory,
            spec(&file, at, len, offset),
            Rights::ALL,
            &mut windows,
        );
        assert_eq!(windows.len(), mappings, "{offset:#x}+{len:#x}");
        memory.write(at, &offset.to_ne_bytes()).unwrap();
        let mut back = [0; 8];
        std::os::unix::fs::FileExt::read_at(&file, &mut back, offset).unwrap();
        assert_eq!(back, offset.to_ne_bytes());
    }
    // A file that has grown.
    file.set_len(41 * GIB).unwrap();
    let spec = spec(&file, memory.end(), PAGE, 41 * GIB - PAGE);
    let memory = add(&memory, spec, Rights::ALL, &mut windows);
    assert_eq!((memory.len(), windows.len()), (8, 6));
}

#[test]
fn what_one_front_end_may_map_is_bounded() {
    let file = memfd(1 << 44);
    let mut windows = Windows::new(4, 33 * GIB);
    let mut regions = Vec::new();
    let mut at = |offset, windows: &mut Windows| {
        Region::within(spec(&file, 0, PAGE, offset), Rights::ALL, windows).map(|r| regions.push(r))
    };
    for (offset, mappings) in [(0, 1), (16 * GIB, 2), (32 * GIB, 3), (48 * GIB, 4), (0, 4)] {
        // From the third on there is no room for a whole window.
        at(offset, &mut windows).unwrap();
        assert_eq!(windows.len(), mappings);
    }
    let refused = at(64 * GIB, &mut windows).unwrap_err();
    assert!(matches!(refused, MemoryError::TooMany(4)), "{refused}");
    // An emulator shows its own mappings.
    if !bluff_testing::is_emulated() {
        assert_eq!(mapped(&file).len(), 4);
    }
    drop(regions);
    // What has gone counts no more.
    let large = spec(&file, 0, 34 * GIB, 0);
    let refused = Region::within(large, Rights::ALL, &mut windows).unwrap_err();
    assert!(matches!(refused, MemoryError::TooLarge(_)), "{refused}");
    Region::within(spec(&file, 0, 33 * GIB, 0), Rights::ALL, &mut windows).unwrap();
    // Neither do files that are none share anything, nor do they count once.
    let mut windows = Windows::new(4, GIB);
    let zero = File::options()
        .read(true)
        .write(true)
        .open("/dev/zero")
        .unwrap();
    let mut one = || Region::within(spec(&zero, 0, PAGE, 0), Rights::ALL, &mut windows);
    let all: Vec<_> = (0..4).map(|_| one().unwrap()).collect();
    assert!(matches!(one(), Err(MemoryError::TooMany(4))));
    assert_ne!(all[0].mapping().ptr(), all[1].mapping().ptr());
}

#[test]
fn a_device_does_only_what_it_may() {
    let file = memfd(16 * PAGE);
    let (mut windows, mut memory) = (windows(), GuestMemory::empty());
    for (page, rights) in [(0, Rights::ALL), (1, READ), (2, WRITE), (3, Rights::ALL)] {
        let spec = spec(&file, page * PAGE, PAGE, page * PAGE);
        memory = add(&memory, spec, rights, &mut windows);
    }
    let mut permissions = mapped(&file);
    permissions.sort();
    assert_eq!(permissions, ["r--s", "rw-s"]);
    let mut out = Vec::new();
    for (page, may) in [
        (0, [true; 3]),
        (1, [true, false, false]),
        (2, [false, true, false]),
    ] {
        let at = page * PAGE;
        assert_eq!(memory.read(at, &mut [0; 8]).is_ok(), may[0]);
        assert_eq!(memory.write(at, &[0; 8]).is_ok(), may[1]);
        let all = [Access::Read, Access::Write, Access::Both];
        for (access, may) in all.into_iter().zip(may) {
            let says = |error: Option<MemoryError>| match error {
                None => true,
                Some(MemoryError::Forbidden { .. }) => false,
                Some(other) => panic!("{other}"),
            };
            let segments = memory.segments_for(access, at, 8, &mut out);
            assert_eq!(says(segments.err()), may);
            let whole = memory.contiguous_for(access, Space::Guest, at, 8, 8);
            assert_eq!(says(whole.err()), may);
            let mut hint = Hint::default();
            for _ in 0..2 {
                let one = memory.one_for(access, &mut hint, at, 8);
                assert_eq!(one.is_some(), may, "page {page} {access:?}");
            }
            // Whatever was looked up before.
            assert!(memory.one_for(access, &mut hint, 0, 8).is_some());
            assert_eq!(memory.one_for(access, &mut hint, at, 8).is_some(), may);
        }
        assert_eq!(memory.segments(at, 8, &mut out).is_ok(), may[2]);
        assert_eq!(
            memory.contiguous(Space::Guest, at, 8, 8).is_ok(),
            may[2],
            "page {page}"
        );
        assert_eq!(
            memory.one(&mut Hint::default(), at, 8).is_some(),
            may[2],
            "page {page}"
        );
    }
    // Across an end: nothing is written of a buffer of which a part may not be.
    memory.write(PAGE - 4, &[7; 4]).unwrap();
    out.clear();
    assert!(memory.write(PAGE - 4, &[9; 8]).is_err());
    assert!(
        memory
            .segments_for(Access::Write, PAGE - 4, 8, &mut out)
            .is_err()
    );
    assert!(out.is_empty());
    let mut back = [0; 4];
    memory.read(PAGE - 4, &mut back).unwrap();
    assert_eq!(back, [7; 4]);
    memory.read(PAGE - 4, &mut [0; 8]).unwrap();
}

#[test]
fn a_file_for_reading_only_can_be_mapped_for_that() {
    let file = memfd(16 * PAGE);
    let (mut windows, memory) = (windows(), GuestMemory::empty());
    let with = |rights, windows: &mut Windows| {
        let spec = RegionSpec {
            file: read_only(&file),
            ..spec(&file, 0, PAGE, 0)
        };
        Region::within(spec, rights, windows)
    };
    for rights in [Rights::ALL, WRITE] {
        assert!(matches!(
            with(rights, &mut windows),
            Err(MemoryError::Map(_))
        ));
    }
    let memory = memory.with(with(READ, &mut windows).unwrap()).unwrap();
    memory.read(0, &mut [0; 8]).unwrap();
    assert!(memory.write(0, &[1]).is_err());
    // Nor does it help that somebody else maps it for writing.
    let _writable = Region::within(spec(&file, PAGE, PAGE, 0), Rights::ALL, &mut windows).unwrap();
    assert!(matches!(
        with(Rights::ALL, &mut windows),
        Err(MemoryError::Map(_))
    ));
    let none = Rights {
        read: false,
        write: false,
    };
    assert!(matches!(
        with(none, &mut windows),
        Err(MemoryError::BadRegion { .. })
    ));
}

#[test]
fn a_file_that_shrinks_is_seen_in_every_epoch_and_shared_no_more() {
    let file = memfd(16 * PAGE);
    let other = memfd(16 * PAGE);
    let (mut windows, empty) = (windows(), GuestMemory::empty());
    let old = add(&empty, spec(&file, 0, PAGE, 0), Rights::ALL, &mut windows);
    let memory = add(&old, spec(&file, PAGE, PAGE, 8 * PAGE), READ, &mut windows);
    let memory = add(
        &memory,
        spec(&other, 2 * PAGE, PAGE, 0),
        Rights::ALL,
        &mut windows,
    );
    assert!(!memory.is_poisoned() && !old.is_poisoned());
    file.set_len(0).unwrap();
    assert!(!memory.is_poisoned(), "nobody has touched it");
    memory.read(PAGE, &mut [0; 8]).unwrap();
    assert!(memory.is_poisoned() && memory.is_poisoned(), "and stays so");
    assert!(!old.is_poisoned(), "its own mapping is another one");
    old.write(0, &[1; 8]).unwrap();
    assert!(old.is_poisoned());
    // An epoch that is made later knows, too, unless what was concerned has gone.
    let later = add(
        &memory,
        spec(&other, 3 * PAGE, PAGE, 0),
        Rights::ALL,
        &mut windows,
    );
    assert!(later.is_poisoned());
    let less = later.without(PAGE).unwrap();
    assert!(less.is_poisoned(), "the other one is left");
    assert!(!less.without(0).unwrap().is_poisoned());
    assert!(!less.without_range(0, 0).is_poisoned());
    // A region that shares what was concerned before it came; and one of the same file, long enough again.
    let poisoned = later.regions().next().unwrap().clone();
    let clean = less.without(0).unwrap();
    assert!(!clean.is_poisoned());
    assert!(clean.with(poisoned).unwrap().is_poisoned());
    file.set_len(16 * PAGE).unwrap();
    let again = add(&clean, spec(&file, 0, PAGE, 0), Rights::ALL, &mut windows);
    again.write(0, &[1; 8]).unwrap();
    assert!(!again.is_poisoned());
}
