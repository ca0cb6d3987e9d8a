//! The device against a driver that was written apart from it.

mod attacks;
mod frames;
mod rig;
