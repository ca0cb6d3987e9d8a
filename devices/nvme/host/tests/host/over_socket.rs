//! The host over vfio-user: by our client and by the `vfio_user` crate's, doorbells by messages and by stores, in front of the model
//! behind a session.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use bluff_nvme_host::{
    Bar, Buffer, ClientBar, Command, Controller, CrateBar, HostMemory, Load, LoadConfig, Pattern,
    Setup,
};
use bluff_vfio_client::spec::command;
use bluff_vfio_client::{Client, Error, Event, Mapped, Options, Socket, spec};
use bluff_vfio_user::{
    Errno, IrqChange, Irqs, Limits, Mapping, Progress, Region, RegionMap, Session, Target, Ticket,
    Written,
};
use zerocopy::IntoBytes;

use crate::bring_up::memory;
use crate::model::{BLOCK, BLOCKS, Model};

const LIMIT: Duration = Duration::from_secs(10);
const PAGE: u64 = 0x1000;
/// Doorbells that are looked at.
const LOOKED_AT: u64 = 16;

struct Function {
    model: Model,
    /// The page of doorbells, where the host may map it.
    doorbells: Option<(Arc<OwnedFd>, Mapped)>,
    /// What stands there, as far as it was looked at.
    seen: [u32; LOOKED_AT as usize],
    maps: Vec<Mapping>,
}

impl Function {
    fn new(memory: &Arc<HostMemory>, mapped: bool) -> Self {
        let doorbells = mapped.then(|| {
            let file = rustix::fs::memfd_create("doorbells", rustix::fs::MemfdFlags::CLOEXEC);
            let file = Arc::new(file.unwrap());
            rustix::fs::ftruncate(&file, 2 * PAGE).unwrap();
            let mapped = Mapped::new(file.as_fd(), PAGE, PAGE, true).unwrap();
            (file, mapped)
        });
        Self {
            model: Model::new(memory),
            doorbells,
            seen: [0; LOOKED_AT as usize],
            maps: Vec::new(),
        }
    }

    /// What a reactor does that polls its doorbells.
    fn poll(&mut self) {
        let Some((_, page)) = &self.doorbells else {
            return;
        };
        for i in 0..LOOKED_AT {
            let value = page.load32(4 * i as usize);
            if !self.model.has_queue(i as u16 / 2) {
                // The next one of that number begins at 0.
                page.store32(4 * i as usize, 0);
                self.seen[i as usize] = 0;
            } else if std::mem::replace(&mut self.seen[i as usize], value) != value {
                self.model.doorbell(PAGE + 4 * i, value).unwrap();
            }
        }
    }
}

impl Target for Function {
    fn regions(&self) -> u32 {
        9
    }
    fn region(&self, index: u32) -> Region {
        let map = self.doorbells.as_ref().map(|(file, _)| RegionMap {
            file: file.clone(),
            offset: 0,
            areas: vec![(PAGE, PAGE)],
        });
        match index {
            0 => Region {
                size: 2 * PAGE,
                read: true,
                write: true,
                map,
            },
            _ => Region::default(),
        }
    }
    fn irq_types(&self) -> u32 {
        5
    }
    fn irqs(&self, index: u32) -> Irqs {
        let count = if index == 2 { 4 } else { 0 };
        Irqs { count, flags: 1 }
    }
    fn read(&mut self, _region: u32, offset: u64, to: &mut [u8]) -> Result<(), Errno> {
        let value = self.model.read64(offset).unwrap();
        to.copy_from_slice(&value.to_le_bytes()[..to.len()]);
        Ok(())
    }
    fn write(
        &mut self,
        _region: u32,
        offset: u64,
        from: &[u8],
        _ticket: Ticket,
    ) -> Result<Written, Errno> {
        let mut bytes = [0; 8];
        bytes[..from.len()].copy_from_slice(from);
        self.model
            .write64(offset, u64::from_le_bytes(bytes))
            .unwrap();
        Ok(Written::Done)
    }
    fn set_irqs(&mut self, _index: u32, change: IrqChange) -> Result<(), Errno> {
        if let IrqChange::Assign { start, files, .. } = change {
            self.model.with(|state| {
                for (vector, file) in (start as usize..).zip(files) {
                    state.events[vector] = Arc::new(Event::from(file.unwrap()));
                }
            });
        }
        Ok(())
    }
    fn map(&mut self, mapping: Mapping, _file: Option<OwnedFd>) -> Result<(), Errno> {
        self.maps.push(mapping);
        Ok(())
    }
    fn unmap(&mut self, gone: &[Mapping], _ticket: Ticket) -> Progress {
        self.maps.retain(|m| !gone.contains(m));
        Progress::Done
    }
    fn reset(&mut self, _ticket: Ticket) -> Progress {
        Progress::Done
    }
    fn disconnected(&mut self, _ticket: Ticket) -> Progress {
        Progress::Done
    }
}

