//! The error log: the last failures, newest first (Base 2.1 §5.1.12.1.2).

use std::collections::VecDeque;

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32, U64};

use crate::spec::log::ErrorEntry;
use crate::spec::{Command, Status};

/// How many it keeps.
pub(super) const ENTRIES: usize = 64;

/// That a field is not about anything.
const NONE: u16 = 0xffff;

/// What a worker says of a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ErrorReport {
    /// The submission queue, where it is about one.
    pub sqid: Option<u16>,
    /// Identifier and opcode of the command, where it is about one.
    pub command: Option<(u16, u8)>,
    /// What the command was answered with.
    pub status: Status,
    /// The byte of the command (0 to 63), and the bit in it, that is wrong.
    pub location: Option<(u8, u8)>,
    /// The first logical block that it is about; 0: none.
    pub lba: u64,
    /// The namespace; 0: none.
    pub nsid: u32,
}

impl ErrorReport {
    /// About a command as it was fetched.
    pub fn of(sqid: u16, command: &Command, status: Status) -> Self {
        Self {
            sqid: Some(sqid),
            command: Some((command.cid.get(), command.opcode)),
            status,
            location: None,
            lba: 0,
            nsid: command.nsid.get(),
        }
    }

    /// About a doorbell.
    pub(super) fn doorbell(sqid: Option<u16>) -> Self {
        Self {
            sqid,
            command: None,
            status: Status::INVALID_FIELD,
            location: None,
            lba: 0,
            nsid: 0,
        }
    }

    fn entry(&self, count: u64) -> ErrorEntry {
        let (cid, opcode) = self.command.unzip();
        let location = self
            .location
            .map(|(byte, bit)| u16::from(byte) | u16::from(bit & 7) << 8);
        ErrorEntry {
            count: U64::new(count),
            sqid: U16::new(self.sqid.unwrap_or(NONE)),
            cid: U16::new(cid.unwrap_or(NONE)),
            status: U16::new(self.status.bits() << 1),
            location: U16::new(location.unwrap_or(NONE)),
            lba: U64::new(self.lba),
            nsid: U32::new(self.nsid),
            opcode: opcode.unwrap_or(0),
            // The opcode and the command set (0, NVM) are valid where it is about a command.
            version: u8::from(opcode.is_some()),
            ..ErrorEntry::default()
        }
    }
}

/// The entries.
#[derive(Debug, Default)]
pub(super) struct ErrorLog(VecDeque<ErrorEntry>);

impl ErrorLog {
    pub fn push(&mut self, count: u64, report: &ErrorReport) {
        self.0.truncate(ENTRIES - 1);
        self.0.push_front(report.entry(count));
    }

    /// They do not outlive a reset; their count does.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    pub fn page(&self) -> Vec<u8> {
        let mut page: Vec<u8> = self.0.iter().flat_map(|e| e.as_bytes().to_vec()).collect();
        page.resize(ENTRIES * size_of::<ErrorEntry>(), 0);
        page
    }
}
