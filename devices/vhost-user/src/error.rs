//! What can be wrong with a front end, and what follows from it.

use std::io;

use bluff_memory::MemoryError;
use bluff_virtio::DeviceError;

/// Why a message is not served, or a session ends.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A version other than 1 (vhost-user, "Header").
    #[error("protocol version {0}")]
    Version(u32),
    /// The reply flag on a request.
    #[error("reply flag on request {0}")]
    Reply(u32),
    /// More payload than any message has.
    #[error("payload of {0} bytes")]
    Oversized(u32),
    /// The connection ended in the middle of a message.
    #[error("connection ended within a message")]
    Truncated,
    /// A socket that is said to be readable again and again, and has nothing.
    #[error("data that cannot be read")]
    Unreadable,
    /// A request that this back end does not know or did not offer.
    #[error("request {0} is not supported")]
    Unsupported(u32),
    /// A payload whose length does not fit the request.
    #[error("request {request} with a payload of {len} bytes")]
    Length {
        /// The request.
        request: u32,
        /// Bytes of payload.
        len: usize,
    },
    /// More or fewer descriptors than the request takes.
    #[error("request {request} with {files} descriptors")]
    Files {
        /// The request.
        request: u32,
        /// How many there were; more than eight are not counted further.
        files: usize,
    },
    /// A vring that the device does not have.
    #[error("vring {0} does not exist")]
    Vring(u64),
    /// A field that is out of its range.
    #[error("{field} of {value:#x} is not allowed")]
    Value {
        /// Which field.
        field: &'static str,
        /// What it held.
        value: u64,
    },
    /// Feature bits that were not offered.
    #[error("feature bits {0:#x} were not offered")]
    Features(u64),
    /// What cannot be changed, or asked for, in this state.
    #[error("{0}")]
    State(&'static str),
    /// A descriptor that cannot be used for what it was sent for.
    #[error("{what} descriptor cannot be used")]
    Descriptor {
        /// What it was sent for.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Memory regions, logs or in-flight regions that cannot be mapped, or addresses outside of them.
    #[error("memory is not usable")]
    Memory(#[from] MemoryError),
    /// The device refuses.
    #[error("the device refuses")]
    Device(#[from] DeviceError),
    /// The front end has shrunk the file of its memory.
    #[error("the front end has shrunk its memory")]
    Poisoned,
    /// The socket, or what keeps the session's state.
    #[error("the connection fails")]
    Io(#[from] io::Error),
    /// Recorded state that cannot be taken up.
    #[error("recorded state does not fit: {0}")]
    Recorded(&'static str),
}

impl Error {
    /// Whether the stream of messages cannot be trusted any more: the connection is closed, also
    /// where the front end has asked for an answer.
    pub fn ends_session(&self) -> bool {
        matches!(
            self,
            Self::Version(_)
                | Self::Reply(_)
                | Self::Oversized(_)
                | Self::Truncated
                | Self::Unreadable
                | Self::Poisoned
                | Self::Io(_)
                | Self::Recorded(_)
        )
    }
}
