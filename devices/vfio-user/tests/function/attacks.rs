//! Rows D of the attack list, at a socket.

use std::io::{Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::support::*;

/// The function serves a client, and has nothing of the one before it.
fn still_serves(port: &Port) {
    let mut client = port.master();
    let file = memory(PAGE);
    assert_eq!(client.device_reads(0), u64::MAX);
    assert_eq!(client.map(0, PAGE, &file, 0), 0);
    client.device_writes(0, 42);
    assert_eq!(word_of(&file, 0), 42);
}

/// A client may be killed after any byte of what it says; the next one finds the function clean.
#[test]
fn d2_a_client_that_is_killed_in_mid_map() {
    let card = Card::new();
    let port = card.add("a");
    let kept = memory(2 * PAGE);
    for cut in [1, 15, 16, 17, 31, 47, 48] {
        let mut client = port.master();
        assert_eq!(client.map(0, PAGE, &kept, 0), 0);
        let (canary, file) = canary();
        let message = client.message(command::DMA_MAP, 0, &map(PAGE, PAGE, 3));
        client.give(&message[..cut], &[file.as_fd()]);
        drop((file, client));
        let why = port.gone();
        // Between messages it may go.
        assert_eq!(why.is_some(), cut < message.len(), "{cut}: {why:?}");
        assert!(is_released(canary), "{cut}");
        assert_eq!(mapped(&kept), 0);
        still_serves(&port);
        assert!(port.gone().is_none());
    }
}

#[test]
fn d3_memory_that_cannot_be_is_refused() {
    let card = Card::new();
    let port = card.add("a");
    let mut client = port.master();
    let file = memory(4 * PAGE);
    assert_eq!(client.map(0, 2 * PAGE, &file, 0), 0);
    let top = 0u64.wrapping_sub(PAGE);
    for (address, size, offset) in [
        (PAGE, PAGE, 0),
        (2 * PAGE, 4 * PAGE, PAGE),
        (2 * PAGE, 1 << 50, 0),
        (2 * PAGE, PAGE, 1 << 40),
        (2 * PAGE, PAGE, 1 << 62),
        (top, 2 * PAGE, 0),
        (2 * PAGE, 0, 0),
        (2 * PAGE, 1, 0),
    ] {
        assert_ne!(client.map(address, size, &file, offset), 0, "{address:#x}");
    }
    // What is no memory.
    let (socket, _other) = UnixStream::pair().unwrap();
    let (pipe, _end) = std::io::pipe().unwrap();
    let event = EventFd::new(0).unwrap();
    let folder = std::fs::File::open("/proc/self").unwrap();
    let files: [OwnedFd; 3] = [socket.into(), pipe.into(), folder.into()];
    for file in files
        .iter()
        .map(AsRawFd::as_raw_fd)
        .chain([event.as_raw_fd()])
    {
        let file =
            std::fs::File::open(format!("/proc/self/fd/{file}")).unwrap_or_else(|_| memory(0));
        assert_ne!(client.map(2 * PAGE, PAGE, &file, 0), 0);
    }
    let read_only = std::fs::File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    assert_eq!(client.map(2 * PAGE, PAGE, &read_only, 0), 13, "EACCES");
    assert_eq!(client.map_for(1, 2 * PAGE, PAGE, &read_only, 0), 0);
    // All of it is as it was.
    assert_eq!(port.seen.regions(), 2);
    client.device_writes(0, 1);
    assert_eq!(word_of(&file, 0), 1);
}

/// Mappings of files of their own are bounded, or one client could have all that the kernel grants this process.
#[test]
fn d3_too_many_files_are_refused() {
    let card = Card::new();
    let port = card.add("a");
    let mut client = port.master();
    let mut refused = 0;
    for i in 0..2100 {
        let errno = client.map(i * PAGE, PAGE, &memory(PAGE), 0);
        assert!(matches!(errno, 0 | 28), "{errno}");
        refused += usize::from(errno != 0);
    }
    assert_eq!(refused, 2100 - 2048);
    assert_eq!(port.seen.regions(), 2048);
}

#[test]
fn d4_a_version_that_makes_no_sense_is_answered_and_ends() {
    let card = Card::new();
    let port = card.add("a");
    for body in [&b"\0\0\0\0{"[..], b"\0\0\0\0{}", b"\x01\0\0\0{}\0", b"\0"] {
        let mut client = port.fresh();
        assert_eq!(client.ask(command::VERSION, body).errno, EINVAL);
        assert!(client.is_closed());
        port.gone().expect("it was us");
    }
    let mut client = port.fresh();
    client.give(&[0xff; 64], &[]);
    assert!(client.is_closed());
    port.gone().expect("it was us");
    still_serves(&port);
}

#[test]
fn d5_descriptors_of_what_is_refused_are_closed() {
    let card = Card::new();
    let port = card.add("a");
    let mut client = port.client();
    let wrong = map(1, PAGE, 3);
    let vectors = irqs(irq::DATA_EVENTFD | irq::ACTION_TRIGGER, irq::MSIX, 0, 1);
    let past = irqs(
        irq::DATA_EVENTFD | irq::ACTION_TRIGGER,
        irq::MSIX,
        VECTORS.into(),
        1,
    );
    let good = map(0, PAGE, 3);
    for (command, body) in [
        (command::DMA_MAP, &wrong),
        // Sockets are neither memory nor eventfds.
        (command::DMA_MAP, &good),
        (command::DEVICE_SET_IRQS, &vectors),
        (command::DEVICE_SET_IRQS, &past),
        (command::DEVICE_RESET, &Vec::new()),
    ] {
        let (canary, file) = canary();
        let reply = client.ask_with(command, body, &[file.as_fd()]);
        assert_ne!(reply.errno, 0);
        drop(file);
        assert!(is_released(canary), "command {command}");
    }
    // More than any message may have.
    let (canary, file) = canary();
    let many = [file.as_raw_fd(); 17];
    let message = client.message(command::DEVICE_RESET, 0, &[]);
    let sent = client.socket.send_with_fds(&[&message[..]], &many);
    assert_eq!(sent.unwrap(), message.len());
    assert_eq!(client.next().unwrap().errno, EINVAL);
    drop(file);
    assert!(is_released(canary));
    assert_eq!(client.read(region::PCI_CONFIG, 0, 2), [0x36, 0x1b]);
}

/// What cannot be counted on to take what is written is no interrupt; and then none of the message is.
#[test]
fn d5_only_eventfds_are_interrupts() {
    let card = Card::new();
    let port = card.add("a");
    let mut client = port.master();
    let old = client.vectors(0, 1);
    let (socket, _other) = UnixStream::pair().unwrap();
    let (_end, pipe) = std::io::pipe().unwrap();
    let files: Vec<OwnedFd> = vec![memory(8).into(), socket.into(), pipe.into()];
    for file in files {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        assert_eq!(
            client.set_irqs(irq::MSIX, 0, &[event.as_raw_fd(), file.as_raw_fd()]),
            EINVAL
        );
    }
    let file = memory(PAGE);
    assert_eq!(client.map(0, PAGE, &file, 0), 0);
    client.device_writes(0, 1);
    assert_eq!(heard(&old[0]), 1);
}

#[test]
fn d6_d7_arithmetic_that_wraps_is_refused() {
    let card = Card::new();
    let port = card.add("a");
    let mut client = port.client();
    for (index, offset, count) in [
        (0, u64::MAX, 1),
        (0, BAR0, 1),
        (0, u64::MAX - 3, 8),
        (7, 4093, 4),
        (1, 0, 1),
        (6, 0, 1),
        (8, 0, 1),
        (9, 0, 1),
        (u32::MAX, 0, 1),
    ] {
        let body = access(index, offset, count);
        assert_eq!(client.ask(command::REGION_READ, &body).errno, EINVAL);
        let body = write(index, offset, &vec![0; count as usize]);
        assert_eq!(client.ask(command::REGION_WRITE, &body).errno, EINVAL);
    }
    for (index, start, count) in [
        (irq::MSIX, u32::MAX, 2),
        (irq::MSIX, 1, u32::MAX),
        (irq::MSIX, VECTORS.into(), 1),
        (irq::REQ, 0, 1),
        (irq::MSI, 0, 1),
        (99, 0, 1),
    ] {
        let body = irqs(irq::DATA_NONE | irq::ACTION_TRIGGER, index, start, count);
        assert_eq!(client.ask(command::DEVICE_SET_IRQS, &body).errno, EINVAL);
    }
}

/// One that can be held by its owner holds neither the loop nor the device.
#[test]
fn a_descriptor_that_blocks_is_given_up() {
    let card = Card::new();
    let port = card.add("a");
    let mut client = port.master();
    let full = EventFd::new(0).unwrap();
    full.write(u64::MAX - 1).unwrap();
    assert_eq!(client.set_irqs(irq::MSIX, 0, &[full.as_raw_fd()]), 0);
    // We have made it one that does not wait; it is shared, and can be changed back.
    clear_nonblock(&full);
    let file = memory(PAGE);
    assert_eq!(client.map(0, PAGE, &file, 0), 0);
    client.device_writes(0, 1);
    client.device_writes(0, 2);
    assert_eq!(word_of(&file, 0), 2);
}

#[allow(unsafe_code)]
fn clear_nonblock(event: &EventFd) {
    // SAFETY: no memory is involved.
    let rc = unsafe { libc::fcntl(event.as_raw_fd(), libc::F_SETFL, 0) };
    assert_eq!(rc, 0);
}

/// A file with holes costs its owner nothing; what is mapped of it is bounded.
#[test]
fn d3_too_much_memory_is_refused() {
    let card = Card::new();
    let port = card.add("a");
    let mut client = port.master();
    // A piece has to fit into the addresses of an emulated process, too.
    const PIECE: u64 = 1 << 34;
    let mut file = tempfile_of(PIECE);
    let mut mapped = 0u64;
    loop {
        match client.map(mapped, PIECE, &file, 0) {
            0 => mapped += PIECE,
            28 => break,
            other => panic!("{other}"),
        }
    }
    assert!(mapped > 0);
    assert!(mapped <= 16 << 40, "{mapped:#x}");
    file.seek(SeekFrom::Start(8)).unwrap();
    file.write_all(&7u64.to_le_bytes()).unwrap();
    assert_eq!(client.device_reads(8), 7);
}

fn tempfile_of(len: u64) -> std::fs::File {
    let file = bluff_attachment::descriptor::sealed_memory(c"guest", len).unwrap();
    file.into()
}
