//! Who records a session, consumes its messages and replies ([`bluff_attachment::keeper`]).

pub use bluff_attachment::keeper::{Commit, Descriptors, Keeper, Key, Progress};

use crate::framing::MAX_FILES;

/// Bytes of a message at most, with the limits that a server has if nothing else is said, and then some.
const LONGEST: usize = 2 << 20;

/// What is recorded of one session, and who consumes and replies on its behalf: the control half.
pub type Ledger = bluff_attachment::keeper::Ledger<LONGEST, MAX_FILES>;
