//! The device against a driver that was written apart from it.

mod attacks;
mod control;
mod frames;
mod rig;
