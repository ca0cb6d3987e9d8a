//! The stream itself, and clients that go: rows of the attack list that are about no single message.

use bluff_vfio_user::{Error, Progress, framing};

use crate::support::*;

fn everything(client: &mut Client) {
    assert_eq!(client.map(0, PAGE), 0);
    assert_eq!(client.map(PAGE, PAGE), 0);
    let files = client.files(4);
    let body = words(&[20, irq::DATA_EVENTFD | irq::ACTION_TRIGGER, irq::MSIX, 0, 4]);
    assert_eq!(
        client
            .ask_with(command::DEVICE_SET_IRQS, &body, files)
            .errno,
        0
    );
    assert_eq!(client.open_files(), 6);
}

#[test]
fn d2_a_client_that_goes_in_mid_map_leaves_nothing() {
    let file = |c: &mut Client| vec![c.file()];
    let bytes = framing::message(9, command::DMA_MAP, 0, 0, &[&map(2 * PAGE, PAGE, 3)]);
    for cut in [1, 15, 16, 17, 47] {
        let mut client = Client::new();
        everything(&mut client);
        let files = file(&mut client);
        client.session.receive(&bytes[..cut], files, false).unwrap();
        assert!(client.session.is_within_message());
        assert_eq!(client.open_files(), 7);
        assert_eq!(client.session.end(), Progress::Done);
        assert_eq!(client.open_files(), 0);
        assert_eq!(client.session.mappings().count(), 0);
        assert!(!client.session.is_within_message());
        client.still_serves();
    }
}

#[test]
fn d2_the_next_client_waits_for_what_the_last_one_left() {
    let mut client = Client::new();
    everything(&mut client);
    client.function().hold = true;
    client.send(command::DMA_UNMAP, 0, &unmap(0, PAGE, 0), vec![]);
    client.send(command::DEVICE_RESET, 0, &[], vec![]);
    let old = client.function().held[0];
    assert_eq!(client.session.end(), Progress::Pending);
    // The ticket of the unmap is of no more use, and what waited is not served.
    client.session.finished(old);
    assert!(!client.session.is_idle());
    assert_eq!(client.session.end(), Progress::Pending);
    client.release();
    assert!(client.session.is_idle());
    assert!(client.next().is_none());
    assert_eq!(client.function().log, ["unmap 1", "disconnected"]);
    client.function().hold = false;
    client.still_serves();
}

#[test]
fn d2_clients_come_and_go() {
    let mut client = Client::new();
    for _ in 0..100 {
        everything(&mut client);
        assert_eq!(client.session.end(), Progress::Done);
        assert_eq!(client.open_files(), 0);
        client.session.connect();
        client.negotiate();
    }
    assert_eq!(client.session.end(), Progress::Done);
    assert_eq!(client.session.end(), Progress::Done);
}

#[test]
fn d5_descriptors_on_any_message_are_closed() {
    let mut client = Client::new();
    for command in (0..20).chain([u16::MAX]) {
        for len in [0, 8, 16, 20, 24, 32, 40] {
            for count in [1, 2, 16, 17, 40] {
                // In order: each of these is refused, but for a map of nothing with a file and 20 bytes of zero.
                let files = client.files(count);
                let reply = client.ask_with(command, &vec![0; len], files);
                assert_ne!(reply.errno, 0, "{command} {len} {count}");
                assert_eq!(client.open_files(), 0);
            }
        }
    }
    client.still_serves();
}

#[test]
fn d5_descriptors_that_the_kernel_dropped_refuse_the_message() {
    let mut client = Client::new();
    let file = client.file();
    let bytes = framing::message(3, command::DMA_MAP, 0, 0, &[&map(0, PAGE, 3)]);
    client.session.receive(&bytes, vec![file], true).unwrap();
    assert_eq!(
        (client.next().unwrap().errno, client.open_files()),
        (EINVAL, 0)
    );
    assert_eq!(client.map(0, PAGE), 0);
}

#[test]
fn headers_that_make_no_sense_end_the_session() {
    for (flags, size) in [
        (0, 0),
        (0, 15),
        (0, u32::MAX),
        (0, (1 << 20) + 33),
        (2, 16),
        (15, 16),
        (1, 15),
    ] {
        let mut client = Client::new();
        everything(&mut client);
        let good = framing::message(5, command::DEVICE_RESET, 0, 0, &[]);
        let bad = words(&[command::DEVICE_RESET.into(), size, flags, 0]);
        let file = client.file();
        let end = client
            .session
            .receive(&[good, bad].concat(), vec![file], false);
        assert!(
            matches!(end, Err(Error::Type(_) | Error::Size(_))),
            "{flags} {size}"
        );
        // What came before it is answered; nothing after it.
        assert_eq!(client.next().unwrap().id, 5);
        assert!(!client.session.wants_input() && client.open_files() == 6);
        client.send(command::DEVICE_RESET, 0, &[], vec![]);
        assert!(client.next().is_none());
        client.still_serves();
    }
}

#[test]
fn the_largest_message_is_served() {
    let mut client = Client::new();
    let body = [access(7, 0, 1 << 20), vec![0; 1 << 20]].concat();
    assert_eq!(client.ask(command::REGION_WRITE, &body).errno, EINVAL);
    client.still_serves();
}

#[test]
fn messages_byte_by_byte_are_served() {
    let mut client = Client::fresh();
    let hello = version(QEMU);
    let mut all = framing::message(1, command::VERSION, 0, 0, &[&hello]);
    all.extend(framing::message(
        2,
        command::DMA_MAP,
        0,
        0,
        &[&map(0, PAGE, 3)],
    ));
    all.extend(framing::message(
        3,
        command::REGION_READ,
        0,
        0,
        &[&access(7, 0, 4)],
    ));
    for byte in &all {
        assert!(client.session.missing() > 0);
        client.session.receive(&[*byte], vec![], false).unwrap();
    }
    let got: Vec<_> = std::iter::from_fn(|| client.next())
        .map(|r| (r.id, r.errno))
        .collect();
    assert_eq!(got, [(1, 0), (2, 0), (3, 0)]);
}

/// As QEMU 11.1 does where the guest's firmware places BARs: everything is unmapped and mapped again, nobody waits.
#[test]
fn a_burst_of_maps_without_waiting_is_served_in_order() {
    let mut client = Client::new();
    assert_eq!(client.map(0, 0x400_0000), 0);
    let mut stream = framing::message(33, command::DMA_UNMAP, 0, 0, &[&unmap(0, 0x400_0000, 0)]);
    let maps = [
        (0, 0xc_0000, 3),
        (0xc_0000, 0x2_0000, 1),
        (0xe_0000, 0x2_0000, 1),
        (0x10_0000, 0x3f0_0000, 3),
    ];
    for (i, (address, size, flags)) in maps.into_iter().enumerate() {
        stream.extend(framing::message(
            34 + i as u16,
            command::DMA_MAP,
            0,
            0,
            &[&map(address, size, flags)],
        ));
    }
    client.session.receive(&stream, vec![], false).unwrap();
    let got: Vec<_> = std::iter::from_fn(|| client.next())
        .map(|r| (r.id, r.errno))
        .collect();
    assert_eq!(got, [(33, 0), (34, 0), (35, 0), (36, 0), (37, 0)]);
    assert_eq!(client.session.mappings().count(), 4);
}
