//! bluffd, bluffctl and what they compose
pub mod config;
pub mod control;
pub mod data;
pub mod data_half;
pub mod kinds;
pub mod message;
pub mod registry;
pub mod runtime_dir;
pub mod spec;
pub mod stats;
pub mod units;
