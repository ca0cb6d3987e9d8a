//! Virtqueues as a device sees them, and the trait that every virtio device is.
//!
//! ```text
//!   attachment (vhost-user, ...)                 reactor
//!        |  QueueSetup, QueueChange, stop           |
//!        v                                          v
//!   VirtioDevice ------ moves the setup there ---> worker of the device
//!                                                    |  chains        ^ completions
//!                                                    v               |
//!                                        Queue: split::Ring | packed::Ring
//!                                          |- Inflight: what is being worked on, in shared memory
//!                                          `- QueueLog: what was written, for a migration
//! ```
//!
//! Everything in a ring is the driver's to change at any time. A descriptor, a table or an index is
//! read once, copied, checked, and never looked at again. Two kinds of error follow
//! ([`ChainError`], [`RingError`]): a chain that cannot be served is given back to the driver with
//! nothing done; a ring that makes no sense is stopped.
//!
//! Follows Virtio 1.3 (OASIS), §2.6 to §2.9, and the in-flight layouts of the vhost-user protocol.
//! Offered: split and packed rings, EVENT_IDX, INDIRECT_DESC, IN_ORDER, RING_RESET. Not implemented:
//! NOTIFICATION_DATA, NOTIF_CONFIG_DATA, ORDER_PLATFORM (vhost-user's back ends are ordered as CPUs
//! are), ACCESS_PLATFORM (addresses are never translated), admin virtqueues.

mod chain;
mod device;
mod error;
#[cfg(all(test, loom))]
mod explored;
pub mod features;
pub mod inflight;
mod line;
pub mod packed;
mod prefetch;
mod queue;
mod queues;
mod ring;
pub mod split;
mod sync;
mod table;
#[cfg(all(test, not(loom)))]
mod tests;

pub use bluff_reactor::{Distrust, Notice, Notifier};
pub use chain::Chain;
pub use device::{
    DeviceEvent, Position, QueueChange, QueueLog, QueueSetup, RingAddresses, Stop, StoppedQueue,
    VirtioDevice,
};
pub use error::{ChainError, DeviceError, RingError};
pub use line::{Line, LineCounters, Tell};
pub use queue::Queue;
pub use queues::{Message, Queues, Stopped, Wiring};
pub use ring::{Limits, Pop, Ring};
