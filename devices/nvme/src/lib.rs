//! An NVMe controller: a PCI device over volumes.
//!
//! ```text
//!   Controller: bluff_pci::Device            attachment's thread: registers, doorbells
//!      |  messages                                  |
//!      v                                            v
//!   admin worker, on a reactor: admin queues --> Admin: Identify, features, logs, events --> Subsystem: namespaces
//!      |  creates, deletes, aborts                                                               |
//!      v                                                                                         v
//!   I/O workers, one for each CQ and its SQs, on reactors: fetch --> command --> ops --> ChannelHandle --> volume
//! ```
//!
//! Follows NVMe Base 2.1, NVM Command Set 1.1 and NVMe over PCIe Transport 1.1.
//!
//! Of the data path: Flush, Write, Read, Compare, Write Zeroes, Dataset Management, Verify and Copy (format 0, in a namespace); PRPs and SGLs; shadow
//! doorbells; interrupt coalescing. Not implemented: fused operations, metadata, protection information, directives, bit buckets, queues
//! that are not contiguous (CAP.CQR) or in controller memory.

mod admin;
mod admin_worker;
mod attached;
mod bells;
mod command;
mod controller;
mod counters;
mod data;
#[doc(hidden)]
pub mod fuzzing;
mod health;
mod interrupt;
mod journal;
mod namespace;
mod queue;
mod queues;
mod registers;
mod report;
pub mod spec;
mod subsystem;
mod token;
mod worker;

pub use admin::{CommandLimits, ControllerOptions};
pub use attached::{AnaState, Attached, Identity, Table};
pub use controller::{Controller, ControllerError, Keep, Runs};
pub use counters::QueueCounters;
pub use health::{Counters, Totals};
pub use namespace::{Namespace, NamespaceTable, Namespaces};
pub use subsystem::{
    ANA_GROUPS, FormatKeeper, Formatting, Kept, Listener, Membership, NamespaceFormat,
    NamespaceOptions, NotKept, Subsystem, SubsystemError, SubsystemEvent, SubsystemOptions,
    Transient,
};
pub use token::Token;

#[cfg(all(test, not(loom)))]
mod tests;
