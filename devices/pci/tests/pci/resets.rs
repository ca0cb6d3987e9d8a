//! Resets, in all their forms.

use bluff_pci::{Interrupt, PciFunction, Region, Written};
use bluff_reactor::Notice;

use crate::rig::{
    ALL_MASKED, BOUND, COMMAND, Call, Count, DEVICE_CONTROL, DEVICE_STATUS, ENABLE, FLR, INTX_OFF,
    MASTER, MEMORY, MSIX_CONTROL, PCIE, PENDING, PMCSR, Rig, TABLE, heard, memory, space,
};

const V: Interrupt = Interrupt::Msix(1);
const CONTROL: u64 = TABLE + 16 + 12;

/// A function in which everything that a host can set is set.
fn used() -> Rig {
    used_of(Rig::new())
}

fn used_of(mut rig: Rig) -> Rig {
    rig.function.set_memory(memory(), BOUND, Box::new(|| {}));
    rig.set_u16(COMMAND, MEMORY | MASTER | INTX_OFF);
    rig.set_u32(0x10, 0xfe00_0000);
    rig.set_u32(0x14, 1);
    rig.set(0x3c, &[5]);
    rig.set_u16(MSIX_CONTROL, ENABLE | ALL_MASKED);
    rig.bar_set_u32(0, TABLE + 16, 0xfee0_0000);
    rig.bar_set_u32(0, CONTROL, 1);
    rig.set_u16(DEVICE_CONTROL, 0x202f);
    rig.set_u16(PCIE + 0x10, 0x40);
    rig.bar_set_u32(0, 0x20, 1);
    let _ = rig.vector(1).signal();
    let _ = rig.intx().assert();
    rig.seen.take();
    rig
}

fn is_fresh(rig: &mut Rig, flr: bool) {
    let mut fresh = Rig::new();
    let mut want = fresh.read::<4096>(Region::Config, 0);
    if flr {
        // What belongs to the link stays (PCIe §6.6.2): the payload, and the common clock.
        want[DEVICE_CONTROL as usize] = 0x30;
        want[PCIE as usize + 0x10] = 0x40;
    }
    let is = rig.read::<4096>(Region::Config, 0);
    let differs = is.iter().zip(&want).position(|(a, b)| a != b);
    assert_eq!(differs, None);
    assert!(!rig.vector(1).is_pending());
    assert!(!rig.intx().is_asserted());
    rig.set_u16(COMMAND, MEMORY);
    assert_eq!(rig.bar_u32(0, 0x20), 0);
    assert_eq!(rig.bar_u32(0, TABLE + 16), 0);
    assert_eq!(rig.bar_u32(0, CONTROL), 1);
    assert_eq!(rig.bar_u32(0, PENDING), 0);
}

#[test]
fn a_function_level_reset_lasts_as_long_as_its_write() {
    // As a word, as a byte alone, and within a large write.
    let before: [u8; 4096] = used().read(Region::Config, 0);
    let mut large = before[..256].to_vec();
    large[DEVICE_CONTROL as usize + 1] |= 0x80;
    let writes: [(u64, &[u8]); 3] = [
        (DEVICE_CONTROL, &(FLR | 0x202f).to_le_bytes()),
        (DEVICE_CONTROL + 1, &[0x80]),
        (0, &large),
    ];
    for (at, bytes) in writes {
        let mut rig = used();
        *rig.seen.late.lock().unwrap() = true;
        let written = rig.write(Region::Config, at, bytes);
        assert_eq!(written, Written::Unsettled);
        let count = Count::default();
        rig.function.settle(BOUND, count.done());
        assert_eq!(rig.seen.take(), [Call::Reset(BOUND)]);
        assert_eq!(count.get(), 0);
        // Nothing is heard meanwhile, and BARs do not answer.
        rig.set_u16(COMMAND, MEMORY | MASTER);
        rig.set_u32(0x10, 0xfd00_0000);
        assert_eq!(rig.u16(COMMAND), 0);
        assert_eq!(rig.bar_u32(0, 0x20), u32::MAX);
        rig.bar_set_u32(0, 0x20, 1);
        rig.bar_set_u32(0, CONTROL, 0);
        assert_eq!(rig.u16(DEVICE_STATUS), 1 << 5);
        rig.seen.finish();
        assert_eq!(count.get(), 1);
        assert!(rig.seen.take().is_empty());
        is_fresh(&mut rig, true);
        // The memory is still there for the next driver.
        rig.set_u16(COMMAND, MASTER);
        assert_eq!(rig.seen.take(), [Call::DmaOn(1)]);
    }
}

#[test]
fn the_bit_reads_as_zero_and_zero_does_nothing() {
    let mut rig = used();
    rig.set_u16(DEVICE_CONTROL, !FLR);
    assert_eq!(rig.u16(DEVICE_CONTROL), 0x79ff);
    assert!(rig.seen.take().is_empty());
    rig.set_u16(DEVICE_CONTROL, FLR);
    assert_eq!(rig.u16(DEVICE_CONTROL) & FLR, 0);
    assert_eq!(rig.seen.take(), [Call::Reset(BOUND)]);
}

/// Between the write and its settling, too, nothing answers.
#[test]
fn a_reset_that_is_owed() {
    let mut rig = used();
    let written = rig.write(Region::Config, DEVICE_CONTROL + 1, &[0x80]);
    assert_eq!(written, Written::Unsettled);
    rig.bar_set_u32(0, 0x20, 7);
    assert_eq!(rig.bar_u32(0, 0x20), u32::MAX);
    assert!(rig.seen.take().is_empty());
    assert_eq!(rig.settle(), 1);
    is_fresh(&mut rig, true);
}

