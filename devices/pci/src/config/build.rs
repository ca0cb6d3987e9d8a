//! Puts a configuration space together.

use zerocopy::little_endian::{U16, U32};

use super::{ConfigSpace, Places, Registers};
use crate::layout::{Bar, BarKind, Layout, PAGE};
use crate::msix::{MsixPlace, pending_len};
use crate::spec::{
    BARS, CAPABILITIES, CONFIG_SIZE, ENTRY, EXTENDED, Express, Header, MAX_VECTORS, MIN_BAR,
    MsixCapability, PowerManagement, bar, capability, command, device_control, device_status,
    express, msix_control, power, status,
};

/// What a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
    /// Class code: base class, sub-class, programming interface, from the upper byte of 24 bits to the lowest.
    pub class: u32,
    /// Revision.
    pub revision: u8,
}

/// The link that a function pretends to be on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Generation: 1 (2.5 GT/s) to 6 (64 GT/s).
    pub generation: u8,
    /// Lanes: 1, 2, 4, 8 or 16.
    pub width: u8,
}

impl Default for Link {
    /// Four lanes at 16 GT/s.
    fn default() -> Self {
        Self {
            generation: 4,
            width: 4,
        }
    }
}

/// Puts a configuration space together. Capabilities come in the order in which they are added.
///
/// # Panics
/// All methods do where PCI's rules do not allow what is asked for, as that is a mistake in our code.
#[derive(Clone, Debug)]
pub struct Builder {
    config: ConfigSpace,
    header: Registers<Header>,
    /// Where the next capability goes.
    next: usize,
    /// The byte that points to it.
    link: usize,
    /// Where the next extended one goes, and where the last one is.
    extended: (usize, Option<usize>),
}

impl Builder {
    pub(super) fn new(identity: Identity) -> Self {
        assert!(identity.class < 1 << 24, "a class code has 24 bits");
        let [interface, sub, base, _] = identity.class.to_le_bytes();
        let mut header = Registers::of(Header {
            vendor: identity.vendor.into(),
            device: identity.device.into(),
            revision: identity.revision,
            class: [interface, sub, base],
            subsystem_vendor: identity.subsystem_vendor.into(),
            subsystem: identity.subsystem.into(),
            ..Header::default()
        });
        header.writable.command =
            U16::new(command::BUS_MASTER | command::PARITY | command::SERR | command::INTX_DISABLE);
        header.writable.cache_line = 0xff;
        header.clearable.status = U16::new(status::ERRORS);
        let zero = || Box::new([0; CONFIG_SIZE]);
        Self {
            config: ConfigSpace {
                bytes: zero(),
                initial: zero(),
                writable: zero(),
                clearable: zero(),
                kept: zero(),
                places: Places::default(),
                msix_told: false,
                layout: Layout::default(),
                msix: None,
            },
            header,
            next: CAPABILITIES,
            link: std::mem::offset_of!(Header, capabilities),
            extended: (EXTENDED, None),
        }
    }

    /// A BAR.
    #[must_use]
    pub fn bar(mut self, index: u8, bar: Bar) -> Self {
        let i = usize::from(index);
        assert!(
            bar.size.is_power_of_two() && bar.size >= MIN_BAR,
            "a BAR of {:#x}",
            bar.size
        );
        let wide = bar.kind == BarKind::Memory64;
        let upper = i
            .checked_sub(1)
            .and_then(|i| self.config.layout.bars[i].as_ref());
        let taken = upper.is_some_and(|b| b.kind == BarKind::Memory64)
            || wide
                && self
                    .config
                    .layout
                    .bars
                    .get(i + 1)
                    .is_none_or(Option::is_some);
        assert!(i < BARS && !taken, "no room for BAR {i}");
        assert!(wide || bar.size <= 1 << 31, "too large for 32 bits");
        let mut end = 0;
        for area in &bar.areas {
            let aligned = [area.offset, area.len, area.file_offset];
            assert!(aligned.iter().all(|n| n.is_multiple_of(PAGE)));
            assert!(area.len > 0 && area.offset >= end, "areas overlap");
            end = area.offset.checked_add(area.len).expect("an area wraps");
        }
        assert!(end <= bar.size, "an area past the end of its BAR");
        let flags = u32::from(bar.prefetchable) * bar::PREFETCHABLE;
        let mask = !(bar.size - 1);
        self.header.writable.bars[i] = U32::new(mask as u32 & !bar::FLAGS);
        self.header.value.bars[i] = U32::new(flags | (u32::from(wide) * bar::MEMORY_64));
        if wide {
            self.header.writable.bars[i + 1] = U32::new((mask >> 32) as u32);
        }
        // Memory Space Enable is hardwired to zero where there is nothing to enable.
        self.header.writable.command |= U16::new(command::MEMORY);
        let place = &mut self.config.layout.bars[i];
        assert!(place.is_none(), "BAR {i} twice");
        *place = Some(bar);
        self
    }

