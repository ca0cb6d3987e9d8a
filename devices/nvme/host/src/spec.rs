//! What the host writes and reads, as NVMe Base 2.1, NVM Command Set 1.1 and PCIe Transport 1.1 have it. Written from the specifications, and shared with
//! nothing of the controller's.

/// Registers (Base 2.1 §3.1.4), by offset.
pub mod register {
    /// Capabilities, 64 bits.
    pub const CAP: u64 = 0x00;
    /// Version.
    pub const VS: u64 = 0x08;
    /// Interrupt mask set.
    pub const INTMS: u64 = 0x0c;
    /// Interrupt mask clear.
    pub const INTMC: u64 = 0x10;
    /// Configuration.
    pub const CC: u64 = 0x14;
    /// Status.
    pub const CSTS: u64 = 0x1c;
    /// Subsystem reset.
    pub const NSSR: u64 = 0x20;
    /// Sizes of the admin queues.
    pub const AQA: u64 = 0x24;
    /// Place of the admin submission queue, 64 bits.
    pub const ASQ: u64 = 0x28;
    /// Place of the admin completion queue, 64 bits.
    pub const ACQ: u64 = 0x30;
    /// The first doorbell (PCIe Transport §3.1.2).
    pub const DOORBELLS: u64 = 0x1000;

    /// CC: enable.
    pub const CC_EN: u32 = 1;
    /// CC: the bits of the shutdown notification.
    pub const CC_SHN: u32 = 3 << 14;
    /// CC: a normal shutdown.
    pub const CC_SHN_NORMAL: u32 = 1 << 14;
    /// CC: an abrupt shutdown.
    pub const CC_SHN_ABRUPT: u32 = 2 << 14;
    /// CC: entries of 64 and 16 bytes.
    pub const CC_ENTRIES: u32 = 6 << 16 | 4 << 20;
    /// CSTS: ready.
    pub const RDY: u32 = 1;
    /// CSTS: fatal.
    pub const CFS: u32 = 1 << 1;
    /// CSTS: the bits of the shutdown status.
    pub const SHST: u32 = 3 << 2;
    /// CSTS: the shutdown is complete.
    pub const SHST_COMPLETE: u32 = 2 << 2;
    /// CSTS: a subsystem reset has happened; written to be cleared.
    pub const NSSRO: u32 = 1 << 4;
    /// NSSR: "NVMe".
    pub const NSSR_RESET: u32 = 0x4e56_4d65;
}

/// Opcodes of admin commands (Base 2.1 §5, figure "Opcodes for Admin Commands").
pub mod admin {
    /// Delete I/O Submission Queue.
    pub const DELETE_SQ: u8 = 0x00;
    /// Create I/O Submission Queue.
    pub const CREATE_SQ: u8 = 0x01;
    /// Get Log Page.
    pub const GET_LOG_PAGE: u8 = 0x02;
    /// Delete I/O Completion Queue.
    pub const DELETE_CQ: u8 = 0x04;
    /// Create I/O Completion Queue.
    pub const CREATE_CQ: u8 = 0x05;
    /// Identify.
    pub const IDENTIFY: u8 = 0x06;
    /// Abort.
    pub const ABORT: u8 = 0x08;
    /// Set Features.
    pub const SET_FEATURES: u8 = 0x09;
    /// Get Features.
    pub const GET_FEATURES: u8 = 0x0a;
    /// Asynchronous Event Request.
    pub const ASYNC_EVENT: u8 = 0x0c;
    /// Doorbell Buffer Config.
    pub const DOORBELL_BUFFER: u8 = 0x7c;
    /// Format NVM.
    pub const FORMAT: u8 = 0x80;
}

/// Opcodes of I/O commands (NVM Command Set 1.1 §3).
pub mod io {
    /// Flush.
    pub const FLUSH: u8 = 0x00;
    /// Write.
    pub const WRITE: u8 = 0x01;
    /// Read.
    pub const READ: u8 = 0x02;
    /// Write Uncorrectable.
    pub const WRITE_UNCORRECTABLE: u8 = 0x04;
    /// Compare.
    pub const COMPARE: u8 = 0x05;
    /// Write Zeroes.
    pub const WRITE_ZEROES: u8 = 0x08;
    /// Dataset Management.
    pub const DATASET_MANAGEMENT: u8 = 0x09;
    /// Verify.
    pub const VERIFY: u8 = 0x0c;
    /// Copy.
    pub const COPY: u8 = 0x19;

    /// Dword 12: Force Unit Access.
    pub const FUA: u32 = 1 << 30;
    /// Dword 12: Limited Retry.
    pub const LIMITED_RETRY: u32 = 1 << 31;
    /// Dword 12 of Write Zeroes: Deallocate.
    pub const DEAC: u32 = 1 << 25;
    /// Dword 11 of Dataset Management: Deallocate.
    pub const DEALLOCATE: u32 = 1 << 2;
}

/// Identify's CNS (Base 2.1 §5.1.13).
pub mod cns {
    /// A namespace, of the NVM command set.
    pub const NAMESPACE: u8 = 0x00;
    /// The controller.
    pub const CONTROLLER: u8 = 0x01;
    /// Active namespaces.
    pub const ACTIVE_NAMESPACES: u8 = 0x02;
    /// Identifiers of a namespace.
    pub const DESCRIPTORS: u8 = 0x03;
    /// A namespace, of its command set.
    pub const CSI_NAMESPACE: u8 = 0x05;
    /// The controller, of a command set.
    pub const CSI_CONTROLLER: u8 = 0x06;
    /// A namespace, independent of its command set.
    pub const INDEPENDENT_NAMESPACE: u8 = 0x08;
    /// Controllers of the subsystem.
    pub const CONTROLLERS: u8 = 0x13;
}

