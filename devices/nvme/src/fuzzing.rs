//! What fuzzers and property tests share: bytes become a host's behaviour.

mod admin;
mod choices;
pub(crate) mod host;
mod queues;
mod registers;
pub(crate) mod slow;

pub use admin::fuzz_admin;
pub use queues::{fuzz_data, fuzz_queues};
pub use registers::fuzz_registers;
