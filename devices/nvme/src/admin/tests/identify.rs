//! Identify, by the specification's offsets.

use super::*;

/// What is not zero, as ranges of offsets.
fn not_zero(data: &[u8]) -> Vec<usize> {
    (0..data.len()).filter(|at| data[*at] != 0).collect()
}

#[test]
fn the_controller() {
    let mut rig = Rig::new();
    let (dw0, c) = rig.done(&identify(0x01, 0), &[]);
    assert_eq!((dw0, c.len()), (0, 4096));
    assert_eq!(&c[4..24], b"DB0001              ");
    assert_eq!(
        &c[24..64],
        format!("{:40}", "Diamond Bluff NVMe Controller").as_bytes()
    );
    assert_eq!(
        &c[64..72],
        format!("{:8}", env!("CARGO_PKG_VERSION")).as_bytes()
    );
    assert_eq!(c[76], 0, "CMIC");
    assert_eq!(c[77], 8, "MDTS: 1 MiB");
    assert_eq!(u16_at(&c, 78), rig.member.id(), "CNTLID");
    assert_eq!(u32_at(&c, 80), 0x0002_0100, "VER");
    assert_eq!(u32_at(&c, 92), 1 << 8, "OAES");
    assert_eq!(u32_at(&c, 96), 1, "CTRATT");
    assert_eq!(c[111], 1, "CNTRLTYPE");
    assert_eq!(u16_at(&c, 256), 0x102, "OACS");
    assert_eq!((c[258], c[259], c[260]), (3, 7, 3), "ACL, AERL, FRMW");
    assert_eq!((c[261], c[262], c[263]), (0x26, 63, 0), "LPA, ELPE, NPSS");
    assert_eq!(
        (u16_at(&c, 266), u16_at(&c, 268)),
        (343, 353),
        "WCTEMP, CCTEMP"
    );
    assert_eq!((c[342], c[343]), (0, 0), "ANATT, ANACAP");
    assert_eq!((c[512], c[513]), (0x66, 0x44), "SQES, CQES");
    assert_eq!(u32_at(&c, 516), 32, "NN");
    assert_eq!(u16_at(&c, 520), 0x1dd, "ONCS");
    assert_eq!(u16_at(&c, 522), 0, "FUSES");
    assert_eq!((c[524], c[525]), (0, 0b111), "FNA, VWC");
    assert_eq!(u16_at(&c, 534), 1, "OCFS");
    assert_eq!(u32_at(&c, 536), 1, "SGLS");
    assert_eq!(u32_at(&c, 540), 32, "MNAN");
    assert_eq!(&c[768..791], b"nqn.2026-11.example:s0\0");
    assert!(
        c[791..].iter().all(|b| *b == 0),
        "reserved, power states, vendor"
    );
}

#[test]
fn the_controller_of_a_shared_subsystem_reports_ana() {
    let mut rig = Rig::shared();
    let (_, c) = rig.done(&identify(0x01, 0), &[]);
    assert_eq!(c[76], 0b1011, "CMIC");
    assert_eq!(u32_at(&c, 92), 1 << 8 | 1 << 11, "OAES");
    assert_eq!((c[342], c[343]), (10, 0x5f), "ANATT, ANACAP");
    assert_eq!(
        (u32_at(&c, 344), u32_at(&c, 348)),
        (32, 32),
        "ANAGRPMAX, NANAGRPID"
    );
}

#[test]
fn strings_have_only_what_a_host_may_see() {
    let mut options = ControllerOptions::new("a\u{e4}\n\0bcdefghijklmnopqrstuvwxyz");
    options.queues = 2;
    options.max_transfer = 8192;
    let mut rig = Rig::on(with_two_namespaces(false), options);
    let (_, c) = rig.done(&identify(0x01, 0), &[]);
    assert_eq!(&c[4..24], b"a    bcdefghijklmnop");
    assert_eq!(c[77], 1, "MDTS: 8 KiB");
}

