//! Mappings that many regions of one front end share.
//!
//! ```text
//!   file     |------ 16 GiB ------|------ 16 GiB ------|--- rest --|
//!   regions    a  b c      d    e     f   gggg   hh iiiiiiii
//!   mapped   |==== a b c d ====||==|==== f g h ====|   |
//!                              |ee|              |=iiiiiiii=|      what lies across an end: by itself
//! ```
//! A VMM whose guest has an IOMMU maps its memory by the page, tens of thousands of pages of one file. The kernel grants a
//! process about 65,000 mappings, of which all its guests together get a part. So a region of an ordinary file does not get
//! a mapping of its own, but a part of a *window*: a large aligned piece of the file, as far as the file goes. What lies across an end
//! of a window, or is larger, is mapped as it is.
//!
//! A window is mapped as long as an epoch names a region in it, and not longer: else memory would stay with its front end's file that
//! the front end has taken back. How much all mappings of a front end may hold together is bounded, or one could have a small page in each of many windows.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use crate::mapping::{Examined, Protection};
use crate::{FileId, Mapping, MemoryError};

/// Bytes of a window.
const WINDOW: u64 = 16 << 30;

/// What is mapped for one front end.
#[derive(Debug)]
pub struct Windows {
    /// All mappings.
    all: Vec<Weak<Mapping>>,
    /// Those that can be shared.
    shared: HashMap<(FileId, Protection), Weak<Mapping>>,
    max_bytes: u64,
    max_mappings: usize,
}

impl Windows {
    /// Nothing yet; at most `max_mappings` mappings, of `max_bytes` bytes together.
    pub fn new(max_mappings: usize, max_bytes: u64) -> Self {
        Self {
            all: Vec::new(),
            shared: HashMap::new(),
            max_bytes,
            max_mappings,
        }
    }

    /// How many mappings there are.
    pub fn len(&self) -> usize {
        self.live().count()
    }

    /// Whether nothing is mapped.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn live(&self) -> impl Iterator<Item = Arc<Mapping>> {
        self.all.iter().filter_map(Weak::upgrade)
    }

    /// A mapping that holds what was examined.
    pub(crate) fn map(
        &mut self,
        wanted: Examined,
        protection: Protection,
    ) -> Result<Arc<Mapping>, MemoryError> {
        let Some(size) = wanted.size().filter(|_| wanted.can(protection)) else {
            // The kernel says what is wrong with it, if anything is.
            return Ok(self.add(wanted, protection)?.1);
        };
        let id = wanted.id();
        let start = id.offset - id.offset % WINDOW;
        let end = start.saturating_add(WINDOW).min(size);
        let window = FileId {
            offset: start,
            len: end - start,
            ..id
        };
        if let Some(found) = self.find(id, protection) {
            return Ok(found);
        }
        let window = if window.contains(&id) { window } else { id };
        if let Some(found) = self.find(window, protection) {
            return Ok(found);
        }
        let wide = wanted.widened(window.offset, window.len);
        let added = wide.and_then(|wide| self.add(wide, protection));
        // The whole window may be more than there is room for, or more of the file than can be mapped.
        let (key, mapping) = added.or_else(|_| self.add(wanted, protection))?;
        self.shared.insert(key, Arc::downgrade(&mapping));
        Ok(mapping)
    }

    /// What is mapped already. A mapping whose file shrank is given up with its front end; nothing new is to come to lie in it.
    fn find(&self, id: FileId, protection: Protection) -> Option<Arc<Mapping>> {
        let found = self.shared.get(&(id, protection))?.upgrade();
        found.filter(|mapping| !mapping.is_poisoned())
    }

    fn add(
        &mut self,
        examined: Examined,
        protection: Protection,
    ) -> Result<((FileId, Protection), Arc<Mapping>), MemoryError> {
        self.all.retain(|mapping| mapping.strong_count() > 0);
        self.shared.retain(|_, mapping| mapping.strong_count() > 0);
        if self.all.len() >= self.max_mappings {
            return Err(MemoryError::TooMany(self.max_mappings as u64));
        }
        let bytes = self.live().fold(0u64, |sum, m| sum.saturating_add(m.len()));
        if bytes.saturating_add(examined.id().len) > self.max_bytes {
            return Err(MemoryError::TooLarge(self.max_bytes));
        }
        let mapping = Arc::new(examined.map_for(protection)?);
        self.all.push(Arc::downgrade(&mapping));
        Ok(((mapping.id(), protection), mapping))
    }
}
