//! Every command, against a server that keeps the rules.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bluff_vfio_client::spec::{command, irq};
use bluff_vfio_client::{
    Agreed, Area, DeviceInfo, DmaMap, DmaMemory, Error, Event, IrqAction, IrqData, IrqInfo,
    Options, Write,
};

use crate::function::{BAR, BAR_LEN, CONFIG, DOORBELLS, VECTORS};
use crate::server::Server;

fn memory(len: u64) -> OwnedFd {
    let file = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, len).unwrap();
    file
}

fn map(address: u64, size: u64, file: Option<&OwnedFd>) -> DmaMap<'_> {
    DmaMap {
        address,
        size,
        offset: 0,
        read: true,
        write: true,
        file: file.map(|f| f.as_fd()),
    }
}

#[test]
fn what_is_agreed_on_is_what_the_server_said() {
    let server = Server::new();
    let want = Agreed {
        max_fds: 16,
        write_multiple: true,
        ..Agreed::default()
    };
    assert_eq!(server.client.agreed(), want);
    server.end();
    let server = Server::with(Options {
        version: Some(r#"{"capabilities":{"max_msg_fds":3}}"#.into()),
        ..Options::default()
    });
    assert!(!server.client.agreed().write_multiple);
    server.end();
}

#[test]
fn messages_are_counted_by_command() {
    let server = Server::new();
    let client = &server.client;
    assert_eq!((client.sent(), client.received()), (1, 1));
    client.device_info().unwrap();
    client.region_post(BAR, 0, &[1]).unwrap();
    client.region_write(BAR, 0, &[1]).unwrap();
    assert_eq!(client.sent_of(command::REGION_WRITE), 2);
    assert_eq!((client.sent(), client.received()), (4, 3));
    server.end();
}

#[test]
fn device_regions_and_interrupts_are_described() {
    let server = Server::new();
    let client = &server.client;
    let want = DeviceInfo {
        flags: 3,
        regions: 9,
        irqs: 5,
    };
    assert_eq!(client.device_info().unwrap(), want);
    let want = IrqInfo {
        flags: irq::EVENTFD,
        count: u32::from(VECTORS),
    };
    assert_eq!(client.irq_info(irq::MSIX).unwrap(), want);
    let config = client.region_info(CONFIG).unwrap();
    assert_eq!((config.size, config.areas.len()), (256, 0));
    assert_eq!(client.region_info(3).unwrap().size, 0);
    assert_eq!(client.region_info(9).unwrap_err().errno(), Some(22));
    server.end();
}

#[test]
fn an_area_that_is_mapped_is_the_servers_memory() {
    let server = Server::new();
    let info = server.client.region_info(BAR).unwrap();
    let area = Area {
        offset: DOORBELLS,
        size: 0x1000,
    };
    assert_eq!((info.size, &info.areas[..]), (BAR_LEN as u64, &[area][..]));
    let before = server.client.sent();
    let maps = info.map().unwrap();
    maps[0].1.store32(8, 0x1234_5678);
    maps[0].1.store64(16, 1 << 40);
    let got = server.function(|f| {
        let mut bytes = [0; 24];
        rustix::io::pread(
            &f.file,
            &mut bytes,
            crate::function::FILE_OFFSET + DOORBELLS,
        )
        .unwrap();
        bytes
    });
    assert_eq!(got[8..12], 0x1234_5678u32.to_le_bytes());
    assert_eq!(got[16..24], (1u64 << 40).to_le_bytes());
    assert_eq!(
        (maps[0].1.load32(8), maps[0].1.load64(16)),
        (0x1234_5678, 1 << 40)
    );
    assert_eq!(server.client.sent(), before);
    server.end();
}

#[test]
fn regions_are_read_written_and_posted() {
    let server = Server::new();
    let client = &server.client;
    client.region_write(BAR, 0x10, &[1, 2, 3, 4]).unwrap();
    client.region_post(BAR, 0x14, &[5, 6, 7, 8]).unwrap();
    // Commands are served in order, so what was posted is done.
    assert_eq!(client.read64(BAR, 0x10).unwrap(), 0x0807_0605_0403_0201);
    let write = |offset, value: u8| Write {
        region: BAR,
        offset,
        count: 2,
        data: [value; 8],
    };
    let writes = [write(0x20, 9), write(0x24, 8)];
    assert_eq!(client.region_write_multi(&writes).unwrap(), 2);
    client.region_post_multi(&[write(0x22, 7)]).unwrap();
    assert_eq!(client.read64(BAR, 0x20).unwrap(), 0x0808_0707_0909);
    let past = client.region_write(BAR, BAR_LEN as u64, &[0]).unwrap_err();
    assert!(matches!(
        past,
        Error::Refused {
            command: command::REGION_WRITE,
            errno: 22
        }
    ));
    assert_eq!(client.read64(BAR, 0x10).unwrap(), 0x0807_0605_0403_0201);
    server.end();
}

#[test]
fn memory_is_shared_and_taken_back() {
    let server = Server::new();
    let client = &server.client;
    let file = memory(0x4000);
    client.dma_map(map(0x10000, 0x4000, Some(&file))).unwrap();
    client.dma_map(map(0x20000, 0x1000, None)).unwrap();
    let maps: Vec<_> = server.function(|f| {
        f.maps
            .iter()
            .map(|m| (m.0.address, m.1.is_some()))
            .collect()
    });
    assert_eq!(maps, vec![(0x10000, true), (0x20000, false)]);
    let twice = client.dma_map(map(0x11000, 0x1000, Some(&file)));
    assert_eq!(twice.unwrap_err().errno(), Some(17));
    client.dma_unmap(0x10000, 0x4000).unwrap();
    assert_eq!(server.function(|f| f.maps.len()), 1);
    client.dma_unmap_all().unwrap();
    assert_eq!(server.function(|f| f.maps.len()), 0);
    server.end();
}

#[test]
fn a_reply_can_be_waited_for_while_other_threads_go_on() {
    let server = Server::new();
    let client = &server.client;
    client.dma_map(map(0, 0x1000, None)).unwrap();
    let released = server.function(|f| f.released.clone());
    released.store(false, Ordering::Release);
    let sent = client.begin_dma_unmap(0, 0x1000).unwrap();
    let sent = client.wait_for(sent, Duration::ZERO).unwrap().unwrap_err();
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            client.region_post(BAR, 0, &[3]).unwrap();
            client.read64(BAR, 0).unwrap()
        });
        // The server keeps the read behind the unmap.
        let limit = Duration::from_millis(20);
        let sent = client.wait_for(sent, limit).unwrap().unwrap_err();
        released.store(true, Ordering::Release);
        assert_eq!(client.wait(sent).unwrap().body.len(), 24);
        assert_eq!(other.join().unwrap(), 3);
    });
    server.end();
}