#[test]
fn what_is_not_offered_is_not_said() {
    let s = subsystem(false);
    s.add(
        Arc::new(Null::new(512, 1 << 20)),
        NamespaceOptions::new(Identity::hashed("n")),
    )
    .unwrap();
    let options = ControllerOptions {
        shadow_doorbells: false,
        ..ControllerOptions::new("x")
    };
    let mut rig = Rig::on(s, options);
    let (_, c) = rig.done(&identify(0x01, 0), &[]);
    assert_eq!((u16_at(&c, 256), c[525]), (2, 0b110), "OACS, VWC");
}

#[test]
fn namespaces() {
    let mut rig = Rig::new();
    let (_, n) = rig.done(&identify(0x00, 1), &[]);
    let blocks = (64u64 << 20) / 512;
    assert_eq!(
        [0, 8, 16].map(|at| u64_at(&n, at)),
        [blocks; 3],
        "NSZE, NCAP, NUSE"
    );
    assert_eq!(n[24], 1 << 4, "NSFEAT");
    assert_eq!((n[25], n[26]), (1, 0), "NLBAF, FLBAS");
    assert_eq!(
        (n[27], n[28], n[29], n[30], n[31]),
        (0, 0, 0, 0, 0),
        "no metadata, protection, sharing, reservations"
    );
    assert_eq!(
        u128::from_le_bytes(n[48..64].try_into().unwrap()),
        64 << 20,
        "NVMCAP"
    );
    assert_eq!((u16_at(&n, 64), u16_at(&n, 66)), (7, 7), "NPWG, NPWA");
    assert_eq!(
        (u16_at(&n, 74), u32_at(&n, 76), n[80]),
        (4096, 32768, 127),
        "MSSRL, MCL, MSRC"
    );
    assert_eq!(u32_at(&n, 92), 0, "ANAGRPID");
    assert_eq!(n[99], 0, "NSATTR");
    let identity = Identity::hashed("one");
    assert_eq!(
        (&n[104..120], &n[120..128]),
        (&identity.nguid[..], &identity.eui64[..])
    );
    assert_eq!(&n[128..136], &[0, 0, 9, 1, 0, 0, 12, 0], "LBAF 0, 1");
    assert!(n[136..].iter().all(|b| *b == 0));

    let (_, n) = rig.done(&identify(0x00, 3), &[]);
    assert_eq!(u64_at(&n, 0), 1 << 18);
    assert_eq!((n[25], n[26]), (0, 0), "one format");
    assert_eq!(&n[128..136], &[0, 0, 12, 0, 0, 0, 0, 0]);
}

#[test]
fn a_namespace_that_is_read_only_and_one_that_is_shared() {
    let s = subsystem(true);
    let mut geometry = Geometry::new(512, 1 << 20);
    geometry.read_only = true;
    geometry.write_zeroes = Some(bluff_block::ZeroLimits {
        max: 1 << 20,
        unmap: true,
    });
    let options = NamespaceOptions {
        block_size: Some(4096),
        group: 5,
        ..NamespaceOptions::new(Identity::hashed("ro"))
    };
    s.add(Shape::new(geometry), options).unwrap();
    geometry.read_only = false;
    s.add(
        Shape::new(geometry),
        NamespaceOptions::new(Identity::hashed("rw")),
    )
    .unwrap();
    let mut rig = Rig::on(s, ControllerOptions::new("x"));
    let (_, n) = rig.done(&identify(0x00, 1), &[]);
    assert_eq!((u64_at(&n, 0), n[26]), (256, 1), "formatted to 4096");
    assert_eq!(
        (n[30], n[33], u32_at(&n, 92), n[99]),
        (1, 0, 5, 1),
        "NMIC, DLFEAT, ANAGRPID, NSATTR"
    );
    let (_, i) = rig.done(&identify(0x08, 1), &[]);
    assert_eq!(
        (i[1], u32_at(&i, 4), i[8], i[14]),
        (1, 5, 1, 1),
        "NMIC, ANAGRPID, NSATTR, NSTAT"
    );
    assert_eq!(not_zero(&i), [1, 4, 8, 14]);
    let (_, n) = rig.done(&identify(0x00, 2), &[]);
    assert_eq!(
        (n[33], n[99]),
        (1 << 3, 0),
        "DLFEAT: Write Zeroes with deallocate"
    );
    rig.subsystem
        .set_ana(5, None, crate::AnaState::Inaccessible)
        .unwrap();
    let (_, i) = rig.done(&identify(0x08, 1), &[]);
    assert_eq!(i[14], 0, "not ready");
}

