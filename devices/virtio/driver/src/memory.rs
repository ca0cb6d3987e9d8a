//! Guest memory: memfd regions at guest-physical addresses, and windows on them.
//!
//! Access is through raw pointers, since a device (another thread, another process) uses the same bytes at the same
//! time; no Rust reference to guest memory ever exists. Each access is an atomic of its natural width: a race with a
//! hostile writer is then a wrong value and not undefined behaviour.
#![allow(unsafe_code)] // maps memory and hands out bounds-checked access to it

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::{io, ptr};

/// Where one region of guest memory lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionConfig {
    /// Guest-physical address of its first byte; a multiple of the page size.
    pub guest_addr: u64,
    /// Bytes; a multiple of the page size.
    pub size: u64,
    /// Offset of the region in its file, a multiple of the page size: what vhost-user calls the mmap offset.
    pub file_offset: u64,
}

/// Why memory could not be made or reached.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The kernel refused the file or the mapping.
    #[error("cannot map guest memory")]
    Map(#[source] io::Error),
    /// A region is empty, is not made of whole pages, wraps the address space or overlaps another.
    #[error("bad region at {0:#x}")]
    BadRegion(u64),
    /// No region, or no single one where that is needed, holds the whole range.
    #[error("no guest memory at {addr:#x}, {len:#x} bytes")]
    OutOfBounds {
        /// Guest-physical address.
        addr: u64,
        /// Bytes asked for.
        len: u64,
    },
    /// The allocator has no room left.
    #[error("no room for {0:#x} bytes of guest memory")]
    Exhausted(u64),
}

/// One mapped region, as SET_MEM_TABLE describes it.
#[derive(Debug)]
pub struct Region {
    config: RegionConfig,
    file: File,
    reservation: *mut u8,
    reservation_len: usize,
    host: *mut u8,
    /// Bytes given out by the allocator.
    allocated: AtomicU64,
}

// SAFETY: the pointers name a mapping that lives as long as the region; every access through them is atomic.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    fn map(config: RegionConfig) -> Result<Self, MemoryError> {
        // SAFETY: no pointer is involved.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64;
        let RegionConfig {
            guest_addr,
            size,
            file_offset,
        } = config;
        let whole_pages = (guest_addr | size | file_offset) % page == 0;
        let fits = guest_addr.checked_add(size).is_some()
            && file_offset.checked_add(size).is_some_and(|e| e < 1 << 62);
        if size == 0 || !whole_pages || !fits {
            return Err(MemoryError::BadRegion(guest_addr));
        }
        // SAFETY: the name is a C string.
        let fd = unsafe {
            libc::memfd_create(
                c"guest".as_ptr(),
                libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
            )
        };
        if fd < 0 {
            return Err(MemoryError::Map(io::Error::last_os_error()));
        }
        // SAFETY: the descriptor is fresh and owned by no one else.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(file_offset + size).map_err(MemoryError::Map)?;

        // A guard page on each side: regions that adjoin in guest-physical space never adjoin here, so that code which
        // walks off the end of one faults instead of landing in the next.
        let reservation_len = (size + 2 * page) as usize;
        // SAFETY: a fresh reservation at an address of the kernel's choice.
        let reservation = unsafe {
            libc::mmap(
                ptr::null_mut(),
                reservation_len,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if reservation == libc::MAP_FAILED {
            return Err(MemoryError::Map(io::Error::last_os_error()));
        }
        let reservation = reservation.cast::<u8>();
        // SAFETY: MAP_FIXED replaces pages inside the reservation just made, which nothing else knows of.
        let host = unsafe {
            libc::mmap(
                reservation.add(page as usize).cast(),
                size as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED,
                fd,
                file_offset as libc::off_t,
            )
        };
        if host == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            // SAFETY: unmaps what was reserved above.
            unsafe { libc::munmap(reservation.cast(), reservation_len) };
            return Err(MemoryError::Map(error));
        }
        Ok(Self {
            config,
            file,
            reservation,
            reservation_len,
            host: host.cast(),
            allocated: AtomicU64::new(0),
        })
    }

    /// Guest address, size and file offset.
    pub fn config(&self) -> RegionConfig {
        self.config
    }

    /// Address of the region in this process: what vhost-user calls the user address.
    pub fn user_addr(&self) -> u64 {
        self.host as u64
    }

    /// Offset of `addr` in the region, when all `len` bytes are inside.
    #[inline]
    fn offset(&self, addr: u64, len: u64) -> Option<usize> {
        let offset = addr.checked_sub(self.config.guest_addr)?;
        (offset.checked_add(len)? <= self.config.size).then_some(offset as usize)
    }
}