#[test]
fn a_conventional_reset() {
    let mut rig = used();
    *rig.seen.late.lock().unwrap() = true;
    let count = Count::default();
    rig.function.reset(BOUND, count.done());
    // A second one ends with the first.
    rig.function.reset(BOUND, count.done());
    assert_eq!(
        (rig.seen.take(), count.get()),
        (vec![Call::Reset(BOUND)], 0)
    );
    rig.seen.finish();
    assert_eq!(count.get(), 2);
    is_fresh(&mut rig, false);
}

/// What the attachment has set stays, and what was signalled before is forgotten.
#[test]
fn interrupts_over_a_reset() {
    let mut rig = used();
    let event = rig.connect(V);
    let intx = rig.connect(Interrupt::Intx);
    assert_eq!((heard(&event), heard(&intx)), (0, 0), "masked by the host");
    *rig.seen.late.lock().unwrap() = true;
    rig.function.reset(BOUND, Box::new(|| {}));
    assert_eq!((heard(&event), heard(&intx)), (0, 0));
    // A worker that has not heard of it yet.
    assert_eq!(rig.vector(1).signal(), None);
    assert_eq!(rig.intx().assert(), None);
    rig.seen.finish();
    *rig.seen.late.lock().unwrap() = false;
    rig.set_u16(COMMAND, MASTER);
    assert_eq!((heard(&event), heard(&intx)), (0, 0));
    assert_eq!(rig.vector(1).signal(), Some(Notice::Given));
    assert_eq!(rig.intx().assert(), Some(Notice::Given));
    assert_eq!((heard(&event), heard(&intx)), (1, 1));
    // INTx that was given and not unmasked is forgotten as well.
    rig.function.reset(BOUND, Box::new(|| {}));
    assert_eq!(rig.intx().assert(), Some(Notice::Given));
    // The attachment's own masks stay.
    rig.function.mask_interrupt(V, true).unwrap();
    rig.function.reset(BOUND, Box::new(|| {}));
    rig.set_u16(COMMAND, MASTER);
    assert_eq!(rig.vector(1).signal(), None);
}

#[test]
fn a_host_that_goes_leaves_nothing() {
    let mut rig = used();
    let events = [rig.connect(V), rig.connect(Interrupt::Intx)];
    rig.function.mask_interrupt(V, true).unwrap();
    let count = Count::default();
    rig.function.detach(BOUND, count.done());
    assert_eq!(
        (rig.seen.take(), count.get()),
        (vec![Call::Reset(BOUND)], 1)
    );
    is_fresh(&mut rig, false);
    rig.set_u16(COMMAND, MASTER);
    assert_eq!(rig.seen.take(), [Call::DmaOn(0)]);
    let _ = rig.vector(1).signal();
    let _ = rig.intx().assert();
    assert_eq!(events.each_ref().map(heard), [0, 0]);
    // The next one: neither a mask nor anything else of the one before.
    assert_eq!(heard(&rig.connect(V)), 1);
}

#[test]
fn a_host_that_goes_in_the_middle_of_a_reset() {
    let mut rig = used();
    *rig.seen.late.lock().unwrap() = true;
    let count = Count::default();
    rig.function.reset(BOUND, count.done());
    rig.function.detach(BOUND, count.done());
    assert_eq!(rig.seen.take(), [Call::Reset(BOUND)]);
    rig.seen.finish();
    assert_eq!(count.get(), 2);
    is_fresh(&mut rig, false);
}

#[test]
fn back_from_d3() {
    // With No_Soft_Reset everything is as it was, and DMA goes on.
    let mut rig = used();
    rig.set_u16(PMCSR, 3);
    assert_eq!(rig.seen.take(), [Call::DmaOff(BOUND)]);
    rig.set_u16(PMCSR, 0);
    assert_eq!(rig.seen.take(), [Call::DmaOn(1)]);
    assert_eq!(rig.u32(0x10), 0xfe00_0004);
    assert_eq!(rig.bar_u32(0, 0x20), 1);
    // Without it, it is a reset.
    let mut rig = used_of(Rig::of(space(false)));
    assert_eq!(rig.u16(PMCSR), 0);
    rig.set_u16(PMCSR, 3);
    assert_eq!(rig.u32(0x10), 0xfe00_0004);
    rig.seen.take();
    let written = rig.write(Region::Config, PMCSR, &[0]);
    assert_eq!(written, Written::Unsettled);
    assert_eq!(rig.settle(), 1);
    assert_eq!(rig.seen.take(), [Call::Reset(BOUND)]);
    assert_eq!(rig.u32(0x10), 4);
    assert_eq!(rig.u16(COMMAND), 0);
    // D0 to D0 is not.
    rig.set_u16(PMCSR, 0);
    assert!(rig.seen.take().is_empty());
}

/// "the data is discarded and no state change occurs" (PCIe §7.5.2.2).
#[test]
fn power_states_that_are_not_there() {
    let mut rig = used();
    for state in [1, 2] {
        rig.set_u16(PMCSR, state);
        assert_eq!(rig.u16(PMCSR), 8);
    }
    rig.set_u16(PMCSR, 3);
    for state in [1, 2] {
        rig.set_u16(PMCSR, state);
        assert_eq!(rig.u16(PMCSR), 3 | 8);
    }
}
