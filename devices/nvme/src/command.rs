//! From a command to what is to be done, and from an error to a status. A command is parsed once, from a copy.

mod ranges;

use bluff_block::BlockError;

use crate::namespace::Namespace;
use crate::spec::nvm::{self, cdw12};
use crate::spec::{Command, Status, io};

pub(crate) use ranges::{CopyPlan, Span, copy, deallocate};

/// Most bytes that a command moves between host and controller, as a power of two: 1 MiB (MDTS, which counts in units of CAP.MPSMIN).
pub(crate) const MDTS_SHIFT: u8 = 20;
/// [`MDTS_SHIFT`] in bytes.
pub(crate) const MAX_TRANSFER: u32 = 1 << MDTS_SHIFT;

/// Limits of Copy (Identify Namespace, NVM 1.1 §4.1.5.1): source ranges, zero's based.
pub(crate) const MSRC_Z: u8 = 127;
/// Limits of Copy: blocks of one source range.
pub(crate) const MSSRL: u16 = 4096;
/// Limits of Copy: blocks of all source ranges.
pub(crate) const MCL: u32 = 32768;

/// What a command asks of a namespace. Offsets and lengths are in bytes, and lie in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// What was completed is durable.
    Flush,
    /// From the volume to the host.
    Read(Span),
    /// From the host to the volume.
    Write {
        /// Where.
        span: Span,
        /// Durable when it is completed.
        fua: bool,
    },
    /// Whether host and volume have the same.
    Compare(Span),
    /// The volume reads as zeroes.
    Zeroes {
        /// Where.
        span: Span,
        /// Durable when it is completed.
        fua: bool,
        /// Storage may be given back.
        deallocate: bool,
    },
    /// Ranges that are not needed any more: so many descriptors, which the host's data has.
    Deallocate(usize),
    /// Hints that we have no use for.
    Hints,
    /// Whether it can be read.
    Verify(Span),
    /// From the volume to the volume: so many descriptors, which the host's data has.
    Copy {
        /// Source ranges.
        count: usize,
        /// First byte of the destination.
        to: u64,
        /// Durable when it is completed.
        fua: bool,
    },
}

/// What no command may have, before its namespace is looked for.
///
/// # Errors
/// The command's status.
#[inline(always)]
pub(crate) fn precheck(command: &Command) -> Result<(), Status> {
    // Fused operations are not offered (Base 2.1 §3.4.2), and of PSDT 11b is reserved (Figure 91).
    if command.flags != 0 && (command.fused() != 0 || command.psdt().is_none()) {
        return Err(Status::INVALID_FIELD);
    }
    Ok(())
}

/// Parses a command for a namespace. `write_through`: the write cache is off (feature 06h), so every write is durable when it is completed.
///
/// # Errors
/// The command's status.
#[inline(always)]
pub(crate) fn parse(
    command: &Command,
    namespace: &Namespace,
    write_through: bool,
) -> Result<Request, Status> {
    let request = match command.opcode {
        io::READ => Request::Read(transfer(command, namespace)?),
        io::WRITE => Request::Write {
            span: transfer(command, namespace)?,
            fua: is_fua(command) || write_through,
        },
        _ => return parse_rare(command, namespace, write_through),
    };
    if matches!(request, Request::Write { .. }) && namespace.shape().read_only {
        return Err(Status::WRITE_PROTECTED);
    }
    Ok(request)
}

#[inline(never)]
fn parse_rare(
    command: &Command,
    namespace: &Namespace,
    write_through: bool,
) -> Result<Request, Status> {
    let fua = is_fua(command) || write_through;
    let request = match command.opcode {
        io::FLUSH => return Ok(Request::Flush),
        io::COMPARE => return Ok(Request::Compare(transfer(command, namespace)?)),
        io::VERIFY => return Ok(Request::Verify(blocks(command, namespace)?)),
        io::WRITE_ZEROES => Request::Zeroes {
            span: blocks(command, namespace)?,
            fua,
            deallocate: command.cdw12.get() & cdw12::DEAC != 0,
        },
        io::DATASET_MANAGEMENT => {
            if command.cdw11.get() & nvm::DEALLOCATE == 0 {
                return Ok(Request::Hints);
            }
            Request::Deallocate((command.cdw10.get() & 0xff) as usize + 1)
        }
        io::COPY => {
            let dword = command.cdw12.get();
            if dword & cdw12::COPY_NOT_OFFERED != 0 {
                return Err(Status::INVALID_FIELD);
            }
            let count = (dword & cdw12::RANGES) as usize + 1;
            if count > usize::from(MSRC_Z) + 1 {
                return Err(Status::SIZE_LIMIT);
            }
            let to = command.slba();
            if to >= namespace.blocks() {
                return Err(Status::LBA_RANGE);
            }
            let to = to << namespace.lba_shift();
            Request::Copy { count, to, fua }
        }
        _ => return Err(Status::INVALID_OPCODE),
    };
    if namespace.shape().read_only {
        return Err(Status::WRITE_PROTECTED);
    }
    Ok(request)
}

fn is_fua(command: &Command) -> bool {
    command.cdw12.get() & cdw12::FUA != 0
}

/// The blocks of a command that moves them to or from the host.
#[inline(always)]
fn transfer(command: &Command, namespace: &Namespace) -> Result<Span, Status> {
    let len = u64::from(command.blocks()) << namespace.lba_shift();
    if len > u64::from(MAX_TRANSFER) {
        return Err(Status::INVALID_FIELD);
    }
    blocks(command, namespace)
}

/// The blocks of a command.
#[inline(always)]
fn blocks(command: &Command, namespace: &Namespace) -> Result<Span, Status> {
    if command.cdw12.get() & cdw12::NOT_OFFERED != 0 {
        return Err(Status::INVALID_FIELD);
    }
    Span::of(command.slba(), u64::from(command.blocks()), namespace)
}

/// The status of an error of storage, in a command that does or does not write. What a host may try again does not say "Do Not Retry".
pub(crate) fn status_of(error: BlockError, write: bool) -> Status {
    match error {
        BlockError::Io if write => Status::WRITE_FAULT,
        BlockError::Io => Status::READ_ERROR,
        BlockError::OutOfRange => Status::LBA_RANGE,
        BlockError::Invalid => Status::INVALID_FIELD,
        BlockError::Unsupported => Status::INVALID_OPCODE,
        BlockError::ReadOnly => Status::WRITE_PROTECTED,
        BlockError::NoSpace => Status::CAPACITY_EXCEEDED,
        BlockError::Cancelled => Status::ABORT_REQUESTED,
        BlockError::Locked => Status::NOT_READY,
        BlockError::Unavailable => Status::PATH_ERROR,
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
