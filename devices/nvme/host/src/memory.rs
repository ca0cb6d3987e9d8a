//! The host's memory: memfd regions at addresses that the device knows, and pages of them.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

use bluff_vfio_client::{Client, DmaMap, DmaMemory};
use bluff_virtio_driver::{Memory, MemoryError, RegionConfig, Span};

const EFAULT: u32 = 14;

/// Memory that a controller may use. Addresses are the same to host and controller.
#[derive(Debug)]
pub struct HostMemory {
    memory: Arc<Memory>,
    page: u64,
    /// Free runs: first address, bytes.
    free: Mutex<BTreeMap<u64, u64>>,
}

impl HostMemory {
    /// One region of `size` bytes at `base`, in pages of 4 KiB.
    ///
    /// # Errors
    /// Where the region makes no sense or there is no memory.
    pub fn flat(base: u64, size: u64) -> Result<Arc<Self>, MemoryError> {
        let region = RegionConfig {
            guest_addr: base,
            size,
            file_offset: 0,
        };
        Self::new(&[region], 4096)
    }

    /// Regions, given out in pages of `page` bytes: what the controller is told as its page size.
    ///
    /// # Errors
    /// Where a region makes no sense, or there is no memory.
    pub fn new(regions: &[RegionConfig], page: u64) -> Result<Arc<Self>, MemoryError> {
        assert!(page.is_power_of_two() && page >= 4096, "a size of pages");
        let memory = Memory::new(regions)?;
        let free = regions.iter().filter_map(|r| {
            let first = r.guest_addr.next_multiple_of(page);
            let end = (r.guest_addr + r.size) / page * page;
            (first < end).then(|| (first, end - first))
        });
        Ok(Arc::new(Self {
            page,
            free: Mutex::new(free.collect()),
            memory,
        }))
    }

    /// Bytes of a page.
    pub fn page(&self) -> u64 {
        self.page
    }

    /// The regions and their bytes.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Maps all regions for the device.
    ///
    /// # Errors
    /// Where the server refuses.
    pub fn share(&self, client: &Client) -> Result<(), bluff_vfio_client::Error> {
        self.memory.regions().iter().try_for_each(|region| {
            client.dma_map(DmaMap {
                address: region.config().guest_addr,
                size: region.config().size,
                offset: region.config().file_offset,
                read: true,
                write: true,
                file: Some(region.as_fd()),
            })
        })
    }

    /// `len` bytes in pages that adjoin, zeroed. They are free again when they are dropped.
    ///
    /// # Errors
    /// [`MemoryError::Exhausted`].
    pub fn alloc(self: &Arc<Self>, len: u64) -> Result<Pages, MemoryError> {
        let len = len.max(1).next_multiple_of(self.page);
        let at = self.take(len, false)?;
        let pages = (at..at + len).step_by(self.page as usize).collect();
        self.owned(pages)
    }

    /// As [`HostMemory::alloc`], in pages of which none follows the one before it, as long as memory is not almost full.
    ///
    /// # Errors
    /// [`MemoryError::Exhausted`].
    pub fn alloc_scattered(self: &Arc<Self>, len: u64) -> Result<Pages, MemoryError> {
        let count = len.max(1).div_ceil(self.page) as usize;
        let mut pages = Vec::with_capacity(count);
        while pages.len() < count {
            // From both ends of free memory in turn.
            match self.take(self.page, pages.len() % 2 == 0) {
                Ok(page) => pages.push(page),
                Err(error) => {
                    drop(self.owned(pages));
                    return Err(error);
                }
            }
        }
        self.owned(pages)
    }

    fn owned(self: &Arc<Self>, list: Vec<u64>) -> Result<Pages, MemoryError> {
        let pages = Pages {
            memory: self.clone(),
            list,
        };
        for at in &pages.list {
            self.memory.span(*at, self.page)?.zero();
        }
        Ok(pages)
    }

    /// A free run, from the highest or the lowest addresses.
    fn take(&self, len: u64, high: bool) -> Result<u64, MemoryError> {
        let mut free = self.free.lock().expect("nobody panics with it");
        let fits = |(_, size): &(&u64, &u64)| **size >= len;
        let found = if high {
            free.iter().rev().find(fits)
        } else {
            free.iter().find(fits)
        };
        let (&at, &size) = found.ok_or(MemoryError::Exhausted(len))?;
        free.remove(&at);
        let (taken, rest) = if high {
            (at + size - len, at)
        } else {
            (at, at + len)
        };
        if size > len {
            free.insert(rest, size - len);
        }
        Ok(taken)
    }

    fn give_back(&self, mut at: u64, mut len: u64) {
        let mut free = self.free.lock().expect("nobody panics with it");
        if let Some((&before, &size)) = free.range(..at).next_back()
            && before + size == at
        {
            free.remove(&before);
            (at, len) = (before, size + len);
        }
        if let Some(size) = free.remove(&(at + len)) {
            len += size;
        }
        free.insert(at, len);
    }

    /// Bytes that are free.
    pub fn free(&self) -> u64 {
        self.free
            .lock()
            .expect("nobody panics with it")
            .values()
            .sum()
    }
}

impl DmaMemory for HostMemory {
    fn read(&self, address: u64, to: &mut [u8]) -> Result<(), u32> {
        self.memory.read(address, to).map_err(|_| EFAULT)
    }

    fn write(&self, address: u64, from: &[u8]) -> Result<(), u32> {
        self.memory.write(address, from).map_err(|_| EFAULT)
    }
}

/// Pages that are somebody's.
#[derive(Debug)]
pub struct Pages {
    memory: Arc<HostMemory>,
    list: Vec<u64>,
}

impl Pages {
    /// Address of the first one.
    pub fn address(&self) -> u64 {
        self.list[0]
    }

    /// The addresses of all, in the order of the bytes.
    pub fn list(&self) -> &[u64] {
        &self.list
    }

    /// Whose they are.
    pub fn memory(&self) -> &Arc<HostMemory> {
        &self.memory
    }

    /// A window on all of them, where they adjoin.
    pub(crate) fn span(&self) -> Span {
        let len = self.list.len() as u64 * self.memory.page;
        let span = self.memory.memory.span(self.list[0], len);
        span.expect("pages that adjoin")
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        for at in &self.list {
            self.memory.give_back(*at, self.memory.page);
        }
    }
}
