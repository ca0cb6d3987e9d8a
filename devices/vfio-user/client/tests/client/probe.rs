//! The probe, against a function with known registers.

use bluff_vfio_client::pci::{Bar, Capability, Identity, Msix, spec};
use bluff_vfio_client::{Error, Pci};

use crate::function::{BAR, BAR_LEN, PENDING, TABLE, VECTORS};
use crate::server::Server;

#[test]
fn header_bars_and_capabilities() {
    let server = Server::new();
    let pci = Pci::new(&server.client);
    let want = Identity {
        vendor: 0x1fb1,
        device: 1,
        class: 0x01_0802,
        revision: 3,
        subsystem_vendor: 0x1fb2,
        subsystem: 2,
    };
    assert_eq!(pci.identity().unwrap(), want);
    pci.enable().unwrap();
    let bars = pci.bars().unwrap();
    let want = Bar {
        index: 0,
        size: BAR_LEN as u64,
        is_64: true,
        prefetchable: false,
    };
    assert_eq!(bars, [want]);
    // Sizing leaves things as they were.
    assert_eq!(pci.config16(spec::COMMAND).unwrap(), 6);
    pci.place_bars(&bars, (1 << 40) + 1).unwrap();
    assert_eq!(pci.config32(spec::BAR0).unwrap(), 0x4004);
    assert_eq!(pci.config32(spec::BAR0 + 4).unwrap(), 0x100);
    assert_eq!(pci.bars().unwrap(), bars);
    assert_eq!(pci.config32(spec::BAR0).unwrap(), 0x4004);
    let ids = pci.capabilities().unwrap();
    let at = |id, at| Capability { id, at };
    assert_eq!(ids, [at(1, 0x40), at(0x11, 0x50), at(0x10, 0x60)]);
    assert!(matches!(pci.capability(5), Err(Error::Pci(_))));
    server.end();
}

#[test]
fn lists_and_bars_that_make_no_sense() {
    let server = Server::new();
    let pci = Pci::new(&server.client);
    server.function(|f| f.config[0x61] = 0x40);
    assert!(matches!(pci.capabilities(), Err(Error::Pci(_))));
    server.function(|f| f.config[0x61] = 0x3c);
    assert!(matches!(pci.capabilities(), Err(Error::Pci(_))));
    server.function(|f| f.config[0x10] = 1);
    assert!(matches!(pci.bars(), Err(Error::Pci(_))));
    server.end();
}

#[test]
fn msix_by_descriptors_and_by_the_table() {
    let server = Server::new();
    let pci = Pci::new(&server.client);
    let msix = Msix::find(&pci).unwrap();
    assert_eq!(msix.vectors, VECTORS);
    assert_eq!(
        (msix.table, msix.pending),
        ((0, u64::from(TABLE)), (0, u64::from(PENDING)))
    );
    let events = msix.enable(3).unwrap();
    assert_eq!(
        server.function(|f| (f.irqs.len(), f.config[0x53])),
        (3, 0x80)
    );
    server.function(|f| rustix::io::write(&f.irqs[&(2, 1)], &1u64.to_ne_bytes()).unwrap());
    assert_eq!([0, 1, 2].map(|i| events[i].take()), [0, 1, 0]);
    msix.write_entry(2, 0xfee0_0000, 0x41).unwrap();
    let entry = |f: &mut crate::function::Function| f.bar[TABLE as usize + 32..][..16].to_vec();
    assert_eq!(
        server.function(entry),
        [0, 0, 0xe0, 0xfe, 0, 0, 0, 0, 0x41, 0, 0, 0, 0, 0, 0, 0]
    );
    msix.set_masked(2, true).unwrap();
    assert_eq!(server.function(entry)[12], 1);
    server.function(|f| f.bar[PENDING as usize + 4] = 2);
    assert!(msix.is_pending(33).unwrap() && !msix.is_pending(32).unwrap());
    msix.disable().unwrap();
    assert_eq!(server.function(|f| (f.irqs.len(), f.config[0x53])), (0, 0));
    server.end();
}

#[test]
fn resets_and_power() {
    let server = Server::new();
    let pci = Pci::new(&server.client);
    pci.enable().unwrap();
    pci.set_power(3).unwrap();
    assert_eq!(server.function(|f| f.config[0x44]), 3);
    pci.set_power(0).unwrap();
    assert_eq!(server.function(|f| f.config[0x44]), 0);
    pci.function_level_reset().unwrap();
    assert_eq!(pci.config16(spec::COMMAND).unwrap(), 0);
    assert_eq!(server.function(|f| f.log.clone()), ["function level reset"]);
    assert_eq!(server.client.read64(BAR, 0).unwrap(), 0);
    server.end();
}