/// The file to send with SET_MEM_TABLE or ADD_MEM_REG.
impl AsFd for Region {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `map` reserved; each `Span` holds the memory alive.
        unsafe { libc::munmap(self.reservation.cast(), self.reservation_len) };
    }
}

/// The memory of a "guest": shared, and safe to scribble on from any thread.
#[derive(Debug)]
pub struct Memory {
    /// Sorted by guest address.
    regions: Box<[Region]>,
}

impl Memory {
    /// Maps one memfd per region. Regions may adjoin in guest-physical space; in this process they never do.
    pub fn new(regions: &[RegionConfig]) -> Result<Arc<Self>, MemoryError> {
        let mut mapped = regions
            .iter()
            .copied()
            .map(Region::map)
            .collect::<Result<Vec<_>, _>>()?;
        mapped.sort_by_key(|region| region.config.guest_addr);
        for pair in mapped.windows(2) {
            if pair[0].config.guest_addr + pair[0].config.size > pair[1].config.guest_addr {
                return Err(MemoryError::BadRegion(pair[1].config.guest_addr));
            }
        }
        Ok(Arc::new(Self {
            regions: mapped.into(),
        }))
    }

    /// One region of `size` bytes at guest address `guest_addr`.
    pub fn flat(guest_addr: u64, size: u64) -> Result<Arc<Self>, MemoryError> {
        Self::new(&[RegionConfig {
            guest_addr,
            size,
            file_offset: 0,
        }])
    }

    /// The regions by guest address.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Makes every page present, so that a benchmark does not measure page faults.
    pub fn populate(&self) {
        for region in &self.regions {
            for offset in (0..region.config.size as usize).step_by(4096) {
                // SAFETY: the offset is below the region's size.
                unsafe { AtomicU8::from_ptr(region.host.add(offset)) }
                    .fetch_or(0, Ordering::Relaxed);
            }
        }
    }

    /// Gives out `len` bytes aligned to `align` (a power of two) from the first region that has room, and returns the
    /// guest address. Nothing is ever given back.
    pub fn alloc(&self, len: u64, align: u64) -> Result<u64, MemoryError> {
        (0..self.regions.len())
            .find_map(|region| self.alloc_in(region, len, align).ok())
            .ok_or(MemoryError::Exhausted(len))
    }

