//! The rings against a driver that was written apart from them, over memory that both share.

mod differential;
mod later;
mod lies;
mod logging;
mod put_back;
mod recovery;
mod rig;