    /// INTx, as INTA.
    #[must_use]
    pub fn intx(mut self) -> Self {
        self.config.layout.intx = true;
        self.header.value.interrupt_pin = 1;
        self.header.writable.interrupt_line = 0xff;
        self
    }

    fn add<T>(&mut self, registers: &Registers<T>) -> usize
    where
        T: zerocopy::FromBytes + zerocopy::IntoBytes + zerocopy::Immutable + zerocopy::KnownLayout,
    {
        let at = self.claim(size_of::<T>());
        self.config.put(at, registers);
        at
    }

    /// A place for a capability of `len` bytes, which the one before points to.
    fn claim(&mut self, len: usize) -> usize {
        let at = self.next;
        assert!(at + len <= EXTENDED, "no room for another capability");
        match self.link {
            link if link < CAPABILITIES => self.header.value.capabilities = at as u8,
            link => self.config.initial[link] = at as u8,
        }
        self.header.value.status |= U16::new(status::CAPABILITIES);
        self.link = at + 1;
        // "must be DWORD aligned" (PCI 3.0 §6.7).
        self.next = (at + len).next_multiple_of(4);
        at
    }

    /// Power management: D0 and D3hot. Where `no_soft_reset`, the way back to D0 leaves everything as it was (PCIe §5.3.1.4).
    #[must_use]
    pub fn power_management(mut self, no_soft_reset: bool) -> Self {
        let mut registers = Registers::of(PowerManagement {
            id: capability::POWER_MANAGEMENT,
            capabilities: U16::new(power::VERSION),
            control: U16::new(u16::from(no_soft_reset) * power::NO_SOFT_RESET),
            ..PowerManagement::default()
        });
        registers.writable.control = U16::new(power::STATE);
        assert!(self.config.places.power.is_none(), "twice");
        self.config.places.power = Some(self.add(&registers));
        self
    }

    /// PCI Express: an endpoint that has function level reset.
    #[must_use]
    pub fn express(mut self, link: Link) -> Self {
        assert!((1..=6).contains(&link.generation) && link.width.is_power_of_two());
        assert!(link.width <= 16, "PCIe §7.5.3.6");
        let speed = u32::from(link.generation);
        let width = u32::from(link.width) << 4;
        let mut registers = Registers::of(Express {
            id: capability::EXPRESS,
            capabilities: U16::new(express::ENDPOINT_2),
            device_capabilities: U32::new(
                express::PAYLOAD_256
                    | express::EXTENDED_TAG
                    | express::ROLE_BASED_ERRORS
                    | express::FUNCTION_LEVEL_RESET,
            ),
            device_control: U16::new(device_control::DEFAULT),
            link_capabilities: U32::new(speed | width | express::ASPM_OPTIONALITY),
            link_status: U16::new((speed | width) as u16 | express::SLOT_CLOCK),
            device_capabilities_2: U32::new(express::TIMEOUT_DISABLE.into()),
            // Bits 1 and up: the speeds from the first generation on.
            link_capabilities_2: U32::new(((1 << speed) - 1) << 1),
            link_control_2: U16::new(speed as u16),
            ..Express::default()
        });
        registers.writable = Express {
            device_control: U16::new(device_control::WRITABLE),
            link_control: U16::new(express::LINK_CONTROL),
            device_control_2: U16::new(express::TIMEOUT_DISABLE),
            link_control_2: U16::new(express::LINK_CONTROL_2),
            ..Express::default()
        };
        registers.clearable.device_status = U16::new(device_status::ERRORS);
        // PCIe §6.6.2 names them; Link Control 2 is sticky.
        registers.kept = Express {
            device_control: U16::new(device_control::PAYLOAD),
            link_control: U16::new(express::LINK_CONTROL),
            link_control_2: U16::new(express::LINK_CONTROL_2),
            ..Express::default()
        };
        assert!(self.config.places.express.is_none(), "twice");
        self.config.places.express = Some(self.add(&registers));
        self
    }