    /// As [`Memory::alloc`], from the region of that index only.
    pub fn alloc_in(&self, region: usize, len: u64, align: u64) -> Result<u64, MemoryError> {
        assert!(align.is_power_of_two(), "alignment is a power of two");
        let region = &self.regions[region];
        let base = region.config.guest_addr;
        let place = |used: u64| {
            let start = (base + used).checked_next_multiple_of(align)? - base;
            Some((
                start,
                start
                    .checked_add(len)
                    .filter(|end| *end <= region.config.size)?,
            ))
        };
        // Relaxed: the counter hands out disjoint ranges and publishes nothing.
        region
            .allocated
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                Some(place(used)?.1)
            })
            .ok()
            .and_then(place)
            .map(|(start, _)| base + start)
            .ok_or(MemoryError::Exhausted(len))
    }

    /// Address in this process of a guest address: the form that SET_VRING_ADDR wants.
    pub fn user_addr(&self, addr: u64) -> Result<u64, MemoryError> {
        let (host, _) = self.host(addr, 1)?;
        Ok(host as u64)
    }

    /// A window on `len` bytes that lie in one region.
    pub fn span(self: &Arc<Self>, addr: u64, len: u64) -> Result<Span, MemoryError> {
        let (host, contiguous) = self.host(addr, len.max(1))?;
        if contiguous < len {
            return Err(MemoryError::OutOfBounds { addr, len });
        }
        Ok(Span {
            host,
            len: len as usize,
            _memory: self.clone(),
        })
    }

    /// Reads bytes at a guest address; the range may cross regions that adjoin.
    pub fn read(&self, addr: u64, bytes: &mut [u8]) -> Result<(), MemoryError> {
        let mut done = 0;
        self.pieces(addr, bytes.len() as u64, |host, len| {
            load_bytes(host, &mut bytes[done..done + len]);
            done += len;
        })
    }

    /// Writes bytes at a guest address; the range may cross regions that adjoin.
    pub fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let mut done = 0;
        self.pieces(addr, bytes.len() as u64, |host, len| {
            store_bytes(host, &bytes[done..done + len]);
            done += len;
        })
    }

    /// Host address of `addr`, and how many bytes lie there in one piece; at least one.
    fn host(&self, addr: u64, len: u64) -> Result<(*mut u8, u64), MemoryError> {
        let index = self
            .regions
            .partition_point(|region| region.config.guest_addr <= addr);
        let found = index.checked_sub(1).map(|index| &self.regions[index]);
        let (region, offset) = found
            .and_then(|region| Some((region, region.offset(addr, 1)?)))
            .ok_or(MemoryError::OutOfBounds { addr, len })?;
        // SAFETY: the offset is below the region's size.
        Ok((
            unsafe { region.host.add(offset) },
            region.config.size - offset as u64,
        ))
    }

    /// Calls `f` with each contiguous piece of a range; checks the whole range first.
    fn pieces(
        &self,
        addr: u64,
        len: u64,
        mut f: impl FnMut(*mut u8, usize),
    ) -> Result<(), MemoryError> {
        let out_of_bounds = || MemoryError::OutOfBounds { addr, len };
        let end = addr.checked_add(len).ok_or_else(out_of_bounds)?;
        let walk = |f: &mut dyn FnMut(*mut u8, usize)| {
            let mut at = addr;
            while at < end {
                let (host, contiguous) = self.host(at, end - at).map_err(|_| out_of_bounds())?;
                let piece = contiguous.min(end - at);
                f(host, piece as usize);
                at += piece;
            }
            Ok(())
        };
        walk(&mut |_, _| {})?;
        walk(&mut f)
    }
}

macro_rules! raw_access {
    ($($read:ident, $write:ident, $type:ty, $atomic:ty;)*) => {
        impl Memory {
            $(
                /// Reads a little-endian value at a guest address: in one access where it is aligned.
                pub fn $read(&self, addr: u64) -> Result<$type, MemoryError> {
                    const LEN: usize = size_of::<$type>();
                    let (host, contiguous) = self.host(addr, LEN as u64)?;
                    if contiguous >= LEN as u64 && host.addr().is_multiple_of(LEN) {
                        // SAFETY: in bounds, aligned, and only ever accessed atomically.
                        let atomic = unsafe { <$atomic>::from_ptr(host.cast()) };
                        return Ok(<$type>::from_le(atomic.load(Ordering::Relaxed)));
                    }
                    let mut bytes = [0; LEN];
                    self.read(addr, &mut bytes)?;
                    Ok(<$type>::from_le_bytes(bytes))
                }

                /// Writes a little-endian value at a guest address: in one access where it is aligned.
                pub fn $write(&self, addr: u64, value: $type) -> Result<(), MemoryError> {
                    const LEN: usize = size_of::<$type>();
                    let (host, contiguous) = self.host(addr, LEN as u64)?;
                    if contiguous >= LEN as u64 && host.addr().is_multiple_of(LEN) {
                        // SAFETY: in bounds, aligned, and only ever accessed atomically.
                        let atomic = unsafe { <$atomic>::from_ptr(host.cast()) };
                        atomic.store(value.to_le(), Ordering::Relaxed);
                        return Ok(());
                    }
                    self.write(addr, &value.to_le_bytes())
                }
            )*
        }
    };
}

