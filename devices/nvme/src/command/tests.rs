//! What no I/O shows.

use bluff_block::BlockError;

use super::status_of;
use crate::spec::Status;

const RETRY: u16 = 1 << 14;

#[test]
fn errors_of_storage() {
    for (error, write, status, retry) in [
        (BlockError::Io, false, Status::READ_ERROR, true),
        (BlockError::Io, true, Status::WRITE_FAULT, true),
        (BlockError::OutOfRange, false, Status::LBA_RANGE, false),
        (BlockError::Invalid, false, Status::INVALID_FIELD, false),
        (BlockError::Unsupported, true, Status::INVALID_OPCODE, false),
        (BlockError::ReadOnly, true, Status::WRITE_PROTECTED, false),
        (BlockError::NoSpace, true, Status::CAPACITY_EXCEEDED, true),
        (BlockError::Cancelled, false, Status::ABORT_REQUESTED, true),
        (BlockError::Locked, false, Status::NOT_READY, true),
        (BlockError::Unavailable, true, Status::PATH_ERROR, true),
    ] {
        let got = status_of(error, write);
        assert_eq!(got, status, "{error}");
        // What may be better the next time does not say "Do Not Retry".
        assert_eq!(got.bits() & RETRY == 0, retry, "{error}");
    }
}
