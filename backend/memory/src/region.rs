//! Regions, and which mapping each of them has.
//!
//! ```text
//!   epoch 1:  [        one region        ]   one mapping
//!   epoch 2:  [ A ]      [       B       ]   split: parts of that mapping, which stays whole
//!   epoch 3:  [   a longer region              ]   a mapping of its own; the one before is kept beside it
//! ```
//! Requests in flight have pointers into the mappings of the epoch that they were read in. As long as the next
//! epoch has these mappings too, for bytes that are still the guest's, nobody has to wait for them. So a region is a
//! part of an older mapping where one holds it, and otherwise keeps the older mappings of parts of it as *aliases*.
//! In exchange more may be mapped than the table asks for: at most twice as much ([`trim`]).

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::epoch::{Access, GuestMemory, Space};
use crate::mapping::{Examined, Protection};
use crate::windows::Windows;
use crate::{FileId, Mapping, MemoryError};

/// How many older mappings a region keeps at most: tables change by one or two regions at a time.
const ALIASES: usize = 8;

/// A region as a front end describes it.
#[derive(Debug)]
pub struct RegionSpec {
    /// Guest physical address of its first byte.
    pub guest: u64,
    /// Length in bytes.
    pub len: u64,
    /// The front end's virtual address of its first byte.
    pub user: u64,
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// The file.
    pub file: OwnedFd,
}

impl RegionSpec {
    fn bad(&self) -> MemoryError {
        MemoryError::BadRegion {
            start: self.guest,
            len: self.len,
        }
    }

    fn check(&self) -> Result<(), MemoryError> {
        let fits = |start: u64| start.checked_add(self.len).is_some();
        if self.len == 0 || !fits(self.guest) || !fits(self.user) || !fits(self.offset) {
            return Err(self.bad());
        }
        Ok(())
    }
}

/// What a device may do with a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights {
    /// It may read it.
    pub read: bool,
    /// It may write it.
    pub write: bool,
}

impl Rights {
    /// Both.
    pub const ALL: Self = Self {
        read: true,
        write: true,
    };

    /// Whether these are enough.
    pub fn allow(self, access: Access) -> bool {
        match access {
            Access::Read => self.read,
            Access::Write => self.write,
            Access::Both => self.read && self.write,
        }
    }
}

/// A mapped region.
#[derive(Clone, Debug)]
pub struct Region {
    guest: u64,
    user: u64,
    rights: Rights,
    /// Its own bytes, all of them in `mapping`.
    file: FileId,
    mapping: Arc<Mapping>,
    /// Where else some of its bytes are mapped, and used by requests of older epochs.
    aliases: Vec<Arc<Mapping>>,
}

impl Region {
    /// Maps `spec`, or shares a mapping of the same bytes in `old`.
    ///
    /// # Errors
    /// [`MemoryError::BadRegion`] where it is empty or wraps; else as [`Mapping::new`].
    pub fn new(spec: RegionSpec, old: &GuestMemory) -> Result<Self, MemoryError> {
        spec.check()?;
        let examined = Examined::new(spec.file.into(), spec.offset, spec.len)?;
        let file = examined.id();
        let sound = || old.regions().filter(|r| !r.mapping.is_poisoned());
        let same = sound().find(|r| r.file == file);
        let holder = same.or_else(|| sound().find(|r| r.mapping.id().contains(&file)));
        let (mapping, aliases) = match holder {
            // What cannot be written is refused when it is mapped.
            Some(r) if examined.is_writable() => (r.mapping.clone(), r.aliases.clone()),
            _ => {
                let parts = sound().filter(|r| r.file.common(&file).is_some());
                let aliases = parts.take(ALIASES).map(|r| r.mapping.clone()).collect();
                (Arc::new(examined.map()?), aliases)
            }
        };
        Ok(Self {
            guest: spec.guest,
            user: spec.user,
            rights: Rights::ALL,
            file,
            mapping,
            aliases,
        })
    }

