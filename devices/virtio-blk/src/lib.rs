//! The virtio-blk device (virtio 1.3 §5.2).
//!
//! ```text
//!   Blk: VirtioDevice ---- messages ----> Worker, one for each queue, on a reactor
//!    features, config                       ring --> request --> ops --> ChannelHandle --> volume
//!                                                                             |
//!                                           ring <-- status <-- completions <-'
//! ```
//!
//! Offered: MQ, SEG_MAX, SIZE_MAX, BLK_SIZE, TOPOLOGY, RO, FLUSH, CONFIG_WCE, DISCARD, WRITE_ZEROES,
//! as far as the volume has them. Requests: IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES. Not
//! implemented: GET_LIFETIME, SECURE_ERASE, zoned devices, the legacy layout (GEOMETRY, SCSI).
//!
//! Read `worker` along the path of a request; the rest is what it stands on.

mod config;
mod counters;
mod device;
#[doc(hidden)]
pub mod fuzzing;
mod request;
mod slots;
pub mod spec;
mod worker;

pub use counters::QueueCounters;
pub use device::{Blk, BlkOptions};