/// Serves one client until it goes or the test is over.
fn serve(stream: UnixStream, function: Function, over: &AtomicBool) {
    let socket = Socket::new(stream, 2 << 20);
    let mut session = Session::new(function, Limits::default());
    session.connect();
    while !over.load(Ordering::Acquire) {
        let limit = match session.target().doorbells {
            Some(_) => Duration::ZERO,
            None => Duration::from_millis(1),
        };
        match socket.receive(limit) {
            Ok(Some(m)) => {
                let bytes = [m.header.as_bytes(), &m.body].concat();
                session.receive(&bytes, m.files, false).unwrap();
            }
            Ok(None) => std::thread::yield_now(),
            Err(Error::Closed) => break,
            Err(other) => panic!("{other}"),
        }
        session.target_mut().poll();
        while let Some(message) = session.poll_transmit() {
            let files: Vec<_> = message.files.iter().map(|f| f.as_fd()).collect();
            match socket.send(&[&message.bytes], &files) {
                Ok(()) | Err(Error::Closed) => {}
                Err(other) => panic!("{other}"),
            }
        }
    }
    assert!(session.poll_refused().is_none());
}

struct Server {
    over: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Server {
    fn start(listener: UnixListener, memory: &Arc<HostMemory>, mapped: bool) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let (function, stop) = (Function::new(memory, mapped), over.clone());
        let thread = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            serve(stream, function, &stop);
        });
        Self { over, thread }
    }

    fn end(self) {
        self.over.store(true, Ordering::Release);
        self.thread.join().unwrap();
    }
}

/// Everything once: registers, Identify, queues with an interrupt, data there and back.
fn use_it<B: Bar>(bar: B, memory: &Arc<HostMemory>, event: Option<Arc<Event>>) -> Controller<B> {
    let mut controller = Controller::new(bar, memory).unwrap();
    controller.enable(&Setup::default()).unwrap();
    assert_eq!(controller.identify_controller().unwrap().serial(), "SERIAL");
    let vector = event.map(|e| (1, e));
    let mut queues = controller.create_queues(1, 1, 16, vector).unwrap();
    let mut data = Buffer::scattered(memory, 16, 8192).unwrap();
    let pointer = data.prp().unwrap();
    for round in 0..20u8 {
        data.fill(round);
        let write = Command::write(1, 16 * u64::from(round), 16).data(pointer);
        queues.run(0, &write, LIMIT).unwrap();
        data.fill(0xff);
        let read = Command::read(1, 16 * u64::from(round), 16).data(pointer);
        queues.run(0, &read, LIMIT).unwrap();
        assert_eq!(data.read(), [round; 8192]);
    }
    controller.delete_queues(queues).unwrap();
    controller
}

#[test]
fn over_our_client_with_doorbells_by_messages_and_by_stores() {
    for mapped in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let memory = memory();
        let listener = UnixListener::bind(&path).unwrap();
        let server = Server::start(listener, &memory, mapped);
        let client = Arc::new(Client::connect(&path, Options::default()).unwrap());
        memory.share(&client).unwrap();
        let event = Arc::new(Event::new().unwrap());
        let fds = [event.as_fd()];
        client.set_events(spec::irq::MSIX, 1, &fds).unwrap();
        let bar = ClientBar::new(&client).unwrap();
        assert_eq!(bar.is_mapped(), mapped);
        let mut controller = use_it(bar, &memory, Some(event));
        // A load costs messages only where doorbells are not mapped.
        let queues = controller.create_queues(1, 1, 64, None).unwrap();
        let config = LoadConfig {
            nsid: 1,
            capacity: BLOCKS,
            block: BLOCK as u32,
            len: 4096,
            depth: 8,
            pattern: Pattern::Random,
            write: false,
            seed: 3,
        };
        let mut load = Load::new(queues, &memory, config).unwrap();
        let before = client.sent();
        let mut done = 0;
        while done < 200 {
            done += load.step().unwrap().completed;
        }
        while load.in_flight() > 0 {
            load.drain().unwrap();
        }
        let sent = client.sent() - before;
        assert_eq!(sent == 0, mapped, "{sent} messages");
        assert!(client.sent_of(command::REGION_READ) > 0);
        controller.disable().unwrap();
        server.end();
    }
}

#[test]
fn over_the_client_of_the_vfio_user_crate() {
    for mapped in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let memory = memory();
        let listener = UnixListener::bind(&path).unwrap();
        let server = Server::start(listener, &memory, mapped);
        let mut client = vfio_user::Client::new(&path).unwrap();
        for region in memory.memory().regions() {
            let (of, file) = (region.config(), region.as_fd());
            let file = File::from(file.try_clone_to_owned().unwrap());
            client
                .dma_map(of.file_offset, of.guest_addr, of.size, file.as_raw_fd())
                .unwrap();
        }
        let mut controller = use_it(CrateBar::new(client).unwrap(), &memory, None);
        controller.disable().unwrap();
        server.end();
    }
}
