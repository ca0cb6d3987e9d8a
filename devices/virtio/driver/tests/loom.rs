//! The driver and the ideal device under every interleaving and every stale value that C11 allows, on tiny rings.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p bluff-virtio-driver --test loom --release`
#![cfg(loom)]

use std::sync::Arc;

use bluff_virtio_driver::{
    Buffer, Config, DriverQueue, Features, IdealConfig, IdealDevice, Memory, PackedDriver,
    SplitDriver,
};
use loom::sync::atomic::Ordering;
use loom::thread;

const BASE: u64 = 0x1000;
const LEN: u64 = 512;

fn pair(event_idx: bool) -> (Arc<Memory>, SplitDriver, IdealDevice) {
    let memory = Memory::flat(BASE, LEN).expect("memory");
    let features = Features {
        event_idx,
        ..Features::default()
    };
    let driver = SplitDriver::new(&memory, &Config::new(2, features)).expect("driver");
    let config = IdealConfig {
        guest: (BASE, LEN),
        layout: driver.layout(),
        size: 2,
        event_idx,
        start: 0,
    };
    let device = IdealDevice::new(&memory, &config).expect("device");
    (memory, driver, device)
}

/// A request in memory: header (with that sector) and status.
fn request(memory: &Arc<Memory>, sector: u64) -> ([Buffer; 2], u64) {
    let addr = memory.alloc(18, 16).expect("room");
    let span = memory.span(addr, 18).expect("inside");
    span.write_u64(8, sector);
    span.write_u8(16, 0xff);
    (
        [Buffer::readable(addr, 16), Buffer::writable(addr + 16, 1)],
        addr,
    )
}

/// Descriptors, entries, header and status are handed over without a race, twice through the same descriptors: loom
/// fails the test if a release or an acquire is missing on either way.
#[test]
fn split_publication() {
    loom::model(|| {
        let (memory, mut driver, mut device) = pair(false);
        let (chain, addr) = request(&memory, 5);
        driver.add(&chain, false, 1).expect("room");
        driver.publish();
        let device = thread::spawn(move || {
            let mut served = 0;
            while served < 2 {
                served += device.poll();
                thread::yield_now();
            }
            device.sectors()
        });
        let span = memory.span(addr, 18).expect("inside");
        for token in 1..=2 {
            let used = loop {
                match driver.pop_used().expect("the device breaks no rule") {
                    Some(used) => break used,
                    None => thread::yield_now(),
                }
            };
            assert_eq!(used.token, token);
            assert_eq!(span.read_u8(16), 0, "the status came with the used entry");
            if token == 1 {
                // The same descriptors and the same bytes again: the device must be done with them.
                span.write_u64(8, 7);
                span.write_u8(16, 0xff);
                driver.add(&chain, false, 2).expect("room");
                driver.publish();
            }
        }
        assert_eq!(device.join().expect("no panic"), 12);
    });
}

/// The driver publishes while the device arms: the kick comes, or the device sees the chain. Never neither.
fn split_no_lost_kick(event_idx: bool) {
    loom::model(move || {
        let (memory, mut driver, mut device) = pair(event_idx);
        device.disarm();
        let (chain, _) = request(&memory, 5);
        let device = thread::spawn(move || device.arm());
        driver.add(&chain, false, 1).expect("room");
        let kick = driver.publish();
        let seen = device.join().expect("no panic");
        assert!(kick || seen, "the device sleeps and nobody wakes it");
    });
}

#[test]
fn split_no_lost_kick_by_flag() {
    split_no_lost_kick(false);
}

#[test]
fn split_no_lost_kick_by_event() {
    split_no_lost_kick(true);
}

/// The device publishes while the driver arms: the interrupt comes, or the driver sees the entry.
fn split_no_lost_interrupt(event_idx: bool) {
    loom::model(move || {
        let (memory, mut driver, mut device) = pair(event_idx);
        driver.disable_interrupts();
        let (chain, _) = request(&memory, 5);
        driver.add(&chain, false, 1).expect("room");
        driver.publish();
        let device = thread::spawn(move || {
            assert_eq!(device.poll(), 1, "published before the thread began");
            device.wants_interrupt()
        });
        let seen = driver.enable_interrupts();
        let interrupt = device.join().expect("no panic");
        assert!(interrupt || seen, "the driver sleeps and nobody wakes it");
    });
}

#[test]
fn split_no_lost_interrupt_by_flag() {
    split_no_lost_interrupt(false);
}

#[test]
fn split_no_lost_interrupt_by_event() {
    split_no_lost_interrupt(true);
}

