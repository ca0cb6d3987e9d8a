//! A front end that shrinks its file harms its own mapping, and nothing else. Alone in its process, as it
//! is about signals.
#![allow(unsafe_code)]

mod memfd;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bluff_memory::{GuestMemory, Mapping};
use bluff_testing::times;
use memfd::{memfd, region};

const PAGE: u64 = 4096;

#[test]
fn only_the_shrunk_mapping_is_poisoned() {
    for keep in [0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE] {
        let (one, two) = (memfd(8 * PAGE), memfd(8 * PAGE));
        let memory = GuestMemory::new(vec![
            region(&one, 0, 8 * PAGE, 0),
            region(&two, 8 * PAGE, 8 * PAGE, 0),
        ])
        .unwrap();
        let other = GuestMemory::new(vec![region(&two, 0, 8 * PAGE, 0)]).unwrap();
        memory.write(0, &[1; 16 * PAGE as usize]).unwrap();
        one.set_len(keep).unwrap();
        assert!(!memory.is_poisoned(), "nobody has touched it");
        let mut got = vec![9; 16 * PAGE as usize];
        memory.read(0, &mut got).unwrap();
        assert!(memory.is_poisoned());
        assert!(!other.is_poisoned());
        let gone = keep.next_multiple_of(PAGE) as usize;
        assert!(
            got[..keep as usize].iter().all(|b| *b == 1),
            "what is left is there"
        );
        assert!(
            got[gone..8 * PAGE as usize].iter().all(|b| *b == 0),
            "zeroes"
        );
        assert!(
            got[8 * PAGE as usize..].iter().all(|b| *b == 1),
            "the neighbour"
        );
        // It can be written, and goes nowhere.
        memory.write(0, &[2; 8 * PAGE as usize]).unwrap();
        assert!(one.metadata().unwrap().len() == keep);
        // A new epoch does not take the poisoned mapping over.
        one.set_len(8 * PAGE).unwrap();
        let next = bluff_memory::Region::new(memfd::spec(&one, 0, 8 * PAGE, 0), &memory).unwrap();
        let next = GuestMemory::new(vec![next]).unwrap();
        assert!(!next.is_poisoned());
        next.write(0, &[3; 8 * PAGE as usize]).unwrap();
        next.read(0, &mut got[..8 * PAGE as usize]).unwrap();
        assert!(got[..8 * PAGE as usize].iter().all(|b| *b == 3));
    }
}

/// Many threads touch it at the moment when it shrinks, while mappings come and go beside it.
#[test]
fn touched_by_many_threads_while_it_shrinks() {
    for _ in 0..times(30, 2000) {
        let file = memfd(64 * PAGE);
        let map = Arc::new(Mapping::new(file.try_clone().unwrap().into(), 0, 64 * PAGE).unwrap());
        let quit = Arc::new(AtomicBool::new(false));
        let beside = memfd(PAGE);
        std::thread::scope(|scope| {
            for t in 0..3 {
                let (map, quit) = (map.clone(), quit.clone());
                scope.spawn(move || {
                    let mut i = t * 17;
                    while !quit.load(Ordering::Relaxed) {
                        i = (i + 7) % 64;
                        // SAFETY: inside of the mapping.
                        unsafe {
                            let at = map.ptr().add(i * PAGE as usize);
                            at.write_volatile(at.read_volatile().wrapping_add(1));
                        }
                    }
                });
            }
            scope.spawn(|| {
                while !quit.load(Ordering::Relaxed) {
                    let m = Mapping::new(beside.try_clone().unwrap().into(), 0, PAGE).unwrap();
                    // SAFETY: inside of the mapping.
                    unsafe { m.ptr().write_volatile(1) };
                    assert!(!m.is_poisoned());
                }
            });
            file.set_len(0).unwrap();
            while !map.is_poisoned() {
                std::thread::yield_now();
            }
            quit.store(true, Ordering::Relaxed);
        });
    }
}

/// The slot of a poisoned mapping is used again by one that is not.
#[test]
fn poison_ends_with_its_mapping() {
    for _ in 0..times(10, 1000) {
        let file = memfd(PAGE);
        let map = Mapping::new(file.try_clone().unwrap().into(), 0, PAGE).unwrap();
        file.set_len(0).unwrap();
        // SAFETY: inside of the mapping.
        unsafe { map.ptr().write_volatile(1) };
        assert!(map.is_poisoned());
        drop(map);
        file.set_len(PAGE).unwrap();
        let map = Mapping::new(file.into(), 0, PAGE).unwrap();
        assert!(!map.is_poisoned());
    }
}

/// The kernel meets the hole: an error of that system call, no signal.
#[test]
fn the_kernel_gets_an_error_where_the_file_has_shrunk() {
    let (file, source) = (memfd(PAGE), memfd(PAGE));
    let map = Mapping::new(file.try_clone().unwrap().into(), 0, PAGE).unwrap();
    file.set_len(0).unwrap();
    use std::os::fd::AsRawFd;
    // SAFETY: the buffer is inside of the mapping.
    let n = unsafe { libc::pread(source.as_raw_fd(), map.ptr().cast(), 16, 0) };
    let e = std::io::Error::last_os_error();
    assert_eq!((n, e.raw_os_error()), (-1, Some(libc::EFAULT)));
}

/// A SIGBUS that is nobody's guest still ends the process, as it should.
#[test]
fn somebody_elses_fault_is_still_fatal() {
    use std::os::fd::AsRawFd;
    let guarded = memfd(PAGE);
    let _map = Mapping::new(guarded.into(), 0, PAGE).unwrap();
    let file = memfd(PAGE);
    // SAFETY: a new mapping, at an address of the kernel's choice.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            PAGE as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    assert_ne!(at, libc::MAP_FAILED);
    file.set_len(0).unwrap();
    // SAFETY: the child does nothing but touch the page whose file has gone, and exit.
    let status = unsafe {
        let child = libc::fork();
        assert!(child >= 0);
        if child == 0 {
            at.cast::<u8>().write_volatile(1);
            libc::_exit(0);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        status
    };
    assert!(libc::WIFSIGNALED(status), "it survived");
    assert_eq!(libc::WTERMSIG(status), libc::SIGBUS);
    // SAFETY: mapped above.
    unsafe { libc::munmap(at, PAGE as usize) };
}