raw_access! {
    read_u8, write_u8, u8, AtomicU8;
    read_u16, write_u16, u16, AtomicU16;
    read_u32, write_u32, u32, AtomicU32;
    read_u64, write_u64, u64, AtomicU64;
}

/// Copies out of guest memory: words where both sides allow it, bytes at the edges.
fn load_bytes(host: *mut u8, bytes: &mut [u8]) {
    let edge = host.align_offset(8).min(bytes.len());
    let (head, rest) = bytes.split_at_mut(edge);
    let words = rest.len() / 8;
    let (body, tail) = rest.split_at_mut(words * 8);
    // SAFETY: the caller checked that `bytes.len()` bytes lie at `host`; `body` starts at an aligned address.
    unsafe {
        for (i, byte) in head.iter_mut().enumerate() {
            *byte = AtomicU8::from_ptr(host.add(i)).load(Ordering::Relaxed);
        }
        for (i, word) in body.chunks_exact_mut(8).enumerate() {
            let value = AtomicU64::from_ptr(host.add(edge + i * 8).cast()).load(Ordering::Relaxed);
            word.copy_from_slice(&value.to_ne_bytes());
        }
        for (i, byte) in tail.iter_mut().enumerate() {
            *byte = AtomicU8::from_ptr(host.add(edge + words * 8 + i)).load(Ordering::Relaxed);
        }
    }
}

/// Copies into guest memory: the reverse of `load_bytes`.
fn store_bytes(host: *mut u8, bytes: &[u8]) {
    let edge = host.align_offset(8).min(bytes.len());
    let (head, rest) = bytes.split_at(edge);
    let words = rest.len() / 8;
    let (body, tail) = rest.split_at(words * 8);
    // SAFETY: as in `load_bytes`.
    unsafe {
        for (i, byte) in head.iter().enumerate() {
            AtomicU8::from_ptr(host.add(i)).store(*byte, Ordering::Relaxed);
        }
        for (i, word) in body.chunks_exact(8).enumerate() {
            let value = u64::from_ne_bytes(word.try_into().expect("a chunk of eight"));
            AtomicU64::from_ptr(host.add(edge + i * 8).cast()).store(value, Ordering::Relaxed);
        }
        for (i, byte) in tail.iter().enumerate() {
            AtomicU8::from_ptr(host.add(edge + words * 8 + i)).store(*byte, Ordering::Relaxed);
        }
    }
}

/// A window on guest memory that lies in one piece: every offset is checked, every access is one atomic of its width.
///
/// An offset past the end or not aligned is a bug of the caller, never something that a device can cause: it panics.
#[derive(Debug, Clone)]
pub struct Span {
    host: *mut u8,
    len: usize,
    _memory: Arc<Memory>,
}

// SAFETY: the pointer names memory that `_memory` keeps mapped; every access is atomic.
unsafe impl Send for Span {}
// SAFETY: as above.
unsafe impl Sync for Span {}

macro_rules! span_access {
    ($($load:ident, $store:ident, $read:ident, $write:ident, $type:ty, $atomic:ty;)*) => {
        impl Span {
            $(
                /// Loads a little-endian word that both sides touch without a handshake.
                #[inline(always)]
                pub fn $load(&self, offset: usize, order: Ordering) -> $type {
                    let at = self.at(offset, size_of::<$type>());
                    // SAFETY: `at` checked bounds and alignment; the memory is only ever accessed atomically.
                    <$type>::from_le(unsafe { <$atomic>::from_ptr(at.cast()) }.load(order))
                }

                /// Stores a little-endian word that both sides touch without a handshake.
                #[inline(always)]
                pub fn $store(&self, offset: usize, value: $type, order: Ordering) {
                    let at = self.at(offset, size_of::<$type>());
                    // SAFETY: as above.
                    unsafe { <$atomic>::from_ptr(at.cast()) }.store(value.to_le(), order);
                }

                /// Reads little-endian data that a handshake protects.
                #[inline(always)]
                pub fn $read(&self, offset: usize) -> $type {
                    self.$load(offset, Ordering::Relaxed)
                }

                /// Writes little-endian data that a handshake protects.
                #[inline(always)]
                pub fn $write(&self, offset: usize, value: $type) {
                    self.$store(offset, value, Ordering::Relaxed);
                }
            )*
        }
    };
}

