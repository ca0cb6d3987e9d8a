//! The controller's registers and doorbells, over whatever reaches them.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use bluff_vfio_client::spec::region;
use bluff_vfio_client::{Area, Client, Event, Mapped};

#[cfg(feature = "vfio-user-crate")]
mod vfio_user_crate;
#[cfg(feature = "vfio-user-crate")]
pub use vfio_user_crate::CrateBar;

/// Why an access failed: what the transport says.
pub type BarError = Box<dyn std::error::Error + Send + Sync>;

/// Registers and doorbells of a controller: its first BAR. Offsets are from the BAR's beginning.
pub trait Bar: Send + Sync {
    /// Reads a register.
    ///
    /// # Errors
    /// What the transport says.
    fn read32(&self, offset: u64) -> Result<u32, BarError>;

    /// Reads a register of 64 bits.
    ///
    /// # Errors
    /// What the transport says.
    fn read64(&self, offset: u64) -> Result<u64, BarError>;

    /// Writes a register.
    ///
    /// # Errors
    /// What the transport says.
    fn write32(&self, offset: u64, value: u32) -> Result<(), BarError>;

    /// Writes a register of 64 bits.
    ///
    /// # Errors
    /// What the transport says.
    fn write64(&self, offset: u64, value: u64) -> Result<(), BarError>;

    /// Rings a doorbell: everything that this thread stored before is visible to a device that sees the value.
    ///
    /// # Errors
    /// What the transport says.
    fn doorbell(&self, offset: u64, value: u32) -> Result<(), BarError>;
}

impl<B: Bar + ?Sized> Bar for Arc<B> {
    fn read32(&self, offset: u64) -> Result<u32, BarError> {
        (**self).read32(offset)
    }
    fn read64(&self, offset: u64) -> Result<u64, BarError> {
        (**self).read64(offset)
    }
    fn write32(&self, offset: u64, value: u32) -> Result<(), BarError> {
        (**self).write32(offset, value)
    }
    fn write64(&self, offset: u64, value: u64) -> Result<(), BarError> {
        (**self).write64(offset, value)
    }
    #[inline(always)]
    fn doorbell(&self, offset: u64, value: u32) -> Result<(), BarError> {
        (**self).doorbell(offset, value)
    }
}

/// What of a BAR is mapped.
#[derive(Debug, Default)]
struct Areas(Vec<(Area, Mapped)>);

impl Areas {
    /// The mapping of these bytes, and the offset in it.
    #[inline(always)]
    fn find(&self, offset: u64, len: u64) -> Option<(&Mapped, usize)> {
        let inside = |area: &Area| {
            let at = offset.checked_sub(area.offset)?;
            (at.checked_add(len)? <= area.size).then_some(at as usize)
        };
        self.0
            .iter()
            .find_map(|(area, mapped)| Some((mapped, inside(area)?)))
    }
}

/// Doorbells that are rung by a store and an event, by number.
#[derive(Debug, Default)]
struct Events(Vec<Option<Stored>>);

/// One of them: what a kernel has of a "shadow ioeventfd".
#[derive(Debug)]
struct Stored {
    memory: Arc<Mapped>,
    at: usize,
    event: Arc<Event>,
}

impl Events {
    /// Those of a BAR that keep their value. One that loses it is of no use for a doorbell.
    fn of(client: &Client) -> Result<Self, BarError> {
        let mut all = Self::default();
        let mut mapped: Vec<(Arc<OwnedFd>, Arc<Mapped>)> = Vec::new();
        let mut events: Vec<(Arc<OwnedFd>, Arc<Event>)> = Vec::new();
        for io in client.io_event_fds(region::BAR0)? {
            let number = doorbell_number(io.offset);
            let (Some(number), Some(store), 4, None) = (number, io.store, io.size, io.value) else {
                continue;
            };
            let known = mapped.iter().find(|m| Arc::ptr_eq(&m.0, &store.file));
            let memory = match known {
                Some((_, memory)) => memory.clone(),
                None => {
                    let len = File::from(store.file.try_clone()?).metadata()?.len();
                    let memory = Arc::new(Mapped::new(store.file.as_fd(), 0, len, true)?);
                    mapped.push((store.file, memory.clone()));
                    memory
                }
            };
            let at = usize::try_from(store.offset)?;
            if !at.is_multiple_of(4) || at.checked_add(4).is_none_or(|end| end > memory.len()) {
                return Err("a doorbell's memory is not in its file".into());
            }
            let known = events.iter().find(|e| Arc::ptr_eq(&e.0, &io.file));
            let event = match known {
                Some((_, event)) => event.clone(),
                None => {
                    let event = Arc::new(Event::from(io.file.try_clone()?));
                    events.push((io.file, event.clone()));
                    event
                }
            };
            if all.0.len() <= number {
                all.0.resize_with(number + 1, || None);
            }
            all.0[number] = Some(Stored { memory, at, event });
        }
        Ok(all)
    }

