//! What the device says of itself: regions, areas to map, interrupt types.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use zerocopy::{FromBytes, IntoBytes};

use crate::spec::{self, command, region};
use crate::{Client, Error, Mapped, Reply};

/// More capabilities or areas than a region can sensibly have.
const MAX_LIST: usize = 1024;
/// The largest region info that is asked for.
const MAX_ARGSZ: u32 = 64 << 10;
/// Of a sub-region: an ioeventfd, and one with memory.
const IOEVENTFD: u32 = 0;
const IOEVENTFD_SHADOW: u32 = 2;

/// A device ("VFIO_USER_DEVICE_GET_INFO").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Bits of [`spec::device`].
    pub flags: u32,
    /// How many regions it has.
    pub regions: u32,
    /// How many types of interrupts it has.
    pub irqs: u32,
}

/// What of a region can be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// From the region's beginning.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

/// A region ("VFIO_USER_DEVICE_GET_REGION_INFO").
#[derive(Debug)]
pub struct RegionInfo {
    /// Which.
    pub index: u32,
    /// Bits of [`region`].
    pub flags: u32,
    /// Bytes; zero: there is none.
    pub size: u64,
    /// Where it begins in the file.
    pub offset: u64,
    /// What of it can be mapped; all of it is one area.
    pub areas: Vec<Area>,
    /// What to map.
    pub file: Option<OwnedFd>,
}

/// Interrupts of one type ("VFIO_USER_DEVICE_GET_IRQ_INFO").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqInfo {
    /// Bits of [`spec::irq`].
    pub flags: u32,
    /// How many.
    pub count: u32,
}

/// Writes that can be signalled without a message ("Sub-Region IO FD info format (ioeventfd)").
#[derive(Debug)]
pub struct IoEventFd {
    /// From the region's beginning.
    pub offset: u64,
    /// Bytes of the write; zero: any.
    pub size: u64,
    /// Only writes of this value.
    pub value: Option<u64>,
    /// What is to be signalled; several may share one.
    pub file: Arc<OwnedFd>,
    /// Where the value is to be stored before that; otherwise it is lost.
    pub store: Option<Store>,
}

/// Memory for a value ("shadow ioeventfd" of libvfio-user).
#[derive(Clone, Debug)]
pub struct Store {
    /// To be mapped; several may share one.
    pub file: Arc<OwnedFd>,
    /// Where in it.
    pub offset: u64,
}

impl Client {
    /// Asks for the device's shape.
    ///
    /// # Errors
    /// As any command.
    pub fn device_info(&self) -> Result<DeviceInfo, Error> {
        let raw = spec::Info {
            argsz: 16.into(),
            ..spec::Info::default()
        };
        let reply = self.ask(command::DEVICE_GET_INFO, &[raw.as_bytes()], &[])?;
        let raw = info(&reply)?;
        Ok(DeviceInfo {
            flags: raw.flags.get(),
            regions: raw.first.get(),
            irqs: raw.second.get(),
        })
    }

    /// Asks for an interrupt type.
    ///
    /// # Errors
    /// As any command.
    pub fn irq_info(&self, index: u32) -> Result<IrqInfo, Error> {
        let raw = spec::Info {
            argsz: 16.into(),
            first: index.into(),
            ..spec::Info::default()
        };
        let reply = self.ask(command::DEVICE_GET_IRQ_INFO, &[raw.as_bytes()], &[])?;
        let raw = info(&reply)?;
        if raw.first.get() != index {
            return Err(reply.wrong("it is of another type"));
        }
        Ok(IrqInfo {
            flags: raw.flags.get(),
            count: raw.second.get(),
        })
    }

    /// Asks for a region: as QEMU does, first with room for no capability, then with as much as the server wants.
    ///
    /// # Errors
    /// As any command; a list of capabilities that makes no sense.
    pub fn region_info(&self, index: u32) -> Result<RegionInfo, Error> {
        const FIXED: u32 = size_of::<spec::Region>() as u32;
        let first = self.region_info_within(index, FIXED)?;
        let (raw, _): (spec::Region, _) = first.head()?;
        let argsz = raw.argsz.get();
        if argsz <= FIXED {
            return region_info(first, index);
        }
        if argsz > MAX_ARGSZ {
            return Err(first.wrong("its capabilities are too long"));
        }
        region_info(self.region_info_within(index, argsz)?, index)
    }

    fn region_info_within(&self, index: u32, argsz: u32) -> Result<Reply, Error> {
        let raw = spec::Region {
            argsz: argsz.into(),
            index: index.into(),
            ..spec::Region::default()
        };
        let reply = self.ask(command::DEVICE_GET_REGION_INFO, &[raw.as_bytes()], &[])?;
        if reply.body.len() > argsz as usize {
            return Err(reply.wrong("it is longer than was asked for"));
        }
        Ok(reply)
    }