span_access! {
    load_u8, store_u8, read_u8, write_u8, u8, AtomicU8;
    load_u16, store_u16, read_u16, write_u16, u16, AtomicU16;
    load_u32, store_u32, read_u32, write_u32, u32, AtomicU32;
    load_u64, store_u64, read_u64, write_u64, u64, AtomicU64;
}

impl Span {
    /// Bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the window holds no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Zeroes all of it.
    pub fn zero(&self) {
        for offset in 0..self.len {
            self.write_u8(offset, 0);
        }
    }

    /// Reads two little-endian words side by side, with one check: the halves of a descriptor or a request header.
    #[inline(always)]
    pub fn read_u64_pair(&self, offset: usize) -> (u64, u64) {
        let at = self.at_pair(offset, 8);
        // SAFETY: `at_pair` checked both.
        let word = |at: *mut u8| unsafe { AtomicU64::from_ptr(at.cast()) }.load(Ordering::Relaxed);
        (
            u64::from_le(word(at)),
            u64::from_le(word(at.wrapping_add(8))),
        )
    }

    /// Writes two little-endian words side by side, with one check.
    #[inline(always)]
    pub fn write_u64_pair(&self, offset: usize, first: u64, second: u64) {
        let at = self.at_pair(offset, 8);
        // SAFETY: `at_pair` checked both.
        unsafe {
            AtomicU64::from_ptr(at.cast()).store(first.to_le(), Ordering::Relaxed);
            AtomicU64::from_ptr(at.add(8).cast()).store(second.to_le(), Ordering::Relaxed);
        }
    }

    /// Reads two little-endian words side by side, with one check: a used entry.
    #[inline(always)]
    pub fn read_u32_pair(&self, offset: usize) -> (u32, u32) {
        let at = self.at_pair(offset, 4);
        // SAFETY: `at_pair` checked both.
        let word = |at: *mut u8| unsafe { AtomicU32::from_ptr(at.cast()) }.load(Ordering::Relaxed);
        (
            u32::from_le(word(at)),
            u32::from_le(word(at.wrapping_add(4))),
        )
    }

    /// Writes two little-endian words side by side, with one check.
    #[inline(always)]
    pub fn write_u32_pair(&self, offset: usize, first: u32, second: u32) {
        let at = self.at_pair(offset, 4);
        // SAFETY: `at_pair` checked both.
        unsafe {
            AtomicU32::from_ptr(at.cast()).store(first.to_le(), Ordering::Relaxed);
            AtomicU32::from_ptr(at.add(4).cast()).store(second.to_le(), Ordering::Relaxed);
        }
    }

    /// Two values of that width, side by side, aligned as one of them.
    #[inline(always)]
    fn at_pair(&self, offset: usize, width: usize) -> *mut u8 {
        assert!(
            offset < self.len && 2 * width <= self.len - offset,
            "offset is inside the span"
        );
        // SAFETY: just checked to be inside.
        let at = unsafe { self.host.add(offset) };
        assert!(at.addr() & (width - 1) == 0, "offset is aligned");
        at
    }

    #[inline(always)]
    fn at(&self, offset: usize, width: usize) -> *mut u8 {
        assert!(
            offset < self.len && width <= self.len - offset,
            "offset is inside the span"
        );
        // SAFETY: just checked to be inside.
        let at = unsafe { self.host.add(offset) };
        assert!(at.addr() & (width - 1) == 0, "offset is aligned");
        at
    }
}

/// Orders this side's accesses as a C11 fence.
#[inline(always)]
pub(crate) fn fence(order: Ordering) {
    std::sync::atomic::fence(order);
}
