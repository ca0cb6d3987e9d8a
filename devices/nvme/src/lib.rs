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

mod command;
mod counters;
mod data;
#[doc(hidden)]
pub mod fuzzing;
mod interrupt;
mod namespace;
mod queue;
mod report;
pub mod spec;
mod worker;

pub use counters::QueueCounters;
pub use namespace::{Namespace, NamespaceTable, Namespaces};

#[cfg(all(test, not(loom)))]
mod tests;
