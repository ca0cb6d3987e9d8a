//! The rings against a driver that was written apart from them, over memory that both share.

mod lies;
mod recovery;
mod rig;
