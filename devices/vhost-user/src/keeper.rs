//! Who records a session, consumes its messages and replies ([`bluff_attachment::keeper`]).

pub use bluff_attachment::keeper::{Bounds, Commit, Direct, Keeper, Ledger, Progress};

use crate::framing::{HEADER_LEN, MAX_PAYLOAD};
use crate::spec::MAX_DESCRIPTORS;
use crate::unix::MAX_FILES;

/// What a session may have recorded: a [`Ledger`]'s bounds.
pub const BOUNDS: Bounds = Bounds {
    message: HEADER_LEN + MAX_PAYLOAD,
    files: MAX_FILES,
    kept: MAX_DESCRIPTORS + MAX_FILES,
    // About ten times what the largest session comes to.
    record: 1 << 20,
};
