//! A host's probe of a PCI function, over its configuration space and BARs.
//!
//! Follows PCI Express Base 6.0: §7.5.1 (header), §7.5.2 (power management), §7.5.3 (PCI Express capability), §7.7.2 (MSI-X), §6.6.2 (function level
//! reset). Extended capabilities and everything of bridges are left out.

mod msix;
pub mod spec;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::spec::region;
use crate::{Client, Error};
pub use msix::Msix;

/// More capabilities than fit into configuration space.
const MAX_CAPABILITIES: usize = 48;
/// What a function level reset or a change of power may take at most (§6.6.2: 100 ms); more here, as machines that run tests are slow.
const SETTLES: Duration = Duration::from_secs(5);

/// A BAR, as sizing has found it (§7.5.1.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Which of the six; that of the lower half.
    pub index: u32,
    /// Bytes.
    pub size: u64,
    /// It takes two registers.
    pub is_64: bool,
    /// Reads have no effects.
    pub prefetchable: bool,
}

/// A capability of the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Its ID.
    pub id: u8,
    /// Where it begins.
    pub at: u16,
}

/// What the header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Base class, sub-class and programming interface: 24 bits.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// A function behind a client.
#[derive(Clone, Debug)]
pub struct Pci {
    client: Arc<Client>,
}

macro_rules! config_access {
    ($($read:ident, $write:ident, $type:ty;)*) => {
        impl Pci {
            $(
                /// Reads configuration space.
                ///
                /// # Errors
                /// As any command.
                pub fn $read(&self, at: u16) -> Result<$type, Error> {
                    let mut bytes = [0; size_of::<$type>()];
                    self.client.region_read(region::CONFIG, u64::from(at), &mut bytes)?;
                    Ok(<$type>::from_le_bytes(bytes))
                }

                /// Writes configuration space.
                ///
                /// # Errors
                /// As any command.
                pub fn $write(&self, at: u16, value: $type) -> Result<(), Error> {
                    self.client.region_write(region::CONFIG, u64::from(at), &value.to_le_bytes())
                }
            )*
        }
    };
}

config_access! {
    config8, set_config8, u8;
    config16, set_config16, u16;
    config32, set_config32, u32;
}

impl Pci {
    /// Of the function that this client is connected to.
    pub fn new(client: &Arc<Client>) -> Self {
        Self {
            client: client.clone(),
        }
    }

    /// The client.
    pub fn client(&self) -> &Arc<Client> {
        &self.client
    }

    /// Reads the header's identity.
    ///
    /// # Errors
    /// As any command; where it is no endpoint.
    pub fn identity(&self) -> Result<Identity, Error> {
        if self.config8(spec::HEADER_TYPE)? & 0x7f != 0 {
            return Err(Error::Pci("its header is not of type 0"));
        }
        let class = self.config32(spec::REVISION)?;
        Ok(Identity {
            vendor: self.config16(spec::VENDOR)?,
            device: self.config16(spec::DEVICE)?,
            class: class >> 8,
            revision: class as u8,
            subsystem_vendor: self.config16(spec::SUBSYSTEM_VENDOR)?,
            subsystem: self.config16(spec::SUBSYSTEM)?,
        })
    }

    /// Finds the size of each BAR by writing ones, and puts back what there was (§7.5.1.2.1). Memory space
    /// is off meanwhile.
    ///
    /// # Errors
    /// As any command; a BAR that makes no sense.
    pub fn bars(&self) -> Result<Vec<Bar>, Error> {
        let command = self.config16(spec::COMMAND)?;
        self.set_config16(spec::COMMAND, command & !spec::MEMORY_SPACE)?;
        let mut bars = Vec::new();
        let mut index = 0;
        while index < 6 {
            let at = spec::BAR0 + 4 * index;
            let low = self.probe_bar(at)?;
            if low & spec::BAR_IO != 0 {
                return Err(Error::Pci("a BAR of I/O space"));
            }
            let is_64 = low & spec::BAR_TYPE == spec::BAR_TYPE_64;
            if is_64 && index == 5 {
                return Err(Error::Pci("the last BAR has 64 bits"));
            }
            let high = if is_64 { self.probe_bar(at + 4)? } else { 0 };
            let mask = u64::from(low & !0xf) | u64::from(high) << 32;
            if mask != 0 {
                // The lowest bit that can be set is the size; all above it must be settable.
                let size = 1 << mask.trailing_zeros();
                let all = if is_64 { !0 } else { u64::from(u32::MAX) };
                if mask != all & !(size - 1) {
                    return Err(Error::Pci("the size of a BAR is no power of two"));
                }
                bars.push(Bar {
                    index: u32::from(index),
                    size,
                    is_64,
                    prefetchable: low & spec::BAR_PREFETCHABLE != 0,
                });
            }
            index += if is_64 { 2 } else { 1 };
        }
        self.set_config16(spec::COMMAND, command)?;
        Ok(bars)
    }

