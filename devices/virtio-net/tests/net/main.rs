//! The device against a driver that was written apart from it.

mod attacks;
mod coalescing;
mod control;
mod dirty_log;
mod frames;
mod receiving;
mod rig;
mod steering;
