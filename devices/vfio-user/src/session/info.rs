//! What the device has: regions, interrupts, event descriptors.

use std::sync::Arc;

use zerocopy::IntoBytes;

use super::{Reply, Session};
use crate::Error;
use crate::capabilities::Agreed;
use crate::spec::{
    self, RawArea, RawDeviceInfo, RawIoEventFd, RawIoFds, RawIrqInfo, RawRegionInfo, RawSparse,
    device,
};
use crate::target::{Region, Target};

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

    /// Descriptors beyond those that the client takes are left out: these writes come as messages.
    pub(super) fn io_fds(
        &mut self,
        agreed: &Agreed,
        index: u32,
        argsz: u32,
    ) -> Result<Reply, Error> {
        self.region(index)?;
        let mut reply = Reply::default();
        let mut list = Vec::new();
        for io in self.target.io_event_fds(index) {
            let known = reply.files.iter().position(|f| Arc::ptr_eq(f, &io.file));
            let fd_index = match known {
                Some(i) => i,
                None if reply.files.len() < agreed.client_fds => {
                    reply.files.push(io.file);
                    reply.files.len() - 1
                }
                None => continue,
            };
            let flags = io.value.map_or(0, |_| spec::IOEVENTFD_DATAMATCH);
            list.push(RawIoEventFd {
                offset: io.offset.into(),
                size: io.size.into(),
                fd_index: (fd_index as u32).into(),
                kind: spec::IO_FD_TYPE_IOEVENTFD.into(),
                flags: flags.into(),
                padding: 0.into(),
                datamatch: io.value.unwrap_or(0).into(),
            });
        }
        let raw = RawIoFds {
            argsz: ((size_of::<RawIoFds>() + list.as_bytes().len()) as u32).into(),
            flags: 0.into(),
            index: index.into(),
            count: (list.len() as u32).into(),
        };
        reply.payload = raw.as_bytes().to_vec();
        if argsz < raw.argsz.get() {
            reply.files.clear();
        } else {
            reply.payload.extend_from_slice(list.as_bytes());
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
