//! A target that panics where the session breaks its side of the contract.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use crate::spec::{irq, region};
use crate::{
    Errno, IoEventFd, IrqAction, IrqChange, Irqs, Mapping, Progress, Region, RegionMap, Target,
    Ticket, Written,
};

/// What it says where it refuses memory.
pub(super) const REFUSAL: Errno = Errno::BUSY;

/// It takes no memory that is only written, from the fourth page on.
pub(super) fn refuses(mapping: &Mapping) -> bool {
    !mapping.read && mapping.address >= 4 * 4096
}

#[derive(Debug)]
pub(super) struct Strict {
    /// Unmaps and resets wait.
    pub(super) hold: bool,
    held: Vec<Ticket>,
    maps: Vec<(Mapping, Option<OwnedFd>)>,
    irqs: BTreeMap<(u32, u32, u8), OwnedFd>,
    file: Arc<OwnedFd>,
}

impl Default for Strict {
    fn default() -> Self {
        let (file, _) = UnixStream::pair().expect("a socket");
        Self {
            hold: false,
            held: Vec::new(),
            maps: Vec::new(),
            irqs: BTreeMap::new(),
            file: Arc::new(file.into()),
        }
    }
}

impl Strict {
    pub(super) fn take_held(&mut self) -> Vec<Ticket> {
        std::mem::take(&mut self.held)
    }

    pub(super) fn mappings(&self) -> Vec<Mapping> {
        let mut all: Vec<_> = self.maps.iter().map(|(m, _)| *m).collect();
        all.sort_by_key(|m| m.address);
        all
    }

    pub(super) fn files(&self) -> usize {
        self.maps.iter().filter(|m| m.1.is_some()).count() + self.irqs.len()
    }

    pub(super) fn is_clean(&self) -> bool {
        self.maps.is_empty() && self.irqs.is_empty()
    }

    fn later(&mut self, ticket: Ticket) -> Progress {
        if !self.hold {
            return Progress::Done;
        }
        self.held.push(ticket);
        Progress::Pending
    }

    fn inside(&self, index: u32, offset: u64, len: usize) -> Region {
        assert!(index < self.regions() && len > 0);
        let region = self.region(index);
        assert!(offset + len as u64 <= region.size, "past the end");
        region
    }
}

impl Target for Strict {
    fn regions(&self) -> u32 {
        region::PCI_COUNT
    }

    fn region(&self, index: u32) -> Region {
        assert!(index < self.regions());
        let size = [0x4000, 0, 0x100, 0, 0, 0, 0, 0x1000, 0][index as usize];
        Region {
            size,
            read: size > 0,
            write: size > 0 && index != 2,
            map: (index == 0).then(|| RegionMap {
                file: self.file.clone(),
                offset: 0,
                areas: vec![(0x1000, 0x1000), (0x3000, 0x1000)],
            }),
        }
    }

    fn io_event_fds(&mut self, index: u32) -> Vec<IoEventFd> {
        let at = |offset, value| IoEventFd {
            offset,
            size: 4,
            value,
            file: self.file.clone(),
            store: None,
        };
        match index {
            0 => vec![at(0x1000, None), at(0x1004, Some(1))],
            _ => Vec::new(),
        }
    }

    fn irq_types(&self) -> u32 {
        irq::PCI_COUNT
    }

    fn irqs(&self, index: u32) -> Irqs {
        let masks = if index == irq::INTX { irq::MASKABLE } else { 0 };
        Irqs {
            count: [1, 0, 64, 1, 1][index as usize],
            flags: irq::EVENTFD | masks,
        }
    }

    fn read(&mut self, region: u32, offset: u64, to: &mut [u8]) -> Result<(), Errno> {
        assert!(self.inside(region, offset, to.len()).read);
        to.fill(5);
        Ok(())
    }

    fn write(
        &mut self,
        region: u32,
        offset: u64,
        from: &[u8],
        ticket: Ticket,
    ) -> Result<Written, Errno> {
        assert!(
            self.held.is_empty(),
            "a command before the last one was over"
        );
        assert!(self.inside(region, offset, from.len()).write);
        match (region, offset) {
            (_, 4) => Err(Errno::IO),
            (7, 0) => Ok(Written::Unsettled(self.later(ticket))),
            _ => Ok(Written::Done),
        }
    }

    fn set_irqs(&mut self, index: u32, change: IrqChange) -> Result<(), Errno> {
        let irqs = self.irqs(index);
        match change {
            IrqChange::Disable => self.irqs.retain(|key, _| key.0 != index),
            IrqChange::Now { action, vectors } => {
                assert!(vectors.iter().all(|v| *v < irqs.count));
                assert!(action == IrqAction::Trigger || irqs.flags & irq::MASKABLE != 0);
            }
            IrqChange::Assign {
                action,
                start,
                files,
            } => {
                assert!(start as usize + files.len() <= irqs.count as usize);
                if start == 60 {
                    return Err(Errno::IO);
                }
                for (vector, file) in (start..).zip(files) {
                    let key = (index, vector, action as u8);
                    match file {
                        Some(file) => drop(self.irqs.insert(key, file)),
                        None => drop(self.irqs.remove(&key)),
                    }
                }
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
        assert!(
            self.held.is_empty(),
            "a command before the last one was over"
        );
        assert_eq!(mapping.file, file.is_some());
        if refuses(&mapping) {
            return Err(REFUSAL);
        }
        self.maps.push((mapping, file));
        Ok(self.later(ticket))
    }

    fn unmap(&mut self, gone: &[Mapping], ticket: Ticket) -> Progress {
        assert!(
            self.held.is_empty(),
            "a command before the last one was over"
        );
        assert!(!gone.is_empty());
        for mapping in gone {
            let at = self.maps.iter().position(|(m, _)| m == mapping);
            self.maps
                .swap_remove(at.expect("a mapping that is not there"));
        }
        self.later(ticket)
    }

    fn reset(&mut self, ticket: Ticket) -> Progress {
        assert!(
            self.held.is_empty(),
            "a command before the last one was over"
        );
        self.later(ticket)
    }

    fn disconnected(&mut self, ticket: Ticket) -> Progress {
        // What was under way is of no more use.
        self.held.clear();
        self.maps.clear();
        self.irqs.clear();
        self.later(ticket)
    }
}
