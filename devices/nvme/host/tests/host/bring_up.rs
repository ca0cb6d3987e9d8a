//! Registers: enabling, resets, shutdown, what is refused.

use std::sync::Arc;

use bluff_nvme_host::spec::register;
use bluff_nvme_host::{Command, Controller, Error, HostMemory, Setup};

use crate::model::Model;

pub const BASE: u64 = 1 << 32;

pub fn memory() -> Arc<HostMemory> {
    HostMemory::flat(BASE, 16 << 20).unwrap()
}

/// A controller that is enabled.
pub fn controller() -> (Model, Controller<Model>) {
    let memory = memory();
    let model = Model::new(&memory);
    let mut controller = Controller::new(model.clone(), &memory).unwrap();
    controller.enable(&Setup::default()).unwrap();
    (model, controller)
}

#[test]
fn a_controller_is_enabled_disabled_and_enabled_again() {
    let (_, mut controller) = controller();
    assert_eq!(controller.version().unwrap(), (2, 1, 0));
    let cap = controller.capabilities();
    assert_eq!((cap.max_entries(), cap.stride()), (1024, 4));
    assert_eq!(cap.timeout().as_millis(), 1000);
    assert!(cap.contiguous() && cap.subsystem_reset());
    // Entries of 64 and 16 bytes, pages of 4 KiB, enabled.
    assert_eq!(register_of(&controller, register::CC), 0x0046_0001);
    assert_eq!(register_of(&controller, register::AQA), 0x001f_001f);
    let free = controller.memory().free();
    controller.identify(1, 0).unwrap();
    for _ in 0..3 {
        controller.disable().unwrap();
        assert_eq!(controller.status().unwrap(), 0);
        let none = controller.admin(&Command::new(6, 0));
        assert!(matches!(none, Err(Error::Request(_))));
        controller.enable(&Setup::default()).unwrap();
        // The rings begin anew, phase tags among them.
        controller.identify(1, 0).unwrap();
    }
    assert_eq!(controller.memory().free(), free);
}

fn register_of(controller: &Controller<Model>, offset: u64) -> u32 {
    use bluff_nvme_host::Bar;
    controller.bar().read32(offset).unwrap()
}

#[test]
fn a_controller_is_shut_down_and_comes_back() {
    let (_, mut controller) = controller();
    controller.shut_down(false).unwrap();
    assert_eq!(register_of(&controller, register::CC) >> 14 & 3, 1);
    controller.disable().unwrap();
    controller.enable(&Setup::default()).unwrap();
    controller.shut_down(true).unwrap();
    assert_eq!(register_of(&controller, register::CC) >> 14 & 3, 2);
}

#[test]
fn a_subsystem_reset_ends_everything() {
    let (_, mut controller) = controller();
    controller.subsystem_reset().unwrap();
    assert_eq!(controller.status().unwrap(), register::NSSRO);
    controller.enable(&Setup::default()).unwrap();
    controller.identify(1, 0).unwrap();
}

#[test]
fn what_the_host_needs_is_looked_at() {
    // Its pages are of 4 KiB only.
    let region = bluff_virtio_driver::RegionConfig {
        guest_addr: 0,
        size: 1 << 20,
        file_offset: 0,
    };
    let memory = HostMemory::new(&[region], 16384).unwrap();
    let refused = Controller::new(Model::new(&memory), &memory);
    assert!(matches!(refused, Err(Error::Lacks(_))));
}

#[test]
fn memory_comes_and_goes_in_pages() {
    let memory = memory();
    let all = memory.free();
    let first = memory.alloc(5000).unwrap();
    assert_eq!((first.address(), first.list().len()), (BASE, 2));
    let scattered = memory.alloc_scattered(10 * 4096).unwrap();
    let adjoin = |p: &[u64]| p[0] + 4096 == p[1];
    assert!(!scattered.list().windows(2).any(adjoin));
    assert_eq!(memory.free(), all - 12 * 4096);
    drop((first, scattered));
    assert_eq!(memory.free(), all);
    // It is one run again.
    let whole = memory.alloc(all).unwrap();
    assert!(memory.alloc(1).is_err() && memory.alloc_scattered(1).is_err());
    drop(whole);
    assert!(memory.alloc_scattered(all + 1).is_err());
    assert_eq!(memory.free(), all);
}
