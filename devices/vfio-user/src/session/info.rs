//! What the device has: regions, interrupts, event descriptors.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use zerocopy::IntoBytes;

use super::{Reply, Session};
use crate::Error;
use crate::capabilities::Agreed;
use crate::spec::{
    self, RawArea, RawDeviceInfo, RawIoEventFd, RawIoFds, RawIrqInfo, RawRegionInfo, RawSparse,
    RawStoredIoEventFd, device,
};
use crate::target::{IoEventFd, Region, Target};

impl<T: Target> Session<T> {
    /// The region, if there is one.
    pub(super) fn region(&self, index: u32) -> Result<Region, Error> {
        if index >= self.target.regions() {
            return Err(Error::Value {
                field: "region",
                value: index.into(),
            });
        }
        Ok(self.target.region(index))
    }

    pub(super) fn device_info(&self) -> Reply {
        let raw = RawDeviceInfo {
            argsz: (size_of::<RawDeviceInfo>() as u32).into(),
            flags: (device::PCI | device::RESET).into(),
            num_regions: self.target.regions().into(),
            num_irqs: self.target.irq_types().into(),
        };
        Reply::of(&[raw.as_bytes()])
    }

    pub(super) fn region_info(
        &self,
        agreed: &Agreed,
        index: u32,
        argsz: u32,
    ) -> Result<Reply, Error> {
        let mut region = self.region(index)?;
        if agreed.client_fds == 0 {
            region.map = None;
        }
        let mut flags = 0;
        for (is, bit) in [
            (region.read, spec::region::READ),
            (region.write, spec::region::WRITE),
            (region.map.is_some(), spec::region::MMAP),
        ] {
            flags |= if is { bit } else { 0 };
        }
        let areas = region.map.as_ref().map_or(&[][..], |map| &map.areas);
        let mut capability = Vec::new();
        if !areas.is_empty() {
            let sparse = RawSparse {
                id: spec::region::CAP_SPARSE_MMAP.into(),
                version: 1.into(),
                areas: (areas.len() as u32).into(),
                ..RawSparse::default()
            };
            capability.extend_from_slice(sparse.as_bytes());
            for (offset, size) in areas {
                let area = RawArea {
                    offset: (*offset).into(),
                    size: (*size).into(),
                };
                capability.extend_from_slice(area.as_bytes());
            }
        }
        let head = size_of::<RawRegionInfo>();
        let full = (head + capability.len()) as u32;
        // Without room for it the capability is left out, and the flag too: QEMU refuses a flag without an offset, before it
        // would ask again with the room that `argsz` says.
        let mut cap_offset = 0;
        if argsz < full {
            capability.clear();
        } else if !capability.is_empty() {
            flags |= spec::region::CAPS;
            cap_offset = head as u32;
        }
        let raw = RawRegionInfo {
            argsz: full.into(),
            flags: flags.into(),
            index: index.into(),
            cap_offset: cap_offset.into(),
            size: region.size.into(),
            offset: region.map.as_ref().map_or(0, |map| map.offset).into(),
        };
        let mut reply = Reply::of(&[raw.as_bytes(), &capability]);
        reply.files.extend(region.map.map(|map| map.file));
        Ok(reply)
    }

    /// What needs descriptors beyond those that the client takes is left out: these writes come as messages.
    pub(super) fn io_fds(
        &mut self,
        agreed: &Agreed,
        index: u32,
        argsz: u32,
    ) -> Result<Reply, Error> {
        self.region(index)?;
        let mut files = Vec::new();
        let mut taken = Vec::new();
        for io in self.target.io_event_fds(index) {
            let before = files.len();
            let event = place_of(&mut files, &io.file);
            let memory = io.store.as_ref().map(|s| place_of(&mut files, &s.file));
            if files.len() > agreed.client_fds {
                files.truncate(before);
                continue;
            }
            taken.push((io, event, memory));
        }
        // Entries of both kinds have one length, as the client finds them by it ("each array entry i").
        let stride = match taken.iter().any(|(_, _, memory)| memory.is_some()) {
            true => size_of::<RawStoredIoEventFd>(),
            false => size_of::<RawIoEventFd>(),
        };
        let mut list = Vec::new();
        for (io, event, memory) in &taken {
            list.extend_from_slice(&io_entry(io, *event, *memory));
            list.resize(list.len().next_multiple_of(stride), 0);
        }
        let raw = RawIoFds {
            argsz: ((size_of::<RawIoFds>() + list.len()) as u32).into(),
            flags: 0.into(),
            index: index.into(),
            count: (taken.len() as u32).into(),
        };
        let mut reply = Reply::of(&[raw.as_bytes()]);
        if argsz >= raw.argsz.get() {
            reply.payload.extend_from_slice(&list);
            reply.files = files;
        }
        Ok(reply)
    }

    pub(super) fn irq_info(&self, index: u32) -> Result<Reply, Error> {
        let irqs = self.irqs(index)?;
        let raw = RawIrqInfo {
            argsz: (size_of::<RawIrqInfo>() as u32).into(),
            flags: irqs.flags.into(),
            index: index.into(),
            count: irqs.count.into(),
        };
        Ok(Reply::of(&[raw.as_bytes()]))
    }
}

/// Where a descriptor is in a reply; there once, however often it is named.
fn place_of(files: &mut Vec<Arc<OwnedFd>>, file: &Arc<OwnedFd>) -> u32 {
    let known = files.iter().position(|f| Arc::ptr_eq(f, file));
    let place = known.unwrap_or_else(|| {
        files.push(file.clone());
        files.len() - 1
    });
    place as u32
}

fn io_entry(io: &IoEventFd, event: u32, memory: Option<u32>) -> Vec<u8> {
    let flags = io.value.map_or(0, |_| spec::IOEVENTFD_DATAMATCH);
    let datamatch = io.value.unwrap_or(0);
    let (Some(memory), Some(store)) = (memory, &io.store) else {
        let raw = RawIoEventFd {
            offset: io.offset.into(),
            size: io.size.into(),
            fd_index: event.into(),
            kind: spec::IO_FD_TYPE_IOEVENTFD.into(),
            flags: flags.into(),
            padding: 0.into(),
            datamatch: datamatch.into(),
        };
        return raw.as_bytes().to_vec();
    };
    let raw = RawStoredIoEventFd {
        offset: io.offset.into(),
        size: io.size.into(),
        fd_index: event.into(),
        kind: spec::IO_FD_TYPE_IOEVENTFD_SHADOW.into(),
        flags: flags.into(),
        memory_index: memory.into(),
        memory_offset: store.offset.into(),
        datamatch: datamatch.into(),
    };
    raw.as_bytes().to_vec()
}
