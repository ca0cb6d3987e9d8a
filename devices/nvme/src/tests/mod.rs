//! Workers under a host that writes its queues by hand.

mod commands;
mod kept;
mod lives;
mod queues;
mod stops;
