//! An epoch of guest memory: an immutable map from addresses to mappings.
//!
//! Unsafe, because it copies from and to memory that a host shares.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::region::{self, Region, Rights};
use crate::sorted::Sorted;
use crate::{IoVec, MemoryError, guard};

/// Which addresses are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Guest physical addresses: descriptors, buffers, the dirty log.
    Guest,
    /// The front end's own virtual addresses: rings over vhost-user (`SET_VRING_ADDR`).
    User,
}

/// What the device will do with a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The device reads it.
    Read,
    /// The device writes it.
    Write,
    /// It does both, or nobody says: rings and queues.
    Both,
}

/// The region that the last address was in. A hint belongs to one epoch: forget it with the epoch.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hint {
    start: u64,
    len: u64,
    host: usize,
}

/// Whether the lower of two regions ends before the other one begins.
fn apart(space: Space, low: &Region, high: &Region) -> Result<(), MemoryError> {
    let (first, second) = (low.start(space), high.start(space));
    // Cannot wrap: checked when the region was made.
    if first + low.size() > second {
        return Err(MemoryError::Overlap { first, second });
    }
    Ok(())
}

/// Where an epoch lies in our addresses: the ends of the ranges that begin at an address, sorted. There are several where a
/// guest sees the same bytes at several addresses.
type Hosts = Sorted<Vec<usize>>;

fn host_with(hosts: &Hosts, (start, end): (usize, usize)) -> Hosts {
    let mut ends = host_ends(hosts, start);
    ends.insert(ends.partition_point(|e| *e <= end), end);
    hosts.with(start as u64, ends)
}

fn host_without(hosts: &Hosts, (start, end): (usize, usize)) -> Hosts {
    let mut ends = host_ends(hosts, start);
    let i = ends.binary_search(&end);
    ends.remove(i.expect("a range of a region that is there"));
    if ends.is_empty() {
        return hosts.without(start as u64);
    }
    hosts.with(start as u64, ends)
}

fn host_ends(hosts: &Hosts, start: usize) -> Vec<usize> {
    let found = hosts.at_most(start as u64);
    let there = found.filter(|(key, _)| *key == start as u64);
    there.map_or(Vec::new(), |(_, ends)| ends.clone())
}

/// Where regions lie in our addresses.
fn hosts_of<'a>(regions: impl Iterator<Item = &'a Region>) -> Hosts {
    let mut hosts: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
    for (start, end) in regions.flat_map(Region::host_ranges) {
        hosts.entry(start as u64).or_default().push(end);
    }
    hosts.values_mut().for_each(|ends| ends.sort_unstable());
    Sorted::new(&hosts.into_iter().collect::<Vec<_>>())
}

/// Up to which repair it is known that no region was concerned.
#[derive(Debug, Default)]
struct Clean(AtomicU64);

/// Nothing is known.
const UNKNOWN: u64 = u64::MAX;

impl Clean {
    fn until(repairs: u64) -> Self {
        Self(AtomicU64::new(repairs))
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// The same for an epoch that has another region.
    fn with(&self, region: &Region) -> Self {
        // A mark that was set before this epoch was made is no news to the handler's count.
        Self::until(match region.is_poisoned() {
            true => UNKNOWN,
            false => self.get(),
        })
    }
}

/// One epoch of a guest's memory.
#[derive(Debug, Default)]
pub struct GuestMemory {
    by_guest: Sorted<Region>,
    by_user: Sorted<Region>,
    by_host: Hosts,
    clean: Clean,
}

impl GuestMemory {
    /// An epoch of `regions`, in any order.
    ///
    /// # Errors
    /// [`MemoryError::Overlap`] where two share guest addresses or front-end addresses; as [`crate::Mapping::new`]
    /// where a region gives up the mapping that it shares with an older epoch, which is too large for it.
    pub fn new(mut regions: Vec<Region>) -> Result<Arc<Self>, MemoryError> {
        region::trim(&mut regions)?;
        let sorted = |space: Space| {
            let mut by = regions.clone();
            by.sort_unstable_by_key(|r| r.start(space));
            for pair in by.windows(2) {
                apart(space, &pair[0], &pair[1])?;
            }
            let by: Vec<_> = by.into_iter().map(|r| (r.start(space), r)).collect();
            Ok(Sorted::new(&by))
        };
        Ok(Arc::new(Self {
            by_guest: sorted(Space::Guest)?,
            by_user: sorted(Space::User)?,
            by_host: hosts_of(regions.iter()),
            clean: Clean::until(UNKNOWN),
        }))
    }

