//! From a descriptor chain to what is to be done (virtio 1.3 §5.2.6).
//!
//! A request is a 16-byte header, then data, then a status byte. How these lie in descriptors is the
//! driver's choice (§2.7.4.1), so they are cut out of the readable and the writable bytes by count.

use bluff_block::{BlockError, Kind};
use bluff_memory::IoVec;
use virtio_queue::DescriptorChain;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, Permissions};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use crate::Device;
use crate::spec::{Header, SECTOR, SEGMENT_UNMAP, Segment, Status, request_type};

/// The one place where an error of the volume becomes a status.
pub(crate) fn status(result: Result<(), BlockError>) -> Status {
    match result {
        Ok(()) => Status::Ok,
        Err(BlockError::Unsupported) => Status::Unsupported,
        Err(_) => Status::IoErr,
    }
}

/// What a chain asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// It has no place for a status, or cannot be followed to its end: given back as it is.
    Unanswerable,
    /// It needs no volume, or must not reach it.
    Answered {
        /// Where the status goes.
        status_at: GuestAddress,
        /// The status.
        status: Status,
        /// How many bytes were written into the chain, with the status.
        written: u32,
    },
    /// The volume has to do it; its data buffers are in the list that was given to [`Parser::parse`].
    Volume {
        /// Where the status goes.
        status_at: GuestAddress,
        /// What is to be done.
        kind: Kind,
        /// First byte on the volume.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// How many bytes will be written where it succeeds, with the status.
        written: u32,
    },
}

#[derive(Clone, Copy, Debug)]
struct Piece {
    addr: GuestAddress,
    len: u32,
}

/// Takes chains apart; keeps its lists, so that a request allocates nothing.
#[derive(Debug, Default)]
pub(crate) struct Parser {
    readable: Vec<Piece>,
    writable: Vec<Piece>,
}

impl Parser {
    /// Takes a chain apart. Data buffers are appended to `buffers`.
    pub(crate) fn parse<M: GuestMemory>(
        &mut self,
        chain: DescriptorChain<&M>,
        mem: &M,
        device: &Device,
        buffers: &mut Vec<IoVec>,
    ) -> Request {
        let Some(ordered) = self.collect(chain) else {
            return Request::Unanswerable;
        };
        let Some(status_at) = self.take_status(mem) else {
            return Request::Unanswerable;
        };
        // Device-readable descriptors come first (§2.7.4.2).
        let parsed = if ordered {
            self.decode(mem, device, buffers)
        } else {
            Err(Status::IoErr)
        };
        match parsed {
            Ok(Decoded::Volume {
                kind,
                offset,
                len,
                written,
            }) => Request::Volume {
                status_at,
                kind,
                offset,
                len,
                written: written + 1,
            },
            Ok(Decoded::Done { written }) => Request::Answered {
                status_at,
                status: Status::Ok,
                written: written + 1,
            },
            Err(status) => Request::Answered {
                status_at,
                status,
                written: 1,
            },
        }
    }

    /// Lists the chain's pieces. `None` where it does not end as a chain should; otherwise whether
    /// the readable ones come first.
    fn collect<M: GuestMemory>(&mut self, chain: DescriptorChain<&M>) -> Option<bool> {
        self.readable.clear();
        self.writable.clear();
        // virtio-queue ends a chain silently where it finds something wrong: an index past the
        // table, a loop, a nested or crooked indirect table, memory that is not there. All that
        // tells is that the last descriptor it handed out announces another one.
        let mut unfinished = true;
        let mut ordered = true;
        for descriptor in chain {
            unfinished = descriptor.has_next();
            let piece = Piece {
                addr: descriptor.addr(),
                len: descriptor.len(),
            };
            if descriptor.is_write_only() {
                self.writable.push(piece);
            } else {
                ordered &= self.writable.is_empty();
                self.readable.push(piece);
            }
        }
        (!unfinished).then_some(ordered)
    }

    /// Cuts the last writable byte off.
    fn take_status<M: GuestMemory>(&mut self, mem: &M) -> Option<GuestAddress> {
        while self.writable.last().is_some_and(|p| p.len == 0) {
            self.writable.pop();
        }
        let last = self.writable.last_mut()?;
        last.len -= 1;
        let at = last.addr.checked_add(u64::from(last.len))?;
        mem.check_range(at, 1, Permissions::Write).then_some(at)
    }