    fn probe_bar(&self, at: u16) -> Result<u32, Error> {
        let before = self.config32(at)?;
        self.set_config32(at, !0)?;
        let mask = self.config32(at)?;
        self.set_config32(at, before)?;
        Ok(mask)
    }

    /// Gives each BAR an address, one after the other from `base` on, aligned to its size.
    ///
    /// # Errors
    /// As any command.
    pub fn place_bars(&self, bars: &[Bar], base: u64) -> Result<(), Error> {
        let mut next = base;
        for bar in bars {
            let at = spec::BAR0 + 4 * bar.index as u16;
            let address = next.next_multiple_of(bar.size);
            self.set_config32(at, address as u32)?;
            if bar.is_64 {
                self.set_config32(at + 4, (address >> 32) as u32)?;
            }
            next = address + bar.size;
        }
        Ok(())
    }

    /// The capabilities, in the order of their list (§7.5.1.1.11).
    ///
    /// # Errors
    /// As any command; a list that does not end or leaves its place.
    pub fn capabilities(&self) -> Result<Vec<Capability>, Error> {
        let mut found = Vec::new();
        if self.config16(spec::STATUS)? & spec::CAPABILITIES_LIST == 0 {
            return Ok(found);
        }
        // "The bottom two bits are reserved, and software must mask them."
        let mut at = u16::from(self.config8(spec::CAPABILITIES)? & !3);
        while at != 0 {
            if at < 0x40 {
                return Err(Error::Pci("a capability lies in the header"));
            }
            if found.len() == MAX_CAPABILITIES {
                return Err(Error::Pci("its list of capabilities does not end"));
            }
            let id = self.config8(at)?;
            found.push(Capability { id, at });
            at = u16::from(self.config8(at + 1)? & !3);
        }
        Ok(found)
    }

    /// Where a capability begins.
    ///
    /// # Errors
    /// As [`Pci::capabilities`]; where there is none of that ID.
    pub fn capability(&self, id: u8) -> Result<u16, Error> {
        let all = self.capabilities()?;
        let found = all.iter().find(|c| c.id == id);
        Ok(found
            .ok_or(Error::Pci("a capability that is needed is not there"))?
            .at)
    }

    /// Turns memory space and bus mastering on.
    ///
    /// # Errors
    /// As any command.
    pub fn enable(&self) -> Result<(), Error> {
        self.change_command(spec::MEMORY_SPACE | spec::BUS_MASTER, 0)
    }

    /// Sets and clears bits of the command register.
    ///
    /// # Errors
    /// As any command.
    pub fn change_command(&self, set: u16, clear: u16) -> Result<(), Error> {
        let command = self.config16(spec::COMMAND)?;
        self.set_config16(spec::COMMAND, command & !clear | set)
    }

    /// Resets the function by its PCI Express capability, and waits until it answers (§6.6.2). Everything that was set up is gone.
    ///
    /// # Errors
    /// As any command; where it has no such reset, or does not come back.
    pub fn function_level_reset(&self) -> Result<(), Error> {
        let express = self.begin_function_level_reset()?;
        // While a reset is under way nothing is answered, or Transactions Pending is still set.
        self.settle(|| {
            let status = self.config16(express + spec::EXPRESS_DEVICE_STATUS)?;
            Ok(self.config16(spec::VENDOR)? != 0xffff
                && status & spec::TRANSACTIONS_PENDING == 0
                && self.config16(spec::COMMAND)? & spec::BUS_MASTER == 0)
        })
    }

    /// Begins a function level reset, and does not wait; gives the place of the PCI Express capability.
    ///
    /// # Errors
    /// As any command; where it has no such reset.
    pub fn begin_function_level_reset(&self) -> Result<u16, Error> {
        let express = self.capability(spec::CAP_EXPRESS)?;
        let capable = self.config32(express + spec::EXPRESS_DEVICE_CAPABILITIES)?;
        if capable & spec::FLR_CAPABLE == 0 {
            return Err(Error::Pci("it has no function level reset"));
        }
        let control = express + spec::EXPRESS_DEVICE_CONTROL;
        let value = self.config16(control)?;
        self.set_config16(control, value | spec::INITIATE_FLR)?;
        Ok(express)
    }

    /// Puts it into D3hot (3) or D0 (0), and waits until it is there (§7.5.2.2).
    ///
    /// # Errors
    /// As any command; where the state does not come.
    pub fn set_power(&self, state: u16) -> Result<(), Error> {
        let at = self.capability(spec::CAP_POWER)? + spec::POWER_CONTROL;
        let value = self.config16(at)?;
        self.set_config16(at, value & !spec::POWER_STATE | state)?;
        self.settle(|| Ok(self.config16(at)? & spec::POWER_STATE == state))
    }

    fn settle(&self, there: impl Fn() -> Result<bool, Error>) -> Result<(), Error> {
        let end = Instant::now() + SETTLES;
        while !there()? {
            if Instant::now() > end {
                return Err(Error::Timeout(SETTLES));
            }
            std::thread::yield_now();
        }
        Ok(())
    }
}