    /// The next epoch, with one more region. It shares nearly all with this one: a host may have 65,000 regions, and
    /// add and remove one after another (a vIOMMU maps by the page).
    ///
    /// # Errors
    /// [`MemoryError::Overlap`] where it shares guest addresses or front-end addresses with another.
    pub fn with(&self, region: Region) -> Result<Arc<Self>, MemoryError> {
        let added = |by: &Sorted<Region>, space: Space| {
            let start = region.start(space);
            if let Some((_, before)) = by.at_most(start) {
                apart(space, before, &region)?;
            }
            if let Some((_, after)) = by.from(start).next() {
                apart(space, &region, after)?;
            }
            Ok(by.with(start, region.clone()))
        };
        Ok(Arc::new(Self {
            by_guest: added(&self.by_guest, Space::Guest)?,
            by_user: added(&self.by_user, Space::User)?,
            by_host: region
                .host_ranges()
                .fold(self.by_host.clone(), |hosts, range| {
                    host_with(&hosts, range)
                }),
            clean: self.clean.with(&region),
        }))
    }

    /// The next epoch, without the region that begins at guest address `guest`; `None` where there is none.
    pub fn without(&self, guest: u64) -> Option<Arc<Self>> {
        let (start, region) = self.by_guest.at_most(guest)?;
        (start == guest).then(|| {
            Arc::new(Self {
                by_guest: self.by_guest.without(guest),
                by_user: self.by_user.without(region.user()),
                by_host: region
                    .host_ranges()
                    .fold(self.by_host.clone(), |hosts, range| {
                        host_without(&hosts, range)
                    }),
                clean: Clean::until(self.clean.get()),
            })
        })
    }

    /// The next epoch, without the regions that begin at guest addresses from `first` to `last`; an epoch like this one where there is none.
    /// It takes as long as all regions take to be copied, however many go.
    pub fn without_range(&self, first: u64, last: u64) -> Arc<Self> {
        let stays = |r: &Region| !(first..=last).contains(&r.guest());
        let kept = |by: &Sorted<Region>| {
            let kept = by.iter().filter(|(_, r)| stays(r));
            Sorted::new(&kept.map(|(k, r)| (k, r.clone())).collect::<Vec<_>>())
        };
        let by_guest = kept(&self.by_guest);
        Arc::new(Self {
            by_host: hosts_of(by_guest.iter().map(|(_, r)| r)),
            by_guest,
            by_user: kept(&self.by_user),
            clean: Clean::until(self.clean.get()),
        })
    }

    /// An epoch without memory.
    pub fn empty() -> Arc<Self> {
        Arc::default()
    }

    /// The regions, by guest address.
    pub fn regions(&self) -> impl DoubleEndedIterator<Item = &Region> {
        self.by_guest.iter().map(|(_, region)| region)
    }

    /// How many regions there are.
    pub fn len(&self) -> usize {
        self.by_guest.len()
    }

    /// Whether there is no region.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The regions that begin at guest address `addr` or higher, by guest address.
    pub fn regions_from(&self, addr: u64) -> impl Iterator<Item = &Region> {
        self.by_guest.from(addr).map(|(_, region)| region)
    }

    /// The first guest address after the highest region; 0 where there is none.
    pub fn end(&self) -> u64 {
        self.regions()
            .next_back()
            .map_or(0, |r| r.guest() + r.size())
    }

    /// Whether a region's file shrank: whoever sent it is to be ended. All regions are looked at only where some
    /// mapping of this process was repaired since the last time.
    pub fn is_poisoned(&self) -> bool {
        // Read first: what is repaired from here on is found the next time.
        let repairs = guard::repairs();
        if self.clean.get() == repairs {
            return false;
        }
        let poisoned = self.regions().any(Region::is_poisoned);
        if !poisoned {
            self.clean.0.store(repairs, Ordering::Relaxed);
        }
        poisoned
    }

