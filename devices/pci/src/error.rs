//! What an attachment can have wrong.

use crate::seam::{Interrupt, Region};

/// Something that is not there, or a state that is not this function's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The function has no such region.
    #[error("no region {0:?}")]
    NoRegion(Region),
    /// An access that does not lie in its region, or whose end passes 64 bits.
    #[error("{len} bytes at {offset:#x} do not lie in region {region:?}")]
    Range {
        /// The region.
        region: Region,
        /// Offset of the first byte.
        offset: u64,
        /// How many bytes.
        len: usize,
    },
    /// The function has no such interrupt.
    #[error("no interrupt {0:?}")]
    NoInterrupt(Interrupt),
    /// A saved state of another function, another version, or with values that it cannot have.
    #[error("a state that is not this function's: {0}")]
    State(&'static str),
}
