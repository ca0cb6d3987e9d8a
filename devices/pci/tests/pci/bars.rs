//! Accesses to BARs: who gets them, and what becomes of the rest.

use bluff_pci::{Area, PciFunction, Region};

use crate::rig::{
    BAR0, COMMAND, Call, DEVICE_STATUS, MASTER, MEMORY, PENDING, PMCSR, Rig, TABLE, VECTORS,
};

#[test]
fn registers_are_the_devices() {
    let mut rig = Rig::running();
    for (len, at) in [(1, 0x11), (2, 0x22), (4, 0x34), (8, 0x48)] {
        let bytes = &[1, 2, 3, 4, 5, 6, 7, 8][..len];
        let _ = rig.write(Region::Bar(0), at, bytes);
        assert_eq!(rig.seen.take(), [Call::Write(0, at, bytes.to_vec())]);
    }
    assert_eq!(
        rig.read::<8>(Region::Bar(0), 0x48),
        [1, 2, 3, 4, 5, 6, 7, 8]
    );
    assert_eq!(rig.read::<1>(Region::Bar(0), 0x11), [1]);
    let _ = rig.write(Region::Bar(2), 0, &[9]);
    assert_eq!(rig.seen.take(), [Call::Write(2, 0, vec![9])]);
    assert_eq!(rig.read::<1>(Region::Bar(2), 0), [9]);
    // A mapped area is the device's as well, where somebody does not map it.
    let _ = rig.write(Region::Bar(0), 0x1000, &[9; 4]);
    assert_eq!(rig.seen.take().len(), 1);
    let _ = rig.write(Region::Bar(0), BAR0 - 8, &[9; 8]);
    assert_eq!(rig.seen.take().len(), 1);
}

/// Attack list C12: widths and alignments that no driver uses.
#[test]
fn other_accesses_read_as_ones_and_are_dropped() {
    let mut rig = Rig::running();
    for at in [0u64, TABLE, PENDING] {
        for skip in 0..16 {
            for len in 0..=17usize {
                let good = matches!(len, 1 | 2 | 4 | 8) && skip % len as u64 == 0;
                if good {
                    continue;
                }
                let mut to = vec![0; len];
                rig.function
                    .read(Region::Bar(0), at + skip, &mut to)
                    .unwrap();
                assert!(to.iter().all(|b| *b == 0xff), "{len} at {skip}");
                let _ = rig.write(Region::Bar(0), at + skip, &vec![0; len]);
            }
        }
    }
    assert!(rig.seen.take().is_empty());
    assert_eq!(rig.bar_u32(0, TABLE + 12), 1);
    // No error of PCI's: somebody did answer.
    assert_eq!(rig.u16(DEVICE_STATUS), 0);
}

#[test]
fn nothing_answers_without_memory_space() {
    let mut rig = Rig::running();
    rig.bar_set_u32(0, 0x10, 7);
    rig.seen.take();
    for command in [0, MASTER] {
        rig.set_u16(COMMAND, command);
        rig.seen.take();
        for at in [0x10, TABLE, PENDING] {
            assert_eq!(rig.bar_u32(0, at), u32::MAX);
            rig.bar_set_u32(0, at, 5);
        }
        assert!(rig.seen.take().is_empty());
        assert_ne!(rig.u16(DEVICE_STATUS), 0);
    }
    rig.set_u16(COMMAND, MEMORY);
    assert_eq!(rig.bar_u32(0, 0x10), 7);
    assert_eq!(rig.bar_u32(0, TABLE), 0);
    // Bus master or not has nothing to do with it.
    rig.bar_set_u32(0, 0x10, 8);
    assert_eq!(rig.bar_u32(0, 0x10), 8);
}

#[test]
fn nothing_answers_in_d3() {
    let mut rig = Rig::running();
    rig.bar_set_u32(0, 0x10, 7);
    rig.set_u16(PMCSR, 3);
    rig.seen.take();
    assert_eq!(rig.bar_u32(0, 0x10), u32::MAX);
    rig.bar_set_u32(0, 0x10, 5);
    assert!(rig.seen.take().is_empty());
    // Configuration space does (PCIe §5.3.1.4).
    assert_eq!(rig.u16(COMMAND), MEMORY | MASTER);
    assert_eq!(rig.u16(PMCSR), 3 | 8);
    rig.set_u16(PMCSR, 0);
    assert_eq!(rig.bar_u32(0, 0x10), 7);
}

#[test]
fn the_table_is_not_the_devices() {
    let mut rig = Rig::running();
    for vector in [0, 1, u64::from(VECTORS) - 1] {
        let entry = TABLE + vector * 16;
        rig.bar_set_u32(0, entry, 0xfee0_1000);
        rig.bar_set_u32(0, entry + 4, 1);
        let _ = rig.write(
            Region::Bar(0),
            entry + 8,
            &[0x41, 0, 0, 0, 0xfe, 0xff, 0xff, 0xff],
        );
        let mut want = [0; 16];
        want[..12].copy_from_slice(&[0, 0x10, 0xe0, 0xfe, 1, 0, 0, 0, 0x41, 0, 0, 0]);
        let halves = [
            rig.read::<8>(Region::Bar(0), entry),
            rig.read(Region::Bar(0), entry + 8),
        ];
        assert_eq!(
            halves.concat(),
            want,
            "reserved bits of Vector Control read as zero"
        );
    }
    // Single bytes and words are undefined by the specification: ones, and dropped.
    assert_eq!(rig.read::<1>(Region::Bar(0), TABLE), [0xff]);
    assert_eq!(rig.read::<2>(Region::Bar(0), PENDING), [0xff; 2]);
    let _ = rig.write(Region::Bar(0), TABLE, &[0; 2]);
    assert_eq!(rig.bar_u32(0, TABLE), 0xfee0_1000);
    // Pending bits are read-only.
    rig.bar_set_u32(0, PENDING, u32::MAX);
    assert_eq!(rig.bar_u32(0, PENDING), 0);
    assert!(rig.seen.take().is_empty());
    // What follows them is the device's again.
    rig.bar_set_u32(0, TABLE + u64::from(VECTORS) * 16, 3);
    rig.bar_set_u32(0, PENDING + 16, 3);
    assert_eq!(rig.seen.take().len(), 2);
}

/// Otherwise whoever polls the area would get a SIGBUS from its host.
#[test]
fn an_area_keeps_its_size() {
    let area = Area::new(0, 8192).unwrap();
    let file = std::fs::File::from(area.file.try_clone().unwrap());
    for size in [0, 4096, 1 << 20] {
        assert!(file.set_len(size).is_err());
    }
    assert_eq!(file.metadata().unwrap().len(), 8192);
}
