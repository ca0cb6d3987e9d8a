//! A BAR behind the client of the `vfio_user` crate, which no one here wrote.

use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard};

use bluff_vfio_client::{Area, Mapped};
use vfio_user::Client;

use super::{Areas, Bar, BarError};

const REGION: u32 = 0;

/// Region 0 behind the crate's client. Its writes always wait for their replies.
pub struct CrateBar {
    /// The crate's methods want it for themselves.
    client: Mutex<Client>,
    areas: Areas,
}

impl CrateBar {
    /// Maps what can be mapped.
    ///
    /// # Errors
    /// Where region 0 is none or cannot be mapped.
    pub fn new(client: Client) -> Result<Self, BarError> {
        let mut areas = Vec::new();
        let found = client.region(REGION).ok_or("it has no region 0")?;
        if let Some(file) = &found.file_offset {
            let whole = [(0, found.size)];
            let sparse = found.sparse_areas.iter().map(|a| (a.offset, a.size));
            let listed: Vec<_> = if found.sparse_areas.is_empty() {
                whole.to_vec()
            } else {
                sparse.collect()
            };
            for (offset, size) in listed {
                let at = file.start() + offset;
                let mapped = Mapped::new(file.file().as_fd(), at, size, true)?;
                areas.push((Area { offset, size }, mapped));
            }
        }
        Ok(Self {
            areas: Areas(areas),
            client: Mutex::new(client),
        })
    }

    /// The client: for memory, interrupts, resets.
    pub fn client(&self) -> MutexGuard<'_, Client> {
        self.client.lock().expect("nobody panics with it")
    }

    fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), BarError> {
        Ok(self.client().region_read(REGION, offset, to)?)
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<(), BarError> {
        Ok(self.client().region_write(REGION, offset, from)?)
    }
}

impl Bar for CrateBar {
    fn read32(&self, offset: u64) -> Result<u32, BarError> {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn read64(&self, offset: u64) -> Result<u64, BarError> {
        let mut bytes = [0; 8];
        self.read(offset, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn write32(&self, offset: u64, value: u32) -> Result<(), BarError> {
        self.write(offset, &value.to_le_bytes())
    }

    fn write64(&self, offset: u64, value: u64) -> Result<(), BarError> {
        self.write(offset, &value.to_le_bytes())
    }

    fn doorbell(&self, offset: u64, value: u32) -> Result<(), BarError> {
        match self.areas.find(offset, 4) {
            Some((mapped, at)) => {
                mapped.store32(at, value);
                Ok(())
            }
            None => self.write(offset, &value.to_le_bytes()),
        }
    }
}
