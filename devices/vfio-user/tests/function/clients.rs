//! Clients that are slow, many, silent, or not ours.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;

use bluff_vfio_user::AttachmentEvent;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::support::*;

#[test]
fn a_second_client_is_turned_away() {
    let card = Card::new();
    let port = card.add("a");
    let mut first = port.client();
    let mut second = port.fresh();
    assert!(second.is_closed());
    port.seen.expect(AttachmentEvent::Connected);
    port.seen.expect(AttachmentEvent::Negotiated);
    port.seen.expect(AttachmentEvent::Refused);
    first.read(0, 0, 4);
    drop(first);
    port.seen.expect(AttachmentEvent::Disconnected(None));
    port.client();
}

/// One that comes back at once may be seen before its old connection's end is.
#[test]
fn a_client_that_comes_back_at_once_is_served() {
    let card = Card::new();
    let port = card.add("a");
    for _ in 0..200 {
        let mut client = port.client();
        client.read(0, 0, 4);
    }
}

#[test]
fn one_that_waits_and_gives_up_bars_nobody() {
    let card = Card::new();
    let port = card.add("a");
    let client = port.master();
    port.seen.hold(true);
    drop(client);
    let ending = port.seen.next();
    drop(port.fresh());
    let mut next = port.fresh();
    let body = version(QEMU);
    next.send(command::VERSION, 0, &body, &[]);
    port.seen.hold(false);
    (ending.done)();
    assert_eq!(next.next().unwrap().errno, 0);
}

#[test]
fn one_byte_at_a_time() {
    let card = Card::new();
    let port = card.add("a");
    let mut client = port.fresh();
    let version = version(QEMU);
    let bodies = [
        (command::VERSION, version),
        (command::REGION_READ, access(region::PCI_CONFIG, 0, 4)),
        (command::REGION_WRITE, write(0, DATA, &[1, 0, 0, 0])),
        (command::DEVICE_RESET, Vec::new()),
    ];
    for (command, body) in bodies {
        for byte in client.message(command, 0, &body) {
            client.give(&[byte], &[]);
        }
        let reply = client.next().unwrap();
        assert_eq!((reply.command, reply.errno), (command, 0));
    }
}

/// Neither one that floods nor one that does not read holds up its neighbour.
#[test]
fn a_client_that_does_not_read_blocks_nobody() {
    let card = Card::new();
    let (port, neighbour) = (card.add("a"), card.add("b"));
    let (mut client, mut other) = (port.client(), neighbour.client());
    let ask = client.message(command::REGION_READ, 0, &access(0, 0, BAR0 as u32));
    let mut sent = 0;
    // Until its socket takes no more, twice over.
    for _ in 0..2 {
        let mut full = 0;
        while full < 100 {
            let gone =
                bluff_attachment::stream::send(std::os::fd::AsFd::as_fd(&client.socket), &ask, &[]);
            match gone {
                Ok(n) => {
                    assert_eq!(n, ask.len(), "whole messages");
                    sent += 1;
                    full = 0;
                }
                Err(_) => full += 1,
            }
            other.read(0, 0, 4);
        }
    }
    assert!(sent > 64, "{sent}");
    // It has not lost anything.
    for _ in 0..sent {
        let reply = client.next().unwrap();
        assert_eq!(reply.body.len() as u64, 16 + BAR0);
    }
    client.read(0, 0, 4);
}

#[test]
fn a_large_write_comes_in_pieces() {
    let card = Card::new();
    let port = card.add("a");
    let mut client = port.client();
    let data = vec![0x5a; 4096];
    client.write(region::PCI_CONFIG, 0, &data);
    // More than any message.
    let header = spec::RawHeader {
        id: 1.into(),
        command: command::REGION_WRITE.into(),
        size: (2u32 << 20).into(),
        flags: 0.into(),
        error: 0.into(),
    };
    client.give(header.as_bytes(), &[]);
    assert!(client.is_closed());
}

/// The client of the `vfio_user` crate.
#[test]
fn a_client_that_we_did_not_write() {
    let card = Card::new();
    let port = card.add("a");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let accepting = std::thread::spawn({
        let port = port.clone();
        move || {
            let (socket, _) = listener.accept().unwrap();
            port.handle.connection(port.name, socket.into());
        }
    });
    let mut client = vfio_user::Client::new(&path).unwrap();
    accepting.join().unwrap();
    let bar = client.region(0).unwrap();
    assert_eq!((bar.size, bar.sparse_areas.len()), (BAR0, 1));
    let mut id = [0; 2];
    client.region_read(region::PCI_CONFIG, 0, &mut id).unwrap();
    assert_eq!(id, [0x36, 0x1b]);
    let master = (MEMORY | MASTER).to_le_bytes();
    client
        .region_write(region::PCI_CONFIG, COMMAND, &master)
        .unwrap();
    let info = client.get_irq_info(irq::MSIX).unwrap();
    assert_eq!(info.count, u32::from(VECTORS));
    let events: Vec<_> = (0..8)
        .map(|_| EventFd::new(EFD_NONBLOCK).unwrap())
        .collect();
    let fds: Vec<_> = events.iter().map(|e| e.as_raw_fd()).collect();
    let set = irq::DATA_EVENTFD | irq::ACTION_TRIGGER;
    client.set_irqs(irq::MSIX, set, 0, 8, &fds).unwrap();
    let file = memory(4 * PAGE);
    client
        .dma_map(PAGE, 0x10_0000, 2 * PAGE, file.as_raw_fd())
        .unwrap();
    client.region_write(0, DATA, &77u64.to_le_bytes()).unwrap();
    let to = 0x10_0008u64.to_le_bytes();
    client.region_write(0, WRITE_TO, &to).unwrap();
    assert_eq!(heard(&events[0]), 1);
    assert_eq!(word_of(&file, PAGE + 8), 77);
    client.dma_unmap(0x10_0000, 2 * PAGE).unwrap();
    client.region_write(0, WRITE_TO, &to).unwrap();
    assert_eq!(heard(&events[1]), 1, "it could not");
    client.reset().unwrap();
    client.shutdown().unwrap();
    assert_eq!(port.gone(), None);
    assert_eq!(mapped(&file), 0);
}
