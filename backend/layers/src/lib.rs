//! Layers around volumes: [`delay`] and [`fault`]. Both are volumes that wrap a volume; they are there
//! to test what stands in front of them, and are enabled only by name.
//!
//! ```text
//!   op, tag --> Channel of a layer --> Relay: an op and a tag of its own --> inner channel
//!                   ^                                                          |
//!                   +-- when it is due, or not at all <--- completion ---------+
//! ```
//!
//! A layer's only clock is the `now` that it is polled with, and its only alarm
//! [`bluff_block::Channel::deadline`]; so a test may drive it with a time of its own. It relies on being polled
//! after each submit, as the contract of a channel says.
//!
//! Not implemented: limits of rate and bandwidth, encryption, caching.

pub mod delay;
pub mod fault;
mod options;
mod relay;

pub use delay::{Delay, DelayOptions};
pub use fault::{Fault, FaultHandle, FaultOptions};
pub use options::OptionError;