#[test]
fn replies_go_to_the_threads_that_asked() {
    let server = Server::new();
    let client = &server.client;
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            scope.spawn(move || {
                for round in 0..300u64 {
                    let value = (thread << 32 | round).to_le_bytes();
                    client.region_post(BAR, 8 * thread, &value).unwrap();
                    let got = client.read64(BAR, 8 * thread).unwrap();
                    assert_eq!(got, thread << 32 | round);
                }
            });
        }
    });
    server.end();
}

#[test]
fn a_thread_whose_reply_another_one_reads_is_woken() {
    let server = Server::new();
    let client = &server.client;
    let released = server.function(|f| f.released.clone());
    released.store(false, Ordering::Release);
    // The reply to the first comes while somebody waits for the second, which comes when the first is known.
    let first = client
        .send(command::DEVICE_GET_INFO, &[&[16, 0, 0, 0], &[0; 12]], &[])
        .unwrap();
    let second = client.begin_reset().unwrap();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(move || client.wait(second).map(drop));
        client.wait(first).unwrap();
        released.store(true, Ordering::Release);
        waiter.join().unwrap().unwrap();
    });
    server.end();
}

#[test]
fn a_reply_that_nobody_waits_for_any_more_is_dropped() {
    let server = Server::new();
    let client = &server.client;
    let released = server.function(|f| f.released.clone());
    released.store(false, Ordering::Release);
    let sent = client.begin_reset().unwrap();
    let sent = client.wait_for(sent, Duration::ZERO).unwrap().unwrap_err();
    client.forget(sent);
    released.store(true, Ordering::Release);
    let received = client.received();
    assert_eq!(client.read64(BAR, 0).unwrap(), 0);
    assert_eq!(client.received(), received + 2);
    server.end();
}

