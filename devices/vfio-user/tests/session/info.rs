//! What a client can find out.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use bluff_pci::IoStore;
use bluff_vfio_user::IoEventFd;
use zerocopy::FromBytes;

use crate::support::*;

fn region_info(client: &mut Client, index: u32, argsz: u32) -> Reply {
    let body = words(&[argsz, 0, index, 0, 0, 0, 0, 0]);
    client.ask(command::DEVICE_GET_REGION_INFO, &body)
}

#[test]
fn the_device_is_pci_and_can_be_reset() {
    let mut client = Client::new();
    let reply = client.ask(command::DEVICE_GET_INFO, &words(&[16, 0, 0, 0]));
    let (raw, rest) = reply.read::<spec::RawDeviceInfo>();
    assert_eq!(raw.argsz.get(), 16);
    assert_eq!(raw.flags.get(), spec::device::PCI | spec::device::RESET);
    assert_eq!((raw.num_regions.get(), raw.num_irqs.get()), (9, 5));
    assert!(rest.is_empty());
}

#[test]
fn areas_come_when_there_is_room_for_them() {
    let mut client = Client::new();
    let full = 32 + 16 + 2 * 16;
    for argsz in [32, 33, full - 1] {
        let reply = region_info(&mut client, 0, argsz);
        let (raw, rest) = reply.read::<spec::RawRegionInfo>();
        // Told what it would need; without the flag, which QEMU refuses to see without an offset.
        assert_eq!((raw.argsz.get(), raw.cap_offset.get()), (full, 0));
        assert_eq!(raw.flags.get(), region::READ | region::WRITE | region::MMAP);
        assert_eq!((rest.len(), reply.files.len()), (0, 1), "argsz {argsz}");
    }
    for argsz in [full, u32::MAX] {
        let reply = region_info(&mut client, 0, argsz);
        let (raw, rest) = reply.read::<spec::RawRegionInfo>();
        assert_eq!((raw.argsz.get(), raw.cap_offset.get()), (full, 32));
        assert_eq!((raw.size.get(), raw.offset.get()), (0x4000, 0x10000));
        assert_ne!(raw.flags.get() & region::CAPS, 0);
        let (cap, areas) = spec::RawSparse::read_from_prefix(rest).unwrap();
        assert_eq!((cap.id.get(), cap.version.get(), cap.next.get()), (1, 1, 0));
        assert_eq!(cap.areas.get(), 2);
        let areas = <[spec::RawArea]>::ref_from_bytes(areas).unwrap();
        let areas: Vec<_> = areas
            .iter()
            .map(|a| (a.offset.get(), a.size.get()))
            .collect();
        assert_eq!(areas, [(0x1000, 0x1000), (0x3000, 0x1000)]);
        assert_eq!(reply.files.len(), 1);
    }
}

#[test]
fn regions_without_areas_have_no_capability() {
    let mut client = Client::new();
    let rw = region::READ | region::WRITE;
    for (index, flags, size, files) in [
        (1, rw | region::MMAP, 0x1000, 1),
        (2, region::READ, 0x100, 0),
        (3, 0, 0, 0),
        (7, rw, 0x1000, 0),
    ] {
        let reply = region_info(&mut client, index, 4096);
        let (raw, rest) = reply.read::<spec::RawRegionInfo>();
        assert_eq!((raw.argsz.get(), raw.index.get()), (32, index));
        assert_eq!((raw.flags.get(), raw.size.get()), (flags, size));
        assert_eq!((rest.len(), reply.files.len()), (0, files));
    }
}

