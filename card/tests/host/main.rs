//! `bluffd` as its hosts see it, from end to end: the real daemon, vhost-user and vfio-user sockets, rings and queues in shared memory.
//!
//! ```text
//!   checker: what may be read       guest: rings, requests, events --> front end --> bluffd --> file or RAM
//!        ^                             |
//!        '------ every completion -----'
//! ```
//!
//! `BLUFF_TEST_LONG=1` runs more rounds of each.

mod capture;
mod counters;
mod formats;
mod kill;
mod libblkio;
mod memory;
mod neighbours;
mod net;
mod nvme;
mod nvme_kill;
mod orderly_end;
mod sessions;
mod silence;
mod storage;
mod support;
