//! Memory and bus mastering: what the device may reach, and when that is over.

use std::time::Duration;

use bluff_memory::GuestMemory;
use bluff_pci::{PciFunction, Region, Written};

use crate::rig::{BOUND, COMMAND, Call, Count, DEVICE_STATUS, MASTER, MEMORY, PMCSR, Rig, memory};

const PENDING: u16 = 1 << 5;

#[test]
fn memory_needs_a_bus_master() {
    let mut rig = Rig::new();
    let count = Count::default();
    rig.function.set_memory(memory(), BOUND, count.done());
    assert_eq!(count.get(), 1);
    assert_eq!(rig.seen.take(), [Call::DmaOff(BOUND)]);
    rig.set_u16(COMMAND, MASTER);
    assert_eq!(rig.seen.take(), [Call::DmaOn(1)]);
    // Memory space is nothing to the device, and the same again is not either.
    rig.set_u16(COMMAND, MASTER | MEMORY);
    rig.set_u16(COMMAND, MASTER | MEMORY);
    assert!(rig.seen.take().is_empty());
    rig.function
        .set_memory(GuestMemory::empty(), BOUND, count.done());
    assert_eq!(rig.seen.take(), [Call::DmaOn(0)]);
    rig.set_u16(COMMAND, MEMORY);
    assert_eq!(rig.seen.take(), [Call::DmaOff(BOUND)]);
}

#[test]
fn the_end_of_bus_mastering_is_waited_for() {
    for (at, off, on) in [(COMMAND, MEMORY, MEMORY | MASTER), (PMCSR, 3, 0)] {
        let mut rig = Rig::running();
        rig.function.set_memory(memory(), BOUND, Box::new(|| {}));
        rig.seen.take();
        *rig.seen.late.lock().unwrap() = true;
        let written = rig.write(Region::Config, at, &u16::to_le_bytes(off));
        assert_eq!(written, Written::Unsettled);
        assert_eq!(rig.u16(DEVICE_STATUS) & PENDING, PENDING);
        let count = Count::default();
        rig.function.settle(BOUND, count.done());
        assert_eq!(rig.seen.take(), [Call::DmaOff(BOUND)]);
        // Memory that goes meanwhile is waited for in its own right.
        rig.function
            .set_memory(GuestMemory::empty(), Duration::ZERO, count.done());
        assert_eq!(rig.seen.take(), [Call::DmaOff(Duration::ZERO)]);
        assert_eq!(count.get(), 0);
        assert_eq!(rig.u16(DEVICE_STATUS) & PENDING, PENDING);
        rig.seen.finish();
        assert_eq!(count.get(), 2);
        assert_eq!(rig.u16(DEVICE_STATUS) & PENDING, 0);
        rig.set_u16(at, on);
        assert_eq!(rig.seen.take(), [Call::DmaOn(0)]);
    }
}

#[test]
fn memory_that_goes_is_waited_for() {
    let mut rig = Rig::running();
    *rig.seen.late.lock().unwrap() = true;
    let count = Count::default();
    rig.function.set_memory(memory(), BOUND, count.done());
    assert_eq!((rig.seen.take(), count.get()), (vec![Call::DmaOn(1)], 0));
    rig.seen.finish();
    assert_eq!(count.get(), 1);
}

#[test]
fn the_device_says_what_is_in_flight() {
    let mut rig = Rig::running();
    assert_eq!(rig.u16(DEVICE_STATUS), 0);
    *rig.seen.busy.lock().unwrap() = true;
    assert_eq!(rig.u16(DEVICE_STATUS), PENDING);
    // It cannot be cleared by software.
    rig.set_u16(DEVICE_STATUS, 0xffff);
    assert_eq!(rig.u16(DEVICE_STATUS), PENDING);
    assert_eq!(
        rig.read::<1>(Region::Config, DEVICE_STATUS),
        [PENDING as u8]
    );
    assert_eq!(rig.read::<1>(Region::Config, DEVICE_STATUS + 1), [0]);
}

#[test]
fn settling_what_is_settled() {
    let mut rig = Rig::running();
    assert_eq!(rig.settle(), 1);
    assert!(rig.seen.take().is_empty());
}
