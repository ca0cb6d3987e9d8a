//! Workers under a host that writes its queues by hand.

mod commands;
mod kept;
mod queues;
mod stops;
