//! A client that we did not write: that of the `vfio_user` crate, over a socket, against a session with a thin driver.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use bluff_vfio_user::spec::{irq, region};
use bluff_vfio_user::{
    Errno, IrqChange, Irqs, Limits, Mapping, Progress, Region, RegionMap, Session, Target, Ticket,
    Written,
};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const AREAS: [(u64, u64); 2] = [(0x1000, 0x1000), (0x3000, 0x1000)];
const BASE: u64 = 0x2000;

/// What came of the client's calls.
#[derive(Debug, Default)]
struct Seen {
    maps: Vec<(Mapping, Option<OwnedFd>)>,
    irqs: Vec<(u32, u32, OwnedFd)>,
    log: Vec<String>,
}

/// A BAR in a file that is mapped in part, and configuration space.
struct Function {
    seen: Arc<Mutex<Seen>>,
    file: Arc<OwnedFd>,
    config: Vec<u8>,
    /// What is to be said to be over.
    pending: Vec<Ticket>,
}

impl Function {
    fn log(&self, line: String) {
        self.seen.lock().unwrap().log.push(line);
    }

    fn later(&mut self, ticket: Ticket) -> Progress {
        self.pending.push(ticket);
        Progress::Pending
    }
}

impl Target for Function {
    fn regions(&self) -> u32 {
        region::PCI_COUNT
    }
    fn region(&self, index: u32) -> Region {
        let map = || RegionMap {
            file: self.file.clone(),
            offset: BASE,
            areas: AREAS.to_vec(),
        };
        match index {
            0 => Region {
                size: 0x4000,
                read: true,
                write: true,
                map: Some(map()),
            },
            region::PCI_CONFIG => Region {
                size: 256,
                read: true,
                write: true,
                map: None,
            },
            _ => Region::default(),
        }
    }
    fn irq_types(&self) -> u32 {
        irq::PCI_COUNT
    }
    fn irqs(&self, index: u32) -> Irqs {
        Irqs {
            count: if index == irq::MSIX { 64 } else { 0 },
            flags: irq::EVENTFD | irq::NORESIZE,
        }
    }
    fn read(&mut self, region: u32, offset: u64, to: &mut [u8]) -> Result<(), Errno> {
        assert_eq!(region, region::PCI_CONFIG);
        let at = offset as usize;
        to.copy_from_slice(&self.config[at..at + to.len()]);
        Ok(())
    }
    fn write(
        &mut self,
        region: u32,
        offset: u64,
        from: &[u8],
        _: Ticket,
    ) -> Result<Written, Errno> {
        assert_eq!(region, region::PCI_CONFIG);
        let at = offset as usize;
        self.config[at..at + from.len()].copy_from_slice(from);
        Ok(Written::Done)
    }
    fn set_irqs(&mut self, index: u32, change: IrqChange) -> Result<(), Errno> {
        let mut seen = self.seen.lock().unwrap();
        match change {
            IrqChange::Disable => seen.irqs.retain(|i| i.0 != index),
            IrqChange::Assign { start, files, .. } => {
                for (vector, file) in (start..).zip(files) {
                    seen.irqs.retain(|i| (i.0, i.1) != (index, vector));
                    seen.irqs.extend(file.map(|file| (index, vector, file)));
                }
            }
            IrqChange::Now { action, vectors } => {
                seen.log.push(format!("{action:?} {vectors:?}"));
            }
        }
        Ok(())
    }
    fn map(
        &mut self,
        mapping: Mapping,
        file: Option<OwnedFd>,
        ticket: Ticket,
    ) -> Result<Progress, Errno> {
        self.seen.lock().unwrap().maps.push((mapping, file));
        Ok(self.later(ticket))
    }
    fn unmap(&mut self, gone: &[Mapping], ticket: Ticket) -> Progress {
        self.seen
            .lock()
            .unwrap()
            .maps
            .retain(|m| !gone.contains(&m.0));
        self.log(format!("unmap {}", gone.len()));
        self.later(ticket)
    }
    fn reset(&mut self, ticket: Ticket) -> Progress {
        self.log("reset".into());
        self.later(ticket)
    }
    fn disconnected(&mut self, _ticket: Ticket) -> Progress {
        *self.seen.lock().unwrap() = Seen::default();
        Progress::Done
    }
}

