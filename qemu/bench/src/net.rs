//! Networks, measured: what a switch and its tunnels carry, by one core, against others that do the same.
//!
//! ```text
//!   core 0: our polling drivers           core 1: one switch at a time
//!     Station --- rings in shared memory --- net0   bluffd | OVS with DPDK | testpmd
//!     Station --- rings in shared memory --- net1, or up0: what is in the tunnels
//!     Wire: counts what comes ---- veth ---- the kernel's stack, AF_XDP
//! ```
//!
//! The rows are in [`rows`], who does their work in [`switches`], a measurement in [`measure`].

pub mod frames;
pub mod hugepages;
pub mod measure;
pub mod ovs;
pub mod process;
pub mod rows;
pub mod space;
pub mod station;
pub mod switches;
pub mod tap;
pub mod testpmd;
