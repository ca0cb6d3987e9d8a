//! The host against a controller of a few lines, which knows nothing of the host's code.
//!
//! ```text
//!   Controller, Queues, Load, Traffic --- Bar ---> Model: registers, queues over the same memory, a disk in a Vec
//! ```

mod bring_up;
mod commands;
mod data;
mod judge;
mod loads;
mod model;
mod over_socket;
mod pieces;
mod queues;
mod shadow;
