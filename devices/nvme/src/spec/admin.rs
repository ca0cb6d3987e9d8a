//! Admin commands: opcodes, and what their dwords say (Base 2.1 §5; NVM Command Set 1.1 §4.1).
//!
//! A raw struct holds the fields as they stand; what they mean is decided by the admin side of the controller.

use super::Command;

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
pub const FORMAT_NVM: u8 = 0x80;

fn low(dword: u32) -> u16 {
    dword as u16
}

fn high(dword: u32) -> u16 {
    (dword >> 16) as u16
}

/// Create I/O Completion Queue (§5.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawCreateCq {
    /// PRP entry 1: where the queue, or a list of its pages, is.
    pub prp1: u64,
    /// Queue Identifier.
    pub qid: u16,
    /// Queue Size. Zero's based.
    pub size_z: u16,
    /// Physically Contiguous.
    pub contiguous: bool,
    /// Interrupts Enabled.
    pub interrupts: bool,
    /// Interrupt Vector.
    pub vector: u16,
}

impl From<&Command> for RawCreateCq {
    fn from(c: &Command) -> Self {
        let (cdw10, cdw11) = (c.cdw10.get(), c.cdw11.get());
        Self {
            prp1: c.dptr[0].get(),
            qid: low(cdw10),
            size_z: high(cdw10),
            contiguous: cdw11 & 1 != 0,
            interrupts: cdw11 & 2 != 0,
            vector: high(cdw11),
        }
    }
}

/// Create I/O Submission Queue (§5.2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawCreateSq {
    /// PRP entry 1.
    pub prp1: u64,
    /// Queue Identifier.
    pub qid: u16,
    /// Queue Size. Zero's based.
    pub size_z: u16,
    /// Physically Contiguous.
    pub contiguous: bool,
    /// Queue Priority: of no meaning with round robin arbitration.
    pub priority: u8,
    /// Completion Queue Identifier.
    pub cqid: u16,
}

impl From<&Command> for RawCreateSq {
    fn from(c: &Command) -> Self {
        let (cdw10, cdw11) = (c.cdw10.get(), c.cdw11.get());
        Self {
            prp1: c.dptr[0].get(),
            qid: low(cdw10),
            size_z: high(cdw10),
            contiguous: cdw11 & 1 != 0,
            priority: (cdw11 >> 1 & 0b11) as u8,
            cqid: high(cdw11),
        }
    }
}

/// Identify (§5.1.13).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawIdentify {
    /// Namespace identifier.
    pub nsid: u32,
    /// Controller or Namespace Structure.
    pub cns: u8,
    /// Controller Identifier.
    pub cntid: u16,
    /// Command Set Identifier.
    pub csi: u8,
}

impl From<&Command> for RawIdentify {
    fn from(c: &Command) -> Self {
        Self {
            nsid: c.nsid.get(),
            cns: c.cdw10.get() as u8,
            cntid: high(c.cdw10.get()),
            csi: (c.cdw11.get() >> 24) as u8,
        }
    }
}

/// Get Log Page (§5.1.12).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawGetLogPage {
    /// Namespace identifier.
    pub nsid: u32,
    /// Log Page Identifier.
    pub lid: u8,
    /// Log Specific Parameter.
    pub lsp: u8,
    /// Retain Asynchronous Event.
    pub retain: bool,
    /// Number of dwords. Zero's based.
    pub dwords_z: u32,
    /// Log Specific Identifier.
    pub lsi: u16,
    /// Log Page Offset, in bytes or, with `index`, in entries.
    pub offset: u64,
    /// Offset Type: by index.
    pub index: bool,
    /// Command Set Identifier.
    pub csi: u8,
}

impl From<&Command> for RawGetLogPage {
    fn from(c: &Command) -> Self {
        let (cdw10, cdw11, cdw14) = (c.cdw10.get(), c.cdw11.get(), c.cdw14.get());
        Self {
            nsid: c.nsid.get(),
            lid: cdw10 as u8,
            lsp: (cdw10 >> 8 & 0x7f) as u8,
            retain: cdw10 & 1 << 15 != 0,
            dwords_z: u32::from(low(cdw11)) << 16 | u32::from(high(cdw10)),
            lsi: high(cdw11),
            offset: u64::from(c.cdw13.get()) << 32 | u64::from(c.cdw12.get()),
            index: cdw14 & 1 << 23 != 0,
            csi: (cdw14 >> 24) as u8,
        }
    }
}

impl RawGetLogPage {
    /// How many bytes the host wants.
    pub fn bytes(&self) -> u64 {
        (u64::from(self.dwords_z) + 1) * 4
    }
}

/// Get Features and Set Features (§5.1.11; §5.1.25).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawFeature {
    /// Namespace identifier.
    pub nsid: u32,
    /// Feature Identifier.
    pub fid: u8,
    /// Select, of Get Features.
    pub select: u8,
    /// Save, of Set Features.
    pub save: bool,
    /// Command dword 11.
    pub cdw11: u32,
}

impl From<&Command> for RawFeature {
    fn from(c: &Command) -> Self {
        let cdw10 = c.cdw10.get();
        Self {
            nsid: c.nsid.get(),
            fid: cdw10 as u8,
            select: (cdw10 >> 8 & 0b111) as u8,
            save: cdw10 >> 31 != 0,
            cdw11: c.cdw11.get(),
        }
    }
}

/// Abort (§5.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawAbort {
    /// Submission Queue Identifier.
    pub sqid: u16,
    /// Command Identifier.
    pub cid: u16,
}

impl From<&Command> for RawAbort {
    fn from(c: &Command) -> Self {
        Self {
            sqid: low(c.cdw10.get()),
            cid: high(c.cdw10.get()),
        }
    }
}

/// Format NVM (§5.1.10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawFormat {
    /// Namespace identifier.
    pub nsid: u32,
    /// LBA Format, its lower four bits.
    pub lbaf_low: u8,
    /// LBA Format, its upper two bits. Only a host that has enabled more than 16 formats sets them.
    pub lbaf_high: u8,
    /// Protection Information.
    pub protection: u8,
    /// Secure Erase Settings.
    pub erase: u8,
}

impl From<&Command> for RawFormat {
    fn from(c: &Command) -> Self {
        let cdw10 = c.cdw10.get();
        Self {
            nsid: c.nsid.get(),
            lbaf_low: (cdw10 & 0xf) as u8,
            lbaf_high: (cdw10 >> 12 & 0b11) as u8,
            protection: (cdw10 >> 5 & 0b111) as u8,
            erase: (cdw10 >> 9 & 0b111) as u8,
        }
    }
}
