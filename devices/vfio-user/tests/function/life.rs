//! What a client that behaves sees of a function.

use bluff_vfio_user::AttachmentEvent;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::support::*;

#[test]
fn a_function_is_found_with_its_regions() {
    let card = Card::new();
    let port = card.add("a");
    let mut client = port.client();
    let (info, _): (spec::RawDeviceInfo, _) = client
        .ask(command::DEVICE_GET_INFO, &words(&[16, 0, 0, 0]))
        .read();
    assert_eq!((info.num_regions.get(), info.num_irqs.get()), (9, 5));
    for index in 0..9 {
        let body = [words(&[256, 0, index, 0]), vec![0; 16]].concat();
        let reply = client.ask(command::DEVICE_GET_REGION_INFO, &body);
        let (raw, rest): (spec::RawRegionInfo, _) = reply.read();
        let size = [BAR0, 0, 0, 0, 0, 0, 0, 4096, 0][index as usize];
        assert_eq!(raw.size.get(), size, "region {index}");
        let rw = region::READ | region::WRITE;
        let flags = match index {
            0 => rw | region::MMAP | region::CAPS,
            7 => rw,
            _ => 0,
        };
        assert_eq!(raw.flags.get(), flags, "region {index}");
        assert_eq!(reply.files.len(), usize::from(index == 0));
        if index == 0 {
            let (sparse, areas) =
                <spec::RawSparse as zerocopy::FromBytes>::read_from_prefix(rest).unwrap();
            assert_eq!(sparse.areas.get(), 1);
            // Not those of MSI-X.
            assert_eq!(areas, [AREA, PAGE].as_bytes());
            // It is the device's own memory, where the region and the area begin.
            let file = std::fs::File::from(duplicate(&reply.files[0]));
            set_word(&file, raw.offset.get() + AREA + 8, 0x1234);
            let own = std::fs::File::from(duplicate(&port.area.file));
            assert_eq!(word_of(&own, port.area.file_offset + 8), 0x1234);
        }
    }
    assert_eq!(client.read(region::PCI_CONFIG, 0, 4), [0x36, 0x1b, 0x10, 0]);
    assert_eq!(client.read(region::PCI_CONFIG, 0, 4096).len(), 4096);
    // Of an access that no driver makes nothing comes, and nothing breaks.
    assert_eq!(client.read(0, 1, 3), [0xff; 3]);
}

#[test]
fn writes_by_descriptor_are_offered() {
    let card = Card::new();
    let port = card.add("a");
    let mut client = port.client();
    for (index, count) in [(0, 2), (1, 0), (6, 0), (7, 0)] {
        let reply = client.ask(
            command::DEVICE_GET_REGION_IO_FDS,
            &words(&[4096, 0, index, 0]),
        );
        let (raw, _): (spec::RawIoFds, _) = reply.read();
        assert_eq!(raw.count.get(), count, "region {index}");
        // Both registers have the same one.
        assert_eq!(reply.files.len(), usize::from(count > 0));
    }
}

#[test]
fn interrupts_are_counted_set_and_given() {
    let card = Card::new();
    let port = card.add("a");
    let mut client = port.master();
    for (index, count, flags) in [
        (irq::INTX, 1, irq::EVENTFD | irq::MASKABLE | irq::AUTOMASKED),
        (irq::MSI, 0, 0),
        (irq::MSIX, VECTORS.into(), irq::EVENTFD),
        (irq::ERR, 1, irq::EVENTFD),
        (irq::REQ, 0, 0),
    ] {
        let reply = client.ask(command::DEVICE_GET_IRQ_INFO, &words(&[16, 0, index, 0]));
        let (raw, _): (spec::RawIrqInfo, _) = reply.read();
        assert_eq!((raw.count.get(), raw.flags.get()), (count, flags));
    }
    let file = memory(PAGE);
    assert_eq!(client.map(0, PAGE, &file, 0), 0);
    let vectors = client.vectors(0, 16);
    client.device_writes(8, 77);
    assert_eq!(heard(&vectors[0]), 1);
    assert_eq!(word_of(&file, 8), 77);
    client.device_writes(PAGE, 77);
    assert_eq!(heard(&vectors[1]), 1, "it could not");
    // A test of the way.
    let body = irqs(irq::DATA_NONE | irq::ACTION_TRIGGER, irq::MSIX, 5, 2);
    assert_eq!(client.ask(command::DEVICE_SET_IRQS, &body).errno, 0);
    assert_eq!((heard(&vectors[5]), heard(&vectors[6])), (1, 1));
    // Taken back; what is signalled then is pending, and given to the next one.
    let body = irqs(irq::DATA_NONE | irq::ACTION_TRIGGER, irq::MSIX, 0, 0);
    assert_eq!(client.ask(command::DEVICE_SET_IRQS, &body).errno, 0);
    client.device_writes(8, 78);
    assert!(vectors[0].read().is_err());
    let vectors = client.vectors(0, 1);
    assert_eq!(heard(&vectors[0]), 1);
    // QEMU takes one away in this way.
    let body = irqs(irq::DATA_EVENTFD | irq::ACTION_TRIGGER, irq::MSIX, 0, 1);
    assert_eq!(client.ask(command::DEVICE_SET_IRQS, &body).errno, 0);
    client.device_writes(8, 79);
    assert!(vectors[0].read().is_err());
    let event = [EventFd::new(0).unwrap()];
    assert_eq!(client.set_irqs(irq::ERR, 0, &event), 0);
}

