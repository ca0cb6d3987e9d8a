//! Configuration space: what a driver finds there, and what its writes do.

use bluff_pci::config::{Link, MsixPlace};
use bluff_pci::{Bar, ConfigSpace, Error, PciFunction, Region};

use crate::rig::{
    BAR0, BAR2, COMMAND, DEVICE_CONTROL, DEVICE_STATUS, IDENTITY, MASTER, MEMORY, MSIX,
    MSIX_CONTROL, PCIE, PENDING, PM, PMCSR, Rig, TABLE, VECTORS, VENDOR, WRITABLE, space,
};

/// A step of a driver: a write, and what a read says then.
enum Step {
    Is(u64, usize, u64),
    Set(u64, usize, u64),
}
use Step::{Is, Set};

fn run(rig: &mut Rig, steps: &[Step]) {
    for (n, step) in steps.iter().enumerate() {
        match *step {
            Is(at, len, want) => {
                let mut to = vec![0; len];
                rig.function.read(Region::Config, at, &mut to).unwrap();
                let want = &want.to_le_bytes()[..len];
                assert_eq!(to, want, "step {n}: {at:#x}");
            }
            Set(at, len, value) => rig.set(at, &value.to_le_bytes()[..len]),
        }
    }
}

/// What Linux does when it finds a function (`pci_setup_device`, `pci_read_bases`, `pci_pm_init`,
/// `set_pcie_port_type`, `pci_msix_init`, `pci_cfg_space_size`), as reads and writes.
#[test]
fn linux_finds_what_it_looks_for() {
    let mut rig = Rig::new();
    run(
        &mut rig,
        &[
            Is(0x00, 4, 0x0010_1b36),
            Is(0x0e, 1, 0),
            Is(0x08, 4, 0x0108_0207),
            Is(0x06, 2, 1 << 4),
            Is(0x3d, 1, 1),
            Is(0x3c, 1, 0),
            Set(0x3c, 1, 11),
            Is(0x3c, 2, 1 << 8 | 11),
            Is(0x2c, 4, 0x1100_1af4),
            // The list of capabilities.
            Is(0x34, 1, PM),
            Is(PM, 2, MSIX << 8 | 1),
            Is(MSIX, 2, PCIE << 8 | 0x11),
            Is(PCIE, 2, VENDOR << 8 | 0x10),
            Is(VENDOR, 2, 9),
            // Decoding off, sizes of BARs, and back.
            Is(0x04, 2, 0),
            Set(0x04, 2, 0),
            Is(0x10, 4, 4),
            Set(0x10, 4, 0xffff_ffff),
            Is(0x10, 4, 0xffff_0004),
            Set(0x10, 4, 4),
            Set(0x14, 4, 0xffff_ffff),
            Is(0x14, 4, 0xffff_ffff),
            Set(0x14, 4, 0),
            Is(0x18, 4, 0),
            Set(0x18, 4, 0xffff_ffff),
            Is(0x18, 4, 0xffff_ff00),
            Set(0x18, 4, 0),
            Set(0x1c, 4, 0xffff_ffff),
            Is(0x1c, 4, 0),
            Set(0x24, 4, 0xffff_ffff),
            Is(0x24, 4, 0),
            // No expansion ROM.
            Set(0x30, 4, 0xffff_f800),
            Is(0x30, 4, 0),
            // Power management: version 3, no PME, D0, no soft reset.
            Is(PM + 2, 2, 3),
            Is(PMCSR, 2, 8),
            Set(PMCSR, 2, 0x8000),
            Is(PMCSR, 2, 8),
            // PCI Express: an endpoint, version 2, with function level reset, payloads of 256 bytes.
            Is(PCIE + 2, 2, 2),
            Is(PCIE + 4, 4, 1 << 28 | 1 << 15 | 1 << 5 | 1),
            Is(DEVICE_CONTROL, 2, 0x2810),
            Is(PCIE + 0x0c, 4, 1 << 22 | 4 << 4 | 4),
            Is(PCIE + 0x12, 2, 1 << 12 | 4 << 4 | 4),
            Is(PCIE + 0x24, 4, 1 << 4),
            Is(PCIE + 0x2c, 4, 0b1_1110),
            Is(PCIE + 0x30, 2, 4),
            // MSI-X: off, and so many.
            Is(MSIX_CONTROL, 2, u64::from(VECTORS) - 1),
            Is(MSIX + 4, 4, TABLE),
            Is(MSIX + 8, 4, PENDING),
            // Extended space: a serial number, then what else there is.
            Is(0x100, 4, 0x10c << 20 | 1 << 16 | 3),
            Is(0x104, 8, 0x0011_2233_4455_6677),
            Is(0x10c, 4, 2 << 16 | 0xb),
            Is(0x110, 4, 0x0403_0201),
            // The driver: addresses, decoding, bus master.
            Set(0x10, 4, 0xfe00_0000),
            Set(0x14, 4, 0x12),
            Set(0x18, 4, 0xfd00_0100),
            Set(0x04, 2, u64::from(MEMORY | MASTER)),
            Is(0x10, 8, 0x12_fe00_0004),
            Is(0x18, 4, 0xfd00_0100),
            Is(0x04, 4, 1 << 20 | 6),
        ],
    );
    assert_eq!(rig.function.layout().bars[0].as_ref().unwrap().size, BAR0);
    assert_eq!(rig.function.layout().bars[2].as_ref().unwrap().size, BAR2);
}

