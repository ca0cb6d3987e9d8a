//! A virtio-net device.
//!
//! ```text
//!   control queue --> Control: commands --> Settings --> Policy on the Board
//!   configuration space <-- config                          |  each queue's worker looks there
//!                                                           v
//!   driver's ring <-- filter <-- backlog <-- Inward <-- Outlet <-- port: by table, by what was learnt, or by hash
//!   driver's ring --> Transmit --> checked heads, offloads --> Lane of the port
//!        ^
//!        +-- Coalescer: when the driver is told
//! ```
//!
//! Follows Virtio 1.3 (OASIS), §5.1. Commands are parsed on a copy; each is obeyed as a whole or refused as a whole, and is in force on every
//! reactor before it is answered.
//!
//! Not implemented: GUEST_UFO and HOST_UFO (deprecated), RSC, STANDBY, DEVICE_STATS, UDP tunnel offloads; RING_RESET. What is offered, and
//! who does it, is in `docs/virtio-net.md`.

mod cable;
mod coalesce;
pub mod config;
mod control;
mod control_queue;
mod device;
#[doc(hidden)]
pub mod fuzzing;
mod header;
mod policy;
mod receive;
mod saved;
mod settings;
mod shared;
pub mod spec;
mod transmit;

pub use cable::Cable;
pub use control::{Control, Refused};
pub use device::{Net, NetOptions, PAIRS_MAX};
pub use header::BadHeader;
pub use settings::{Coalescing, Hashing, MAC_TABLE, Mac, RxMode, Settings, Steer, Vlans};
