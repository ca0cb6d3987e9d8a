//! A function that records, and a client over it.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use bluff_vfio_user::{
    Errno, Limits, Mapping, Outgoing, Progress, Session, Target, Ticket, Written, framing,
};
use bluff_vfio_user::{IoEventFd, IrqAction, IrqChange, Irqs, Region, RegionMap};
use zerocopy::FromBytes;

pub use crate::wire::*;

pub const ENOTSUP: i32 = 95;
pub const E2BIG: i32 = 7;
pub const EEXIST: i32 = 17;
pub const ENOSPC: i32 = 28;
pub const EPERM: i32 = 1;

/// Region and offset of the register whose writes end DMA.
pub const COMMAND: (u32, u64) = (7, 4);

/// What a function was asked for.
#[derive(Debug)]
pub struct Function {
    /// Configuration space and the first BAR, 4 KiB each.
    pub memory: BTreeMap<u32, Vec<u8>>,
    pub maps: Vec<(Mapping, Option<OwnedFd>)>,
    pub irqs: BTreeMap<(u32, u32), OwnedFd>,
    pub log: Vec<String>,
    /// Unmaps, resets, writes to COMMAND and ends are over later.
    pub hold: bool,
    pub held: Vec<Ticket>,
    /// What it says to the next map, write or set_irqs.
    pub refuse: Option<Errno>,
    pub file: Arc<OwnedFd>,
    pub io_event_fds: Vec<IoEventFd>,
}

impl Default for Function {
    fn default() -> Self {
        Self {
            memory: [(0, vec![0; 0x4000]), (7, vec![0; 4096])].into(),
            maps: Vec::new(),
            irqs: BTreeMap::new(),
            log: Vec::new(),
            hold: false,
            held: Vec::new(),
            refuse: None,
            file: Arc::new(UnixStream::pair().unwrap().0.into()),
            io_event_fds: Vec::new(),
        }
    }
}

impl Function {
    fn later(&mut self, ticket: Ticket) -> Progress {
        if !self.hold {
            return Progress::Done;
        }
        self.held.push(ticket);
        Progress::Pending
    }
}

impl Target for Function {
    fn regions(&self) -> u32 {
        region::PCI_COUNT
    }

    /// 0: a BAR of 16 KiB with two areas to map; 1: a BAR that is mapped as a whole; 2: read only; 7: configuration space.
    fn region(&self, index: u32) -> Region {
        let map = |areas| RegionMap {
            file: self.file.clone(),
            offset: 0x10000,
            areas,
        };
        let (size, write, map) = match index {
            0 => (
                0x4000,
                true,
                Some(map(vec![(0x1000, 0x1000), (0x3000, 0x1000)])),
            ),
            1 => (0x1000, true, Some(map(vec![]))),
            2 => (0x100, false, None),
            7 => (0x1000, true, None),
            _ => return Region::default(),
        };
        Region {
            size,
            read: true,
            write,
            map,
        }
    }

    fn io_event_fds(&mut self, region: u32) -> Vec<IoEventFd> {
        match region {
            0 => self.io_event_fds.clone(),
            _ => Vec::new(),
        }
    }

    fn irq_types(&self) -> u32 {
        irq::PCI_COUNT
    }

    fn irqs(&self, index: u32) -> Irqs {
        let (count, flags) = match index {
            irq::INTX => (1, irq::EVENTFD | irq::MASKABLE | irq::AUTOMASKED),
            irq::MSIX => (2048, irq::EVENTFD),
            irq::ERR | irq::REQ => (1, irq::EVENTFD),
            _ => (0, 0),
        };
        Irqs { count, flags }
    }

    fn read(&mut self, region: u32, offset: u64, to: &mut [u8]) -> Result<(), Errno> {
        let at = offset as usize;
        if let Some(memory) = self.memory.get(&region) {
            to.copy_from_slice(&memory[at..at + to.len()]);
        }
        Ok(())
    }

    fn write(
        &mut self,
        region: u32,
        offset: u64,
        from: &[u8],
        ticket: Ticket,
    ) -> Result<Written, Errno> {
        if let Some(errno) = self.refuse.take() {
            return Err(errno);
        }
        self.log
            .push(format!("write {region} {offset:#x} {from:?}"));
        let at = offset as usize;
        if let Some(memory) = self.memory.get_mut(&region) {
            memory[at..at + from.len()].copy_from_slice(from);
        }
        Ok(match (region, offset) {
            COMMAND => Written::Unsettled(self.later(ticket)),
            _ => Written::Done,
        })
    }