/// Reads once, no further than the present message.
#[allow(unsafe_code)]
fn read(socket: &UnixStream, want: usize) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
    let (mut bytes, mut fds) = (vec![0; want], [-1; 16]);
    let mut iov = [libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: want,
    }];
    // SAFETY: the one buffer is as long as is said, and lives over the call.
    let (len, count) = unsafe { socket.recv_with_fds(&mut iov, &mut fds) }.ok()?;
    bytes.truncate(len);
    // SAFETY: the kernel has just made these for us.
    let files = fds[..count]
        .iter()
        .map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) });
    (len > 0).then(|| (bytes, files.collect()))
}

/// Serves one client until it goes; what was refused.
fn serve(listener: &UnixListener, function: Function) -> Vec<u16> {
    let mut session = Session::new(function, Limits::default());
    let (socket, _) = listener.accept().unwrap();
    session.connect();
    let mut refused = Vec::new();
    while let Some((bytes, files)) = read(&socket, session.missing()) {
        session.receive(&bytes, files, false).unwrap();
        // The function says a little later that it is done.
        for ticket in std::mem::take(&mut session.target_mut().pending) {
            assert!(session.poll_transmit().is_none());
            session.finished(ticket);
        }
        while let Some(message) = session.poll_transmit() {
            let fds: Vec<_> = message.files.iter().map(|f| f.as_raw_fd()).collect();
            let sent = socket.send_with_fds(&[&message.bytes[..]], &fds).unwrap();
            assert_eq!(sent, message.bytes.len());
        }
        refused.extend(std::iter::from_fn(|| session.poll_refused()).map(|r| r.command));
    }
    assert_eq!(session.end(), Progress::Done);
    refused
}

struct Server {
    seen: Arc<Mutex<Seen>>,
    bar: File,
    thread: JoinHandle<Vec<u16>>,
    client: vfio_user::Client,
    _folder: tempfile::TempDir,
}

fn start() -> Server {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let seen: Arc<Mutex<Seen>> = Arc::default();
    let bar = tempfile::tempfile().unwrap();
    bar.set_len(BASE + 0x4000).unwrap();
    let function = Function {
        seen: seen.clone(),
        file: Arc::new(bar.try_clone().unwrap().into()),
        config: (0..=255).collect(),
        pending: Vec::new(),
    };
    let thread = std::thread::spawn(move || serve(&listener, function));
    let client = vfio_user::Client::new(&path).unwrap();
    Server {
        seen,
        bar,
        thread,
        client,
        _folder: folder,
    }
}

impl Server {
    /// The client goes; nothing was refused.
    fn end(self) {
        drop(self.client);
        assert_eq!(self.thread.join().unwrap(), Vec::<u16>::new());
        let seen = self.seen.lock().unwrap();
        assert!(seen.maps.is_empty() && seen.irqs.is_empty());
    }
}

#[test]
fn regions_and_what_can_be_mapped_of_them() {
    let server = start();
    for index in 0..region::PCI_COUNT {
        let found = server.client.region(index).unwrap();
        let size = [0x4000, 0, 0, 0, 0, 0, 0, 256, 0][index as usize];
        assert_eq!((found.index, found.size), (index, size));
        assert_eq!(found.file_offset.is_some(), index == 0);
    }
    let bar = server.client.region(0).unwrap();
    let areas: Vec<_> = bar
        .sparse_areas
        .iter()
        .map(|a| (a.offset, a.size))
        .collect();
    assert_eq!(areas, AREAS);
    let rw = region::READ | region::WRITE;
    assert_eq!(bar.flags, rw | region::MMAP | region::CAPS);
    // It is the file of the function, at the place that was said.
    let shared = bar.file_offset.as_ref().unwrap();
    assert_eq!(shared.start(), BASE);
    let mut file = shared.file();
    file.seek(SeekFrom::Start(BASE + 0x1000)).unwrap();
    file.write_all(b"doorbell").unwrap();
    let mut got = [0; 8];
    let mut own = &server.bar;
    own.seek(SeekFrom::Start(BASE + 0x1000)).unwrap();
    own.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"doorbell");
    server.end();
}

#[test]
fn configuration_space_is_read_and_written() {
    let mut server = start();
    let client = &mut server.client;
    let mut got = [0; 6];
    client
        .region_read(region::PCI_CONFIG, 10, &mut got)
        .unwrap();
    assert_eq!(got, [10, 11, 12, 13, 14, 15]);
    client
        .region_write(region::PCI_CONFIG, 11, &[99, 98])
        .unwrap();
    client
        .region_read(region::PCI_CONFIG, 10, &mut got)
        .unwrap();
    assert_eq!(got, [10, 99, 98, 13, 14, 15]);
    server.end();
}

