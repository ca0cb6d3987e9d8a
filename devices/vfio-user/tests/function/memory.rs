//! A client's memory as the device has it.

use std::os::fd::AsFd;

use bluff_testing::times;

use crate::support::*;

#[test]
fn a_device_does_only_what_it_may() {
    let card = Card::new();
    let port = card.add("a");
    let mut client = port.master();
    let file = memory(4 * PAGE);
    for page in 0..4 {
        set_word(&file, page * PAGE, 100 + page);
    }
    for (page, flags) in [(0, 3), (1, 1), (2, 2)] {
        assert_eq!(
            client.map_for(flags, page * PAGE, PAGE, &file, page * PAGE),
            0
        );
    }
    let none = map(3 * PAGE, PAGE, 3);
    assert_eq!(client.ask(command::DMA_MAP, &none).errno, 0);
    let reads: Vec<_> = (0..4)
        .map(|page| client.device_reads(page * PAGE))
        .collect();
    // Without a right, or without a file.
    assert_eq!(reads, [100, 101, u64::MAX, u64::MAX]);
    for page in 0..4 {
        client.device_writes(page * PAGE, 200 + page);
    }
    let words: Vec<_> = (0..4).map(|page| word_of(&file, page * PAGE)).collect();
    assert_eq!(words, [200, 101, 202, 103]);
    // Memory without a file goes as it came: no one waits for it.
    let changes = port.seen.changes();
    assert_eq!(client.unmap(3 * PAGE, PAGE), 0);
    assert_eq!(port.seen.changes(), changes);
}

#[test]
fn without_bus_mastering_nothing_is_touched() {
    let card = Card::new();
    let port = card.add("a");
    let mut client = port.client();
    client.command(MEMORY);
    let file = memory(PAGE);
    assert_eq!(client.map(0, PAGE, &file, 0), 0);
    client.device_writes(0, 5);
    assert_eq!(word_of(&file, 0), 0);
    client.command(MEMORY | MASTER);
    client.device_writes(0, 5);
    assert_eq!(word_of(&file, 0), 5);
    client.command(MEMORY);
    client.device_writes(0, 6);
    assert_eq!(word_of(&file, 0), 5);
}

/// What a guest with an IOMMU does.
#[test]
fn many_pages_of_one_file_come_and_go() {
    let count = times(3000, 65_535) as u64;
    let card = Card::new();
    let port = card.add("a");
    let mut client = port.master();
    let file = memory(2 * count * PAGE);
    let page = |i: u64| 2 * i * PAGE;
    for i in 0..count {
        // As QEMU does within a change: it does not wait for each.
        client.send(
            command::DMA_MAP,
            flag::NO_REPLY,
            &map_at(page(i), PAGE, 3, page(count - 1 - i)),
            &[file.as_fd()],
        );
    }
    client.device_writes(page(7), 77);
    assert_eq!(word_of(&file, page(count - 8)), 77);
    assert_eq!(port.seen.regions() as u64, count);
    assert_eq!(mapped(&file), 1);
    // One, some, and the others.
    assert_eq!(client.unmap(page(0), PAGE), 0);
    assert_eq!(client.unmap(page(1), 10 * PAGE), 0);
    assert_eq!(port.seen.regions() as u64, count - 6);
    assert_eq!(client.device_reads(page(5)), u64::MAX);
    assert_eq!(client.device_reads(page(6)), 0);
    assert_eq!(client.unmap(page(6), page(count) - page(8)), 0);
    assert_eq!(port.seen.regions(), 2);
    assert_eq!(client.device_reads(page(count - 3)), u64::MAX);
    assert_eq!(client.device_reads(page(count - 1)), 0);
    let all = unmap(0, 0, spec::dma_unmap::ALL);
    assert_eq!(client.ask(command::DMA_UNMAP, &all).errno, 0);
    assert_eq!((port.seen.regions(), mapped(&file)), (0, 0));
}

/// QEMU maps back what it has mapped of our BARs.
#[test]
fn the_functions_own_bar_may_be_memory() {
    let card = Card::new();
    let port = card.add("a");
    let mut client = port.master();
    let bar = std::fs::File::from(duplicate(&port.area.file));
    let at = port.area.file_offset;
    assert_eq!(client.map(0xfe00_1000, PAGE, &bar, at), 0);
    client.device_writes(0xfe00_1000, 9);
    assert_eq!(word_of(&bar, at), 9);
}

#[test]
fn memory_that_shrinks_ends_only_its_client() {
    let card = Card::new();
    let (port, neighbour) = (card.add("a"), card.add("b"));
    let (mut client, mut other) = (port.master(), neighbour.master());
    let (file, others) = (memory(4 * PAGE), memory(PAGE));
    assert_eq!(client.map(0, 4 * PAGE, &file, 0), 0);
    assert_eq!(other.map(0, PAGE, &others, 0), 0);
    file.set_len(0).unwrap();
    client.send(
        command::REGION_WRITE,
        flag::NO_REPLY,
        &write(0, WRITE_TO, &[0; 8]),
        &[],
    );
    assert!(client.is_closed());
    let why = port.gone().expect("it was us");
    assert!(why.contains("memory"), "{why}");
    other.device_writes(0, 5);
    assert_eq!(word_of(&others, 0), 5);
    // And the next one is served.
    let mut client = port.master();
    assert_eq!(client.map(0, PAGE, &others, 0), 0);
    assert_eq!(client.device_reads(0), 5);
}