#[test]
fn interrupts_go_out_in_chunks_and_come_through_their_events() {
    let server = Server::new();
    let client = &server.client;
    let events: Vec<_> = (0..VECTORS).map(|_| Event::new().unwrap()).collect();
    let fds: Vec<_> = events.iter().map(|e| e.as_fd()).collect();
    client.set_events(irq::MSIX, 0, &fds).unwrap();
    let log = server.function(|f| std::mem::take(&mut f.log));
    assert_eq!(log, ["assign 2 0 16", "assign 2 16 16", "assign 2 32 8"]);
    server.function(|f| {
        for ((_, vector), file) in &f.irqs {
            let count = u64::from(*vector) + 1;
            rustix::io::write(file, &count.to_ne_bytes()).unwrap();
        }
    });
    for (i, event) in events.iter().enumerate() {
        assert!(event.wait(Duration::ZERO));
        assert_eq!((event.take(), event.take()), (i as u64 + 1, 0));
    }
    let trigger = IrqAction::Trigger;
    client
        .set_irqs(irq::MSIX, 3, trigger, IrqData::Bools(&[true, false, true]))
        .unwrap();
    client
        .set_irqs(irq::INTX, 0, IrqAction::Unmask, IrqData::None { count: 1 })
        .unwrap();
    client
        .set_irqs(irq::MSIX, 0, trigger, IrqData::Drop { count: 2 })
        .unwrap();
    let log = server.function(|f| std::mem::take(&mut f.log));
    assert_eq!(log, ["Trigger 2 [3, 5]", "Unmask 0 [0]", "assign 2 0 2"]);
    assert_eq!(server.function(|f| f.irqs.len()), usize::from(VECTORS) - 2);
    client.disable_irqs(irq::MSIX).unwrap();
    assert_eq!(server.function(|f| f.irqs.len()), 0);
    server.end();
}

#[test]
fn descriptors_that_stand_for_writes() {
    let server = Server::new();
    let found = server.client.io_event_fds(BAR).unwrap();
    let shape: Vec<_> = found.iter().map(|e| (e.offset, e.size, e.value)).collect();
    assert_eq!(shape, [(DOORBELLS, 4, None), (DOORBELLS + 8, 4, Some(7))]);
    rustix::io::write(&found[1].file, &5u64.to_ne_bytes()).unwrap();
    let got = server.function(|f| {
        let mut bytes = [0; 8];
        rustix::io::read(&f.io_event, &mut bytes).unwrap();
        u64::from_ne_bytes(bytes)
    });
    assert_eq!(got, 5);
    assert!(server.client.io_event_fds(CONFIG).unwrap().is_empty());
    server.end();
}

#[test]
fn a_reset_is_awaited() {
    let server = Server::new();
    server.client.reset().unwrap();
    assert_eq!(server.function(|f| f.log.clone()), ["reset"]);
    server.end();
}

/// 4 KiB at 0x30000, of which the second half may not be written.
struct Ram(Mutex<Vec<u8>>);

impl DmaMemory for Ram {
    fn read(&self, address: u64, to: &mut [u8]) -> Result<(), u32> {
        to.copy_from_slice(&self.0.lock().unwrap()[(address - 0x30000) as usize..][..to.len()]);
        Ok(())
    }
    fn write(&self, address: u64, from: &[u8]) -> Result<(), u32> {
        let at = (address - 0x30000) as usize;
        if at >= 0x800 {
            return Err(1);
        }
        self.0.lock().unwrap()[at..at + from.len()].copy_from_slice(from);
        Ok(())
    }
}

#[test]
fn dma_messages_are_answered_by_whoever_reads() {
    let ram = Arc::new(Ram(Mutex::new(vec![7; 0x1000])));
    let server = Server::with(Options {
        memory: Some(ram.clone()),
        ..Options::default()
    });
    let client = &server.client;
    client.dma_map(map(0x30000, 0x1000, None)).unwrap();
    server.with_session(|s| {
        let now = Instant::now();
        s.dma_write(1, 0x30010, vec![1, 2, 3], now).unwrap();
        s.dma_write(2, 0x30800, vec![9], now).unwrap();
        s.dma_read(3, 0x3000f, 5, now).unwrap();
    });
    // Three commands of the server, by `serve` or by the wait for a reply.
    let mut came = client.serve(Duration::ZERO).unwrap();
    while came < 3 {
        came += client.serve(Duration::from_millis(1)).unwrap();
    }
    // What was answered has arrived where a later command is answered.
    client.read64(BAR, 0).unwrap();
    let done = server.with_session(|s| {
        let done = std::iter::from_fn(|| s.poll_dma());
        let mut done: Vec<_> = done
            .map(|d| (d.tag, d.result.map_err(|e| e.get())))
            .collect();
        done.sort_by_key(|d| d.0);
        done
    });
    let want = [(1, Ok(vec![])), (2, Err(1)), (3, Ok(vec![7, 1, 2, 3, 7]))];
    assert_eq!(done, want);
    assert_eq!(client.sent_of(command::DMA_WRITE), 2);
    server.end();
}
