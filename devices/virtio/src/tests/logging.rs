//! A front end that copies what is marked at every step of a publication misses nothing: marks come after
//! what they stand for.

use std::cell::RefCell;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;

use bluff_memory::{DirtyLog, LOG_PAGE};
use bluff_testing::{Chance, times};
use bluff_virtio_driver::Memory;

use super::rig::{BASE, Device, ROOM, ROOMS, Shape, World};
use crate::QueueLog;
use crate::inflight::steps;

const LEN: u64 = 1 << 20;

/// The front end: a log, and a copy of the guest.
struct Copy {
    log: Arc<Memory>,
    guest: Arc<Memory>,
    bytes: Vec<u8>,
}

impl Copy {
    fn page(&mut self, addr: u64) {
        let to = &mut self.bytes[(addr - BASE) as usize..][..LOG_PAGE as usize];
        self.guest.read(addr, to).unwrap();
    }

    /// Clears the marks first, then copies.
    fn pass(&mut self) {
        for byte in 0..(BASE + LEN) / LOG_PAGE / 8 {
            let bits = self.log.read_u8(byte).unwrap();
            self.log.write_u8(byte, 0).unwrap();
            for bit in (0..8).filter(|b| bits & 1 << b != 0) {
                self.page((byte * 8 + bit) * LOG_PAGE);
            }
        }
    }

    fn same(&self, addr: u64, len: u64) {
        let mut now = vec![0; len as usize];
        self.guest.read(addr, &mut now).unwrap();
        let then = &self.bytes[(addr - BASE) as usize..][..len as usize];
        assert_eq!(now, then, "a write at {addr:#x} is lost");
    }
}

fn migrate(packed: bool, seed: u64) {
    let mut chance = Chance::new(seed);
    let mut world = World::new(Shape {
        packed,
        in_order: false,
        size: 16,
    });
    let log = Memory::flat(0, LOG_PAGE).unwrap();
    let file = log.regions()[0].as_fd().try_clone_to_owned().unwrap();
    let layout = world.driver.layout();
    world.log = Some(QueueLog {
        log: Arc::new(DirtyLog::new(file, 0, LOG_PAGE).unwrap()),
        used: Some(layout.device),
    });
    let mut copy = Copy {
        log,
        guest: world.memory.clone(),
        bytes: vec![0; LEN as usize],
    };
    for page in (BASE..BASE + LEN).step_by(LOG_PAGE as usize) {
        copy.page(page);
    }
    let copy = Rc::new(RefCell::new(copy));
    let theirs = copy.clone();
    steps::watch(Some(Box::new(move || theirs.borrow_mut().pass())));
    let mut device = Device::new(world.open().unwrap());
    let mut done = 0;
    // Few turns: every one of them can be the last before the switch.
    for _ in 0..1 + chance.below(12) {
        // Not last: its marks would hide a missing one.
        if chance.percent(30) {
            device.sleep();
        }
        let n = 1 + chance.below(4);
        world.submit(&mut chance, n);
        device.take(&mut world, n).unwrap();
        let n = 1 + chance.below(4);
        device.finish(&mut chance, n);
        copy.borrow_mut().pass();
        done += world.reap();
    }
    steps::watch(None);
    let mut copy = copy.borrow_mut();
    copy.pass();
    assert!(done > 0 && done < ROOMS);
    for token in (0..done).filter(|t| !world.waiting.contains_key(t)) {
        copy.same(world.data + ROOM * token + 32, 2);
    }
    match packed {
        false => copy.same(layout.device, 6 + 8 * 16),
        true => {
            copy.same(layout.device, 4);
            for slot in 0..16 {
                let at = layout.descriptors + 16 * slot;
                let flags = world.memory.read_u16(at + 14).unwrap();
                // Used: both bits are the same. The rest is the driver's, which logs for itself.
                if (flags >> 7 ^ flags >> 15) & 1 == 0 && flags != 0 {
                    copy.same(at, 16);
                }
            }
        }
    }
}

#[test]
fn split_marks_come_after_what_was_written() {
    for seed in 0..times(200, 10_000) {
        migrate(false, seed);
    }
}

#[test]
fn packed_marks_come_after_what_was_written() {
    for seed in 0..times(200, 10_000) {
        migrate(true, seed);
    }
}