/// Feature identifiers (Base 2.1 §5.1.25, NVM §4.1.3).
pub mod feature {
    /// Arbitration.
    pub const ARBITRATION: u8 = 0x01;
    /// Power management.
    pub const POWER: u8 = 0x02;
    /// Temperature threshold.
    pub const TEMPERATURE: u8 = 0x04;
    /// Error recovery.
    pub const ERROR_RECOVERY: u8 = 0x05;
    /// Volatile write cache.
    pub const WRITE_CACHE: u8 = 0x06;
    /// Number of queues.
    pub const QUEUES: u8 = 0x07;
    /// Interrupt coalescing.
    pub const COALESCING: u8 = 0x08;
    /// Interrupt vector configuration.
    pub const VECTOR: u8 = 0x09;
    /// Write atomicity.
    pub const ATOMICITY: u8 = 0x0a;
    /// Asynchronous event configuration.
    pub const EVENTS: u8 = 0x0b;
    /// Timestamp.
    pub const TIMESTAMP: u8 = 0x0e;
    /// Host behaviour support.
    pub const HOST_BEHAVIOR: u8 = 0x16;
}

/// Log page identifiers (Base 2.1 §5.1.12).
pub mod log {
    /// Supported log pages.
    pub const SUPPORTED: u8 = 0x00;
    /// Errors.
    pub const ERROR: u8 = 0x01;
    /// SMART and health.
    pub const SMART: u8 = 0x02;
    /// Firmware slots.
    pub const FIRMWARE: u8 = 0x03;
    /// Namespaces that changed.
    pub const CHANGED_NAMESPACES: u8 = 0x04;
    /// Commands supported and effects.
    pub const EFFECTS: u8 = 0x05;
    /// Asymmetric namespace access.
    pub const ANA: u8 = 0x0c;
    /// Features supported and effects.
    pub const FEATURE_EFFECTS: u8 = 0x12;
}

/// SGL descriptors (Base 2.1 §4.3.2): type in the upper half of the last byte.
pub mod sgl {
    /// Data block.
    pub const DATA: u8 = 0x00;
    /// Bit bucket.
    pub const BIT_BUCKET: u8 = 0x10;
    /// Segment.
    pub const SEGMENT: u8 = 0x20;
    /// Last segment.
    pub const LAST_SEGMENT: u8 = 0x30;
}

/// Some status values (Base 2.1 §4.2.3): type, then code.
pub mod status {
    use crate::Status;

    /// Success.
    pub const SUCCESS: Status = Status::new(0, 0x00);
    /// Invalid Command Opcode.
    pub const INVALID_OPCODE: Status = Status::new(0, 0x01);
    /// Invalid Field in Command.
    pub const INVALID_FIELD: Status = Status::new(0, 0x02);
    /// Data Transfer Error.
    pub const TRANSFER_ERROR: Status = Status::new(0, 0x04);
    /// Internal Error.
    pub const INTERNAL_ERROR: Status = Status::new(0, 0x06);
    /// Command Abort Requested.
    pub const ABORT_REQUESTED: Status = Status::new(0, 0x07);
    /// Command Aborted due to SQ Deletion.
    pub const SQ_DELETED: Status = Status::new(0, 0x08);
    /// Invalid Namespace or Format.
    pub const INVALID_NAMESPACE: Status = Status::new(0, 0x0b);
    /// Invalid SGL Segment Descriptor.
    pub const SGL_SEGMENT: Status = Status::new(0, 0x0d);
    /// Data SGL Length Invalid.
    pub const SGL_LENGTH: Status = Status::new(0, 0x0f);
    /// SGL Descriptor Type Invalid.
    pub const SGL_TYPE: Status = Status::new(0, 0x11);
    /// PRP Offset Invalid.
    pub const PRP_OFFSET: Status = Status::new(0, 0x13);
    /// LBA Out of Range.
    pub const LBA_RANGE: Status = Status::new(0, 0x80);
    /// Capacity Exceeded.
    pub const CAPACITY: Status = Status::new(0, 0x81);
    /// Namespace Not Ready.
    pub const NOT_READY: Status = Status::new(0, 0x82);
    /// Format in Progress.
    pub const FORMAT_IN_PROGRESS: Status = Status::new(0, 0x84);
    /// Completion Queue Invalid.
    pub const CQ_INVALID: Status = Status::new(1, 0x00);
    /// Invalid Queue Identifier.
    pub const QUEUE_IDENTIFIER: Status = Status::new(1, 0x01);
    /// Invalid Queue Size.
    pub const QUEUE_SIZE: Status = Status::new(1, 0x02);
    /// Abort Command Limit Exceeded.
    pub const ABORT_LIMIT: Status = Status::new(1, 0x03);
    /// Asynchronous Event Request Limit Exceeded.
    pub const EVENT_LIMIT: Status = Status::new(1, 0x05);
    /// Invalid Interrupt Vector.
    pub const INTERRUPT_VECTOR: Status = Status::new(1, 0x08);
    /// Invalid Log Page.
    pub const LOG_PAGE: Status = Status::new(1, 0x09);
    /// Invalid Format.
    pub const FORMAT: Status = Status::new(1, 0x0a);
    /// Invalid Queue Deletion.
    pub const QUEUE_DELETION: Status = Status::new(1, 0x0c);
    /// Unrecovered Read Error.
    pub const READ_ERROR: Status = Status::new(2, 0x81);
    /// Write Fault.
    pub const WRITE_FAULT: Status = Status::new(2, 0x80);
    /// Compare Failure.
    pub const COMPARE: Status = Status::new(2, 0x85);
}