#[test]
fn descriptors_of_a_namespace() {
    let mut rig = Rig::new();
    let identity = Identity::hashed("three");
    let (_, d) = rig.done(&identify(0x03, 3), &[]);
    assert_eq!(
        (&d[0..4], &d[4..12]),
        (&[1, 8, 0, 0][..], &identity.eui64[..])
    );
    assert_eq!(
        (&d[12..16], &d[16..32]),
        (&[2, 16, 0, 0][..], &identity.nguid[..])
    );
    assert_eq!(
        (&d[32..36], &d[36..52]),
        (&[3, 16, 0, 0][..], &identity.uuid[..])
    );
    assert_eq!(&d[52..57], &[4, 1, 0, 0, 0]);
    assert!(d[57..].iter().all(|b| *b == 0));
}

#[test]
fn of_the_nvm_command_set() {
    let mut options = ControllerOptions::new("x");
    options.limits.zeroes = Some(8 << 20);
    options.limits.ranges = 17;
    options.limits.range_blocks = 18;
    options.limits.total_blocks = 19;
    let mut rig = Rig::on(with_two_namespaces(false), options);
    let (_, c) = rig.done(&identify(0x06, 0), &[]);
    assert_eq!(
        (c[0], c[1], c[2], c[3]),
        (0, 11, 0, 17),
        "VSL, WZSL, WUSL, DMRL"
    );
    assert_eq!(
        (u32_at(&c, 4), u64_at(&c, 8), u32_at(&c, 20)),
        (18, 19, 0x0001_0100)
    );
    assert_eq!(not_zero(&c), [1, 3, 4, 8, 21, 22]);
    let (_, n) = rig.done(&identify(0x05, 1), &[]);
    assert_eq!(not_zero(&n), [0; 0], "no protection information");
    // Another command set is not there.
    for cns in [0x05, 0x06, 0x07, 0x1a, 0x1b] {
        let mut command = identify(cns, 1);
        command.cdw11 = (2u32 << 24).into();
        assert_eq!(
            rig.failed(&command, &[]),
            Status::COMMAND_SET_UNSUPPORTED,
            "{cns:#x}"
        );
    }
}

#[test]
fn lists_of_namespaces() {
    let mut rig = Rig::shared();
    let nsids = |data: &[u8]| [0, 4, 8].map(|at| u32_at(data, at));
    rig.subsystem.attach(3, rig.member.id(), false).unwrap();
    for (cns, after, expected) in [
        (0x02, 0, [1, 0, 0]),
        (0x07, 0, [1, 0, 0]),
        (0x02, 1, [0; 3]),
        (0x10, 0, [1, 3, 0]),
        (0x1a, 1, [3, 0, 0]),
        (0x10, 2, [3, 0, 0]),
        (0x10, 0xffff_fffd, [0; 3]),
    ] {
        let (_, data) = rig.done(&identify(cns, after), &[]);
        assert_eq!(
            (nsids(&data), data.len()),
            (expected, 4096),
            "{cns:#x} {after}"
        );
    }
    for cns in [0x02, 0x07, 0x10, 0x1a] {
        for after in [0xffff_fffe, 0xffff_ffff] {
            assert_eq!(
                rig.failed(&identify(cns, after), &[]),
                Status::INVALID_NAMESPACE
            );
        }
    }
    // Detached, it is inactive; allocated it is still.
    for (cns, has) in [(0x00, false), (0x11, true), (0x08, false), (0x1f, true)] {
        let (_, data) = rig.done(&identify(cns, 3), &[]);
        assert_eq!(data.iter().any(|b| *b != 0), has, "{cns:#x}");
    }
}

