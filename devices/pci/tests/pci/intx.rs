//! The legacy interrupt.

use bluff_pci::{ConfigSpace, Error, Interrupt, PciEvent, PciFunction};
use bluff_reactor::{Notice, Notifier};
use vmm_sys_util::eventfd::EventFd;

use crate::rig::{COMMAND, ENABLE, IDENTITY, INTX_OFF, MEMORY, MSIX_CONTROL, PMCSR, Rig, heard};

const INTX: Interrupt = Interrupt::Intx;
const STATUS: u64 = 6;
const ASSERTED: u16 = 8;

#[test]
fn it_is_a_level() {
    let mut rig = Rig::running();
    let event = rig.connect(INTX);
    assert_eq!(rig.u16(STATUS) & ASSERTED, 0);
    assert_eq!(rig.intx().assert(), Some(Notice::Given));
    assert_eq!(rig.u16(STATUS) & ASSERTED, ASSERTED);
    // Masked by that it was given, until the host has seen to it.
    assert_eq!(rig.intx().assert(), None);
    assert_eq!(heard(&event), 1);
    rig.function.mask_interrupt(INTX, false).unwrap();
    assert_eq!(heard(&event), 1, "still asserted");
    rig.intx().deassert();
    assert_eq!(rig.u16(STATUS) & ASSERTED, 0);
    rig.function.mask_interrupt(INTX, false).unwrap();
    assert_eq!(heard(&event), 0);
    assert_eq!(rig.intx().assert(), Some(Notice::Given));
    assert_eq!(heard(&event), 1);
}

#[test]
fn a_mask_of_the_attachments() {
    let mut rig = Rig::running();
    let event = rig.connect(INTX);
    rig.function.mask_interrupt(INTX, true).unwrap();
    assert_eq!(rig.intx().assert(), None);
    assert_eq!(heard(&event), 0);
    rig.function.mask_interrupt(INTX, false).unwrap();
    assert_eq!(heard(&event), 1);
    // Another descriptor begins anew.
    let other = rig.connect(INTX);
    assert_eq!((heard(&event), heard(&other)), (0, 1));
}

#[test]
fn who_disables_it() {
    for (at, off, on) in [
        (COMMAND, MEMORY | INTX_OFF, MEMORY),
        (MSIX_CONTROL, ENABLE, 0),
        (PMCSR, 3, 0),
    ] {
        let mut rig = Rig::new();
        let event = rig.connect(INTX);
        rig.set_u16(at, off);
        assert_eq!(rig.intx().assert(), None, "{at:#x}");
        assert_eq!(heard(&event), 0);
        // The status says so all the same (PCIe §7.5.1.1.4).
        assert_eq!(rig.u16(STATUS) & ASSERTED, ASSERTED);
        rig.set_u16(at, on);
        assert_eq!(heard(&event), 1, "{at:#x}: asserted still");
    }
}

/// It is no request to memory, so it does not ask for a bus master (PCIe §7.5.1.1.3).
#[test]
fn it_needs_no_bus_master() {
    let mut rig = Rig::new();
    let event = rig.connect(INTX);
    assert_eq!(rig.intx().assert(), Some(Notice::Given));
    assert_eq!(heard(&event), 1);
}

#[test]
fn a_test_of_the_way() {
    let mut rig = Rig::new();
    let event = rig.connect(INTX);
    rig.function.trigger_interrupt(INTX).unwrap();
    assert_eq!(heard(&event), 1);
    assert!(!rig.intx().is_asserted());
    rig.function.trigger_interrupt(INTX).unwrap();
    assert_eq!(heard(&event), 0, "masked since it was given");
    rig.function.mask_interrupt(INTX, false).unwrap();
    assert_eq!(heard(&event), 0, "and not asserted");
}

#[test]
fn a_descriptor_that_blocks() {
    let mut rig = Rig::new();
    let event = EventFd::new(0).unwrap();
    event.write(u64::MAX - 1).unwrap();
    let notifier = Notifier::new(event.try_clone().unwrap()).unwrap();
    rig.function.set_interrupt(INTX, Some(notifier)).unwrap();
    assert_eq!(rig.intx().assert(), Some(Notice::Hung));
    assert_eq!(*rig.events.lock().unwrap(), [PciEvent::NotifierHung(INTX)]);
}

#[test]
fn a_function_without() {
    let mut rig = Rig::of(ConfigSpace::builder(IDENTITY).build());
    assert!(rig.function.device().resources.intx.is_none());
    let set = rig.function.set_interrupt(INTX, None);
    assert_eq!(set, Err(Error::NoInterrupt(INTX)));
}
