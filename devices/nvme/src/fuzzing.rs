//! What fuzzers and property tests share: bytes become a host's behaviour.

// Tests use more of it than fuzzers, and those are not in every build.
#![cfg_attr(any(not(test), loom), allow(dead_code))]

mod admin;
mod choices;
pub(crate) mod host;
mod queues;
mod registers;
pub(crate) mod slow;

pub use admin::fuzz_admin;
pub use queues::{fuzz_data, fuzz_queues};
pub use registers::fuzz_registers;