#[test]
fn interrupts_are_found_set_signalled_and_taken_back() {
    let mut server = start();
    let client = &mut server.client;
    let info = client.get_irq_info(irq::MSIX).unwrap();
    assert_eq!((info.index, info.count), (irq::MSIX, 64));
    assert_eq!(info.flags, irq::EVENTFD | irq::NORESIZE);
    let events: Vec<_> = (0..8).map(|_| EventFd::new(0).unwrap()).collect();
    let fds: Vec<_> = events.iter().map(|e| e.as_raw_fd()).collect();
    let set = irq::DATA_EVENTFD | irq::ACTION_TRIGGER;
    client.set_irqs(irq::MSIX, set, 4, 8, &fds).unwrap();
    {
        let seen = server.seen.lock().unwrap();
        assert_eq!(seen.irqs.len(), 8);
        for (_, vector, file) in &seen.irqs {
            let mut file = File::from(file.try_clone().unwrap());
            file.write_all(&u64::from(*vector).to_ne_bytes()).unwrap();
        }
    }
    // Each vector has its own.
    let got: Vec<_> = events.iter().map(|e| e.read().unwrap()).collect();
    assert_eq!(got, [4, 5, 6, 7, 8, 9, 10, 11]);
    let none = irq::DATA_NONE | irq::ACTION_TRIGGER;
    client.set_irqs(irq::MSIX, none, 5, 2, &[]).unwrap();
    assert_eq!(server.seen.lock().unwrap().log, ["Trigger [5, 6]"]);
    client.set_irqs(irq::MSIX, none, 0, 0, &[]).unwrap();
    assert!(server.seen.lock().unwrap().irqs.is_empty());
    server.end();
}

#[test]
fn memory_is_mapped_unmapped_and_shared() {
    let mut server = start();
    let client = &mut server.client;
    let memory = tempfile::tempfile().unwrap();
    memory.set_len(0x4000).unwrap();
    client
        .dma_map(0x1000, 0x10_0000, 0x3000, memory.as_raw_fd())
        .unwrap();
    client
        .dma_map(0, 0x20_0000, 0x1000, memory.as_raw_fd())
        .unwrap();
    {
        let seen = server.seen.lock().unwrap();
        let (mapping, file) = &seen.maps[0];
        let want = Mapping {
            address: 0x10_0000,
            size: 0x3000,
            offset: 0x1000,
            read: true,
            write: true,
            file: true,
        };
        assert_eq!(*mapping, want);
        let same = |fd: BorrowedFd<'_>| {
            let file = File::from(fd.try_clone_to_owned().unwrap());
            std::os::unix::fs::MetadataExt::ino(&file.metadata().unwrap())
        };
        use std::os::fd::AsFd;
        assert_eq!(same(file.as_ref().unwrap().as_fd()), same(memory.as_fd()));
        assert_eq!(seen.maps.len(), 2);
    }
    // The client does not look at errors; the session's list of refused commands is empty at the end.
    client.dma_unmap(0x10_0000, 0x3000).unwrap();
    assert_eq!(server.seen.lock().unwrap().maps.len(), 1);
    client.dma_unmap(0x20_0000, 0x1000).unwrap();
    assert_eq!(server.seen.lock().unwrap().log, ["unmap 1", "unmap 1"]);
    server.end();
}

#[test]
fn a_reset_waits_for_the_function() {
    let mut server = start();
    server.client.reset().unwrap();
    assert_eq!(server.seen.lock().unwrap().log, ["reset"]);
    server.end();
}

#[test]
fn a_client_that_ends_its_socket_leaves_nothing() {
    let mut server = start();
    let memory = tempfile::tempfile().unwrap();
    memory.set_len(0x1000).unwrap();
    server
        .client
        .dma_map(0, 0, 0x1000, memory.as_raw_fd())
        .unwrap();
    let event = EventFd::new(0).unwrap();
    let set = irq::DATA_EVENTFD | irq::ACTION_TRIGGER;
    server
        .client
        .set_irqs(irq::MSIX, set, 0, 1, &[event.as_raw_fd()])
        .unwrap();
    server.client.shutdown().unwrap();
    server.end();
}
