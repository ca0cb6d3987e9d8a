//! Configuration space (PCIe §7.5, §7.7, §7.9): bytes, what of them software may write, and what it means.
//!
//! Each bit is one of three: read-only, writable, or cleared by writing one to it. What is written goes by these masks alone, byte
//! by byte, whatever the width or alignment; then the registers that something hangs on are looked at. So no sequence of writes
//! leads anywhere that a sequence of single bytes does not.

mod build;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub use build::{Builder, Identity, Link};

use crate::Layout;
use crate::spec::{
    CONFIG_SIZE, Express, Header, MsixCapability, PowerManagement, command, device_control,
    device_status, msix_control, power, status,
};

pub use crate::msix::MsixPlace;

/// How much a reset resets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetKind {
    /// All.
    Conventional,
    /// Not what belongs to the link, and has to be the same at both of its ends (PCIe §6.6.2).
    FunctionLevel,
}

/// What the host has set that something hangs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Controls {
    /// Memory BARs answer: Memory Space Enable, and power.
    pub memory: bool,
    /// The function may issue requests: Bus Master Enable, and power.
    pub bus_master: bool,
    /// INTx Disable.
    pub intx_disable: bool,
    /// Not in D3hot.
    pub powered: bool,
    /// Enable and Function Mask of MSI-X, once they were written.
    pub msix: Option<MsixControls>,
}

/// Message Control of MSI-X.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixControls {
    /// It is on.
    pub enabled: bool,
    /// All vectors are masked.
    pub masked: bool,
}

/// The state of the function that configuration space shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Live {
    /// INTx is asserted (Interrupt Status).
    pub interrupt: bool,
    /// Requests are in flight (Transactions Pending).
    pub transactions: bool,
}

/// What a write began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Began {
    /// Nothing but what [`ConfigSpace::controls`] says.
    Nothing,
    /// A reset of the function: Initiate Function Level Reset, or the way from D3hot to D0 without No_Soft_Reset
    /// (PCIe §5.3.1.4). The registers are not reset yet.
    Reset,
}

pub(crate) type Bytes = Box<[u8; CONFIG_SIZE]>;

/// Where the capabilities that mean something are.
#[derive(Clone, Copy, Debug, Default)]
struct Places {
    power: Option<usize>,
    express: Option<usize>,
    msix: Option<usize>,
}

/// Configuration space of a function.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: Bytes,
    initial: Bytes,
    /// Bits that software may set and clear.
    writable: Bytes,
    /// Bits that software clears by writing ones (RW1C).
    clearable: Bytes,
    /// Bits that a function level reset leaves as they are.
    kept: Bytes,
    places: Places,
    /// Whether Message Control was written since the last reset.
    msix_told: bool,
    layout: Layout,
    msix: Option<MsixPlace>,
}

impl ConfigSpace {
    /// A builder for a function that is so named.
    pub fn builder(identity: Identity) -> Builder {
        Builder::new(identity)
    }

