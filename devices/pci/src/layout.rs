//! What of a function is fixed: its regions and how many interrupts it has.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};

use crate::seam::Interrupt;
use crate::spec::BARS;

/// Areas are mapped by whole pages of this size, in bytes. A host with larger pages cannot map them, and traps instead.
pub const PAGE: u64 = 4096;

/// How many address bits a memory BAR has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// 32 bits: at most 2 GiB.
    Memory32,
    /// 64 bits; the next BAR is its upper half, and absent.
    Memory64,
}

/// A part of a BAR that the host may map, instead of having each access trapped.
///
/// What is stored there is seen by nobody until somebody looks. It is the device's memory and host's memory both:
/// nothing in it can be trusted, and neither can it be gated by Memory Space Enable.
#[derive(Clone, Debug)]
pub struct Area {
    /// Offset in the BAR, in bytes: a multiple of [`PAGE`].
    pub offset: u64,
    /// Length in bytes: a multiple of [`PAGE`].
    pub len: u64,
    /// The memory.
    pub file: Arc<OwnedFd>,
    /// Where in `file` it begins, in bytes: a multiple of [`PAGE`].
    pub file_offset: u64,
}

impl Area {
    /// An area of fresh, zeroed memory, of a size that no host can change (so that none can have us access what is gone).
    ///
    /// # Errors
    /// What the kernel says to a memory file of that length.
    pub fn new(offset: u64, len: u64) -> io::Result<Self> {
        let mut all = Self::several(&[(offset, len)])?;
        Ok(all.pop().expect("as many as were asked for"))
    }

    /// As [`Area::new`], the areas of a BAR, by offset and length in bytes. They have one file, in which they lie as they lie in the BAR: vfio
    /// knows one file for a BAR, and an attachment cannot offer what is elsewhere.
    ///
    /// # Errors
    /// As [`Area::new`].
    pub fn several(areas: &[(u64, u64)]) -> io::Result<Vec<Self>> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create(c"bar", flags)?;
        let end = areas.iter().map(|(offset, len)| offset + len).max();
        rustix::fs::ftruncate(&file, end.unwrap_or(0))?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals)?;
        let file = Arc::new(file);
        let area = |&(offset, len): &(u64, u64)| Self {
            offset,
            len,
            file: file.clone(),
            file_offset: offset,
        };
        Ok(areas.iter().map(area).collect())
    }
}

/// A memory BAR.
#[derive(Clone, Debug)]
pub struct Bar {
    /// Size in bytes: a power of two, at least 128 (PCIe §7.5.1.2.1).
    pub size: u64,
    /// Its address.
    pub kind: BarKind,
    /// Whether reads have no side effects.
    pub prefetchable: bool,
    /// What of it can be mapped; ascending, apart from each other, and apart from pages that hold an MSI-X table or
    /// its pending bits, which have to be trapped. An attachment may be able to offer only areas of one file that lie in it as
    /// they lie in the BAR; what it does not offer is trapped.
    pub areas: Vec<Area>,
}

impl Bar {
    /// A 64-bit BAR of which nothing can be mapped.
    pub fn memory_64(size: u64) -> Self {
        Self {
            size,
            kind: BarKind::Memory64,
            prefetchable: false,
            areas: Vec::new(),
        }
    }

    /// A 32-bit BAR of which nothing can be mapped.
    pub fn memory_32(size: u64) -> Self {
        Self {
            kind: BarKind::Memory32,
            ..Self::memory_64(size)
        }
    }

    /// With parts that can be mapped.
    #[must_use]
    pub fn with_areas(mut self, areas: Vec<Area>) -> Self {
        self.areas = areas;
        self
    }
}

/// What of a function is fixed as long as it lives. Configuration space has 4096 bytes in any function.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    /// The BARs, by number.
    pub bars: [Option<Bar>; BARS],
    /// How many MSI-X vectors it has: 0 to 2048.
    pub vectors: u16,
    /// Whether it has INTx.
    pub intx: bool,
}

impl Layout {
    /// Whether there is such an interrupt.
    pub fn has(&self, interrupt: Interrupt) -> bool {
        match interrupt {
            Interrupt::Intx => self.intx,
            Interrupt::Msix(vector) => vector < self.vectors,
        }
    }
}
