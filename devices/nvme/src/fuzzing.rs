//! What fuzzers and property tests share: bytes become a host's behaviour.

mod admin;
mod choices;
mod registers;

pub use admin::fuzz_admin;
pub use registers::fuzz_registers;
