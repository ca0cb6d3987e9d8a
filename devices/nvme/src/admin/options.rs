//! What of a controller is fixed when it is made.

/// What the I/O side bears, as Identify says it (NVM Command Set 1.1 §4.1.5.4). Sizes are bytes, and powers of two of 8 KiB at least, or `None` for no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommandLimits {
    /// Verify.
    pub verify: Option<u64>,
    /// Write Zeroes.
    pub zeroes: Option<u64>,
    /// Dataset Management: ranges, 1 to 255; 0: as many as a command can have.
    pub ranges: u8,
    /// Dataset Management: logical blocks of a range; 0: as many as it says.
    pub range_blocks: u32,
    /// Dataset Management: logical blocks of a command; 0: no limit.
    pub total_blocks: u64,
    /// Copy: ranges, 1 to 256.
    pub copy_ranges: u16,
    /// Copy: logical blocks of a range.
    pub copy_range_blocks: u16,
    /// Copy: logical blocks of a command.
    pub copy_blocks: u32,
    /// Whether Flush with NSID `FFFFFFFFh` flushes all namespaces; otherwise it is refused.
    pub flush_all: bool,
    /// SGLS: 0 for none (Base 2.1 §5.1.13.2.1).
    pub sgls: u32,
}

impl Default for CommandLimits {
    fn default() -> Self {
        Self {
            verify: None,
            zeroes: None,
            ranges: 0,
            range_blocks: 0,
            total_blocks: 0,
            copy_ranges: 128,
            copy_range_blocks: 4096,
            copy_blocks: 32768,
            flush_all: true,
            // SGLs of any alignment and length (bits 1:0 = 01b); no bit buckets, no keys, no metadata.
            sgls: 1,
        }
    }
}

/// What of a controller is fixed.
#[derive(Clone, Debug)]
pub struct ControllerOptions {
    /// PCI vendor and subsystem vendor, as in configuration space.
    pub vendor: u16,
    /// As above.
    pub subsystem_vendor: u16,
    /// Serial number: 1 to 20 printable ASCII characters; others become blanks.
    pub serial: String,
    /// Model number: 1 to 40.
    pub model: String,
    /// Firmware revision: 1 to 8.
    pub firmware: String,
    /// I/O queue pairs that a host can have: 1 to 1023.
    pub queues: u16,
    /// Vectors: 1 and more.
    pub vectors: u16,
    /// CAP.MQES. Zero's based.
    pub mqes_z: u16,
    /// log2 of the largest memory page / 4096.
    pub mps_max: u8,
    /// Most bytes that a command moves: a power of two, 8 KiB at least (MDTS 0 would be "no limit").
    pub max_transfer: usize,
    /// Doorbell Buffer Config is offered.
    pub shadow_doorbells: bool,
    /// Asynchronous event requests at the same time. Zero's based.
    pub event_requests_z: u8,
    /// Abort commands at the same time. Zero's based.
    pub aborts_z: u8,
    /// What the I/O side bears.
    pub limits: CommandLimits,
}

impl ControllerOptions {
    /// With this serial number, and the defaults of the project.
    pub fn new(serial: impl Into<String>) -> Self {
        Self {
            vendor: 0,
            subsystem_vendor: 0,
            serial: serial.into(),
            model: "Diamond Bluff NVMe Controller".into(),
            firmware: env!("CARGO_PKG_VERSION").into(),
            queues: 8,
            vectors: 9,
            mqes_z: 4095,
            mps_max: 4,
            max_transfer: 1 << 20,
            shadow_doorbells: true,
            event_requests_z: 7,
            aborts_z: 3,
            limits: CommandLimits::default(),
        }
    }

    /// Whether they are as their descriptions say.
    pub fn is_valid(&self) -> bool {
        let size = |bytes: u64| bytes.is_power_of_two() && bytes >= 8192;
        let limits = &self.limits;
        (1..=1023).contains(&self.queues)
            && (1..=2048).contains(&self.vectors)
            && self.mqes_z >= 1
            && self.mps_max <= 4
            && size(self.max_transfer as u64)
            && [limits.verify, limits.zeroes]
                .into_iter()
                .flatten()
                .all(size)
            && (1..=256).contains(&limits.copy_ranges)
    }
}