    #[inline(always)]
    fn find(&self, offset: u64) -> Option<&Stored> {
        if self.0.is_empty() {
            return None;
        }
        self.0.get(doorbell_number(offset)?)?.as_ref()
    }
}

fn doorbell_number(offset: u64) -> Option<usize> {
    let at = offset.checked_sub(crate::spec::register::DOORBELLS)?;
    let number = usize::try_from(at / 4).ok()?;
    (at.is_multiple_of(4) && number < 1 << 16).then_some(number)
}

/// A BAR behind a [`Client`]: by a store where the server lets it be mapped, by a message elsewhere.
#[derive(Debug)]
pub struct ClientBar {
    client: Arc<Client>,
    areas: Areas,
    events: Events,
    /// Whether writes want no reply.
    posted: bool,
}

impl ClientBar {
    /// As QEMU has it: what can be mapped is; where nothing can be, writes are posted.
    ///
    /// # Errors
    /// Where region 0 is none or cannot be mapped.
    pub fn new(client: &Arc<Client>) -> Result<Self, BarError> {
        let areas = client.region_info(region::BAR0)?.map()?;
        Ok(Self {
            client: client.clone(),
            posted: areas.is_empty(),
            areas: Areas(areas),
            events: Events::default(),
        })
    }

    /// As a hypervisor whose kernel signals doorbells: where the server has descriptors that keep the value, by these; otherwise as
    /// [`ClientBar::new`].
    ///
    /// # Errors
    /// As [`ClientBar::new`]; descriptors that make no sense.
    pub fn by_events(client: &Arc<Client>) -> Result<Self, BarError> {
        let events = Events::of(client)?;
        Ok(Self {
            events,
            ..Self::new(client)?
        })
    }

    /// The event of a doorbell, where it is rung by one.
    pub fn event(&self, offset: u64) -> Option<&Arc<Event>> {
        Some(&self.events.find(offset)?.event)
    }

    /// All by messages, whatever can be mapped.
    pub fn by_messages(client: &Arc<Client>, posted: bool) -> Self {
        Self {
            client: client.clone(),
            areas: Areas::default(),
            events: Events::default(),
            posted,
        }
    }

    /// The client.
    pub fn client(&self) -> &Arc<Client> {
        &self.client
    }

    /// Whether the first doorbells are rung without a message.
    pub fn is_mapped(&self) -> bool {
        self.areas
            .find(crate::spec::register::DOORBELLS, 8)
            .is_some()
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), BarError> {
        Ok(if self.posted {
            self.client.region_post(region::BAR0, offset, bytes)
        } else {
            self.client.region_write(region::BAR0, offset, bytes)
        }?)
    }
}

impl Bar for ClientBar {
    fn read32(&self, offset: u64) -> Result<u32, BarError> {
        match self.areas.find(offset, 4) {
            Some((mapped, at)) => Ok(mapped.load32(at)),
            None => Ok(self.client.read32(region::BAR0, offset)?),
        }
    }

    fn read64(&self, offset: u64) -> Result<u64, BarError> {
        match self.areas.find(offset, 8) {
            Some((mapped, at)) => Ok(mapped.load64(at)),
            None => Ok(self.client.read64(region::BAR0, offset)?),
        }
    }

    fn write32(&self, offset: u64, value: u32) -> Result<(), BarError> {
        self.doorbell(offset, value)
    }

    fn write64(&self, offset: u64, value: u64) -> Result<(), BarError> {
        match self.areas.find(offset, 8) {
            Some((mapped, at)) => mapped.store64(at, value),
            None => self.write(offset, &value.to_le_bytes())?,
        }
        Ok(())
    }

    #[inline(always)]
    fn doorbell(&self, offset: u64, value: u32) -> Result<(), BarError> {
        match self.areas.find(offset, 4) {
            // The store releases, and the socket is no weaker.
            Some((mapped, at)) => mapped.store32(at, value),
            None => match self.events.find(offset) {
                Some(stored) => {
                    stored.memory.store32(stored.at, value);
                    // A call of the kernel, which whoever it wakes comes after.
                    stored.event.signal();
                }
                None => self.write(offset, &value.to_le_bytes())?,
            },
        }
        Ok(())
    }
}
