//! An NVMe host without a VM, for tests and benchmarks.
//!
//! ```text
//!   Load           an endless polled load, for benchmarks             load
//!   Traffic        a verified load over many queues (feature verify)  verify
//!    |
//!   Controller     registers, admin commands, queues come and go      controller, admin
//!   Queues         one CQ with its SQs: submit, ring, poll            queues
//!    |     |
//!   Sq    Cq       rings, phase tags, (shadow) doorbells              queue
//!    |     |   \
//!    |     |    Buffer   data as PRPs or SGLs                         data
//!    |     |        \
//!   Bar   HostMemory: memfd regions, pages that come and go           bar, memory
//! ```
//!
//! The code that a host's driver would be. It shares nothing with the controller of this workspace, wire constants
//! included ([`spec`]), so that each judges the other: what a controller completes is checked against what the host knows in
//! private memory ([`Violation`]). For hostile tests every layer lets anything through: [`Command`] is 64 bytes of any
//! content, [`Sq::push`] tracks nothing, [`Bar`] takes any offset and value.
//!
//! Follows NVMe Base 2.1, NVM Command Set 1.1 and NVMe over PCIe Transport 1.1. Not here: metadata, protection information,
//! directives, reservations, queues that are not contiguous, weighted round robin.
//!
//! # Memory ordering
//! PCIe orders a device's writes and a host's; in shared memory it has to be said. A command is written before the doorbell
//! (release), an entry of a CQ is read after its phase tag (acquire), and a CQ's head is written after the entries were
//! read (release). With shadow doorbells the host stores the tail and then looks whether it was to ring: that needs a full fence,
//! as does the controller's other half (Base 2.1 §B.5).

// Under loom the memory of `bluff-virtio-driver` is a model without files; whoever has this for its tests is explored without it.
#![cfg(not(loom))]

mod admin;
mod bar;
mod command;
mod controller;
mod data;
mod error;
mod identify;
mod load;
mod memory;
mod queue;
mod queues;
pub mod spec;
#[cfg(feature = "verify")]
pub mod verify;

#[cfg(feature = "vfio-user-crate")]
pub use bar::CrateBar;
pub use bar::{Bar, BarError, ClientBar};
pub use command::{Command, Completion, Pointer, Status, copy_ranges, dsm_ranges};
pub use controller::{Capabilities, Controller, Setup};
pub use data::Buffer;
pub use error::{Error, Violation};
pub use identify::{IdentifyController, IdentifyNamespace};
pub use load::{Load, LoadConfig, Pattern, Step};
pub use memory::{HostMemory, Pages};
pub use queue::{Cq, Sq};
pub use queues::{Done, Queues};
