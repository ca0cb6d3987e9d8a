//! Status codes (Base 2.1 §4.2.3; NVM Command Set 1.1 §3.2).

use std::fmt;

/// Status of a command: 15 bits, as they stand in a completion above the phase tag.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Status(u16);

const GENERIC: u16 = 0;
const SPECIFIC: u16 = 1 << 8;
const MEDIA: u16 = 2 << 8;
const PATH: u16 = 3 << 8;
const MORE: u16 = 1 << 13;
const DNR: u16 = 1 << 14;

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = $value:expr;)*) => {
        impl Status {
            $($(#[$doc])* pub const $name: Self = Self($value);)*

            fn name(self) -> Option<&'static str> {
                $(if self.code() == Self::$name.code() { return Some(stringify!($name)); })*
                None
            }
        }
    };
}

// What will be no better for trying again says so (Do Not Retry, Base 2.1 Figure 98).
statuses! {
    /// Successful Completion.
    SUCCESS = GENERIC;
    /// Invalid Command Opcode.
    INVALID_OPCODE = DNR | GENERIC | 0x01;
    /// Invalid Field in Command.
    INVALID_FIELD = DNR | GENERIC | 0x02;
    /// Command ID Conflict.
    CID_CONFLICT = DNR | GENERIC | 0x03;
    /// Data Transfer Error.
    DATA_TRANSFER_ERROR = GENERIC | 0x04;
    /// Internal Error.
    INTERNAL_ERROR = GENERIC | 0x06;
    /// Command Abort Requested.
    ABORT_REQUESTED = GENERIC | 0x07;
    /// Command Aborted due to SQ Deletion.
    ABORTED_SQ_DELETION = GENERIC | 0x08;
    /// Command Aborted due to Failed Fused Command.
    ABORTED_FAILED_FUSED = GENERIC | 0x09;
    /// Command Aborted due to Missing Fused Command.
    ABORTED_MISSING_FUSED = DNR | GENERIC | 0x0a;
    /// Invalid Namespace or Format.
    INVALID_NAMESPACE = DNR | GENERIC | 0x0b;
    /// Command Sequence Error.
    SEQUENCE_ERROR = DNR | GENERIC | 0x0c;
    /// Invalid SGL Segment Descriptor.
    INVALID_SGL_SEGMENT = DNR | GENERIC | 0x0d;
    /// Invalid Number of SGL Descriptors.
    INVALID_SGL_COUNT = DNR | GENERIC | 0x0e;
    /// Data SGL Length Invalid.
    SGL_DATA_LENGTH = DNR | GENERIC | 0x0f;
    /// Metadata SGL Length Invalid.
    SGL_METADATA_LENGTH = DNR | GENERIC | 0x10;
    /// SGL Descriptor Type Invalid.
    SGL_TYPE = DNR | GENERIC | 0x11;
    /// PRP Offset Invalid.
    PRP_OFFSET = DNR | GENERIC | 0x13;
    /// SGL Offset Invalid.
    SGL_OFFSET = DNR | GENERIC | 0x16;
    /// Command Interrupted: try again.
    INTERRUPTED = GENERIC | 0x21;
    /// Namespace is Write Protected.
    WRITE_PROTECTED = DNR | GENERIC | 0x20;
    /// Transient Transport Error: try again.
    TRANSIENT = GENERIC | 0x22;
    /// LBA Out of Range.
    LBA_RANGE = DNR | GENERIC | 0x80;
    /// Capacity Exceeded.
    CAPACITY_EXCEEDED = GENERIC | 0x81;
    /// Namespace Not Ready: try again.
    NOT_READY = GENERIC | 0x82;
    /// Format In Progress: try again.
    FORMAT_IN_PROGRESS = GENERIC | 0x84;

    /// Completion Queue Invalid.
    CQ_INVALID = DNR | SPECIFIC;
    /// Invalid Queue Identifier.
    QUEUE_ID = DNR | SPECIFIC | 0x01;
    /// Invalid Queue Size.
    QUEUE_SIZE = DNR | SPECIFIC | 0x02;
    /// Abort Command Limit Exceeded.
    ABORT_LIMIT = SPECIFIC | 0x03;
    /// Asynchronous Event Request Limit Exceeded.
    ASYNC_EVENT_LIMIT = DNR | SPECIFIC | 0x05;
    /// Invalid Interrupt Vector.
    INTERRUPT_VECTOR = DNR | SPECIFIC | 0x08;
    /// Invalid Log Page.
    LOG_PAGE = DNR | SPECIFIC | 0x09;
    /// Invalid Format.
    FORMAT = DNR | SPECIFIC | 0x0a;
    /// Invalid Queue Deletion.
    QUEUE_DELETION = DNR | SPECIFIC | 0x0c;
    /// Feature Identifier Not Saveable.
    NOT_SAVEABLE = DNR | SPECIFIC | 0x0d;
    /// Feature Not Changeable.
    NOT_CHANGEABLE = DNR | SPECIFIC | 0x0e;
    /// Feature Not Namespace Specific.
    NOT_NAMESPACE_SPECIFIC = DNR | SPECIFIC | 0x0f;
    /// I/O Command Set Not Supported.
    COMMAND_SET_UNSUPPORTED = DNR | SPECIFIC | 0x29;
    /// I/O Command Set Combination Rejected.
    COMMAND_SET_COMBINATION = DNR | SPECIFIC | 0x2b;
    /// Namespace Not Attached.
    NOT_ATTACHED = DNR | SPECIFIC | 0x1a;
    /// Attempted Write to Read Only Range.
    READ_ONLY_RANGE = DNR | SPECIFIC | 0x82;
    /// Command Size Limit Exceeded.
    SIZE_LIMIT = DNR | SPECIFIC | 0x83;
    /// Overlapping I/O Range.
    OVERLAPPING_RANGE = DNR | SPECIFIC | 0x87;

    /// Write Fault.
    WRITE_FAULT = MEDIA | 0x80;
    /// Unrecovered Read Error.
    READ_ERROR = MEDIA | 0x81;
    /// Compare Failure.
    COMPARE_FAILURE = DNR | MEDIA | 0x85;

    /// Internal Path Error: the way to the storage is down; try again.
    PATH_ERROR = PATH;
    /// Asymmetric Access Persistent Loss.
    ANA_PERSISTENT_LOSS = PATH | 0x01;
    /// Asymmetric Access Inaccessible: another path may do.
    ANA_INACCESSIBLE = PATH | 0x02;
    /// Asymmetric Access Transition: try again.
    ANA_TRANSITION = PATH | 0x03;
}

impl Status {
    /// The 15 bits.
    pub fn bits(self) -> u16 {
        self.0
    }

    /// Status code type and status code: the lower 11 bits.
    pub fn code(self) -> u16 {
        self.0 & 0x7ff
    }

    /// With "Do Not Retry".
    #[must_use]
    pub fn final_(self) -> Self {
        Self(self.0 | DNR)
    }

    /// With "More": the error log has an entry about it.
    #[must_use]
    pub fn more(self) -> Self {
        Self(self.0 | MORE)
    }

    /// Whether it is an error.
    pub fn is_error(self) -> bool {
        self.code() != 0
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "Status({:#x})", self.0),
        }
    }
}