/// Each register of the sample, written with ones and then with zeros: what stays of either is its mask.
#[test]
fn what_is_writable() {
    for at in (0..4096).step_by(4) {
        let mut rig = Rig::new();
        let before = rig.u32(at);
        let mask = WRITABLE.iter().find(|(m, _)| *m == at).map_or(0, |m| m.1);
        let ones = match at {
            DEVICE_CONTROL => !u32::from(crate::rig::FLR),
            _ => u32::MAX,
        };
        rig.set_u32(at, ones);
        assert_eq!(rig.u32(at), before | mask, "ones at {at:#x}");
        rig.set_u32(at, 0);
        assert_eq!(rig.u32(at), before & !mask, "zeros at {at:#x}");
    }
}

#[test]
fn errors_are_cleared_by_ones() {
    let mut rig = Rig::new();
    // Nothing answers while memory space is off.
    assert_eq!(rig.bar_u32(0, 0), u32::MAX);
    assert_eq!(rig.u16(DEVICE_STATUS), 0b1001);
    rig.bar_set_u32(0, 0, 1);
    assert_eq!(rig.u16(DEVICE_STATUS), 0b1011);
    rig.set_u16(DEVICE_STATUS, 0);
    rig.set(DEVICE_STATUS, &[0b0001]);
    assert_eq!(rig.u16(DEVICE_STATUS), 0b1010);
    // Together with Device Control, which is before it.
    rig.set_u32(DEVICE_CONTROL, 0x000f_2810);
    assert_eq!(rig.u32(DEVICE_CONTROL), 0x2810);
}

/// Any byte can be written alone, and accesses need no alignment here.
#[test]
fn widths_do_not_matter() {
    let mut rig = Rig::new();
    rig.set(0x12, &[0xab, 0xcd, 0x01]);
    assert_eq!(rig.u32(0x10), 0xcdab_0004);
    assert_eq!(rig.u32(0x14), 1);
    assert_eq!(rig.read::<3>(Region::Config, 0x13), [0xcd, 1, 0]);
    // All of it at once.
    let all = rig.read::<4096>(Region::Config, 0);
    rig.set(0, &[&all[..]].concat());
    assert_eq!(rig.read::<4096>(Region::Config, 0), all);
}

