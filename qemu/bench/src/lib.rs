//! The data path, measured: `cargo xtask bench` runs the program, `cargo bench --package bluff-bench` the rings alone.
//!
//! ```text
//!   core 0: our polling driver            core 1: one back end at a time
//!     Load --- rings in shared memory ---   ideal ring | bluffd | bluff-reference | qemu-storage-daemon
//! ```
//!
//! Networks have rows of their own: see [`net`].
//!
//! The work of a row is done by each back end in turn, in several rounds, since these machines' speed
//! drifts: what counts is the ratio of the medians. The driver rewrites the header of every request and checks every status.

pub mod attack;
pub mod backend;
pub mod load;
pub mod net;
pub mod nvme;
pub mod report;
pub mod ring;
pub mod rows;
