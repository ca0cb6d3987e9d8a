//! What a guest sees of a function: cases, and the framework that runs them against any back end.
//!
//! ```text
//!   runner ── for each peer, for each case ──> Case::run(Context)
//!                                                 │  Context::start ──> Backend ────> Running: sockets, resize, kill        virtio-blk
//!                                                 │  Context::serve ──> Controller ─> Served: attach, plug, add, remove     NVMe
//!                                                 │  Context::card ──────────────────> NetCard: sockets, counters, kill     virtio-net
//!                                                 └─ Context::guest ──> bluff_qemu::guest (QEMU 11.1, 7.2) or ::uml
//! ```
//!
//! - [`backend`]: what can serve a function. [`backend::StorageDaemon`] is QEMU's own server: a case that fails there is wrong itself.
//! - [`controller`]: what can serve an NVMe function. [`controller::QemuNvme`] is QEMU's own controller, for the same purpose.
//! - [`card`]: the project's own programs, as back ends.
//! - [`runner`]: names, filters, bounds, the summary. Plain `cargo test` boots nothing; the variable [`runner::VARIABLE`] does.
//! - [`cases`]: what a back end or a controller must do for its guests.
//!
//! It knows QEMU, sockets and programs, and no crate of the card.

pub mod backend;
pub mod card;
pub mod cases;
pub mod controller;
pub mod runner;