    /// A region of a front end that maps one file in many pieces: it shares what is mapped of the file with the others.
    /// Without the right to write it is mapped for reading only, so that the file need not be writable.
    ///
    /// # Errors
    /// [`MemoryError::BadRegion`] where it is empty or wraps, or has no right at all; else as [`Mapping::new`].
    pub fn within(
        spec: RegionSpec,
        rights: Rights,
        windows: &mut Windows,
    ) -> Result<Self, MemoryError> {
        spec.check()?;
        let protection = match rights {
            Rights { write: true, .. } => Protection::ReadWrite,
            Rights { read: true, .. } => Protection::ReadOnly,
            _ => return Err(spec.bad()),
        };
        let examined = Examined::new(spec.file.into(), spec.offset, spec.len)?;
        Ok(Self {
            guest: spec.guest,
            user: spec.user,
            rights,
            file: examined.id(),
            mapping: windows.map(examined, protection)?,
            aliases: Vec::new(),
        })
    }

    /// What the device may do with it.
    pub fn rights(&self) -> Rights {
        self.rights
    }

    /// The mapping that it is a part of.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// Guest physical address of its first byte.
    pub fn guest(&self) -> u64 {
        self.guest
    }

    /// The front end's virtual address of its first byte.
    pub fn user(&self) -> u64 {
        self.user
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.file.len
    }

    /// Which bytes of which file it is.
    pub fn file(&self) -> FileId {
        self.file
    }

    /// Our address of its first byte.
    pub(crate) fn host(&self) -> *mut u8 {
        let skip = self.file.offset - self.mapping.id().offset;
        self.mapping.ptr().wrapping_add(skip as usize)
    }

    /// Where its bytes are in our addresses, as starts and ends: in its mapping, and in its aliases.
    pub(crate) fn host_ranges(&self) -> impl Iterator<Item = (usize, usize)> {
        std::iter::once(&self.mapping)
            .chain(&self.aliases)
            .filter_map(|mapping| {
                let id = mapping.id();
                let common = id.common(&self.file)?;
                let at = |offset: u64| mapping.ptr() as usize + (offset - id.offset) as usize;
                Some((at(common.start), at(common.end)))
            })
    }

    pub(crate) fn is_poisoned(&self) -> bool {
        let mut all = std::iter::once(&self.mapping).chain(&self.aliases);
        all.any(|m| m.is_poisoned())
    }

    pub(crate) fn start(&self, space: Space) -> u64 {
        match space {
            Space::Guest => self.guest,
            Space::User => self.user,
        }
    }
}

/// How much the mappings of a table hold, in bytes, each counted once.
fn mapped(regions: &[Region]) -> u64 {
    let all = regions
        .iter()
        .flat_map(|r| std::iter::once(&r.mapping).chain(&r.aliases));
    let mut all: Vec<_> = all.map(|m| (m.ptr() as usize, m.len())).collect();
    all.sort_unstable();
    all.dedup();
    all.iter().fold(0, |sum, m| sum.saturating_add(m.1))
}

/// Sees to it that a table has not more than twice the bytes mapped that it asks for. Otherwise a front end could
/// leave large mappings behind small regions, and hold more of our addresses than what it may have in a table.
/// Requests in flight are waited for then.
pub(crate) fn trim(regions: &mut [Region]) -> Result<(), MemoryError> {
    let wanted = regions.iter().map(|r| r.file.len);
    let most = wanted.fold(0u64, u64::saturating_add).saturating_mul(2);
    if mapped(regions) <= most {
        return Ok(());
    }
    for region in regions.iter_mut() {
        region.aliases.clear();
    }
    if mapped(regions) <= most {
        return Ok(());
    }
    for region in regions {
        let FileId { offset, len, .. } = region.file;
        if region.mapping.id() != region.file {
            region.mapping = Arc::new(region.mapping.again(offset, len)?);
        }
    }
    Ok(())
}
