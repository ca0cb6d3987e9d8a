//! `DMA_MAP` and `DMA_UNMAP`.

use bluff_vfio_user::{Errno, Limits};

use crate::support::*;

#[test]
fn memory_is_mapped_with_what_may_be_done_with_it() {
    let mut client = Client::new();
    for (i, (flags, with_file)) in [(3, true), (1, true), (2, true), (3, false), (1, false)]
        .into_iter()
        .enumerate()
    {
        let files = client.files(usize::from(with_file));
        let body = map_at(i as u64 * PAGE, PAGE, flags, 7 * PAGE);
        let reply = client.ask_with(command::DMA_MAP, &body, files);
        assert_eq!((reply.errno, reply.body.len()), (0, 0));
        let (mapping, file) = client.function().maps.last().unwrap();
        assert_eq!(
            (mapping.read, mapping.write),
            (flags & 1 != 0, flags & 2 != 0)
        );
        assert_eq!((mapping.file, file.is_some()), (with_file, with_file));
        assert_eq!((mapping.address, mapping.size), (i as u64 * PAGE, PAGE));
        assert_eq!(mapping.offset, 7 * PAGE);
    }
    assert_eq!(
        (client.session.mappings().count(), client.open_files()),
        (5, 3)
    );
}

#[test]
fn d3_memory_that_overlaps_is_refused() {
    let mut client = Client::new();
    assert_eq!(client.map(4 * PAGE, 4 * PAGE), 0);
    for (address, size) in [
        (4, 4),
        (4, 1),
        (7, 1),
        (5, 2),
        (3, 2),
        (7, 2),
        (3, 6),
        (0, 100),
    ] {
        assert_eq!(
            client.map(address * PAGE, size * PAGE),
            EEXIST,
            "{address}+{size}"
        );
    }
    for (address, size) in [(3, 1), (8, 1), (0, 3)] {
        assert_eq!(
            client.map(address * PAGE, size * PAGE),
            0,
            "{address}+{size}"
        );
    }
    assert_eq!((client.function().maps.len(), client.open_files()), (4, 4));
}

#[test]
fn d3_ranges_that_are_empty_wrap_or_are_no_pages_are_refused() {
    let mut client = Client::new();
    let top = 0u64.wrapping_sub(PAGE);
    for (address, size) in [
        (0, 0),
        (1, PAGE),
        (0, 1),
        (0, PAGE + 1),
        (top, 2 * PAGE),
        (2 * PAGE, top),
        (top, top),
        (u64::MAX, u64::MAX),
    ] {
        assert_eq!(client.map(address, size), EINVAL, "{address:#x}+{size:#x}");
        assert_eq!(client.unmap(address, size), EINVAL);
    }
    for offset in [1, PAGE - 1, u64::MAX, top, 1 << 63, (1 << 63) - PAGE] {
        let file = client.file();
        let body = map_at(0, PAGE, 3, offset);
        assert_eq!(
            client.ask_with(command::DMA_MAP, &body, vec![file]).errno,
            EINVAL,
            "{offset:#x}"
        );
    }
    assert_eq!(client.open_files(), 0);
    // The last page of all addresses is one.
    assert_eq!((client.map(top, PAGE), client.unmap(top, PAGE)), (0, 0));
}

