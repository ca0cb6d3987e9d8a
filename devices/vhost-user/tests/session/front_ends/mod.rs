//! Whole sessions, in the order in which real front ends send their messages.

mod qemu;
mod sparse;
mod vhost_crate;