/// A packed ring of two, its device written out here: AVAIL and USED are bits 7 and 15.
fn packed(event_idx: bool) -> (Arc<Memory>, PackedDriver) {
    let memory = Memory::flat(BASE, LEN).expect("memory");
    let features = Features {
        event_idx,
        ..Features::default()
    };
    let driver = PackedDriver::new(&memory, &Config::new(2, features)).expect("driver");
    (memory, driver)
}

/// Two chains in one batch, then a third: the release of the first flags covers the whole batch.
#[test]
fn packed_publication() {
    loom::model(|| {
        let (memory, mut driver) = packed(false);
        let ring = memory
            .span(driver.layout().descriptors, 32)
            .expect("inside");
        let (_, addr) = request(&memory, 5);
        let device_memory = memory.clone();
        let device = thread::spawn(move || {
            let guest = device_memory.span(BASE, LEN).expect("inside");
            for at in [0, 16] {
                while ring.load_u16(at + 14, Ordering::Acquire) & 0x8080 != 0x80 {
                    thread::yield_now();
                }
                let (header, id) = ((ring.read_u64(at) - BASE) as usize, ring.read_u16(at + 12));
                assert_eq!(guest.read_u64(header + 8), 5);
                guest.write_u64(header, 9);
                ring.write_u16(at + 12, id);
                ring.write_u32(at + 8, 8);
                ring.store_u16(at + 14, 0x8082, Ordering::Release);
            }
        });
        let writable = |addr| Buffer::writable(addr, 16);
        let (_, other) = request(&memory, 5);
        driver.add(&[writable(addr)], false, 1).expect("room");
        driver.add(&[writable(other)], false, 2).expect("room");
        driver.publish();
        for (token, addr) in [(1, addr), (2, other)] {
            let used = loop {
                match driver.pop_used().expect("the device breaks no rule") {
                    Some(used) => break used,
                    None => thread::yield_now(),
                }
            };
            assert_eq!((used.token, used.written), (token, 8));
            assert_eq!(memory.span(addr, 18).expect("inside").read_u64(0), 9);
        }
        device.join().expect("no panic");
    });
}

#[test]
fn packed_no_lost_kick() {
    for event_idx in [false, true] {
        loom::model(move || {
            let (memory, mut driver) = packed(event_idx);
            let layout = driver.layout();
            let event = memory.span(layout.device, 4).expect("inside");
            event.store_u16(2, 1, Ordering::Relaxed);
            let ring = memory.span(layout.descriptors, 32).expect("inside");
            let device = thread::spawn(move || {
                if event_idx {
                    event.store_u16(0, 0x8000, Ordering::Relaxed);
                    event.store_u16(2, 2, Ordering::Release);
                } else {
                    event.store_u16(2, 0, Ordering::Relaxed);
                }
                loom::sync::atomic::fence(Ordering::SeqCst);
                ring.load_u16(14, Ordering::Relaxed) & 0x8080 == 0x80
            });
            driver
                .add(&[Buffer::readable(BASE, 16)], false, 1)
                .expect("room");
            let kick = driver.publish();
            assert!(
                kick || device.join().expect("no panic"),
                "the device sleeps and nobody wakes it"
            );
        });
    }
}

#[test]
fn packed_no_lost_interrupt() {
    for event_idx in [false, true] {
        loom::model(move || {
            let (memory, mut driver) = packed(event_idx);
            let layout = driver.layout();
            driver.disable_interrupts();
            driver
                .add(&[Buffer::readable(BASE, 16)], false, 1)
                .expect("room");
            driver.publish();
            let event = memory.span(layout.driver, 4).expect("inside");
            let ring = memory.span(layout.descriptors, 32).expect("inside");
            let device = thread::spawn(move || {
                ring.store_u16(14, 0x8080, Ordering::Release);
                loom::sync::atomic::fence(Ordering::SeqCst);
                match event.load_u16(2, Ordering::Acquire) {
                    0 => true,
                    1 => false,
                    _ => event.load_u16(0, Ordering::Relaxed) == 0x8000,
                }
            });
            let seen = driver.enable_interrupts();
            assert!(
                seen || device.join().expect("no panic"),
                "the driver sleeps and nobody wakes it"
            );
        });
    }
}

/// The model itself: a handshake without a release is found. Without this, silence would prove nothing.
#[test]
#[should_panic]
fn a_missing_release_is_found() {
    loom::model(|| {
        let memory = Memory::flat(BASE, 8).expect("memory");
        let span = memory.span(BASE, 8).expect("inside");
        let other = span.clone();
        let reader = thread::spawn(move || {
            if other.load_u16(0, Ordering::Acquire) == 1 {
                assert_eq!(other.read_u16(2), 7);
            }
        });
        span.write_u16(2, 7);
        span.store_u16(0, 1, Ordering::Relaxed);
        reader.join().expect("no panic");
    });
}