#[test]
fn d3_too_many_mappings_are_refused() {
    let mut client = Client::fresh();
    assert_eq!(
        client
            .version(r#"{"capabilities":{"max_dma_maps":3}}"#)
            .errno,
        0
    );
    for i in 0..3 {
        assert_eq!(client.map(i * PAGE, PAGE), 0);
    }
    assert_eq!(client.map(3 * PAGE, PAGE), ENOSPC);
    assert_eq!(
        (client.unmap(PAGE, PAGE), client.map(3 * PAGE, PAGE)),
        (0, 0)
    );
    assert_eq!(client.open_files(), 3);
}

#[test]
fn d3_too_much_memory_is_refused() {
    let limits = Limits {
        max_mapped: 8 * PAGE,
        ..Limits::default()
    };
    let mut client = Client::with(limits);
    client.negotiate();
    assert_eq!(client.map(0, 8 * PAGE), 0);
    assert_eq!(client.map(8 * PAGE, PAGE), ENOSPC);
    // Without a file it costs nothing.
    let bare = map(8 * PAGE, u64::MAX - 16 * PAGE + 1, 3);
    assert_eq!(client.ask(command::DMA_MAP, &bare).errno, 0);
    assert_eq!((client.unmap(0, 8 * PAGE), client.map(PAGE, PAGE)), (0, 0));
}

#[test]
fn as_many_mappings_as_the_specification_has_are_served() {
    let mut client = Client::new();
    for i in 0..65535u64 {
        assert_eq!(
            client
                .ask(command::DMA_MAP, &map(2 * i * PAGE, PAGE, 3))
                .errno,
            0
        );
    }
    let one_more = map(1 << 50, PAGE, 3);
    assert_eq!(client.ask(command::DMA_MAP, &one_more).errno, ENOSPC);
    client.function().maps.clear();
    assert_eq!(client.ask(command::DMA_UNMAP, &unmap(0, 0, 2)).errno, 0);
    assert_eq!(client.ask(command::DMA_MAP, &one_more).errno, 0);
}

#[test]
fn d3_bad_flags_argsz_and_lengths_are_refused() {
    let mut client = Client::new();
    for flags in [0, 4, 5, 8, 1 << 31, u32::MAX] {
        let file = client.file();
        let body = map(0, PAGE, flags);
        assert_eq!(
            client.ask_with(command::DMA_MAP, &body, vec![file]).errno,
            EINVAL,
            "{flags:#x}"
        );
    }
    let good = map(0, PAGE, 3);
    for argsz in [0u32, 31] {
        let body = [argsz.as_bytes(), &good[4..]].concat();
        assert_eq!(client.ask(command::DMA_MAP, &body).errno, EINVAL);
    }
    assert_eq!(client.ask(command::DMA_MAP, &good[..31]).errno, EINVAL);
    assert_eq!(
        client
            .ask(command::DMA_MAP, &[&good[..], &[0]].concat())
            .errno,
        EINVAL
    );
    assert_eq!(client.ask(command::DMA_MAP, &[]).errno, EINVAL);
    let two = client.files(2);
    assert_eq!(client.ask_with(command::DMA_MAP, &good, two).errno, EINVAL);
    assert!(client.function().maps.is_empty() && client.open_files() == 0);
    for (flags, errno) in [
        (1, ENOTSUP),
        (3, ENOTSUP),
        (4, EINVAL),
        (u32::MAX - 1, EINVAL),
    ] {
        assert_eq!(
            client.ask(command::DMA_UNMAP, &unmap(0, PAGE, flags)).errno,
            errno
        );
    }
    for (address, size) in [(0, PAGE), (PAGE, 0)] {
        assert_eq!(
            client
                .ask(command::DMA_UNMAP, &unmap(address, size, 2))
                .errno,
            EINVAL
        );
    }
    let good = unmap(0, PAGE, 0);
    assert_eq!(client.ask(command::DMA_UNMAP, &good[..23]).errno, EINVAL);
    assert_eq!(
        client
            .ask(command::DMA_UNMAP, &[23u32.as_bytes(), &good[4..]].concat())
            .errno,
        EINVAL
    );
    let file = client.file();
    assert_eq!(
        client.ask_with(command::DMA_UNMAP, &good, vec![file]).errno,
        EINVAL
    );
    assert_eq!(client.open_files(), 0);
}

#[test]
fn an_unmap_takes_what_lies_within_its_range_and_cuts_nothing() {
    let mut client = Client::new();
    for (address, size) in [(0, 1), (2, 2), (4, 1), (8, 4)] {
        assert_eq!(client.map(address * PAGE, size * PAGE), 0);
    }
    for (address, size) in [(3, 1), (2, 1), (1, 2), (3, 2), (0, 9), (9, 1), (11, 9)] {
        assert_eq!(
            client.unmap(address * PAGE, size * PAGE),
            EINVAL,
            "{address}+{size}"
        );
    }
    assert_eq!(client.open_files(), 4);
    let body = unmap(PAGE, 6 * PAGE, 0);
    assert_eq!(client.ask(command::DMA_UNMAP, &body).body, body);
    assert_eq!(
        (
            client.function().log.pop().unwrap().as_str(),
            client.open_files()
        ),
        ("unmap 2", 2)
    );
    // Nothing is there, so nothing is in use: the function is not asked.
    assert_eq!(client.unmap(PAGE, 6 * PAGE), 0);
    assert!(client.function().log.is_empty());
    assert_eq!(client.ask(command::DMA_UNMAP, &unmap(0, 0, 2)).errno, 0);
    assert_eq!(
        (client.session.mappings().count(), client.open_files()),
        (0, 0)
    );
    assert_eq!(client.ask(command::DMA_UNMAP, &unmap(0, 0, 2)).errno, 0);
}

#[test]
fn memory_that_the_function_refuses_is_not_mapped() {
    let mut client = Client::new();
    client.function().refuse = Some(Errno::new(12));
    assert_eq!(client.map(0, PAGE), 12);
    assert_eq!(
        (client.session.mappings().count(), client.open_files()),
        (0, 0)
    );
    assert_eq!(client.map(0, PAGE), 0);
}

#[test]
fn larger_pages_are_asked_for_where_the_machine_has_no_smaller() {
    let limits = Limits {
        pgsizes: 0x10000,
        ..Limits::default()
    };
    let mut client = Client::with(limits);
    assert_eq!(
        client
            .version(r#"{"capabilities":{"pgsizes":69632}}"#)
            .errno,
        0
    );
    assert_eq!((client.map(0, PAGE), client.map(0, 0x10000)), (EINVAL, 0));
    let mut client = Client::with(limits);
    assert_eq!(client.version(QEMU).errno, EINVAL);
}