    /// Whether a pointer that was resolved in another epoch is still mapped in this one. A reactor asks it for each
    /// piece of each request in flight when a table changes. Where a guest sees some bytes at two addresses, and only
    /// one of the two is left, it can say no although it is; then the request is waited for.
    pub fn maps(&self, buffer: IoVec) -> bool {
        let mut at = buffer.ptr() as usize;
        let Some(end) = at.checked_add(buffer.len()) else {
            return false;
        };
        loop {
            let range = self.by_host.at_most(at as u64);
            let reached = range.and_then(|(_, ends)| ends.last()).copied();
            match reached {
                Some(reached) if reached >= end && reached > at => return true,
                // What lies in two regions that adjoin in our addresses too.
                Some(reached) if reached > at => at = reached,
                _ => return false,
            }
        }
    }

    fn find(&self, space: Space, addr: u64) -> Option<&Region> {
        let by = match space {
            Space::Guest => &self.by_guest,
            Space::User => &self.by_user,
        };
        let (start, region) = by.at_most(addr)?;
        (addr - start < region.size()).then_some(region)
    }

    /// The guest address of a front-end address, where a region holds it.
    pub fn guest_of_user(&self, addr: u64) -> Option<u64> {
        let region = self.find(Space::User, addr)?;
        Some(region.guest() + (addr - region.user()))
    }

    /// `len` bytes at `addr`, which must lie in one mapping and be aligned to `align` bytes.
    ///
    /// Rings are resolved with this: they are laid out for direct access, so what spans two
    /// mappings is refused, and what the device may not both read and write.
    ///
    /// # Errors
    /// [`MemoryError::Unmapped`], [`MemoryError::Misaligned`], [`MemoryError::Forbidden`].
    pub fn contiguous(
        &self,
        space: Space,
        addr: u64,
        len: u64,
        align: u64,
    ) -> Result<*mut u8, MemoryError> {
        self.contiguous_for(Access::Both, space, addr, len, align)
    }

    /// As [`GuestMemory::contiguous`], for what the device only reads, or only writes.
    ///
    /// # Errors
    /// As [`GuestMemory::contiguous`].
    pub fn contiguous_for(
        &self,
        access: Access,
        space: Space,
        addr: u64,
        len: u64,
        align: u64,
    ) -> Result<*mut u8, MemoryError> {
        if !addr.is_multiple_of(align) {
            return Err(MemoryError::Misaligned { addr, align });
        }
        let unmapped = MemoryError::Unmapped { addr, len };
        let Some(region) = self.find(space, addr) else {
            return Err(unmapped);
        };
        let skip = addr - region.start(space);
        if len > region.size() - skip {
            return Err(unmapped);
        }
        if !region.rights().allow(access) {
            return Err(MemoryError::Forbidden { addr, len });
        }
        let ptr = region.host().wrapping_add(skip as usize);
        // A file offset that is not a multiple of the alignment gives a host address that is not.
        if !(ptr as u64).is_multiple_of(align) {
            return Err(MemoryError::Misaligned { addr, align });
        }
        Ok(ptr)
    }

    /// `len` bytes at guest address `addr`, if they lie in one region, which the device may both read and write. The common case of
    /// [`GuestMemory::segments`], inlined.
    #[inline(always)]
    pub fn one(&self, hint: &mut Hint, addr: u64, len: u32) -> Option<*mut u8> {
        self.one_for(Access::Both, hint, addr, len)
    }

    /// As [`GuestMemory::one`], for what the device only reads, or only writes.
    #[inline(always)]
    pub fn one_for(&self, access: Access, hint: &mut Hint, addr: u64, len: u32) -> Option<*mut u8> {
        // Whoever holds `hint` holds the epoch that it was filled in. It names only regions with all rights.
        let skip = addr.wrapping_sub(hint.start);
        if skip < hint.len && u64::from(len) <= hint.len - skip {
            return Some((hint.host + skip as usize) as *mut u8);
        }
        self.one_slow(access, hint, addr, len)
    }

