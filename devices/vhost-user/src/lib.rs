//! The vhost-user attachment: sessions with front ends
pub mod channel;
mod error;
pub mod framing;
pub mod keeper;
pub mod message;
pub mod plan;
pub mod session;
pub mod spec;
pub mod state;
pub mod unix;

pub use error::Error;
pub use state::SessionState;