#[test]
fn lists_of_controllers() {
    let mut rig = Rig::shared();
    let others: Vec<_> = (0..3)
        .map(|_| rig.subsystem.join(|_| ()).unwrap())
        .collect();
    rig.subsystem.attach(1, others[1].id(), false).unwrap();
    let ids = |data: &[u8]| -> Vec<u16> {
        let n = usize::from(u16_at(data, 0));
        assert!(data[2 + n * 2..].iter().all(|b| *b == 0));
        (0..n).map(|i| u16_at(data, 2 + i * 2)).collect()
    };
    let from = |cns: u8, nsid: u32, first: u16| {
        dwords(0x06, nsid, [u32::from(cns) | u32::from(first) << 16, 0])
    };
    for (command, expected) in [
        (from(0x13, 0, 0), vec![0, 1, 2, 3]),
        (from(0x13, 0, 2), vec![2, 3]),
        (from(0x13, 0, 0xffff), vec![]),
        (from(0x12, 1, 0), vec![0, 1, 3]),
        (from(0x12, 3, 3), vec![3]),
    ] {
        let (_, data) = rig.done(&command, &[]);
        assert_eq!((ids(&data), data.len()), (expected, 4096));
    }
    assert_eq!(
        rig.failed(&from(0x12, 33, 0), &[]),
        Status::INVALID_NAMESPACE
    );
}

#[test]
fn command_sets() {
    let mut rig = Rig::new();
    for cntid in [0xffffu32, rig.member.id().into()] {
        let (_, data) = rig.done(&dwords(0x06, 0, [0x1c | cntid << 16, 0]), &[]);
        assert_eq!((u64_at(&data, 0), not_zero(&data)), (1, vec![0]));
    }
    assert_eq!(
        rig.failed(&dwords(0x06, 0, [0x1c | 77 << 16, 0]), &[]),
        Status::INVALID_FIELD
    );
}

#[test]
fn wrong_namespaces_and_structures() {
    let mut rig = Rig::new();
    for cns in [0x00, 0x03, 0x05, 0x08, 0x11, 0x12, 0x1b, 0x1f] {
        for nsid in [0, 33, 0xffff_fffe, 0xffff_ffff] {
            assert_eq!(
                rig.failed(&identify(cns, nsid), &[]),
                Status::INVALID_NAMESPACE,
                "{cns:#x} {nsid:#x}"
            );
        }
    }
    // Valid, but nothing is there.
    for cns in [0x00, 0x05, 0x08, 0x11, 0x1b, 0x1f] {
        assert_eq!(
            rig.done(&identify(cns, 2), &[]),
            (0, vec![0; 4096]),
            "{cns:#x}"
        );
    }
    assert_eq!(rig.failed(&identify(0x03, 2), &[]), Status::INVALID_FIELD);
    let known = [
        0x00, 0x01, 0x02, 0x03, 0x05, 0x06, 0x07, 0x08, 0x10, 0x11, 0x12, 0x13, 0x1a, 0x1b, 0x1c,
        0x1f,
    ];
    for cns in (0..=0xff).filter(|cns| !known.contains(cns)) {
        assert_eq!(
            rig.failed(&identify(cns, 1), &[]),
            Status::INVALID_FIELD,
            "{cns:#x}"
        );
    }
}

/// C3: what the host gets is as long as it must be, and zero behind what there is; no byte of another answer shows.
#[test]
fn c03_nothing_stale_behind_what_is_returned() {
    let mut rig = Rig::shared();
    for nsid in 1..=32 {
        let (_, data) = rig.done(&identify(0x00, nsid), &[]);
        assert_eq!(data.len(), 4096);
        if nsid != 1 && nsid != 3 {
            assert!(data.iter().all(|b| *b == 0), "{nsid}");
        }
    }
    // Get Log Page far longer than the page.
    for (lid, len) in [
        (0x00, 1024),
        (0x01, 4096),
        (0x02, 512),
        (0x03, 512),
        (0x04, 4096),
        (0x05, 4096),
        (0x0c, 56),
        (0x12, 1024),
        (0x13, 4096),
    ] {
        let (_, long) = rig.done(&log(lid, 1 << 20, 0, true), &[]);
        assert_eq!(long.len(), 1 << 20, "{lid:#x}");
        assert!(long[len..].iter().all(|b| *b == 0), "{lid:#x}");
        let (_, short) = rig.done(&log(lid, 4, 0, true), &[]);
        assert_eq!(short, long[..4], "{lid:#x}");
    }
}