    #[cold]
    #[inline(never)]
    fn one_slow(&self, access: Access, hint: &mut Hint, addr: u64, len: u32) -> Option<*mut u8> {
        let region = self.find(Space::Guest, addr)?;
        if !region.rights().allow(access) {
            return None;
        }
        if region.rights() == Rights::ALL {
            *hint = Hint {
                start: region.guest(),
                len: region.size(),
                host: region.host() as usize,
            };
        }
        let skip = addr - region.guest();
        (u64::from(len) <= region.size() - skip).then(|| region.host().wrapping_add(skip as usize))
    }

    /// Appends the pieces of `len` bytes at guest address `addr` to `out`: one for each region that
    /// they lie in. Regions that adjoin in guest addresses need not adjoin in ours.
    ///
    /// A length of zero appends nothing and asks for no memory.
    ///
    /// The device has to have the right both to read and to write; [`GuestMemory::segments_for`] asks for less.
    ///
    /// # Errors
    /// [`MemoryError::Unmapped`], [`MemoryError::Forbidden`]; `out` is then as it was.
    pub fn segments(&self, addr: u64, len: u32, out: &mut Vec<IoVec>) -> Result<(), MemoryError> {
        self.segments_for(Access::Both, addr, len, out)
    }

    /// As [`GuestMemory::segments`], for what the device only reads, or only writes.
    ///
    /// # Errors
    /// As [`GuestMemory::segments`].
    pub fn segments_for(
        &self,
        access: Access,
        addr: u64,
        len: u32,
        out: &mut Vec<IoVec>,
    ) -> Result<(), MemoryError> {
        let before = out.len();
        let unmapped = MemoryError::Unmapped {
            addr,
            len: u64::from(len),
        };
        if addr.checked_add(u64::from(len)).is_none() {
            return Err(unmapped);
        }
        let (mut at, mut left) = (addr, u64::from(len));
        while left > 0 {
            let Some(region) = self.find(Space::Guest, at) else {
                out.truncate(before);
                return Err(unmapped);
            };
            if !region.rights().allow(access) {
                out.truncate(before);
                let len = u64::from(len);
                return Err(MemoryError::Forbidden { addr, len });
            }
            let skip = at - region.guest();
            let here = left.min(region.size() - skip);
            out.push(IoVec::new(
                region.host().wrapping_add(skip as usize),
                here as usize,
            ));
            at += here;
            left -= here;
        }
        Ok(())
    }

    /// Copies `to.len()` bytes out of guest memory at guest address `addr`.
    ///
    /// # Errors
    /// [`MemoryError::Unmapped`], [`MemoryError::Forbidden`]; `to` is then untouched.
    pub fn read(&self, addr: u64, to: &mut [u8]) -> Result<(), MemoryError> {
        let mut pieces = Vec::new();
        let len = u32::try_from(to.len()).map_err(|_| MemoryError::Unmapped {
            addr,
            len: to.len() as u64,
        })?;
        self.segments_for(Access::Read, addr, len, &mut pieces)?;
        let mut done = 0;
        for piece in pieces {
            // SAFETY: resolved in this epoch, which self keeps; the lengths add up to `to`.
            unsafe {
                std::ptr::copy_nonoverlapping(piece.ptr(), to[done..].as_mut_ptr(), piece.len());
            }
            done += piece.len();
        }
        Ok(())
    }

    /// Copies `from` to guest memory at guest address `addr`.
    ///
    /// # Errors
    /// [`MemoryError::Unmapped`], [`MemoryError::Forbidden`]; guest memory is then untouched.
    pub fn write(&self, addr: u64, from: &[u8]) -> Result<(), MemoryError> {
        let mut pieces = Vec::new();
        let len = u32::try_from(from.len()).map_err(|_| MemoryError::Unmapped {
            addr,
            len: from.len() as u64,
        })?;
        self.segments_for(Access::Write, addr, len, &mut pieces)?;
        let mut done = 0;
        for piece in pieces {
            // SAFETY: as above; guest memory is not ours to borrow, so nothing aliases `from`.
            unsafe {
                std::ptr::copy_nonoverlapping(from[done..].as_ptr(), piece.ptr(), piece.len());
            }
            done += piece.len();
        }
        Ok(())
    }
}