    /// Cuts the first bytes off the readable ones, once: the driver may change them at any time.
    fn read<M: GuestMemory, T: FromZeros + FromBytes + IntoBytes + Immutable>(
        &mut self,
        mem: &M,
    ) -> Option<T> {
        let mut value = T::new_zeroed();
        let mut left = value.as_mut_bytes();
        for piece in &mut self.readable {
            let n = left.len().min(piece.len as usize);
            let (now, later) = left.split_at_mut(n);
            mem.read_slice(now, piece.addr).ok()?;
            piece.addr = piece.addr.checked_add(n as u64)?;
            piece.len -= n as u32;
            left = later;
            if left.is_empty() {
                return Some(value);
            }
        }
        None
    }

    fn decode<M: GuestMemory>(
        &mut self,
        mem: &M,
        device: &Device,
        buffers: &mut Vec<IoVec>,
    ) -> Result<Decoded, Status> {
        let header: Header = self.read(mem).ok_or(Status::IoErr)?;
        match header.kind.get() {
            request_type::IN => {
                let len = resolve(mem, &self.writable, Permissions::Write, buffers)?;
                let written = u32::try_from(len).map_err(|_| Status::IoErr)?;
                transfer(Kind::Read, &header, len, written)
            }
            request_type::OUT => {
                let len = resolve(mem, &self.readable, Permissions::Read, buffers)?;
                let fua = device.write_through();
                transfer(Kind::Write { fua }, &header, len, 0)
            }
            request_type::FLUSH => Ok(Decoded::Volume {
                kind: Kind::Flush,
                offset: 0,
                len: 0,
                written: 0,
            }),
            request_type::GET_ID => self.get_id(mem, device),
            kind @ (request_type::DISCARD | request_type::WRITE_ZEROES) => {
                self.segment(mem, device, kind == request_type::DISCARD)
            }
            _ => Err(Status::Unsupported),
        }
    }

    fn get_id<M: GuestMemory>(&self, mem: &M, device: &Device) -> Result<Decoded, Status> {
        let id = device.id();
        let mut written = 0;
        for piece in &self.writable {
            let n = (id.len() - written).min(piece.len as usize);
            mem.write_slice(&id[written..written + n], piece.addr)
                .map_err(|_| Status::IoErr)?;
            written += n;
        }
        Ok(Decoded::Done {
            written: written as u32,
        })
    }

    /// Discard and write zeroes: one segment, as the configuration space says.
    fn segment<M: GuestMemory>(
        &mut self,
        mem: &M,
        device: &Device,
        discard: bool,
    ) -> Result<Decoded, Status> {
        let segment: Segment = self.read(mem).ok_or(Status::IoErr)?;
        if self.readable.iter().any(|p| p.len != 0) {
            return Err(Status::IoErr);
        }
        let flags = segment.flags.get();
        let unmap = flags & SEGMENT_UNMAP != 0;
        // §5.2.6.2: flags that are not known, and a discard with unmap, are not supported.
        if flags & !SEGMENT_UNMAP != 0 || (discard && unmap) {
            return Err(Status::Unsupported);
        }
        let kind = if discard {
            Kind::Discard
        } else {
            Kind::WriteZeroes {
                unmap,
                fua: device.write_through(),
            }
        };
        let offset = segment.sector.get().checked_mul(SECTOR);
        Ok(Decoded::Volume {
            kind,
            offset: offset.ok_or(Status::IoErr)?,
            len: u64::from(segment.num_sectors.get()) * SECTOR,
            written: 0,
        })
    }
}

enum Decoded {
    Volume {
        kind: Kind,
        offset: u64,
        len: u64,
        written: u32,
    },
    Done {
        written: u32,
    },
}

fn transfer(kind: Kind, header: &Header, len: u64, written: u32) -> Result<Decoded, Status> {
    let offset = header.sector.get().checked_mul(SECTOR);
    Ok(Decoded::Volume {
        kind,
        offset: offset.ok_or(Status::IoErr)?,
        len,
        written,
    })
}

/// Appends where `pieces` are in this process; says how many bytes they are.
fn resolve<M: GuestMemory>(
    mem: &M,
    pieces: &[Piece],
    access: Permissions,
    buffers: &mut Vec<IoVec>,
) -> Result<u64, Status> {
    let mut total = 0;
    for piece in pieces {
        let slices = mem.get_slices(piece.addr, piece.len as usize, access);
        for slice in slices.map_err(|_| Status::IoErr)? {
            let slice = slice.map_err(|_| Status::IoErr)?;
            total += slice.len() as u64;
            buffers.push(IoVec::new(slice.ptr_guard_mut().as_ptr(), slice.len()));
        }
    }
    Ok(total)
}
