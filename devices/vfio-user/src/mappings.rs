//! What memory the client has given to the device: addresses only (vfio-user, "VFIO_USER_DMA_MAP").

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::Error;

/// A range of addresses of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// First address.
    pub address: u64,
    /// Bytes, at least one page. The last address is at most `u64::MAX`.
    pub size: u64,
    /// Where it begins in its file.
    pub offset: u64,
    /// The device may read it.
    pub read: bool,
    /// The device may write it.
    pub write: bool,
    /// It came with a file.
    pub file: bool,
}

impl Mapping {
    fn last(&self) -> u64 {
        self.address + (self.size - 1)
    }
}

/// What may be mapped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// How many mappings.
    pub count: usize,
    /// Bytes of all that have a file.
    pub bytes: u64,
    /// What addresses and sizes are multiples of.
    pub page: u64,
}

/// The mappings, by address.
#[derive(Debug, Default)]
pub(crate) struct Mappings {
    by_address: BTreeMap<u64, Mapping>,
    /// Bytes of those with a file.
    bytes: u64,
}

/// The last address of a range of whole pages.
fn last(address: u64, size: u64, page: u64) -> Result<u64, Error> {
    let bad = Error::Range { address, size };
    if size == 0 || !(address | size).is_multiple_of(page) {
        return Err(bad);
    }
    address.checked_add(size - 1).ok_or(bad)
}

impl Mappings {
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Mapping> {
        self.by_address.values()
    }

    /// Whether `mapping` can be added.
    pub(crate) fn check(&self, mapping: &Mapping, bounds: &Bounds) -> Result<(), Error> {
        let Mapping { address, size, .. } = *mapping;
        let last = last(address, size, bounds.page)?;
        // A file ends where its offsets do, which are signed.
        let end = mapping.offset.checked_add(size);
        if mapping.file
            && (!mapping.offset.is_multiple_of(bounds.page)
                || end.is_none_or(|end| i64::try_from(end).is_err()))
        {
            return Err(Error::Value {
                field: "file offset",
                value: mapping.offset,
            });
        }
        let before = self.by_address.range(..=last).next_back();
        if before.is_some_and(|(_, other)| other.last() >= address) {
            return Err(Error::Mapped { address, size });
        }
        let bytes = if mapping.file { size } else { 0 };
        let fits = self.bytes.checked_add(bytes);
        if self.by_address.len() >= bounds.count || fits.is_none_or(|sum| sum > bounds.bytes) {
            return Err(Error::Full);
        }
        Ok(())
    }

    /// Adds what was checked.
    pub(crate) fn insert(&mut self, mapping: Mapping) {
        self.bytes += if mapping.file { mapping.size } else { 0 };
        let old = self.by_address.insert(mapping.address, mapping);
        assert!(old.is_none(), "a mapping that was not checked");
    }

    /// Takes out the mappings that lie within a range, which may be none. Where one lies across an end of it nothing is taken.
    pub(crate) fn remove(
        &mut self,
        address: u64,
        size: u64,
        page: u64,
    ) -> Result<Vec<Mapping>, Error> {
        let last = last(address, size, page)?;
        let cut = Error::Range { address, size };
        let before = self.by_address.range(..address).next_back();
        if before.is_some_and(|(_, m)| m.last() >= address) {
            return Err(cut);
        }
        let within = self.by_address.range(address..=last);
        if within
            .clone()
            .next_back()
            .is_some_and(|(_, m)| m.last() > last)
        {
            return Err(cut);
        }
        let gone: Vec<Mapping> = within.map(|(_, m)| *m).collect();
        for mapping in &gone {
            self.by_address.remove(&mapping.address);
            self.bytes -= if mapping.file { mapping.size } else { 0 };
        }
        Ok(gone)
    }

    /// Takes out all.
    pub(crate) fn clear(&mut self) -> Vec<Mapping> {
        self.bytes = 0;
        std::mem::take(&mut self.by_address).into_values().collect()
    }

    /// Whether `len` bytes, at least one, are mapped, over mappings that adjoin, and all of these are `usable`.
    pub(crate) fn covers(&self, address: u64, len: u64, usable: impl Fn(&Mapping) -> bool) -> bool {
        let Some(end) = address.checked_add(len - 1) else {
            return false;
        };
        let mut at = address;
        loop {
            let found = self.by_address.range(..=at).next_back();
            match found {
                Some((_, m)) if m.last() >= at && usable(m) => {
                    if m.last() >= end {
                        return true;
                    }
                    at = m.last() + 1;
                }
                _ => return false,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds {
        count: 4,
        bytes: 1 << 40,
        page: 4096,
    };

    fn mapping(address: u64, size: u64) -> Mapping {
        Mapping {
            address,
            size,
            offset: 0,
            read: true,
            write: true,
            file: true,
        }
    }

    fn with(ranges: &[(u64, u64)]) -> Mappings {
        let mut all = Mappings::default();
        for (address, size) in ranges {
            let m = mapping(*address, *size);
            all.check(&m, &BOUNDS).unwrap();
            all.insert(m);
        }
        all
    }

    #[test]
    fn a_mapping_may_end_where_addresses_do_and_not_wrap() {
        let all = with(&[]);
        let top = 0u64.wrapping_sub(4096);
        all.check(&mapping(top, 4096), &BOUNDS).unwrap();
        for (address, size) in [(top, 8192), (u64::MAX - 4095, u64::MAX - 4095), (0, 0)] {
            let e = all.check(&mapping(address, size), &BOUNDS).unwrap_err();
            assert!(matches!(e, Error::Range { .. }), "{address:#x} {e}");
        }
        let mut all = with(&[(top, 4096)]);
        assert!(all.covers(top, 4096, |_| true) && !all.covers(top, 4097, |_| true));
        assert_eq!(all.remove(top, 4096, 4096).unwrap().len(), 1);
    }

    #[test]
    fn bytes_of_memory_without_a_file_do_not_count() {
        let mut all = with(&[(0, 1 << 40)]);
        let next = mapping(1 << 40, 4096);
        assert!(matches!(all.check(&next, &BOUNDS), Err(Error::Full)));
        let bare = Mapping {
            file: false,
            offset: 1,
            ..next
        };
        all.check(&bare, &BOUNDS).unwrap();
        all.insert(bare);
        assert_eq!(all.clear().len(), 2);
        all.check(&mapping(0, 1 << 40), &BOUNDS).unwrap();
    }

    #[test]
    fn a_range_that_cuts_a_mapping_takes_nothing() {
        let mut all = with(&[(0x1000, 0x2000), (0x4000, 0x1000)]);
        for (address, size) in [(0x1000, 0x1000), (0x2000, 0x1000), (0, 0x2000)] {
            assert!(all.remove(address, size, 4096).is_err(), "{address:#x}");
        }
        assert!(all.remove(0x2000, 0x4000, 4096).is_err());
        assert_eq!(all.remove(0, 0x1000, 4096).unwrap(), []);
        assert_eq!(all.remove(0, 0x10000, 4096).unwrap().len(), 2);
    }

    #[test]
    fn a_range_may_span_mappings_that_adjoin() {
        let all = with(&[(0x1000, 0x1000), (0x2000, 0x1000), (0x4000, 0x1000)]);
        assert!(all.covers(0x1fff, 2, |_| true) && all.covers(0x1000, 0x2000, |_| true));
        assert!(!all.covers(0x1000, 0x2001, |_| true));
        assert!(!all.covers(0x1000, 0x2000, |m| m.address == 0x1000));
        assert!(!all.covers(0xfff, 2, |_| true) && !all.covers(u64::MAX, 2, |_| true));
    }
}