    /// Asks for descriptors that stand for writes to a region.
    ///
    /// # Errors
    /// As any command; entries that make no sense.
    pub fn io_event_fds(&self, index: u32) -> Result<Vec<IoEventFd>, Error> {
        let raw = spec::IoFds {
            argsz: MAX_ARGSZ.into(),
            index: index.into(),
            ..spec::IoFds::default()
        };
        let reply = self.ask(command::DEVICE_GET_REGION_IO_FDS, &[raw.as_bytes()], &[])?;
        let (raw, rest): (spec::IoFds, _) = reply.head()?;
        let (count, argsz) = (raw.count.get() as usize, raw.argsz.get() as usize);
        if raw.index.get() != index || raw.flags.get() != 0 {
            return Err(reply.wrong("it is of another region, or has flags"));
        }
        if count > MAX_LIST || argsz != reply.body.len() {
            return Err(reply.wrong("argsz is not its length"));
        }
        if count == 0 {
            return Ok(Vec::new());
        }
        // "Each array entry i is at offset i * ((argsz - 32) / count)", which means the header of 16 bytes.
        let stride = rest.len() / count;
        let mut files = Vec::new();
        for file in &reply.files {
            files.push(Arc::new(file.try_clone()?));
        }
        let file = |index: u32| {
            let file = files.get(index as usize).cloned();
            file.ok_or(reply.wrong("an entry has a descriptor that did not come"))
        };
        let entries = (0..count).map(|i| {
            let bytes = rest.get(i * stride..(i + 1) * stride).unwrap_or_default();
            let short = || reply.wrong("an entry is too short");
            let (entry, _) = spec::SubRegion::read_from_prefix(bytes).map_err(|_| short())?;
            let (store, value) = match entry.kind.get() {
                IOEVENTFD => (None, entry.datamatch.get()),
                IOEVENTFD_SHADOW => {
                    let stored = spec::StoredSubRegion::read_from_prefix(bytes);
                    let (stored, _) = stored.map_err(|_| short())?;
                    let store = Store {
                        file: file(stored.memory_index.get())?,
                        offset: stored.memory_offset.get(),
                    };
                    (Some(store), stored.datamatch.get())
                }
                _ => return Err(reply.wrong("an entry is no ioeventfd")),
            };
            Ok(IoEventFd {
                offset: entry.offset.get(),
                size: entry.size.get(),
                value: (entry.flags.get() & 1 != 0).then_some(value),
                file: file(entry.fd_index.get())?,
                store,
            })
        });
        entries.collect()
    }
}

impl RegionInfo {
    /// Maps every area of it that can be mapped.
    ///
    /// # Errors
    /// Where the server's file is shorter than it says, or cannot be mapped.
    pub fn map(&self) -> Result<Vec<(Area, Mapped)>, Error> {
        let Some(file) = &self.file else {
            return Ok(Vec::new());
        };
        let map = |area: &Area| {
            let at = self.offset.checked_add(area.offset);
            let at = at.ok_or(Error::Shared("an offset wraps"))?;
            let writable = self.flags & region::WRITE != 0;
            Ok((*area, Mapped::new(file.as_fd(), at, area.size, writable)?))
        };
        self.areas.iter().map(map).collect()
    }
}

fn info(reply: &Reply) -> Result<spec::Info, Error> {
    reply.no_files()?;
    match reply.head()? {
        (raw, []) => Ok(raw),
        _ => Err(reply.wrong("it is too long")),
    }
}

fn region_info(mut reply: Reply, index: u32) -> Result<RegionInfo, Error> {
    let (raw, _): (spec::Region, _) = reply.head()?;
    let flags = raw.flags.get();
    if raw.index.get() != index {
        return Err(reply.wrong("it is of another region"));
    }
    if raw.argsz.get() as usize != reply.body.len() {
        return Err(reply.wrong("argsz is not its length"));
    }
    let mappable = flags & region::MMAP != 0;
    if reply.files.len() != usize::from(mappable) {
        return Err(reply.wrong("a region that can be mapped has one descriptor, any other none"));
    }
    let size = raw.size.get();
    let mut areas = Vec::new();
    if flags & region::CAPS != 0 {
        sparse_areas(&reply, raw.cap_offset.get(), &mut areas)?;
    }
    let inside = |a: &Area| a.offset.checked_add(a.size).is_some_and(|end| end <= size);
    if !areas.iter().all(inside) {
        return Err(reply.wrong("an area is not inside of the region"));
    }
    if mappable && areas.is_empty() {
        areas.push(Area { offset: 0, size });
    }
    Ok(RegionInfo {
        index,
        flags,
        size,
        offset: raw.offset.get(),
        areas,
        file: reply.files.pop(),
    })
}

fn sparse_areas(reply: &Reply, first: u32, areas: &mut Vec<Area>) -> Result<(), Error> {
    let (mut at, mut last) = (first as usize, 0);
    while at != 0 {
        // Offsets have to grow: so a list that leads back to itself ends.
        if at <= last || at < size_of::<spec::Region>() {
            return Err(reply.wrong("its capabilities do not go forward"));
        }
        last = at;
        let bytes = reply.body.get(at..).unwrap_or_default();
        let short = || reply.wrong("a capability is cut off");
        let (capability, rest) = spec::Capability::read_from_prefix(bytes).map_err(|_| short())?;
        if capability.id.get() == region::CAP_SPARSE {
            let count = capability.areas.get() as usize;
            if count > MAX_LIST || rest.len() < count * size_of::<spec::SparseArea>() {
                return Err(short());
            }
            for raw in rest.chunks_exact(size_of::<spec::SparseArea>()).take(count) {
                let raw = spec::SparseArea::read_from_bytes(raw).expect("a chunk of its size");
                areas.push(Area {
                    offset: raw.offset.get(),
                    size: raw.size.get(),
                });
            }
        }
        at = capability.next.get() as usize;
    }
    Ok(())
}
