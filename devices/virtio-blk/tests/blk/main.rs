//! The device, as its attachment and its driver see it. What counts files or memory,
//! or measures time, is in the program `alone`.

mod attack_requests;
mod attack_rings;
mod dirty_log;
mod requests;
mod restarts;
mod rig;
