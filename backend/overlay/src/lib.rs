//! A tenant's Ethernet segment on the card.
//!
//! ```text
//!   port --> rates --> (source) learn --> Fdb <-- learn (source) <-- tunnel
//!                      (destination) ------+------ (destination)
//! ```
//!
//! What is here: the switch between the ports of one card. Tunnels to other cards stand on it.

mod arrival;
mod bucket;
mod capture;
mod ecn;
mod fdb;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod network;
mod rules;
mod switch;
pub mod udp;
mod underlay;
pub mod wire;

pub use arrival::Arrival;
pub use bucket::{Bucket, Rate};
pub use capture::Outer;
pub use fdb::{Entry, Fdb, FdbLimits, Key, Learnt, Place, Refused};
pub use network::{Network, NetworkOptions, NetworkPort, PortOptions, PortRates};
pub use rules::{BadPrefix, Prefix, Rules};
pub use underlay::{Underlay, Uplink};
