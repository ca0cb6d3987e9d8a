//! A tenant's Ethernet segment on the card.
//!
//! ```text
//!   port --> rates --> (source) learn --> Fdb <-- learn (source) <-- tunnel
//!                      (destination) ------+------ (destination)
//! ```
//!
//! What is here: the forwarding database ([`Fdb`]) and the rates of ports ([`Bucket`]). The switch and the tunnels stand on them.

mod bucket;
mod fdb;

pub use bucket::{Bucket, Rate};
pub use fdb::{Entry, Fdb, FdbLimits, Key, Learnt, Place, Refused};
