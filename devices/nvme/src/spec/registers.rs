//! Controller registers (Base 2.1 §3.1.4; as memory of a PCI function: PCIe Transport 1.1 §3.1).

/// Where registers are: bytes from the start of the first BAR.
pub mod offset {
    /// Controller Capabilities, 8 bytes.
    pub const CAP: u64 = 0x00;
    /// Version.
    pub const VS: u64 = 0x08;
    /// Interrupt Mask Set.
    pub const INTMS: u64 = 0x0c;
    /// Interrupt Mask Clear.
    pub const INTMC: u64 = 0x10;
    /// Controller Configuration.
    pub const CC: u64 = 0x14;
    /// Controller Status.
    pub const CSTS: u64 = 0x1c;
    /// NVM Subsystem Reset.
    pub const NSSR: u64 = 0x20;
    /// Admin Queue Attributes.
    pub const AQA: u64 = 0x24;
    /// Admin Submission Queue Base Address, 8 bytes.
    pub const ASQ: u64 = 0x28;
    /// Admin Completion Queue Base Address, 8 bytes.
    pub const ACQ: u64 = 0x30;
    /// Controller Ready Timeouts.
    pub const CRTO: u64 = 0x68;
    /// Doorbells begin here (PCIe Transport 1.1 §3.1.2).
    pub const DOORBELLS: u64 = 0x1000;
}

/// VS: 2.1.0 (§3.1.4.2).
pub const VERSION: u32 = 0x0002_0100;

/// What written to NSSR resets the subsystem: "NVMe" (§3.1.4.7).
pub const NSSR_RESET: u32 = 0x4e56_4d65;

/// Bits 11:0 of ASQ and ACQ are reserved (§3.1.4.9, §3.1.4.10).
pub const QUEUE_BASE: u64 = !0xfff;

/// CC.IOSQES that a controller for the NVM command set takes: entries of 2^6 bytes (NVM 1.1 §4.1.5.1, SQES).
pub const IOSQES: u8 = 6;
/// CC.IOCQES: entries of 2^4 bytes.
pub const IOCQES: u8 = 4;

/// What CAP says (§3.1.4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cap {
    /// Most entries of a queue. Zero's based.
    pub mqes_z: u16,
    /// How long a change of CC.EN can take, in units of 500 ms.
    pub timeout: u8,
    /// log2 of the smallest page / 4096.
    pub mps_min: u8,
    /// log2 of the largest page / 4096.
    pub mps_max: u8,
}

impl Cap {
    /// `timeout` for a controller that needs `longest` to begin, or to end what runs: in units of 500 ms, rounded up, and one second for all that is not
    /// waiting. At most 127.5 s.
    pub fn timeout_for(longest: std::time::Duration) -> u8 {
        u8::try_from(longest.as_millis().div_ceil(500) + 2).unwrap_or(u8::MAX)
    }

    /// The register. Queues are contiguous, arbitration is round robin, doorbells are 4 bytes apart; subsystem reset; the NVM command set, alone (CSS bit 0) or by
    /// identifier (bit 6); ready means that media is (CRMS 01b). No boot partitions, no memory of the controller's own, no subsystem shutdown.
    pub fn bits(self) -> u64 {
        const CQR: u64 = 1 << 16;
        const NSSRS: u64 = 1 << 36;
        const CSS: u64 = (1 << 0 | 1 << 6) << 37;
        const CRWMS: u64 = 1 << 59;
        u64::from(self.mqes_z)
            | CQR
            | u64::from(self.timeout) << 24
            | NSSRS
            | CSS
            | u64::from(self.mps_min & 0xf) << 48
            | u64::from(self.mps_max & 0xf) << 52
            | CRWMS
    }
}

/// A shutdown that CC.SHN asks for (§3.1.4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShutdownKind {
    /// What is in a volatile cache is to be kept.
    Normal,
    /// Power goes at once.
    Abrupt,
}

/// CC (§3.1.4.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cc(pub u32);

impl Cc {
    const DEFINED: u32 = 0x00ff_fff1;

    /// As a host wrote it: reserved bits, and CRIME (bit 24, reserved without CAP.CRMS.CRIMS), are dropped.
    pub fn written(value: u32) -> Self {
        Self(value & Self::DEFINED)
    }

    /// Enable.
    pub fn enable(self) -> bool {
        self.0 & 1 != 0
    }

    /// I/O Command Set Selected.
    pub fn css(self) -> u8 {
        (self.0 >> 4 & 0b111) as u8
    }

    /// Memory Page Size: log2 of bytes / 4096.
    pub fn mps(self) -> u8 {
        (self.0 >> 7 & 0xf) as u8
    }

    /// A memory page in bytes.
    pub fn page(self) -> u64 {
        4096 << self.mps()
    }

    /// Arbitration Mechanism Selected.
    pub fn ams(self) -> u8 {
        (self.0 >> 11 & 0b111) as u8
    }

    /// Shutdown Notification; the reserved value asks for none.
    pub fn shutdown(self) -> Option<ShutdownKind> {
        match self.0 >> 14 & 0b11 {
            1 => Some(ShutdownKind::Normal),
            2 => Some(ShutdownKind::Abrupt),
            _ => None,
        }
    }

    /// I/O Submission Queue Entry Size: log2 of bytes.
    pub fn iosqes(self) -> u8 {
        (self.0 >> 16 & 0xf) as u8
    }

    /// I/O Completion Queue Entry Size: log2 of bytes.
    pub fn iocqes(self) -> u8 {
        (self.0 >> 20 & 0xf) as u8
    }

    /// This, but with the fields of `other` that may change while the controller is enabled: EN, SHN, and the entry sizes, which are set before
    /// the first I/O queue.
    #[must_use]
    pub fn with_live_fields(self, other: Self) -> Self {
        const LIVE: u32 = 1 | 0b11 << 14 | 0xff << 16;
        Self(self.0 & !LIVE | other.0 & LIVE)
    }
}

/// CSTS (§3.1.4.6).
pub mod csts {
    /// Ready.
    pub const RDY: u32 = 1;
    /// Controller Fatal Status.
    pub const CFS: u32 = 1 << 1;
    /// Shutdown processing occurring.
    pub const SHST_OCCURRING: u32 = 1 << 2;
    /// Shutdown processing complete.
    pub const SHST_COMPLETE: u32 = 2 << 2;
    /// Both bits of SHST.
    pub const SHST: u32 = 3 << 2;
    /// NVM Subsystem Reset Occurred; written with 1 it is cleared.
    pub const NSSRO: u32 = 1 << 4;
}

/// AQA (§3.1.4.8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Aqa(pub u32);

impl Aqa {
    /// As a host wrote it, without reserved bits.
    pub fn written(value: u32) -> Self {
        Self(value & 0x0fff_0fff)
    }

    /// Entries of the admin submission queue.
    pub fn sq_entries(self) -> u16 {
        (self.0 & 0xfff) as u16 + 1
    }

    /// Entries of the admin completion queue.
    pub fn cq_entries(self) -> u16 {
        (self.0 >> 16 & 0xfff) as u16 + 1
    }
}