#[test]
fn intx_is_given_once_and_again_when_it_is_unmasked() {
    let card = Card::new();
    let port = card.add("a");
    let mut client = port.master();
    let event = [EventFd::new(EFD_NONBLOCK).unwrap()];
    assert_eq!(client.set_irqs(irq::INTX, 0, &event), 0);
    let act = |action| irqs(irq::DATA_NONE | action, irq::INTX, 0, 1);
    let (mask, unmask) = (act(irq::ACTION_MASK), act(irq::ACTION_UNMASK));
    client.write_u64(LEVEL, 1);
    assert_eq!(heard(&event[0]), 1);
    assert_eq!(client.ask(command::DEVICE_SET_IRQS, &unmask).errno, 0);
    assert_eq!(heard(&event[0]), 1);
    client.write_u64(LEVEL, 0);
    assert_eq!(client.ask(command::DEVICE_SET_IRQS, &mask).errno, 0);
    client.write_u64(LEVEL, 1);
    assert!(event[0].read().is_err(), "masked");
    assert_eq!(client.ask(command::DEVICE_SET_IRQS, &unmask).errno, 0);
    assert_eq!(heard(&event[0]), 1);
    // A descriptor that unmasks is not for us.
    let body = irqs(irq::DATA_EVENTFD | irq::ACTION_UNMASK, irq::INTX, 0, 1);
    let file = duplicate(&std::io::stdin());
    let reply = client.ask_with(
        command::DEVICE_SET_IRQS,
        &body,
        &[std::os::fd::AsFd::as_fd(&file)],
    );
    assert_eq!(reply.errno, 95);
}

#[test]
fn messages_are_counted_by_command() {
    let card = Card::new();
    let port = card.add("a");
    let mut client = port.client();
    client.read(0, 0, 4);
    client.read(0, 0, 4);
    client.send(
        command::REGION_WRITE,
        flag::NO_REPLY,
        &write(0, DATA, &[1]),
        &[],
    );
    client.send(77, 0, &[], &[]);
    assert_eq!(client.next().unwrap().errno, 95);
    let seen: Vec<_> = port.counters.all().filter(|m| m.received > 0).collect();
    let seen: Vec<_> = seen
        .iter()
        .map(|m| (m.command, m.received, m.sent))
        .collect();
    let want = [
        ("VERSION", 1, 1),
        ("REGION_READ", 2, 2),
        ("REGION_WRITE", 1, 0),
        ("OTHER", 1, 1),
    ];
    assert_eq!(seen, want);
    assert_eq!(port.counters.total(), 9);
}

#[test]
fn a_function_comes_and_goes() {
    let card = Card::new();
    let port = card.add("a");
    let mut client = port.master();
    let file = memory(PAGE);
    assert_eq!(client.map(0, PAGE, &file, 0), 0);
    port.seen.expect(AttachmentEvent::Connected);
    port.seen.expect(AttachmentEvent::Negotiated);
    port.seen.hold(true);
    let function = port.remove();
    let waiting = port.seen.next();
    assert_eq!(waiting.what, "reset");
    assert!(waiting.bound <= BOUND && function.try_recv().is_err());
    assert!(client.is_closed());
    (waiting.done)();
    let mut function = function.recv_timeout(PATIENCE).unwrap();
    port.seen.expect(AttachmentEvent::Disconnected(Some(
        "the function is removed".into(),
    )));
    let mut command = [0; 2];
    function
        .read(bluff_pci::Region::Config, COMMAND, &mut command)
        .unwrap();
    assert_eq!(command, [0, 0]);
    assert_eq!(mapped(&file), 0);
    // Its name is free, and nobody is served by what has gone.
    let mut late = port.fresh();
    assert!(late.is_closed());
    port.seen.hold(false);
    card.add("a").client();
}
