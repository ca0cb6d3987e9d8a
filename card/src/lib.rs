//! bluffd, bluffctl and what they compose
pub mod config;
pub mod kinds;
pub mod runtime_dir;
pub mod spec;
pub mod units;
