//! Regions, bounds, the allocator, and writes that race.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};

use bluff_virtio_driver::{Memory, MemoryError, RegionConfig};

use crate::{BASE, StopOnDrop, guest};

const PAGE: u64 = 4096;

#[test]
fn adjoining_regions_are_one_to_the_guest_and_two_to_us() {
    let memory = Memory::new(&[
        RegionConfig {
            guest_addr: BASE + PAGE,
            size: PAGE,
            file_offset: PAGE,
        },
        RegionConfig {
            guest_addr: BASE,
            size: PAGE,
            file_offset: 0,
        },
    ])
    .expect("memory");
    let [first, second] = memory.regions() else {
        panic!("two regions")
    };
    assert!(first.config().guest_addr < second.config().guest_addr);
    assert!(first.user_addr().abs_diff(second.user_addr()) > PAGE);

    let pattern: Vec<u8> = (0..=255).collect();
    memory
        .write(BASE + PAGE - 100, &pattern)
        .expect("crosses the border");
    let mut back = vec![0; 256];
    memory
        .read(BASE + PAGE - 100, &mut back)
        .expect("crosses the border");
    assert_eq!(pattern, back);
    memory
        .write_u64(BASE + PAGE - 3, 0x0102_0304_0506_0708)
        .expect("crosses the border");
    assert_eq!(
        memory.read_u64(BASE + PAGE - 3).expect("crosses"),
        0x0102_0304_0506_0708
    );
    assert_eq!(memory.read_u8(BASE + PAGE).expect("second region"), 0x05);

    assert!(memory.span(BASE + PAGE - 8, 8).is_ok());
    assert!(matches!(
        memory.span(BASE + PAGE - 8, 9),
        Err(MemoryError::OutOfBounds { .. })
    ));
    assert!(memory.span(BASE + PAGE, PAGE).is_ok());
}

#[test]
fn what_is_outside_is_refused_and_nothing_is_written() {
    let memory = guest(PAGE);
    for (addr, len) in [
        (BASE - 1, 1),
        (BASE + PAGE, 1),
        (BASE + PAGE - 4, 8),
        (u64::MAX - 3, 8),
        (BASE - 4, 8),
    ] {
        assert!(
            memory.write(addr, &vec![0xff; len]).is_err(),
            "{addr:#x} {len}"
        );
        assert!(
            memory.read(addr, &mut vec![0; len]).is_err(),
            "{addr:#x} {len}"
        );
    }
    assert_eq!(memory.read_u32(BASE + PAGE - 4).expect("inside"), 0);
    let bad = |guest_addr, size| {
        Memory::new(&[RegionConfig {
            guest_addr,
            size,
            file_offset: 0,
        }])
        .is_err()
    };
    assert!(bad(BASE, 0) && bad(BASE + 1, PAGE) && bad(BASE, 100) && bad(u64::MAX - 4095, PAGE));
    let at = |guest_addr| RegionConfig {
        guest_addr,
        size: 2 * PAGE,
        file_offset: 0,
    };
    assert!(matches!(
        Memory::new(&[at(BASE), at(BASE + PAGE)]),
        Err(MemoryError::BadRegion(_))
    ));
}

#[test]
fn allocations_are_aligned_and_disjoint_from_any_thread() {
    let memory = guest(64 * PAGE);
    let mut ranges: Vec<(u64, u64)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let sizes = [(1, 1), (16, 16), (100, 128), (64, 4096)];
                    sizes.map(|(len, align)| {
                        let addr = memory.alloc(len, align).expect("room");
                        assert_eq!(addr % align, 0);
                        (addr, len)
                    })
                })
            })
            .collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().expect("no panic"))
            .collect()
    });
    ranges.sort_unstable();
    assert!(
        ranges
            .windows(2)
            .all(|pair| pair[0].0 + pair[0].1 <= pair[1].0)
    );
    assert!(matches!(
        memory.alloc(64 * PAGE, 1),
        Err(MemoryError::Exhausted(_))
    ));
    assert!(matches!(
        memory.alloc(u64::MAX, 1),
        Err(MemoryError::Exhausted(_))
    ));
}

#[test]
fn another_mapping_of_the_file_shows_the_same_bytes() {
    use std::os::unix::fs::FileExt;
    let region = RegionConfig {
        guest_addr: BASE,
        size: PAGE,
        file_offset: 2 * PAGE,
    };
    let memory = Memory::new(&[region]).expect("memory");
    let file = std::fs::File::from(
        memory.regions()[0]
            .as_fd()
            .try_clone_to_owned()
            .expect("dup"),
    );
    memory.write(BASE + 5, b"seen").expect("inside");
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, 2 * PAGE + 5)
        .expect("the file has the region");
    assert_eq!(&bytes, b"seen");
    file.write_all_at(b"back", 2 * PAGE + 7).expect("shared");
    assert_eq!(
        memory.read_u32(BASE + 7).expect("inside"),
        u32::from_le_bytes(*b"back")
    );
}

#[test]
fn a_thread_scribbles_while_another_reads() {
    let memory = guest(PAGE);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stopper = StopOnDrop(&stop);
        scope.spawn(|| {
            let mut byte = 0_u8;
            while !stop.load(Ordering::Relaxed) {
                byte = byte.wrapping_add(1);
                let value = u64::from(byte) * 0x0101_0101_0101_0101;
                memory.write(BASE, &value.to_le_bytes()).expect("inside");
            }
        });
        for _ in 0..100_000 {
            let word = memory.read_u64(BASE).expect("inside");
            assert_eq!(
                word,
                u64::from(word as u8) * 0x0101_0101_0101_0101,
                "aligned words are never torn"
            );
        }
        drop(stopper);
    });
}
