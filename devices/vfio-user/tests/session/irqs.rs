//! `DEVICE_SET_IRQS`.

use std::os::fd::OwnedFd;

use crate::support::*;

const NONE: u32 = irq::DATA_NONE;
const BOOL: u32 = irq::DATA_BOOL;
const EVENT: u32 = irq::DATA_EVENTFD;
const MASK: u32 = irq::ACTION_MASK;
const UNMASK: u32 = irq::ACTION_UNMASK;
const TRIGGER: u32 = irq::ACTION_TRIGGER;

fn set(
    client: &mut Client,
    flags: u32,
    index: u32,
    range: (u32, u32),
    data: &[u8],
    files: Vec<OwnedFd>,
) -> i32 {
    let body = [
        &words(&[20 + data.len() as u32, flags, index, range.0, range.1]),
        data,
    ]
    .concat();
    let reply = client.ask_with(command::DEVICE_SET_IRQS, &body, files);
    assert!(reply.body.is_empty());
    reply.errno
}

#[test]
fn descriptors_come_in_chunks_and_go_again() {
    let mut client = Client::new();
    for start in [0, 16, 32] {
        let files = client.files(16);
        assert_eq!(
            set(
                &mut client,
                EVENT | TRIGGER,
                irq::MSIX,
                (start, 16),
                &[],
                files
            ),
            0
        );
    }
    assert_eq!(
        (client.function().irqs.len(), client.open_files()),
        (48, 48)
    );
    // Others instead.
    let files = client.files(2);
    assert_eq!(
        set(&mut client, EVENT | TRIGGER, irq::MSIX, (4, 2), &[], files),
        0
    );
    assert_eq!(client.open_files(), 48);
    // No descriptors: these are no longer signalled. As many as a type has, in one message.
    assert_eq!(
        set(
            &mut client,
            EVENT | TRIGGER,
            irq::MSIX,
            (8, 2040),
            &[],
            vec![]
        ),
        0
    );
    assert_eq!(client.open_files(), 8);
    let file = client.file();
    assert_eq!(
        set(
            &mut client,
            EVENT | TRIGGER,
            irq::INTX,
            (0, 1),
            &[],
            vec![file]
        ),
        0
    );
    assert_eq!(
        set(&mut client, NONE | TRIGGER, irq::MSIX, (0, 0), &[], vec![]),
        0
    );
    assert_eq!((client.function().irqs.len(), client.open_files()), (1, 1));
    // Also for a type without interrupts.
    assert_eq!(
        set(&mut client, NONE | TRIGGER, irq::MSI, (0, 0), &[], vec![]),
        0
    );
}

#[test]
fn actions_reach_the_function() {
    let mut client = Client::new();
    assert_eq!(
        set(&mut client, NONE | TRIGGER, irq::MSIX, (2, 3), &[], vec![]),
        0
    );
    assert_eq!(
        set(
            &mut client,
            BOOL | TRIGGER,
            irq::MSIX,
            (2, 3),
            &[1, 0, 255],
            vec![]
        ),
        0
    );
    assert_eq!(
        set(&mut client, NONE | MASK, irq::INTX, (0, 1), &[], vec![]),
        0
    );
    assert_eq!(
        set(&mut client, BOOL | UNMASK, irq::INTX, (0, 1), &[0], vec![]),
        0
    );
    let file = client.file();
    assert_eq!(
        set(
            &mut client,
            EVENT | UNMASK,
            irq::INTX,
            (0, 1),
            &[],
            vec![file]
        ),
        0
    );
    let want = [
        "Trigger 2 [2, 3, 4]",
        "Trigger 2 [2, 4]",
        "Mask 0 [0]",
        "Unmask 0 []",
        "on Unmask 0 0 1",
    ];
    assert_eq!(client.function().log, want);
}

