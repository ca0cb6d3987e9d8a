//! Who records a session, consumes its messages and replies ([`bluff_attachment::keeper`]).

pub use bluff_attachment::keeper::{Commit, Direct, Keeper, Progress};

use crate::framing::{HEADER_LEN, MAX_PAYLOAD};
use crate::unix::MAX_FILES;

/// What is recorded of one session, and who consumes and replies on its behalf: the control half.
pub type Ledger = bluff_attachment::keeper::Ledger<{ HEADER_LEN + MAX_PAYLOAD }, MAX_FILES>;