    /// What of the function is fixed.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(crate) fn msix_place(&self) -> Option<MsixPlace> {
        self.msix
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn set_u16(&mut self, at: usize, value: u16) {
        self.bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    /// Reads; what is past the end reads as all ones.
    pub fn read(&self, offset: u64, to: &mut [u8], live: Live) {
        let Ok(start) = usize::try_from(offset) else {
            to.fill(0xff);
            return;
        };
        let bytes = self.bytes.get(start..).unwrap_or(&[]);
        let n = bytes.len().min(to.len());
        to[..n].copy_from_slice(&bytes[..n]);
        to[n..].fill(0xff);
        let mut show = |at: usize, bit: u16, on: bool| {
            let inside = at.checked_sub(start).and_then(|i| to.get_mut(i));
            if let Some(byte) = inside.filter(|_| on) {
                // All of these bits lie in the low byte of their register.
                *byte |= bit as u8;
            }
        };
        show(STATUS, status::INTERRUPT, live.interrupt);
        if let Some(express) = self.places.express {
            let pending = device_status::TRANSACTIONS_PENDING;
            show(express + DEVICE_STATUS, pending, live.transactions);
        }
    }

    /// Writes; what is past the end is dropped.
    pub fn write(&mut self, offset: u64, from: &[u8]) -> Began {
        let start = usize::try_from(offset).unwrap_or(CONFIG_SIZE);
        let from = &from[..from.len().min(CONFIG_SIZE.saturating_sub(start))];
        let power = self.power_state();
        for (at, new) in (start..).zip(from) {
            let (old, writable) = (self.bytes[at], self.writable[at]);
            self.bytes[at] = (old & !writable | new & writable) & !(new & self.clearable[at]);
        }
        // The byte that is written at `at`.
        let written = |at: usize| at.checked_sub(start).and_then(|i| from.get(i));
        if let Some(msix) = self.places.msix {
            // Enable and Function Mask are both in the upper byte.
            self.msix_told |= written(msix + MSIX_CONTROL + 1).is_some();
        }
        let flr = self.places.express.and_then(|express| {
            let byte = written(express + DEVICE_CONTROL + 1)?;
            Some(u16::from(*byte) << 8 & device_control::FUNCTION_LEVEL_RESET != 0)
        });
        if flr == Some(true) || self.change_power(power) {
            return Began::Reset;
        }
        Began::Nothing
    }

    fn power_state(&self) -> u16 {
        let power = self.places.power;
        power.map_or(0, |at| self.u16(at + POWER_CONTROL) & power::STATE)
    }

    /// After a write: whether it was one from D3hot to D0 that resets.
    fn change_power(&mut self, before: u16) -> bool {
        let Some(at) = self.places.power else {
            return false;
        };
        let control = self.u16(at + POWER_CONTROL);
        match control & power::STATE {
            0 => before == power::D3_HOT && control & power::NO_SOFT_RESET == 0,
            power::D3_HOT => false,
            // "If software attempts to write an unsupported, optional state to this field, the write operation
            // must complete normally; however, the data is discarded and no state change occurs" (§7.5.2.2).
            _ => {
                self.set_u16(at + POWER_CONTROL, control & !power::STATE | before);
                false
            }
        }
    }

    /// What the host has set.
    pub fn controls(&self) -> Controls {
        let command = self.u16(COMMAND);
        let powered = self.power_state() != power::D3_HOT;
        let msix = self.places.msix.filter(|_| self.msix_told).map(|at| {
            let control = self.u16(at + MSIX_CONTROL);
            MsixControls {
                enabled: control & msix_control::ENABLE != 0,
                masked: control & msix_control::MASKED != 0,
            }
        });
        Controls {
            memory: command & command::MEMORY != 0 && powered,
            bus_master: command & command::BUS_MASTER != 0 && powered,
            intx_disable: command & command::INTX_DISABLE != 0,
            powered,
            msix,
        }
    }

    /// Notes an access that nothing answered, as an error of the class that §6.2.3.2.4.1 has for it: a read
    /// tells its requester by itself, a write does not.
    pub fn note_unsupported(&mut self, read: bool) {
        if let Some(express) = self.places.express {
            let class = match read {
                true => device_status::CORRECTABLE,
                false => device_status::NON_FATAL,
            };
            let at = express + DEVICE_STATUS;
            self.set_u16(at, self.u16(at) | device_status::UNSUPPORTED | class);
        }
    }

    /// Everything as after power on, or almost.
    pub fn reset(&mut self, kind: ResetKind) {
        for at in 0..CONFIG_SIZE {
            let kept = match kind {
                ResetKind::Conventional => 0,
                ResetKind::FunctionLevel => self.kept[at],
            };
            self.bytes[at] = self.initial[at] & !kept | self.bytes[at] & kept;
        }
        self.msix_told = false;
    }

    pub(crate) fn save(&self) -> (&[u8; CONFIG_SIZE], bool) {
        (&self.bytes, self.msix_told)
    }

    /// Takes up saved bytes: of bits that never change only what is ours.
    ///
    /// `false`: they have a power state that does not exist; nothing is changed then.
    pub(crate) fn load(&mut self, bytes: &[u8; CONFIG_SIZE], msix_told: bool) -> bool {
        let mut next = self.clone();
        for (at, new) in bytes.iter().enumerate() {
            let changes = self.writable[at] | self.clearable[at];
            next.bytes[at] = self.initial[at] & !changes | new & changes;
        }
        next.msix_told = msix_told && self.places.msix.is_some();
        let sound = matches!(next.power_state(), 0 | power::D3_HOT);
        if sound {
            *self = next;
        }
        sound
    }
}

const COMMAND: usize = std::mem::offset_of!(Header, command);
const STATUS: usize = std::mem::offset_of!(Header, status);
const POWER_CONTROL: usize = std::mem::offset_of!(PowerManagement, control);
const DEVICE_CONTROL: usize = std::mem::offset_of!(Express, device_control);
const DEVICE_STATUS: usize = std::mem::offset_of!(Express, device_status);
const MSIX_CONTROL: usize = std::mem::offset_of!(MsixCapability, control);

/// Registers: their values, and what of them is what.
#[derive(Clone, Copy, Debug, Default)]
struct Registers<T> {
    value: T,
    writable: T,
    clearable: T,
    kept: T,
}

impl<T: Default> Registers<T> {
    /// Read-only ones.
    fn of(value: T) -> Self {
        Self {
            value,
            ..Self::default()
        }
    }
}

impl ConfigSpace {
    fn put<T: FromBytes + IntoBytes + Immutable + KnownLayout>(
        &mut self,
        at: usize,
        registers: &Registers<T>,
    ) {
        let copy = |to: &mut Bytes, from: &T| {
            to[at..at + size_of::<T>()].copy_from_slice(from.as_bytes());
        };
        copy(&mut self.initial, &registers.value);
        copy(&mut self.writable, &registers.writable);
        copy(&mut self.clearable, &registers.clearable);
        copy(&mut self.kept, &registers.kept);
    }
}