    /// MSI-X with 1 to 2048 vectors. The BARs of table and pending bits are there already.
    #[must_use]
    pub fn msix(mut self, vectors: u16, place: MsixPlace) -> Self {
        assert!((1..=MAX_VECTORS).contains(&vectors), "PCIe §7.7.2.2");
        let table = (place.table_bar, place.table, u64::from(vectors) * ENTRY);
        let pending = (place.pending_bar, place.pending, pending_len(vectors));
        for (bar, offset, len) in [table, pending] {
            let bar = self.config.layout.bars[usize::from(bar)].as_ref();
            let bar = bar.expect("MSI-X in a BAR that is there");
            let (start, end) = (u64::from(offset), u64::from(offset) + len);
            assert!(start.is_multiple_of(8) && end <= bar.size, "PCIe §7.7.2.3");
            let pages = (start / PAGE * PAGE, end.next_multiple_of(PAGE));
            let apart = |a: &crate::Area| a.offset >= pages.1 || a.offset + a.len <= pages.0;
            assert!(bar.areas.iter().all(apart), "MSI-X where it is not trapped");
        }
        let end = |(_, offset, len): (u8, u32, u64)| u64::from(offset) + len;
        let apart = table.0 != pending.0
            || end(table) <= u64::from(pending.1)
            || end(pending) <= u64::from(table.1);
        assert!(apart, "the pending bits lie in the table");
        let mut registers = Registers::of(MsixCapability {
            id: capability::MSIX,
            control: U16::new(vectors - 1),
            table: U32::new(place.table | u32::from(place.table_bar)),
            pending: U32::new(place.pending | u32::from(place.pending_bar)),
            ..MsixCapability::default()
        });
        registers.writable.control = U16::new(msix_control::ENABLE | msix_control::MASKED);
        assert!(self.config.places.msix.is_none(), "twice");
        self.config.places.msix = Some(self.add(&registers));
        self.config.layout.vectors = vectors;
        self.config.msix = Some(place);
        self
    }

    /// Any other capability, with what follows its header of two bytes, and what of that is writable.
    #[must_use]
    pub fn capability(mut self, id: u8, body: &[u8], writable: &[u8]) -> Self {
        assert!(writable.len() <= body.len());
        let at = self.claim(2 + body.len());
        self.config.initial[at] = id;
        self.config.initial[at + 2..][..body.len()].copy_from_slice(body);
        self.config.writable[at + 2..][..writable.len()].copy_from_slice(writable);
        self
    }

    /// An extended capability, with what follows its header of four bytes, and what of that is writable (PCIe §7.6.3).
    #[must_use]
    pub fn extended(mut self, id: u16, version: u8, body: &[u8], writable: &[u8]) -> Self {
        assert!(version < 16 && writable.len() <= body.len());
        let (at, last) = self.extended;
        let end = (at + 4 + body.len()).next_multiple_of(4);
        assert!(end <= CONFIG_SIZE, "no room for another capability");
        let header = u32::from(id) | u32::from(version) << 16;
        self.config.initial[at..at + 4].copy_from_slice(&header.to_le_bytes());
        self.config.initial[at + 4..][..body.len()].copy_from_slice(body);
        self.config.writable[at + 4..][..writable.len()].copy_from_slice(writable);
        if let Some(last) = last {
            // Bits 20 to 31 of the header: where the next one is.
            let upper = &mut self.config.initial[last + 2..last + 4];
            let next = u16::from_le_bytes([upper[0], upper[1]]) | (at as u16) << 4;
            upper.copy_from_slice(&next.to_le_bytes());
        }
        self.extended = (end, Some(at));
        self
    }

    /// Device Serial Number (PCIe §7.9.3): an EUI-64.
    #[must_use]
    pub fn serial_number(self, number: u64) -> Self {
        let id = capability::SERIAL_NUMBER;
        self.extended(id, 1, &number.to_le_bytes(), &[])
    }

    /// The space, as after power on.
    pub fn build(mut self) -> ConfigSpace {
        self.config.put(0, &self.header);
        self.config.bytes = self.config.initial.clone();
        self.config
    }
}