#[test]
fn d7_ranges_that_pass_the_end_or_wrap_are_refused() {
    let mut client = Client::new();
    for (start, count) in [
        (0, 2049),
        (2047, 2),
        (2048, 1),
        (u32::MAX, 1),
        (1, u32::MAX),
        (u32::MAX, u32::MAX),
    ] {
        for data in [NONE, EVENT] {
            let errno = set(
                &mut client,
                data | TRIGGER,
                irq::MSIX,
                (start, count),
                &[],
                vec![],
            );
            assert_eq!(errno, EINVAL, "{start} {count}");
        }
    }
    assert_eq!(
        set(&mut client, NONE | TRIGGER, irq::MSI, (0, 1), &[], vec![]),
        EINVAL
    );
    assert_eq!(
        set(&mut client, NONE | TRIGGER, 5, (0, 0), &[], vec![]),
        EINVAL
    );
    assert!(client.function().log.is_empty());
}

#[test]
fn nothing_is_only_for_all_of_a_type() {
    let mut client = Client::new();
    for (flags, start) in [
        (NONE | TRIGGER, 1),
        (NONE | MASK, 0),
        (BOOL | TRIGGER, 0),
        (EVENT | TRIGGER, 0),
    ] {
        assert_eq!(
            set(&mut client, flags, irq::INTX, (start, 0), &[], vec![]),
            EINVAL
        );
    }
}

#[test]
fn flags_that_do_not_go_together_are_refused() {
    let mut client = Client::new();
    for flags in [
        0,
        NONE,
        TRIGGER,
        NONE | BOOL | TRIGGER,
        NONE | EVENT | TRIGGER,
        NONE | MASK | UNMASK,
        NONE | TRIGGER | 1 << 6,
        u32::MAX,
    ] {
        assert_eq!(
            set(&mut client, flags, irq::MSIX, (0, 1), &[], vec![]),
            EINVAL,
            "{flags:#x}"
        );
    }
    // MSI-X cannot be masked from here.
    for flags in [NONE | MASK, NONE | UNMASK] {
        assert_eq!(
            set(&mut client, flags, irq::MSIX, (0, 1), &[], vec![]),
            EINVAL
        );
    }
}

#[test]
fn d5_descriptors_of_a_refused_request_are_closed() {
    let mut client = Client::new();
    for (flags, range, data, files) in [
        (EVENT | TRIGGER, (0, 2), 0, 1),
        (EVENT | TRIGGER, (0, 1), 0, 2),
        (EVENT | TRIGGER, (2047, 2), 0, 2),
        (EVENT | TRIGGER, (0, 17), 0, 17),
        (EVENT | TRIGGER, (0, 4), 16, 4),
        (EVENT | MASK, (0, 1), 0, 1),
        (NONE | TRIGGER, (0, 1), 0, 1),
        (BOOL | TRIGGER, (0, 1), 1, 1),
    ] {
        // Masking is what INTx can, and it has no second one.
        let index = if flags & MASK != 0 { 6 } else { irq::MSIX };
        let files = client.files(files);
        let errno = set(&mut client, flags, index, range, &vec![0; data], files);
        assert_eq!(
            (errno, client.open_files()),
            (EINVAL, 0),
            "{flags:#x} {range:?}"
        );
    }
    client.function().refuse = Some(bluff_vfio_user::Errno::NOSPC);
    let files = client.files(3);
    assert_eq!(
        set(&mut client, EVENT | TRIGGER, irq::MSIX, (0, 3), &[], files),
        ENOSPC
    );
    assert_eq!(client.open_files(), 0);
}

#[test]
fn data_of_another_length_is_refused() {
    let mut client = Client::new();
    for (flags, count, data) in [
        (BOOL, 3, 2),
        (BOOL, 3, 4),
        (NONE, 1, 1),
        (BOOL, u32::MAX, 4),
    ] {
        let errno = set(
            &mut client,
            flags | TRIGGER,
            irq::MSIX,
            (0, count),
            &vec![1; data],
            vec![],
        );
        assert_eq!(errno, EINVAL);
    }
    for body in [
        words(&[19, NONE | TRIGGER, 2, 0, 1]),
        words(&[20, NONE | TRIGGER, 2, 0]),
        vec![],
    ] {
        assert_eq!(client.ask(command::DEVICE_SET_IRQS, &body).errno, EINVAL);
    }
}
