//! What takes its time: the answer comes when it is over, and nobody else waits.

use std::os::fd::AsFd;

use crate::support::*;

/// A word from the loop: what it was at is done.
fn sync(other: &mut Client) {
    other.read(region::PCI_CONFIG, 0, 4);
}

#[test]
fn d1_an_unmap_with_io_in_flight_is_answered_when_the_memory_is_out_of_use() {
    let card = Card::new();
    let (port, neighbour) = (card.add("a"), card.add("b"));
    let (mut client, mut other) = (port.master(), neighbour.master());
    let file = memory(4 * PAGE);
    assert_eq!(client.map(0, PAGE, &file, 0), 0);
    assert_eq!(client.map(PAGE, PAGE, &file, PAGE), 0);
    port.seen.hold(true);
    let id = client.send(command::DMA_UNMAP, 0, &unmap(0, PAGE, 0), &[]);
    let waiting = port.seen.next();
    assert_eq!((waiting.what, port.seen.regions()), ("on", 1));
    assert!(waiting.bound <= BOUND);
    // The neighbour is served meanwhile, and nothing was answered.
    let info = client.send(command::DEVICE_GET_INFO, 0, &words(&[16, 0, 0, 0]), &[]);
    sync(&mut other);
    assert!(client.has_nothing());
    assert!(mapped(&file) > 0, "in use");
    (waiting.done)();
    let reply = client.next().unwrap();
    assert_eq!((reply.id, reply.errno), (id, 0));
    assert_eq!(reply.body, unmap(0, PAGE, 0));
    assert_eq!(client.next().unwrap().id, info);
    port.seen.hold(false);
    assert_eq!(client.device_reads(0), u64::MAX);
    assert_eq!(client.device_reads(PAGE), 0);
}

/// Who maps the doorbells need not tell us of what it does with the memory.
#[test]
fn a_map_is_answered_when_the_device_knows_of_it() {
    let card = Card::new();
    let (port, neighbour) = (card.add("a"), card.add("b"));
    let (mut client, mut other) = (port.master(), neighbour.master());
    let file = memory(PAGE);
    port.seen.hold(true);
    let id = client.send(command::DMA_MAP, 0, &map_at(0, PAGE, 3, 0), &[file.as_fd()]);
    let waiting = port.seen.next();
    assert_eq!((waiting.what, port.seen.regions()), ("on", 1));
    assert!(waiting.bound <= BOUND);
    sync(&mut other);
    assert!(client.has_nothing());
    (waiting.done)();
    let reply = client.next().unwrap();
    assert_eq!((reply.id, reply.errno), (id, 0));
}

#[test]
fn the_end_of_bus_mastering_and_resets_are_waited_for() {
    let card = Card::new();
    let port = card.add("a");
    let mut client = port.master();
    port.seen.hold(true);
    let off = write(region::PCI_CONFIG, COMMAND, &MEMORY.to_le_bytes());
    let flr = write(region::PCI_CONFIG, DEVICE_CONTROL, &FLR.to_le_bytes());
    for (command, body, what) in [
        (command::REGION_WRITE, &off[..], "off"),
        (command::REGION_WRITE, &flr, "reset"),
        (command::DEVICE_RESET, &[], "reset"),
    ] {
        let id = client.send(command, 0, body, &[]);
        let waiting = port.seen.next();
        assert_eq!(waiting.what, what);
        assert!(waiting.bound <= BOUND && client.has_nothing());
        (waiting.done)();
        assert_eq!(client.next().unwrap().id, id);
    }
    // Off already: nothing to wait for.
    client.command(MEMORY);
}

#[test]
fn of_many_writes_the_rest_comes_after_the_reset() {
    let card = Card::new();
    let port = card.add("a");
    let mut client = port.master();
    port.seen.hold(true);
    let config = region::PCI_CONFIG;
    let body = multi(&[
        small(0, DATA, 8, 1),
        small(config, DEVICE_CONTROL, 2, FLR.into()),
        small(config, COMMAND, 2, MEMORY.into()),
        small(0, DATA, 8, 2),
    ]);
    client.send(command::REGION_WRITE_MULTI, flag::NO_REPLY, &body, &[]);
    let waiting = port.seen.next();
    assert_eq!(waiting.what, "reset");
    (waiting.done)();
    port.seen.hold(false);
    assert_eq!(client.read_u64(DATA), 2);
}

/// QEMU sends all that a change of its guest's memory needs, and waits then.
#[test]
fn commands_that_wait_behind_each_other_share_one_bound() {
    let card = Card::new();
    let (port, neighbour) = (card.add("a"), card.add("b"));
    let (mut client, mut other) = (port.master(), neighbour.client());
    let file = memory(4 * PAGE);
    for i in 0..4 {
        assert_eq!(client.map(i * PAGE, PAGE, &file, i * PAGE), 0);
    }
    port.seen.hold(true);
    // In one piece, so that all are there when the first is over.
    let all = (0..3).map(|i| client.message(command::DMA_UNMAP, 0, &unmap(i * PAGE, PAGE, 0)));
    let all: Vec<_> = all.collect();
    client.give(&all.concat(), &[]);
    let mut left = BOUND;
    for i in 0..3 {
        let waiting = port.seen.next();
        // Else it could be over before the call that began it has returned, and then nobody has waited.
        sync(&mut other);
        // All of it was used up before, or as little as a turn of the loop.
        assert!(waiting.bound <= left, "{i}: {:?}", waiting.bound);
        left = waiting.bound;
        let before = std::time::Instant::now();
        while before.elapsed() < std::time::Duration::from_millis(2) {
            std::hint::spin_loop();
        }
        left = left.saturating_sub(std::time::Duration::from_millis(2));
        (waiting.done)();
    }
    for _ in 0..3 {
        assert_eq!(client.next().unwrap().errno, 0);
    }
    // One that comes when the others are over has its own.
    client.send(command::DMA_UNMAP, 0, &unmap(3 * PAGE, PAGE, 0), &[]);
    let waiting = port.seen.next();
    assert!(waiting.bound > left);
    (waiting.done)();
    assert_eq!(client.next().unwrap().errno, 0);
}

#[test]
fn a_client_that_goes_while_a_write_is_not_settled_leaves_a_clean_function() {
    let card = Card::new();
    let port = card.add("a");
    let mut client = port.master();
    let file = memory(PAGE);
    assert_eq!(client.map(0, PAGE, &file, 0), 0);
    port.seen.hold(true);
    let off = write(region::PCI_CONFIG, COMMAND, &MEMORY.to_le_bytes());
    client.send(command::REGION_WRITE, 0, &off, &[]);
    let settling = port.seen.next();
    drop(client);
    let ending = port.seen.next();
    assert_eq!((settling.what, ending.what), ("off", "reset"));
    // The next one waits, however the two end.
    let mut next = port.fresh();
    let body = version(QEMU);
    next.send(command::VERSION, 0, &body, &[]);
    (settling.done)();
    assert!(next.has_nothing());
    port.seen.hold(false);
    (ending.done)();
    assert_eq!(next.next().unwrap().errno, 0);
    assert_eq!(next.read(region::PCI_CONFIG, COMMAND, 2), [0, 0]);
    next.command(MEMORY | MASTER);
    assert_eq!(next.device_reads(0), u64::MAX);
    assert_eq!(mapped(&file), 0);
}
