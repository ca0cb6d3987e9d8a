//! Format NVM (Base 2.1 §5.1.10; NVM Command Set 1.1 §4.1.2).
//!
//! Whatever the host asks for, nothing of what was there before can be read afterwards: a format without secure erase writes zeroes, too. Cryptographic erase would need a
//! volume that has a key of its own; none has, so it is not offered (FNA).

use super::Admin;
use crate::spec::admin::RawFormat;
use crate::spec::{ALL_NAMESPACES, Status};

/// Secure Erase Settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Erase {
    /// None was asked for: zeroes may give the storage back.
    None,
    /// User data is gone: zeroes are written.
    UserData,
}

/// A format that can be. To be carried out between [`crate::Subsystem::begin_format`] and [`crate::Formatting::finish`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FormatCommand {
    /// Which namespaces: one, or all that are attached to the controller.
    pub nsids: Vec<u32>,
    /// The LBA format that they get, by index.
    pub format: u8,
    /// How.
    pub erase: Erase,
}

impl Admin {
    pub(super) fn format(&self, raw: &RawFormat) -> Result<FormatCommand, Status> {
        let erase = match raw.erase {
            0 => Erase::None,
            1 => Erase::UserData,
            // 2 is cryptographic erase; the rest is reserved.
            _ => return Err(Status::INVALID_FIELD),
        };
        // No protection information, and no more than 16 formats, so LBAFU is 0. Metadata settings mean nothing without metadata.
        if raw.protection != 0 || raw.lbaf_high != 0 {
            return Err(Status::FORMAT);
        }
        let limit = self.subsystem.options().max_namespaces;
        let nsids: Vec<u32> = match raw.nsid {
            ALL_NAMESPACES => self.table.iter().map(|n| n.nsid()).collect(),
            nsid => vec![self.table.get(nsid, limit)?.nsid()],
        };
        if nsids.is_empty() {
            return Err(Status::INVALID_NAMESPACE);
        }
        for nsid in &nsids {
            let namespace = self.table.get(*nsid, limit)?;
            namespace.check()?;
            let mut formats = self.subsystem.options().formats(&namespace.geometry);
            if formats.nth(raw.lbaf_low.into()).is_none() {
                return Err(Status::FORMAT);
            }
            if namespace.geometry.read_only {
                return Err(Status::WRITE_PROTECTED);
            }
        }
        Ok(FormatCommand {
            nsids,
            format: raw.lbaf_low,
            erase,
        })
    }
}
