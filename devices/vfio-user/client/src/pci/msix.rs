//! MSI-X (§7.7.2), in both ways that a host has with a VMM.
//!
//! A VMM gives the function descriptors, and may keep the table to itself (QEMU) or pass on what its host writes there. The first
//! is [`Msix::enable`] alone; for the second, entries are written too, with [`Msix::write_entry`] and [`Msix::set_masked`].

use std::os::fd::AsFd;
use std::sync::Arc;

use super::{Pci, spec};
use crate::spec::irq;
use crate::{Error, Event};

/// MSI-X of a function.
#[derive(Clone, Debug)]
pub struct Msix {
    pci: Pci,
    /// Where the capability begins.
    at: u16,
    /// How many vectors there are.
    pub vectors: u16,
    /// BAR and offset of the table.
    pub table: (u32, u64),
    /// BAR and offset of the pending bits.
    pub pending: (u32, u64),
}

impl Msix {
    /// Finds it.
    ///
    /// # Errors
    /// As any command; where there is none.
    pub fn find(pci: &Pci) -> Result<Self, Error> {
        let at = pci.capability(spec::CAP_MSIX)?;
        let place = |at| {
            let raw = pci.config32(at)?;
            Ok::<_, Error>((raw & spec::MSIX_BIR, u64::from(raw & !spec::MSIX_BIR)))
        };
        let control = pci.config16(at + spec::MSIX_CONTROL)?;
        Ok(Self {
            at,
            vectors: (control & spec::MSIX_SIZE) + 1,
            table: place(at + spec::MSIX_TABLE)?,
            pending: place(at + spec::MSIX_PBA)?,
            pci: pci.clone(),
        })
    }

    /// Gives the first `count` vectors events of their own, and turns MSI-X on: what QEMU does, which leaves the table as it is.
    ///
    /// # Errors
    /// As any command.
    pub fn enable(&self, count: u16) -> Result<Vec<Arc<Event>>, Error> {
        let events = (0..count).map(|_| Event::new().map(Arc::new));
        let events = events.collect::<Result<Vec<_>, _>>()?;
        self.set_events(0, &events)?;
        self.set_control(spec::MSIX_ENABLE, spec::MSIX_MASK)?;
        Ok(events)
    }

    /// Gives vectors from `start` on these events.
    ///
    /// # Errors
    /// As any command.
    pub fn set_events(&self, start: u32, events: &[Arc<Event>]) -> Result<(), Error> {
        let fds: Vec<_> = events.iter().map(|e| e.as_fd()).collect();
        self.pci.client().set_events(irq::MSIX, start, &fds)
    }

    /// Turns MSI-X off and takes the events back.
    ///
    /// # Errors
    /// As any command.
    pub fn disable(&self) -> Result<(), Error> {
        self.set_control(0, spec::MSIX_ENABLE)?;
        self.pci.client().disable_irqs(irq::MSIX)
    }

    /// Sets and clears bits of the message control.
    ///
    /// # Errors
    /// As any command.
    pub fn set_control(&self, set: u16, clear: u16) -> Result<(), Error> {
        let at = self.at + spec::MSIX_CONTROL;
        let value = self.pci.config16(at)?;
        self.pci.set_config16(at, value & !clear | set)
    }

    /// Writes an entry of the table, unmasked: any address and data, since the event stands for the message.
    ///
    /// # Errors
    /// As any command.
    pub fn write_entry(&self, vector: u16, address: u64, data: u32) -> Result<(), Error> {
        let (bar, at) = self.entry(vector);
        let client = self.pci.client();
        client.region_write(bar, at, &(address as u32).to_le_bytes())?;
        client.region_write(bar, at + 4, &((address >> 32) as u32).to_le_bytes())?;
        client.region_write(bar, at + 8, &data.to_le_bytes())?;
        self.set_masked(vector, false)
    }

    /// Masks or unmasks a vector in the table.
    ///
    /// # Errors
    /// As any command.
    pub fn set_masked(&self, vector: u16, masked: bool) -> Result<(), Error> {
        let (bar, at) = self.entry(vector);
        let control = if masked { spec::MSIX_ENTRY_MASKED } else { 0 };
        let client = self.pci.client();
        client.region_write(bar, at + 12, &control.to_le_bytes())
    }

    /// Whether a vector is pending.
    ///
    /// # Errors
    /// As any command.
    pub fn is_pending(&self, vector: u16) -> Result<bool, Error> {
        let (bar, at) = self.pending;
        let word = at + u64::from(vector / 64) * 8;
        Ok(self.pci.client().read64(bar, word)? >> (vector % 64) & 1 != 0)
    }

    fn entry(&self, vector: u16) -> (u32, u64) {
        let (bar, at) = self.table;
        (bar, at + u64::from(vector) * spec::MSIX_ENTRY)
    }
}
