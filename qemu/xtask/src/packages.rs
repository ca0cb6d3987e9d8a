//! The system packages that verbs need: the library's lists.

pub use bluff_qemu::packages::{AARCH64, GUESTS, TESTS, ensure};