#[test]
fn d3_bad_argsz_and_lengths_are_refused() {
    let mut client = Client::new();
    for (command, len) in [
        (command::DEVICE_GET_INFO, 16),
        (command::DEVICE_GET_REGION_INFO, 32),
        (command::DEVICE_GET_REGION_IO_FDS, 16),
        (command::DEVICE_GET_IRQ_INFO, 16),
    ] {
        let mut body = vec![0; len];
        for argsz in [0, len as u32 - 1] {
            body[..4].copy_from_slice(argsz.as_bytes());
            assert_eq!(
                client.ask(command, &body).errno,
                EINVAL,
                "{command} {argsz}"
            );
        }
        body[..4].copy_from_slice((len as u32).as_bytes());
        assert_eq!(client.ask(command, &body).errno, 0);
        assert_eq!(client.ask(command, &body[..len - 1]).errno, EINVAL);
        assert_eq!(client.ask(command, &[]).errno, EINVAL);
        // The buffer for the reply as the request: some clients send that.
        body.resize(200, 0);
        assert_eq!(client.ask(command, &body).errno, 0, "{command}");
    }
}

#[test]
fn indices_out_of_range_are_refused() {
    let mut client = Client::new();
    for index in [9, 100, u32::MAX] {
        // QEMU 11.1 asks for one past the last.
        assert_eq!(region_info(&mut client, index, 32).errno, EINVAL);
        let body = words(&[16, 0, index, 0]);
        assert_eq!(
            client.ask(command::DEVICE_GET_REGION_IO_FDS, &body).errno,
            EINVAL
        );
        assert_eq!(
            client.ask(command::DEVICE_GET_IRQ_INFO, &body).errno,
            EINVAL
        );
    }
    assert_eq!(
        client
            .ask(command::DEVICE_GET_IRQ_INFO, &words(&[16, 0, 5, 0]))
            .errno,
        EINVAL
    );
}

#[test]
fn interrupts_are_as_the_function_says() {
    let mut client = Client::new();
    let reply = client.ask(command::DEVICE_GET_IRQ_INFO, &words(&[16, 0, irq::MSIX, 0]));
    let (raw, rest) = reply.read::<spec::RawIrqInfo>();
    assert_eq!((raw.argsz.get(), raw.index.get()), (16, irq::MSIX));
    assert_eq!((raw.flags.get(), raw.count.get()), (irq::EVENTFD, 2048));
    assert!(rest.is_empty());
}

#[test]
fn event_descriptors_are_offered_where_the_function_has_them() {
    let mut client = Client::new();
    let ask = |client: &mut Client, argsz: u32, index: u32| {
        let body = words(&[argsz, 0, index, 0]);
        client.ask(command::DEVICE_GET_REGION_IO_FDS, &body)
    };
    let reply = ask(&mut client, 16, 0);
    assert_eq!(
        (&reply.body[..], reply.files.len()),
        (&words(&[16, 0, 0, 0])[..], 0)
    );
    let file = || Arc::new(OwnedFd::from(UnixStream::pair().unwrap().0));
    let (one, two) = (file(), file());
    let at = |offset, file: &Arc<OwnedFd>, value| IoEventFd {
        offset,
        size: 4,
        value,
        file: file.clone(),
        store: None,
    };
    client.function().io_event_fds = vec![
        at(0x1000, &one, None),
        at(0x1004, &two, Some(7)),
        at(0x1008, &one, None),
    ];
    // Too little room: what it would take, and no descriptor.
    let reply = ask(&mut client, 16 + 119, 0);
    assert_eq!(
        (&reply.body[..], reply.files.len()),
        (&words(&[136, 0, 0, 3])[..], 0)
    );
    let reply = ask(&mut client, 136, 0);
    let (raw, list) = reply.read::<spec::RawIoFds>();
    assert_eq!((raw.count.get(), reply.files.len()), (3, 2));
    let list = <[spec::RawIoEventFd]>::ref_from_bytes(list).unwrap();
    let got: Vec<_> = list
        .iter()
        .map(|i| {
            (
                i.offset.get(),
                i.fd_index.get(),
                i.flags.get(),
                i.datamatch.get(),
            )
        })
        .collect();
    assert_eq!(
        got,
        [(0x1000, 0, 0, 0), (0x1004, 1, 1, 7), (0x1008, 0, 0, 0)]
    );
    assert_eq!(ask(&mut client, 136, 7).body, words(&[16, 0, 7, 0]));
    for body in [words(&[16, 1, 0, 0]), words(&[16, 0, 0, 1])] {
        assert_eq!(
            client.ask(command::DEVICE_GET_REGION_IO_FDS, &body).errno,
            EINVAL
        );
    }
}

