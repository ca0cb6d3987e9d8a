//! From a chain to what is to be done (§5.2.6). A request is parsed once, from copies.

use bluff_block::{BlockError, Geometry, Kind};
use bluff_virtio::Chain;
use zerocopy::{FromBytes, IntoBytes};

use crate::config::RANGES;
use crate::spec::{Header, Range, SECTOR, UNMAP, feature, kind, status};

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// One operation with the data of the chain, from this byte on.
    Data { kind: Kind, offset: u64, len: u64 },
    /// A flush.
    Flush,
    /// The identification.
    Id,
    /// Ranges, which [`ranges`] reads, to be zeroed or discarded.
    Ranges { zeroes: bool },
}

/// A request that is answered at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// With this status.
    Status(u8),
    /// There is no status byte: the chain is given back as it is.
    NoStatus,
}

/// What the device is like for the driver just now.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mode {
    /// What was negotiated.
    pub(crate) features: u64,
    /// Whether completed writes may still be volatile.
    pub(crate) writeback: bool,
    /// Whether the volume has a volatile cache.
    pub(crate) volatile: bool,
}

impl Mode {
    /// Whether writes have to be made durable before they are completed.
    fn fua(&self) -> bool {
        self.volatile && !self.writeback
    }
}

/// Parses the chain's header and cuts header and status off, so that what is left of its pieces is
/// data.
#[inline]
pub(crate) fn parse(chain: &mut Chain, mode: &Mode) -> Result<Request, Refused> {
    // The status is the last byte that the device may write.
    if !chain.take_status() {
        return Err(Refused::NoStatus);
    }
    let mut bytes = [0; size_of::<Header>()];
    if !chain.take_front(&mut bytes) {
        return Err(Refused::Status(status::IOERR));
    }
    let header = Header::read_from_bytes(&bytes).expect("of this size");
    let (sector, refused) = (header.sector.get(), Err(Refused::Status(status::IOERR)));
    match header.kind.get() {
        kind::IN | kind::OUT => {
            let write = header.kind.get() == kind::OUT;
            let (data, other) = match write {
                true => (chain.readable(), chain.writable()),
                false => (chain.writable(), chain.readable()),
            };
            let len = bluff_memory::IoVec::total(data);
            let Some(offset) = sector.checked_mul(SECTOR) else {
                return refused;
            };
            if len == 0 || !other.is_empty() {
                return refused;
            }
            let kind = if write {
                Kind::Write { fua: mode.fua() }
            } else {
                Kind::Read
            };
            Ok(Request::Data { kind, offset, len })
        }
        kind::FLUSH if mode.features & feature::FLUSH != 0 => Ok(Request::Flush),
        kind::GET_ID => Ok(Request::Id),
        kind::DISCARD if mode.features & feature::DISCARD != 0 => {
            Ok(Request::Ranges { zeroes: false })
        }
        kind::WRITE_ZEROES if mode.features & feature::WRITE_ZEROES != 0 => {
            Ok(Request::Ranges { zeroes: true })
        }
        _ => Err(Refused::Status(status::UNSUPP)),
    }
}

/// One range: what to do, first byte, length in bytes.
pub(crate) type RangeOp = (Kind, u64, u64);

/// Reads the ranges of a DISCARD or WRITE_ZEROES; all are right, or none is done.
pub(crate) fn ranges(
    chain: &mut Chain,
    zeroes: bool,
    mode: &Mode,
    g: &Geometry,
    out: &mut Vec<RangeOp>,
) -> Result<(), u8> {
    out.clear();
    let mut bytes = [0; size_of::<Range>()];
    let total = bluff_memory::IoVec::total(chain.readable());
    let count = total / bytes.len() as u64;
    if !total.is_multiple_of(bytes.len() as u64) || count == 0 || count > u64::from(RANGES) {
        return Err(status::IOERR);
    }
    for _ in 0..count {
        assert!(chain.take_front(&mut bytes), "as long as was counted");
        let range = Range::read_from_bytes(&bytes).expect("of this size");
        let unmap = range.flags.get() & UNMAP != 0;
        // Reserved bits, and unmap in a discard, are not supported (§5.2.6.2).
        if range.flags.get() & !UNMAP != 0 || (unmap && !zeroes) {
            return Err(status::UNSUPP);
        }
        let offset = range
            .sector
            .get()
            .checked_mul(SECTOR)
            .ok_or(status::IOERR)?;
        let len = u64::from(range.sectors.get()) * SECTOR;
        let kind = match zeroes {
            true => Kind::WriteZeroes {
                unmap,
                fua: mode.fua(),
            },
            false => Kind::Discard,
        };
        let op = bluff_block::Op {
            tag: bluff_block::Tag(0),
            kind,
            offset,
            len,
            buffers: bluff_block::Buffers::NONE,
        };
        op.check(g).map_err(status_of)?;
        if len > 0 {
            out.push((kind, offset, len));
        }
    }
    Ok(())
}

/// The status byte of an error.
pub(crate) fn status_of(error: BlockError) -> u8 {
    match error {
        BlockError::Unsupported => status::UNSUPP,
        BlockError::Io
        | BlockError::OutOfRange
        | BlockError::Invalid
        | BlockError::ReadOnly
        | BlockError::NoSpace
        | BlockError::Cancelled
        | BlockError::Locked
        | BlockError::Unavailable => status::IOERR,
    }
}

/// The identification of a device with this serial: 20 bytes, zero-padded (§5.2.6).
pub(crate) fn id(serial: &str) -> [u8; crate::spec::ID_LEN] {
    let mut id = [0; crate::spec::ID_LEN];
    let n = serial.len().min(id.len());
    id.as_mut_bytes()[..n].copy_from_slice(&serial.as_bytes()[..n]);
    id
}