    fn set_irqs(&mut self, index: u32, change: IrqChange) -> Result<(), Errno> {
        if let Some(errno) = self.refuse.take() {
            return Err(errno);
        }
        match change {
            IrqChange::Disable => self.irqs.retain(|key, _| key.0 != index),
            IrqChange::Now { action, vectors } => {
                self.log.push(format!("{action:?} {index} {vectors:?}"));
            }
            IrqChange::Assign {
                action: IrqAction::Trigger,
                start,
                files,
            } => {
                for (vector, file) in (start..).zip(files) {
                    match file {
                        Some(file) => drop(self.irqs.insert((index, vector), file)),
                        None => drop(self.irqs.remove(&(index, vector))),
                    }
                }
            }
            IrqChange::Assign {
                action,
                start,
                files,
            } => {
                self.log
                    .push(format!("on {action:?} {index} {start} {}", files.len()));
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
        if let Some(errno) = self.refuse.take() {
            return Err(errno);
        }
        self.maps.push((mapping, file));
        Ok(self.later(ticket))
    }

    fn unmap(&mut self, gone: &[Mapping], ticket: Ticket) -> Progress {
        self.maps.retain(|(m, _)| !gone.contains(m));
        self.log.push(format!("unmap {}", gone.len()));
        self.later(ticket)
    }

    fn reset(&mut self, ticket: Ticket) -> Progress {
        self.log.push("reset".into());
        self.later(ticket)
    }

    fn disconnected(&mut self, ticket: Ticket) -> Progress {
        self.log.push("disconnected".into());
        self.maps.clear();
        self.irqs.clear();
        self.held.clear();
        self.later(ticket)
    }
}

impl From<Outgoing> for Reply {
    fn from(message: Outgoing) -> Self {
        let (raw, body) = spec::RawHeader::read_from_prefix(&message.bytes).unwrap();
        Self::new(raw, body, message.files)
    }
}

pub struct Client {
    pub session: Session<Function>,
    next_id: u16,
    peers: Vec<UnixStream>,
}

impl Client {
    /// Connected; no version was said.
    pub fn fresh() -> Self {
        Self::with(Limits::default())
    }

    pub fn with(limits: Limits) -> Self {
        let mut session = Session::new(Function::default(), limits);
        session.connect();
        Self {
            session,
            next_id: 0,
            peers: Vec::new(),
        }
    }

    /// As QEMU after its first message.
    pub fn new() -> Self {
        let mut client = Self::fresh();
        client.negotiate();
        client
    }

    pub fn negotiate(&mut self) {
        assert_eq!(self.version(QEMU).errno, 0);
    }

    pub fn version(&mut self, text: &str) -> Reply {
        self.ask(command::VERSION, &version(text))
    }

    pub fn function(&mut self) -> &mut Function {
        self.session.target_mut()
    }

    /// A descriptor to send.
    pub fn file(&mut self) -> OwnedFd {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        self.peers.push(ours);
        theirs.into()
    }

    pub fn files(&mut self, count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| self.file()).collect()
    }

    /// How many of the descriptors that were sent are open.
    pub fn open_files(&self) -> usize {
        let open = |mut peer: &UnixStream| !matches!(peer.read(&mut [0]), Ok(0));
        self.peers.iter().filter(|peer| open(peer)).count()
    }

    /// Sends a command; its message ID.
    pub fn send(&mut self, command: u16, flags: u32, body: &[u8], files: Vec<OwnedFd>) -> u16 {
        self.next_id = self.next_id.wrapping_add(1);
        let bytes = framing::message(self.next_id, command, flags, 0, &[body]);
        // What ends the session is seen by tests that are about it.
        let _ = self.session.receive(&bytes, files, false);
        self.next_id
    }

    pub fn next(&mut self) -> Option<Reply> {
        self.session.poll_transmit().map(Reply::from)
    }

    pub fn ask_with(&mut self, command: u16, body: &[u8], files: Vec<OwnedFd>) -> Reply {
        let id = self.send(command, 0, body, files);
        let reply = self.next().expect("a reply");
        reply.answers(id, command);
        assert!(self.next().is_none(), "a second reply");
        reply
    }

    pub fn ask(&mut self, command: u16, body: &[u8]) -> Reply {
        self.ask_with(command, body, Vec::new())
    }

    /// Maps `size` bytes with a file; the errno.
    pub fn map(&mut self, address: u64, size: u64) -> i32 {
        let file = self.file();
        self.ask_with(command::DMA_MAP, &map(address, size, 3), vec![file])
            .errno
    }

    pub fn unmap(&mut self, address: u64, size: u64) -> i32 {
        self.ask(command::DMA_UNMAP, &unmap(address, size, 0)).errno
    }

    /// Everything that is held is over.
    pub fn release(&mut self) {
        for ticket in std::mem::take(&mut self.function().held) {
            self.session.finished(ticket);
        }
    }

    /// A client that behaves is served, after another one has gone.
    pub fn still_serves(mut self) {
        let _ = self.session.end();
        self.release();
        assert!(self.session.is_idle());
        assert_eq!(self.open_files(), 0);
        self.session.connect();
        self.negotiate();
        assert_eq!(self.map(0, 4096), 0);
        assert_eq!(
            self.ask(command::REGION_READ, &access(7, 0, 4)).body.len(),
            20
        );
    }
}