#[test]
fn event_descriptors_that_the_client_cannot_take_are_left_out() {
    let mut client = Client::fresh();
    assert_eq!(client.version("{}").errno, 0);
    let io = |offset| IoEventFd {
        offset,
        size: 0,
        value: None,
        file: Arc::new(UnixStream::pair().unwrap().0.into()),
        store: None,
    };
    client.function().io_event_fds = vec![io(0), io(4)];
    let reply = client.ask(command::DEVICE_GET_REGION_IO_FDS, &words(&[4096, 0, 0, 0]));
    let (raw, list) = reply.read::<spec::RawIoFds>();
    assert_eq!((raw.count.get(), list.len(), reply.files.len()), (1, 40, 1));
}

#[test]
fn values_that_are_stored_have_their_memory_beside_them() {
    let mut client = Client::fresh();
    let three = r#"{"capabilities":{"max_msg_fds":3}}"#;
    assert_eq!(client.version(three).errno, 0);
    let file = || Arc::new(OwnedFd::from(UnixStream::pair().unwrap().0));
    let (one, two, three, memory) = (file(), file(), file(), file());
    let io = |offset: u64, file: &Arc<OwnedFd>, stored: bool| IoEventFd {
        offset,
        size: 4,
        value: None,
        file: file.clone(),
        store: stored.then(|| IoStore {
            file: memory.clone(),
            offset: offset - 0xff8,
        }),
    };
    client.function().io_event_fds = vec![
        io(0x1000, &one, true),
        io(0x1004, &one, true),
        io(0x1008, &two, false),
        // There is no room for this one's descriptor.
        io(0x100c, &three, true),
        io(0x1010, &two, true),
    ];
    let reply = client.ask(command::DEVICE_GET_REGION_IO_FDS, &words(&[4096, 0, 0, 0]));
    let (raw, list) = reply.read::<spec::RawIoFds>();
    assert_eq!((raw.argsz.get(), raw.count.get()), (16 + 4 * 48, 4));
    assert_eq!(reply.files.len(), 3);
    // By libvfio-user's offsets: descriptor, type, memory, and where in it.
    let entries: Vec<_> = list.chunks_exact(48).collect();
    let word = |i: usize, at: usize| entries[i][at..at + 4].to_vec();
    let double =
        |i: usize, at: usize| u64::from_le_bytes(entries[i][at..at + 8].try_into().unwrap());
    assert_eq!(entries.len(), 4);
    for (i, offset, fd) in [(0, 0x1000, 0), (1, 0x1004, 0), (3, 0x1010, 2)] {
        assert_eq!((double(i, 0), double(i, 8)), (offset, 4));
        assert_eq!(word(i, 16), [fd, 0, 0, 0]);
        assert_eq!(word(i, 20), [2, 0, 0, 0]);
        assert_eq!(word(i, 28), [1, 0, 0, 0]);
        assert_eq!((double(i, 32), double(i, 40)), (offset - 0xff8, 0));
    }
    assert_eq!((word(2, 16), word(2, 20)), (vec![2, 0, 0, 0], vec![0; 4]));
}

#[test]
fn what_is_not_implemented_is_said_to_be_so() {
    let mut client = Client::new();
    for command in [0, 11, 12, 14, 16, 17, 18, 19, 255, u16::MAX] {
        for (body, files) in [(0, 0), (8, 0), (100, 3)] {
            let files = client.files(files);
            let reply = client.ask_with(command, &vec![0; body], files);
            assert_eq!(reply.errno, ENOTSUP, "command {command}");
            assert_eq!(client.open_files(), 0);
        }
    }
    // Migration features, as QEMU probes them.
    for feature in [1, 2, 6, 7, 8] {
        let body = words(&[16, feature | 1 << 18, 0, 0]);
        assert_eq!(client.ask(command::DEVICE_FEATURE, &body).errno, ENOTSUP);
    }
}
