//! The vhost-user attachment: sessions with front ends
mod attachment;
pub mod channel;
mod error;
pub mod framing;
pub mod keeper;
mod limit;
mod mailbox;
pub mod message;
pub mod plan;
pub mod session;
mod sessions;
mod slot;
pub mod spec;
pub mod state;
pub mod unix;

pub use attachment::{
    Attachment, AttachmentEvent, DEFAULT_BOUND, Listener, Mode, Negotiated, Options, Resume,
};
pub use error::Error;
pub use session::NetControl;
pub use sessions::{LoopHandle, SessionLoop};
pub use state::SessionState;
