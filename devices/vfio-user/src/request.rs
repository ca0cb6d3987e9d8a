//! From a command's bytes to a request whose fields are checked.
//!
//! After [`Request::parse`] there are no raw bytes: lengths fit, flags are known and go together, and each request has the
//! descriptors that it takes. What depends on the function or on what came before is checked by the
//! [session](crate::Session).

use std::os::fd::OwnedFd;

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::framing::Message;
use crate::spec::{
    self, RawDeviceInfo, RawDmaMap, RawDmaUnmap, RawIoFds, RawIrqInfo, RawIrqSet, RawRegionAccess,
    RawRegionInfo, RawVersion, RawWrite, command, irq,
};
use crate::target::IrqAction;
use crate::{Error, Mapping};

/// How many writes a `REGION_WRITE_MULTI` may have. QEMU sends 200 at most.
pub const MAX_WRITES: u64 = 1024;

/// What a `DEVICE_SET_IRQS` brings along.
#[derive(Debug)]
pub enum IrqData {
    /// Nothing: it is for all of the range.
    None,
    /// Which of the range.
    Which(Vec<bool>),
    /// Descriptors, as many as the range has interrupts; or none, to drop those that were there.
    Files(Vec<OwnedFd>),
}

/// A write of up to eight bytes.
#[derive(Clone, Copy, Debug)]
pub struct SmallWrite {
    /// Which region.
    pub region: u32,
    /// Offset in it.
    pub offset: u64,
    /// Bytes, 1 to 8.
    pub len: usize,
    /// The bytes.
    pub data: [u8; 8],
}

/// A request of the client (vfio-user, "Commands").
#[derive(Debug)]
#[allow(missing_docs)] // The names and fields are the protocol's.
pub enum Request {
    Version {
        major: u16,
        data: Vec<u8>,
    },
    DmaMap {
        mapping: Mapping,
        file: Option<OwnedFd>,
    },
    DmaUnmap {
        /// As it came, for the reply.
        raw: RawDmaUnmap,
        all: bool,
        address: u64,
        size: u64,
    },
    DeviceInfo,
    RegionInfo {
        index: u32,
        argsz: u32,
    },
    IoFds {
        index: u32,
        argsz: u32,
    },
    IrqInfo {
        index: u32,
    },
    SetIrqs {
        index: u32,
        start: u32,
        count: u32,
        action: IrqAction,
        data: IrqData,
    },
    RegionRead {
        region: u32,
        offset: u64,
        count: u32,
    },
    RegionWrite {
        region: u32,
        offset: u64,
        data: Vec<u8>,
    },
    Reset,
    WriteMulti(Vec<SmallWrite>),
}

/// A command on its way to a request.
struct Parser {
    command: u16,
    payload: Vec<u8>,
    files: Vec<OwnedFd>,
}

