//! A virtio-net device.
//!
//! ```text
//!   control queue --> Control: commands --> Settings: what receive queues obey
//!   configuration space <-- config
//! ```
//!
//! Follows Virtio 1.3 (OASIS), §5.1. What is here: formats ([`spec`]), configuration space ([`config`]) and the control queue without its
//! ring ([`Control`]). Commands are parsed on a copy; each is obeyed as a whole or refused as a whole.
//!
//! Not implemented: GUEST_UFO and HOST_UFO (deprecated), RSC, STANDBY, DEVICE_STATS.

mod cable;
pub mod config;
mod control;
mod control_queue;
mod device;
mod header;
mod receive;
mod settings;
mod shared;
pub mod spec;
mod transmit;

pub use cable::Cable;
pub use control::{Control, Refused};
pub use device::{Net, NetOptions, PAIRS_MAX};
pub use header::BadHeader;
pub use settings::{Coalescing, Hashing, MAC_TABLE, Mac, RxMode, Settings, Steer, Vlans};