#[test]
fn past_the_end_is_for_the_attachment_to_know() {
    let mut rig = Rig::running();
    for (region, size) in [
        (Region::Config, 4096),
        (Region::Bar(0), BAR0),
        (Region::Bar(2), BAR2),
    ] {
        for (offset, len) in [
            (size, 1),
            (size - 1, 2),
            (u64::MAX, 1),
            (u64::MAX - 3, 8),
            (size - 4, 8),
        ] {
            let mut to = vec![0; len];
            let error = Error::Range {
                region,
                offset,
                len,
            };
            let read = rig.function.read(region, offset, &mut to);
            assert_eq!(read, Err(error.clone()));
            assert!(to.iter().all(|b| *b == 0xff));
            assert_eq!(rig.function.write(region, offset, &to), Err(error));
        }
        // The end itself holds no byte.
        rig.function.read(region, size, &mut []).unwrap();
    }
    for bar in [1, 3, 4, 5, 6, 255] {
        let region = Region::Bar(bar);
        let error = Err(Error::NoRegion(region));
        let mut to = [0; 4];
        assert_eq!(rig.function.read(region, 0, &mut to), error);
        assert_eq!(to, [0xff; 4]);
        let written = rig.function.write(region, 0, &[0]);
        assert_eq!(written.map(|_| ()), error);
    }
    assert!(rig.seen.take().is_empty());
}

#[test]
fn a_function_that_has_next_to_nothing() {
    let mut rig = Rig::of(ConfigSpace::builder(IDENTITY).build());
    rig.set(0, &[0x7f; 4096]);
    // No BAR to enable, no list, no interrupt.
    assert_eq!(rig.u32(COMMAND), 0x0544);
    assert_eq!(rig.u16(0x34), 0);
    assert_eq!(rig.u16(0x3c), 0);
    assert_eq!(rig.u32(0x100), 0, "no extended capability");
    assert!(!rig.function.layout().intx);
}

/// What PCI's rules forbid is a mistake of ours.
#[test]
fn what_cannot_be_built() {
    let builder = || ConfigSpace::builder(IDENTITY);
    type Case = Box<dyn Fn() + std::panic::RefUnwindSafe>;
    let cases: Vec<(&str, Case)> = vec![
        (
            "odd size",
            Box::new(move || drop(builder().bar(0, Bar::memory_64(0x3000)))),
        ),
        (
            "small",
            Box::new(move || drop(builder().bar(0, Bar::memory_64(64)))),
        ),
        (
            "no upper half",
            Box::new(move || drop(builder().bar(5, Bar::memory_64(4096)))),
        ),
        (
            "in an upper half",
            Box::new(move || {
                drop(
                    builder()
                        .bar(0, Bar::memory_64(4096))
                        .bar(1, Bar::memory_32(4096)),
                );
            }),
        ),
        (
            "over another",
            Box::new(move || {
                drop(
                    builder()
                        .bar(1, Bar::memory_32(4096))
                        .bar(0, Bar::memory_64(4096)),
                );
            }),
        ),
        (
            "twice",
            Box::new(move || {
                drop(
                    builder()
                        .bar(1, Bar::memory_32(4096))
                        .bar(1, Bar::memory_32(4096)),
                );
            }),
        ),
        (
            "4 GiB in 32 bits",
            Box::new(move || drop(builder().bar(0, Bar::memory_32(1 << 32)))),
        ),
        (
            "a table past its BAR",
            Box::new(move || {
                let place = MsixPlace::in_bar(0, 0, 2048);
                drop(builder().bar(0, Bar::memory_64(4096)).msix(2048, place));
            }),
        ),
        (
            "a table in pages that are mapped",
            Box::new(move || {
                let areas = vec![bluff_pci::Area::new(0, 4096).unwrap()];
                let bar = Bar::memory_64(1 << 16).with_areas(areas);
                drop(
                    builder()
                        .bar(0, bar)
                        .msix(1, MsixPlace::in_bar(0, 0x800, 1)),
                );
            }),
        ),
        (
            "pending bits in the table",
            Box::new(move || {
                let place = MsixPlace {
                    table_bar: 0,
                    table: 0,
                    pending_bar: 0,
                    pending: 8,
                };
                drop(builder().bar(0, Bar::memory_64(4096)).msix(1, place));
            }),
        ),
        (
            "seven lanes",
            Box::new(move || {
                drop(builder().express(Link {
                    generation: 3,
                    width: 7,
                }));
            }),
        ),
        (
            "a list that is too long",
            Box::new(move || drop(builder().capability(9, &[0; 200], &[]))),
        ),
    ];
    let passed: Vec<_> = cases
        .iter()
        .filter(|(_, case)| std::panic::catch_unwind(case).is_ok())
        .map(|(name, _)| name)
        .collect();
    assert!(passed.is_empty(), "{passed:?}");
    drop(space(true));
}