impl Request {
    /// Parses a command. Descriptors of one that is refused are closed.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(message: Message) -> Result<Self, Error> {
        let command = message.header.command;
        // First of all: whoever asks for what is not there is told just that.
        let known = command::VERSION..=command::REGION_WRITE_MULTI;
        let others = [command::DMA_READ, command::DMA_WRITE, command::DIRTY_PAGES];
        if !known.contains(&command) || others.contains(&command) {
            return Err(Error::Unsupported(command));
        }
        if message.truncated {
            return Err(Error::Files {
                command,
                files: message.files.len() + 1,
            });
        }
        let parser = Parser {
            command,
            payload: message.payload,
            files: message.files,
        };
        match command {
            command::DMA_MAP => return parser.dma_map(),
            command::DEVICE_SET_IRQS => return parser.set_irqs(),
            _ => {}
        }
        if !parser.files.is_empty() {
            return Err(parser.bad_files());
        }
        match command {
            command::VERSION => parser.version(),
            command::DMA_UNMAP => parser.dma_unmap(),
            command::DEVICE_GET_INFO => {
                let raw: RawDeviceInfo = parser.head()?;
                argsz::<RawDeviceInfo>(raw.argsz.get())?;
                Ok(Self::DeviceInfo)
            }
            command::DEVICE_GET_REGION_INFO => {
                let raw: RawRegionInfo = parser.head()?;
                Ok(Self::RegionInfo {
                    index: raw.index.get(),
                    argsz: argsz::<RawRegionInfo>(raw.argsz.get())?,
                })
            }
            command::DEVICE_GET_REGION_IO_FDS => parser.io_fds(),
            command::DEVICE_GET_IRQ_INFO => {
                let raw: RawIrqInfo = parser.head()?;
                argsz::<RawIrqInfo>(raw.argsz.get())?;
                Ok(Self::IrqInfo {
                    index: raw.index.get(),
                })
            }
            command::REGION_READ => {
                let raw: RawRegionAccess = parser.body()?;
                Ok(Self::RegionRead {
                    region: raw.region.get(),
                    offset: raw.offset.get(),
                    count: raw.count.get(),
                })
            }
            command::REGION_WRITE => parser.region_write(),
            command::REGION_WRITE_MULTI => parser.write_multi(),
            command::DEVICE_RESET if parser.payload.is_empty() => Ok(Self::Reset),
            _ => Err(parser.bad_length()),
        }
    }
}

fn value(field: &'static str, value: impl Into<u64>) -> Error {
    Error::Value {
        field,
        value: value.into(),
    }
}

/// The room that the client has for a reply, at least that for `T` (vfio-user, "Message sizes").
fn argsz<T>(argsz: u32) -> Result<u32, Error> {
    if (argsz as usize) < size_of::<T>() {
        return Err(value("argsz", argsz));
    }
    Ok(argsz)
}

impl Parser {
    fn bad_length(&self) -> Error {
        Error::Length {
            command: self.command,
            len: self.payload.len(),
        }
    }

    fn bad_files(&self) -> Error {
        Error::Files {
            command: self.command,
            files: self.files.len(),
        }
    }

    /// A payload of just this.
    fn body<T: FromBytes + KnownLayout + Immutable + Unaligned>(&self) -> Result<T, Error> {
        T::read_from_bytes(&self.payload).map_err(|_| self.bad_length())
    }

    /// A payload that begins with this. Clients send the whole buffer that they want the reply in.
    fn head<T: FromBytes + KnownLayout + Immutable + Unaligned>(&self) -> Result<T, Error> {
        let (head, _) = T::read_from_prefix(&self.payload).map_err(|_| self.bad_length())?;
        Ok(head)
    }

    fn version(mut self) -> Result<Request, Error> {
        let raw: RawVersion = self.head()?;
        Ok(Request::Version {
            major: raw.major.get(),
            data: self.payload.split_off(size_of::<RawVersion>()),
        })
    }

    fn dma_map(mut self) -> Result<Request, Error> {
        let raw: RawDmaMap = self.body()?;
        argsz::<RawDmaMap>(raw.argsz.get())?;
        let flags = raw.flags.get();
        let known = spec::dma_map::READ | spec::dma_map::WRITE;
        if flags == 0 || flags & !known != 0 {
            return Err(value("DMA_MAP flags", flags));
        }
        if self.files.len() > 1 {
            return Err(self.bad_files());
        }
        let file = self.files.pop();
        Ok(Request::DmaMap {
            mapping: Mapping {
                address: raw.address.get(),
                size: raw.size.get(),
                offset: raw.offset.get(),
                read: flags & spec::dma_map::READ != 0,
                write: flags & spec::dma_map::WRITE != 0,
                file: file.is_some(),
            },
            file,
        })
    }

    fn dma_unmap(&self) -> Result<Request, Error> {
        let raw: RawDmaUnmap = self.head()?;
        let flags = raw.flags.get();
        if flags & spec::dma_unmap::GET_DIRTY_BITMAP != 0 {
            // Which writes were made is not recorded.
            return Err(Error::Unsupported(self.command));
        }
        let raw: RawDmaUnmap = self.body()?;
        argsz::<RawDmaUnmap>(raw.argsz.get())?;
        let (address, size) = (raw.address.get(), raw.size.get());
        let all = flags == spec::dma_unmap::ALL;
        if flags != 0 && !all {
            return Err(value("DMA_UNMAP flags", flags));
        }
        if all && (address | size) != 0 {
            return Err(Error::Range { address, size });
        }
        Ok(Request::DmaUnmap {
            raw,
            all,
            address,
            size,
        })
    }

