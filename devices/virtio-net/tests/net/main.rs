//! The device against a driver that was written apart from it.

mod attacks;
mod control;
mod dirty_log;
mod frames;
mod rig;