    fn io_fds(&self) -> Result<Request, Error> {
        let raw: RawIoFds = self.head()?;
        let (flags, count) = (raw.flags.get(), raw.count.get());
        if flags != 0 || count != 0 {
            return Err(value("flags and count", flags | count));
        }
        Ok(Request::IoFds {
            index: raw.index.get(),
            argsz: argsz::<RawIoFds>(raw.argsz.get())?,
        })
    }

    fn set_irqs(mut self) -> Result<Request, Error> {
        let raw: RawIrqSet = self.head()?;
        argsz::<RawIrqSet>(raw.argsz.get())?;
        let flags = raw.flags.get();
        let count = raw.count.get();
        let action = match flags & !(irq::DATA_NONE | irq::DATA_BOOL | irq::DATA_EVENTFD) {
            irq::ACTION_MASK => IrqAction::Mask,
            irq::ACTION_UNMASK => IrqAction::Unmask,
            irq::ACTION_TRIGGER => IrqAction::Trigger,
            _ => return Err(value("SET_IRQS action", flags)),
        };
        let kind = flags & (irq::DATA_NONE | irq::DATA_BOOL | irq::DATA_EVENTFD);
        let more = &self.payload[size_of::<RawIrqSet>()..];
        let bytes = if kind == irq::DATA_BOOL { count } else { 0 };
        if more.len() != bytes as usize {
            return Err(self.bad_length());
        }
        let data = match kind {
            irq::DATA_NONE => IrqData::None,
            irq::DATA_BOOL => IrqData::Which(more.iter().map(|b| *b != 0).collect()),
            irq::DATA_EVENTFD => IrqData::Files(std::mem::take(&mut self.files)),
            _ => return Err(value("SET_IRQS data", flags)),
        };
        if let IrqData::Files(files) = &data {
            if !files.is_empty() && files.len() != count as usize {
                let files = files.len();
                let command = self.command;
                return Err(Error::Files { command, files });
            }
        } else if !self.files.is_empty() {
            return Err(self.bad_files());
        }
        Ok(Request::SetIrqs {
            index: raw.index.get(),
            start: raw.start.get(),
            count,
            action,
            data,
        })
    }

    fn region_write(mut self) -> Result<Request, Error> {
        let raw: RawRegionAccess = self.head()?;
        let data = self.payload.len() - size_of::<RawRegionAccess>();
        if data != raw.count.get() as usize {
            return Err(self.bad_length());
        }
        Ok(Request::RegionWrite {
            region: raw.region.get(),
            offset: raw.offset.get(),
            data: self.payload.split_off(size_of::<RawRegionAccess>()),
        })
    }

    fn write_multi(&self) -> Result<Request, Error> {
        let count: zerocopy::native_endian::U64 = self.head()?;
        let count = count.get();
        if count > MAX_WRITES {
            return Err(Error::TooMuch(
                count.saturating_mul(size_of::<RawWrite>() as u64),
            ));
        }
        let writes = <[RawWrite]>::ref_from_bytes(&self.payload[8..])
            .ok()
            .filter(|writes| writes.len() as u64 == count)
            .ok_or_else(|| self.bad_length())?;
        let parsed = writes.iter().map(|raw| {
            let count = raw.access.count.get();
            if !(1..=8).contains(&count) {
                return Err(value("bytes of a write", count));
            }
            Ok(SmallWrite {
                region: raw.access.region.get(),
                offset: raw.access.offset.get(),
                len: count as usize,
                data: raw.data,
            })
        });
        Ok(Request::WriteMulti(parsed.collect::<Result<_, _>>()?))
    }
}
